"""Run tasks of lm-evaluation-harness with our model, in this process.

The harness provides questions, prompts and metrics. It calls three methods of a model, which
likelihood.py implements (`_harness_model`). A task whose data are on this machine needs no network.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.evaluation.evaluate_checkpoint import run_settings
from pretrain_cli.engine.evaluation.likelihood import Scorer
from pretrain_cli.engine.runs.retention import find_model_folder
from pretrain_cli.engine.runtime.distributed import find_device
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.engine.sampling.open_model import folder_tokenizer, wants_int8
from pretrain_cli.engine.sampling.sample import open_for_decoding
from pretrain_cli.engine.sampling.sampler import SamplingParams
from pretrain_cli.errors import ConfigError, DataError, did_you_mean
from pretrain_cli.model.float8 import quiet_torchao
from pretrain_cli.model.formats.hf_config import read_config
from pretrain_cli.model.inference.int8 import as_floats

MAX_TOKENS = 256
"""Maximum length of an answer if the task sets none; tokens."""
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Keys in a task's generation settings for the maximum length of an answer."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Tasks to run and the model to run them with. None: the setting of the model's run, else the
    device's default (unless the field says otherwise)."""

    where: Path | None = None
    best: bool = False
    tasks: tuple[str, ...]
    """Names known to the harness, or YAML files."""
    include_path: Path | None = None
    """Folder with YAML files of the user's own tasks; None: none."""
    limit: int | None = None
    """Number of questions, from the start of each task; None: all."""
    seq_len: int | None = None
    """Maximum length of a text; tokens. Longer texts lose their beginning. None: the model's
    positions."""
    device: str = "auto"
    dtype: str | None = None
    attention: str | None = None
    quantize: str | None = None
    """int8; None leaves the weights unchanged."""
    settings: tuple[str, ...] = ()
    """Speed settings as `speed.NAME=VALUE`."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    task: str
    measure: str
    filter: str
    value: float
    stderr: float | None
    questions: int
    shots: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Scores of all tasks, and the settings in force."""

    folder: Path
    seq_len: int
    dtype: str
    quantize: str | None
    scores: list[TaskScore]
    harness: str
    """Version of lm-eval."""


