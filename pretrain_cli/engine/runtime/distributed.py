"""Ranks: the processes, one or many, that train one model together.

torchrun starts the processes (`torchrun --nproc-per-node 8 -m pretrain_cli train …`). The model is
single-device code, to which training applies, in this order:

    set weights  →  compile blocks  →  copy (DDP) or shard (FSDP2) the model among the ranks
"""

import contextlib
import os
import platform
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pretrain_cli.errors import ConfigError
from pretrain_cli.model.decoder import Decoder


@dataclass(frozen=True)
class Ranks:
    """This process's rank and device, and its collective operations.

    Every rank must call `sum`, `any`, `mean`, `min` and `wait`, because each waits for the others.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True for the rank that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the values over all ranks."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def mean(self, numbers: list[float]) -> list[float]:
        """Return the mean of each number over all ranks."""
        return (self.sum(torch.tensor(numbers, device=self.device)) / self.world_size).tolist()

    def min(self, number: int) -> int:
        """Return the smallest number of all ranks."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return int(value.item())

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            dist.barrier()


GLOO_SECONDS = 0.2
"""Seconds to wait before a Gloo group is given up. Its threads take the interpreter's lock to drop
the last tensors, and its end, which holds that lock, waits for its threads: seen once in some 40
runs of two ranks, a process then hangs after its last line."""


@contextlib.contextmanager
def open_ranks(device: str) -> Generator[Ranks]:
    """Open the process group that torchrun started, or a single rank, on this device.

    Uses NCCL on GPUs and Gloo elsewhere. Raises ConfigError for `cuda:N` with several ranks.
    """
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"train.device: '{device}' is one GPU, for several ranks; give cuda")
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = find_device(device, int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else None)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1:
        if place.type == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    try:
        yield Ranks(rank, world_size, place)
    finally:
        if world_size > 1:
            if place.type != "cuda":
                time.sleep(GLOO_SECONDS)
            dist.destroy_process_group()


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of this name. `auto`: CUDA if there is a GPU, else the CPU.

    Raises ConfigError if the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"train.device: '{name}' is not a device; give cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("train.device: 'mps' is not there on this machine; give cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        named = cast("int | None", device.index)  # None for "cuda" alone, though torch says int
        index = local_rank or 0 if named is None else named
        if index >= count:
            found = f"has {count} CUDA devices" if count else "has no CUDA device"
            raise ConfigError(
                f"train.device: '{name}' is not there, this machine {found}; give cpu"
                + (f" or cuda:0 to cuda:{count - 1}" if count else "")
            )
        return torch.device("cuda", index)
    return device


def device_name(device: torch.device) -> str:
    """Return a device's human-readable name, such as NVIDIA H100 80GB HBM3."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parallelize(model: Decoder, ranks: Ranks, how: str) -> nn.Module:
    """Return the model wrapped for training: a copy on each rank ("ddp"), or each parameter sharded
    among the ranks ("fsdp").

    A single rank with "ddp" gets the model unchanged. "fsdp" shards in place; it raises ConfigError
    without torchrun. It gathers the blocks' weights in bfloat16 if the model computes in it: half
    the traffic, and the same products, which cast them anyway; weights of norms are then rounded
    too. Gradients are added up in float32. Embedding, head and last norm are gathered in float32,
    in which the embedding is scaled.
    """
    if ranks.world_size == 1 and how == "ddp":
        return model
    if how == "fsdp":
        if not dist.is_initialized():
            raise ConfigError(
                "train.parallel: 'fsdp' needs ranks; start with 'torchrun -m pretrain_cli train'"
            )
        in_bfloat16 = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in model.blocks:
            if model.dtype == torch.bfloat16:
                fully_shard(block, mp_policy=in_bfloat16)
            else:
                fully_shard(block)
        fully_shard(model)  # in place
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def sync_gradients(model: nn.Module, *, last: bool) -> Generator[None]:
    """Synchronize gradients between the ranks only if `last`, in the last micro-step of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def is_sharded(model: nn.Module) -> bool:
    """Return whether each rank holds only a part of every parameter."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free the unsharded parameters that FSDP2 keeps after a forward pass without a backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor unsharded, on its device. Every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Return an unsharded value placed on the device of `like`, and sharded in the same way."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)
