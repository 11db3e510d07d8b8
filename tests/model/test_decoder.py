"""The decoder beyond parity: initial weights, embedding scale, reach, documents, loss."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.formats.hf_weights import published_tensors
from pretrain_cli.model.parameter_map import Merged
from tests.model.attention_backends.cases import ON_A_CPU

FAMILIES = ["gemma3", "qwen3", "moe"]


def initialized(config, seed=0, **switches):
    model = Decoder(config, **switches)
    model.initialize(seed)
    return published_tensors(model, lambda p: p)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_separate_projections_start_from_the_same_draw(make_config, family):
    config = make_config(family)
    merged, apart = (initialized(config, merged=Merged(m, m)) for m in (True, False))
    assert merged.keys() == apart.keys()
    for name, values in merged.items():
        assert torch.equal(values, apart[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_seeds_give_equal_weights_and_other_seeds_others(make_config, family):
    first, again = initialized(make_config(family)), initialized(make_config(family))
    other = initialized(make_config(family), seed=1)
    for name, values in first.items():
        assert torch.equal(values, again[name]), name
        assert torch.equal(values, other[name]) is ("norm" in name), name


def test_no_two_matrices_have_the_same_initial_values(make_config):
    first = initialized(make_config("moe"))
    starts = [tuple(v.flatten()[:4].tolist()) for k, v in first.items() if "norm" not in k]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_matrices_have_the_published_standard_deviation(make_config, family):
    """The deviation is 0.02 at any depth and width; Gemma's norms are 0 and Qwen's are 1."""
    wide = make_config(family, hidden_size=256, intermediate_size=512, vocab_size=500)
    for name, values in initialized(wide).items():
        if "norm" in name:
            assert (values == (0.0 if family == "gemma3" else 1.0)).all(), name
            continue
        error = 4 / values.numel() ** 0.5  # at least four standard errors of a deviation
        assert values.std().item() == pytest.approx(0.02, rel=error + 0.005), name
        assert abs(values.mean().item()) < 0.02 * error, name


def test_another_initializer_range_scales_the_draw(make_config):
    plain = initialized(make_config("qwen3"))
    doubled = initialized(make_config("qwen3", initializer_range=0.04))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(doubled[name], 2 * plain[name])


def test_only_the_padding_row_starts_at_zero(make_config):
    rows = initialized(make_config(pad_token_id=5))["model.embed_tokens.weight"].abs().sum(1)
    assert (rows == 0).nonzero().flatten().tolist() == [5]
    rows = initialized(make_config(pad_token_id=None))["model.embed_tokens.weight"].abs().sum(1)
    assert (rows > 0).all()


def test_the_initial_loss_is_that_of_a_uniform_guess(make_config):
    """The loss is ln V, plus a little for the spread of the logits."""
    for family in FAMILIES:
        model = Decoder(make_config(family, hidden_size=128, rms_norm_eps=1e-6))
        model.initialize(0)
        tokens = torch.randint(1, 60, (4, 40), generator=torch.Generator().manual_seed(0))
        loss = model(tokens[:, :-1], tokens[:, 1:]).minimized.item()
        assert loss == pytest.approx(4.094, abs=0.15)  # ln 60


@pytest.mark.parametrize(
    ("hidden_size", "scale"), [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)]
)
def test_the_embedding_scale_is_rounded_to_the_type_of_the_weights(make_config, hidden_size, scale):
    """√640 = 25.298 rounds to 25.25 in bfloat16, as in the published models."""
    config = make_config(hidden_size=hidden_size, layer_types=(FULL,), vocab_size=4)
    model = Decoder(config)
    model.initialize(0)
    model.bfloat16()  # the weights; activations are float32 here
    row = model.embedding.weight[1].float()
    expected = (row * scale).bfloat16().float()
    assert torch.equal(model.embed(torch.tensor([[1]]))[0, 0], expected)
    assert not torch.equal((row * hidden_size**0.5).bfloat16().float(), expected)


def test_the_embedding_scale_is_exact_for_float32_weights(make_config):
    model = Decoder(make_config(hidden_size=640, layer_types=(FULL,), vocab_size=4))
    model.initialize(0)
    expected = model.embedding.weight[1] * 25.298221281347036
    torch.testing.assert_close(model.embed(torch.tensor([[1]]))[0, 0], expected)


def test_qwen_embeddings_are_not_scaled(make_config):
    model = Decoder(make_config("qwen3"))
    model.initialize(0)
    tokens = torch.tensor([[3, 1]])
    assert torch.equal(model.embed(tokens), model.embedding.weight[tokens])


def reached(model, position, length=20):
    """Return the positions whose logits change when the token at this position changes."""
    tokens = torch.arange(1, length + 1).unsqueeze(0)
    changed = tokens.clone()
    changed[0, position] = 55
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    return (difference > 1e-5).nonzero().flatten().tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_layer_reaches_a_window_that_counts_the_query(make_config, wide, attention):
    model = Decoder(make_config(layer_types=(SLIDING,), sliding_window=5), attention=attention)
    wide(model)
    assert reached(model, 7) == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_two_sliding_layers_reach_twice_as_far(make_config, wide, attention):
    config = make_config(layer_types=(SLIDING, SLIDING), sliding_window=5)
    model = Decoder(config, attention=attention)
    wide(model)
    assert reached(model, 7) == list(range(7, 16))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_full_layer_reaches_all_later_tokens_and_no_earlier_one(make_config, wide, attention):
    model = Decoder(make_config(layer_types=(FULL,)), attention=attention)
    wide(model)
    assert reached(model, 7) == list(range(7, 20))


LENGTHS = ((9, 1, 16, 14), (40,), (3, 37), (7, 7, 1, 1, 24))
"""Document lengths in four rows of 40 tokens: below, at and above the window of 7."""


def packed(vocabulary=60):
    """Return tokens and their document numbers, (4, 40) each."""
    tokens = torch.randint(1, vocabulary, (4, 40), generator=torch.Generator().manual_seed(0))
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    return tokens, torch.stack(numbers)


def apart(rows):
    """Return the slice of each document in these rows: (1, length, ...)."""
    return [part for row, lengths in zip(rows, LENGTHS, strict=True)
            for part in row.unsqueeze(0).split(lengths, dim=1)]  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ON_A_CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_have_the_same_logits_as_alone(make_config, wide, family, attention):
    """Positions do not restart at documents, since attention depends on distances only. This holds
    for Gemma's full layers too, whose RoPE divides positions."""
    model = Decoder(make_config(family), attention=attention)
    wide(model)
    tokens, documents = packed()
    with torch.no_grad():
        together = apart(model(tokens, documents=documents))
        alone = [model(document) for document in apart(tokens)]
        unmasked = apart(model(tokens))
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unmasked[2], alone[2], atol=0.1)  # attends to earlier documents


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_a_row_have_the_same_gradients_as_alone(
    make_config, wide, our_gradients, relative_error, family, attention, checkpointed
):
    model = Decoder(make_config(family), attention=attention, activation_checkpointing=checkpointed)
    wide(model)
    tokens, documents = packed()
    targets = tokens.roll(-1, 1)
    model(tokens, targets, documents=documents, normalizer=160).minimized.backward()
    ours = our_gradients(model)
    model.zero_grad()
    for document, wanted in zip(apart(tokens), apart(targets), strict=True):
        model(document, wanted, normalizer=160).minimized.backward()
    for name, expected in our_gradients(model).items():
        assert relative_error(ours[name], expected) < 1e-4, name


@pytest.mark.parametrize("attention", ON_A_CPU)
def test_other_documents_recompile_no_block(make_config, attention):
    """At most one graph is compiled for each kind of layer, as without documents."""
    torch.compiler.reset()
    counter = CompileCounter()
    model = Decoder(make_config(), attention=attention)
    model.initialize(0)
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    tokens, documents = packed()
    graphs = []
    with torch.no_grad():
        for rows in range(3):
            model(tokens, documents=documents.roll(rows, 0))
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] <= 2


def test_the_loss_is_a_mean_unless_a_normalizer_is_given(make_config, wide):
    model = Decoder(make_config())
    wide(model)
    tokens = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, loss = model(tokens), model(tokens, tokens.roll(-1, 1)).minimized
        summed = model(tokens, tokens.roll(-1, 1), normalizer=1).minimized
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(summed, 24 * expected)


def test_parameters_stay_float32_when_compute_is_bfloat16(make_config):
    model = Decoder(make_config(), dtype=torch.bfloat16)
    model.initialize(0)
    tokens = torch.ones(1, 9, dtype=torch.long)
    model(tokens[:, :-1], tokens[:, 1:]).minimized.backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
