"""Text parts of the page: markup in a run's files is escaped."""

import json

from tests.commands.test_report import Page, make_run, quoted, step

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'<!--"


def test_markup_in_run_files_is_escaped(pretrain, tmp_path):
    name = "a<b>&'\"<script>alert(3)<!--"
    rows = [step(1, **{NASTY: 1.0}), {"kind": NASTY, "step": 1, NASTY: NASTY}]
    settings = {"train": {"steps": NASTY, NASTY: [NASTY]}, NASTY: {NASTY: NASTY}}
    record = {"model": {"name": NASTY}, "dataset": {"path": NASTY}, "speed": {NASTY: NASTY}}
    run = make_run(tmp_path / name, rows, settings=settings, **record)
    sample = {"step": 1, "prompt": NASTY, "text": NASTY + "\u2028\x00%%data%%"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    make_run(tmp_path / "plain", [step(1)])
    assert pretrain("report plain --out plain.html").code == 0
    done = pretrain(f"report '{name}' --out nasty.html".replace("'" + name + "'", quoted(name)))
    assert done.code == 0, done.err
    plain, nasty = Page("plain.html"), Page("nasty.html")
    assert {tag for tag, _ in nasty.tags} <= {tag for tag, _ in plain.tags} | {"pre", "details",
            "summary", "span", "table", "thead", "td", "small"}  # fmt: skip
    assert [a for t, a in nasty.tags if t == "script"] == [
        a for t, a in plain.tags if t == "script"
    ]
    assert not [a for _, a in nasty.tags if any(key.startswith("on") or key == "src" for key in a)]
    assert nasty.data["runs"][0]["name"] == name
    assert nasty.data["runs"][0]["marks"][0]["kind"] == NASTY.replace("_", " ")
    assert "".join(nasty.inside("span")).count(NASTY) == 1  # the prompt
