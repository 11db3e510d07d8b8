"""README and guide match the program: commands parse, names and tables are complete, links work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from pretrain_cli.cli import PANELS, app
from pretrain_cli.commands.guide import PAGES, topics
from pretrain_cli.config.build import build_config
from pretrain_cli.config.reference import settings_tables
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.config.yaml_files import find_model, read_config
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.presets import PUBLISHED, SMALL, full_name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = {topic: path.read_text() for topic, path in topics().items()}
TEXTS = {"README": README, **GUIDE}


def commands_in(text):
    """Return the `pretrain` and torchrun commands of a page's shell blocks."""
    lines = [
        part
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S)
        for line in block.splitlines()
        for part in line.split(" && ")
        if re.match(r"(pretrain |torchrun .*pretrain_cli )", part)
    ]
    return [line[line.index("pretrain") :] for line in lines]


COMMANDS = {f"{name}: {line}": line for name, text in TEXTS.items() for line in commands_in(text)}


def parse(line):
    """Return a command line's options and arguments by name. Raises for unknown ones."""
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    if arguments and arguments[0] in getattr(command, "commands", {}):
        name = arguments.pop(0)
        command = command.commands[name]
    return command.make_context(name, arguments).params


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_every_option_of_a_documented_command_exists(line):
    parse(line)


FAST = (
    "pretrain count-params --tied",
    "pretrain count-params --model qwen3-30b-a3b --seq-len 4096 --json",
    "pretrain count-params --plan --tokens 5B --device h200 --gpus 8",
    "pretrain guide",
    "pretrain guide training",
)


@pytest.mark.parametrize("line", FAST)
def test_fast_documented_commands_run(pretrain, line):
    assert line in COMMANDS.values()
    outcome = pretrain(line.removeprefix("pretrain "))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out


def test_the_documents_contain_the_four_fixed_commands_verbatim():
    for line in (
        "pretrain tokenize --tokenizer gemma3 corpus/",
        "pretrain train --model gemma3 --seq-len 512",
        "pretrain benchmark --attn flex",
        "pretrain count-params --tied",
    ):
        assert line in COMMANDS.values()


def test_the_readme_has_at_most_1500_words():
    assert len(README.split()) <= 1500


def test_every_page_of_the_guide_is_in_its_index():
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(GUIDE)


@pytest.mark.parametrize("name", TEXTS)
def test_links_point_to_existing_files_or_https_addresses(name):
    folder = ROOT if name == "README" else PAGES
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", TEXTS[name]):
        path = "".join(target)
        assert path.startswith("https://") or (folder / path).exists(), path


def test_pages_named_in_help_and_text_exist():
    pages = {page for panel in PANELS.values() for _, page in panel.values() if page}
    for text in TEXTS.values():
        pages |= set(re.findall(r"`pretrain guide\s+([a-z][\w-]*)`", text))
    assert pages <= set(GUIDE)


def test_the_configuration_page_has_the_current_settings():
    """`python -m pretrain_cli.config.reference` updates the tables."""
    assert settings_tables() in GUIDE["configuration"]


def test_speed_settings_and_backends_named_in_the_guide_exist():
    rows = re.findall(r"^\| `(\w+)` \|", GUIDE["speed"], flags=re.M)
    assert set(rows) <= set(SpeedConfig.model_fields) | set(BACKENDS)
    assert set(BACKENDS) <= set(rows)


def test_every_model_size_is_named_in_the_guide():
    named = set(re.findall(r"`((?:gemma3|qwen3)[\w.-]*)`", GUIDE["models"]))
    assert set(PUBLISHED) | set(SMALL) | {"gemma3", "qwen3"} <= named


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_named_and_valid(path):
    assert f"`{path.stem}`" in GUIDE["training"]
    config = build_config(read_config(path.stem), {}, [])
    assert find_model(config.model)[0] == full_name(config.model.name)


WRITTEN = ("as_json", "markdown", "plot", "png", "profile", "out")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_git_ignores_the_files_that_documented_commands_write():
    written = {"data/corpus", "runs/x", "runs/micro-batches.json", "lr-find.json", "lr-find.png"}
    for line in COMMANDS.values():
        for name, value in parse(line).items():
            if name in WRITTEN and isinstance(value, Path):
                written.add(str(value))
    assert {"published", "ablation.md", "curves.png", "profile", "model.gguf"} <= written
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    # a folder's pattern matches the files in it
    paths = "\n".join(path if Path(path).suffix else f"{path}/x" for path in sorted(written))
    done = subprocess.run(command, input=paths, capture_output=True, text=True)
    assert done.stdout.splitlines() == paths.splitlines()


@pytest.mark.slow
def test_the_four_fixed_commands_run_as_written(tmp_path):
    """Takes some minutes: one command trains the 270M model on a CPU."""
    tokenizers = os.environ.get("PRETRAIN_TOKENIZERS", "")
    if not Path(tokenizers, "gemma3/tokenizer.json").is_file():
        pytest.skip("the gemma3 tokenizer is not in $PRETRAIN_TOKENIZERS")
    (tmp_path / "corpus").mkdir()
    text = (Path(os.__file__).parent / "argparse.py").read_text()
    for number in range(8):
        (tmp_path / f"corpus/{number}.py").write_text(f"# {number}\n{text}")
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "2",
    }
    for line, output in (
        ("pretrain tokenize --tokenizer gemma3 corpus/", "data/corpus: "),
        ("pretrain train --model gemma3 --seq-len 512", "Done: 20 steps."),
        ("pretrain benchmark --attn flex", "forward only"),
        ("pretrain count-params --tied", "268,098,176"),
        ("pretrain sample", ""),
    ):
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert output in done.stdout
