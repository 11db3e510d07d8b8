"""Small local lm-eval tasks, and copies of a checkpoint with changed weights."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

CHECKPOINT = Path("runs/tiny/checkpoints/step-000060")
QUESTIONS: list[dict[str, Any]] = [
    {"question": "12 green bottles hanging on the", "choices": ["wall", "tree"], "answer": 0},
    {"question": "And if one green bottle", "choices": ["x", "should accidentally"], "answer": 1},
    {"question": "There'll be 3 green", "choices": ["cats", "bottles hanging"], "answer": 1},
    {"question": "5 green bottles", "choices": ["zzzz qqqq", "hanging"], "answer": 0},
]  # fmt: skip


def write_tasks(folder: Path) -> Path:
    """Write three tasks to `folder`: multiple choice, likelihood of texts, generated answers."""
    folder.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (folder / "questions.jsonl").write_text(rows)
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}\n"
        "test_split: test\n"
    )
    (folder / "bottles.yaml").write_text(
        f"task: bottles\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "song.yaml").write_text(
        f"task: song\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    (folder / "written.yaml").write_text(
        f"task: written\n{common}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: ' wall'\n"
        "generation_kwargs: {until: [','], max_gen_toks: 8, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def cache_datasets_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Keep the datasets library's cache in `folder`."""
    datasets = importlib.import_module("datasets")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def copy_with_weights(change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """Copy the checkpoint's model to `other/` with changed tensors; None leaves a tensor out."""
    folder = Path("other")
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("training"))
    path = folder / "model.safetensors"
    changed = {name: change(name, value) for name, value in load_file(path).items()}
    kept = {name: value for name, value in changed.items() if value is not None}
    save_file(kept, path, metadata={"format": "pt"})
    return folder
