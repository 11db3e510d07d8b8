"""The recipe of a run: what `auto` becomes for the optimizer, as formulas of width, tokens and
batch.

Each formula has its source, or the race that gave it: `pretrain guide recipe` has the tables, and
`.tools/race` runs them again. Imports no torch.

Rates are those of our updates. Muon's update of a matrix has a root mean square of 0.2 × rate (see
`muon`); a rate of 0.1/√D is what modded-nanogpt and nanochat call 0.02.
"""

import math
from dataclasses import dataclass

from pretrain_cli.config.run_config import OptimizerSettings
from pretrain_cli.engine.optim.kinds import OPTIMIZERS
from pretrain_cli.model.config import ModelConfig
from pretrain_cli.model.counting import count_parameters

MUON_RATE = 0.15
"""Muon's rate × √D."""
ADAMW_RATE = 0.02
"""AdamW's rate of matrices × √D."""
TABLE_RATE = 0.3
"""AdamW's rate × √D of an embedding that is tied to the head, and of an untied head."""
UNTIED_EMBEDDING_RATE = 5.0
"""AdamW's rate × √D of an embedding that is not tied."""

MOST_DECAY = 1.0
"""Largest weight decay: the formula's grows without bound as runs get shorter."""


@dataclass(frozen=True)
class Recipe:
    """Optimizer settings without any `auto`: those that could be, and the others in `settings`."""

    settings: OptimizerSettings
    name: str
    learning_rate: float
    embedding_rate_scale: float
    head_rate_scale: float
    weight_decay: float
    warmup_steps: int

    @property
    def embedding_rate(self) -> float:
        """Highest learning rate of the embedding."""
        return _rounded(self.learning_rate * self.embedding_rate_scale)


def make_recipe(
    settings: OptimizerSettings,
    model: ModelConfig,
    *,
    steps: int,
    tokens_per_step: int,
    parallel: str = "ddp",
) -> Recipe:
    """Resolve the optimizer settings of a run of this many steps."""
    name = choose_optimizer(settings, parallel)
    own = matrix_rate(name, model, steps=steps, tokens_per_step=tokens_per_step)
    rate = own if settings.learning_rate == "auto" else settings.learning_rate
    factor = batch_factor(steps, tokens_per_step)
    # Relative to the matrices' own rate, so that a learning rate that is given moves all groups.
    embedding, head = (_rounded(factor * table / own) for table in table_rates(model))
    decay = settings.weight_decay
    if decay == "auto":
        decay = suggested_weight_decay(model, rate, steps=steps, tokens_per_step=tokens_per_step)
    warmup = settings.warmup_steps
    head = 1.0 if model.tie_word_embeddings else _given(settings.head_rate_scale, head)
    return Recipe(
        settings=settings,
        name=name,
        learning_rate=rate,
        embedding_rate_scale=_given(settings.embedding_rate_scale, embedding),
        head_rate_scale=head,
        weight_decay=decay,
        warmup_steps=min(1000, max(1, steps // 20)) if warmup == "auto" else warmup,
    )


def choose_optimizer(settings: OptimizerSettings, parallel: str) -> str:
    """Return the optimizer's name. `auto`: Muon, where it can run."""
    if settings.name != "auto":
        return settings.name
    return "adamw" if parallel == "fsdp" and OPTIMIZERS["muon"].no_shards else "muon"


def matrix_rate(name: str, model: ModelConfig, *, steps: int, tokens_per_step: int) -> float:
    """Return the learning rate of the layers' matrices.

    Muon: the change of a layer's output is independent of the width D if the rate falls as 1/√D
    (the update's largest singular value is then constant). AdamW: near the best of a race at width
    128, and what large models are trained with: 7e-4 at a width of 768 (GPT-3: 6e-4), 3e-4 at 4,096
    (Llama: 3e-4). Theory has 1/D at equal batch and length (Yang et al. 2022, arXiv 2203.03466).
    """
    rate = (MUON_RATE if name == "muon" else ADAMW_RATE) / math.sqrt(model.hidden_size)
    return _rounded(rate * batch_factor(steps, tokens_per_step))


def table_rates(model: ModelConfig) -> tuple[float, float]:
    """Return the rates of the embedding, and of an untied head. They fall as 1/√D (nanochat)."""
    root = math.sqrt(model.hidden_size)
    tied = model.tie_word_embeddings
    return (TABLE_RATE if tied else UNTIED_EMBEDDING_RATE) / root, TABLE_RATE / root


def suggested_tokens_per_step(tokens: float) -> float:
    """Return the tokens of a step that learn most from so many tokens: 0.58 · tokens^0.571 (Step
    Law, Li et al. 2025, arXiv 2503.04715)."""
    return 0.58 * max(1.0, tokens) ** 0.571


def batch_factor(steps: int, tokens_per_step: int) -> float:
    """Return the factor on all rates: the root of the batch, relative to the suggested one (as in
    nanochat), between a half and two."""
    suggested = suggested_tokens_per_step(steps * tokens_per_step)
    return min(2.0, max(0.5, math.sqrt(tokens_per_step / suggested)))


def suggested_weight_decay(
    model: ModelConfig, rate: float, *, steps: int, tokens_per_step: int
) -> float:
    """Return the decay λ at which weights average their updates over the best part of the run:
    1 / (rate · λ · steps) = 1.084 · (tokens / parameters)^−0.527 (Bergsma et al. 2025, arXiv
    2505.13738)."""
    count = count_parameters(model)
    share = steps * tokens_per_step / max(1, count.active - count.embeddings)
    return min(MOST_DECAY, _rounded(1 / (1.084 * share**-0.527 * rate * steps)))


def _given(asked: float | str, otherwise: float) -> float:
    return otherwise if isinstance(asked, str) else asked


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
