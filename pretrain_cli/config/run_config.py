"""RunConfig: everything that can be set about a run, checked, from YAML, `--set` and flags.

    defaults  <  --config FILE  <  flags and --set section.name=value

`engine/planning/plan.py` resolves every `auto` once, at the start of a run, and the run says what
each became.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
)

from pretrain_cli.config.setting_types import (
    Amount,
    Auto,
    Beta,
    Count,
    Duration,
    NotNegative,
    Paths,
    Positive,
    PositiveInt,
    Seed,
    Share,
    Size,
    Texts,
    Trackers,
)  # fmt: skip
from pretrain_cli.errors import ConfigError, did_you_mean
from pretrain_cli.model.config import FIELDS, ModelConfig, variant
from pretrain_cli.model.presets import PRESETS, full_name, preset


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(BaseModel):
    """The model: a name or a YAML file, and any number of ModelConfig to change in it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "gemma3"
    init_from: Path | None = None
    """A Hugging Face model folder or a checkpoint to take architecture and weights from."""

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSettings(Section):
    path: Paths | None = None
    """A tokenized dataset, or other programs' .bin files: one, a pattern of them, or their folder.
    Or several of these, each PATH or PATH:WEIGHT. The only dataset in data/ where none is named."""
    tokenizer: str | None = None
    """What made the .bin files, as `pretrain tokenize` takes it; a dataset knows its own."""
    seq_len: PositiveInt | Auto = "auto"
    packing: Literal["concat", "best-fit"] = "concat"
    """Samples are windows on the tokens in a row; or whole documents, packed and padded."""
    document_mask: bool = False
    """Whether a token sees those of its own document alone, and not the others in its sample."""


