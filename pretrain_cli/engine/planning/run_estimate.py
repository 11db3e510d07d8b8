"""Estimate a run before it starts: memory by part, the micro-batch that fits, time and disk.

For a GPU in the table of `gpu_specs` this is arithmetic, without torch. A present device reports
its free memory, and `count-params --calibrate` times a few steps on it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pretrain_cli.compilers import uncompiled_experts
from pretrain_cli.config.run_config import SpeedConfig, TrainSettings
from pretrain_cli.engine.planning.memory_estimate import (
    CUDA_CONTEXT,
    USABLE_FRACTION,
    Estimate,
    StepShape,
    estimate,
    largest,
    speed_settings,
)
from pretrain_cli.engine.runtime.gpu_specs import FLOAT8, STATED, called, stated_for
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import (
    cache_bytes,
    checkpoint_bytes,
    count_parameters,
    suggested_tokens,
    training_flops,
)

MFU = 0.4
"""Model FLOPs utilization assumed if no rate is measured."""
GPU_SETTINGS = {
    name: SpeedConfig.about(name).on_any_gpu
    for name in SpeedConfig.model_fields
    if SpeedConfig.about(name).on_any_gpu is not None
}
"""Values of `auto` on every GPU in the table. Settings that are False here have no effect on a GPU,
even if they are set to true. (For a present GPU, engine/runtime/speed.py decides.)"""
KEPT = TrainSettings()
CHECKPOINTS = KEPT.keep_checkpoints + KEPT.keep_best + 1
"""Most checkpoints on disk at once by default: the newest ones, the best, the one being written."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine that a run is planned for."""

    name: str
    device: str
    """cpu, cuda or mps."""
    gpus: int
    memory: int
    """Bytes of memory that a run may use on each GPU (or on the one device)."""
    peak_flops: float | None
    """Peak FLOP/s of each GPU in dense bfloat16; None if the maker's figure is unknown."""
    speed: dict[str, Any]
    """Resolved speed settings that memory depends on."""


@dataclass(frozen=True)
class Parallelism:
    """One way to distribute the model over the GPUs, with each GPU's micro-batch and memory."""

    micro_batch_size: int
    fits: bool
    memory: Estimate


