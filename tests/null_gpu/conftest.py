"""Skips the tests of this folder where the null GPU isn't loaded, and gives them a dataset."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain_cli.data.tokenizing.tokenize import TokenizeRequest, tokenize
from tests.null_gpu.arms import Arm, Measured, measure
from tests.null_gpu.null_gpu import LOADED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs = "needs fake CUDA libraries, which .tools/null_gpu_tests loads"
    for item in items:
        if not item.get_closest_marker("null_gpu"):
            continue
        item.add_marker(pytest.mark.skipif(not LOADED, reason=needs))
        if (arm := _arm_of(item)) is not None:
            # One process measures the arm, and once.
            item.add_marker(pytest.mark.xdist_group(str(arm)))


def _arm_of(item: pytest.Item) -> Arm | None:
    call = getattr(item, "callspec", None)
    return call.params.get("arm") if call else None


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenize a megabyte as bytes: documents of 24 to 12,000 tokens, a few of them for
    validation."""
    root = tmp_path_factory.mktemp("null_gpu")
    (root / "corpus").mkdir()
    for number in range(300):
        text = f"{number} " + "the cat sat on it; " * (1 + number * 7919 % 500)
        (root / "corpus" / f"{number:03d}.txt").write_text(text)
    request = TokenizeRequest(
        paths=(str(root / "corpus"),), out=root / "cats", tokenizer="bytes", val_fraction=0.02
    )
    tokenize(request, lambda *_: None)
    return request.out


@pytest.fixture(scope="session")
def measured(dataset: Path) -> Callable[[Arm], Measured]:
    """Function that measures an arm, once in the session."""
    known: dict[Arm, Measured] = {}

    def once(arm: Arm) -> Measured:
        if arm not in known:
            known[arm] = measure(arm, dataset)
        return known[arm]

    return once
