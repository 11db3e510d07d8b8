"""Export a model as one GGUF file, which llama.cpp opens: weights, architecture and tokenizer.

`model/formats/gguf.py` and `data/tokenizers/gguf.py` define the contents. As in llama.cpp,
norms and routers are always float32, and 1 is added to Gemma's norm weights.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.data.tokenizers.gguf import gguf_tokenizer
from pretrain_cli.engine.export.export import CPU, DTYPES, check_target, name_of
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model
from pretrain_cli.errors import ConfigError
from pretrain_cli.files import flush
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.gguf import (
    FAMILIES,
    FileTensor,
    gguf_metadata,
    gguf_tensors,
)
from pretrain_cli.model.formats.hf_config import read_config

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""GGUF name of each torch type."""
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


def export_gguf(
    where: Path | None,
    out: Path,
    *,
    dtype: str,
    best: bool,
    notify: Callable[[str], None],
) -> Path:
    """Write a model to the file `out`, through a staging file. Returns the source folder.

    Holds in memory the weights in float32 and the largest tensor twice. Raises ConfigError as
    `export` does, and if the package gguf is not installed.
    """
    check_target(out, dtype)
    if out.suffix != ".gguf":
        raise ConfigError(f"--gguf: {out} must end in .gguf; call it {out.name}.gguf")
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "--gguf: the package gguf is not installed; pip install 'pretrain[gguf]'"
        ) from None
    folder = find_model_folder(where, notify, best=best)
    config = read_config(folder)
    tokenizer_metadata, messages = gguf_tokenizer(folder_tokenizer(folder), config.vocab_size)
    torch_dtype = DTYPES[dtype]
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": name_of(folder),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[TYPES[torch_dtype]]]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        **gguf_metadata(config),
        **tokenizer_metadata,
    }
    for message in messages:
        notify(message)
    speed = resolve_speed(SpeedConfig(dtype="float32", compile=False), CPU, training=False)
    model = open_model(folder, speed, CPU, notify)
    staging = out.with_name(f".{out.name}.partial")
    try:
        _write(gguf, staging, model, metadata, torch_dtype, dtype)
        staging.rename(out)
    except (OSError, ConfigError):
        staging.unlink(missing_ok=True)
        raise
    return folder


def _write(
    gguf: Any,
    path: Path,
    model: Decoder,
    metadata: dict[str, Any],
    torch_dtype: torch.dtype,
    dtype: str,
) -> None:
    """Write the file, tensor by tensor. Raises ConfigError for a weight that overflows the type."""
    values = gguf.GGUFValueType
    value_types = {bool: values.BOOL, int: values.UINT32, float: values.FLOAT32,
                   str: values.STRING, list: values.ARRAY}  # fmt: skip
    writer = gguf.GGUFWriter(path, FAMILIES[model.config.model_type].architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value, value_types[type(value)])
    tensors = gguf_tensors(model.config, model.merged)
    types = [torch.float32 if tensor.stays_float32 else torch_dtype for tensor in tensors]
    for tensor, file_dtype in zip(tensors, types, strict=True):
        size = math.prod(tensor.shape) * file_dtype.itemsize
        raw = gguf.GGMLQuantizationType[TYPES[file_dtype]]
        writer.add_tensor_info(tensor.name, tensor.shape, None, size, raw_dtype=raw)
    parameters = dict(model.named_parameters())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, file_dtype in zip(tensors, types, strict=True):
            value = _value(tensor, parameters, model).to(file_dtype)
            if not value.isfinite().all():
                raise ConfigError(f"--dtype: {tensor.name} is not finite in {dtype}; give bf16")
            writer.write_tensor_data(value.contiguous().view(torch.uint8).numpy())
        for file in writer.fout:
            flush(file)
    finally:
        writer.close()


def _value(tensor: FileTensor, parameters: dict[str, Any], model: Decoder) -> Tensor:
    """Return a tensor's values in llama.cpp's form: experts stacked, 1 added to Gemma's norm
    weights."""
    parts = [piece.of(parameters[piece.parameter].detach()) for piece in tensor.pieces]
    value = torch.stack(parts) if tensor.is_stacked else parts[0]
    return 1.0 + value if tensor.is_norm and model.config.norm_is_zero_centered else value
