"""Slot `parity`: attention backends and losses against their readable definitions.

The reference is `eager` in float32, without TF32, on the same numbers. An error is |ours −
reference| / |reference|, by the norms of the whole tensor; `largest` is the same of the largest
elements. In bfloat16 the bound is 1.5 times the error that `eager` itself has in bfloat16.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.check import Check
from gpu.losses import WHOLE, loss_arms, loss_inputs, missing_losses
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Documents, Mask
from pretrain_cli.model.loss_backends import LOSS_BACKENDS

FLOAT32_BOUND = 2e-5
BFLOAT16_FACTOR = 1.5
NAMES = ("out", "dq", "dk", "dv")
BATCH, HEADS = 2, 4
COMPILE_S = 7.0
"""Seconds that a compiled backend takes for one case."""
FLEX_CASES = {("causal", 64), ("window", 256), ("documents", 128)}
"""(mask, head_dim) of the cases that flex gets: it compiles each."""


class Case(NamedTuple):
    mask: str
    head_dim: int
    group: int
    """Query heads for each key head."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(check: Check) -> None:
    device = find_device(check.device)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    losses(check, device)
    masks = make_masks(check, device)
    dims = (16,) if check.rehearse else (64, 128, 256)
    names = [name for name in BACKENDS if name not in ("eager", "flex")]
    for dtype in (torch.bfloat16, torch.float32):
        for name in names:
            backend(check, name, dtype, masks, dims, device)
        if device.type == "cuda":
            kernels(check, dtype, masks, dims, device)
    for dtype in (torch.bfloat16, torch.float32):
        backend(check, "flex", dtype, masks, dims, device)


def make_masks(check: Check, device: torch.device) -> dict[str, Mask]:
    T, window = (48, 16) if check.rehearse else (2048, 512)
    numbers = torch.arange(T, device=device) // 7 * 7 * 5 // T  # five documents
    rows = torch.stack([numbers, numbers.flip(0).neg() + 4])
    documents = Documents(rows, counts=(5, 5))
    return {
        "causal": Mask(T, T, None, rows=BATCH),
        "window": Mask(T, T, window, rows=BATCH),
        "documents": Mask(T, T, None, documents, rows=BATCH),
        "window, documents": Mask(T, T, window, documents, rows=BATCH),
    }