def evaluate_tasks(request: TaskRequest, notify: Callable[[str], None]) -> TaskResult:
    """Compute all metrics of all tasks. Raises ConfigError for an unknown task, DataError for one
    whose data can't be loaded."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--tasks: runs in one process; start it without torchrun")
    if not all(request.tasks):
        raise ConfigError(
            f"--tasks: '{','.join(request.tasks)}' has an empty name; give a task, or several with "
            "commas between"
        )
    for name, value in (("limit", request.limit), ("seq-len", request.seq_len)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value} is not at least 1")
    device = find_device(request.device)
    folder = find_model_folder(request.where, notify, best=request.best)
    tokenizer = folder_tokenizer(folder)
    flags = {"speed.dtype": request.dtype, "speed.attention": request.attention}
    config = build_config(run_settings(folder), flags, request.settings)
    model_config = read_config(folder)
    speed = resolve_speed(config.speed, device, training=False, model=model_config)
    for message in speed.departures():
        notify(message)
    int8 = wants_int8(request.quantize, model_config)
    positions = model_config.max_position_embeddings
    if request.seq_len is not None and request.seq_len > positions:
        raise ConfigError(
            f"--seq-len: {request.seq_len:,} is beyond the model's {positions:,} positions; give "
            "less"
        )
    tasks = _load_tasks(request)
    model = open_for_decoding(folder, speed, device, notify, int8=int8)
    if int8:
        as_floats(model)  # faster with several texts at a time
    scorer = Scorer(model, tokenizer, request.seq_len or positions)
    harness = importlib.import_module("lm_eval")
    results: Any = importlib.import_module("lm_eval.evaluator").evaluate(
        lm=_harness_model(scorer), task_dict=tasks, limit=request.limit, log_samples=False
    )
    return TaskResult(
        folder=folder,
        seq_len=scorer.positions,
        dtype=speed.dtype,
        quantize=request.quantize,
        scores=_scores(results),
        harness=harness.__version__,
    )


def _load_tasks(request: TaskRequest) -> Any:
    """Return the harness's tasks with their data loaded."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks: the package lm-eval is not installed; pip install 'pretrain[eval]'"
        )
    if request.include_path is not None and not request.include_path.is_dir():
        raise ConfigError(
            f"--include-path: {request.include_path} is no folder; give the folder of the tasks"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    quiet_torchao()
    importlib.import_module("datasets").disable_progress_bars()
    manager = _manager(request)
    files = [name for name in request.tasks if name.endswith((".yaml", ".yml"))]
    for name in request.tasks:
        if name in files and not Path(name).is_file():
            raise ConfigError(f"--tasks: {name}: no such file; give a task's YAML file or its name")
        if name not in files and name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise ConfigError(f"--tasks: '{name}' is no task that lm-eval knows{near}")
    try:
        loaded = manager.load(list(request.tasks))
    except Exception as error:  # from the task's file, the datasets library or the network
        reason = str(error).split("\n")[0]
        raise DataError(
            f"--tasks: {', '.join(request.tasks)}: can't be loaded ({type(error).__name__}: "
            f"{reason}); the data must be on this machine or on the hub"
        ) from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own
    return loaded


def _manager(request: TaskRequest) -> Any:
    """Return the harness's task manager. The harness's own tasks are thousands of files, which are
    read only if a requested task is not one of the user's."""
    manager_class: Any = importlib.import_module("lm_eval.tasks").TaskManager
    own = str(request.include_path) if request.include_path else None
    manager = manager_class(include_path=own, include_defaults=False)
    named = {name for name in request.tasks if not name.endswith((".yaml", ".yml"))}
    if named <= set(manager.all_tasks):
        return manager
    return manager_class(include_path=own)


def _harness_model(scorer: Scorer) -> Any:
    """Wrap the scorer as a model of the harness. The class is defined here because its base class
    is imported only when tasks run."""
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class OurModel(base):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            spans = [scorer.continuation(*request.args) for request in requests]
            likelihoods = dict(scorer.likelihoods(spans))
            return [(likelihoods[n].logprob, likelihoods[n].is_greedy) for n in range(len(spans))]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            windows = [scorer.windows(request.args[0]) for request in requests]
            likelihoods = dict(scorer.likelihoods([span for spans in windows for span in spans]))
            sums, first = [], 0
            for spans in windows:
                sums.append(sum(likelihoods[n].logprob for n in range(first, first + len(spans))))
                first += len(spans)
            return sums

        def generate_until(self, requests: list[Any]) -> list[str]:
            numbers_of: dict[SamplingParams, list[int]] = {}
            for number, request in enumerate(requests):
                numbers_of.setdefault(_sampling_params(request.args[1]), []).append(number)
            answers = [""] * len(requests)
            for params, numbers in numbers_of.items():
                prompts = [requests[number].args[0] for number in numbers]
                for index, text in scorer.generate(prompts, params):
                    answers[numbers[index]] = text
            return answers

    return OurModel()


def _sampling_params(settings: dict[str, Any]) -> SamplingParams:
    """Return a task's generation settings as SamplingParams."""
    unknown = dict(settings)
    until = unknown.pop("until", None) or []
    lengths = [value for name in LENGTH_KEYS if (value := unknown.pop(name, None)) is not None]
    samples = unknown.pop("do_sample", False)
    temperature = unknown.pop("temperature", None)
    known = {name: unknown.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")
             if name in unknown}  # fmt: skip
    if unknown:
        names = ", ".join(unknown)
        raise ConfigError(f"--tasks: a task sets {names} for its answers, which is not supported")
    return SamplingParams(
        max_tokens=int(lengths[0]) if lengths else MAX_TOKENS,
        temperature=(1.0 if temperature is None else temperature) if samples else 0.0,
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
        **known,
    )


def _scores(results: dict[str, Any]) -> list[TaskScore]:
    """Convert the harness's results; a task's `acc,none` and `acc_stderr,none` become one score."""
    scores = []
    for task, measures in results["results"].items():
        for key, value in measures.items():
            measure, _, filter_name = key.partition(",")
            if not filter_name or measure.endswith("_stderr"):
                continue
            stderr = measures.get(f"{measure}_stderr,{filter_name}")
            scores.append(
                TaskScore(
                    task=task,
                    measure=measure,
                    filter=filter_name,
                    value=float(value),
                    stderr=None if stderr in (None, "N/A") else float(stderr),
                    questions=results["n-samples"].get(task, {}).get("effective", 0),
                    shots=results["n-shot"].get(task, 0),
                )
            )
    return scores
