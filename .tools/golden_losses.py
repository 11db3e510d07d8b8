"""Compare short training runs of this checkout with those of another commit, bit for bit.

    python .tools/golden_losses.py --against COMMIT [--only NAME] [--keep FOLDER] [--here="…"]

Run it before and after a change that should not alter results. Each run is started through the
command line, in this checkout and in a clone of COMMIT, on one CPU thread. The script compares the
tokenized dataset, every logged loss, gradient norm and learning rate, the validation losses, the
sampled text, and every tensor of the last checkpoint, optimizer included. It exits 1 and names the
first difference if one is found. It uses no module of the package, so both sides may differ freely.

The results of COMMIT are cached in .git/golden-losses: bits differ between processors and torch
releases, so a recorded table in the repository would only hold on one machine.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--seq-len 64 --tokens-per-step 512 --micro-batch-size 4 --steps 6 "
    "--set train.eval_every=3 --set train.log_every=1 "
    # in full, so that both sides do the same where their defaults differ
    "--optimizer adamw --learning-rate 3e-3 --schedule cosine "
    + " ".join(
        f"--set optimizer.{name}"
        for name in (
            "embedding_rate_scale=1.0",
            "head_rate_scale=1.0",
            "betas=[0.9,0.95]",
            "eps=1e-8",
            "weight_decay=0.1",
            "warmup_steps=1",
            "final_fraction=0.1",
        )
    )
)
LAYERS = "--set model.num_hidden_layers=3"
GEMMA = f"--model gemma3-tiny {LAYERS} --set model.sliding_window=16 {SMALL}"
QWEN = f"--model qwen3-tiny {LAYERS} {SMALL}"
EXPERTS = f"--model qwen3-30b-a3b {LAYERS} {SMALL} " + " ".join(
    f"--set model.{name}"
    for name in (
        "hidden_size=64",
        "num_attention_heads=4",
        "num_key_value_heads=2",
        "head_dim=16",
        "num_experts=4",
        "num_experts_per_tok=2",
        "moe_intermediate_size=48",
        "router_aux_loss_coef=0.01",
    )
)
RUNS: dict[str, list[str]] = {  # the commands of each run, in order; all write to one folder
    "gemma3": [GEMMA],
    "qwen3": [QWEN],
    "float32": [f"{GEMMA} --dtype float32 --attn eager"],
    "sdpa": [f"{GEMMA} --attn sdpa --set speed.chunked_loss=false"],
    "mixture-of-experts": [EXPERTS],
    "muon": [
        f"{GEMMA} --optimizer muon --schedule wsd --dtype bfloat16 "
        "--set optimizer.decay_fraction=0.2 --set optimizer.momentum=0.95"
    ],
    "document-mask": [f"{GEMMA} --document-mask --set optimizer.z_loss=1e-4"],
    "packing": [f"{QWEN} --packing best-fit"],
    "resumed": [f"{GEMMA} --schedule linear --steps 3", "--resume {out} --steps 6"],
    "two-ranks": [f"{GEMMA} --set train.parallel=ddp"],
    "two-ranks-fsdp": [f"{QWEN} --set train.parallel=fsdp"],
}
LOGGED = ("loss", "gradient_norm", "learning_rate", "tokens", "bits_per_byte", "router_loss")
CORPUS = """
{subject} {verb} the {noun} because the {noun} of {subject} is {number}.
Then {subject} said: "{verb}!"
def {noun}_{number}({subject}): return {subject}.{verb}({number}) + {number}
"""


def main() -> int:
    """Run both sides, print a line a run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--only", choices=RUNS, help="compare this run alone")
    parser.add_argument(
        "--here",
        action="append",
        default=[],
        metavar="[RUN:]ARGUMENTS",
        help="arguments of `train` in this checkout alone, where COMMIT lacks a setting",
    )
    parser.add_argument("--keep", type=Path, help="keep the runs of this checkout in this folder")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(RUNS)
    commit = git("rev-parse", f"{arguments.against}^{{commit}}")
    expected = recorded(commit, names)
    with tempfile.TemporaryDirectory() as scratch:
        actual = record(ROOT, arguments.keep or Path(scratch), names, arguments.here)
    differing = 0
    for name in ["dataset", *names]:
        difference = first_difference(expected[name], actual[name])
        print(f"{name}: {difference or 'equal'}")
        differing += difference is not None
    return 1 if differing else 0


