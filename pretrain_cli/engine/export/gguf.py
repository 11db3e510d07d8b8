"""A model as one GGUF file, which llama.cpp opens: weights, architecture and tokenizer.

`model/formats/gguf.py` and `data/tokenizers/gguf.py` say what it holds. Norms and routers are
float32 whatever the type, as in llama.cpp, and Gemma's norms are written with their one added.
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
    ARCHITECTURES,
    FileTensor,
    gguf_metadata,
    gguf_tensors,
)
from pretrain_cli.model.formats.hf_config import read_config

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""torch types, and their names in GGUF."""
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


def export_gguf(
    where: Path | None,
    out: Path,
    *,
    dtype: str,
    best: bool,
    notify: Callable[[str], None],
) -> Path:
    """Write the file, aside and renamed. Returns the folder that it was made of.

    Costs the memory of the weights in float32, and of the largest tensor twice.
    """
    check_target(out, dtype)
    if out.suffix != ".gguf":
        raise ConfigError(f"--gguf: {out} is to be one file; call it {out.name}.gguf")
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "--gguf: the package gguf is not installed; pip install 'pretrain[gguf]'"
        ) from None
    folder = find_model_folder(where, notify, best=best)
    config = read_config(folder)
    about, said = gguf_tokenizer(folder_tokenizer(folder), config.vocab_size)
    kind = DTYPES[dtype]
    facts: dict[str, Any] = {
        "general.type": "model",
        "general.name": name_of(folder),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[TYPES[kind]]]),
        "general.quantization_version": int(gguf.GGML_QUANT_VERSION),
        **gguf_metadata(config),
        **about,
    }
    for line in said:
        notify(line)
    asked = SpeedConfig(dtype="float32", compile=False)
    model = open_model(folder, resolve_speed(asked, CPU, training=False), CPU, notify)
    aside = out.with_name(f".{out.name}.partial")
    try:
        _write(gguf, aside, model, facts, kind, dtype)
        aside.rename(out)
    except (OSError, ConfigError):
        aside.unlink(missing_ok=True)
        raise
    return folder


def _write(
    gguf: Any, path: Path, model: Decoder, facts: dict[str, Any], kind: torch.dtype, dtype: str
) -> None:
    values = gguf.GGUFValueType
    value_types = {bool: values.BOOL, int: values.UINT32, float: values.FLOAT32,
                   str: values.STRING, list: values.ARRAY}  # fmt: skip
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    for key, value in facts.items():
        writer.add_key_value(key, value, value_types[type(value)])
    tensors = gguf_tensors(model.config, model.merged)
    types = [torch.float32 if tensor.stays_float32 else kind for tensor in tensors]
    for tensor, of in zip(tensors, types, strict=True):
        size = math.prod(tensor.shape) * of.itemsize
        raw = gguf.GGMLQuantizationType[TYPES[of]]
        writer.add_tensor_info(tensor.name, tensor.shape, None, size, raw_dtype=raw)
    parameters = dict(model.named_parameters())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, of in zip(tensors, types, strict=True):
            value = _value(tensor, parameters, model).to(of)
            if not value.isfinite().all():
                raise ConfigError(f"--dtype: {tensor.name} is not finite in {dtype}; give bf16")
            writer.write_tensor_data(value.contiguous().view(torch.uint8).numpy())
        for file in writer.fout:
            flush(file)
    finally:
        writer.close()


def _value(tensor: FileTensor, parameters: dict[str, Any], model: Decoder) -> Tensor:
    """The tensor as llama.cpp uses it."""
    parts = [piece.of(parameters[piece.parameter].detach()) for piece in tensor.pieces]
    value = torch.stack(parts) if tensor.is_stacked else parts[0]
    return 1.0 + value if tensor.is_norm and model.config.norm_is_zero_centered else value
