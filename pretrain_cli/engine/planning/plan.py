"""What a run will do, decided before its first second of compute: every `auto` becomes a number,
and whatever can't work is refused.

    data.path               the only dataset in data/, or a demo of Python's own sources
    model.vocab_size        the published one where the dataset's tokenizer is the model's own,
                            else the tokenizer's, up to a multiple of 64
    data.seq_len            512 on a CPU, 1024 on a GPU
    train.tokens_per_step   on a CPU 1 to 8 sequences, fewer for a larger model; on a GPU 262,144
    train.steps             on a CPU a few minutes' worth; on a GPU 20 tokens a parameter
    train.micro_batch_size  the fastest measured here, or what an estimate of the memory admits
    learning_rate           by the model's size, as GPT-3's table has it
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.planning.data_and_model import find_architecture, find_data, fit_to_data
from pretrain_cli.engine.planning.memory_estimate import StepShape, estimate, speed_settings
from pretrain_cli.engine.planning.micro_batch import (
    MicroBatch,
    choose_micro_batch,
    measured,
    memory_here,
    recall,
)
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.engine.runs.run_yaml import RunRecord
from pretrain_cli.engine.runs.trackers import check_trackers
from pretrain_cli.engine.runtime.distributed import Ranks, device_name
from pretrain_cli.engine.runtime.speed import Speed, resolve_speed
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import counting
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import LossWeights

CPU_RUN_FLOPS = 1.2e13
CPU_STEPS = 400
CPU_SEQUENCES = 8
GPU_TOKENS_PER_STEP = 2**18


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run with nothing left open. `settings` holds no `auto` outside of the speed settings."""

    settings: RunConfig
    name: str
    model: ModelConfig
    data: Mixture
    speed: Speed
    seq_len: int
    micro_batch_size: int
    micro_batch_reason: str
    """Why it is that; empty where it was asked for."""
    samples_per_step: int
    steps: int
    learning_rate: float
    warmup_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    @property
    def tokens_per_step(self) -> int:
        return self.samples_per_step * self.seq_len

    @property
    def coefficients(self) -> LossWeights | None:
        """Of what is minimized beside the cross entropy, where there is anything, or experts."""
        z_loss = self.settings.optimizer.z_loss
        if not z_loss and not self.model.num_experts:
            return None
        return LossWeights(z_loss, self.model.router_aux_loss_coef)


