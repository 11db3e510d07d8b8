"""The report's page in a headless Chromium: curves, axes, zoom, as a reader uses them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pretrain_cli.engine.report.writing import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on PATH")

STEPS, ROLLED_BACK = 40, 25


def make_run(folder, scale):
    """Write a run folder of 40 steps with two evaluations and a rollback."""
    folder.mkdir(parents=True)
    settings = {"train": {"steps": STEPS}}
    record = {"settings": settings, "asked": settings, "model": {"name": "m"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    rows = []
    numbers = [*range(1, ROLLED_BACK + 1), *range(ROLLED_BACK - 4, STEPS + 1)]
    for count, step in enumerate(numbers, 1):
        rows.append(
            {
                "kind": "step", "step": step, "seconds": count / 2, "tokens": 100 * step,
                "loss": scale * (6 - step / 10) + count % 3 / 50,
                "gradient_norm": scale * 5 + count % 5, "learning_rate": scale * step / 4000,
                "tokens_per_second": 3000 * scale + 7 * count,
                "run_tokens_per_second": 1000 * scale + count, "memory": 10**9 * scale + count,
            }
        )  # fmt: skip
        if count == ROLLED_BACK:
            rows.append({"kind": "rolled_back", "step": ROLLED_BACK, "to": ROLLED_BACK - 5})
        if count in (20, len(numbers)):
            rows.append(
                {"kind": "evaluation", "step": step, "loss": scale * 4 - step / 50,
                 "bits_per_byte": scale + step / 100, "perplexity": 50 * scale - step / 4}
            )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


DRIVER = (Path(__file__).parent / "driver.js").read_text()


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """Return the rows of two runs, and the curves that driver.js read in each of its states."""
    folder = tmp_path_factory.mktemp("report")
    rows = [make_run(folder / name, scale) for name, scale in (("run-a", 1.0), ("run-b", 0.8))]
    page = folder / "report.html"
    write_report([folder / "run-a", folder / "run-b"], page, None, print)
    html = page.read_text()
    # remove the content security policy: it allows only the page's own script, not the driver
    html = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", html)
    faults = "<script>window.faults = []; onerror = (text) => { faults.push(text); };</script>"
    html = html.replace("<head>", "<head>" + faults, 1)
    html = html.replace("</body>", f"<script>{DRIVER}</script></body>")
    (folder / "driven.html").write_text(html)
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
         (folder / "driven.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="driven">(.*?)</pre>', done.stdout, flags=re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    unescaped = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return rows, json.loads(unescaped)


KINDS = {"steps": "step", "evaluations": "evaluation"}


def last_row(rows, table, field):
    return next(row for row in reversed(rows) if row["kind"] == KINDS[table] and field in row)


@pytest.mark.parametrize(("axis", "per_step"), [("tokens", 100), ("steps", 1)])
def test_every_curve_ends_at_the_last_number_of_its_run(driven, axis, per_step):
    rows, report = driven
    charts = report[axis]
    assert {chart["title"] for chart in charts} >= {
        "Loss", "Bits per byte", "Learning rate", "Gradient norm", "Throughput", "Memory"
    }  # fmt: skip
    loss = next(chart for chart in charts if chart["title"] == "Loss")
    assert len(loss["curves"]) == 4
    for chart in charts:
        for curve in chart["curves"]:
            row = last_row(rows[curve["run"]], curve["table"], curve["field"])
            assert (curve["x"], curve["y"]) == (row["step"] * per_step, row[curve["field"]])
            assert curve["drawn"], (chart["title"], curve)


def test_dragging_zooms_every_chart_to_the_same_range(driven):
    report = driven[1]
    whole, zoomed = report["steps"][0]["range"], report["zoomed"][0]["range"]
    assert whole == [0, STEPS]
    assert zoomed == pytest.approx([STEPS / 4, 3 * STEPS / 4], abs=STEPS / 50)
    assert all(chart["range"] == zoomed for chart in report["zoomed"])
    assert report["wholeIsOffered"]
    assert all(chart["range"] == whole for chart in report["whole"])


def test_hiding_a_run_hides_its_curves(driven):
    assert {c["run"] for chart in driven[1]["hidden"] for c in chart["curves"]} == {0}


def test_the_page_raises_no_error(driven):
    assert driven[1]["errors"] == []
