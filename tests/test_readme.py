"""The README says what is so: its commands are understood, its tables are the program's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from pretrain_cli.cli import app
from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.config.yaml_files import find_model, read_config
from pretrain_cli.model.presets import PUBLISHED, SMALL, full_name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line[line.index("pretrain") :]
    for block in BLOCKS
    for part in block.splitlines()
    for line in part.split(" && ")
    if re.match(r"(pretrain |torchrun .*pretrain_cli )", line)
]


def given(line):
    """What a command line's options and arguments come to, by name. Raises for unknown ones."""
    name, *arguments = shlex.split(line)[1:]
    command = typer.main.get_command(app).commands[name]
    if arguments and arguments[0] in getattr(command, "commands", {}):
        name = arguments.pop(0)
        command = command.commands[name]
    return command.make_context(name, arguments).params


@pytest.mark.parametrize("line", COMMANDS)
def test_every_option_of_a_readme_command_is_known(line):
    given(line)


WRITTEN = ("as_json", "markdown", "plot", "png", "profile", "out")


def leavings():
    """Files and folders that the README's commands make in the current folder."""
    yield from ("data/corpus", "runs/x", "runs/micro-batches.json", "lr-find.json", "lr-find.png")
    for line in COMMANDS:
        for name, value in given(line).items():
            if name in WRITTEN and isinstance(value, Path):
                yield str(value)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_what_the_readmes_commands_leave_is_ignored_by_git():
    left = sorted(set(leavings()))
    assert {"published", "ablation.md", "curves.png", "profile", "model.gguf"} <= set(left)
    asked = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    # a folder's pattern is one of what is in it
    paths = "\n".join(path if Path(path).suffix else f"{path}/x" for path in left)
    done = subprocess.run(asked, input=paths, capture_output=True, text=True)
    assert done.stdout.splitlines() == paths.splitlines()


def test_the_readme_has_the_four_commands_as_they_were_asked_for():
    for line in (
        "pretrain tokenize --tokenizer gemma3 corpus/",
        "pretrain train --model gemma3 --seq-len 512",
        "pretrain benchmark --attn flex",
        "pretrain count-params --tied",
    ):
        assert line in COMMANDS


def test_the_table_of_speed_settings_has_every_setting_once():
    table = README.split("## Speed settings")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.M) == list(SpeedConfig.model_fields)


def test_every_published_size_is_named():
    paragraph = README.split("`--model` takes")[1].split("or a YAML file")[0]
    sizes, family = [], ""
    for name in re.findall(r"`([\w.-]+)`", paragraph):
        family = family if name.startswith("-") else name.split("-")[0]
        sizes.append(family + name if name.startswith("-") else name)
    assert set(sizes) == set(PUBLISHED) | set(SMALL) | {"gemma3", "qwen3"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_named_and_valid(path):
    assert f"`{path.stem}`" in README
    config = build_config(read_config(path.stem), {}, [])
    assert find_model(config.model)[0] == full_name(config.model.name)


@pytest.mark.slow
def test_the_commands_that_were_asked_for_run_as_written(tmp_path):
    """The whole line, the 270M on a CPU among it: some minutes."""
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
    for line, said in (
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
        assert said in done.stdout
