"""The JSON record of a benchmark: results, machine and settings; and the comparison of two records.

{what, cut_short, command, machine, threads, torch, python, pretrain, commit, repeats, tolerance,
 norm_tolerance, peaks: {dtype: {flops, source, measured}}, results: [Result], ratios: [Ratio]}
"""

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pretrain_cli
from pretrain_cli.engine.benchmark.results import NORM_TOLERANCE, TOLERANCE, ratios
from pretrain_cli.engine.benchmark.rounds import Rounds
from pretrain_cli.engine.runtime.distributed import device_name, find_device
from pretrain_cli.errors import ConfigError

ABOUT = ("command", "machine", "threads", "torch", "python", "pretrain", "commit", "repeats")
"""Fields of a record that `--compare` compares, besides the arms."""


def record(rounds: Rounds, what: str, command: str) -> dict[str, Any]:
    """Return everything that was measured, in JSON types."""
    results = rounds.results()
    return {
        "what": what,
        "cut_short": rounds.cut_short,
        "command": command,
        "machine": device_name(find_device(rounds.arms[0].workload.device)),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "pretrain": pretrain_cli.__version__,
        "commit": commit(),
        "repeats": asdict(rounds.repeats),
        "tolerance": TOLERANCE,
        "norm_tolerance": NORM_TOLERANCE,
        "peaks": {dtype: asdict(peak) for dtype, peak in rounds.peaks.items()},
        "results": [asdict(result) for result in results],
        "ratios": [asdict(ratio) for ratio in ratios(results)],
    } | rounds.answers()


def commit() -> str:
    """Return the commit of the checkout that this package runs from, marked if it has uncommitted
    changes. Empty for an installed package."""
    root = Path(pretrain_cli.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{head} with changes" if changes else head


@dataclass(frozen=True)
class Beside:
    """An arm of the second record divided by the arm of that name in the first."""

    arm: str
    tokens_per_second: float
    peak_memory: float
    loss: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    arms: list[Beside]
    differences: list[str]
    """Differences in machine, software and settings."""
    unmatched: list[str]
    """Arms without results in both records."""


def read(path: Path) -> dict[str, Any]:
    """Read a record from a file."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or "results" not in found or "repeats" not in found:
        raise ConfigError(f"{path}: not a file that pretrain benchmark --json wrote")
    return found


def compare(first: dict[str, Any], second: dict[str, Any]) -> Comparison:
    """Compare arms of the same name, and list differences in what was measured."""
    ours, theirs = ({r["arm"]: r for r in each["results"]} for each in (first, second))
    arms, settings, unmatched = [], dict[str, list[str]](), []
    for name in dict.fromkeys([*ours, *theirs]):
        pair = [each[name] for each in (ours, theirs) if name in each and each[name]["figures"]]
        if len(pair) < 2:
            unmatched.append(name)
            continue
        a, b = (each["figures"] for each in pair)
        arms.append(
            Beside(
                name,
                b["tokens_per_second"] / a["tokens_per_second"],
                b["peak_memory"] / a["peak_memory"],
                (a["loss"], b["loss"]),
            )
        )
        for change in _changes(*pair):
            settings.setdefault(change, []).append(name)
    differences = [
        f"{name}: {first[name]} → {second[name]}" for name in ABOUT if first[name] != second[name]
    ]
    for which, each in (("first", first), ("second", second)):
        if each.get("cut_short"):
            differences.append(f"the {which} was cut short by {each['cut_short']}")
    for change, where in settings.items():
        differences.append(change if len(where) == len(arms) else f"{change} ({', '.join(where)})")
    return Comparison(arms, differences, unmatched)


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return the differences between two arms in workload and in the settings in force."""
    flat = [
        {f"workload.{name}": value for name, value in each["workload"].items() if name != "model"}
        | {f"model.{name}": value for name, value in each["workload"]["model"].items()}
        | {f"speed.{name}": setting["in_force"] for name, setting in each["speed"].items()}
        for each in (a, b)
    ]
    names = dict.fromkeys([*flat[0], *flat[1]])
    missing = "not there"
    pairs = {name: (flat[0].get(name, missing), flat[1].get(name, missing)) for name in names}
    return [f"{name}: {old} → {new}" for name, (old, new) in pairs.items() if old != new]
