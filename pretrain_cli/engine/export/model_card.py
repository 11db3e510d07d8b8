"""Model card of an exported model: architecture, training data, settings and validation losses.

huggingface_hub, a dependency of tokenizers, writes the metadata that the hub reads.
"""

import html
import math
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pretrain_cli import __version__
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import count_parameters

MARKDOWN_MARKS = "\\`*_[]{}()#|~!"
MAX_EVALUATIONS = 20
"""Maximum number of evaluations in the table; evenly spaced, including the last."""


def model_card(
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    run: dict[str, Any] | None,
    evaluations: list[dict[str, Any]],
) -> str:
    """Return the text of README.md. Names, paths and settings are escaped, so that Markdown shows
    them unchanged.

    `run`: model, data, step and settings of the run; None if the model belongs to no run.
    `evaluations`: evaluation rows of metrics.jsonl.
    """
    family, count = config.family.name, count_parameters(config)
    active = f", {count.active:,} active a token" if config.num_experts else ""
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["pretrain"]
    )
    lines = [
        f"# {escaped(name)}",
        "",
        f"A language model of the {family} architecture, {count.total:,} parameters{active}, in "
        f"{dtype}. Pretrained with pretrain {__version__}; not tuned to follow instructions.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "## The model",
        "",
        *_table(
            {
                "layers": config.num_hidden_layers,
                "hidden size": config.hidden_size,
                "heads": f"{config.num_attention_heads}, {config.num_key_value_heads} for keys",
                "positions": f"{config.max_position_embeddings:,}",
                "vocabulary": f"{config.vocab_size:,}",
                "tokenizer": tokenizer.name,
            }
        ),
    ]
    if run is not None:
        settings = run["settings"]
        lines += ["", "## The run", ""]
        lines += _table({"model": run["model"], "data": run["data"], "step": f"{run['step']:,}"})
        lines += ["", "### Settings", ""]
        lines += _table(
            {
                f"{section}.{key}": value
                for section in ("data", "optimizer", "train")
                for key, value in settings[section].items()
                if value is not None
            }
        )
    if evaluations:
        lines += ["", "## Validation", "", "| step | loss | perplexity | bits per byte |"]
        lines += ["|---|---|---|---|"]
        stride = math.ceil(len(evaluations) / MAX_EVALUATIONS)
        for row in evaluations[::-1][::stride][::-1]:  # backwards, to keep the last one
            perplexity = math.exp(min(row["loss"], 700.0))
            lines.append(
                f"| {row['step']:,} | {row['loss']:.4f} | {perplexity:.4g} | "
                f"{row['bits_per_byte']:.4f} |"
            )
    body = "\n".join(lines)
    return str(ModelCard(f"---\n{metadata}\n---\n\n{body}\n"))


def escaped(value: Any) -> str:
    """Escape a value so that Markdown and HTML show it unchanged, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{letter}" if letter in MARKDOWN_MARKS else letter for letter in text)


def _table(rows: dict[str, Any]) -> list[str]:
    """Return the lines of a table of two columns without a heading."""
    return ["| | |", "|---|---|"] + [
        f"| {escaped(name)} | {escaped(value)} |" for name, value in rows.items()
    ]
