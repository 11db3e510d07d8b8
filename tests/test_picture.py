"""The picture in the README matches the current presets."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_committed_picture_matches_the_presets():
    script = runpy.run_path(str(ROOT / ".tools" / "draw_architectures.py"))
    committed = (ROOT / "asset" / "gemma3-vs-qwen3.svg").read_text(encoding="utf-8")
    assert committed == script["svg"](), "draw it again: python .tools/draw_architectures.py"
