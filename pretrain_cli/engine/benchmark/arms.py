"""Arms of a benchmark: attention backends, an ablation, a sweep, or another program.

An ablation takes its settings from the fields of SpeedConfig, so it cannot miss one.
"""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Collection
from typing import Any

import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import peers
from pretrain_cli.engine.benchmark.timing import resolve
from pretrain_cli.engine.benchmark.workload import Arm, Workload
from pretrain_cli.engine.runtime.process_settings import LATE
from pretrain_cli.engine.runtime.speed import (
    check_float8,
    no_attention,
)
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.config import FULL, SLIDING, ModelConfig, variant

BASELINE, ALL_ON = "baseline", "all on"
OTHER_DTYPE = {"bfloat16": "float8", "float8": "bfloat16"}
"""Second dtype, compared in the arm with everything on. float8 is compared with bfloat16, and pays
off only when compiled."""

FindModel = Callable[[str], tuple[str, ModelConfig]]


# --- attention backends --------------------------------------------------------------------------


def parse_backends(text: str) -> list[str]:
    """Parse `eager,sdpa` or `all`."""
    names = list(BACKENDS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BACKENDS:
            known = [*BACKENDS, "all"]
            raise ConfigError(
                f"--attn: '{name}' is not one of {', '.join(known)}{did_you_mean(name, known)}"
            )
    return list(dict.fromkeys(names))


def backend_arms(workload: Workload, asked: SpeedConfig, names: list[str]) -> list[Arm]:
    """Return an arm for each backend: forward only if the backend cannot train here, left out if it
    cannot run."""
    device, arms, first = torch.device(workload.device), list[Arm](), ""
    for name in names:
        reason, left_out = (
            no_attention(name, asked, device, training=training, model=workload.model)
            for training in (True, False)
        )
        speed = asked.model_copy(update={"attention": name})
        same_as = "" if reason else first
        arms.append(
            Arm(
                name=name,
                workload=workload,
                speed=speed,
                same_as=same_as,
                beside=same_as,
                forward_only=reason,
                left_out=left_out,
            )
        )
        first = first or ("" if reason else name)
    return arms


# --- ablation ------------------------------------------------------------------------------------


def choices(settings: type[SpeedConfig], name: str) -> list[Any]:
    """Return the values of a setting, except auto, with the plain one first."""

    def values(kind: Any) -> list[Any]:
        if kind is bool:
            return [False, True]
        if typing.get_origin(kind) is typing.Literal:
            return [value for value in typing.get_args(kind) if value != "auto"]
        return [value for part in typing.get_args(kind) for value in values(part)]

    return values(settings.model_fields[name].annotation)


def ablation(
    workload: Workload, asked: SpeedConfig, given: Collection[str] = frozenset()
) -> list[Arm]:
    """Return the arms of an ablation: everything plain; each value of each setting alone; the
    requested settings together; and these with each setting made plain.

    The settings in `given` keep the requested value in every arm and get no arm of their own.
    """
    settings = type(asked)
    varied = [name for name in settings.model_fields if name not in given]
    plain = {name: choices(settings, name)[0] for name in varied}
    baseline = asked.model_copy(update=plain)
    arms = [Arm(name=BASELINE, workload=workload, speed=baseline)]

    def add(name: str, group: str, base: SpeedConfig, setting: str, value: Any) -> None:
        beside = BASELINE if base is baseline else ALL_ON
        speed = base.model_copy(update={setting: value})
        arms.append(
            Arm(
                name=name,
                group=group,
                workload=workload,
                speed=speed,
                same_as=BASELINE,
                beside=beside,
                left_out=_without_effect(speed, setting, value, workload),
            )
        )

    for name in varied:
        for value in choices(settings, name)[1:]:
            label = name if value is True else f"{name} {value}"
            add(f"+ {label}", "alone on", baseline, name, value)
    arms.append(Arm(name=ALL_ON, workload=workload, speed=asked, same_as=BASELINE, beside=BASELINE))
    in_force = resolve(workload, asked)
    for name, value in plain.items():
        decision = in_force.decisions[name]
        # LATE holds for this process only; arms run in fresh processes, where the setting applies
        if decision.in_force != value or decision.reason == LATE:
            add(f"− {name}", "all on but", asked, name, value)
    other = None if "dtype" in given else OTHER_DTYPE.get(in_force.dtype)
    if other and not _without_effect(
        asked.model_copy(update={"dtype": other}), "dtype", other, workload
    ):
        add(f"dtype {other}", "all on but", asked, "dtype", other)
    return arms


def _without_effect(speed: SpeedConfig, setting: str, value: Any, workload: Workload) -> str:
    """Return the reason that a setting changes nothing here, or an empty string."""
    if reason := type(speed).about(setting).not_in_a_step:
        return reason
    try:
        if value == "float8":
            check_float8(workload.model)
        decision = resolve(workload, speed).decisions[setting]
    except ConfigError as error:
        return str(error)
    if decision.in_force != value and decision.reason != LATE:  # LATE: applies in the arm's process
        return decision.reason
    return ""


# --- sweep ---------------------------------------------------------------------------------------


def sweep(workload: Workload, asked: SpeedConfig, axes: list[str], find: FindModel) -> list[Arm]:
    """Return an arm for each combination of the values of `key=v1,v2,…`."""
    parsed = [_axis(text) for text in axes]
    keys = [key for key, _ in parsed]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--sweep: {key} is there twice; give its values in one")
    arms = []
    for values in itertools.product(*(values for _, values in parsed)):
        changed = workload
        # the model first: the other keys modify it
        for key, value in sorted(zip(keys, values, strict=True), key=lambda kv: kv[0] != "model"):
            changed = SWEPT[key](changed, value, find)
        check_length(changed)
        name = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        beside = arms[0].name if arms else ""
        arms.append(Arm(name=name, workload=changed, speed=asked, beside=beside))
    return arms


def check_length(workload: Workload) -> None:
    """Raise ConfigError for sequences longer than the model's positions."""
    most = workload.model.max_position_embeddings
    if workload.seq_len > most:
        raise ConfigError(
            f"seq-len: {workload.seq_len:,} is beyond the {most:,} positions of {workload.name}"
        )


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in rest.split(",")]
    if not equals or not all(values):
        raise ConfigError(f"--sweep: '{text}' is not of the form KEY=V1,V2")
    if key not in SWEPT:
        known = ", ".join(SWEPT)
        raise ConfigError(f"--sweep: '{key}' is not one of {known}{did_you_mean(key, SWEPT)}")
    return key, list(dict.fromkeys(values))


