"""Writing a safetensors file: 8 bytes of length, a JSON header, and the tensors' bytes.

The library has a writer, too. Here the file's SHA-256 is taken of the bytes as they go out: it is
that of what was meant, and nothing is read back. While a part is written or hashed other threads
run, and no second copy of the tensors is made.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pretrain_cli.files import flush

TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Of torch, and as the format calls them; widest first, so that each tensor is aligned."""
PART = 2**24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write and flush a file of tensors that are on the CPU and contiguous. -> its SHA-256.

    The metadata is what transformers looks for.
    """
    order = sorted(tensors, key=lambda name: list(TYPES).index(tensors[name].dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _parts(len(text).to_bytes(8, "little") + text, [tensors[n] for n in order]):
            file.write(part)
            digest.update(part)
        flush(file)
    return digest.hexdigest()


def _parts(head: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield head
    for tensor in tensors:
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PART):
            yield data[start : start + PART]
