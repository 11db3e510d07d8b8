"""Fixtures of the engine tests: small datasets, settings and models. A run takes about a second."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize
from pretrain_cli.engine.runs.events import Event
from pretrain_cli.engine.runtime import speed
from pretrain_cli.engine.training.train import train
from pretrain_cli.model import float8
from pretrain_cli.model.config import variant
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.parameter_map import Merged, parameter_map
from pretrain_cli.model.presets import preset

SMALL = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 6,
    "model.num_attention_heads": 4,
    "model.head_dim": 16,
    "data.seq_len": 32,
    "train.tokens_per_step": 128,
    "train.micro_batch_size": 2,
    "train.device": "cpu",
    "train.sample_tokens": 8,
    "model.initialization": "normal",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 3e-3,
    "optimizer.embedding_rate_scale": 1.0,
    "optimizer.head_rate_scale": 1.0,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.embedding_decay_scale": 1.0,
    "optimizer.weight_decay_schedule": "constant",
    "speed.dtype": "float32",
}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenize thirty short documents as bytes, some of them for validation."""
    root = tmp_path_factory.mktemp("engine")
    lines = [f"document {i}: " + "the cat sat on the mat. " * (i % 7 + 2) for i in range(30)]
    for number, line in enumerate(lines):
        path = root / "corpus" / f"{number:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(line)
    request = TokenizeRequest(
        paths=(str(root / "corpus"),), out=root / "cats", tokenizer="bytes", val_fraction=0.2
    )
    tokenize(request, lambda *_: None)
    return request.out


@pytest.fixture(scope="session")
def other_dataset(dataset: Path) -> Path:
    """Tokenize ten longer documents as bytes, without a validation split."""
    root = dataset.parent
    for number in range(10):
        path = root / "dogs.txt" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{number}: " + "a dog, another dog, " * (3 * number + 1))
    request = TokenizeRequest(
        paths=(str(root / "dogs.txt"),), out=root / "dogs", tokenizer="bytes", val_fraction=0.0
    )
    tokenize(request, lambda *_: None)
    return request.out


@pytest.fixture
def settings(dataset: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes the settings of a small run on the dataset. `out` is a folder
    under tmp_path; keywords are names of settings with `__` for the dot."""

    def make(out: str = "run", **changes: Any) -> RunConfig:
        flags = {**SMALL, "model.name": "gemma3-tiny", "model.sliding_window": 8}
        flags |= {"data.path": dataset, "train.out": tmp_path / out, "train.steps": 6}
        flags |= {name.replace("__", "."): value for name, value in changes.items()}
        if flags["model.name"].startswith("qwen"):
            del flags["model.sliding_window"]
        if "model.init_from" in flags:  # which defines the model
            flags = {n: v for n, v in flags.items() if n[:6] != "model." or n == "model.init_from"}
        return build_config({}, flags, [])

    return make


@pytest.fixture
def run() -> Callable[..., list[Event]]:
    """Return a function that trains and returns every reported event."""

    def go(settings: RunConfig, **where: Any) -> list[Event]:
        events: list[Event] = []
        train(settings, events.append, **where)
        return events

    return go


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Decoder]:
    """Return a function that makes a narrow model by preset name, with standard normal weights.
    Mixtures have three experts."""
    changes = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "vocab_size": 30}
    changes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

    def make(name: str = "gemma3-tiny", *, merged: bool = True, **more: Any) -> Decoder:
        sparse = {**experts, "num_hidden_layers": 2} if "-a" in name else {}
        config = variant(preset(name), changes | sparse | more)
        model = Decoder(config, merged=Merged(merged, merged))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def published() -> Callable[..., dict[str, torch.Tensor]]:
    """Return a function that maps published names to their parts of parameters, or of gradients."""

    def find(model: Decoder, what: str = "data") -> dict[str, torch.Tensor]:
        parameters = dict(model.named_parameters())
        pieces = parameter_map(model.config, merged=model.merged)
        return {p.name: p.of(getattr(parameters[p.parameter], what)) for p in pieces}

    return find


@pytest.fixture(scope="session")
def give_gradients() -> Callable[[Decoder, int], None]:
    """Return a function that sets every gradient of a model to random numbers."""

    def give(model: Decoder, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).normal_(generator=generator)

    return give


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an H200, torchao, Triton and a C compiler, as far as settings check for them."""
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: True if name == "torchao" else find(name)
    )


@pytest.fixture
def float8_gpu() -> None:
    """Skip tests on machines without a GPU that computes in float8."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := speed.float8_unavailable(torch.device("cuda", 0), "auto"):
        pytest.skip(reason)


@pytest.fixture
def emulated_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable float8 on this CPU, with emulated products."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    product = float8.float8_product(emulated=True)
    monkeypatch.setattr(speed, "float8_unavailable", lambda *_: "")
    monkeypatch.setattr(float8, "float8_product", lambda: product)
