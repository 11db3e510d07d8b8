"""A record as Markdown, for a README."""

from typing import Any

from pretrain_cli.engine.benchmark.table import COLUMNS, LEGEND, remarks, rows


def to_markdown(record: dict[str, Any]) -> str:
    """The command, the machine, the table, and what is to be said of single arms."""
    first = record["results"][0]["workload"]
    commit = f", commit {record['commit']}" if record["commit"] else ""
    repeats = record["repeats"]
    cut = [f"Cut short by {record['cut_short']}.", ""] if record["cut_short"] else []
    lines = [
        "```sh",
        record["command"],
        "```",
        "",
        *cut,
        f"{first['name']}, {first['micro_batch_size']} × {first['seq_len']} tokens a step, "
        f"{repeats['rounds']} rounds of {repeats['warmup']} + {repeats['steps']} steps. "
        f"{record['machine']}, torch {record['torch']}, pretrain {record['pretrain']}{commit}. "
        + peaks(record),
        "",
        _line(COLUMNS),
        _line(("---", *["--:"] * (len(COLUMNS) - 1))),
    ]
    group = ""
    for row in rows(record["results"]):
        if row.group != group:
            group = row.group
            if group:
                lines.append(_line((f"*{group}*", *[""] * (len(COLUMNS) - 1))))
        cells = [f"**{cell}**" if row.differs and cell else cell for cell in row.cells]
        lines.append(_line(cells))
    lines += ["", LEGEND, *[f"- {said}" for said in remarks(record["results"])]]
    if record["ratios"]:
        lines += ["", _line(("pretrain beside", "tokens/s", "from – to", "memory"))]
        lines.append(_line(("---", "--:", "--:", "--:")))
        for ratio in record["ratios"]:
            lines.append(
                _line(
                    (
                        f"{ratio['ours']} / {ratio['arm']}",
                        f"{ratio['tokens_per_second']:.2f} ×",
                        f"{ratio['lowest']:.2f} – {ratio['highest']:.2f}",
                        f"{ratio['peak_memory']:.2f}",
                    )
                )
            )
    return "\n".join(lines) + "\n"


def peaks(record: dict[str, Any]) -> str:
    """What MFU is a share of, in each type."""
    said = []
    for dtype, peak in record["peaks"].items():
        source = peak["source"]
        if peak["measured"] != peak["flops"]:
            source += f"; {peak['measured'] / 1e12:.3g} measured"
        said.append(f"{peak['flops'] / 1e12:.3g} TFLOP/s in {dtype} ({source})")
    return f"MFU of {', '.join(said)}." if said else ""


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
