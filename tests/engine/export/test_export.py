"""Exported folders: the checkpoint's weights in another type, and nothing after a failure."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain_cli.engine.export import export as module
from pretrain_cli.engine.export.export import export
from pretrain_cli.errors import ConfigError

CHECKPOINT = Path("runs/tiny/checkpoints/step-000060")

pytestmark = pytest.mark.usefixtures("trained")


def write(where: Path, dtype: str = "fp32", **options: Any) -> Path:
    options = {"max_shard_size": 10**9, "best": False, "notify": lambda _: None} | options
    return export(where, Path("out"), dtype=dtype, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)],
)
def test_exported_weights_equal_the_checkpoints_in_the_given_type(dtype, kind):
    assert write(Path("runs/tiny"), dtype) == CHECKPOINT
    before, after = tensors(CHECKPOINT), tensors(Path("out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value.to(kind)), name
    config = json.loads(Path("out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(kind).removeprefix("torch.")


def test_a_model_card_shows_losses_up_to_its_checkpoint():
    checkpoint = CHECKPOINT.with_name("step-000040")
    write(checkpoint)
    rows = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "evaluation"}
    card = Path("out/README.md").read_text()
    assert "# tiny step-000040" in card
    shown = {step for step, loss in losses.items() if f"| {step} | {loss:.4f} |" in card}
    assert shown == {step for step in losses if step <= 40}
    assert max(losses) == 60


def test_a_weight_beyond_float16_is_refused_before_writing():
    shutil.copytree(CHECKPOINT, "large", ignore=shutil.ignore_patterns("training"))
    path = Path("large/model.safetensors")
    save_file({k: v * 1e7 if "up_proj" in k else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match="is not finite in fp16; give bf16"):
        write(Path("large"), "fp16")
    assert not Path("out").exists()
    assert not Path(".out.partial").exists()


def test_a_failed_write_leaves_no_file(monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", fail)
    with pytest.raises(OSError, match="No space left"):
        write(CHECKPOINT)
    assert not Path("out").exists()
    assert not Path(".out.partial").exists()
