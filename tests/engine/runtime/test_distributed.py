"""Ranks and devices: a single process, device names, and refused devices."""

import pytest
import torch

from pretrain_cli.engine.runtime.distributed import (
    Ranks,
    device_name,
    find_device,
    full_tensor,
    is_sharded,
    open_ranks,
    parallelize,
)
from pretrain_cli.errors import ConfigError

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_collectives_of_one_process_return_its_own_values():
    assert ALONE.is_first
    assert ALONE.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert ALONE.mean([3.0, 5.0]) == [3.0, 5.0]
    assert ALONE.min(7) == 7
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    ALONE.wait()


def test_without_torchruns_environment_there_is_one_rank(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with open_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.device.type) == (0, 1, "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "'gpu' is not a device; give cpu, cuda, cuda:N or mps"),
        ("xpu", "is not a device"),
        ("cuda:99", "'cuda:99' is not there, this machine has"),
    ],
)
def test_a_missing_or_unknown_device_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        find_device(name)


def test_one_gpu_for_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one GPU, for several ranks"), open_ranks("cuda:0"):
        pass


def test_a_cpu_is_named_with_its_threads():
    assert device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")


def test_one_rank_does_not_wrap_the_model_and_refuses_fsdp():
    model = torch.nn.Linear(2, 2)
    assert parallelize(model, ALONE, "ddp") is model  # pyright: ignore[reportArgumentType]
    assert not is_sharded(model)
    assert full_tensor(model.weight) is model.weight
    with pytest.raises(ConfigError, match="'fsdp' needs ranks"):
        parallelize(model, ALONE, "fsdp")  # pyright: ignore[reportArgumentType]
