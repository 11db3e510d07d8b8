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
    SpeedSetting,
    Stages,
    Texts,
    Trackers,
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSettings(BaseModel):
    """Settings of the model. Any field of ModelConfig, by its name in config.json, is also a key of
    this section; it changes that field of the named model."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "gemma3"
    """Name of a model (`pretrain guide models`) or path of a YAML file that describes one."""
    init_from: Path | None = None
    """Hugging Face model folder or checkpoint to start from; takes its architecture and weights.
    None draws new weights."""
    initialization: Literal["width", "normal", "gpt2"] = "width"
    """New weights. `normal`: every matrix with the standard deviation `initializer_range`. `gpt2`:
    like it, but the matrices that add to the residual stream (the last of attention and MLP) by a
    factor of 1 / √(2 layers) smaller. `width`: these are 0, and the others of the layers have a
    standard deviation of 1 / √columns, in the MLP 0.4 / √columns."""

    @property
    def changes(self) -> dict[str, Any]:
        """ModelConfig fields to change in the named model."""
        return dict(self.model_extra or {})


class DataSettings(Section):
    path: Paths | None = None
    """Tokenized dataset, or another program's `.bin` files (one file, a quoted pattern, a folder).
    A list mixes several, each `PATH` or `PATH:WEIGHT`. None takes the only dataset in `data/`."""
    tokenizer: str | None = None
    """Tokenizer that made the `.bin` files, as for `pretrain tokenize`. A tokenized dataset names
    its own."""
    seq_len: PositiveInt | Auto = "auto"
    """Tokens in a sample. auto: 512 on a CPU, 1024 elsewhere, but at most the model's positions and
    the shortest dataset."""
    packing: Literal["concat", "best-fit"] = "concat"
    """`concat` cuts the concatenated documents every `seq_len` tokens. `best-fit` fills samples
    with whole documents and pads the rest."""
    stages: Stages = ()
    """Later parts of the run, each `{after: TOKENS, path: …, seq_len: …}`: after so many tokens of
    the run, it goes on with these datasets and weights, with samples of this length (a multiple of
    `data.seq_len`), or with both."""
    max_epochs: Positive | None = None
    """Most times that a dataset is read. One that has been read so often leaves the mixture, and
    the others take its place."""
    document_mask: bool = False
    """Stops attention at document boundaries. By default tokens attend to the whole sample."""


class OptimizerSettings(Section):
    name: Literal["adamw", "muon"] | Auto = "auto"
    """`muon` updates the matrices of the layers with Muon and everything else with AdamW. auto:
    muon, or adamw where `train.parallel` is `fsdp`."""
    learning_rate: Positive | Auto = "auto"
    """Highest learning rate, reached after warm-up: that of the matrices of the layers. auto: by
    the model's width and the batch."""
    embedding_rate_scale: Positive | Auto = "auto"
    """Factor on the learning rate for the embedding, and a head tied to it. auto: by the model's
    width."""
    head_rate_scale: Positive | Auto = "auto"
    """Factor on the learning rate for an untied head. auto: by the model's width."""
    norm_rate_scale: Positive = 1.0
    """Factor on the learning rate for the norms."""
    betas: tuple[Beta, Beta] = (0.8, 0.96)
    """AdamW's decay rates of the first and second moments."""
    eps: Positive = 1e-10
    """Term that AdamW adds to the denominator."""
    momentum: Beta = 0.97
    """Muon's momentum."""
    momentum_start: Beta | None = 0.85
    """Muon's momentum at the first step. None: the same as later."""
    momentum_end: Beta | None = 0.9
    """Muon's momentum at the last step, approached as the learning rate decays. None: the same as
    before."""
    momentum_warmup_steps: Count = 400
    """Steps in which the momentum goes from `momentum_start` to `momentum`."""
    muon_polynomial: Literal["polar-express", "quintic"] = "polar-express"
    """Polynomials of Muon's five iterations: one optimal for each (Polar Express), or the same for
    all (Jordan)."""
    muon_row_scaling: bool = False
    """Scale the rows of Muon's momentum to equal norms before it is made orthogonal."""
    muon_beta2: Beta = 0.9
    """Decay rate of the mean square of each row of Muon's updates, by whose root the row is divided
    (NorMuon). 0: off."""
    muon_cautious_decay: bool = True
    """Decay a weight of Muon's only where the update makes it smaller as well."""
    weight_decay: NotNegative | Auto = "auto"
    """Decoupled weight decay of the matrices of the layers. Norms are not decayed. auto: by the
    tokens for each parameter, the steps and the learning rate."""
    embedding_decay_scale: NotNegative = 0.0
    """Factor on the weight decay for embedding and head."""
    weight_decay_schedule: Literal["constant", "cosine"] = "cosine"
    """Weight decay over the run, besides its product with the learning rate. `cosine`: falls to
    0."""
    clip: NotNegative = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0 turns clipping off."""
    z_loss: NotNegative = 0.0
    """Weight of the z-loss, the mean of (log Σ exp logits)², in the training objective; 1e-4 is
    usual. The logged loss stays the cross entropy."""
    schedule: Literal["cosine", "linear", "wsd", "wsd-sqrt", "constant"] = "wsd"
    """Learning rate after warm-up. `cosine`, `linear`: falls along that curve. `wsd`, `wsd-sqrt`:
    stays, then falls linearly or as 1 − √. `constant`: stays."""
    warmup_steps: Count | Auto = "auto"
    """Steps of linear warm-up. auto: a twentieth of the steps, at most 1000."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Share of the steps after warm-up in which `wsd` and `wsd-sqrt` decay."""
    final_fraction: Share = 0.0
    """Last learning rate as a share of the highest."""


