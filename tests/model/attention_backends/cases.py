"""Inputs and references shared by the tests of attention backends."""

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain_cli.model.attention_backends.backend import Conditions
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Documents, Mask

CPU = torch.device("cpu")
W, T = 8, 27
ON_A_CPU = [name for name in BACKENDS if name != "varlen"]


def made(queries, keys, *, group=2, dtype=torch.float32, head_dim=16, seed=0, device=CPU):
    """Return random q, k, v: 4 query heads, 4 / group key heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, 4, head_dim, generator=generator)
    k, v = (torch.randn(2, keys, 4 // group, head_dim, generator=generator) for _ in "kv")
    return [x.to(device, dtype) for x in (q, k, v)]


def attend(name, q, k, v, window, scale=0.4, documents=None):
    backend = BACKENDS[name]
    parts = None if documents is None else Documents(documents)
    mask = Mask(q.shape[1], k.shape[1], window, parts, rows=len(q))
    return backend.attend(q, k, v, backend.lower(mask, q.device, q.dtype), scale)


def by_hand(q, k, v, window, scale=0.4, documents=None):
    """Attend one query and head at a time, over its visible keys only."""
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for row, i, h in itertools.product(*map(range, q.shape[:3])):
        position = k.shape[1] - q.shape[1] + i
        first = 0 if window is None else max(0, position - window + 1)
        if documents is not None:
            numbers = documents[row].tolist()
            first = max(first, numbers.index(numbers[position]))
        keys = k[row, first : position + 1, h // group]
        values = v[row, first : position + 1, h // group]
        out[row, i, h] = torch.softmax(keys @ q[row, i, h] * scale, dim=0) @ values
    return out


def starting_at(*starts, length=T, device=CPU):
    """Return document numbers (B, T): each row's documents start at 0 and at these positions."""
    positions = torch.arange(length, device=device)
    return torch.stack([sum((positions >= s).long() for s in (0, *row)) for row in starts])


def gradients(backend, tensors, window, documents=None):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(backend, *leaves, window, documents=documents)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return torch.autograd.grad(out, leaves, pull)


class Sizes(TorchDispatchMode):
    """Record the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple) else (out,)
        self.noted.extend(x.numel() for x in tensors if isinstance(x, torch.Tensor))
        return out


def conditions(device="cuda", *, dtype=torch.bfloat16, training=True, head_dim=64, masked=True):
    return Conditions(torch.device(device), dtype, training, head_dim, masked)
