"""Slot `tests`: the project's tests marked gpu. Failing tests are written as they fail."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path

from gpu.check import RESULTS, Check
from gpu.failures import RESULTS_FILE

ROOT = Path(__file__).resolve().parents[2]
TEST_LIMIT_S = 30
"""Seconds of one test, where pytest-timeout is installed."""
WORKERS = 6
"""Processes that share the GPU, where pytest-xdist is installed: many tests compile."""
ENDING_S = 8.0
"""Seconds before the slot's end at which pytest is interrupted."""


def run(check: Check) -> None:
    report = check.out / "tests.xml"
    with check.arm("pytest -m gpu") as figures:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
        command += ["-p", "gpu.failures", f"--junitxml={report}"]
        if importlib.util.find_spec("pytest_timeout"):
            command.append(f"--timeout={TEST_LIMIT_S}")
        if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 2 * WORKERS:
            command += ["-n", str(WORKERS)]
        files = list(marked_files(ROOT / "tests"))
        environment = os.environ | {RESULTS_FILE: str(check.out / RESULTS)}
        exit_code = run_until([*command, *files], environment, check.left_s() - ENDING_S)
        if exit_code is None:
            figures["note"] = "stopped at its limit"
        counts = xml.parse(report).getroot().find("testsuite") if report.is_file() else None
        if counts is None:
            raise RuntimeError("pytest was killed before its report; failures until then are above")
        told = {
            name: int(counts.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        }
        figures["failed"] = told["failures"] + told["errors"]
        figures["skipped"] = told["skipped"]
        figures["passed"] = told["tests"] - figures["failed"] - told["skipped"]
        figures["exit_code"] = exit_code
        figures["failing"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in counts.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        figures["ok"] = exit_code == 0 if exit_code is not None else not figures["failed"]


def run_until(command: list[str], environment: dict[str, str], seconds: float) -> int | None:
    """Return the exit code of pytest. After these seconds interrupt it, so that it still writes its
    report, and return None."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S - 2)
        process.kill()
        process.wait()
        return None


def marked_files(tests: Path) -> Iterator[str]:
    """Return the files with tests marked gpu: collecting the others would take seconds."""
    for path in sorted(tests.rglob("test_*.py")):
        if "mark.gpu" in path.read_text():
            yield str(path.relative_to(tests.parent))
