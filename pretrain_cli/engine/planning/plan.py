"""Make the plan of a run before any compute: resolve every `auto`, and refuse settings that can't
work. The defaults:

    data.path               the only dataset in data/, or a demo of Python's own sources
    model.vocab_size        the published size if the dataset's tokenizer is the model's own,
                            else the tokenizer's size, rounded up to a multiple of 64
    data.seq_len            512 on a CPU, 1024 on a GPU
    train.tokens_per_step   by the tokens of the run
    train.steps             CPU: a few minutes; GPU: 20 tokens a parameter
    train.micro_batch_size  the fastest measured here, or the largest that is estimated to fit
    optimizer               see engine/optim/recipe
"""

import math
from dataclasses import dataclass
from typing import Any

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.data.stages import PlannedStage, plan_stages
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.engine.optim.kinds import OPTIMIZERS
from pretrain_cli.engine.optim.recipe import Recipe, choose_optimizer, make_recipe
from pretrain_cli.engine.optim.schedule import StepRates, rates_at
from pretrain_cli.engine.planning.choices import (
    MOST_CPU_STEPS,
    choose_checkpoint_interval,
    choose_interval,
    choose_micro_batch_size,
    choose_samples_per_step,
    choose_seq_len,
    choose_tokens,
    smaller_micro_batch,
)
from pretrain_cli.engine.planning.data_and_model import find_architecture, find_data
from pretrain_cli.engine.planning.vocabulary import fit_to_data
from pretrain_cli.engine.runs.events import Emit, Notice
from pretrain_cli.engine.runs.run_yaml import RunRecord
from pretrain_cli.engine.runs.trackers import check_trackers
from pretrain_cli.engine.runtime.distributed import Ranks
from pretrain_cli.engine.runtime.speed import Speed, hides_keys, resolve_speed
from pretrain_cli.engine.runtime.stop import StopRequest
from pretrain_cli.errors import ConfigError
from pretrain_cli.model import counting
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.decoder import LossWeights


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Inputs of a training step: fields hold the resolved values, `settings` the given ones."""

    settings: RunConfig
    name: str
    """Name of the model, for display."""
    model: ModelConfig
    speed: Speed
    seq_len: int
    micro_batch_size: int
    recipe: Recipe
    loss_weights: LossWeights | None
    """Weights of the auxiliary losses; None to leave them and their statistics out."""
    tokenizer: Tokenizer | None = None
    """Tokenizer of the data, whose vocabulary the model has; None for steps on random tokens."""

    def rows_at_once(self, seq_len: int) -> int:
        """Return the micro-batch for samples of this length."""
        return self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class Plan(StepPlan):
    """A run with every choice made. `resolved` puts the resolved values into a RunConfig."""

    data: Mixture
    micro_batch_reason: str
    """Reason for the micro-batch size; empty if the settings give it."""
    samples_per_step: int
    """Samples of the first stage's length."""
    stages: tuple[PlannedStage, ...]
    micro_batches: dict[int, int]
    """Micro-batch for each length of samples."""
    steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int

    @property
    def tokens_per_step(self) -> int:
        return self.samples_per_step * self.seq_len

    def rows_at_once(self, seq_len: int) -> int:
        """Return the micro-batch for samples of this length."""
        return self.micro_batches[seq_len]

    def seq_len_at(self, position: int) -> int:
        """Return the length of samples at a position in the training order."""
        step = position // self.samples_per_step
        return [stage for stage in self.stages if stage.first_step <= step][-1].seq_len

    def rates_at(self, step: int, *, steps: int | None = None) -> StepRates:
        """Return the optimizer's rates for the step after `step` steps. `steps` is another length
        of the run; None means the plan's own."""
        return rates_at(step, self.recipe, steps=self.steps if steps is None else steps)