def inputs(case: Case, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return q, k, v and the gradient of the output, rounded to bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    heads = (HEADS, HEADS // case.group, HEADS // case.group, HEADS)
    return tuple(
        torch.randn(BATCH, length, count, case.head_dim, device=device, generator=generator)
        .bfloat16()
        .float()
        for count in heads
    )


def computed(attend: Attend, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of q, k and v."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors[:3])
    out = attend(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))
    return [x.detach().float() for x in (out, *gradients)]


def attend_with(name: str, mask: Mask, dtype: torch.dtype, device: torch.device) -> Attend:
    found = BACKENDS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lowered = found.lower(mask, device, dtype)
        return found.attend(q, k, v, lowered, q.shape[-1] ** -0.5)

    return attend


def backend(
    check: Check,
    name: str,
    dtype: torch.dtype,
    masks: dict[str, Mask],
    dims: tuple[int, ...],
    device: torch.device,
) -> None:
    """Write a result for each mask: the worst case of its head sizes and groups."""
    is_flex = name == "flex"
    here = Conditions(device, dtype, training=True, head_dim=max(dims), is_masked=True)
    if reason := BACKENDS[name].unavailable(here):
        arm = f"{name}, {str(dtype).removeprefix('torch.')}"
        check.write(arm, ok=None, note=f"unavailable: {reason}")
        return
    for said, mask in masks.items():
        arm = f"{name}, {said}, {str(dtype).removeprefix('torch.')}"
        cases = [Case(said, dim, group) for dim, group in itertools.product(dims, (4, 1))]
        if is_flex:
            cases = [c for c in cases if (c.mask, c.head_dim) in FLEX_CASES and c.group == 4]
        if cases and check.fits(arm, COMPILE_S if is_flex else 1.0):
            with check.arm(arm) as figures:
                attend = attend_with(name, mask, dtype, device)
                figures |= worst(compare(attend, c, mask, dtype, device) for c in cases)


def kernels(
    check: Check,
    dtype: torch.dtype,
    masks: dict[str, Mask],
    dims: tuple[int, ...],
    device: torch.device,
) -> None:
    """Write a result for each of PyTorch's fused kernels alone, plain causal."""
    mask = masks["causal"]
    attend = attend_with("sdpa", mask, dtype, device)
    fused = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, kernel in fused.items():
        if dtype == torch.float32 and name != "efficient":
            continue
        arm = f"sdpa by {name}, causal, {str(dtype).removeprefix('torch.')}"
        with check.arm(arm) as figures, sdpa_kernel(kernel):
            figures |= worst(
                compare(attend, Case("causal", dim, group), mask, dtype, device)
                for dim, group in itertools.product(dims, (4, 1))
            )


def compare(
    attend: Attend, case: Case, mask: Mask, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return one case's errors."""
    tensors = inputs(case, mask.keys, device)
    exact = computed(attend_with("eager", mask, torch.float32, device), tensors, torch.float32)
    bound = [FLOAT32_BOUND] * len(NAMES)
    if dtype == torch.bfloat16:
        rounded = computed(attend_with("eager", mask, dtype, device), tensors, dtype)
        bound = [BFLOAT16_FACTOR * relative(x, y) for x, y in zip(rounded, exact, strict=True)]
    ours = computed(attend, tensors, dtype)
    found: dict[str, Any] = {"head_dim": case.head_dim, "group": case.group}
    for name, mine, theirs in zip(NAMES, ours, exact, strict=True):
        found[f"{name}_error"] = relative(mine, theirs)
        found[f"{name}_largest"] = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    found["bound"] = max(bound)
    found["ok"] = all(
        found[f"{name}_error"] <= most for name, most in zip(NAMES, bound, strict=True)
    )
    return found


def relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


def worst(found: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest error of each tensor over the cases, and the cases."""
    cases = list(found)
    figures = {
        f"{name}_{kind}": max(case[f"{name}_{kind}"] for case in cases)
        for name in NAMES
        for kind in ("error", "largest")
    }
    return figures | {
        "bound": max(case["bound"] for case in cases),
        "ok": all(case["ok"] for case in cases),
        "cases": cases,
    }


def losses(check: Check, device: torch.device) -> None:
    """Write a result for each arm of the loss and type."""
    tokens, width, vocab_size = (70, 16, 300) if check.rehearse else (3000, 512, 32_000)
    for name, reason in missing_losses(device).items():
        check.write(f"chunked_loss {name}", ok=None, note=f"unavailable: {reason}")
    for z_loss in (1e-4, 0.0):
        arms = loss_arms(device, z_loss=z_loss)
        exact = loss_and_gradients(
            arms[WHOLE], loss_inputs(tokens, width, vocab_size, torch.float32, device)
        )
        for dtype, name in itertools.product((torch.bfloat16, torch.float32), arms):
            arm = f"{name}, {str(dtype).removeprefix('torch.')}" + (", z-loss" if z_loss else "")
            with check.arm(arm) as figures:
                tensors = loss_inputs(tokens, width, vocab_size, dtype, device)
                found = loss_and_gradients(arms[name], tensors)
                for part, mine, theirs in zip(
                    ("loss", "dhidden", "dweight"), found, exact, strict=True
                ):
                    figures[f"{part}_error"] = relative(mine, theirs)
                figures["bound"] = FLOAT32_BOUND if dtype == torch.float32 else 1e-2
                if name.removeprefix("chunked_loss ") not in LOSS_BACKENDS:  # which may round more
                    parts = ("loss", "dhidden", "dweight")
                    figures["ok"] = all(figures[f"{p}_error"] <= figures["bound"] for p in parts)


def loss_and_gradients(loss: Any, tensors: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    hidden, weight, _ = tensors
    value = loss(*tensors)
    gradients = torch.autograd.grad(value, (hidden, weight))
    return [x.detach().float() for x in (value, *gradients)]
