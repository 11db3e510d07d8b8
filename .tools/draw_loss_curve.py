"""Draw asset/loss-curve.svg, the README's loss curve, from a run's metrics.jsonl.

    pretrain tokenize && pretrain train --model gemma3-tiny
    python .tools/draw_loss_curve.py runs/gemma3-tiny-demo

Its colours are readable on a light and on a dark page.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TARGET = Path(__file__).resolve().parent.parent / "asset" / "loss-curve.svg"
GREY, BLUE, ORANGE = "#808891", "#3b82f6", "#f97316"


def main() -> None:
    run = Path(sys.argv[1])
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(e["step"], e["loss"]) for e in events if e["kind"] == "step"]
    evaluations = [(e["step"], e["loss"]) for e in events if e["kind"] == "evaluation"]
    plt.rcParams |= {
        "svg.hashsalt": "loss-curve",
        "font.size": 11,
        **{f"{part}.color": GREY for part in ("text", "xtick", "ytick")},
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
    }
    figure, axes = plt.subplots(figsize=(8.3, 2.9))
    axes.plot(*zip(*steps, strict=True), color=BLUE, linewidth=1.2, label="training")
    axes.plot(*zip(*evaluations, strict=True), "o-", color=ORANGE, label="validation")
    step, loss = evaluations[-1]
    axes.annotate(f"{loss:.2f}", (step, loss), (-8, 12), textcoords="offset points", color=ORANGE)
    axes.set(xlabel="step", ylabel="loss", xlim=(0, steps[-1][0] * 1.01))
    axes.grid(color=GREY, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(TARGET, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
