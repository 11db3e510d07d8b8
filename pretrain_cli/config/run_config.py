"""RunConfig: every setting of a run, as five frozen sections.

Each field's docstring is what `pretrain guide configuration` shows, so it stands alone: what the
setting does, its unit, and what `auto` or None means. `engine/planning/plan.py` resolves every
`auto` once, at the start of a run.
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
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSettings(BaseModel):
    """The model. Besides these keys, the section takes any field of ModelConfig, by its name in
    config.json, to change it in the named model."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "gemma3"
    """Name of a model (`pretrain guide models`) or path of a YAML file that describes one."""
    init_from: Path | None = None
    """Hugging Face model folder or checkpoint to start from; takes its architecture and weights.
    None draws new weights."""

    @property
    def changes(self) -> dict[str, Any]:
        """ModelConfig fields to change in the named model."""
        return dict(self.model_extra or {})


class DataSettings(Section):
    path: Paths | None = None
    """Tokenized dataset, or another program's `.bin` files (one file, a quoted pattern, a folder).
    A list mixes several, each `PATH` or `PATH:WEIGHT`. None takes the only dataset in `data/`."""
    tokenizer: str | None = None
    """Tokenizer that made the `.bin` files, as for `pretrain tokenize`. A dataset knows its own."""
    seq_len: PositiveInt | Auto = "auto"
    """Tokens in a sample. auto: 512 on a CPU, 1024 elsewhere, at most the model's positions."""
    packing: Literal["concat", "best-fit"] = "concat"
    """`concat` cuts the concatenated documents every `seq_len` tokens. `best-fit` fills samples
    with whole documents and pads the rest."""
    document_mask: bool = False
    """Stops attention at document boundaries. By default tokens attend to the whole sample."""