class OptimizerSettings(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the layers; what else there is has AdamW."""
    learning_rate: Positive | Auto = "auto"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    momentum: Beta = 0.95
    """Muon's."""
    weight_decay: NotNegative = 0.1
    """On matrices, the embedding and the head among them; norms are not decayed."""
    embedding_rate_scale: Positive = 1.0
    """Times the learning rate, for the embedding, and for the head where it is tied to it."""
    head_rate_scale: Positive = 1.0
    norm_rate_scale: Positive = 1.0
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 leaves gradients alone."""
    z_loss: NotNegative = 0.0
    """Times the mean of (log Σ exp logits)², minimized beside the loss; 1e-4 is usual. The loss
    that is logged stays the cross entropy."""
    schedule: Literal["cosine", "linear", "wsd", "wsd-sqrt", "constant"] = "cosine"
    """After warm-up: down a cosine or a line; constant and then down, linearly or as 1 − √;
    or constant."""
    warmup_steps: Count | Auto = "auto"
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The share of the steps after warm-up in which wsd and wsd-sqrt decay."""
    final_fraction: Share = 0.1
    """The last learning rate, as a share of the highest."""


class TrainSettings(Section):
    steps: PositiveInt | Auto = "auto"
    tokens: Amount | None = None
    """Train on this many tokens, as 5B or 200M; instead of steps."""
    tokens_per_step: PositiveInt | Auto = "auto"
    """On all ranks; what the micro-batch leaves is accumulated."""
    micro_batch_size: PositiveInt | Auto = "auto"
    seed: Seed = 0
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share a model: a copy each, or a part each."""
    out: Path | None = None
    log_every: PositiveInt | Auto = "auto"
    eval_every: PositiveInt | Auto = "auto"
    eval_tokens: PositiveInt | None = None
    """Validate on the first so many tokens of each validation split; else on all."""
    checkpoint_every: PositiveInt | Auto = "auto"
    keep_checkpoints: PositiveInt = 2
    """The newest so many. The last one known finite stays, whatever else is kept."""
    keep_best: bool = True
    """And the one with the lowest validation loss, of those saved at a step that was evaluated."""
    keep_every: PositiveInt | None = None
    """And one every so many steps."""
    max_shard_size: Size = "5GB"
    """A checkpoint's weights are in several files where they are more."""
    max_time: Duration | None = None
    """Save and stop before the process is so old: 90s, 15m, 3h55m, 1d. Of that process alone: a
    run that is resumed has the limit that it is given then."""
    skip_spikes: Positive | None = None
    """Skip a step whose loss or gradient norm is so many standard deviations above its mean."""
    max_skips: PositiveInt = 10
    """After so many skipped steps in a row, go back to the last checkpoint known to be finite."""
    max_rollbacks: Count = 3
    """Go back so often; then stop."""
    sample_prompts: Texts = ("",)
    """What text is sampled from, each time; or a single one."""
    sample_tokens: Count = 100
    """Length of the texts; 0 for none."""
    log: Trackers = ()
    """tensorboard, wandb or both: where the numbers go besides metrics.jsonl."""
    sample_every: Count = 0
    """Steps from one time to the next; 0 for the end alone."""


class SpeedConfig(Section):
    """How fast, never what: each may change rounding and memory, none what is learned.

    Of a setting's values the first that isn't auto, or false, is the plain one; `pretrain benchmark
    --ablate` begins with all of those.
    """

    attention: Literal["auto", "eager", "sdpa", "flex", "blocks"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    float32_matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    onednn_matmul: bool | Auto = "auto"
    compile: bool | Auto = "auto"
    recompute_cheap: bool | Auto = "auto"
    merged_qkv: bool = True
    merged_gate_up: bool = True
    fused_optimizer: bool | Auto = "auto"
    chunked_loss: bool = True
    activation_checkpointing: bool = False
    prefetch: bool = True
    passive_threads: bool | Auto = "auto"
    keep_freed_memory: bool | Auto = "auto"
    huge_pages: bool | Auto = "auto"
    cudnn_benchmark: bool | Auto = "auto"
    expandable_segments: bool | Auto = "auto"
    deterministic: bool = False


class RunConfig(Section):
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    speed: SpeedConfig = SpeedConfig()


def build_config(
    base: dict[str, Any], flags: dict[str, Any], assignments: Iterable[str]
) -> RunConfig:
    """A RunConfig from a file's tree, flags by dotted name (None where not given) and `a.b=c`."""
    tree = {name: dict(section) for name, section in base.items()}
    given = {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name.count(".") != 1:
            raise ConfigError(f"--set {assignment}: not of the form section.name=value")
        try:
            given[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {assignment}: '{text}' is not a YAML value") from None
    # one of the two says how long a run is: what is asked for here stands in for the file's other
    for name, other in (("steps", "tokens"), ("tokens", "steps")):
        if f"train.{name}" in given and f"train.{other}" not in given:
            tree.get("train", {}).pop(other, None)
    for name, value in given.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return check_config(tree)


def check_config(tree: dict[str, Any]) -> RunConfig:
    """The tree as a RunConfig, or one line about the first thing that is wrong with it."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as failure:
        raise ConfigError(_first_fault(failure)) from None
    if config.train.tokens is not None and config.train.steps != "auto":
        raise ConfigError(
            f"train.tokens: {config.train.tokens} and train.steps: {config.train.steps} are both "
            "given; give one of them"
        )
    if config.train.sample_every and not config.train.sample_tokens:
        raise ConfigError(
            f"train.sample_every: {config.train.sample_every} is how often to sample, and "
            "train.sample_tokens is 0; give it a length, or leave sample_every out"
        )
    _refuse_unused(config.optimizer)
    return config


def _refuse_unused(optimizer: OptimizerSettings) -> None:
    """Refuse a setting that was changed and that another one leaves without a meaning."""
    schedule = optimizer.schedule
    for setting, is_used, reason in (
        ("momentum", optimizer.name == "muon", f"optimizer.name '{optimizer.name}'"),
        ("decay_fraction", schedule.startswith("wsd"), f"optimizer.schedule '{schedule}'"),
        ("final_fraction", schedule != "constant", f"optimizer.schedule '{schedule}'"),
    ):
        value = getattr(optimizer, setting)
        if not is_used and value != OptimizerSettings.model_fields[setting].default:
            raise ConfigError(
                f"optimizer.{setting}: {value} has no meaning with {reason}; leave it out"
            )


def read_config(name: str) -> dict[str, Any]:
    """The tree of a run's YAML file: a path, or the name of one that ships with the package."""
    path = Path(name)
    if not path.is_file():
        shipped = {file.stem: file for file in _shipped_configs()}
        if name not in shipped:
            raise ConfigError(
                f"--config: no file '{name}', and none of the built-in ones "
                f"({', '.join(shipped)}) is called that{did_you_mean(name, shipped)}"
            )
        path = shipped[name]
    tree = read_yaml(path)
    for section, values in tree.items():
        if section not in RunConfig.model_fields:
            known = ", ".join(RunConfig.model_fields)
            raise ConfigError(f"{path}: {section}: no such section; there are {known}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section}: {values!r} is not a section of settings")
    return tree


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({said}); mend it") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no settings; give a mapping of section to settings")
    return tree


def find_model(settings: ModelSettings) -> tuple[str, ModelConfig]:
    """(a short name, the ModelConfig) that a run's settings ask for, changes applied."""
    if settings.name.endswith((".yaml", ".yml")):
        name, config = Path(settings.name).stem, _model_file(Path(settings.name))
    else:
        name, config = full_name(settings.name), preset(settings.name)
    return name, variant(config, settings.changes)


def _model_file(path: Path) -> ModelConfig:
    """A model from a YAML file: `base: NAME` and what differs from it, or every field."""
    if not path.is_file():
        raise ConfigError(f"model: no file {path}; give a YAML file or one of {', '.join(PRESETS)}")
    tree = read_yaml(path)
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: {base!r} is not a model; give a name")
        return variant(preset(base), tree)
    missing = sorted(set(FIELDS) - set(tree))
    if missing:
        raise ConfigError(
            f"{path}: {missing[0]} is missing; state every number of the model, or start from a "
            "known one with 'base: NAME'"
        )
    return variant(preset("gemma3-tiny"), tree)


def _shipped_configs() -> list[Path]:
    """The YAML files in configs/: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent.parent
    for folder in (here / "configs", here.parent / "configs"):
        if folder.is_dir():
            return sorted(folder.glob("*.yaml"))
    return []


def _first_fault(failure: ValidationError) -> str:
    """`section.name: value is wrong; do this`, from pydantic's report."""
    fault = failure.errors()[0]
    path = [str(part) for part in fault["loc"]]
    fields: dict[str, Any] = RunConfig.model_fields
    if path[0] not in fields:
        return f"{path[0]}: no such section; there are {', '.join(fields)}"
    section = fields[path[0]].annotation
    if len(path) > 1 and path[1] not in section.model_fields:
        known = [f"{path[0]}.{name}" for name in section.model_fields]
        name = ".".join(path[:2])
        return f"{name}: no such setting{did_you_mean(name, known)}"
    value = fault["input"]
    shown = f"'{value}'" if isinstance(value, str) else repr(value)
    # A union reports each of its branches; together they say what is taken.
    branches: list[Any] = [e for e in failure.errors() if e["loc"][:2] == fault["loc"][:2]]
    taken = dict.fromkeys(_taken(branch) for branch in branches)
    words = [b["ctx"]["expected"] for b in branches if b["type"] == "literal_error"]
    near = did_you_mean(str(value), re.findall(r"'(\w+)'", " ".join(words)))
    return f"{'.'.join(path[:2])}: {shown} is not {' or '.join(taken)}{near}"


def _taken(branch: Any) -> str:
    """What one branch of a setting's type takes, in words."""
    if branch["type"] == "literal_error":
        choices = branch["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {choices}" if "," in choices else choices
    if branch["type"] in ("missing", "too_long"):
        return "a pair of numbers"  # of betas, the one setting of several values
    kind, _, how = branch["type"].partition("_")
    if how in ("parsing", "type", "from_float"):
        names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        return names.get(kind, f"a {kind}")
    return branch["msg"].removeprefix("Input should be ")
