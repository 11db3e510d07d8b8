"""pytest plugin: writes each failing test to the results at once, so that a cut loses none."""

import os
from pathlib import Path
from typing import Any

from gpu.check import append

RESULTS_FILE = "GPU_CHECK_RESULTS"


def pytest_runtest_logreport(report: Any) -> None:
    path = os.environ.get(RESULTS_FILE)
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # the main process reports its tests
    if path and report.failed and not is_worker:
        said = report.longreprtext.strip().splitlines()
        row = {"slot": "tests", "arm": report.nodeid, "ok": False, "error": said[-1][:300]}
        append(Path(path), row)
