"""Document lengths and sources of a dataset as a picture, by matplotlib."""

from pathlib import Path
from typing import Any

from pretrain_cli.units import amount

SOURCES_DRAWN = 20


def draw(facts: dict[str, Any], path: Path) -> None:
    """Draw what `pretrain inspect --json` says, in the format given by the file's suffix."""
    from matplotlib.figure import Figure

    by_power = facts["document_tokens"]["train"]["by_power"]
    ranked = sorted(facts["sources"].items(), key=lambda item: -item[1]["tokens"])[:SOURCES_DRAWN]
    figure = Figure(figsize=(11, 2.5 + 0.25 * len(ranked)), layout="constrained")
    figure.suptitle(f"{facts['dataset']}, {facts['tokenizer']}", size=11, x=0.01, ha="left")
    lengths, sources = figure.subplots(1, 2)
    lengths.set_title("training documents by length in tokens", size=10, loc="left")
    powers = [int(power).bit_length() - 1 for power in by_power]
    lengths.bar(powers, list(by_power.values()), width=0.9)
    lengths.set_xticks(powers, [amount(2**power) for power in powers], size=8, rotation=45)
    sources.set_title("share of the tokens, and tokens a byte, by source", size=10, loc="left")
    bars = sources.barh(range(len(ranked)), [part["share"] for _, part in ranked])
    said = [f" {part['share']:.1%}, {part['tokens_per_byte']:.3f}" for _, part in ranked]
    sources.bar_label(bars, said, size=8)
    sources.set_yticks(range(len(ranked)), [name for name, _ in ranked], size=8)
    sources.invert_yaxis()
    sources.margins(x=0.3)
    for axes in (lengths, sources):
        axes.spines[["top", "right"]].set_visible(False)
    for tick in sources.get_yticklabels():
        tick.set_parse_math(False)  # a name may have dollar signs
    figure.savefig(path, dpi=140, format=path.suffix[1:])
