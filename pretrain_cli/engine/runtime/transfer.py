"""Copies between the host and a GPU that don't make the host wait.

A GPU runs behind the host: the host queues kernels and copies, and a stream runs them in order. A
copy is only queued if the host's memory is pinned. From pageable memory the host waits for it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pretrain_cli.model.attention_backends.mask import Documents


def runs_behind(device: torch.device) -> bool:
    """Return whether the device queues its work, so that reading a result waits for it."""
    return device.type == "cuda"


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on the device. On a GPU, the current stream copies it."""
    tensor = torch.from_numpy(array)
    if runs_behind(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def documents_to_device(numbers: np.ndarray, device: torch.device) -> Documents:
    """Return document numbers (B, T) on the device, with how many documents each row has: the
    device would have to be waited for."""
    counts = (np.diff(numbers, axis=1) != 0).sum(1) + 1
    return Documents(to_device(numbers, device), tuple(counts.tolist()))


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host. The result waits for the copy and returns it; the tensor
    must not change before, unless a GPU changes it in stream order."""
    if not runs_behind(tensor.device):
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)  # torch pins its memory
    wait = completion(tensor.device)

    def read() -> Tensor:
        wait()
        return copy

    return read


def completion(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the device has run what its current stream holds now."""
    if not runs_behind(device):
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # sleeps, and does not keep a core busy
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
