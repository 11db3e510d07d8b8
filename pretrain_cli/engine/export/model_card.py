"""README.md of an exported model: what it is, what it was trained on, how well it does."""

import html
import math
from typing import Any

from pretrain_cli import __version__
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import count_parameters

MARKS = "\\`*_[]{}()#|~!"
EVALUATIONS_SHOWN = 20


def model_card(
    name: str,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    run: dict[str, Any] | None,
    evaluations: list[dict[str, Any]],
) -> str:
    """The card. Whatever comes from elsewhere, a name or a path, is escaped: it stays text."""
    family = "Gemma 3" if config.model_type == "gemma3_text" else "Qwen 3"
    count = count_parameters(config)
    active = f", {count.active:,} active a token" if config.num_experts else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [pretrain]",
        "---",
        "",
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
        every = math.ceil(len(evaluations) / EVALUATIONS_SHOWN)
        for row in evaluations[::-1][::every][::-1]:  # the last one always
            perplexity = math.exp(min(row["loss"], 700.0))
            lines.append(
                f"| {row['step']:,} | {row['loss']:.4f} | {perplexity:.4g} | "
                f"{row['bits_per_byte']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def escaped(value: Any) -> str:
    """Text that Markdown and HTML take for text, on one line."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return "".join(f"\\{letter}" if letter in MARKS else letter for letter in text)


def _table(rows: dict[str, Any]) -> list[str]:
    head = ["| | |", "|---|---|"]
    return head + [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows.items()]
