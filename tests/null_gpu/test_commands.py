"""Commands as a user with a GPU types them, in processes of their own.

The last save of a training run may be refused, and its sample too: they ask the device whether all
weights are finite, and what they read is no answer. So the exit code says nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.null_gpu

TINY = ["--model", "gemma3-tiny", "--seq-len", "512", "--device", "cuda"]
NAME = "NVIDIA H100 80GB HBM3"


def pretrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "pretrain_cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def test_train_reaches_its_last_step_on_cuda(dataset, tmp_path):
    done = pretrain(
        tmp_path, "train", *TINY, "--data", str(dataset), "--steps", "4", "--no-compile",
        "--tokens-per-step", "8192", "--set", "train.log_every=1", "--out", "run",
    )  # fmt: skip
    assert NAME in done.stdout, done.stdout + done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [4]


def test_benchmark_measures_every_backend_on_cuda(tmp_path):
    done = pretrain(
        tmp_path, "benchmark", *TINY, "--no-compile", "--attn", "all", "--rounds", "1",
        "--steps", "1", "--warmup", "1", "--json", "results.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert NAME in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    measured = [result["arm"] for result in results if result["kind"] != "not run"]
    assert measured == ["eager", "sdpa", "flex", "varlen"]
