"""`.tools/gpu_check`: its slots keep their time, and a cut loses nothing that was written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOTS = """
import json
import os
import subprocess
import time
from pathlib import Path


def quick(check):
    check.write("arm", ok=True, left_s=check.left_s())


def broken(check):
    raise ValueError("no such thing")


def crashing(check):
    check.write("before", ok=True)
    os.kill(os.getpid(), 11)


def endless(check):
    child = subprocess.Popen(["sleep", "60"])
    check.write("child", pid=child.pid)
    time.sleep(60)


def beside(check):
    # does the child of an earlier slot still run?
    rows = [json.loads(line) for line in (check.out / "results.jsonl").read_text().splitlines()]
    pid = next(row["pid"] for row in rows if row["arm"] == "child")
    stat = Path(f"/proc/{pid}/stat")
    runs = stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    check.write("beside", runs=runs)


def with_arms(check):
    with check.arm("wrong"):
        raise RuntimeError("out of luck")
    with check.arm("right") as figures:
        figures["time_ms"] = 1.5
    with check.arm("silent"):
        pass
    if check.fits("long", 1000.0):
        raise AssertionError
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check of 30 seconds whose slots are the functions above."""
    monkeypatch.syspath_prepend(str(ROOT / ".tools"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fake_slots.py").write_text(SLOTS)
    from gpu.check import Check

    out = tmp_path / "out"
    out.mkdir()
    return Check(
        slot="",
        out=out,
        scratch=tmp_path,
        device="cpu",
        rehearse=True,
        until=time.monotonic() + 30,
    )


def run_slots(check, *names, limit_s=20.0, least_s=0.0):
    """Run slots; return their outcomes and the rows of the results."""
    from gpu.check import RESULTS, read
    from gpu.runner import Runner, Slot

    runner = Runner(check, say=lambda text: None)
    runner.run(
        [
            Slot(name=name, function=f"fake_slots:{name}", limit_s=limit_s, least_s=least_s)
            for name in names
        ]
    )
    return runner.outcomes, read(check.out / RESULTS)


def has_ended(pid):
    """Return whether a process ends within seconds; one that nobody waits for stays a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_slot_that_fails_or_crashes_does_not_stop_the_next(check):
    outcomes, rows = run_slots(check, "broken", "crashing", "quick")
    assert [outcome.state for outcome in outcomes] == ["failed", "failed", "done"]
    found = {(row["slot"], row["arm"]): row for row in rows if "state" not in row}
    assert found["broken", ""]["error"] == "ValueError: no such thing"
    assert found["crashing", "before"]["ok"]
    assert found["quick", "arm"]["ok"]
    assert "ValueError: no such thing" in (check.out / "log.txt").read_text()


def test_a_slot_over_its_limit_is_killed_with_its_children(check):
    began = time.monotonic()
    outcomes, rows = run_slots(check, "endless", "quick", limit_s=2.0)
    assert [outcome.state for outcome in outcomes] == ["over its limit", "done"]
    assert time.monotonic() - began < 15
    assert has_ended(next(row["pid"] for row in rows if row["arm"] == "child"))


def test_a_slot_gets_the_shorter_of_its_limit_and_what_is_left(check):
    _, rows = run_slots(check, "quick", limit_s=1000.0)
    assert rows[0]["left_s"] < 30
    _, rows = run_slots(check, "quick", limit_s=12.0)
    assert rows[-2]["left_s"] < 12


def test_slots_that_do_not_fit_are_dropped_by_name(check):
    outcomes, rows = run_slots(check, "endless", "quick", least_s=100.0)
    assert [(o.slot, o.state) for o in outcomes] == [("endless", "dropped"), ("quick", "dropped")]
    assert [row["slot"] for row in rows] == ["endless", "quick"]


def test_an_arm_that_fails_or_does_not_fit_says_so(check):
    outcomes, rows = run_slots(check, "with_arms")
    assert outcomes[0].state == "done"
    arms = {row["arm"]: row for row in rows if "state" not in row}
    assert arms["wrong"]["ok"] is False
    assert arms["wrong"]["error"] == "RuntimeError: out of luck"
    assert arms["right"]["time_ms"] == 1.5
    assert "dropped" in arms["long"]
    assert set(arms) == {"wrong", "right", "long"}


