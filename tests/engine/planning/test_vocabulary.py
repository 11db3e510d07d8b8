"""A model that continues on a dataset of another tokenizer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize
from pretrain_cli.engine.evaluation.evaluate_checkpoint import EvaluateRequest, evaluate_checkpoint
from pretrain_cli.engine.runs.events import Notice, StepMetrics
from pretrain_cli.errors import DataError
from tests.engine.training.test_resume import assert_same_weights, numbers, resume

STILL = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
"""Settings with which a step leaves weights as they are, to the bit."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def reordered(dataset):
    """Tokenize the same texts with bytes in the opposite order of ids, and 500 more tokens that
    no text has. The byte Z is missing, ZZ stands in its place."""
    spec = json.loads((dataset / "tokenizer.json").read_text())
    vocab = {name: 255 - id for name, id in spec["model"]["vocab"].items() if id < 256}
    vocab["ZZ"] = vocab.pop("Z")
    spec["model"]["vocab"] = vocab
    extra = [f"<extra {number}>" for number in range(500)]
    [end] = spec["added_tokens"]
    spec["added_tokens"] = [end] + [
        end | {"id": 257 + id, "content": name, "special": False} for id, name in enumerate(extra)
    ]
    folder = dataset.parent / "reordered-tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    corpus = str(dataset.parent / "corpus")
    out = dataset.parent / "reordered"
    request = TokenizeRequest(
        paths=(corpus,), out=out, tokenizer=str(folder / "tokenizer.json"), val_fraction=0.2
    )
    tokenize(request, lambda *_: None)
    return out


@pytest.fixture
def start(settings, run, tmp_path, request):
    """Folder of a model that was trained on bytes. A test may ask for another one than Gemma 3,
    with two matrices for embedding and head."""
    name = getattr(request, "param", "gemma3-tiny")
    tied = {"model__tie_word_embeddings": name == "gemma3-tiny"}
    run(settings("start", model__name=name, train__steps=30, **tied))
    return tmp_path / "start/checkpoints/step-000030"


def last(run_folder):
    return sorted((run_folder / "checkpoints").iterdir())[-1]


@pytest.mark.parametrize("start", ["gemma3-tiny", "qwen3-tiny"], indirect=True)
def test_shared_tokens_keep_their_rows_and_new_ones_are_drawn(
    settings, run, start, reordered, tmp_path
):
    events = run(settings("next", model__init_from=start, data__path=reordered, **STILL))
    before, after = (load_file(f / "model.safetensors") for f in (start, last(tmp_path / "next")))
    is_tied = json.loads((start / "config.json").read_text())["tie_word_embeddings"]
    assert (HEAD in before) == (HEAD in after) == (not is_tied)
    for name in before.keys() & {EMBEDDING, HEAD}:
        old, new = before[name], after[name]
        assert new.shape == (768, 32)  # 757 tokens, in multiples of 64
        for id in range(256):
            if id != ord("Z"):
                assert torch.equal(new[255 - id], old[id]), id
        assert torch.equal(new[256], old[256])  # the end of a document
        drawn, rows = torch.cat([new[257:], new[255 - ord("Z")][None]]), old[:257]
        error = (drawn.mean(0) - rows.mean(0)) / rows.std(0)
        assert error.abs().max() < 5 / len(drawn) ** 0.5
        scale = rows.std(0).outer(rows.std(0))
        error = (drawn.T.cov() - rows.T.cov()) / scale
        assert error.abs().max() < 5 * (2 / len(drawn)) ** 0.5
    others = before.keys() - {EMBEDDING, HEAD}
    assert all(torch.equal(before[name], after[name]) for name in others)
    [said] = [e.text for e in events if isinstance(e, Notice) and "Vocabulary" in e.text]
    assert "256 tokens are kept, 501 are new" in said
    assert "1 are dropped; 768 rows" in said


