"""Generate the manual's Markdown tables of every setting from the settings' classes.

    python -m pretrain_cli.config.reference

writes the tables into `guide/configuration.md`, between its two markers. A test fails if the page
is out of date.
"""

from pathlib import Path
from typing import Any

from pretrain_cli.config.run_config import RunConfig

PAGE = Path(__file__).parent.parent / "guide" / "configuration.md"
START, END = "<!-- settings: start -->", "<!-- settings: end -->"


def settings_tables() -> str:
    """Return a heading and a table for each section: setting, type, default, description."""
    schema = RunConfig.model_json_schema()
    parts = []
    for section, field in RunConfig.model_fields.items():
        model: Any = field.annotation
        described = schema["$defs"][model.__name__]
        rows = [
            f"| `{name}` | {_type(properties)} | {_default(model.model_fields[name].default)} "
            f"| {' '.join(properties['description'].split())} |"
            for name, properties in described["properties"].items()
        ]
        intro = " ".join(described["description"].split()) + "\n\n" if section == "model" else ""
        table = "\n".join(
            ["| setting | type | default | what it does |", "|---|---|---|---|", *rows]
        )
        parts.append(f"## {section}\n\n{intro}{table}\n")
    return "\n".join(parts)


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON schema's type in words, such as "integer > 0 or `auto`"."""
    if "anyOf" in schema:
        return " or ".join(_type(branch) for branch in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return "pair of numbers"
    kind = schema.get("type", "")
    if kind == "boolean":
        return "`true`, `false`"
    if kind in ("integer", "number"):
        bounds = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"),
                  ("maximum", "≤"))  # fmt: skip
        limits = [
            f"{sign} {schema[key]:g}" for key, sign in bounds if abs(schema.get(key, 1e18)) < 1e18
        ]
        return f"{kind} {', '.join(limits)}".strip()
    if kind == "string":
        return "path" if schema.get("format") == "path" else "text"
    return "none" if kind == "null" else schema.get("title", "")


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(repr(part).replace("'", '"') for part in value) + "]`"
    return f"`{value}`"


def write_page() -> None:
    """Write the tables into the manual's page, between its markers."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    page = f"{before}{START}\n\n{settings_tables()}\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_page()
