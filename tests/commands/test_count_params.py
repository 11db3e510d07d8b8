"""`pretrain count-params`: published totals, computed from the configuration."""

import json

# Sums of the shapes in the published checkpoints; embeddings 262,144 × 640.
GEMMA_TIED, GEMMA_UNTIED, GEMMA_EMBEDDINGS = 268_098_176, 435_870_336, 167_772_160


def test_the_tied_total_of_gemma_3_270m(pretrain):
    outcome = pretrain("count-params --tied")
    assert outcome.code == 0, outcome.err
    assert "268,098,176" in outcome.out
    assert "435,870,336" not in outcome.out
    for part in ("embeddings", "attention", "mlp", "norms", "head"):
        assert part in outcome.out


def test_without_a_flag_both_totals_are_side_by_side(pretrain):
    outcome = pretrain("count-params")
    (total,) = (line for line in outcome.out.splitlines() if "total" in line)
    assert "268,098,176" in total
    assert "435,870,336" in total
    assert "tied (the model's own)" in outcome.out


def test_json_has_the_same_numbers_as_the_table(pretrain):
    counts = json.loads(pretrain("count-params --json").out)
    assert counts["model"] == "gemma3-270m"
    assert counts["published_as"] == "tied"
    tied, untied = (counts[word]["parameters"] for word in ("tied", "untied"))
    assert (tied["total"], untied["total"]) == (GEMMA_TIED, GEMMA_UNTIED)
    assert (tied["embeddings"], tied["head"], untied["head"]) == (
        GEMMA_EMBEDDINGS,
        *(0, GEMMA_EMBEDDINGS),
    )
    for parts in (tied, untied):
        names = ("embeddings", "attention", "mlp", "norms", "head")
        assert parts["total"] == sum(parts[name] for name in names)
    assert counts["tied"]["training_state_bytes"] == 16 * GEMMA_TIED
    assert counts["tied"]["checkpoint_bytes"] == 12 * GEMMA_TIED
    only = json.loads(pretrain("count-params --untied --json").out)
    assert "tied" not in only
    assert only["untied"] == counts["untied"]


def test_training_flops_depend_on_the_sequence_length(pretrain):
    """Expect 6 FLOPs a token for each matrix weight, and 12 × heads × head_dim for each key that it
    attends to. The conventional count assumes all T keys in each of 18 layers, with 4 heads of 256
    dimensions."""
    matrices = GEMMA_TIED - 55_936  # all but norms; the tied embedding is also the head's matrix
    for length in (1024, 4096):
        counts = json.loads(pretrain(f"count-params --json --tied --seq-len {length}").out)
        flops = counts["tied"]["training_flops_per_token"]
        assert flops["conventional"] == 6 * matrices + 12 * 4 * 256 * length * 18
        assert flops["exact"] < flops["conventional"]


def test_the_kv_cache_depends_on_the_length_and_the_windows(pretrain):
    """KV cache of the 27B for 32,768 tokens: 10 full layers, and 52 with a window of 1024."""
    counts = json.loads(pretrain("count-params --model gemma3-27b --seq-len 32768 --json").out)
    remembered = counts["tied"]["sampling_bytes"]["cache_per_text"]
    assert remembered == 2 * 2 * 16 * 128 * (10 * 32768 + 52 * 1024)
    table = pretrain("count-params --model gemma3-27b --seq-len 32768 --tied").out
    assert "keys and values of 32,768 tokens" in table
    assert "3.1 GB" in table


def test_vocab_size_changes_only_the_embeddings(pretrain):
    counts = json.loads(pretrain("count-params --json --tied --vocab-size 1000").out)
    assert counts["tied"]["parameters"]["total"] == GEMMA_TIED - GEMMA_EMBEDDINGS + 640_000


def test_active_parameters_of_experts_are_counted_separately(pretrain):
    """Source: the model card of Qwen3-30B-A3B. 30.5 billion parameters, 3.3 billion active."""
    outcome = pretrain("count-params --model qwen3-30b-a3b")
    assert "30,532,122,624" in outcome.out
    assert "active a token" in outcome.out
    counts = json.loads(pretrain("count-params --model qwen3-30b-a3b --untied --json").out)
    assert 3.25e9 < counts["untied"]["parameters"]["active"] < 3.4e9


def test_model_accepts_a_yaml_file(pretrain, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: gemma3\nvocab_size: 1000\n")
    outcome = pretrain("count-params --model mine.yaml --tied")
    assert outcome.code == 0, outcome.err
    assert "mine" in outcome.out
    assert f"{GEMMA_TIED - GEMMA_EMBEDDINGS + 640_000:,}" in outcome.out