@dataclass(frozen=True)
class Throughput:
    """Throughput of all GPUs together, and its source."""

    tokens_per_second: float
    mfu: float
    source: str


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Estimated needs of a run."""

    model: str
    parameters: int
    seq_len: int
    machine: Machine
    ways: dict[str, Parallelism]
    tokens: int
    pace: Throughput | None
    """Measured or assumed throughput; None if nothing was measured and the peak is unknown."""
    checkpoint: int
    """Bytes of one checkpoint."""
    checkpoints: int
    """Bytes of all checkpoints that are on disk at once."""
    sampling_weights: int
    """Bytes of the weights in bfloat16."""
    sampling_cache: int
    """Bytes of the KV cache of one text of `seq_len` tokens in bfloat16."""

    @property
    def seconds(self) -> float | None:
        return None if self.pace is None else self.tokens / self.pace.tokens_per_second

    def record(self) -> dict[str, Any]:
        """Return the estimate for JSON, with `phases` under its published key, `moments`."""
        record: dict[str, Any] = asdict(self) | {"seconds": self.seconds}
        for name, way in self.ways.items():
            memory = record["ways"][name]["memory"]
            memory["moments"] = memory.pop("phases")
            memory |= {"peak_moment": way.memory.phase, "peak": way.memory.peak}
        return record


def forecast(
    name: str,
    config: ModelConfig,
    seq_len: int,
    machine: Machine,
    *,
    micro_batch_size: int | None = None,
    tokens: int | None = None,
    mfu: float | None = None,
    pace: Throughput | None = None,
) -> RunEstimate:
    """Estimate a run.

    | argument         | meaning                               | None means                |
    |------------------|---------------------------------------|---------------------------|
    | micro_batch_size | sequences that a GPU computes at once | the largest that fits     |
    | tokens           | tokens to train on                    | counting.suggested_tokens |
    | mfu              | assumed share of the stated peak      | MFU                       |
    | pace             | measured throughput; replaces `mfu`   | the throughput at `mfu`   |
    """
    checkpoint = checkpoint_bytes(config)
    return RunEstimate(
        model=name,
        parameters=count_parameters(config).total,
        seq_len=seq_len,
        machine=machine,
        ways=ways(config, seq_len, machine, micro_batch_size),
        tokens=tokens or suggested_tokens(config),
        pace=pace or _assumed(config, seq_len, machine, mfu or MFU),
        checkpoint=checkpoint,
        checkpoints=CHECKPOINTS * checkpoint,
        sampling_weights=2 * count_parameters(config).total,
        sampling_cache=cache_bytes(config, seq_len, 2),
    )


def ways(
    config: ModelConfig, seq_len: int, machine: Machine, micro_batch_size: int | None = None
) -> dict[str, Parallelism]:
    """Return the estimates by name: "ddp" and "fsdp" for several GPUs, else "alone".

    If no micro-batch fits, the estimate is for 1 and its `fits` is False.
    """
    found = {}
    for name in ("ddp", "fsdp") if machine.gpus > 1 else ("alone",):

        def of(size: int, name: Any = name) -> Estimate:
            return estimate(
                StepShape(
                    model=config,
                    seq_len=seq_len,
                    micro_batch_size=size,
                    device=machine.device,
                    parallel=name,
                    ranks=machine.gpus,
                    **machine.speed,
                )
            )

        size = micro_batch_size or max(1, largest(lambda size: of(size).peak, machine.memory))
        memory = of(size)
        found[name] = Parallelism(size, memory.peak <= machine.memory, memory)
    return found


def _assumed(config: ModelConfig, seq_len: int, machine: Machine, mfu: float) -> Throughput | None:
    if machine.peak_flops is None:
        return None
    rate = mfu * machine.peak_flops * machine.gpus / training_flops(config, seq_len).exact
    peak = f"{machine.peak_flops / 1e12:.0f} TFLOP/s, as the maker states"
    return Throughput(rate, mfu, f"assumed, of {peak}")


# --- machines ------------------------------------------------------------------------------------


def find_machine(
    device: str | None, gpus: int, asked: SpeedConfig, model: ModelConfig | None = None
) -> Machine:
    """Return a GPU of the table, which need not be present, or else the present device `device`,
    with the speed settings that this model gets there.

    Raises ConfigError if neither exists, or if the device can't train in a requested float8, or the
    model can't be compiled as requested.
    """
    stated = called(device) if device else None
    if device is None or stated is None:
        return _here(device or "auto", gpus, asked, model)
    if asked.dtype == "float8":
        _check_float8(stated, asked)
    speed = {
        key: GPU_SETTINGS[key] if value == "auto" or GPU_SETTINGS.get(key) is False else value
        for key, value in speed_settings(asked).items()
    }
    if speed["compile"] and model:
        reason = uncompiled_experts(model.num_experts, speed["dtype"], asked.compile)
        speed["compile"] = not reason
    return Machine(
        name=stated,
        device="cuda",
        gpus=gpus,
        memory=int(USABLE_FRACTION * (STATED[stated].memory - CUDA_CONTEXT)),
        peak_flops=STATED[stated].flops,
        speed=speed,
    )


def _check_float8(stated: str, asked: SpeedConfig) -> None:
    """Raise ConfigError if training on this GPU would refuse float8."""
    reason = "it is made to be compiled, and compile is false" if asked.compile is False else ""
    if STATED[stated].capability < FLOAT8:
        reason = f"{stated} doesn't multiply in it"
    if reason:
        raise ConfigError(f"speed.dtype: 'float8' can't be used: {reason}; use bfloat16")


def _here(device: str, gpus: int, asked: SpeedConfig, model: ModelConfig | None) -> Machine:
    from pretrain_cli.engine.planning.micro_batch import memory_here
    from pretrain_cli.engine.runtime.distributed import device_name, find_device
    from pretrain_cli.engine.runtime.speed import resolve_speed

    if device not in ("auto", "cpu", "mps") and not device.startswith("cuda"):
        known = [part.lower().replace(" ", "-") for part in STATED]
        raise ConfigError(
            f"--device: '{device}' is not cpu, cuda, cuda:N, mps or one of {', '.join(known)}"
            + did_you_mean(device.lower(), known)
        )
    place = find_device(device)
    if place.type == "cpu" and gpus > 1:
        raise ConfigError(f"--gpus: {gpus} of a machine without any; name them with --device")
    name, speed = device_name(place), resolve_speed(asked, place, model=model)
    stated = stated_for(name)
    return Machine(
        name=name,
        device=place.type,
        gpus=gpus,
        memory=int(memory_here(place)),
        peak_flops=stated.flops if stated else None,
        speed=speed_settings(speed),
    )
