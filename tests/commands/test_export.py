"""`pretrain export`: the written folder holds the same model, and a model card."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CHECKPOINT = "runs/tiny/checkpoints/step-000060"


def tensors(folder):
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.usefixtures("trained")
def test_transformers_opens_the_shards_with_the_tokenizer(pretrain):
    assert pretrain("export runs/tiny out --dtype fp32 --max-shard-size 40kB").code == 0
    assert len(list(Path("out").glob("model-*-of-*.safetensors"))) > 2
    outcome = pretrain("verify runs/tiny --against out --data data/corpus --seq-len 40")
    assert outcome.code == 0, outcome.out
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    assert tokenizer("green bottles")["input_ids"] == list(b"green bottles")
    generation = transformers.GenerationConfig.from_pretrained("out")
    assert generation.eos_token_id == 256
    assert not Path("out/training").exists()


@pytest.mark.usefixtures("trained")
def test_an_exported_folder_can_be_exported_and_trained_from(pretrain):
    assert pretrain("export runs/tiny out").code == 0
    assert pretrain("export out again").code == 0
    for name, value in tensors("out").items():
        assert torch.equal(tensors("again")[name], value)
    done = pretrain(
        "train --init-from again --seq-len 32 --tokens-per-step 64 --micro-batch-size 2 --steps 1"
    )
    assert done.code == 0, done.err


@pytest.mark.usefixtures("trained")
def test_the_model_card_has_settings_data_and_losses(pretrain):
    assert pretrain("export runs/tiny out").code == 0
    card = Path("out/README.md").read_text()
    rows = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if row["kind"] == "evaluation"][-1]
    assert f"| {last['loss']:.4f} |" in card
    assert "# tiny step-000060" in card
    assert "| data | data/corpus |" in card
    assert "| optimizer.learning\\_rate | 0.01 |" in card
    front = card.split("---\n")[1]
    assert importlib.import_module("yaml").safe_load(front)["library_name"] == "transformers"


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("runs/tiny corpus", "corpus: exists, and nothing is overwritten"),
        ("runs/tiny no/out", "no/out: no folder no to write out in"),
        ("runs/tiny out --dtype int8", "--dtype: 'int8' is not one of bf16"),
        ("runs/tiny out --max-shard-size 5", "--max-shard-size: '5' is not a size"),
        ("nowhere out", "nowhere: no such run"),
        ("runs/tiny out --gguf", "--gguf: out must end in .gguf; call it out.gguf"),
        ("runs/tiny out.gguf --gguf --max-shard-size 1GB", "--max-shard-size: --gguf writes one"),
        ("runs/tiny no/out.gguf --gguf", "no/out.gguf: no folder no to write out.gguf in"),
    ],
)
def test_invalid_export_arguments_are_refused(refused, line, said):
    assert refused(f"export {line}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_export_gguf_writes_one_file_for_llama_cpp(pretrain):
    gguf = pytest.importorskip("gguf")
    outcome = pretrain("export runs/tiny --best tiny.gguf --gguf --dtype fp16")
    assert outcome.code == 0, outcome.err
    reader = gguf.GGUFReader("tiny.gguf")
    assert "in fp16, " in outcome.out
    assert reader.get_field("general.name").contents().startswith("tiny step-")
    head = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in head  # tied: the embedding serves as the head
    assert head["token_embd.weight"].tensor_type.name == "F16"


@pytest.mark.usefixtures("trained")
def test_a_missing_gguf_error_names_the_package_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'pretrain[gguf]'" in refused("export runs/tiny tiny.gguf --gguf")
