"""Resolve the speed settings: the requested value, the value in force, and the reason if they
differ.

    SpeedConfig ── RULES[name].decide ──> Speed ── RULES[name].apply ──> process
      asked, auto                        in force                └─────> build_model, compile_blocks

Each setting is a field of SpeedConfig, and a row of RULES if its value depends on the device or it
changes the process. `auto` takes the value that suits the device. A value that the device can't
provide raises ConfigError if another implementation would have to replace it (attention, float8).
If it merely has no effect, `Speed.departures` reports it.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from pretrain_cli.compilers import no_cpp, no_triton, uncompiled_experts
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.runtime import host_memory, onednn, process_settings
from pretrain_cli.engine.runtime.gpu_specs import FLOAT8
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import float8
from pretrain_cli.model.attention_backends import flash
from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS, best_backend
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.loss_backends import LOSS_BACKENDS
from pretrain_cli.model.parameter_map import Merged

DETERMINISM = (
    "the same sums in the same order every time. Gradients of attention and of the embedding take "
    "longer on a GPU, fresh memory is filled, and what has no such kernel is refused"
)


@dataclass(frozen=True)
class Decision:
    """One setting: the requested value and the value in force."""

    setting: str
    asked: Any
    in_force: Any
    reason: str
    """Reason for the value in force; empty if it is the requested one."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Resolved speed settings: the values in force, by the names of SpeedConfig's fields."""

    attention: str
    dtype: str
    """Dtype of activations and products: float32, bfloat16 or float8."""
    compile: bool
    cuda_graphs: bool
    recompute_cheap: bool
    merged_qkv: bool
    merged_gate_up: bool
    fused_optimizer: bool
    chunked_loss: bool | str
    """True for the chunked loss, False for whole logits, or a name in LOSS_BACKENDS."""
    activation_checkpointing: bool
    prefetch: bool
    keep_freed_memory: bool
    deterministic: bool
    decisions: Mapping[str, Decision]
    """Every setting, with the reason for its value."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations, and of all matrix products that are not in float8."""
        return _compute_dtype(self.dtype)

    def record(self) -> dict[str, dict[str, Any]]:
        """Return asked, in_force and reason for each setting, for run.yaml and benchmark files."""
        return {
            name: {"asked": d.asked, "in_force": d.in_force}
            | ({"reason": d.reason} if d.reason else {})
            for name, d in self.decisions.items()
        }

    def departures(self) -> list[str]:
        """Return a line for each setting whose requested value, unless auto, is not in force."""
        return [
            f"speed.{d.setting}: {d.in_force}, {d.reason}"
            for d in self.decisions.values()
            if d.asked not in ("auto", d.in_force)
        ]


@dataclass(frozen=True)
class Here:
    """Facts on which a decision may depend."""

    device: torch.device
    asked: SpeedConfig
    training: bool
    """False to evaluate or sample only."""
    in_force: Mapping[str, Any]
    """Values of the settings that SpeedConfig declares before this one."""
    model: ModelConfig | None = None
    """None if no model is known yet."""
    is_masked: bool = False
    """See `hides_keys`."""


def hides_keys(model: ModelConfig, seq_len: int, *, documents: bool) -> bool:
    """Return whether a window shorter than the sequence, or documents, hide keys of it."""
    windows = [model.window(kind) for kind in set(model.layer_types)]
    return documents or any(window is not None and window < seq_len for window in windows)


@dataclass(frozen=True)
class Rule:
    """Functions that resolve one setting and apply it."""

    decide: Callable[[Any, Here], tuple[Any, str]] | None = None
    """(requested value, here) -> (value in force, reason; empty if it is the requested one). None
    if the requested value is always in force."""
    apply: Callable[[Any], None] | None = None
    """Apply the value in force to the whole process. None for a setting of the model or the
    loop."""


def resolve_speed(
    asked: SpeedConfig,
    device: torch.device,
    *,
    training: bool = True,
    model: ModelConfig | None = None,
    is_masked: bool = False,
) -> Speed:
    """Resolve every setting for this device. `training` is False to evaluate or sample only;
    `is_masked` as `hides_keys` returns it.

    Raises ConfigError for an attention backend that can't run (or train) here, for float8 if the
    device can't use it or `training` is False, and for compile if the model can't be compiled.
    """
    in_force: dict[str, Any] = {}
    here = Here(device, asked, training, in_force, model, is_masked)
    decisions: dict[str, Decision] = {}
    for setting, value in asked.model_dump().items():
        decide = RULES.get(setting, Rule()).decide
        in_force[setting], reason = decide(value, here) if decide else (value, "")
        decisions[setting] = Decision(setting, value, in_force[setting], reason)
    values = {f.name: in_force[f.name] for f in fields(Speed) if f.name != "decisions"}
    return Speed(**values, decisions=decisions)


def apply_process_settings(speed: Speed) -> None:
    """Apply the process-wide settings. Call it before any tensor is made."""
    for name, rule in RULES.items():
        if rule.apply:
            rule.apply(speed.decisions[name].in_force)


