"""Types of single settings: numbers such as 5B, and one or several paths."""

from pathlib import Path

import pytest

from pretrain_cli.config.build import build_config, check_config
from pretrain_cli.errors import ConfigError


@pytest.mark.parametrize(
    ("said", "tokens"),
    [("5B", 5 * 10**9), ("200M", 2 * 10**8), ("2.3b", 23 * 10**8), ("1.5T", 15 * 10**11),
     ("10k", 10_000), ("1000", 1000), (1000, 1000)],
)  # fmt: skip
def test_token_counts_accept_suffixes_such_as_5b(said, tokens):
    assert build_config({}, {"train.tokens": said}, []).train.tokens == tokens


@pytest.mark.parametrize("said", ["5X", "B", "-5B", "0", "0.5", "1.2345k", "5 GB", ""])
def test_an_invalid_token_count_is_refused(said):
    with pytest.raises(ConfigError, match="is not a number such as 5B, 200M"):
        build_config({}, {"train.tokens": said}, [])


@pytest.mark.parametrize(
    ("given", "paths", "dumped"),
    [
        ("data/a", ("data/a",), "data/a"),
        (Path("data/a"), ("data/a",), "data/a"),
        (["data/a"], ("data/a",), "data/a"),
        (["data/a:0.7", "data/b:0.3"], ("data/a:0.7", "data/b:0.3"), ["data/a:0.7", "data/b:0.3"]),
        (None, None, None),
    ],
)
def test_data_is_one_path_or_a_list(given, paths, dumped):
    config = check_config({"data": {"path": given}})
    assert config.data.path == paths
    assert config.model_dump(mode="json")["data"]["path"] == dumped