def recorded(commit: str, names: list[str]) -> dict[str, Any]:
    """Return the results of a commit, from the cache or by running it in a clone."""
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    script = hashlib.sha256(repr((RUNS, LOGGED, CORPUS)).encode()).hexdigest()[:8]
    key = "-".join((commit[:12], torch, platform.node(), script))
    cache = Path(git("rev-parse", "--absolute-git-dir")) / "golden-losses" / f"{key}.json"
    known = json.loads(cache.read_text()) if cache.is_file() else {}
    missing = [name for name in names if name not in known]
    if missing:
        with tempfile.TemporaryDirectory() as scratch:
            clone = Path(scratch) / "clone"
            git("clone", "--quiet", str(ROOT), str(clone))
            subprocess.run(["git", "checkout", "--quiet", commit], cwd=clone, check=True)
            known |= record(clone, Path(scratch) / "runs", missing)
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps(known))
    return known


def record(
    checkout: Path, folder: Path, names: list[str], more: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the named runs of a checkout in a folder, with more arguments. Returns {"dataset": ...,
    name: results}."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(40):
        words = {
            "subject": ("Ada", "Bo", "the committee", "nobody")[number % 4],
            "verb": ("reads", "folds", "counts", "questions", "paints")[number % 5],
            "noun": ("ledger", "river", "tensor", "window", "garden", "proof")[number % 6],
            "number": number * 37 % 101,
        }
        (corpus / f"{number:02}.txt").write_text(CORPUS.format(**words) * (1 + number % 7))
    pretrain(checkout, folder, f"tokenize --tokenizer bpe --vocab-size 320 {corpus} --out data")
    results = {"dataset": {p.name: digest(p) for p in sorted((folder / "data").glob("*.bin"))}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {name: pool.submit(run, checkout, folder, name, more) for name in names}
    return results | {name: future.result() for name, future in runs.items()}


def run(checkout: Path, folder: Path, name: str, more: Sequence[str]) -> dict[str, Any]:
    """Train one run. Returns its logged numbers, texts and the digests of its last checkpoint."""
    out = folder / name
    own = " ".join(
        text.rpartition(":")[2] for text in more if text.rpartition(":")[0] in ("", name)
    )
    for command in RUNS[name]:
        resumed = "--resume" in command
        start = "train " if resumed else f"train --data data --device cpu --out {out} {own} "
        ranks = 2 if name.startswith("two-ranks") else 1
        pretrain(checkout, folder, start + command.format(out=out), ranks)
    logged = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] in ("step", "evaluation"):
            numbers = {key: event[key] for key in LOGGED if key in event}
            logged.append({"kind": event["kind"], "step": event["step"]} | numbers)
    steps = [event["step"] for event in logged if event["kind"] == "step"]
    assert steps == list(range(1, 7)), f"{name}: steps logged: {steps}"
    written = out / "samples.jsonl"  # sharded runs write none
    samples = written.read_text().splitlines() if written.is_file() else []
    newest = max(out.glob("checkpoints/step-*"))
    tensors = [newest / "model.safetensors", newest / "training" / "optimizer.safetensors"]
    return {
        "metrics": logged,
        "samples": [json.loads(line)["text"] for line in samples],
        "checkpoint": {
            key: value for path in tensors for key, value in tensor_digests(path).items()
        },
    }


def pretrain(checkout: Path, folder: Path, arguments: str, ranks: int = 1) -> None:
    """Run one command of a checkout on one thread a rank; exit with its output if it fails."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "pretrain_cli"]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, *arguments.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} {arguments}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def tensor_digests(path: Path) -> dict[str, str]:
    """Return "file: tensor" -> digest of dtype, shape and bytes for a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    digests = {}
    for name, tensor in sorted(header.items()):
        first, last = (start + offset for offset in tensor["data_offsets"])
        body = f"{tensor['dtype']}{tensor['shape']}".encode() + data[first:last]
        digests[f"{path.name}: {name}"] = hashlib.sha256(body).hexdigest()[:16]
    return digests


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def first_difference(expected: Any, actual: Any, where: str = "") -> str | None:
    """Name the first place where two trees of results differ; None if they are equal."""
    if isinstance(expected, list):
        expected = dict(enumerate(expected))
        actual = dict(enumerate(actual))
    if not isinstance(expected, dict):
        return None if expected == actual else f"{where}: {actual!r} instead of {expected!r}"
    for key in expected | actual:
        place = f"{where} > {key}" if where else str(key)
        if key not in expected or key not in actual:
            return f"{place}: only {'here' if key in actual else 'in the other commit'}"
        if difference := first_difference(expected[key], actual[key], place):
            return difference
    return None


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return re.sub(r"\s+$", "", done.stdout)


if __name__ == "__main__":
    sys.exit(main())