class OptimizerSettings(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the layers with Muon and everything else with AdamW."""
    learning_rate: Positive | Auto = "auto"
    """Highest learning rate, reached after warm-up. auto: by the model's size."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's term added to the denominator."""
    momentum: Beta = 0.95
    """Muon's momentum."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices, embedding and head included. Norms are not decayed."""
    embedding_rate_scale: Positive = 1.0
    """Factor on the learning rate of the embedding, and of a head tied to it."""
    head_rate_scale: Positive = 1.0
    """Factor on the learning rate of an untied head."""
    norm_rate_scale: Positive = 1.0
    """Factor on the learning rate of the norms."""
    clip: NotNegative = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0 turns clipping off."""
    z_loss: NotNegative = 0.0
    """Weight of the z-loss, the mean of (log Σ exp logits)², added to what is minimized; 1e-4 is
    usual. The logged loss stays the cross entropy."""
    schedule: Literal["cosine", "linear", "wsd", "wsd-sqrt", "constant"] = "cosine"
    """Learning rate after warm-up: falls along a cosine or a line; stays, then falls linearly
    (`wsd`) or as 1 − √ (`wsd-sqrt`); or stays."""
    warmup_steps: Count | Auto = "auto"
    """Steps of linear warm-up. auto: a twentieth of the steps, at most 1000."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps after warm-up in which `wsd` and `wsd-sqrt` decay."""
    final_fraction: Share = 0.1
    """Last learning rate as a share of the highest."""


class TrainSettings(Section):
    steps: PositiveInt | Auto = "auto"
    """Optimizer steps. auto: a few minutes on a CPU, 20 tokens a parameter elsewhere."""
    tokens: Amount | None = None
    """Tokens to train on, such as 5B or 200M, instead of `steps`."""
    tokens_per_step: PositiveInt | Auto = "auto"
    """Tokens in an optimizer step, over all ranks. Gradients are accumulated over as many
    micro-batches as that takes. auto: 262,144 on a GPU, less on a CPU."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples a rank computes at once. auto: the fastest that `pretrain benchmark
    --find-micro-batch` measured on this machine, or the most whose estimated memory fits."""
    seed: Seed = 0
    """Seed of the initial weights and of the data order."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N` or `mps`. auto: `cuda` if there is one, else `cpu`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Sharing of the model among ranks: `ddp` copies it to each, `fsdp` shards weights, gradients
    and optimizer."""
    out: Path | None = None
    """Run folder. None names it after model and dataset, in `runs/`."""
    log_every: PositiveInt | Auto = "auto"
    """Steps between logged lines. auto: 1 on a CPU, 10 elsewhere."""
    eval_every: PositiveInt | Auto = "auto"
    """Steps between evaluations. auto: a fifth of the run, at least 50."""
    eval_tokens: PositiveInt | None = None
    """Validate on the first so many tokens of each validation split. None: on all of them."""
    checkpoint_every: PositiveInt | Auto = "auto"
    """Steps between checkpoints. auto: a fifth of the run, at least 100, at evaluated steps."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep. The last one known to be finite is kept besides."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too."""
    keep_every: PositiveInt | None = None
    """Keep one checkpoint every so many steps for good. None: no others."""
    max_shard_size: Size = "5GB"
    """Largest file of a checkpoint's weights; larger models are split into several."""
    max_time: Duration | None = None
    """Save and stop before the process is this old: 90s, 15m, 3h55m, 1d. Applies to this process
    only; give it again with `--resume`."""
    skip_spikes: Positive | None = None
    """Skip a step whose loss or gradient norm is this many standard deviations above its running
    mean. None skips only steps that are not finite."""
    max_skips: PositiveInt = 10
    """Skipped steps in a row after which the run rolls back to its last finite checkpoint."""
    max_rollbacks: Count = 3
    """Rollbacks after which the run stops."""
    sample_prompts: Texts = ("",)
    """Prompts to sample text from while training: one text or a list."""
    sample_tokens: Count = 100
    """Tokens in each sampled text; 0 samples nothing."""
    log: Trackers = ()
    """Trackers to log to besides `metrics.jsonl`: `tensorboard`, `wandb` or both."""
    sample_every: Count = 0
    """Steps between samples; 0 samples at the end only."""


class SpeedConfig(Section):
    """Speed settings. Each may change rounding and memory, but not what is learned.

    A setting's first value that isn't `auto`, or false, is the plain one: `pretrain benchmark
    --ablate` starts from all of those.
    """

    attention: Literal["auto", "eager", "sdpa", "flex", "blocks"] = "auto"
    """Attention backend: `eager` is the readable definition; `sdpa` PyTorch's fused kernels, with
    sliding windows folded into blocks; `flex` block-sparse kernels, which train on GPUs only;
    `blocks` matrix products over blocks of queries, for CPUs. auto: blocks on a CPU, else sdpa."""
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """Type of activations and matrix products. Weights, gradients and optimizer stay float32.
    auto: bfloat16 if the device multiplies in it, else float32."""
    float32_matmul: Literal["auto", "highest", "high", "medium"] = "auto"
    """Precision of float32 products on a GPU, as in `torch.set_float32_matmul_precision`. auto:
    high (TF32) on a GPU."""
    onednn_matmul: bool | Auto = "auto"
    """Compute float32 products by oneDNN, after a check that they stay float32. auto: on an AMD
    CPU."""
    compile: bool | Auto = "auto"
    """`torch.compile`, block by block. auto: on a GPU."""
    recompute_cheap: bool | Auto = "auto"
    """In compiled blocks, recompute norms, rotations and activations in the backward pass instead
    of keeping them. auto: on a CPU."""
    merged_qkv: bool = True
    """Compute queries, keys and values in one product. They stay separate on disk."""
    merged_gate_up: bool = True
    """Compute gate and up of the MLP in one product. They stay separate on disk."""
    fused_optimizer: bool | Auto = "auto"
    """AdamW in one pass over the parameters. auto: true."""
    chunked_loss: bool = True
    """Compute the loss for a part of the tokens at a time, so that all logits of a large
    vocabulary never exist at once."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, more time."""
    prefetch: bool = True
    """Read the next batch while the current one trains."""
    passive_threads: bool | Auto = "auto"
    """Let waiting OpenMP threads spin briefly and then sleep, so that another program on a core
    costs less. auto: true."""
    keep_freed_memory: bool | Auto = "auto"
    """Keep freed memory for the next step instead of returning it to the kernel. auto: on a CPU
    with glibc."""
    cudnn_benchmark: bool | Auto = "auto"
    """Let cuDNN time its convolutions. auto: false, as these models have none."""
    expandable_segments: bool | Auto = "auto"
    """Let the CUDA allocator grow its segments: less memory lost to fragments. auto: on a GPU."""
    deterministic: bool = False
    """Sum in the same order every time, on a GPU too. Slower there; operations without a
    deterministic kernel are refused."""


class RunConfig(Section):
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    speed: SpeedConfig = SpeedConfig()
