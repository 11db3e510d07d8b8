"""The Python interface: the guide's examples run, and its functions do what the commands do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretrain_cli
from pretrain_cli import api
from pretrain_cli.engine.runs.events import StepMetrics
from pretrain_cli.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "pretrain_cli" / "guide" / "python.md"
SMALL = {
    "model.name": "qwen3-tiny",
    "model.num_hidden_layers": 2,
    "data.seq_len": 32,
    "train.tokens_per_step": 128,
    "train.steps": 4,
    "train.device": "cpu",
    "train.sample_tokens": 0,
    "speed.dtype": "float32",
}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for number in range(20):
        text = f"{number}: " + "the cat sat on the mat. " * (number % 5 + 3)
        Path("corpus", f"{number:02d}.txt").write_text(text)
    return "corpus"


def test_the_examples_of_the_guide_run_in_order(corpus, capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    exec(compile(code, PAGE.name, "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert "(4, 64)" in shown
    assert "torch.Size([4, 64, " in shown
    assert len(list(Path("runs/notes/checkpoints").iterdir())) == 2


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, pretrain_cli; dir(pretrain_cli); "
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); "
        "from pretrain_cli import train; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists_and_stands_in_the_guide():
    text = PAGE.read_text()
    for name in pretrain_cli.__all__:
        assert getattr(pretrain_cli, name) is getattr(api, name)
        if name[0].islower():
            assert f"`{name}(" in text
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pretrain_cli.trian  # noqa: B018


def test_batches_and_documents_are_those_of_the_run(corpus):
    dataset = api.tokenize(corpus, tokenizer="bytes", val_fraction=0.2)
    documents = list(dataset.train.iter_documents())
    assert sum(map(len, documents)) == len(dataset.train)
    assert len(documents) == len(dataset.train.documents)
    assert all(document[-1] == dataset.separator for document in documents)

    losses = []
    result = api.train(
        {**SMALL, "data.path": str(dataset.path)},
        on_event=lambda event: losses.append(event.loss) if isinstance(event, StepMetrics) else 0,
    )
    start = api.train({**SMALL, "data.path": str(dataset.path), "train.steps": 1})
    assert (result.step, start.step, len(losses)) == (4, 1, 4)
    second = api.batches(dataset, seq_len=32, samples_per_step=4).step(1)
    decoder = api.load_model(start.run, dtype="float32", device="cpu").decoder
    loss = decoder(torch.from_numpy(second.inputs), torch.from_numpy(second.targets))
    assert loss.cross_entropy.item() == pytest.approx(losses[1], rel=1e-5)


def test_generated_text_is_that_of_the_command_and_changes_no_weight(corpus, pretrain):
    dataset = api.tokenize(corpus, tokenizer="bytes")
    run = api.train({**SMALL, "data.path": str(dataset.path)}).run
    model = api.load_model(run, dtype="float32", device="cpu")
    before = [parameter.clone() for parameter in model.decoder.parameters()]
    prompts = ["the cat", "a dog sat"]
    texts = api.generate(model, prompts, max_tokens=12, temperature=0.0)
    for prompt, text in zip(prompts, texts, strict=True):
        options = (
            f"--max-tokens 12 --temperature 0 --dtype float32 --no-compile --prompt '{prompt}'"
        )
        assert (
            pretrain(f"sample {run} --no-compile --device cpu {options}").out == f"{prompt}{text}\n"
        )
    for ours, theirs in zip(model.decoder.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)
    assert api.generate(model, []) == []
    assert api.generate(model, prompts[0], max_tokens=12, temperature=0.0) == texts[:1]
    with pytest.raises(ConfigError, match="batch_size: 0 is not at least 1"):
        api.generate(model, prompts, batch_size=0)


def test_a_wrong_setting_is_refused_with_the_messages_of_the_command():
    with pytest.raises(ConfigError, match=r"train\.stepz: no such setting; did you mean"):
        api.train({"train.stepz": 3})
    with pytest.raises(ConfigError, match=r"model\.depth"):
        api.model_config("qwen3-tiny", depth=3)


def test_values_of_none_and_names_are_checked():
    assert api.run_config({"train.keep_every": None}).train.keep_every is None
    with pytest.raises(ConfigError, match=r"train\.keep_best: None"):
        api.run_config({"train.keep_best": None})
    with pytest.raises(ConfigError, match=r"train: not of the form section\.name"):
        api.run_config({"train": {"steps": 5}})


def test_options_of_tokenize_are_those_of_the_command(corpus):
    Path("corpus/code.py").write_text("print('left out')")
    dataset = api.tokenize("corpus/*.txt", tokenizer="bytes", val_fraction=0.0)
    assert dataset.path == Path("data/corpus")
    kept = api.tokenize(corpus, tokenizer="bytes", val_fraction=0.0, include="*.txt", out="kept")
    assert len(kept.train) == len(dataset.train)
    Path("rows.jsonl").write_text('{"body": "a text"}\n')
    rows = api.tokenize("rows.jsonl", tokenizer="bytes", text_key="body", val_fraction=0.0)
    [document] = rows.train.iter_documents()
    assert rows.tokenizer.decode(document[:6].tolist()) == "a text"
    with pytest.raises(ConfigError, match="no path"):
        api.tokenize(tokenizer="bytes")


def test_batches_refuse_what_a_run_would_refuse(corpus):
    dataset = api.tokenize(corpus, tokenizer="bytes")
    for options, error in (
        ({"packing": "bestfit"}, r"data\.packing: 'bestfit' is not one of concat, best-fit"),
        ({"seq_len": 0}, r"data\.seq_len: 0"),
        ({"seq_len": 10**6}, "shorter than one sample"),
    ):
        with pytest.raises(pretrain_cli.PretrainError, match=error):
            api.batches(dataset, **{"seq_len": 32, "samples_per_step": 4} | options)


def test_a_time_limit_counts_from_the_call(corpus):
    dataset = api.tokenize(corpus, tokenizer="bytes")
    result = api.train({**SMALL, "data.path": str(dataset.path), "train.max_time": "10m"})
    assert result.reason == "done"
    with pytest.raises(pretrain_cli.PretrainError, match=r"train\.max_time: 1s"):
        api.train({**SMALL, "data.path": str(dataset.path), "train.max_time": "1s"})
