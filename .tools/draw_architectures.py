"""Draw asset/gemma3-vs-qwen3: the smallest published size of both families, side by side.

    python .tools/draw_architectures.py

Writes the SVG, and a WebP from a screenshot of the SVG. The WebP needs Pillow, and a headless
Chromium or Chrome on PATH. Every number shown comes from the ModelConfigs, so a changed preset
changes the picture; `tests/test_picture.py` fails if the committed SVG is out of date.

Each model is one column, drawn from top to bottom, with equal parts in equal rows. Parts that only
one family has are in that family's colour; the other family's column shows a plain line there. Each
colour is a CSS class with a light and a dark value, so the SVG follows the reader's theme; the WebP
is always light. Fonts differ between machines (Inter if installed), so each text has room to be a
sixth wider.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from pretrain_cli.model.config import FULL, SLIDING
from pretrain_cli.model.counting import count_parameters
from pretrain_cli.model.presets import full_name, preset

TARGET = Path(__file__).resolve().parent.parent / "asset" / "gemma3-vs-qwen3.svg"
FAMILIES = {"gemma3": "Gemma 3", "qwen3": "Qwen 3"}
ACTIVATIONS = {"gelu_pytorch_tanh": "GELU", "silu": "SiLU"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

WIDTH, HEIGHT = 830, 1232  # GitHub shows READMEs 830 pixels wide: no scaling
COLUMNS = {"gemma3": 28, "qwen3": 430}
BODY, TIED = 354, 370  # right edges of the boxes, and of the line to the tied head
STREAM = 34  # the residual stream's x
BRANCH, BRANCH_WIDTH, MIDDLE = 64, 276, 202  # left edge, width and center of a sublayer
LEFT, RIGHT = BRANCH + 14, BRANCH + BRANCH_WIDTH - 14  # edges of its text
MASK_TOKENS, MASK_WINDOW = 7, 3  # sizes of the mask sketches
LONGEST_BAR = 150

STYLE = """
text{font:12px Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
text.bold{font-weight:600} text.title{font-size:13px;font-weight:600}
text.name{font-size:26px;font-weight:600} .end{text-anchor:end} .middle{text-anchor:middle}
path{stroke-width:1.5} .thin{stroke-width:1} .thick{stroke-width:2.5} .dashed{stroke-dasharray:3 4}
.none{fill:none}
"""
COLOURS = {  # (light, dark)
    "card": ("#ffffff", "#151b23"),
    "frame": ("#f6f8fa", "#1b222c"),
    "box": ("#ffffff", "#262f3c"),
    "inner": ("#f6f8fa", "#303b4a"),
    "edge": ("#d0d7de", "#445061"),
    "line": ("#7d8793", "#8b95a1"),
    "soft": ("#dfe4ea", "#465263"),
    "ink": ("#1f2733", "#e8edf3"),
    "muted": ("#5b6673", "#adb7c3"),
    "gemma3": ("#1f5fd0", "#8ab6ff"),
    "gemma3-edge": ("#8fb2ee", "#4877c9"),
    "gemma3-tint": ("#e6eefd", "#1b3159"),
    "qwen3": ("#b5480b", "#ffab73"),
    "qwen3-edge": ("#eeb08a", "#b0683a"),
    "qwen3-tint": ("#fdede2", "#4a2b1b"),
}


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


class Column:
    """SVG shapes of one model. x is relative to the column's left edge; `look` is CSS classes."""

    def __init__(self, family: str) -> None:
        self.family, self.config = family, preset(family)
        self.own = f"{family}-tint s-{family}-edge"
        self.shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, look: str = "box s-edge", rx: int = 7
    ) -> None:
        size = f'width="{width:g}" height="{height:g}" rx="{rx}"'
        self.shapes.append(f'<rect class="{look}" x="{x:g}" y="{y:g}" {size}/>')

    def path(self, d: str, look: str = "none s-line") -> None:
        self.shapes.append(f'<path class="{look}" d="{d}"/>')

    def text(self, x: float, y: float, words: str, look: str = "ink", turned: bool = False) -> None:
        """Draw text with its baseline at y; `turned` text reads upwards."""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
        self.shapes.append(f'<text class="{look}" x="{x:g}" y="{y:g}"{turn}>{escape(words)}</text>')

    def heading(self, left: float, right: float, y: float, words: str, note: str) -> None:
        self.text(left, y, words, "ink title")
        self.text(right, y, note, "muted end")

    def line(self, *points: tuple[float, float], look: str = "", arrow: bool = True) -> None:
        """Draw a line with round corners; with `arrow`, its tip is at the last point."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = sign(x - x0), sign(y - y0)
        d = f"M{points[0][0]:g} {points[0][1]:g}"
        for (ax, ay), (bx, by), (cx, cy) in zip(points, points[1:], points[2:], strict=False):
            d += f"L{bx - 8 * sign(bx - ax):g} {by - 8 * sign(by - ay):g}"
            d += f"Q{bx:g} {by:g} {bx + 8 * sign(cx - bx):g} {by + 8 * sign(cy - by):g}"
        self.path(d + f"L{x - 5 * dx * arrow:g} {y - 5 * dy * arrow:g}", f"none s-line {look}")
        if arrow:
            bx, by = x - 7 * dx, y - 7 * dy
            corners = (x, y), (bx - 4 * dy, by - 4 * dx), (bx + 4 * dy, by + 4 * dx)
            self.path("M" + "L".join(f"{cx:g} {cy:g}" for cx, cy in corners) + "Z", "line")

    def circled(self, x: float, y: float, cross: str) -> None:
        self.rect(x - 9.5, y - 9.5, 19, 19, "box s-line", rx=10)
        self.path(f"M{x:g} {y:g}{cross}", "none s-ink")

    def pill(self, x: float, y: float, width: float, words: str) -> None:
        """Draw a part that only this family has: 24 high, centered at x."""
        self.rect(x - width / 2, y, width, 24, self.own, rx=12)
        self.text(x, y + 16.5, words, f"{self.family} bold middle")

    def norm(self, x: float, y: float, width: float, name: str, *, own: bool = False) -> None:
        """Draw an RMSNorm, 26 high, with its name in the code; `own` if only this family has it."""
        self.rect(x, y, width, 26, self.own if own else "box s-edge", rx=13)
        self.text(x + 16, y + 17.5, "RMSNorm", f"{self.family if own else 'ink'} bold")
        self.text(x + width - 16, y + 17.5, name, f"{self.family if own else 'muted'} end")

    def kind_colour(self, kind: str) -> str:
        return self.family if kind == SLIDING else "muted"

    def draw(self) -> str:
        """Return the whole column, from the name to the parameters, as an SVG group."""
        self.header()
        self.embedding()
        self.block()
        self.head()
        self.parameters()
        shapes = "\n".join(self.shapes)
        return f'<g transform="translate({COLUMNS[self.family]} 0)">\n{shapes}\n</g>'

    def header(self) -> None:
        context = f"context {self.config.max_position_embeddings:,}"
        self.text(0, 56, FAMILIES[self.family], f"{self.family} name")
        self.text(0, 78, f"{full_name(self.family)} · {context}", "muted")
        self.text(BODY, 56, f"{count_parameters(self.config).total / 1e6:.0f}M", "ink name end")
        self.text(BODY, 78, "parameters", "muted end")

    def embedding(self) -> None:
        """Draw the embedding, from tokens to the residual stream."""
        config = self.config
        self.line((STREAM, 100), (STREAM, 124))
        self.text(STREAM + 12, 114, "tokens", "muted")
        self.rect(0, 124, BODY, 38)
        sizes = f"{config.vocab_size:,} × {config.hidden_size:,}"
        self.heading(16, BODY - 16, 147.5, "Token embedding", sizes)
        if config.embedding_is_scaled:
            self.line((STREAM, 162), (STREAM, 178), look="thick")
            self.pill(STREAM, 178, 62, f"× √{config.hidden_size}")
            self.text(STREAM + 42, 194.5, "embeddings enter scaled up", self.family)

    def block(self) -> None:
        """Draw a block: the residual stream runs down; attention and MLP read it and add to it."""
        config, layers = self.config, self.config.layer_types
        pattern = "every layer full"
        if SLIDING in layers:
            pattern = f"{layers.index(FULL)} sliding, 1 full, repeated"
        self.rect(0, 218, BODY, 666, "frame s-edge", rx=12)
        self.heading(BRANCH, BRANCH + BRANCH_WIDTH, 243, f"Block × {len(layers)}", pattern)
        pitch = (BRANCH_WIDTH + 2) / max(preset(family).num_hidden_layers for family in FAMILIES)
        for layer, kind in enumerate(layers):
            self.rect(BRANCH + pitch * layer, 253, pitch - 2, 14, self.kind_colour(kind), rx=2)
        start = 202 if config.embedding_is_scaled else 162
        self.line((STREAM, start), (STREAM, 906), look="thick")
        words = f"residual stream, {config.hidden_size:,} wide"
        self.text(18, 450, words, "muted middle", turned=True)
        self.sublayer(286, "attention", self.attention, 597)
        self.sublayer(634, "mlp", self.gated_mlp, 853)

    def sublayer(self, top: float, name: str, draw: Callable[[float], float], plus: float) -> None:
        """Draw a norm, the sublayer, its post-norm if any, and the addition at y = `plus`."""
        self.line((STREAM, top + 13), (BRANCH, top + 13))
        self.norm(BRANCH, top, BRANCH_WIDTH, f"{name}_norm")
        self.line((MIDDLE, top + 26), (MIDDLE, top + 42))
        bottom = draw(top + 42)
        if self.config.has_post_norms:
            self.line((MIDDLE, bottom), (MIDDLE, plus - 13))
            self.norm(BRANCH, plus - 13, BRANCH_WIDTH, f"post_{name}_norm", own=True)
            self.line((BRANCH, plus), (STREAM + 9.5, plus))
        else:
            self.line((MIDDLE, bottom), (MIDDLE, plus), (STREAM + 9.5, plus))
        self.circled(STREAM, plus, "m-4.5 0h9m-4.5 -4.5v9")

    def attention(self, top: float) -> float:
        """Draw the heads and each layer type's mask. Return the y of the bottom."""
        kinds = [kind for kind in (FULL, SLIDING) if kind in self.config.layer_types]
        height = 112 + 64 * len(kinds)
        self.rect(BRANCH, top, BRANCH_WIDTH, height)
        self.heading(
            LEFT, RIGHT, top + 23, "Attention", f"grouped, heads of {self.config.head_dim}"
        )
        self.heads(top + 36)
        self.rect(BRANCH + 10, top + 78, BRANCH_WIDTH - 20, 24, "inner s-edge", rx=12)
        self.text(LEFT + 8, top + 94.5, "QK-norm", "ink bold")
        self.text(RIGHT - 8, top + 94.5, "RMSNorm on each head", "muted end")
        for row, kind in enumerate(kinds):
            self.kind(top + 110 + 64 * row, kind)
        return top + height

    def heads(self, top: float) -> None:
        """Draw query heads above the key/value heads they share; one pixel is 16 of head_dim."""
        queries, keys = self.config.num_attention_heads, self.config.num_key_value_heads
        width = self.config.head_dim / 16
        self.text(LEFT, top + 10.5, f"{queries} query", "muted")
        self.text(LEFT, top + 31.5, f"{keys} key/value", "muted")
        for head in range(queries):
            self.rect(LEFT + 90 + head * (width + 2), top, width, 12, "line", rx=2)
        span = (queries // keys - 1) * (width + 2)  # between a group's outer head centers
        for key in range(keys):
            x = LEFT + 90 + key * (span + width + 2) + width / 2
            d = f"M{x:g} {top + 12:g}v4h{span:g}v-4M{x + span / 2:g} {top + 16:g}v5"
            self.path(d, "none s-line thin")
            self.rect(x + span / 2 - width / 2, top + 21, width, 12, "muted", rx=2)

    def kind(self, top: float, kind: str) -> None:
        """Draw one layer type: a sketch of its mask, the visible tokens, the RoPE base."""
        left, colour, window = BRANCH + 10, self.kind_colour(kind), self.config.window(kind)
        base, _ = self.config.rope_base(kind)
        seen = "see every earlier token" if window is None else f"see the last {window} tokens"
        count = f"{self.config.layer_types.count(kind)} {kind.removesuffix('_attention')} layers"
        look = self.own if kind == SLIDING else "inner s-edge"
        self.rect(left, top, BRANCH_WIDTH - 20, 56, look)
        for query in range(MASK_TOKENS):
            for key in range(MASK_TOKENS):
                is_seen = key <= query and (window is None or key > query - MASK_WINDOW)
                x, y = left + 9 + 6 * key, top + 7.5 + 6 * query
                self.rect(x, y, 5, 5, colour if is_seen else "soft", rx=1)
        self.text(left + 64, top + 17, count, "ink bold")
        self.text(left + 64, top + 32.5, seen, colour)
        self.text(left + 64, top + 48, f"RoPE base {base:,.0f}", colour)

    def gated_mlp(self, top: float) -> float:
        """Draw down(activation(gate) × up). Return the y of the bottom."""
        D, F = f"{self.config.hidden_size:,}", f"{self.config.intermediate_size:,}"
        gate, up = LEFT + 50, RIGHT - 50
        self.rect(BRANCH, top, BRANCH_WIDTH, 148)
        self.heading(LEFT, RIGHT, top + 23, "Gated MLP", f"{D} → {F} → {D}")
        for x, y, name in ((gate, 36, "gate"), (up, 36, "up"), (MIDDLE, 112, "down")):
            self.rect(x - 50, top + y, 100, 24, "inner s-edge")
            self.text(x, top + y + 16.5, name, "ink middle")
        self.line((gate, top + 60), (gate, top + 74))
        self.pill(gate, top + 74, 64, ACTIVATIONS[self.config.hidden_activation])
        self.line((gate + 32, top + 86), (MIDDLE - 9.5, top + 86))
        self.line((up, top + 60), (up, top + 86), (MIDDLE + 9.5, top + 86))
        self.line((MIDDLE, top + 95), (MIDDLE, top + 112))
        self.circled(MIDDLE, top + 86, "m-3.5 -3.5l7 7m0 -7l-7 7")
        return top + 148

    def head(self) -> None:
        """Draw the final norm and the head; a dashed line joins it to a tied embedding."""
        config = self.config
        self.norm(0, 906, BODY, "norm")
        self.line((STREAM, 932), (STREAM, 950))
        self.rect(0, 950, BODY, 38)
        sizes = f"{config.hidden_size:,} × {config.vocab_size:,}"
        self.heading(16, BODY - 16, 973.5, "Output head", sizes)
        self.line((STREAM, 988), (STREAM, 1012))
        self.text(STREAM + 12, 1004, "logits", "muted")
        if config.tie_word_embeddings:
            for y, end in ((143, 464), (969, 656)):
                self.line((BODY, y), (TIED, y), (TIED, end), look="dashed", arrow=False)
            self.text(TIED + 4, 560, "tied: one matrix, used twice", "muted middle", turned=True)

    def parameters(self) -> None:
        """Draw parameters by part, with one scale for both models, and the legend of colours."""
        parts = ("embeddings", "attention", "mlp", "norms")
        counts = {family: count_parameters(preset(family)) for family in FAMILIES}
        largest = max(getattr(count, part) for count in counts.values() for part in parts)
        total = counts[self.family].total
        self.path(f"M0 1040h{BODY}", "none s-edge thin")
        self.heading(0, BODY, 1070, "Where the parameters are", "both to one scale")
        for row, part in enumerate(parts):
            y, number = 1096 + 23 * row, getattr(counts[self.family], part)
            short = f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number / 1e3:.0f}K"
            percent = f"{number / total:.0%}" if number >= total / 100 else "<1%"
            self.text(0, y, "MLP" if part == "mlp" else part, "muted")
            length = max(1, LONGEST_BAR * number / largest)
            self.rect(86, y - 11, length, 14, f"{self.family}-edge", rx=2)
            self.text(300, y, short, "ink end")
            self.text(BODY, y, percent, "muted end")
        words = f"only in {FAMILIES[self.family]}"
        if self.config.norm_is_zero_centered:
            words += "; its norms scale by 1 + weight"
        self.rect(0, 1190, 22, 14, self.own)
        self.text(32, 1201.5, words, self.family)