def _number(key: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--sweep: {key} '{text}' is not a whole number above 0")
    return int(text)


def _seq_len(workload: Workload, text: str, find: FindModel) -> Workload:
    return dataclasses.replace(workload, seq_len=_number("seq-len", text))


def _micro_batch(workload: Workload, text: str, find: FindModel) -> Workload:
    return dataclasses.replace(workload, micro_batch_size=_number("micro-batch", text))


def _vocab(workload: Workload, text: str, find: FindModel) -> Workload:
    model = variant(workload.model, {"vocab_size": _number("vocab", text)})
    return dataclasses.replace(workload, model=model)


def _window(workload: Workload, text: str, find: FindModel) -> Workload:
    """Return the workload with this window in its sliding layers. `none` makes every layer full
    attention."""
    kinds = workload.model.layer_types
    if SLIDING not in kinds:
        raise ConfigError(f"--sweep: window {text}: {workload.name} has no sliding layers")
    if text == "none":
        model = variant(workload.model, {"layer_types": (FULL,) * len(kinds)})
    else:
        model = variant(workload.model, {"sliding_window": _number("window", text)})
    return dataclasses.replace(workload, model=model)


def _model(workload: Workload, text: str, find: FindModel) -> Workload:
    name, model = find(text)
    return dataclasses.replace(workload, name=name, model=model)


SWEPT: dict[str, Callable[[Workload, str, FindModel], Workload]] = {
    "seq-len": _seq_len,
    "window": _window,
    "vocab": _vocab,
    "micro-batch": _micro_batch,
    "model": _model,
}


# --- comparison with a peer ----------------------------------------------------------------------


def versus(workload: Workload, asked: SpeedConfig, peer: str) -> list[Arm]:
    """Return arms that compare our step with a peer's, uncompiled and, unless that is off,
    compiled. The peer runs as shipped, and tuned: with the process settings of our step."""
    if peer not in peers.PEERS:
        known = ", ".join(peers.PEERS)
        raise ConfigError(f"--vs: '{peer}' is not one of {known}{did_you_mean(peer, peers.PEERS)}")
    peers.require(peer)
    if asked.dtype == "float8":
        raise ConfigError(f"--vs: {peer} does not train in float8; give --dtype bfloat16 to both")
    settings = type(asked)
    shipped = {name: choices(settings, name)[0] for name in settings.names("is_process_wide")}
    arms: list[Arm] = []

    def add(program: str, group: str, speed: SpeedConfig) -> None:
        for compiled in (True, False) if asked.compile is not False else (False,):
            arms.append(
                Arm(
                    name=f"{program}{', compiled' if compiled else ''}"
                    + (", tuned" if group == OURS_SET else ""),
                    group=group,
                    workload=workload,
                    speed=speed.model_copy(update={"compile": compiled}),
                    peer=peer if program == peer else "",
                    same_as=arms[0].name if arms else "",
                    beside=arms[0].name if arms else "",
                    left_out=_without_effect(
                        speed.model_copy(update={"compile": compiled}),
                        "compile",
                        compiled,
                        workload,
                    ),
                )
            )

    add("pretrain", "", asked)
    add(peer, SHIPPED, asked.model_copy(update=shipped))
    add(peer, OURS_SET, asked)
    return arms


SHIPPED, OURS_SET = "as shipped", "with our process settings"
