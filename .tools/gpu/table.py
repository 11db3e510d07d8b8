"""The table and the summary of a check's results."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu.runner import Outcome

SHOWN: dict[str, tuple[str, ...]] = {
    "env": ("device", "torch", "driver", "matmul_tflops", "copy_gb_per_s", "sm_clock_mhz"),
    "smoke": ("first_loss", "last_loss", "logit_error"),
    "sync": ("steps", "micro_steps_per_step"),
    "tests": ("passed", "failed", "skipped"),
    "parity": ("out_error", "dq_error", "dk_error", "dv_error", "dhidden_error", "dweight_error",
               "loss_error", "bound"),
    "mfu": ("step_median_ms", "step_p10_ms", "step_p90_ms", "tokens_per_s", "mfu", "speed_ratio",
            "allocated_peak_gb", "reserved_peak_gb", "estimate_gb", "compile_s", "host_ms",
            "kernels_per_step", "gpu_busy"),
    "arms": ("step_median_ms", "call_median_ms", "tokens_per_s", "mfu", "tflops_per_s",
             "allocated_peak_gb", "kernels_per_call", "compile_s"),
    "memory": ("allocated_peak_gb", "reserved_peak_gb", "estimate_gb", "estimate_ratio"),
    "decode": ("prefill_tokens_per_s", "decode_tokens_per_s", "token_median_ms", "speed_ratio",
               "compiled_speed_ratio"),
    "fsdp": ("loss_difference", "norm_difference"),
    "compile": ("compile_s",),
}  # fmt: skip
"""Figures in the table, by slot. `results.jsonl` has all of them."""
WIDTH = 44


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return all results as one table of text, in the order of the slots."""
    slots = list(dict.fromkeys(row["slot"] for row in rows if row["slot"] != "compile"))
    lines = []
    for slot in [*slots, "compile"]:
        own = [row for row in rows if row["slot"] == slot]
        lines += [_line(row) for row in own if "state" not in row]
        lines += [_ending(row) for row in own if "state" in row]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    mark = {True: "ok", False: "WRONG", None: ""}[row.get("ok")]
    if row.get("dropped"):
        said = f"dropped: {row['dropped']}"
    elif row.get("error"):
        mark, said = "FAILED", str(row["error"])
    else:
        names = SHOWN.get(row["slot"], ())
        said = ", ".join(f"{name} {_number(row[name])}" for name in names if name in row)
        said += f" ({row['note']})" if row.get("note") else ""
    return f"{row['slot']:8} {row['arm']:{WIDTH}} {mark:6} {said}".rstrip()


def _ending(row: dict[str, Any]) -> str:
    why = f", {row['error']}" if row["error"] else ""
    return f"{row['slot']:8} {'— ' + row['state']} after {row['wall_s']:.0f} s{why}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_summary(
    path: Path, rows: Sequence[dict[str, Any]], outcomes: Sequence[Outcome], **about: Any
) -> None:
    """Write everything as one JSON file."""
    from pretrain_cli.files import write_whole

    results = [row for row in rows if "state" not in row]
    wrong = [f"{row['slot']}: {row['arm']}" for row in results if row.get("ok") is False]
    summary = {
        **about,
        "slots": [asdict(outcome) for outcome in outcomes],
        "wrong": wrong,
        "results": results,
    }
    write_whole(path, json.dumps(summary, indent=1))
