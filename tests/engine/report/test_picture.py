"""The PNG of the main curves."""

import pytest

from tests.commands.test_report import make_run, step


def test_the_picture_is_drawn(pretrain, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    rows = [step(1), step(2), {"kind": "skipped", "step": 2}, {"kind": "evaluation", "step": 2,
            "loss": 2.0}]  # fmt: skip
    make_run(tmp_path / "_$a_{$", rows)  # matplotlib would parse `$` as math
    make_run(tmp_path / "名前", [])
    done = pretrain("report '_$a_{$' 名前 --png c.png")
    assert (done.code, done.err) == (0, "")
    assert done.out == "Written to report.html\nWritten to c.png\n"
    with image.open("c.png") as picture:
        assert picture.format == "PNG"
        pixels = picture.convert("RGB")
        blue = (0x1F, 0x5F, 0xD0)  # the first run's curve
        assert any(color == blue for _, color in pixels.getcolors(1 << 24))