def make_plan(
    settings: RunConfig,
    ranks: Ranks,
    emit: Emit,
    stop: StopRequest,
    *,
    resumed: RunRecord | None = None,
) -> Plan:
    """Decide everything. A resumed run has its model, and on the same machine its micro-batch."""
    model = resumed.model if resumed else None
    check_trackers(settings.train.log)
    speed = resolve_speed(settings.speed, ranks.device)
    name, config = find_architecture(settings, model)
    mixture = find_data(settings, ranks, emit, stop)
    if settings.train.eval_tokens is not None:
        mixture = mixture.validated_on(settings.train.eval_tokens)
    if model is None:
        config = fit_to_data(config, settings, mixture, emit)
    if config.num_experts and not config.router_aux_loss_coef:
        emit(Notice("Experts are trained without a balancing loss, and may come to be unused"))
    if settings.optimizer.name == "muon" and settings.train.parallel == "fsdp":
        raise ConfigError(
            "optimizer.name: 'muon' makes whole matrices orthogonal, and train.parallel 'fsdp' "
            "leaves each rank a part of them; use adamw, or ddp"
        )
    if config.tie_word_embeddings and settings.optimizer.head_rate_scale != 1:
        raise ConfigError(
            f"optimizer.head_rate_scale: {settings.optimizer.head_rate_scale:g}, and this model's "
            "head is its embedding; set embedding_rate_scale"
        )
    train, data, optimizer = settings.train, settings.data, settings.optimizer
    on_cpu = ranks.device.type == "cpu"

    for prompt in train.sample_prompts if train.sample_tokens else ():
        length = len(mixture.tokenizer.encode_prompt(prompt))
        positions = config.max_position_embeddings
        if length >= positions:
            raise ConfigError(
                f"train.sample_prompts: '{prompt[:30]}…' has {length:,} tokens, and the model "
                f"{positions:,} positions; shorten it"
            )

    seq_len = _seq_len(data.seq_len, config, mixture, on_cpu)
    flops = counting.training_flops(config, seq_len).exact
    samples = _samples_per_step(settings, ranks, seq_len, flops, on_cpu)
    micro = _micro_batch_size(settings, ranks, config, seq_len, samples, speed, resumed)
    per_step = samples * seq_len

    parameters = counting.count_parameters(config)
    steps = train.steps
    if train.tokens is not None:
        steps = math.ceil(train.tokens / per_step)
    elif steps == "auto" and on_cpu:
        steps = min(4 * CPU_STEPS, max(20, round(CPU_RUN_FLOPS / (flops * per_step))))
        emit(
            Notice(
                f"{steps} steps: a few minutes on a CPU; --steps or --tokens sets it, and --resume "
                "with more steps goes on"
            )
        )
    elif steps == "auto":
        steps = max(20, math.ceil(counting.suggested_tokens(config) / per_step))
        emit(Notice(f"{steps:,} steps: 20 tokens a parameter; --steps or --tokens sets it"))

    eval_every = _interval(train.eval_every, steps, at_least=50)
    rate = optimizer.learning_rate
    if rate == "auto":
        rate = suggested_learning_rate(parameters.active - parameters.embeddings)
    warmup = optimizer.warmup_steps
    warmup = min(1000, max(1, steps // 20)) if warmup == "auto" else warmup
    choices = {
        "seq-len": (data.seq_len, f"{seq_len:,}"),
        "micro-batch": (train.micro_batch_size, f"{micro.size} ({micro.reason})"),
        "tokens a step": (train.tokens_per_step, f"{per_step:,}"),
        "learning rate": (optimizer.learning_rate, f"{rate:g}"),
        **{
            name.replace("_", " "): (d.asked, f"{d.in_force} ({d.reason})")
            for name, d in speed.decisions.items()
            if name in ("dtype", "attention", "compile")
        },
    }
    chosen = [f"{name} {value}" for name, (asked, value) in choices.items() if asked == "auto"]
    if chosen:
        emit(Notice(f"Chosen: {', '.join(chosen)}"))
    return Plan(
        settings=settings,
        name=name,
        model=config,
        data=mixture,
        speed=speed,
        seq_len=seq_len,
        micro_batch_size=micro.size,
        micro_batch_reason=micro.reason,
        samples_per_step=samples,
        steps=steps,
        learning_rate=rate,
        warmup_steps=warmup,
        log_every=(1 if on_cpu else 10) if train.log_every == "auto" else train.log_every,
        eval_every=eval_every,
        checkpoint_every=_checkpoint_every(train.checkpoint_every, steps, eval_every),
    )


def resolved(plan: Plan) -> RunConfig:
    """The settings with the plan's numbers in the place of every `auto` that a resumed run must
    not decide anew, for run.yaml. The micro-batch is the machine's, and is."""
    tree: dict[str, Any] = plan.settings.model_dump()
    asked = [source.asked for source in plan.data.sources]
    tree["data"] |= {"path": asked, "seq_len": plan.seq_len}
    tree["optimizer"] |= {
        "learning_rate": plan.learning_rate,
        "warmup_steps": plan.warmup_steps,
    }
    tree["train"] |= {
        "steps": plan.steps,
        "tokens": None,
        "tokens_per_step": plan.tokens_per_step,
        "eval_every": plan.eval_every,
        "checkpoint_every": plan.checkpoint_every,
    }
    return RunConfig.model_validate(tree)


def _seq_len(asked: int | str, config: ModelConfig, data: Mixture, on_cpu: bool) -> int:
    shortest = min(data.trained_on, key=lambda source: len(source.dataset.train.tokens))
    tokens = len(shortest.dataset.train.tokens)
    if asked == "auto":
        asked = max(1, min(512 if on_cpu else 1024, config.max_position_embeddings, tokens - 1))
    assert isinstance(asked, int)
    if asked > config.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len: {asked:,} is beyond the model's {config.max_position_embeddings:,} "
            "positions; give less, or --set model.max_position_embeddings"
        )
    if asked >= tokens:
        raise ConfigError(
            f"data.seq_len: {asked:,} is beyond the dataset {shortest.name}, whose training split "
            f"has {tokens:,} tokens; give at most {max(tokens - 1, 0):,}, or more text"
        )
    return asked


def _samples_per_step(
    settings: RunConfig, ranks: Ranks, seq_len: int, flops: float, on_cpu: bool
) -> int:
    """Sequences a step, on all ranks."""
    asked, micro = settings.train.tokens_per_step, settings.train.micro_batch_size
    unit = ranks.world_size * (1 if micro == "auto" else micro)
    if asked != "auto":
        sequences, rest = divmod(asked, seq_len)
        if rest or sequences % unit or not sequences:
            parts = f"micro-batch {unit // ranks.world_size} × seq-len {seq_len}" + (
                f" × {ranks.world_size} ranks" if ranks.world_size > 1 else ""
            )
            below = max(asked // (unit * seq_len), 1) * unit * seq_len
            raise ConfigError(
                f"train.tokens_per_step: {asked:,} is not a multiple of {unit * seq_len:,} "
                f"({parts}); give for example {below:,}"
            )
        return sequences
    if on_cpu:
        # For about CPU_STEPS steps; a power of two, so that a smaller micro-batch divides it.
        affordable = max(1.0, CPU_RUN_FLOPS / CPU_STEPS / (flops * seq_len))
        sequences = min(CPU_SEQUENCES, 2 ** int(math.log2(affordable)))
    else:
        sequences = max(1, GPU_TOKENS_PER_STEP // seq_len)
    return math.ceil(sequences / unit) * unit


def _micro_batch_size(
    settings: RunConfig,
    ranks: Ranks,
    config: ModelConfig,
    seq_len: int,
    samples_per_step: int,
    speed: Speed,
    resumed: RunRecord | None,
) -> MicroBatch:
    """Sequences a rank takes at once."""
    share, rest = divmod(samples_per_step, ranks.world_size)
    if rest:
        raise ConfigError(
            f"train.tokens_per_step: its {samples_per_step} sequences don't divide among "
            f"{ranks.world_size} ranks; give a multiple of {ranks.world_size * seq_len:,}"
        )
    asked, train = settings.train.micro_batch_size, settings.train
    if asked != "auto":
        return MicroBatch(asked, "")

    def bytes_of(size: int) -> int:
        return estimate(
            StepShape(
                model=config,
                seq_len=seq_len,
                micro_batch_size=size,
                is_accumulated=size < share,
                document_mask=settings.data.document_mask,
                device=ranks.device.type,
                optimizer=settings.optimizer.name,
                parallel=train.parallel if ranks.world_size > 1 else "alone",
                ranks=ranks.world_size,
                **speed_settings(speed),
            )
        ).peak

    machine = device_name(ranks.device)
    in_force = {name: decision.in_force for name, decision in speed.decisions.items()}
    had = resumed.micro_batch_size if resumed and resumed.machine == machine else None
    rates = recall(measured(machine, config, seq_len, in_force, {}))
    choice = choose_micro_batch(share, bytes_of, memory_here(ranks.device), had=had, rates=rates)
    return replace(choice, size=ranks.min(choice.size))


def _interval(asked: int | str, steps: int, *, at_least: int) -> int:
    """Every so many steps: a fifth of the run, but not more often than makes sense."""
    return max(at_least, math.ceil(steps / 5)) if asked == "auto" else int(asked)


def _checkpoint_every(asked: int | str, steps: int, eval_every: int) -> int:
    """A fifth of the run, up to a step that is evaluated, so that the best can be told."""
    every = _interval(asked, steps, at_least=100)
    if asked != "auto" or eval_every > every:
        return every
    return math.ceil(every / eval_every) * eval_every


def suggested_learning_rate(parameters: int) -> float:
    """By parameters without embeddings, at most 4e-3.

    The power law through GPT-3's table (Brown et al. 2020, table 2.1): 6e-4 at 125M, 2e-4 at 1.3B,
    1e-4 at 13B. At the two small sizes it comes within what a short search finds.
    """
    rate = 6e-4 * (max(parameters, 1) / 125e6) ** -0.42
    return float(f"{min(rate, 4e-3):.2g}")
