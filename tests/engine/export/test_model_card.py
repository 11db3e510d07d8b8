"""Model cards: metadata that the hub reads, facts of model and run, and escaped names."""

from itertools import pairwise
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.engine.export.model_card import MAX_EVALUATIONS, escaped, model_card
from pretrain_cli.model.presets import preset

RUN = {
    "model": "gemma3-tiny",
    "data": "data/corpus",
    "step": 3000,
    "settings": {
        "data": {"path": "data/corpus", "tokenizer": None},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 3000},
    },
}


def card(
    name: str = "tiny step-003000",
    model: str = "gemma3-tiny",
    run: dict[str, Any] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
) -> str:
    return model_card(
        name, preset(model), load_tokenizer("bytes"), "bfloat16", run, evaluations or []
    )


def test_the_hub_reads_library_pipeline_and_tags():
    parsed = ModelCard(card(run=RUN))
    assert parsed.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pretrain"],
    }
    assert parsed.text.startswith("\n# tiny step-003000\n\nA language model of the Gemma 3 arch")


def test_a_card_has_the_models_size_and_the_runs_settings():
    text = card(model="gemma3-270m", run=RUN)
    assert "Gemma 3 architecture, 268,098,176 parameters, in bfloat16. " in text
    assert "| vocabulary | 262,144 |" in text
    assert "| step | 3,000 |" in text
    assert "| optimizer.learning\\_rate | 0.01 |" in text
    assert "data.tokenizer" not in text  # a setting that is None


def test_a_card_without_a_run_shows_no_settings_or_losses():
    headings = [line for line in card().splitlines() if line.startswith("#")]
    assert headings == ["# tiny step-003000", "## The model"]


@pytest.mark.parametrize("count", [1, MAX_EVALUATIONS, MAX_EVALUATIONS + 1, 45])
def test_losses_are_thinned_evenly_and_the_last_one_is_kept(count):
    rows = [{"step": k, "loss": 3 - k / 100, "bits_per_byte": 1.5} for k in range(count)]
    table = card(run=RUN, evaluations=rows).split("## Validation")[1].strip().splitlines()[2:]
    steps = [int(line.split("|")[1]) for line in table]
    assert len(steps) <= MAX_EVALUATIONS
    assert steps[-1] == count - 1
    assert len({after - before for before, after in pairwise(steps)}) <= 1


def test_the_perplexity_of_a_huge_loss_is_finite():
    row = {"step": 1, "loss": 1e6, "bits_per_byte": 1e6}
    assert "e+304" in card(run=RUN, evaluations=[row])


def test_names_and_paths_are_escaped_for_markdown_and_html():
    evil = "a|b <script>x</script> [l](http://e) `c`\n# d *e* ![i](j)"
    text = escaped(evil)
    assert "\n" not in text
    assert "<" not in text
    for mark in "|[](`*#!":
        assert text.count(mark) == text.count("\\" + mark)
    run = {"model": evil, "data": evil, "step": 3, "settings": {
        "data": {"path": evil}, "optimizer": {}, "train": {}}}  # fmt: skip
    text = card(evil, "qwen3-tiny", run)
    assert "<script>" not in text
    assert text.count("\n# ") == 1