@contextlib.contextmanager
def only_deterministic(speed: Speed) -> Generator[None]:
    """Turn the error for an operation without a deterministic kernel into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if not speed.deterministic or "deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not")[0]
        raise ConfigError(
            f"speed.deterministic: {operation} has no deterministic kernel on this device; leave "
            "--deterministic out, or choose another --attn"
        ) from None


def build_model(config: ModelConfig, speed: Speed, device: torch.device) -> Decoder:
    """Return the decoder with these settings. Its weights are allocated but not initialized."""
    with torch.device("meta"):
        model = Decoder(
            config,
            attention=speed.attention,
            dtype=speed.compute_dtype,
            merged=Merged(speed.merged_qkv, speed.merged_gate_up),
            chunked_loss=speed.chunked_loss,
            activation_checkpointing=speed.activation_checkpointing,
        )
    if speed.dtype == "float8":
        check_float8(config)
        float8.multiply_by(model, float8.float8_product())
    return model.to_empty(device=device)


def check_float8(config: ModelConfig) -> None:
    """Raise ConfigError if this model can't be trained in float8."""
    if reason := float8.no_float8(config):
        raise ConfigError(f"speed.dtype: 'float8' can't be used: {reason}; use bfloat16")


def compile_blocks(model: Decoder, speed: Speed) -> None:
    """Compile blocks and softmax in place, if speed.compile is true."""
    if speed.compile:
        model.compile_parts(recompute_cheap=speed.recompute_cheap, cuda_graphs=speed.cuda_graphs)


def _attention(asked: str, here: Here) -> tuple[str, str]:
    conditions = _conditions(here)
    if asked == "auto":
        return best_backend(conditions)
    if reason := BACKENDS[asked].unavailable(conditions):
        raise ConfigError(f"speed.attention: '{asked}' can't be used: {reason}; use auto")
    return asked, ""


def _conditions(here: Here) -> Conditions:
    dtype = _compute_dtype(_dtype(here.asked.dtype, here)[0])
    head_dim = here.model.head_dim if here.model else None
    return Conditions(here.device, dtype, here.training, head_dim, here.is_masked)


def no_attention(
    backend: str, asked: SpeedConfig, device: torch.device, *, training: bool, model: ModelConfig
) -> str:
    """Return the reason why this attention backend can't be used; empty if it can."""
    conditions = _conditions(Here(device, asked, training, {}, model))
    return BACKENDS[backend].unavailable(conditions) or ""


def _flash_attention(asked: str, here: Here) -> tuple[str, str]:
    if asked == "auto":
        return flash.BUILT_IN, "PyTorch's own kernels"
    reason = "" if asked == flash.BUILT_IN else flash.no_flash(asked, here.device)
    if reason:
        raise ConfigError(f"speed.flash_attention: '{asked}' can't be used: {reason}; use auto")
    return asked, ""


def _compute_dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "float8" else getattr(torch, name)


def _dtype(asked: str, here: Here) -> tuple[str, str]:
    device = here.device
    if asked == "float8":
        reason = "it is a way to train"
        if here.training:
            reason = float8_unavailable(device, here.asked.compile)
        if reason:
            raise ConfigError(f"speed.dtype: 'float8' can't be used: {reason}; use bfloat16")
    if asked != "auto":
        return asked, ""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU multiplies in bfloat16; weights and optimizer stay float32"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
        return "bfloat16", "this CPU multiplies in bfloat16; weights and optimizer stay float32"
    return "float32", f"this {device.type} device has no fast bfloat16"


def float8_unavailable(device: torch.device, compile_asked: bool | str) -> str:
    """Return the reason why this device can't use float8 products; empty if it can."""
    least = f"compute capability {FLOAT8[0]}.{FLOAT8[1]}"
    if device.type != "cuda" or torch.version.hip:
        return f"it is for NVIDIA's GPUs, from {least} on"
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8:
        has = f"{capability[0]}.{capability[1]}"
        return f"it takes {least}, and {torch.cuda.get_device_name(device)} has {has}"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'pretrain[float8]')"
    compiled, why = _can_compile(compile_asked, device)
    if not compiled:
        return f"it is made to be compiled, and {why or 'compile is false'}"
    return ""


def _float32_matmul(asked: str, here: Here) -> tuple[str, str]:
    if here.device.type != "cuda":
        if asked in ("auto", "highest"):
            return "highest", "" if asked == "highest" else "TF32 is a GPU's"
        return "highest", f"'{asked}' is TF32 or bfloat16 on a GPU; it has no effect here"
    return ("high", "TF32 for what stays in float32") if asked == "auto" else (asked, "")


def _compile(asked: bool | str, here: Here) -> tuple[bool, str]:
    compiled, why = _can_compile(asked, here.device)
    if not compiled or here.model is None:
        return compiled, why
    reason = uncompiled_experts(here.model.num_experts, here.in_force["dtype"], asked)
    return not reason, reason or why


