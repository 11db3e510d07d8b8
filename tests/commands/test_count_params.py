"""`pretrain count-params`: the published totals, from the architecture's numbers alone."""

import json

import pytest

from pretrain_cli.engine.benchmark import rounds, timing

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


def test_the_same_numbers_for_machines(pretrain):
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


def test_training_flops_follow_the_length(pretrain):
    """6 FLOPs a weight that multiplies, and 12 × heads × head_dim for each key seen: here, at
    full attention, 18 layers of 4 heads of 256 dimensions that see all T tokens."""
    matrices = GEMMA_TIED - 55_936  # all but norms; the tied embedding multiplies as the head
    for length in (1024, 4096):
        counts = json.loads(pretrain(f"count-params --json --tied --seq-len {length}").out)
        flops = counts["tied"]["training_flops_per_token"]
        assert flops["conventional"] == 6 * matrices + 12 * 4 * 256 * length * 18
        assert flops["exact"] < flops["conventional"]


def test_what_sampling_remembers_follows_the_length_and_the_windows(pretrain):
    """A text of 32,768 tokens of the 27B: 10 full layers, and 52 with windows of 1024."""
    counts = json.loads(pretrain("count-params --model gemma3-27b --seq-len 32768 --json").out)
    remembered = counts["tied"]["sampling_bytes"]["cache_per_text"]
    assert remembered == 2 * 2 * 16 * 128 * (10 * 32768 + 52 * 1024)
    table = pretrain("count-params --model gemma3-27b --seq-len 32768 --tied").out
    assert "keys and values of 32,768 tokens" in table
    assert "3.1 GB" in table


def test_another_vocabulary_changes_the_embeddings_alone(pretrain):
    counts = json.loads(pretrain("count-params --json --tied --vocab-size 1000").out)
    assert counts["tied"]["parameters"]["total"] == GEMMA_TIED - GEMMA_EMBEDDINGS + 640_000


def test_experts_that_a_token_does_not_meet_are_told_apart(pretrain):
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 billion of them active, says its model card."""
    outcome = pretrain("count-params --model qwen3-30b-a3b")
    assert "30,532,122,624" in outcome.out
    assert "active a token" in outcome.out
    counts = json.loads(pretrain("count-params --model qwen3-30b-a3b --untied --json").out)
    assert 3.25e9 < counts["untied"]["parameters"]["active"] < 3.4e9


def test_a_model_may_be_a_file(pretrain, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: gemma3\nvocab_size: 1000\n")
    outcome = pretrain("count-params --model mine.yaml --tied")
    assert outcome.code == 0, outcome.err
    assert "mine" in outcome.out
    assert f"{GEMMA_TIED - GEMMA_EMBEDDINGS + 640_000:,}" in outcome.out


# --- a plan --------------------------------------------------------------------------------------


def test_a_plan_has_memory_by_part_the_micro_batch_time_and_disk(pretrain):
    outcome = pretrain("count-params --plan --tokens 5B --device h200 --gpus 8")
    assert outcome.code == 0, outcome.err
    for part in ("weights", "gradients", "moments", "activations", "logits", "most at once"):
        assert part in outcome.out
    for said in (
        "on 8 × H200: bfloat16",
        "a copy on each (ddp)",
        "a part on each (fsdp)",
        "that a run may take",
        "5B tokens in 44m43s",  # 5e9 × 1.698 GFLOP / (0.4 × 8 × 989 TFLOP/s)
        "at an MFU of 40%, assumed, of 989 TFLOP/s, as the maker states",
        "A checkpoint takes 3.2 GB, and all that are there at a time 12.9 GB",
        "keys and values 11.0 MB for a text of 1,024 tokens",
    ):
        assert said in outcome.out


def test_a_plan_for_machines(pretrain):
    line = "count-params --plan --device a100 --mfu 0.5 --micro-batch-size 3 --untied --json"
    plan = json.loads(pretrain(line).out)
    assert plan["parameters"] == GEMMA_UNTIED
    assert plan["tokens"] == 20 * GEMMA_UNTIED
    way = plan["ways"]["alone"]
    assert (way["micro_batch_size"], way["fits"]) == (3, True)
    moments = way["memory"]["moments"]
    assert way["memory"]["peak"] == max(sum(parts.values()) for parts in moments.values())
    assert moments["step"]["weights"] == moments["step"]["gradients"] == 4 * GEMMA_UNTIED
    assert plan["pace"]["mfu"] == 0.5
    assert plan["seconds"] == plan["tokens"] / plan["pace"]["tokens_per_second"]


def test_what_does_not_fit_is_told(pretrain):
    outcome = pretrain("count-params --plan --model qwen3-8b --device h100")
    assert outcome.code == 0, outcome.err
    assert "Micro-batch 1 does not fit: it takes 131.1 GB, more than the 72.0 GB" in outcome.out


def test_a_cpu_plan_offers_to_calibrate_and_calibrates(pretrain, monkeypatch):
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)
    here = lambda name, speed, folder, *arguments: getattr(timing, name)(*arguments)  # noqa: E731
    monkeypatch.setattr(rounds, "run_timing", here)
    line = "count-params --plan --model qwen3-tiny --vocab-size 500 --seq-len 32 --tokens 1M"
    outcome = pretrain(line)
    assert "1M tokens: how long is not known here; --calibrate times some steps" in outcome.out
    assert "the program itself" in outcome.out
    plan = json.loads(pretrain(f"{line} --micro-batch-size 2 --calibrate --json").out)
    assert plan["pace"]["source"].startswith("measured on ")
    assert plan["pace"]["source"].endswith(", 2 × 32 tokens a step")
    assert plan["seconds"] == pytest.approx(1e6 / plan["pace"]["tokens_per_second"])
    assert 0 < plan["pace"]["mfu"] < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model gema3", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("--model nowhere.yaml", "model: no file nowhere.yaml"),
        ("--vocab-size 0", "--vocab-size: 0 is not above zero"),
        ("--seq-len 0", "--seq-len: 0 is not from 1 to the model's 32,768 positions"),
        ("--seq-len 40000", "--seq-len: 40,000 is not from 1 to the model's 32,768 positions"),
        ("--tokens 5B", "--tokens: goes with --plan"),
        ("--no-compile", "--compile: goes with --plan"),
        ("--calibrate", "--calibrate: goes with --plan"),
        ("--plan --tokens 5X", "--tokens: '5X' is not a number such as 5B or 200M"),
        ("--plan --device h300", "--device: 'h300' is not cpu, cuda, cuda:N, mps or one of b200, "),
        ("--plan --device cpu --gpus 2", "--gpus: 2 of a machine without any"),
        ("--plan --gpus 0", "--gpus: 0 is not at least 1"),
        ("--plan --micro-batch-size 0", "--micro-batch-size: 0 is not at least 1"),
        ("--plan --mfu 0", "--mfu: 0 is not above 0 and at most 1"),
        ("--plan --mfu 1.1", "--mfu: 1.1 is not above 0 and at most 1"),
        ("--plan --mfu 0.5 --calibrate", "--mfu: 0.5 is what --calibrate measures; give one"),
        ("--plan --device h200 --calibrate", "--calibrate: times steps on the device that is here"),
        ("--plan --dtype float8 --device a100", "speed.dtype: 'float8' can't be used: A100 does"),
        ("--plan --dtype float8 --device cpu", "speed.dtype: 'float8' can't be used: it is for"),
        ("--plan --dtype int8", "speed.dtype: 'int8' is not one of auto, float32, bfloat16"),
    ],
)
def test_what_cannot_be_counted_is_refused(refused, options, said):
    assert refused(f"count-params {options}").startswith(said)
