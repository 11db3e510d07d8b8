"""Text from a model, one token at a time, as it is made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from pretrain_cli.config import build_config
from pretrain_cli.data.tokenizer import Tokenizer
from pretrain_cli.engine.distributed import find_device
from pretrain_cli.engine.keeping import find_model_folder
from pretrain_cli.engine.open_model import folder_tokenizer, open_model
from pretrain_cli.engine.speed import resolve_speed
from pretrain_cli.errors import CheckpointError, ConfigError
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.kv_cache import KVCache


def open_for_sampling(
    where: Path | None, *, device: str, dtype: str, report: Callable[[str], None]
) -> tuple[Path, Decoder, Tokenizer]:
    """The model and tokenizer of a run, a checkpoint or a Hugging Face folder."""
    place = find_device(device)
    folder = find_model_folder(where, report)
    tokenizer = folder_tokenizer(folder)
    asked = build_config({}, {"speed.dtype": dtype, "speed.compile": False}, []).speed
    model = open_model(folder, resolve_speed(asked, place, training=False), place, report)
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # cast once, and not again at every token
            parameter.data = parameter.data.to(model.dtype)
    return folder, model, tokenizer


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    use_cache: bool = True

    def __post_init__(self) -> None:
        for name, value, fits, wanted in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "from 0 up to 2^63"),
            ("top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0, up to 1"),
        ):
            if not fits:
                raise ConfigError(f"--{name}: {value} is not {wanted}")


def sample_text(
    model: Decoder, tokenizer: Tokenizer, prompt: str, controls: Controls
) -> Iterator[str]:
    """The text that follows the prompt, in pieces that are whole characters.

    Ends at the tokenizer's end-of-document token, after `max_tokens`, or at the model's last
    position.
    """
    ids = tokenizer.encode_prompt(prompt)
    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:  # the stream must know what came before: some pieces depend on it
        stream.step(tokenizer.backend, token)
    for token in sample_tokens(model, ids, controls, end=tokenizer.eos, known=tokenizer.vocab_size):
        piece = stream.step(tokenizer.backend, token)
        if piece:
            yield piece


@torch.no_grad()
def sample_tokens(
    model: Decoder, prompt: list[int], controls: Controls, *, end: int, known: int
) -> Iterator[int]:
    """The ids that follow the prompt, up to `end`, which is not given out.

    Ids from `known` on are rows that pad the vocabulary; they are never chosen.
    """
    positions = model.config.max_position_embeddings
    if len(prompt) >= positions:
        raise ConfigError(
            f"--prompt: its {len(prompt):,} tokens fill the model's {positions:,} positions; "
            "shorten it"
        )
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(controls.seed)
    total = min(len(prompt) + controls.max_tokens, positions)
    cache = None
    if controls.use_cache:
        cache = KVCache(model.config, batch=1, capacity=total, device=device, dtype=model.dtype)
    tokens = list(prompt)
    new = tokens
    while len(tokens) < total:
        context = torch.tensor([new if cache else tokens], device=device)
        logits = model(context, cache=cache, last_only=True)[0, -1, :known]
        token = choose(logits.float().cpu(), controls, generator)
        if token == end:
            return
        yield token
        tokens.append(token)
        new = [token]


def choose(logits: Tensor, controls: Controls, generator: torch.Generator) -> int:
    """One id from the logits of a position. (V,) -> id."""
    if not logits.isfinite().all():
        raise CheckpointError(
            "the model's logits are not finite: its training diverged; take an earlier checkpoint"
        )
    if controls.temperature == 0:
        return int(logits.argmax())
    logits = logits / controls.temperature
    if controls.top_k is not None and controls.top_k < len(logits):
        least = logits.topk(controls.top_k).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if controls.top_p is not None:
        ordered, ids = probabilities.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= controls.top_p
        probabilities[ids[outside]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