def make_plan(
    settings: RunConfig,
    ranks: Ranks,
    emit: Emit,
    stop: StopRequest,
    *,
    resumed: RunRecord | None = None,
) -> Plan:
    """Resolve every setting of a run. Every rank must call it.

    A resumed run keeps its model and, on the same machine, its micro-batch. Raises ConfigError for
    settings that can't work together, and Stopped if a rank was asked to stop meanwhile.
    """
    model = resumed.model if resumed else None
    check_trackers(settings.train.log)
    name, config = find_architecture(settings, model)
    resolve_speed(settings.speed, ranks.device, model=config)  # refuses before any data is read
    mixture = find_data(settings, ranks, emit, stop)
    if settings.train.eval_tokens is not None:
        mixture = mixture.validated_on(settings.train.eval_tokens)
    if model is None:
        config = fit_to_data(config, settings, mixture, emit)
    if config.num_experts and not config.router_aux_loss_coef:
        emit(Notice("Experts are trained without a balancing loss, and may end up unused"))
    optimizer_name = choose_optimizer(settings.optimizer, settings.train.parallel)
    reason = OPTIMIZERS[optimizer_name].no_shards
    if reason and settings.train.parallel == "fsdp":
        raise ConfigError(f"optimizer.name: '{optimizer_name}' {reason}; use adamw, or ddp")
    if settings.speed.cuda_graphs and (ranks.world_size > 1 or settings.train.parallel == "fsdp"):
        raise ConfigError("speed.cuda_graphs: true can't be used with torchrun; use false")
    if config.tie_word_embeddings and settings.optimizer.head_rate_scale not in (1, "auto"):
        raise ConfigError(
            f"optimizer.head_rate_scale: {settings.optimizer.head_rate_scale}, and this model's "
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

    seq_len = choose_seq_len(data.seq_len, config, mixture, on_cpu)
    flops = counting.training_flops(config, seq_len).exact
    longest = max(seq_len, max(stage.seq_len or 0 for stage in mixture.stages))
    if longest > seq_len:
        choose_seq_len(longest, config, mixture, on_cpu)
    masked = hides_keys(config, longest, documents=data.document_mask)
    speed = resolve_speed(settings.speed, ranks.device, model=config, is_masked=masked)
    budget = choose_tokens(train.tokens, config, flops, on_cpu)
    samples = choose_samples_per_step(settings, ranks, seq_len, budget)
    micro = choose_micro_batch_size(settings, ranks, config, seq_len, samples, speed, resumed)
    per_step = samples * seq_len

    steps = train.steps
    if train.tokens is not None:
        steps = math.ceil(train.tokens / per_step)
    elif steps == "auto" and on_cpu:
        steps = min(MOST_CPU_STEPS, max(20, round(budget / per_step)))
        emit(
            Notice(
                f"{steps} steps: a few minutes on a CPU; --steps or --tokens sets it, and "
                "--resume with more steps continues"
            )
        )
    elif steps == "auto":
        steps = max(20, math.ceil(budget / per_step))
        emit(Notice(f"{steps:,} steps: 20 tokens a parameter; --steps or --tokens sets it"))

    stages = plan_stages(
        mixture,
        seq_len=seq_len,
        tokens_per_step=per_step,
        steps=steps,
        max_epochs=data.max_epochs,
    )
    micro_batches = {seq_len: micro.size} | {
        length: smaller_micro_batch(micro.size, seq_len, length, per_step, ranks.world_size)
        for length in {stage.seq_len for stage in stages} - {seq_len}
    }
    for stage in stages[1:]:
        unreached = "" if stage.first_step < steps else f" (beyond this run's {steps:,})"
        emit(Notice(f"After step {stage.first_step:,}{unreached}: {stage}"))
    eval_every = choose_interval(train.eval_every, steps, at_least=50)
    recipe = make_recipe(
        optimizer, config, steps=steps, tokens_per_step=per_step, parallel=train.parallel
    )
    choices = {
        "seq-len": (data.seq_len, f"{seq_len:,}"),
        "micro-batch": (train.micro_batch_size, f"{micro.size} ({micro.reason})"),
        "tokens a step": (train.tokens_per_step, f"{per_step:,}"),
        "optimizer": (optimizer.name, recipe.name),
        "learning rate": (optimizer.learning_rate, f"{recipe.learning_rate:g}"),
        "embedding's rate": (optimizer.embedding_rate_scale, f"{recipe.embedding_rate:g}"),
        "weight decay": (optimizer.weight_decay, f"{recipe.weight_decay:g}"),
        **{
            name.replace("_", " "): (d.asked, f"{d.in_force} ({d.reason})")
            for name, d in speed.decisions.items()
            if type(settings.speed).about(name).is_announced
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
        tokenizer=mixture.tokenizer,
        speed=speed,
        seq_len=seq_len,
        micro_batch_size=micro.size,
        recipe=recipe,
        loss_weights=_loss_weights(optimizer.z_loss, config),
        micro_batch_reason=micro.reason,
        samples_per_step=samples,
        stages=tuple(stages),
        micro_batches=micro_batches,
        steps=steps,
        log_every=(1 if on_cpu else 10) if train.log_every == "auto" else train.log_every,
        eval_every=eval_every,
        checkpoint_every=choose_checkpoint_interval(train.checkpoint_every, steps, eval_every),
    )


def _loss_weights(z_loss: float, model: ModelConfig) -> LossWeights | None:
    """Return the weights of the auxiliary losses; None without z-loss and experts."""
    if not z_loss and not model.num_experts:
        return None
    return LossWeights(z_loss, model.router_aux_loss_coef)


def resolved(plan: Plan) -> RunConfig:
    """Return the settings for run.yaml, with the plan's values in place of `auto`, so that a
    resumed run keeps them.

    The micro-batch stays as given, because it depends on the machine.
    """
    tree: dict[str, Any] = plan.settings.model_dump()
    asked = [source.asked for source in plan.data.stages[0].sources]
    tree["data"] |= {"path": asked, "seq_len": plan.seq_len}
    tree["optimizer"] |= {
        name: getattr(plan.recipe, name)
        for name in (
            "name",
            "learning_rate",
            "embedding_rate_scale",
            "head_rate_scale",
            "weight_decay",
            "warmup_steps",
        )
    }
    tree["train"] |= {
        "steps": plan.steps,
        "tokens": None,
        "tokens_per_step": plan.tokens_per_step,
        "eval_every": plan.eval_every,
        "checkpoint_every": plan.checkpoint_every,
    }
    return RunConfig.model_validate(tree)
