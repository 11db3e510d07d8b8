"""The tests mirror the package, and the package has the structure drawn in ARCHITECTURE.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pretrain_cli"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
FOLDERS = sorted({path.parent for path in MODULES})
SHORT = 60
"""Maximum number of lines of a module that needs no test file of its own."""
TESTED_ELSEWHERE = {
    "engine/training/checkpointer.py": "engine/training/test_async_save.py and test_rollback.py",
    "commands/benchmark/show.py": "its tables are asserted in commands/benchmark/test_command.py",
    "commands/display.py": "its lines are asserted in commands/test_train.py and others",
    "commands/instead_of_training.py": "its commands: test_train.py, test_lr_find.py and others",
    "data/corpus/documents.py": "data/corpus/test_readers.py; every reader's texts pass it",
    "data/tokenizing/pipeline.py": "data/tokenizing/test_tokenize.py and test_resume.py",
    "data/tokenizing/progress.py": "types without behaviour; test_resume.py saves and reads them",
    "data/tokenizing/request.py": "its options are asserted in data/tokenizing/test_tokenize.py",
    "data/tokenizing/shard_writer.py": "one half of the writer: data/tokenizing/test_writer.py",
    "engine/benchmark/data.py": "commands/benchmark/test_data.py",
    "engine/benchmark/sample_arm.py": "the process behind engine/benchmark/test_sample.py",
    "engine/benchmark/timing.py": "the process behind engine/benchmark/test_rounds.py",
    "engine/benchmark/workload.py": "its fresh processes are started in commands/benchmark",
    "engine/planning/data_and_model.py": "commands/test_train.py, engine/training/test_resume.py",
    "engine/planning/plan.py": "commands/test_train.py; its parts in test_choices.py",
    "engine/report/writing.py": "commands/test_report.py",
    "engine/runs/events.py": "types without behaviour; test_metrics_file and test_trackers use all",
    "engine/sampling/open_model.py": "engine/runs/test_checkpoint.py and commands/test_sample.py",
    "model/gemma3.py": "every number against the published ones: model/test_presets.py",
    "model/qwen3.py": "every number against the published ones: model/test_presets.py",
}


def name(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_every_module_has_a_test_file_of_its_name(module):
    """Modules of up to 60 lines may be tested through the modules that use them."""
    test = ROOT / "tests" / module.relative_to(PACKAGE).parent / f"test_{module.name}"
    if name(module) in TESTED_ELSEWHERE:
        assert not test.exists(), "it has a test file now; take it off the list"
        return
    lines = len(module.read_text().splitlines())
    assert test.exists() or lines <= SHORT, f"{lines} lines and no {test.relative_to(ROOT)}"


def test_modules_tested_elsewhere_exist():
    assert set(TESTED_ELSEWHERE) <= {name(module) for module in MODULES}


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_has_at_most_16_modules_and_a_docstring(folder):
    assert len(list(folder.glob("*.py"))) <= 17  # __init__.py among them
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert doc
    assert 1 <= len(doc.splitlines()) <= 5


def test_engine_contains_only_packages():
    assert [path.name for path in (PACKAGE / "engine").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("path", [*MODULES, *sorted(ROOT.glob("tests/**/*.py"))], ids=str)
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    """Rule of STYLE.md: a docstring never begins with Of, What, Whether, Those, That, Which, Where
    or How."""
    wrong = ("Of ", "What ", "Whether ", "Those ", "That ", "Which ", "Where ", "How ")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            assert not (isinstance(text, str) and text.startswith(wrong)), (node.lineno, text)


def test_names_of_tests_have_at_most_65_characters():
    long = [
        f"{path.name}: {node.name}"
        for path in ROOT.glob("tests/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        if node.name.startswith("test_") and len(node.name) > 65
    ]
    assert not long
