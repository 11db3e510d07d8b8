"""`pretrain benchmark`: timings of real training steps, and reasons for arms that are not run."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import rounds, timing
from pretrain_cli.engine.planning import micro_batch
from pretrain_cli.engine.runtime.process_settings import KINETO_LEVEL
from pretrain_cli.engine.runtime.stop import Interruption

MODEL = (
    "--model gemma3-tiny --set model.layer_types=[sliding_attention,full_attention] "
    "--set model.hidden_size=32 --set model.intermediate_size=48 --set model.head_dim=16 "
    "--set model.query_pre_attn_scalar=16 --set model.sliding_window=8 --set model.vocab_size=512"
)


TINY = f"{MODEL} --seq-len 32 --micro-batch-size 2 --steps 3 --warmup 1 --device cpu"


@pytest.fixture
def here(monkeypatch):
    """Run arms in this process, and limit the measurement of peak FLOP/s to 0.01 s."""
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)

    def start(name, speed, folder, *arguments):
        return getattr(timing, name)(*arguments)

    monkeypatch.setattr(rounds, "run_timing", start)


@pytest.mark.slow
def test_a_backend_that_cannot_train_here_is_timed_forward_only(pretrain, monkeypatch):
    """Run the arms in fresh processes, as the command does."""
    monkeypatch.setattr("sys.argv", ["/bin/pretrain", "benchmark", "--attn", "flex,sdpa"])
    outcome = pretrain(f"benchmark --attn flex,sdpa {TINY} --json results.json")
    assert outcome.code == 0, outcome.err
    flex = "flex: PyTorch's flex_attention has no backward pass on a CPU; its forward pass alone"
    assert flex in outcome.out
    for heading in ("step", "tokens/s", "MFU", "memory", "start"):
        assert heading in outcome.out
    assert "flex (forward only)" in outcome.out

    written = json.loads(Path("results.json").read_text())
    assert written["command"] == "pretrain benchmark --attn flex,sdpa"
    assert written["machine"]
    (peak,) = written["peaks"].values()
    assert peak["source"].startswith("measured")
    flex, sdpa = written["results"]
    assert (flex["arm"], flex["kind"]) == ("flex", "forward only")
    assert "no backward pass" in flex["reason"]
    assert (sdpa["arm"], sdpa["kind"], sdpa["reason"]) == ("sdpa", "training step", "")
    for result in (flex, sdpa):
        figures = result["figures"]
        assert result["workload"]["seq_len"] == 32
        assert 0 < figures["step_fastest"] <= figures["step_median"] <= figures["step_slowest"]
        assert figures["tokens_per_second"] == pytest.approx(64 / figures["step_median"])
        assert figures["warmup"] > 0
        assert 0 < figures["mfu"] <= figures["mfu_conventional"]
        share = result["flops_per_token"] * figures["tokens_per_second"] / result["peak_flops"]
        assert figures["mfu"] == pytest.approx(share)
        assert figures["peak_memory"] > 10_000_000
        assert 4 < figures["loss"] < 9  # random tokens, vocabulary 512: ln 512 = 6.2
        assert result["speed"]["attention"]["in_force"] == result["arm"]
        assert len(result["rounds"][0]["times"]) == 3


@pytest.mark.slow
def test_process_settings_do_not_carry_over_to_the_next_benchmark(pretrain):
    """Compare two benchmarks: the second must not run with the process settings of the first."""
    line = f"benchmark --sweep micro-batch=1,2 {TINY} --dtype float32 --json %s.json"
    on = "--set speed.keep_freed_memory=true --set speed.deterministic=true"
    for name, options in (("on", on), ("off", "")):
        outcome = pretrain(f"{line % name} {options}")
        assert outcome.code == 0, outcome.err
    outcome = pretrain("benchmark --compare on.json off.json")
    assert outcome.code == 0, outcome.err
    assert "speed.deterministic: True → False" in outcome.out
    assert "micro-batch 1" in outcome.out
    assert outcome.out.count("×") >= 4


@pytest.mark.usefixtures("here")
def test_an_ablation_lists_all_arms_and_why_some_are_not_run(pretrain, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("shutil.which", lambda name: None)  # no compiler: compiling would be slow
    line = f"benchmark --ablate {TINY} --rounds 1"
    outcome = pretrain(f"{line} --json a.json --markdown a.md --plot a.svg")
    assert outcome.code == 0, outcome.err
    written = json.loads(Path("a.json").read_text())
    kinds = {result["arm"]: result["kind"] for result in written["results"]}
    assert kinds["baseline"] == kinds["all on"] == kinds["+ merged_qkv"] == "training step"
    assert kinds["+ cudnn_benchmark"] == kinds["+ attention flex"] == "not run"
    assert kinds["+ compile"] == "not run"
    assert "compile is False: no C++ compiler is installed (g++ or clang++)" in outcome.out
    assert "+ cudnn_benchmark: not run: it tunes convolutions, and these models have none" in (
        outcome.out
    )
    assert not [result["differs"] for result in written["results"] if result["differs"]]
    markdown = Path("a.md").read_text()
    assert "| *all on but* |" in markdown
    assert "| + merged_qkv |" in markdown
    assert Path("a.svg").stat().st_size > 10_000


@pytest.mark.usefixtures("here")
def test_an_ablation_does_not_vary_settings_given_by_hand(pretrain, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # a compiler seems installed
    line = f"benchmark --ablate {TINY} --rounds 1 --dtype float32 --no-compile"
    off = " ".join(
        f"--set speed.{name}=false" for name in SpeedConfig.model_fields
        if name not in ("attention", "flash_attention", "dtype", "float32_matmul", "compile",
                        "merged_qkv", "prefetch")
    )  # fmt: skip
    given = "--attn sdpa --set speed.flash_attention=fa2 --set speed.float32_matmul=auto"
    outcome = pretrain(f"{line} {given} {off} --json a.json")
    assert outcome.code == 0, outcome.err
    expected = "In every arm, as given: attention sdpa, flash_attention fa2, dtype float32, onedn"
    assert expected in outcome.out
    written = json.loads(Path("a.json").read_text())
    assert [result["arm"] for result in written["results"]] == [
        "baseline", "+ float32_matmul high", "+ float32_matmul medium", "+ merged_qkv",
        "+ prefetch", "all on", "− merged_qkv", "− prefetch",
    ]  # fmt: skip


@pytest.mark.usefixtures("here")
def test_a_comparison_with_transformers_prints_ratios(pretrain):
    pytest.importorskip("transformers")
    outcome = pretrain(f"benchmark --vs transformers --no-compile {TINY} --rounds 2 --json v.json")
    assert outcome.code == 0, outcome.err
    assert "pretrain / transformers: " in outcome.out
    assert "pretrain / transformers, tuned: " in outcome.out
    written = json.loads(Path("v.json").read_text())
    assert [ratio["arm"] for ratio in written["ratios"]] == [
        "transformers", "transformers, tuned",
    ]  # fmt: skip
    _, *theirs = written["results"]
    for result in theirs:
        assert result["figures"]["loss_difference"] < 1e-2
        assert not result["differs"]


@pytest.mark.usefixtures("here")
def test_a_profile_is_shown_and_its_trace_written(pretrain, monkeypatch):
    monkeypatch.setenv(KINETO_LEVEL, "")  # so that monkeypatch restores it
    monkeypatch.delenv(KINETO_LEVEL)
    outcome = pretrain(f"benchmark --attn sdpa {TINY} --profile looked")
    assert outcome.code == 0, outcome.err
    assert KINETO_LEVEL in os.environ
    for name in ("forward", "loss", "backward", "optimizer", "aten::"):
        assert name in outcome.out
    assert Path("looked/sdpa.json").stat().st_size > 1000


# --- signals -------------------------------------------------------------------------------------


@pytest.fixture
def stopped_at(monkeypatch):
    """Return a function that makes the timing `what` of an arm send a signal to this process, in
    which all arms run."""
    monkeypatch.setattr(timing, "PEAK_SECONDS", 0.01)

    def prepare(number, what, arm):
        def start(name, speed, folder, *arguments):
            if name == what and arguments[0].name == arm:
                os.kill(os.getpid(), number)
                time.sleep(5)
                raise AssertionError("went on")
            return getattr(timing, name)(*arguments)

        monkeypatch.setattr(rounds, "run_timing", start)

    return prepare


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_results_before_a_signal_are_printed_and_written(pretrain, stopped_at, number):
    pytest.importorskip("matplotlib")
    stopped_at(number, "measure_round", "seq-len 20")
    before = signal.getsignal(number)  # shells ignore SIGINT in the background
    line = TINY.replace("--seq-len 32", "--sweep seq-len=10,20,30")
    outcome = pretrain(f"benchmark {line} --json c.json --markdown c.md --plot c.svg")
    assert outcome.code == 128 + number
    assert f"{number.name}: ended early; these are the results so far" in outcome.out
    assert f"seq-len 20, seq-len 30: not run: {number.name} came first" in outcome.out
    written = json.loads(Path("c.json").read_text())
    assert written["cut_short"] == number.name
    first, *others = written["results"]
    assert first["figures"]["tokens_per_second"] > 0
    assert [other["figures"] for other in others] == [None, None]
    assert f"Cut short by {number.name}." in Path("c.md").read_text()
    assert f"cut short by {number.name}" in Path("c.svg").read_text()
    assert signal.getsignal(number) == before


def test_an_interrupted_profile_keeps_the_results_file(pretrain, stopped_at):
    stopped_at(signal.SIGTERM, "profile_arm", "sdpa")
    outcome = pretrain(f"benchmark --attn sdpa {TINY} --profile looked --json c.json")
    assert outcome.code == 128 + signal.SIGTERM
    assert json.loads(Path("c.json").read_text())["results"][0]["figures"]


def test_an_interrupted_search_stores_no_micro_batch(pretrain, stopped_at, monkeypatch):
    monkeypatch.setattr(micro_batch, "memory_here", lambda device: 20 * 10**9)
    stopped_at(signal.SIGTERM, "measure_round", "micro-batch 2")
    line = f"benchmark --find-micro-batch {MODEL} --seq-len 32 --device cpu --json c.json"
    assert pretrain(line).code == 128 + signal.SIGTERM
    assert json.loads(Path("c.json").read_text())["micro_batch"] is None
    assert not Path("runs").exists()


def test_a_second_signal_exits_but_an_immediate_duplicate_does_not(monkeypatch):
    left = []
    monkeypatch.setattr("os._exit", left.append)
    with Interruption() as interruption:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (left, interruption.exit_code) == ([], 128 + signal.SIGTERM)
        soon(lambda: interruption.came)  # taken by a thread that no running kernel delays
        interruption.came -= 2
        os.kill(os.getpid(), signal.SIGINT)
        soon(lambda: left)
    assert left == [128 + signal.SIGINT]


def soon(condition):
    """Wait up to two seconds for the condition."""
    for _ in range(100):
        if condition():
            return
        time.sleep(0.02)


def running(processes):
    """Return the processes that have not ended, reaping those that have."""
    found = []
    for process in processes:
        with contextlib.suppress(FileNotFoundError):
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            found += [process] if state != "Z" else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are told by /proc")
def test_an_interrupted_benchmark_leaves_no_process_behind(tmp_path):
    line = f"{TINY} --attn sdpa --json c.json".replace("--steps 3", "--steps 1000000")
    program = subprocess.Popen(
        [sys.executable, "-m", "pretrain_cli", "benchmark", *shlex.split(line)],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    for said in program.stderr:
        if "round 1 of 1: sdpa" in said:
            break
    time.sleep(1)
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    assert children
    program.send_signal(signal.SIGTERM)
    try:
        assert program.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        program.kill()
        program.stderr.close()
    assert json.loads((tmp_path / "c.json").read_text())["cut_short"] == "SIGTERM"
    until = time.monotonic() + 10
    while running(children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(children)


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_a_failed_arm_gives_exit_code_1(pretrain, monkeypatch):
    def broken(arm, repeats):
        raise MemoryError("no room")

    monkeypatch.setattr(timing, "measure_round", broken)
    outcome = pretrain(f"benchmark --attn sdpa {TINY}")
    assert outcome.code == 1
    assert "sdpa: not run: MemoryError: no room" in outcome.out
    assert "Traceback" in outcome.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--attn fleks",
            "--attn: 'fleks' is not one of eager, sdpa, blocks, flex, varlen, all; did you mean "
            "flex",
        ),
        ("--attn sdpa,", "--attn: '' is not one of eager, sdpa, blocks, flex, varlen, all"),
        ("--model gema3", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("--device cuda:99", "train.device: 'cuda:99' is not there"),
        ("--device gpu", "train.device: 'gpu' is not a device; give cpu, cuda, cuda:N or mps"),
        ("--dtype float8", "speed.dtype: 'float8' can't be used: it is for NVIDIA's GPUs, from"),
        ("--ablate --dtype float8", "speed.dtype: 'float8' can't be used: it is for NVIDIA's"),
        ("--steps 0", "--steps: 0 is not at least 1"),
        ("--warmup 0", "--warmup: 0 is not at least 1"),
        ("--rounds 0", "--rounds: 0 is not at least 1"),
        ("--seq-len 5000", "seq-len: 5,000 is beyond the 2,048 positions of gemma3-tiny"),
        ("--seq-len 0", "data.seq_len: 0 is not greater than 0"),
        ("--micro-batch-size 0", "train.micro_batch_size: 0 is not greater than 0"),
        ("--set speed.atention=sdpa", "speed.atention: no such setting; did you mean speed.attent"),
        ("--set train.steps=3", "--set train.steps=3: not a setting of a benchmark; it takes sp"),
        ("--set model.name=qwen3", "--set model.name=qwen3: not a setting of a benchmark"),
        ("--json nowhere/results.json", "--json: no folder nowhere to write results.json in"),
        ("--json .", "--json: . is a folder; give a file"),
        ("--markdown nowhere/r.md", "--markdown: no folder nowhere to write r.md in"),
        ("--plot results.jpg", "--plot: results.jpg is neither .png nor .svg; name one of them"),
        ("--ablate --vs transformers", "--ablate and --vs: one at a time"),
        ("--ablate --attn all", "--attn: all with --ablate is one backend; name it"),
        ("--ablate --profile p", "--profile: looks into single steps; leave --ablate out"),
        ("--sweep windw=3", "--sweep: 'windw' is not one of seq-len, window, vocab, micro-batch"),
        ("--vs llama.cpp", "--vs: 'llama.cpp' is not one of transformers"),
        ("--find-micro-batch --ablate", "--ablate and --find-micro-batch: one at a time"),
        (
            "--find-micro-batch --micro-batch-size 2",
            "--micro-batch-size: 2 is what --find-micro-batch looks for; leave it out",
        ),
        ("--find-micro-batch --profile p", "--profile: looks into single steps; leave --find-mi"),
        ("--compare a.json b.json", "--model: --compare measures nothing; leave it out"),
        (
            "data --size 1",
            "--model: an option of pretrain benchmark alone; give what belongs to dat",
        ),
    ],
)
def test_invalid_benchmark_options_are_refused(refused, options, said):
    model = "" if "--model" in options else "--model gemma3-tiny"
    assert refused(f"benchmark {model} {options}").startswith(said)


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
def test_a_profile_path_through_a_file_is_refused(refused, tmp_path, folder):
    (tmp_path / "taken").touch()
    said = refused(f"benchmark --model gemma3-tiny --profile {folder}")
    assert said == "--profile: taken is a file; give a folder"


def test_compare_refuses_files_that_are_not_results(refused, tmp_path):
    assert refused("benchmark --compare a.json b.json").startswith("a.json: can't be read (No such")
    (tmp_path / "a.json").write_text("{}")
    said = "a.json: not a file that pretrain benchmark --json wrote"
    assert refused("benchmark --compare a.json a.json") == said
