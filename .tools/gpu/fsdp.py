"""Slot `fsdp`: with FSDP2 and one rank, training learns what it learns without."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu.check import Check, free_memory
from gpu.shapes import model_of
from gpu.steps import batch_of
from pretrain_cli.api import run_config
from pretrain_cli.engine.benchmark.timing import LEARNING_RATE, SameBatch
from pretrain_cli.engine.benchmark.workload import Workload
from pretrain_cli.engine.optim.recipe import make_recipe
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.engine.planning.plan import StepPlan
from pretrain_cli.engine.runtime.distributed import Ranks, find_device, is_sharded
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.training.job import set_up
from pretrain_cli.engine.training.step import train_step

STEPS = 4
BOUND = {"float32": 1e-4, "bfloat16": 1e-2}


def run(check: Check) -> None:
    device = find_device(check.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(Path(check.scratch / "fsdp-store")), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        for name in ("gemma3-tiny", "qwen3-tiny"):
            if check.fits(name, 4):
                with check.arm(f"{name}, one rank") as figures:
                    figures |= compare(check, name, device)
    finally:
        dist.destroy_process_group()


def compare(check: Check, name: str, device: torch.device) -> dict[str, Any]:
    """Return the relative differences of the last loss and of the first gradient norm."""
    found = {how: learn(check, name, how, device) for how in ("ddp", "fsdp")}
    (alone, alone_norm, dtype), (sharded, sharded_norm, _) = found["ddp"], found["fsdp"]
    loss = abs(alone - sharded) / max(abs(alone), 1e-9)
    norm = abs(alone_norm - sharded_norm) / max(abs(alone_norm), 1e-9)
    return {
        "loss_difference": loss,
        "norm_difference": norm,
        "bound": BOUND[dtype],
        "ok": loss <= BOUND[dtype] and norm <= BOUND[dtype],
    }


def learn(check: Check, name: str, how: str, device: torch.device) -> tuple[float, float, str]:
    """Return (last loss, first gradient norm, dtype) of a few steps. A single rank is sharded only
    if it asks for fsdp."""
    settings = run_config(
        {"train.parallel": how, "speed.compile": False, "optimizer.name": "adamw"}
    )
    workload = Workload(
        name=name,
        model=model_of(name, check),
        seq_len=64 if check.rehearse else 256,
        micro_batch_size=4,
        device=check.device,
    )
    speed = resolve_speed(settings.speed, device)
    plan = StepPlan(
        settings=settings,
        name=name,
        model=workload.model,
        speed=speed,
        seq_len=workload.seq_len,
        micro_batch_size=workload.micro_batch_size,
        recipe=make_recipe(
            settings.optimizer, workload.model, steps=1, tokens_per_step=workload.tokens
        ),
        loss_weights=None,
    )
    job = set_up(plan, Ranks(0, 1, device), SameBatch(batch_of(workload, device)))
    if is_sharded(job.model) != (how == "fsdp"):
        raise RuntimeError(f"{how}: sharded is {is_sharded(job.model)}")
    for _ in range(STEPS):
        train_step(job, job.batches.next(), StepRates(LEARNING_RATE))
    outcomes = job.guard.read()
    free_memory()
    return outcomes[-1].loss, outcomes[0].gradient_norm, str(speed.dtype)
