"""Tables of settings for the manual: every setting, in words, with its default."""

import re

from pretrain_cli.config.reference import settings_tables
from pretrain_cli.config.run_config import RunConfig

TABLES = settings_tables()
ROWS = [
    line.removeprefix("| ").removesuffix(" |").split(" | ")
    for line in TABLES.splitlines()
    if line.startswith("| `")
]


def test_every_setting_of_every_section_has_a_row():
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    names = [f"`{name}`" for section in sections for name in section.model_fields]  # pyright: ignore
    assert [row[0] for row in ROWS] == names
    assert re.findall(r"^## (\w+)", TABLES, flags=re.M) == list(RunConfig.model_fields)


def test_every_row_has_a_type_a_default_and_a_description():
    for row in ROWS:
        assert len(row) == 4, row
        assert all(row), row
        assert len(row[3]) > 15, row


def test_types_are_in_words():
    rows = {row[0]: row for row in ROWS}
    assert rows["`seq_len`"][1:3] == ["integer > 0 or `auto`", "`auto`"]
    assert rows["`decay_fraction`"][1:3] == ["number > 0, ≤ 1", "`0.65`"]
    assert rows["`betas`"][1:3] == ["pair of numbers", "`[0.8, 0.96]`"]
    assert rows["`keep_every`"][1:3] == ["integer > 0 or none", "none"]
    assert rows["`keep_best`"][1:3] == ["`true`, `false`", "`true`"]
    assert rows["`parallel`"][1:3] == ["`ddp`, `fsdp`", "`ddp`"]
    assert rows["`max_time`"][1] == "duration, such as 3h55m or none"