def test_what_runs_in_the_background_ends_before_a_timed_slot(check):
    from gpu.check import RESULTS, read
    from gpu.runner import Runner, Slot

    runner = Runner(check, say=lambda text: None)
    slots = [
        Slot(name=name, function=f"fake_slots:{name}", limit_s=10, least_s=0, is_timed=is_timed)
        for name, is_timed in (("quick", False), ("beside", False), ("beside", True))
    ]

    def rows(arm):
        return [row for row in read(check.out / RESULTS) if row["arm"] == arm]

    def background():
        runner.start_background(Slot(name="endless", function="fake_slots:endless", limit_s=10,
                                     least_s=0))  # fmt: skip
        until = time.monotonic() + 10
        while time.monotonic() < until and not rows("child"):
            time.sleep(0.05)

    runner.run(slots, background)
    assert [row["runs"] for row in rows("beside")] == [True, False]
    assert [row["slot"] for row in rows("child")] == ["compile"]


def test_a_cut_line_is_left_out_and_a_later_row_replaces(check):
    from gpu.check import append, latest, read

    path = check.out / "rows.jsonl"
    append(path, {"slot": "mfu", "arm": "a", "loss": float("nan")})
    append(path, {"slot": "mfu", "arm": "b", "n": 1})
    append(path, {"slot": "mfu", "arm": "a", "n": 2})
    with path.open("a") as file:
        file.write('{"slot": "mfu", "arm"')
    rows = read(path)
    assert [row["arm"] for row in rows] == ["a", "b", "a"]
    assert rows[0]["loss"] == "nan"
    assert [(row["arm"], row["n"]) for row in latest(rows)] == [("a", 2), ("b", 1)]


def test_the_table_marks_wrong_failed_and_dropped_arms(check):
    from gpu.table import table

    rows = [
        {"slot": "mfu", "arm": "one", "ok": None, "step_median_ms": 12.3456, "tokens_per_s": 1e6},
        {"slot": "parity", "arm": "two", "ok": False, "out_error": 0.5},
        {"slot": "parity", "arm": "three", "ok": False, "error": "RuntimeError: no"},
        {"slot": "parity", "arm": "four", "ok": None, "dropped": "1 s left of 7"},
        {"slot": "parity", "arm": "", "state": "done", "wall_s": 3.2, "error": None},
    ]
    lines = [" ".join(line.split()) for line in table(rows).splitlines()]
    assert lines == [
        "mfu one step_median_ms 12.35, tokens_per_s 1,000,000",
        "parity two WRONG out_error 0.5",
        "parity three FAILED RuntimeError: no",
        "parity four dropped: 1 s left of 7",
        "parity — done after 3 s",
    ]


@pytest.mark.slow
def test_a_rehearsal_runs_every_slot(tmp_path):
    """Minutes: every slot runs with tiny shapes on the CPU, and the record can be compared."""
    from pretrain_cli.engine.benchmark.record import compare, read

    out = tmp_path / "out"
    done = rehearse(out, "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    states = {slot["slot"]: slot["state"] for slot in summary["slots"]}
    assert list(states) == [
        "env", "smoke", "sync", "tests", "parity", "mfu", "arms", "memory", "decode", "fsdp"
    ]  # fmt: skip
    assert set(states.values()) == {"done"}
    assert summary["wrong"] == []
    arms = {result["arm"] for result in summary["results"]}
    assert {"step, CUDA graphs", "step, fa3", "step, fa4"} <= arms  # unavailable on a CPU
    assert "qwen3-0.6b, batch 1, prompt 8, pretrain, compiled" in arms
    assert len(list(out.iterdir())) <= 8
    record = read(out / "benchmark.json")
    compared = compare(record, record)
    assert compared.differences == []
    assert {round(arm.tokens_per_second, 6) for arm in compared.arms} == {1.0}
    assert any(result["peer"] == "transformers" for result in record["results"])


def test_a_check_that_is_stopped_still_sums_up(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, ROOT / ".tools" / "gpu_check", "--rehearse"],
        env=os.environ | {"OUT": str(out)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("env: at most"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 1
    assert "smoke: interrupted" in rest
    summary = json.loads((out / "summary.json").read_text())
    assert {slot["state"] for slot in summary["slots"]} <= {"interrupted", "done"}


def test_what_is_missing_is_said_first(tmp_path):
    done = rehearse(tmp_path, "--rehearse", python=[sys.executable, "-S"])
    assert done.returncode == 2
    assert "missing: torch" in done.stderr


def rehearse(out, *options, python=(sys.executable,)):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [*python, ROOT / ".tools" / "gpu_check", *options],
        env=environment | {"OUT": str(out)},
        capture_output=True,
        text=True,
    )
