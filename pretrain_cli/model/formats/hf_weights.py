"""Weights in Hugging Face model folders, read and written.

    model.safetensors                       all weights; a large model has several files,
    model-00001-of-00002.safetensors, …     and an index that says which holds each tensor:
    model.safetensors.index.json

Reads one safetensors file or several with an index, under the names of text models or those of
multimodal Gemma folders.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from pretrain_cli.errors import CheckpointError
from pretrain_cli.files import flush
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.new_vocabulary import NewVocabulary, fill
from pretrain_cli.model.parameter_map import EMBEDDING, HEAD, PublishedTensor, parameter_map

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
"""Prefixes of the decoder's tensors in published folders, multimodal ones first."""
FLOATS = ("F32", "BF16", "F16", "F64")
DECODER = re.compile(r"model\.(layers|embed_tokens|norm)\.")


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | None = None
) -> dict[str, str]:
    """Write model.safetensors, or several files and their index, as transformers does.

    A file has at most `max_shard_size` bytes, unless a single tensor is larger. Returns the SHA-256
    of each weights file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_size
    for name, tensor in tensors.items():
        if room is not None and max_shard_size is not None:
            if tensor.nbytes > room and shards[-1]:
                shards.append({})
                room = max_shard_size
            room -= tensor.nbytes
        shards[-1][name] = tensor
    if len(shards) == 1:
        return {SINGLE: write_tensors(folder / SINGLE, tensors)}
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {
        name: write_tensors(folder / name, shard) for name, shard in zip(names, shards, strict=True)
    }


def published_tensors(
    model: Decoder, whole: Callable[[Parameter], Tensor | None]
) -> dict[str, Tensor]:
    """Yield every weight under its published name, as parts of what `whole` returns for each
    parameter: its full value, or another tensor of its shape. None leaves it out.

    `whole` is called once per parameter: a layer's experts are hundreds of parts of two
    parameters.
    """
    pieces = list(parameter_map(model.config, merged=model.merged))
    parameters = dict(model.named_parameters())
    names = dict.fromkeys(piece.parameter for piece in pieces)
    values = {name: whole(parameters[name]) for name in names}
    found = ((piece, values[piece.parameter]) for piece in pieces)
    return {
        piece.name: piece.of(value.detach()).contiguous()
        for piece, value in found
        if value is not None
    }


def load_weights(
    model: Decoder, folder: Path, vocabulary: NewVocabulary | None = None
) -> list[str]:
    """Copy a folder's weights into the model. Returns the names of tensors that were left out.

    With a `vocabulary`, embedding and head are those of the model's new vocabulary. Raises
    CheckpointError for a tensor that is missing or has another shape.
    """
    files = weight_files(folder)
    where = _by_text_name(files)
    config = model.config
    if config.tie_word_embeddings and {HEAD, EMBEDDING} <= where.keys():
        # transformers 5 would use the file's head, transformers 4 the embedding: equal or refused.
        head, embedding = (_read(*where[name]).float() for name in (HEAD, EMBEDDING))
        same = torch.equal(head, embedding)
        if not same:
            raise CheckpointError(
                f"{folder}: config.json ties the head to the embedding, but {HEAD} differs from "
                f"{EMBEDDING}; set tie_word_embeddings to false in its config.json to use both"
            )
        del where[HEAD]
    parameters = dict(model.named_parameters())
    pieces = list(parameter_map(config, merged=model.merged))
    for path, group in _by_file(folder, where, pieces):
        with _opened(path) as file:
            for piece, name in group:
                found = file.get_slice(name)
                if found.get_dtype() not in FLOATS:
                    raise CheckpointError(
                        f"{path}: {name} is {found.get_dtype()}, quantized; give the model's "
                        f"weights in one of {', '.join(FLOATS)}"
                    )
                shape = tuple(found.get_shape())
                is_renewed = vocabulary is not None and piece.name in (EMBEDDING, HEAD)
                if shape[is_renewed:] != piece.shape[is_renewed:]:
                    raise CheckpointError(
                        f"{path}: {name} is {shape}, but config.json makes it {piece.shape}"
                    )
                parameter = piece.of(parameters[piece.parameter])
                if vocabulary is not None and is_renewed:
                    fill(parameter, file.get_tensor(name), vocabulary, name)
                else:
                    with torch.no_grad():
                        parameter.copy_(file.get_tensor(name))
    return sorted(set(where) - {piece.name for piece in pieces})


def say_left_out(folder: Path, names: list[str]) -> str:
    """Describe the tensors that `load_weights` left out in a line. Tensors that differ only by
    numbers are counted; those of other towers (vision) are summed up by tower."""
    kinds = Counter(
        re.sub(r"\.\d+\.", ".*.", name)
        if DECODER.match(name)
        else f"{name.removeprefix('model.').split('.')[0]}.*"
        for name in names
    )
    listed = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    return f"{folder}: {len(names)} tensors are not the text model's and are left out: {listed}"


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Return the safetensors files of a model folder, with the names of their tensors."""
    index = folder / INDEX
    single = folder / SINGLE
    if single.is_file():  # transformers prefers it to an index
        paths = [single]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: damaged ({error!r}); copy it again") from None
        paths = sorted(folder / name for name in names)
    else:
        raise CheckpointError(f"{folder}: no model.safetensors; give a Hugging Face model folder")
    out = {}
    for path in paths:
        with _opened(path) as file:
            out[path] = list(file.keys())
    return out


def weight_types(folder: Path) -> set[str]:
    """Return the types of a folder's tensors under their safetensors names: F32, BF16, …"""
    types = set()
    for path, names in weight_files(folder).items():
        with _opened(path) as file:
            types |= {file.get_slice(name).get_dtype() for name in names}
    return types


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: named by the index, but not there; copy it again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({error}); copy it again") from None


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(name)


def _by_text_name(files: dict[Path, list[str]]) -> dict[str, tuple[Path, str]]:
    """Map each tensor's name in a text model to its file and its name there."""
    where: dict[str, tuple[Path, str]] = {}
    for path, names in files.items():
        for name in names:
            known = where.setdefault(_text_name(name), (path, name))
            if known != (path, name):
                raise CheckpointError(
                    f"{path}: {name} is also {known[1]} in {known[0].name}; take one out"
                )
    return where


def _text_name(name: str) -> str:
    """Return a tensor's name with the prefix of text models, whatever folder it comes from."""
    if name.endswith(HEAD):
        return HEAD
    for prefix in TEXT_PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return "model." + name if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _by_file(
    folder: Path, where: dict[str, tuple[Path, str]], pieces: list[PublishedTensor]
) -> Iterator[tuple[Path, list[tuple[PublishedTensor, str]]]]:
    """Group tensors by the file that holds them, so that each file is opened once."""
    missing = [piece.name for piece in pieces if piece.name not in where]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors that config.json calls for are missing, "
            f"{missing[0]} the first"
        )
    for path in sorted({path for path, _ in where.values()}):
        group = [(piece, where[piece.name][1]) for piece in pieces if where[piece.name][0] == path]
        yield path, group


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
"""torch types and their safetensors names, widest first, so that each tensor is aligned."""
PART = 2**24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous CPU tensors to a file and flush it. Return its SHA-256.

    The metadata is required by transformers.
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