def svg(*, follow_theme: bool = True) -> str:
    """Return the SVG; without `follow_theme` it is always light."""
    light, dark = (
        "\n".join(
            f".{name}{{fill:{c[i]}}} .s-{name}{{stroke:{c[i]}}}" for name, c in COLOURS.items()
        )
        for i in (0, 1)
    )
    theme = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n" if follow_theme else ""
    title = " and ".join(f"{FAMILIES[family]} ({full_name(family)})" for family in FAMILIES)
    columns = "\n".join(Column(family).draw() for family in FAMILIES)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    card = f'x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="16"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">
<title>The architectures of {title}, side by side</title>
<style>{STYLE}{light}
{theme}</style>
<rect class="card s-edge" {card}/>
{columns}
</svg>
"""


def write_webp(browser: str, target: Path) -> None:
    """Write the light picture at twice the size, transparent around the card."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        page, png = Path(folder, "picture.svg"), Path(folder, "picture.png")
        page.write_text(svg(follow_theme=False), encoding="utf-8")
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
        )
        options += " --disable-background-networking --disable-component-update --hide-scrollbars"
        options += " --force-device-scale-factor=2 --default-background-color=00000000"
        options += f" --window-size={WIDTH},{HEIGHT + 200}"  # some browsers count their frame
        places = [f"--user-data-dir={folder}/profile", f"--screenshot={png}", page.as_uri()]
        subprocess.run([browser, *options.split(), *places], check=True, capture_output=True)
        with Image.open(png) as image:
            image.crop((0, 0, 2 * WIDTH, 2 * HEIGHT)).save(target, lossless=True, method=6)


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(svg(), encoding="utf-8")
    print(f"wrote {TARGET}")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no WebP: none of {', '.join(BROWSERS)} is on PATH to take the screenshot")
    write_webp(browser, TARGET.with_suffix(".webp"))
    print(f"wrote {TARGET.with_suffix('.webp')}")


if __name__ == "__main__":
    main()
