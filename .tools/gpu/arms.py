"""Slot `arms`: ways of computing the same, each timed alone.

loss        forward and backward of the loss, 8,192 tokens, both vocabularies
attention   forward and backward of attention at T = 8,192, a window and full causal
optimizer   the update of every weight, without a training step
step        whole training steps: backends and FlashAttention releases at T = 8,192, no compile,
            CUDA graphs, float8

Arms of a kind follow each other, and are compared with each other only.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu.check import Check, free_memory
from gpu.losses import loss_arms, loss_inputs
from gpu.measure import call_figures, first_call_s, kernels, peak_tflops, profiled
from gpu.mfu import reset_compiler
from gpu.shapes import model_of
from gpu.steps import Ours, Timed
from pretrain_cli.config.run_config import OptimizerSettings, SpeedConfig
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.optim.kinds import OPTIMIZERS
from pretrain_cli.engine.optim.optimizer import build_optimizer, set_rates
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import (
    apply_process_settings,
    build_model,
    float8_unavailable,
    no_cuda_graphs,
    resolve_speed,
)
from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.flash import RELEASES, no_flash
from pretrain_cli.model.attention_backends.mask import Mask
from pretrain_cli.model.counting import keys_seen, training_flops
from pretrain_cli.model.loss import unit_gradient

GEMMA, QWEN = "gemma3-270m", "qwen3-0.6b"
CALL_S, COMPILED_S, STEP_S = 3.0, 8.0, 20.0
"""Seconds of an arm: a call, a compiled call, and a step with a filled cache."""


def run(check: Check) -> None:
    device = find_device(check.device)
    apply_process_settings(resolve_speed(SpeedConfig(), device))
    if check.compile_only:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(0.25, device)
    else:
        losses(check, device)
        optimizers(check, device)
    attention(check, device)
    steps(check, device)


def timed_call(
    check: Check, name: str, call: Callable[[], object], *, count: int, flops: float = 0.0
) -> None:
    """Write the time and memory of a call, or in the background only compile it."""
    device = find_device(check.device)
    if not check.fits(name, COMPILED_S):
        return
    with check.arm(name) as figures:
        if check.compile_only:
            figures["compile_s"] = first_call_s(call, device)
            return
        figures |= call_figures(call, device, count=2 if check.rehearse else count)
        if flops:
            figures["tflops_per_s"] = flops / figures["call_median_ms"] / 1e9
    free_memory()


# --- loss ----------------------------------------------------------------------------------------


def losses(check: Check, device: torch.device) -> None:
    tokens = 64 if check.rehearse else 8192
    one = unit_gradient(device)  # as training passes it
    for name in (GEMMA, QWEN):
        model = model_of(name, check)
        V, D = model.vocab_size, model.hidden_size
        for arm, loss in loss_arms(device, z_loss=0.0).items():
            inputs = loss_inputs(tokens, D, V, torch.bfloat16, device)

            def call(loss: Any = loss, inputs: Any = inputs) -> None:
                loss(*inputs).backward(one)
                inputs[0].grad = inputs[1].grad = None

            said = f"loss, {name}, V {V:,}, D {D:,}, {arm}"
            timed_call(check, said, call, count=10, flops=6.0 * tokens * V * D)
            del inputs, call
        reset_compiler()


# --- attention -----------------------------------------------------------------------------------


def attention(check: Check, device: torch.device) -> None:
    """Time each backend's attention of gemma3-270m's and qwen3-0.6b's shapes, and PyTorch's dense
    causal one beside the window."""
    rows, length = (1, 160) if check.rehearse else (2, 8192)
    for name, dense in ((GEMMA, False), (GEMMA, True), (QWEN, True)):
        model = model_of(name, check)
        window = None if dense else model.sliding_window
        mask = Mask(length, length, window, rows=rows)
        heads = model.num_attention_heads, model.num_key_value_heads
        said = f"attention, {name}, T {length}, "
        said += f"window {window}" if window else "causal"
        flops = 12.0 * rows * length * heads[0] * model.head_dim * keys_seen(length, window)
        for backend in backends_here(device, model.head_dim):
            q, k, v = (
                torch.randn(
                    rows, length, count, model.head_dim, device=device, dtype=torch.bfloat16,
                    requires_grad=True,
                )
                for count in (heads[0], heads[1], heads[1])
            )  # fmt: skip
            call = attend_once(backend, mask, device, (q, k, v))
            timed_call(check, f"{said}, {backend}", call, count=20, flops=flops)
            reset_compiler()


def backends_here(device: torch.device, head_dim: int) -> list[str]:
    """Return the backends that can train here, without `eager`, which makes T × T scores; the
    last one, which `auto` tries first, leads."""
    here = Conditions(device, torch.bfloat16, training=True, head_dim=head_dim, is_masked=True)
    able = [name for name, found in BACKENDS.items() if not found.unavailable(here)]
    return [name for name in reversed(able) if name != "eager"]


def attend_once(
    backend: str, mask: Mask, device: torch.device, tensors: tuple[Tensor, ...]
) -> Callable[[], object]:
    """Return a function that attends and takes the gradients. The mask is lowered outside, as in
    a model, once for all layers."""
    found, (q, k, v) = BACKENDS[backend], tensors
    lowered = found.lower(mask, device, torch.bfloat16)
    attend = torch.compile(found.attend, dynamic=False) if device.type == "cuda" else found.attend

    def once() -> None:
        out = attend(q, k, v, lowered, q.shape[-1] ** -0.5)
        torch.autograd.grad(out, (q, k, v), out.detach())

    return once


# --- optimizer -----------------------------------------------------------------------------------


def optimizers(check: Check, device: torch.device) -> None:
    """Time the update of all weights of qwen3-0.6b, given gradients."""
    speed = resolve_speed(SpeedConfig(), device)
    model = build_model(model_of(QWEN, check), speed, device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    for name in OPTIMIZERS:
        said = f"optimizer, {QWEN}, {name}"
        if not check.fits(said, CALL_S):
            continue
        with check.arm(said) as figures:
            settings = OptimizerSettings.model_validate({"name": name})
            recipe = make_recipe(settings, model.config, steps=1000, tokens_per_step=2**18)
            optimizer = build_optimizer(model, recipe, fused=speed.fused_optimizer)
            set_rates(optimizer, StepRates(1e-4))
            figures |= call_figures(optimizer.step, device, count=2 if check.rehearse else 10)
            found = profiled(optimizer.step, device, calls=1, with_kernels=check.has_values)
            rows = kernels(found, 1)
            figures["kernels_per_call"] = sum(row["count_per_call"] for row in rows)
            figures["kernels"] = rows[:8]
            del optimizer
        free_memory()


# --- whole steps ---------------------------------------------------------------------------------


def steps(check: Check, device: torch.device) -> None:
    compiled = device.type == "cuda"
    length, rows = (160, 1) if check.rehearse else (8192, 2)
    short, size = (32, 2) if check.rehearse else (1024, 8)
    asked = SpeedConfig(compile=compiled)
    for backend in backends_here(device, model_of(GEMMA, check).head_dim):
        speed = asked.model_copy(update={"attention": backend})
        one_step(check, f"{backend}, window", workload(check, GEMMA, length, rows), speed)
    dense = workload(check, GEMMA, length, rows, sliding_window=length)
    one_step(check, "every layer full causal", dense, asked)
    for release in RELEASES:
        if reason := no_flash(release, device):
            check.write(f"step, {release}", ok=None, note=f"unavailable: {reason}")
            continue
        speed = asked.model_copy(update={"flash_attention": release})
        one_step(check, f"{release}, window", workload(check, GEMMA, length, rows), speed)
        one_step(check, f"{release}, every layer full causal", dense, speed)
    no_graphs = no_cuda_graphs(device, compiled)
    if no_graphs:
        check.write("step, CUDA graphs", ok=None, note=f"unavailable: {no_graphs}")
    for size_one, graphs in itertools.product((1, 4), (False,) if no_graphs else (False, True)):
        speed = asked.model_copy(update={"cuda_graphs": graphs})
        said = "CUDA graphs" if graphs else "no CUDA graphs"
        one_step(check, said, workload(check, GEMMA, short, size_one), speed)
    if not check.compile_only:
        for name in (QWEN, GEMMA):
            plain = asked.model_copy(update={"compile": False})
            one_step(check, "not compiled", workload(check, name, short, size), plain)
    if reason := float8_unavailable(device, compiled):
        check.write("step, float8", ok=None, note=f"unavailable: {reason}")
        return
    for dtype in ("bfloat16", "float8"):
        speed = asked.model_copy(update={"dtype": dtype})
        one_step(check, dtype, workload(check, QWEN, short, size), speed)


def workload(check: Check, name: str, seq_len: int, rows: int, **changes: object) -> Workload:
    return Workload(
        name=name,
        model=model_of(name, check, **changes),
        seq_len=seq_len,
        micro_batch_size=rows,
        device=check.device,
    )


def one_step(check: Check, said: str, w: Workload, asked: SpeedConfig) -> None:
    """Write time, memory and MFU of a training step."""
    device = find_device(w.device)
    name = f"step, {w.name}, T {w.seq_len}, micro-batch {w.micro_batch_size}, {said}"
    if not check.fits(name, STEP_S):
        return
    with check.arm(name) as figures:
        ours = Ours(w, asked)
        timed = Timed(name, ours.step_of(w), w, "pretrain", ours.speed.record())
        if check.compile_only:
            figures["compile_s"] = first_call_s(timed.step, device)
        else:
            steps, warmup = (2, 2) if check.rehearse else (10, 3)
            timed.take_round(steps, warmup, device)
            figures |= timed.figures() | {"settings": timed.speed}
            rate = w.tokens / figures["step_median_ms"] * 1e3
            figures["tokens_per_s"] = rate
            if peak := peak_tflops(device):
                figures["mfu"] = rate * training_flops(w.model, w.seq_len).exact / peak / 1e12
        del ours, timed
    reset_compiler()
