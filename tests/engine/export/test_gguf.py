"""GGUF files: read back by the gguf package, and opened by llama.cpp.

The models come from transformers, with widely drawn weights. Expected tensors are those that
transformers saved, under the gguf package's names; expected logits are those of transformers.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.engine.export.gguf import export_gguf
from pretrain_cli.engine.sampling.sample import generate_text, open_for_sampling, plan_completions
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.inference.decode import DecodeSession
from tests.model.conftest import GEMMA, MOE, QWEN, draw_wide

gguf = pytest.importorskip("gguf")

ROWS = 260  # three more than the tokenizer has ids
GEMMA = GEMMA | {"query_pre_attn_scalar": 16, "vocab_size": ROWS}
QWEN = QWEN | {"vocab_size": ROWS}
MODELS = {
    "gemma3": (
        "Gemma3",
        GEMMA | {"num_key_value_heads": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gemma3-untied": (
        "Gemma3",
        GEMMA
        | {"num_key_value_heads": 1, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", *["sliding_attention"] * 6, "full_attention"]},
    ),
    "qwen3": ("Qwen3", QWEN | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3moe": (
        "Qwen3Moe",
        MOE | {"vocab_size": ROWS, "num_key_value_heads": 2, "norm_topk_prob": True},
    ),
}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LENGTH = 33  # several windows of 7


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder saved by transformers, with the byte tokenizer."""
    transformers = importlib.import_module("transformers")
    family, numbers = MODELS[request.param]
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_class)(**numbers)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    draw_wide(model)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    def write(folder: Path, dtype: str = "fp32", **more: Any) -> Path:
        out = tmp_path / f"{dtype}.gguf"
        export_gguf(folder, out, dtype=dtype, best=False, notify=lambda _: None, **more)
        assert list(tmp_path.iterdir()) == [out]
        return out

    return write


@pytest.mark.parametrize("dtype", TYPES)
def test_gguf_tensors_equal_the_folders_under_their_gguf_names(folder, export, dtype):
    reader = gguf.GGUFReader(export(folder, dtype))
    saved = load_file(folder / "model.safetensors")
    family = reader.get_field("general.architecture").contents()
    [kind] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family]
    names = gguf.get_tensor_name_map(kind, reader.get_field(f"{family}.block_count").contents())
    expected: dict[str, Any] = {}
    for name, value in saved.items():
        layer, is_expert, rest = name.partition(".experts.")
        if is_expert:
            name = f"{layer}.experts.{rest.split('.', 1)[1]}"
        expected.setdefault(names.get_name(name, (".weight",)), []).append((rest, value))
    assert {tensor.name for tensor in reader.tensors} == expected.keys()
    for tensor in reader.tensors:
        parts = sorted(expected[tensor.name], key=lambda part: part[0])  # eight experts: 0 to 7
        value = parts[0][1] if len(parts) == 1 else torch.stack([part for _, part in parts])
        of = TYPES[dtype]
        if tensor.name.endswith("_norm.weight"):
            value, of = value + 1.0 if family == "gemma3" else value, torch.float32
        if "ffn_gate_inp" in tensor.name:
            of = torch.float32
        assert tensor.tensor_type.name == {"bfloat16": "BF16", "float16": "F16"}.get(
            str(of).removeprefix("torch."), "F32"
        )
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(read.copy()), value.to(of).float()), tensor.name


def test_gguf_metadata_equals_the_config(folder, export):
    reader = gguf.GGUFReader(export(folder, "bf16"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_experts": config.get("num_local_experts", config.get("num_experts"))}

    def field(key: str) -> Any:
        found = reader.get_field(key)
        return None if found is None else found.contents()

    family = field("general.architecture")
    assert (
        family
        == {"gemma3_text": "gemma3", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}[
            config["model_type"]
        ]
    )
    assert field("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    for key, name in {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
    }.items():
        assert field(f"{family}.{key}") == config.get(name), key
    assert field(f"{family}.attention.layer_norm_rms_epsilon") == pytest.approx(1e-3)
    tokens = field("tokenizer.ggml.tokens")
    assert len(tokens) == len(field("tokenizer.ggml.token_type")) == ROWS
    assert field("tokenizer.ggml.eos_token_id") == 256
    if family == "gemma3":
        assert field("gemma3.rope.freq_base") == 5000.0
        assert field("gemma3.rope.freq_base_swa") == 50.0
        assert field("gemma3.attention.sliding_window") == 7


def test_a_refused_export_writes_no_file(folder, tmp_path):
    def refused(out: str = "m.gguf", dtype: str = "fp32", where: Path = folder) -> str:
        with pytest.raises(ConfigError) as error:
            export_gguf(where, tmp_path / out, dtype=dtype, best=False, notify=lambda _: None)
        assert not list(tmp_path.glob("*.gguf"))
        assert not list(tmp_path.glob(".*"))
        return str(error.value)

    assert "must end in .gguf; call it model.gguf" in refused("model")
    assert "'q4' is not one of bf16" in refused(dtype="q4")
    large = tmp_path / "large"
    large.mkdir()
    for path in folder.iterdir():
        (large / path.name).write_bytes(path.read_bytes())
    changed = {k: v * 1e7 if "up_proj" in k else v for k, v in
               load_file(folder / "model.safetensors").items()}  # fmt: skip
    importlib.import_module("safetensors.torch").save_file(changed, large / "model.safetensors")
    assert "is not finite in fp16; give bf16" in refused(dtype="fp16", where=large)


# --- llama.cpp itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Callable[..., Any]:
    """Return a function that opens a file with llama.cpp, in float32 where llama.cpp allows it."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def open_file(path: Path, **more: Any) -> Any:
        return llama_cpp.Llama(
            str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0,
            **more,
        )  # fmt: skip

    return open_file


@pytest.mark.parametrize("dtype", TYPES)
def test_llama_cpp_computes_the_same_logits(folder, export, llama, dtype):
    transformers = importlib.import_module("transformers")
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    model = llama(export(folder, dtype))
    model.eval(tokens[0].tolist())
    logits = torch.from_numpy(model.scores[:LENGTH].copy())
    is_gemma = "Gemma" in type(theirs).__name__  # llama.cpp computes its GELU from a float16 table
    tolerance = {"fp32": 2e-3 if is_gemma else 1e-5, "fp16": 5e-3, "bf16": 4e-2}[dtype]
    assert (logits - expected).norm() / expected.norm() < tolerance


def test_llama_cpp_chooses_the_same_tokens(folder, export, llama):
    prompt = "ten green bottles"
    _, ours, tokenizer = open_for_sampling(
        folder, device="cpu", dtype="float32", notify=lambda _: None
    )
    params = SamplingParams(max_tokens=12, temperature=0)
    [text] = texts = plan_completions(ours, tokenizer, [prompt], params)
    list(generate_text(DecodeSession(ours), tokenizer, texts, params, rows=1))
    model = llama(export(folder))
    ids = model.tokenize(prompt.encode(), add_bos=True, special=False)
    assert ids == text.prompt
    model.eval(ids)
    for expected in text.tokens:
        scores = model.scores[model.n_tokens - 1]
        assert int(scores[: tokenizer.vocab_size].argmax()) == expected
        model.eval([expected])