class TrainSettings(Section):
    steps: PositiveInt | Auto = "auto"
    """Optimizer steps. auto: a few minutes on a CPU, 20 tokens a parameter elsewhere."""
    tokens: Amount | None = None
    """Tokens to train on, such as 5B or 200M, instead of `steps`."""
    tokens_per_step: PositiveInt | Auto = "auto"
    """Tokens in an optimizer step, over all ranks. Gradients are accumulated over the micro-batches
    of a step. auto: by the tokens of the run (`pretrain guide recipe`)."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Samples that a rank computes at once. auto: the fastest size that `pretrain benchmark
    --find-micro-batch` measured on this machine, else the largest whose estimated memory fits."""
    seed: Seed = 0
    """Seed of the initial weights and of the data order."""
    device: str = "auto"
    """Device: `cpu`, `cuda`, `cuda:N` or `mps`. auto: `cuda` if there is one, else `cpu`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Distribution of the model over the ranks: `ddp` copies it to each rank, `fsdp` shards
    weights, gradients and optimizer state."""
    out: Path | None = None
    """Run folder. None: a folder in `runs/`, named after model and dataset."""
    log_every: PositiveInt | Auto = "auto"
    """Steps between logged lines. auto: 1 on a CPU, 10 elsewhere."""
    eval_every: PositiveInt | Auto = "auto"
    """Steps between evaluations. auto: a fifth of the run, at least 50."""
    eval_tokens: PositiveInt | None = None
    """Tokens to validate on, from the start of each validation split. None: all of them."""
    checkpoint_every: PositiveInt | Auto = "auto"
    """Steps between checkpoints. auto: a fifth of the run, at least 100, at evaluated steps."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints to keep. The last one known to be finite is also kept."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that are kept permanently. None keeps no others."""
    max_shard_size: Size = "5GB"
    """Largest file of a checkpoint's weights; larger models are split into several."""
    max_time: Duration | None = None
    """Age of the process before which it saves and stops: 90s, 15m, 3h55m, 1d. Applies to this
    process only; give it again with `--resume`."""
    skip_spikes: Positive | None = None
    """Standard deviations above the running mean of the loss or gradient norm at which a step is
    skipped. None skips only steps that are not finite."""
    max_skips: PositiveInt = 10
    """Skipped steps in a row after which the run rolls back to its last finite checkpoint."""
    max_rollbacks: Count = 3
    """Rollbacks after which the run stops."""
    sample_prompts: Texts = ("",)
    """Prompts that the model continues with sampled text during training: one text or a list."""
    sample_tokens: Count = 100
    """Tokens in each sampled text; 0 turns sampling off."""
    log: Trackers = ()
    """Trackers to log to in addition to `metrics.jsonl`: `tensorboard`, `wandb` or both."""
    sample_every: Count = 0
    """Steps between samples; 0 samples only at the end."""


