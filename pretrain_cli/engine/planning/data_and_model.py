"""Find a run's datasets and model before training.

Without any dataset, a small demo dataset is made.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.config.setting_types import StageSettings
from pretrain_cli.config.yaml_files import find_model
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.data.mixture import Mixture, Source, Stage, mix, parse_sources
from pretrain_cli.data.opening import open_data
from pretrain_cli.data.shards import MANIFEST
from pretrain_cli.data.tokenizing.tokenize import DEMO, demo_request, tokenize
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.errors import CheckpointError, ConfigError, DataError
from pretrain_cli.model.config import ModelConfig, variant
from pretrain_cli.model.formats.hf_config import read_config

DATASETS = Path("data")


def find_data(settings: RunConfig, ranks: Ranks, emit: Emit, stop: StopRequest) -> Mixture:
    """Return the datasets of data.path, else the only one in data/, else a new demo dataset.

    The first rank makes the demo; every rank must call this. Raises ConfigError if data/ holds
    several datasets, and Stopped if a rank was asked to stop while the demo was made.
    """
    asked, tokenizer = settings.data.path, settings.data.tokenizer
    if asked is None and tokenizer is not None:
        raise ConfigError(
            f"data.tokenizer: '{tokenizer}' says what made the .bin files of --data; name them, or "
            "leave it out"
        )
    if asked is None:
        found = sorted(p.parent for p in DATASETS.glob(f"*/{MANIFEST}"))
        found = [folder for folder in found if folder.suffix != ".partial"]
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            raise ConfigError(f"data/: holds several datasets ({listed}); choose one with --data")
        if not found and ranks.is_first:
            emit(
                Notice(
                    f"No dataset in {DATASETS}/: making a small one, {DEMO}, from the Python "
                    "standard library's sources. For your own text: pretrain tokenize FOLDER"
                )
            )
            _make_demo(stop)
        ranks.wait()
        if stop.agree():
            raise Stopped
        asked = (str(found[0] if found else DEMO),)

    return open_mixture(
        asked, tokenizer, lambda text: emit(Notice(text)), later=settings.data.stages
    )


def open_mixture(
    asked: Sequence[str],
    tokenizer: str | None,
    notify: Callable[[str], None],
    *,
    later: Sequence[StageSettings] = (),
) -> Mixture:
    """Open datasets named by texts of the form PATH or PATH:WEIGHT, and those of later stages."""
    opened: dict[str, Dataset] = {}

    def sources(asked: Sequence[str], setting: str) -> tuple[Source, ...]:
        parsed = parse_sources(asked, setting)
        for path, _ in parsed:
            if path not in opened:
                opened[path] = open_path(path, tokenizer, notify)
        return tuple(
            Source(text, weight, opened[path])
            for text, (path, weight) in zip(asked, parsed, strict=True)
        )

    there = sources(asked, "data.path")
    stages: list[Stage] = []
    for stage in later:  # what a stage leaves out is as in the one before
        before = stages[-1].sources if stages else there
        given = before if stage.path is None else sources(stage.path, "data.stages")
        length = stage.seq_len or (stages[-1].seq_len if stages else None)
        stages.append(Stage(given, stage.after, length))
    return mix(there, stages)


def _make_demo(stop: StopRequest) -> None:
    """Tokenize the demo dataset. A stop request leaves it partial; the next run continues it."""

    def check(activity: str, done: int, total: int, tokens: int) -> None:
        stop.check_here()

    try:
        tokenize(demo_request(), check)
    except Stopped:
        return
    except DataError:
        if not stop.asked:  # the same signal may have ended the tokenizing processes
            raise


def open_path(path: str, tokenizer: str | None, notify: Callable[[str], None]) -> Dataset:
    """Open the dataset at one path of data.path, and report its notices to `notify`."""
    dataset = open_data(path, tokenizer)
    for notice in dataset.notices:
        notify(notice)
    if dataset.unverified_bytes:
        notify(
            f"{path}: of {dataset.unverified_bytes / 2**30:.0f} GiB the sizes were checked, the "
            "contents were not"
        )
    return dataset


def find_architecture(settings: RunConfig, known: ModelConfig | None) -> tuple[str, ModelConfig]:
    """Return (name, architecture), from a resumed run, the --init-from folder or model.name.

    `known` is the resumed run's architecture; None for a new run.
    """
    folder = settings.model.init_from
    if known is not None:
        return settings.model.name, known
    if folder is None:
        return find_model(settings.model)
    if "name" in settings.model.model_fields_set:
        raise ConfigError(
            f"model.name: '{settings.model.name}' does not go with --init-from {folder}, whose "
            "config.json says what the model is; leave --model out"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; --init-from takes a model folder")
    return folder.resolve().name, variant(read_config(folder), settings.model.changes)
