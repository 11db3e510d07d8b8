"""Resolve `auto` by device and model: sequence length, batch, intervals.

`engine/optim/recipe` resolves that of the optimizer.
"""

import math
from dataclasses import replace

from pretrain_cli.config.run_config import RunConfig
from pretrain_cli.data.mixture import Mixture
from pretrain_cli.engine.optim.recipe import choose_optimizer, suggested_tokens_per_step
from pretrain_cli.engine.planning.memory_estimate import StepShape, estimate, speed_settings
from pretrain_cli.engine.planning.micro_batch import (
    MicroBatch,
    choose_micro_batch,
    measured,
    memory_here,
    recall,
)
from pretrain_cli.engine.runs.run_yaml import RunRecord
from pretrain_cli.engine.runtime.distributed import Ranks, device_name
from pretrain_cli.engine.runtime.speed import Speed
from pretrain_cli.errors import ConfigError
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import suggested_tokens

CPU_RUN_FLOPS = 1.2e13
"""Training FLOPs of a default CPU run: about a minute of `pretrain train --model gemma3-tiny` on
two cores (66 s on an EPYC)."""
MOST_CPU_STEPS = 1600
"""Largest default number of steps on a CPU: a very small model stops before CPU_RUN_FLOPS."""


def choose_seq_len(asked: int | str, config: ModelConfig, data: Mixture, on_cpu: bool) -> int:
    """Return the number of tokens in a sample.

    Raises ConfigError if it exceeds the model's positions or the training split of a dataset.
    """
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


def choose_tokens(asked: int | None, config: ModelConfig, flops: float, on_cpu: bool) -> int:
    """Return the tokens of a run: those asked for, else what a CPU trains on in a few minutes, or
    20 a parameter. `flops` are those of a token."""
    if asked is not None:
        return asked
    return round(CPU_RUN_FLOPS / flops) if on_cpu else suggested_tokens(config)


def choose_samples_per_step(settings: RunConfig, ranks: Ranks, seq_len: int, tokens: int) -> int:
    """Return the number of sequences in a step, over all ranks. `auto`: the power of two nearest to
    the best batch for a run of so many tokens.

    Raises ConfigError if tokens_per_step is not a multiple of seq_len × micro-batch × ranks.
    """
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
    best = suggested_tokens_per_step(tokens) / seq_len
    sequences = 2 ** max(0, round(math.log2(best)))
    return math.ceil(sequences / unit) * unit


def choose_micro_batch_size(
    settings: RunConfig,
    ranks: Ranks,
    config: ModelConfig,
    seq_len: int,
    samples_per_step: int,
    speed: Speed,
    resumed: RunRecord | None,
) -> MicroBatch:
    """Return the micro-batch of a rank and the reason for it: the smallest choice of any rank.

    Every rank must call it. Raises ConfigError if the sequences don't divide among the ranks.
    """
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
                optimizer=choose_optimizer(settings.optimizer, train.parallel),
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


def smaller_micro_batch(
    size: int, seq_len: int, longer: int, tokens_per_step: int, ranks: int
) -> int:
    """Return the micro-batch for longer samples, which has at most the tokens of `size` samples of
    `seq_len`, but at least one sample. Raises ConfigError if the samples of a step don't divide
    among the ranks."""
    share, rest = divmod(tokens_per_step // longer, ranks)
    if rest:
        raise ConfigError(
            f"data.stages: the {tokens_per_step // longer} samples of {longer:,} tokens in a step "
            f"don't divide among {ranks} ranks; give another seq_len, or train.tokens_per_step"
        )
    rows = max(1, size * seq_len // longer)
    return next(count for count in range(rows, 0, -1) if share % count == 0)


def choose_interval(asked: int | str, steps: int, *, at_least: int) -> int:
    """Return the steps between two events. `auto`: a fifth of the run, at least `at_least`."""
    return max(at_least, math.ceil(steps / 5)) if asked == "auto" else int(asked)


def choose_checkpoint_interval(asked: int | str, steps: int, eval_every: int) -> int:
    """Return the steps between checkpoints. `auto`: a fifth of the run, at least 100, rounded up to
    an evaluated step (unless evaluations are rarer), so that the best checkpoint is known."""
    every = choose_interval(asked, steps, at_least=100)
    if asked != "auto" or eval_every > every:
        return every
    return math.ceil(every / eval_every) * eval_every
