"""The Python interface: what the commands do, as functions for scripts and notebooks.

    from pretrain_cli import generate, load_model, open_dataset, tokenize, train

    dataset = tokenize("corpus/", tokenizer="bytes")
    result = train({"model.name": "qwen3-tiny", "data.path": str(dataset.path), "train.steps": 20})
    model = load_model(result.run)
    [text] = generate(model, ["def "], max_tokens=50)

A wrong value raises `PretrainError`, whose message says what to do. `import pretrain_cli` loads no
torch; using one of these functions does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain_cli.config.build import build_config
from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.batches import Batches
from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.dataset import Dataset
from pretrain_cli.data.opening import open_data, open_samples
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.request import TokenizeRequest, default_folder
from pretrain_cli.data.tokenizing.tokenize import tokenize as run_tokenize
from pretrain_cli.engine.runs.events import Emit, Finished, ignore
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runs.run_yaml import settings_to_resume
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.process_settings import process_age
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.runtime.stop import Stopped, StopRequest
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, open_model
from pretrain_cli.engine.sampling.sample import generate_text, plan_completions
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.engine.training.train import train as run_training
from pretrain_cli.errors import ConfigError, DataError, PretrainError
from pretrain_cli.model.config import ModelConfig, variant
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.presets import preset

Config = RunConfig | Mapping[str, Any]
"""Settings of a run: a RunConfig, or values by dotted name, such as {"train.steps": 100}."""

READING = {"text_key": "text_key", "document_separator": "separator", "errors": "errors",
           "input": "kind"}  # fmt: skip
"""Options of `pretrain tokenize` that say how files are read: name here -> field of ReadOptions."""


def run_config(values: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the settings of a run from values by dotted name; the others keep their defaults.
    Raises ConfigError for a name or value that doesn't exist."""
    given, nulls = _split_nulls(values or {})
    return build_config({}, given, nulls)


def _split_nulls(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that are not None, and an assignment of null for each of the others."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in values:
        if name.count(".") != 1:
            raise ConfigError(f"{name}: not of the form section.name, such as train.steps")
    return given, [f"{name}=null" for name in values if name not in given]


def model_config(name: str, **changes: Any) -> ModelConfig:
    """Return the config of a published size, such as `qwen3-0.6b`, with these fields changed."""
    return variant(preset(name), changes)


def tokenize(
    *paths: str | Path, tokenizer: str, out: str | Path | None = None, **options: Any
) -> Dataset:
    """Tokenize files and folders into a dataset and open it, or open it if it exists already.

    `out` is the dataset's folder; None means data/NAME after the first path. `options` are those of
    `pretrain tokenize`, with underscores: val_fraction, dedup, include, exclude, text_key, workers,
    append, force and the others.
    """
    if not paths:
        raise ConfigError("tokenize: no path; give a file or a folder of text")
    reading = {READING[name]: options.pop(name) for name in list(options) if name in READING}
    for name in ("include", "exclude"):
        if name in options:
            value = options[name]
            options[name] = (value,) if isinstance(value, str) else tuple(value)
    request = TokenizeRequest(
        paths=tuple(map(str, paths)),
        out=default_folder(str(paths[0])) if out is None else Path(out),
        tokenizer=tokenizer,
        reading=ReadOptions(**reading),
        **options,
    )
    return open_dataset(run_tokenize(request).folder)


def open_dataset(
    path: str | Path, *, tokenizer: str | None = None, notify: Callable[[str], object] = print
) -> Dataset:
    """Open a dataset folder, or the token files of another program, written with `tokenizer`.

    `len(dataset.train)` is the number of training tokens, and `dataset.train.iter_documents()`
    yields the tokens of each document. `notify` gets choices that were made on the way. Raises
    DataError if a file is missing or damaged.
    """
    dataset = open_data(str(path), tokenizer)
    for notice in dataset.notices:
        notify(notice)
    return dataset


def batches(
    dataset: Dataset,
    *,
    seq_len: int,
    samples_per_step: int,
    seed: int = 0,
    packing: str = "concat",
    document_mask: bool = False,
) -> Batches:
    """Return the batches that a run on this dataset trains on: `batches.step(0)` is the first.

    They are those of `train` with the same sequence length, samples per step, seed and packing.
    """
    samples = open_samples(dataset, seq_len=seq_len, packing=packing, notify=lambda text: None)
    if not len(samples):
        raise DataError(f"{dataset.path}: shorter than one sample of {seq_len:,} tokens")
    return Batches(
        [samples],
        [len(samples)],
        seq_len=seq_len,
        samples_per_step=samples_per_step,
        seed=seed,
        documents=document_mask,
    )


def train(
    config: Config,
    *,
    on_event: Emit = ignore,
    resume: str | Path | None = None,
    allow_change: bool = False,
) -> Finished:
    """Train a model and return how the run ended; `result.run` is its folder.

    `on_event` is called with every event of the run: `StepMetrics`, `Evaluation`, `Saved` and the
    others of `pretrain_cli.engine.runs.events`. An exception that it raises ends the run. `resume`
    is a run folder or one of its checkpoints; `config` then holds only what changes. train.max_time
    counts from this call. An interrupt ends the run at once: it resumes from its last checkpoint.
    """
    if resume is None:
        settings, where = config if isinstance(config, RunConfig) else run_config(config), {}
    else:
        given, nulls = _split_nulls(_by_name(config) if isinstance(config, RunConfig) else config)
        settings, where = settings_to_resume(Path(resume), given, nulls, allow_change=allow_change)
    stop = StopRequest(limit=settings.train.max_time, since=process_age())
    try:
        return run_training(settings, on_event, stop=stop, **where)
    except Stopped:
        raise PretrainError(f"{stop.reason}: stopped before training began") from None


def _by_name(config: RunConfig) -> dict[str, Any]:
    """Return the values that were given, by dotted name."""
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(exclude_unset=True).items()
        for name, value in values.items()
    }


