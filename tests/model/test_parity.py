"""The decoder against transformers: logits, loss and every gradient, in float32.

Gemma's eight layers include both kinds; T is several windows, but not a multiple of one.
"""

import pytest
import torch

from pretrain_cli.model import counting
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.formats.hf_weights import load_weights
from pretrain_cli.model.parameter_map import Merged

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEVEN_ROWS = {"cpu": 7 * 150}  # of 64 rows: nine chunks and a shorter tenth


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_loss_and_every_gradient_equal_transformers(
    reference, attention, merged, chunked, our_gradients, relative_error, monkeypatch
):
    monkeypatch.setattr(counting, "CHUNK_ELEMENTS", SEVEN_ROWS)
    model = Decoder(
        read_config(reference.folder),
        attention=attention,
        merged=Merged(merged, merged),
        chunked_loss=chunked,
    )
    assert load_weights(model, reference.folder) == []
    tokens = reference.tokens

    with torch.no_grad():
        logits = model(tokens)
    assert relative_error(logits, reference.logits) < 2e-5

    ours = model(tokens[:, :-1], tokens[:, 1:]).minimized
    torch.testing.assert_close(ours, reference.loss, rtol=1e-6, atol=1e-6)

    ours.backward()
    gradients = our_gradients(model)
    assert gradients.keys() == reference.gradients.keys()
    for name, gradient in gradients.items():
        assert reference.gradients[name].norm() > 0, name
        assert relative_error(gradient, reference.gradients[name]) < 5e-5, name


def test_flex_gives_the_logits_of_transformers(reference, relative_error):
    model = Decoder(read_config(reference.folder), attention="flex")
    load_weights(model, reference.folder)
    with torch.no_grad():
        logits = model(reference.tokens)
    assert relative_error(logits, reference.logits) < 2e-5


def test_activation_checkpointing_changes_neither_loss_nor_gradients(
    reference, our_gradients, relative_error
):
    model = Decoder(read_config(reference.folder), activation_checkpointing=True)
    load_weights(model, reference.folder)
    ours = model(reference.tokens[:, :-1], reference.tokens[:, 1:]).minimized
    ours.backward()
    torch.testing.assert_close(ours, reference.loss, rtol=1e-6, atol=1e-6)
    for name, gradient in our_gradients(model).items():
        assert relative_error(gradient, reference.gradients[name]) < 5e-5, name


def test_bfloat16_compute_stays_within_its_rounding(reference, relative_error):
    model = Decoder(read_config(reference.folder), dtype=torch.bfloat16)
    load_weights(model, reference.folder)
    with torch.no_grad():
        logits = model(reference.tokens)
        ours = model(reference.tokens[:, :-1], reference.tokens[:, 1:]).minimized
    assert logits.dtype == torch.bfloat16
    assert ours.dtype == torch.float32
    assert relative_error(logits, reference.logits) < 0.1
    torch.testing.assert_close(ours, reference.loss, rtol=0.02, atol=0)
