"""Documents in a sample: where they begin, and that a run with the mask keeps attention inside."""

import pytest
import torch

from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.engine import train as training
from pretrain_cli.engine.distributed import Ranks
from pretrain_cli.engine.documents import document_numbers
from pretrain_cli.engine.evaluate import evaluate
from pretrain_cli.engine.metrics import Evaluation, StepMetrics
from pretrain_cli.engine.sample import open_for_sampling

END = 9


def numbers(*rows, leads=False):
    return document_numbers(torch.tensor(rows), END, leads=leads).tolist()


def test_a_document_begins_after_the_end_of_the_one_before():
    assert numbers([1, 2, END, 3, END, 4, 5]) == [[0, 0, 0, 1, 1, 2, 2]]


def test_a_document_begins_at_its_separator_where_that_leads():
    assert numbers([1, 2, END, 3, END, 4, 5], leads=True) == [[0, 0, 1, 1, 2, 2, 2]]


def test_the_rest_of_a_document_that_a_sample_cuts_is_one():
    assert numbers([3, 4, END, 5], [END, 3, 4, 5]) == [[0, 0, 0, 1], [0, 1, 1, 1]]
    cut, whole = numbers([3, 4, END, 5], [END, 3, 4, 5], leads=True)
    assert cut == [0, 0, 1, 1]
    assert len(set(whole)) == 1


def test_a_separator_alone_is_a_document():
    assert numbers([END, END, 1, END]) == [[0, 1, 2, 2]]


def test_rows_without_a_separator_are_one_document():
    assert numbers([1, 2, 3], [4, 5, 6]) == [[0, 0, 0], [0, 0, 0]]


@pytest.fixture
def steps(settings, run, monkeypatch):
    """Train, and give each step's (inputs, targets, documents) and the losses."""

    def go(out, **changes):
        seen = []
        real = training.train_step

        def spied(model, optimizer, inputs, targets, *, documents, **rest):
            seen.append((inputs, targets, documents))
            return real(model, optimizer, inputs, targets, documents=documents, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_step", spied)
            events = run(settings(out, **changes))
        return seen, [event.loss for event in events if isinstance(event, StepMetrics)]

    return go


def test_the_mask_changes_what_is_seen_and_neither_samples_nor_targets(steps, dataset):
    plain, plain_losses = steps("plain")
    masked, masked_losses = steps("masked", data__document_mask=True)
    end = open_dataset(dataset).tokenizer.eos
    borders = 0
    for (inputs, targets, none), (same, also, documents) in zip(plain, masked, strict=True):
        assert torch.equal(inputs, same)
        assert torch.equal(targets, also)
        assert none is None
        for row, found in zip(inputs.tolist(), documents.tolist(), strict=True):
            assert found == [row[:i].count(end) for i in range(len(row))]
            borders += found[-1]
    assert borders > 0
    assert plain_losses != masked_losses


def test_a_masked_run_learns_the_same_with_every_backend(steps):
    (_, eager), (_, sdpa) = (
        steps(name, data__document_mask=True, speed__attention=name) for name in ("eager", "sdpa")
    )
    assert sdpa == pytest.approx(eager, rel=1e-5)


def test_a_masked_runs_validation_is_masked(settings, run, dataset, tmp_path):
    events = run(settings("masked", data__document_mask=True))
    (reported,) = (event.loss for event in events if isinstance(event, Evaluation))
    checkpoint = tmp_path / "masked/checkpoints/step-000006"
    _, model, _ = open_for_sampling(checkpoint, device="cpu", dtype="float32", report=print)
    plain, masked = (
        evaluate(
            model,
            open_dataset(dataset),
            step=6,
            seq_len=32,
            batch_size=2,
            ranks=Ranks(0, 1, torch.device("cpu")),
            document_mask=on,
        ).loss
        for on in (False, True)
    )
    assert reported == pytest.approx(masked, rel=1e-6)
    assert reported != pytest.approx(plain, rel=1e-5)
