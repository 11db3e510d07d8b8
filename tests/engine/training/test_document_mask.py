"""A run with the document mask keeps attention inside each document, and changes nothing else."""

import pytest
import torch

from pretrain_cli.data.dataset import open_dataset
from pretrain_cli.data.mixture import Source, mix
from pretrain_cli.engine.runs.events import Evaluation, StepMetrics
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.sampling.sample import open_for_sampling
from pretrain_cli.engine.training import train as training
from pretrain_cli.engine.training.evaluate import evaluate


@pytest.fixture
def steps(settings, run, monkeypatch):
    """Return a function that trains and returns each step's (inputs, targets, documents), and the
    losses."""

    def go(out, **changes):
        seen = []
        real = training.train_step

        def spied(job, batch, *rest, **options):
            seen.append((batch.inputs, batch.targets, batch.documents and batch.documents.numbers))
            return real(job, batch, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(training, "train_step", spied)
            events = run(settings(out, **changes))
        return seen, [event.loss for event in events if isinstance(event, StepMetrics)]

    return go


def test_document_mask_changes_attention_but_not_samples_or_targets(steps, dataset):
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


def test_a_masked_run_has_the_same_losses_with_eager_and_sdpa(steps):
    (_, eager), (_, sdpa) = (
        steps(name, data__document_mask=True, speed__attention=name) for name in ("eager", "sdpa")
    )
    assert sdpa == pytest.approx(eager, rel=1e-5)


def test_validation_of_a_masked_run_is_masked(settings, run, dataset, tmp_path):
    events = run(settings("masked", data__document_mask=True))
    (reported,) = (event.loss for event in events if isinstance(event, Evaluation))
    checkpoint = tmp_path / "masked/checkpoints/step-000006"
    _, model, _ = open_for_sampling(checkpoint, device="cpu", dtype="float32", notify=print)
    plain, masked = (
        evaluate(
            model,
            mix([Source(str(dataset), None, open_dataset(dataset))]),
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
