"""RunConfig: everything that can be set about a run, checked, from YAML, `--set` and flags.

    defaults  <  --config FILE  <  flags and --set section.name=value

`engine/planning/plan.py` resolves every `auto` once, at the start of a run, and the run says what
each became.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
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