def test_text_of_shared_tokens_keeps_its_loss(settings, run, start, reordered, tmp_path):
    """No more is lost than the share of probability of 500 new tokens beside 257 old ones."""
    run(settings("next", model__init_from=start, data__path=reordered, **STILL))
    losses = [
        evaluate_checkpoint(EvaluateRequest(where=folder, device="cpu"), print).evaluation.loss
        for folder in (tmp_path / "start", tmp_path / "next")
    ]
    assert losses[0] < 4  # learned: a model that knows nothing has ln 320 = 5.8
    assert losses[0] < losses[1] < losses[0] + torch.tensor(757 / 257).log()


def test_a_continued_run_resumes_exactly(settings, run, start, reordered, tmp_path):
    common = {"model__init_from": start, "data__path": reordered, "train__checkpoint_every": 3}
    run(settings("straight", **common))
    for name, steps in (("halves", 1), ("anew", 2)):
        shutil.copytree(tmp_path / "straight", tmp_path / name)
        for path in sorted((tmp_path / name / "checkpoints").iterdir())[-steps:]:
            shutil.rmtree(path)
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 2 - steps
        if name == "halves":
            shutil.move(start, tmp_path / "moved")  # needed no more, once there is a checkpoint
            resume(run, tmp_path / name)
            shutil.move(tmp_path / "moved", start)
        else:
            resume(run, tmp_path / name)  # from --init-from again
        assert numbers(tmp_path / name) == numbers(tmp_path / "straight")
        assert_same_weights(last(tmp_path / name), last(tmp_path / "straight"))


def test_the_same_start_learns_faster_than_a_new_model(settings, run, start, reordered):
    def first(*options, **changes):
        events = run(settings(*options, data__path=reordered, **changes))
        return next(event.loss for event in events if isinstance(event, StepMetrics))

    assert first("next", model__init_from=start) < first("new") - 1


def test_a_tokenizer_that_shares_no_text_is_refused(settings, run, start, dataset, tmp_path):
    spec = json.loads((dataset / "tokenizer.json").read_text())
    spec["model"] = {"type": "WordLevel", "vocab": {"cat": 0, "mat": 1}, "unk_token": "cat"}
    spec["pre_tokenizer"], spec["decoder"] = {"type": "Whitespace"}, None
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    corpus = str(dataset.parent / "corpus")
    request = TokenizeRequest(paths=(corpus,), out=tmp_path / "data", tokenizer=str(folder))
    tokenize(request, lambda *_: None)
    with pytest.raises(DataError) as error:
        run(settings("next", model__init_from=start, data__path=tmp_path / "data"))
    assert str(error.value) == (
        f"{tmp_path / 'data'}: its tokenizer, {folder}, shares no text with {start}'s; tokenize "
        f"with --tokenizer {start}"
    )
    assert not (tmp_path / "next").exists()


def test_weights_without_a_tokenizer_need_a_vocabulary_of_that_size(
    settings, run, start, dataset, reordered
):
    (start / "tokenizer.json").unlink()
    events = run(settings("same", model__init_from=start, data__path=dataset))
    assert any(
        "that it is the dataset's can't be checked" in getattr(e, "text", "") for e in events
    )
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"vocab_size": 3200}))
    with pytest.raises(DataError, match=r"no tokenizer.json, and 3,200 tokens where .* has 757"):
        run(settings("other", model__init_from=start, data__path=reordered))


def test_a_larger_vocabulary_than_the_tokenizers_is_honoured(
    settings, run, start, reordered, tmp_path
):
    changed = settings("next", model__init_from=start, data__path=reordered, train__steps=1)
    changes = {**changed.model.model_dump(exclude_unset=True), "vocab_size": 1024}
    run(changed.model_copy(update={"model": type(changed.model)(**changes)}))
    after = load_file(last(tmp_path / "next") / "model.safetensors")
    assert after[EMBEDDING].shape == (1024, 32)
