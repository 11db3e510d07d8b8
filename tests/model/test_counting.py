"""Parameters and FLOPs against published totals, and against the decoder's own tensors."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain_cli.model.attention_backends.mask import Mask
from pretrain_cli.model.counting import (
    count_parameters,
    keys_seen,
    loss_chunks,
    state_bytes,
    training_flops,
)
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.presets import PRESETS, PUBLISHED, preset

# name: tied total, untied total, embedding, all else. Totals are those of transformers' models.
TOTALS = {
    "gemma3-270m": (268098176, 435870336, 167772160, 100326016),
    "gemma3-1b": (999885952, 1301875840, 301989888, 697896064),
    "gemma3-4b": (3880263168, 4551515648, 671252480, 3209010688),
    "gemma3-12b": (11766034176, 12772912896, 1006878720, 10759155456),
    "gemma3-27b": (27009346304, 28418976512, 1409630208, 25599716096),
    "qwen3-0.6b": (596049920, 751632384, 155582464, 440467456),
    "qwen3-1.7b": (1720574976, 2031739904, 311164928, 1409410048),
    "qwen3-4b": (4022468096, 4411424256, 388956160, 3633511936),
    "qwen3-8b": (7568405504, 8190735360, 622329856, 6946075648),
    "qwen3-14b": (13990394880, 14768307200, 777912320, 13212482560),
    "qwen3-32b": (31984210944, 32762123264, 777912320, 31206298624),
    "qwen3-30b-a3b": (30220957696, 30532122624, 311164928, 29909792768),
    "qwen3-235b-a22b": (234471304704, 235093634560, 622329856, 233848974848),
}
TEXT_ONLY = {"gemma3-4b": 3880099328, "gemma3-12b": 11765788416, "gemma3-27b": 27009002240}
ACTIVE = {"qwen3-30b-a3b": 3353032704, "qwen3-235b-a22b": 22190763520}


def tied(name, is_tied):
    return dataclasses.replace(preset(name), tie_word_embeddings=is_tied)


def test_every_published_size_has_its_total_here():
    assert set(TOTALS) == set(PUBLISHED)


@pytest.mark.parametrize("name", TOTALS)
def test_tied_and_untied_totals_are_as_published(name):
    tied_total, untied_total, embedding, rest = TOTALS[name]
    count = count_parameters(tied(name, True))
    assert (count.total, count.embeddings, count.head) == (tied_total, embedding, 0)
    assert count.attention + count.mlp + count.norms == rest
    count = count_parameters(tied(name, False))
    assert (count.total, count.embeddings, count.head) == (untied_total, embedding, embedding)


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_vocabulary_without_image_rows_has_fewer_parameters(name):
    config = dataclasses.replace(preset(name), vocab_size=262144)
    assert count_parameters(config).total == TEXT_ONLY[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_count_only_the_chosen_experts(name):
    count = count_parameters(preset(name))
    assert count.active == ACTIVE[name]
    assert count.total == TOTALS[name][1]


@pytest.mark.parametrize("name", ["gemma3-270m", "qwen3-8b"])
def test_all_parameters_of_a_dense_model_are_active(name):
    count = count_parameters(preset(name))
    assert count.inactive == 0
    assert count.active == count.total


@pytest.mark.parametrize("name", PRESETS)
def test_the_decoder_has_as_many_parameters_as_counted(name):
    with torch.device("meta"):
        model = Decoder(preset(name))
    assert sum(p.numel() for p in model.parameters()) == count_parameters(preset(name)).total


@pytest.mark.parametrize("changes", [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": (0, 2)}])
def test_dense_layers_of_a_mixture_are_counted_as_dense(make_config, changes):
    config = make_config("moe", **changes)
    model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total


@pytest.mark.parametrize(
    ("name", "seq_len", "gigaflops"),
    [
        ("gemma3-270m", 512, 1.665),
        ("gemma3-270m", 1024, 1.698),
        ("gemma3-270m", 4096, 1.772),
        ("qwen3-0.6b", 512, 3.752),
        ("qwen3-0.6b", 1024, 3.929),
        ("qwen3-0.6b", 4096, 4.986),
    ],
)
def test_exact_flops_count_only_unmasked_scores(name, seq_len, gigaflops):
    assert training_flops(preset(name), seq_len).exact / 1e9 == pytest.approx(gigaflops, abs=6e-4)


def test_conventional_flops_count_attention_to_all_tokens():
    """Qwen 3 0.6B: 6 · 596 M, and 12 · layers · heads · head_dim · T."""
    matrices = 596049920 - 65536  # no norms; the tied matrix counts as head, not as lookup
    flops = training_flops(preset("qwen3-0.6b"), 1024)
    assert flops.conventional == 6 * matrices + 12 * 28 * 16 * 128 * 1024
    assert flops.conventional / flops.exact == pytest.approx(1.09, abs=0.005)
    flops = training_flops(preset("qwen3-0.6b"), 4096)
    assert flops.conventional / flops.exact == pytest.approx(1.28, abs=0.005)


def test_flops_of_a_mixture_count_only_the_chosen_experts():
    """Qwen 3 30B-A3B, sequences of one token: 6 for each active matrix weight except the lookup."""
    attention_norms = 48 * (2 * 2048 + 2 * 128) + 2048
    matrices = 3353032704 - 311164928 - attention_norms
    flops = training_flops(preset("qwen3-30b-a3b"), 1)
    assert flops.exact == 6 * matrices + 12 * 32 * 128 * 48


def test_tying_changes_no_flops():
    assert training_flops(tied("qwen3-4b", True), 512) == training_flops(
        tied("qwen3-4b", False), 512
    )


@pytest.mark.parametrize(
    ("seq_len", "window", "seen"),
    [(4, None, 2.5), (4, 4, 2.5), (4, 9, 2.5), (5, 2, 9 / 5), (5, 1, 1.0), (1, None, 1.0)],
)
def test_keys_seen_include_the_query_itself(seq_len, window, seen):
    assert keys_seen(seq_len, window) == pytest.approx(seen)


@pytest.mark.parametrize("window", [1, 6, 7, 8, 19, 20, 21, None])
def test_keys_seen_equal_the_masks_mean_of_keys_per_query(window):
    matrix = Mask(20, 20, window).matrix(torch.device("cpu"))
    assert keys_seen(20, window) == pytest.approx(matrix.sum().item() / 20)


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_flops_equal_torchs_count_and_scores_count_unmasked_keys(make_config, name):
    """Eager attention multiplies every query by every key, which is the conventional count."""
    config, rows, length = make_config(name), 2, 20
    model = Decoder(config, attention="eager")
    model.initialize(0)
    tokens = torch.randint(1, config.vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    flops = training_flops(config, length)
    assert counter.get_total_flops() == flops.conventional * rows * length

    masked = 0
    for kind in config.layer_types:
        matrix = Mask(length, length, config.window(kind)).matrix(torch.device("cpu"))
        masked += int((~matrix).sum())
    width = config.num_attention_heads * config.head_dim
    assert flops.exact * length == flops.conventional * length - 12 * width * masked


def test_training_state_is_sixteen_bytes_a_parameter():
    assert state_bytes(preset("gemma3-270m")) == 16 * 268098176


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "chunks"),
    [
        (17, 262144, [(0, 17, 0)]),
        (10240, 262144, [(0, 2560, 0), (2560, 5120, 0), (5120, 7680, 0), (7680, 10240, 0)]),
        (16384, 32000, [(0, 8192, 0), (8192, 16384, 0)]),
        (8193, 151936, [(3969, 8193, 255), (0, 4224, 0)]),
    ],
)
def test_chunks_of_the_loss_on_a_gpu_have_one_size(tokens, vocab_size, chunks):
    assert loss_chunks(tokens, vocab_size, "cuda") == chunks