class SpeedConfig(Section):
    """Speed settings. Each may change rounding and memory, but not what the model learns.

    A setting's plain value is false, or its first choice other than `auto`. `pretrain benchmark
    --ablate` starts from the plain values.

    A field says here what else depends on it; `engine/runtime/speed.py` says what `auto` becomes.
    """

    @classmethod
    def about(cls, name: str) -> SpeedSetting:
        """Return what depends on a setting."""
        found = [m for m in cls.model_fields[name].metadata if isinstance(m, SpeedSetting)]
        return found[0] if found else SpeedSetting()

    @classmethod
    def names(cls, fact: str) -> tuple[str, ...]:
        """Return the settings for which this field of SpeedSetting is true."""
        return tuple(name for name in cls.model_fields if getattr(cls.about(name), fact))

    attention: Annotated[
        Literal["auto", "eager", "sdpa", "blocks", "flex", "varlen"],
        SpeedSetting(decides_micro_batch=True, is_announced=True, on_any_gpu="varlen"),
    ] = "auto"
    """Attention backend. `eager`: the readable reference. `sdpa`: PyTorch's fused kernels, with
    sliding windows folded into blocks. `blocks`: matrix products over blocks of queries, for CPUs.
    `flex`: block-sparse kernels, which train on GPUs only. `varlen`: FlashAttention's kernels for
    windows and documents, in bfloat16 on NVIDIA GPUs. auto: blocks on a CPU; varlen on a GPU, or
    flex in float32; sdpa elsewhere."""
    flash_attention: Annotated[
        Literal["auto", "fa2", "fa3", "fa4"], SpeedSetting(is_process_wide=True)
    ] = "auto"
    """FlashAttention kernels of `sdpa`, `flex` (fa4) and `varlen` on a GPU. `fa2`: those in
    PyTorch. `fa3`, `fa4`: those of the package flash-attn-3 or flash-attn-4, if it is installed.
    auto: fa2."""
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float8"],
        SpeedSetting(decides_micro_batch=True, is_announced=True, on_any_gpu="bfloat16"),
    ] = "auto"
    """Type of activations and matrix products. Weights, gradients and optimizer state stay
    float32. auto: bfloat16 if the device multiplies in it, else float32."""
    float32_matmul: Annotated[
        Literal["auto", "highest", "high", "medium"], SpeedSetting(is_process_wide=True)
    ] = "auto"
    """Precision of float32 products on a GPU, as in `torch.set_float32_matmul_precision`. auto:
    high (TF32) on a GPU."""
    onednn_matmul: Annotated[
        bool | Auto, SpeedSetting(is_process_wide=True, decides_micro_batch=True)
    ] = "auto"
    """Compute float32 products with oneDNN, after a check that they stay float32. auto: on an AMD
    CPU."""
    compile: Annotated[
        bool | Auto, SpeedSetting(decides_micro_batch=True, is_announced=True, on_any_gpu=True)
    ] = "auto"
    """Compile each block with `torch.compile`. auto: on a GPU."""
    cuda_graphs: Annotated[bool, SpeedSetting(decides_micro_batch=True)] = False
    """Launch each compiled block as one CUDA graph: for small models and micro-batches, whose
    kernels are shorter than their launches. Gradients stay in memory between steps. One NVIDIA GPU
    only, and not with `activation_checkpointing`."""
    recompute_cheap: Annotated[bool | Auto, SpeedSetting(on_any_gpu=False)] = "auto"
    """Recompute norms, rotations and activations of compiled blocks in the backward pass instead
    of keeping them. auto: on a CPU."""
    merged_qkv: bool = True
    """Compute queries, keys and values in one product. Their weights stay separate on disk."""
    merged_gate_up: bool = True
    """Compute gate and up of the MLP in one product. Their weights stay separate on disk."""
    fused_optimizer: Annotated[bool | Auto, SpeedSetting(on_any_gpu=True)] = "auto"
    """Run AdamW in one pass over the parameters. auto: true."""
    chunked_loss: Annotated[
        bool | Literal["torch", "liger", "cce"], SpeedSetting(decides_micro_batch=True)
    ] = True
    """Compute the loss for a part of the tokens at a time, so that the logits of all tokens never
    exist at once. A name trains with another library's loss, to compare: `torch`
    (`F.linear_cross_entropy`, from torch 2.13 on), `liger` (liger-kernel), `cce`
    (cut-cross-entropy). These have no z-loss."""
    activation_checkpointing: Annotated[bool, SpeedSetting(decides_micro_batch=True)] = False
    """Recompute each block's activations in the backward pass: less memory, more time."""
    prefetch: Annotated[
        bool,
        SpeedSetting(
            not_in_a_step="it reads the next batch during a step, and here no batch is read"
        ),
    ] = True
    """Read the next batch while the current one trains."""
    passive_threads: Annotated[bool | Auto, SpeedSetting(is_process_wide=True)] = "auto"
    """Let waiting OpenMP threads spin briefly and then sleep, so that other programs on the same
    cores cost less time. auto: true."""
    keep_freed_memory: Annotated[
        bool | Auto, SpeedSetting(is_process_wide=True, on_any_gpu=False)
    ] = "auto"
    """Keep freed memory for the next step instead of returning it to the kernel. auto: on a CPU
    with glibc."""
    cudnn_benchmark: Annotated[bool | Auto, SpeedSetting(is_process_wide=True)] = "auto"
    """Let cuDNN time its convolution kernels and take the fastest. auto: false, because these
    models have no convolutions."""
    expandable_segments: Annotated[bool | Auto, SpeedSetting(is_process_wide=True)] = "auto"
    """Let the CUDA allocator grow its segments, which reduces fragmentation. auto: on a GPU."""
    deterministic: Annotated[bool, SpeedSetting(is_process_wide=True)] = False
    """Use deterministic kernels, on a GPU too: sums run in the same order every time. Slower on a
    GPU; operations without a deterministic kernel are refused."""


class RunConfig(Section):
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    speed: SpeedConfig = SpeedConfig()