def _can_compile(asked: bool | str, device: torch.device) -> tuple[bool, str]:
    if asked is False:
        return False, ""
    if device.type == "cpu":
        if asked == "auto":
            return False, "compiling on a CPU takes 10 to 40 seconds; worth it for long runs"
        if reason := no_cpp():
            return False, reason
    elif device.type == "cuda":
        if reason := no_triton():
            return False, reason
    elif asked == "auto":
        return False, f"not tried on {device.type}"
    return True, "" if asked is True else "kernels fused across each block"


def _cuda_graphs(asked: bool, here: Here) -> tuple[bool, str]:
    if not asked:
        return False, ""
    if not here.training:
        return False, "a way to train"
    checkpointed = here.asked.activation_checkpointing
    if reason := no_cuda_graphs(here.device, here.in_force["compile"], checkpointed=checkpointed):
        raise ConfigError(f"speed.cuda_graphs: true can't be used: {reason}; use false")
    return True, ""


def no_cuda_graphs(device: torch.device, compiled: bool, *, checkpointed: bool = False) -> str:
    """Return the reason why blocks can't be CUDA graphs; empty if they can."""
    if device.type != "cuda" or torch.version.hip:
        return "CUDA graphs are for NVIDIA's GPUs"
    if not compiled:
        return "they are made of compiled blocks, and compile is off"
    if checkpointed:
        # A RuntimeError of torch 2.14: "observed an input tensor deallocate during graph recording
        # that did not occur during replay".
        return "PyTorch can't replay blocks that activation_checkpointing runs twice"
    return ""


def _recompute_cheap(asked: bool | str, here: Here) -> tuple[bool, str]:
    if asked is False:
        return False, ""
    if not here.in_force["compile"]:
        return False, "a setting of compiled blocks"
    if here.device.type != "cpu":
        return False, "what torch.compile keeps by itself is kept; not tried on a GPU"
    return True, "" if asked is True else "as fast as reading them; a third fewer activations"


def _fused_optimizer(asked: bool | str, here: Here) -> tuple[bool, str]:
    if asked is False:
        return False, ""
    if here.device.type in ("cpu", "cuda", "mps"):
        return True, "" if asked is True else "one pass over the parameters"
    return False, f"PyTorch has no fused AdamW for {here.device.type}"


def _chunked_loss(asked: bool | str, here: Here) -> tuple[bool | str, str]:
    if not isinstance(asked, str):
        return asked, ""
    if not here.training:
        return True, f"{asked} is a way to train"
    if reason := LOSS_BACKENDS[asked].unavailable(here.device):
        raise ConfigError(f"speed.chunked_loss: '{asked}' can't be used: {reason}; use true")
    return asked, ""


def _cudnn_benchmark(asked: bool | str, here: Here) -> tuple[bool, str]:
    if asked is False:
        return False, ""
    if here.asked.deterministic:
        return False, "it chooses kernels by their times, which differ from run to run"
    if asked is True and here.device.type == "cuda":
        return True, ""
    return False, "it tunes convolutions, and these models have none"


def _apply_cudnn_benchmark(in_force: bool) -> None:
    torch.backends.cudnn.benchmark = in_force


def _apply_deterministic(in_force: bool) -> None:
    torch.backends.cudnn.deterministic = in_force
    torch.use_deterministic_algorithms(in_force)
    if in_force:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts


def _apply_expandable_segments(in_force: bool) -> None:
    # Too late for the environment variable: CUDA read it when the device was looked up.
    if torch.cuda.is_available() and not process_settings.allocator_variable():
        if hasattr(torch._C, "_accelerator_setAllocatorSettings"):  # pyright: ignore
            configure = torch._C._accelerator_setAllocatorSettings  # pyright: ignore
        else:  # torch 2.11
            configure = torch.cuda.memory._set_allocator_settings  # pyright: ignore
        configure(f"expandable_segments:{in_force}")


RULES: dict[str, Rule] = {
    # Memory first: no tensor may be made before it is set.
    "keep_freed_memory": Rule(
        lambda asked, here: process_settings.keep_freed_memory(asked, here.device.type),
        host_memory.apply_memory,
    ),
    "float32_matmul": Rule(_float32_matmul, torch.set_float32_matmul_precision),
    # After float32_matmul, which resets it.
    "onednn_matmul": Rule(
        lambda asked, here: onednn.onednn_matmul(asked, here.device), onednn.apply
    ),
    "passive_threads": Rule(lambda asked, _: process_settings.passive_threads(asked)),
    "cudnn_benchmark": Rule(_cudnn_benchmark, _apply_cudnn_benchmark),
    "deterministic": Rule(apply=_apply_deterministic),
    "expandable_segments": Rule(
        lambda asked, here: process_settings.expandable_segments(asked, here.device.type),
        _apply_expandable_segments,
    ),
    "flash_attention": Rule(_flash_attention, flash.use_flash),
    "attention": Rule(_attention),
    "dtype": Rule(_dtype),
    "compile": Rule(_compile),
    "cuda_graphs": Rule(_cuda_graphs),
    "recompute_cheap": Rule(_recompute_cheap),
    "fused_optimizer": Rule(_fused_optimizer),
    "chunked_loss": Rule(_chunked_loss),
}
"""Settings whose value depends on the device or changes the process, applied in this order."""