@dataclass(frozen=True)
class Model:
    """A trained model: the decoder, its tokenizer and the folder they come from."""

    folder: Path
    decoder: Decoder
    """A `torch.nn.Module`: `decoder(tokens)` returns logits (B, T, V), and `decoder(tokens,
    targets)` the loss as `LossParts`. Tokens are on the model's device."""
    tokenizer: Tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def device(self) -> torch.device:
        return self.decoder.embedding.weight.device

    def logits(self, text: str) -> Tensor:
        """Return the logits after each token of the text. (T, V)"""
        ids = self.tokenizer.encode_prompt(text)
        with torch.no_grad():
            return self.decoder(torch.tensor([ids], device=self.device))[0]


def load_model(
    path: str | Path | None = None,
    *,
    best: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    notify: Callable[[str], object] = print,
) -> Model:
    """Open a run's newest checkpoint, or its `best`; a checkpoint; or a Hugging Face folder.

    None opens the newest run in runs/. Weights are float32; `dtype` is the type of activations and
    products, as in `speed.dtype`. `notify` gets what was passed over, such as a damaged checkpoint.
    Changes settings of the whole process, as training does. Raises CheckpointError if there is no
    intact model.
    """

    def tell(text: str) -> None:
        notify(text)

    where = find_device(device)
    speed = run_config(
        {"speed.dtype": dtype, "speed.attention": attention, "speed.compile": False}
    ).speed
    folder = find_model_folder(None if path is None else Path(path), tell, best=best)
    tokenizer = folder_tokenizer(folder)
    resolved = resolve_speed(speed, where, training=False)
    return Model(folder, open_model(folder, resolved, where, tell), tokenizer)


def generate(
    model: Model, prompts: str | Iterable[str], *, batch_size: int = 8, **params: Any
) -> list[str]:
    """Return a continuation of each prompt, `batch_size` at a time. The model is unchanged.

    `params` are the fields of `SamplingParams`: max_tokens, temperature, top_k, top_p, min_p,
    repetition_penalty, stop, seed.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is not at least 1")
    stop: str | Iterable[str] = params.pop("stop", ())
    sampling = SamplingParams(stop=(stop,) if isinstance(stop, str) else tuple(stop), **params)
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    if not asked:
        return []
    completions = plan_completions(model.decoder, model.tokenizer, asked, sampling)
    session = DecodeSession(model.decoder)
    texts = [""] * len(asked)
    deltas = generate_text(session, model.tokenizer, completions, sampling, rows=batch_size)
    for delta in deltas:
        texts[delta.completion.number] += delta.text
    return texts
