"""`pretrain sample`: generate text from a checkpoint, shown as it is sampled."""

import json
import select
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.markup import escape

from pretrain_cli.commands.display import console, error_console, notice, remark
from pretrain_cli.commands.options import SPEED, OfProcess, settle_process

BATCH = 8
CHOOSING, SEVERAL = "How tokens are chosen", "Several texts"


def sample(
    where: Annotated[
        Path | None,
        typer.Argument(
            help="A run, a checkpoint or a Hugging Face model folder.",
            show_default="the newest run",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue, or piped in; '-' waits for standard input."),
    ] = None,
    best: Annotated[
        bool,
        typer.Option("--best", help="Use the run's checkpoint with the lowest validation loss."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of a continuation.")] = 200,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a continuation. Repeatable.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="Temperature; 0 takes the likeliest token.", rich_help_panel=CHOOSING),
    ] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from the K likeliest tokens.", rich_help_panel=CHOOSING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens whose probabilities sum to P.",
            rich_help_panel=CHOOSING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from tokens at least P times as likely as the likeliest.",
            rich_help_panel=CHOOSING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            help="Penalty on tokens already in the text: divides their positive logits.",
            rich_help_panel=CHOOSING,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            help="The same seed gives the same text. The k-th text after the first uses seed + k.",
            rich_help_panel=CHOOSING,
        ),
    ] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='A file with a prompt a line, or .jsonl with {"prompt": …} a line.',
            rich_help_panel=SEVERAL,
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Texts per prompt.", rich_help_panel=SEVERAL)] = 1,
    batch_size: Annotated[
        int, typer.Option(help="Texts generated at a time.", rich_help_panel=SEVERAL)
    ] = BATCH,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print a JSON line per text: tokens, log-probabilities, why it ended.",
            rich_help_panel=SEVERAL,
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:N, mps or auto.", rich_help_panel=SPEED)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or auto.", rich_help_panel=SPEED)
    ] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Use int8 matrices on a CPU: fewer bytes to read per token.",
            show_default="no",
            rich_help_panel=SPEED,
        ),
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the decoding step.",
            show_default="on a GPU; on a CPU for long texts",
            rich_help_panel=SPEED,
        ),
    ] = None,
    set_: OfProcess = None,
) -> None:
    """Write text with a trained model.

    It ends at the end-of-document token, at a --stop text or after --max-tokens.
    """
    settle_process(set_)
    from pretrain_cli.engine.sampling import sample as engine
    from pretrain_cli.engine.sampling.sampler import SamplingParams
    from pretrain_cli.errors import ConfigError

    for name, value in (("n", n), ("batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"--{name}: {value} is not at least 1")
    if prompt is not None and prompts is not None:
        raise ConfigError("--prompts: has prompts, and --prompt is one; leave one of them out")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    if prompts is not None:
        asked = engine.read_prompts(prompts)
    elif prompt == "-" or (prompt is None and _is_waiting(sys.stdin)):
        asked = [_read_standard_input()]
    else:
        asked = [prompt or ""]
    report = remark if as_json else notice
    folder, model, tokenizer = engine.open_for_sampling(
        where,
        device=device,
        dtype=dtype,
        notify=report,
        best=best,
        quantize=quantize,
        settings=set_ or (),
    )
    error_console.print(f"[dim]{escape(str(folder))}[/]", soft_wrap=True)
    texts = engine.plan_completions(model, tokenizer, asked, params, n)
    show = _JsonLines(asked, n) if as_json else _Written(asked, n)
    try:
        writer = engine.open_session(model, compile_, texts, batch_size, report)
        for delta in engine.generate_text(writer, tokenizer, texts, params, rows=batch_size):
            show(delta)
    except KeyboardInterrupt:
        show.interrupted()
        raise typer.Exit(130) from None


class _InOrder(ABC):
    """Shows texts in order, though their pieces arrive interleaved. The first unfinished text is
    streamed; pieces of later texts are kept until their turn."""

    def __init__(self, prompts: list[str], n: int) -> None:
        self.prompts, self.n = prompts, n
        self.count = len(prompts) * n
        self.turn = 0
        self.kept: dict[int, list[Any]] = {}

    def __call__(self, delta: Any) -> None:
        self.kept.setdefault(delta.completion.number, []).append(delta)
        while deltas := self.kept.pop(self.turn, None):
            for delta in deltas:
                self.show(delta)
            if deltas[-1].full_text is None:
                return
            self.turn += 1

    @abstractmethod
    def show(self, delta: Any) -> None:
        """Show a delta of the text whose turn it is."""

    @abstractmethod
    def interrupted(self) -> None:
        """End the output after an interrupt in the middle of a text."""

    def prompt(self, text: Any) -> str:
        return self.prompts[text.number // self.n]


class _Written(_InOrder):
    """Shows each text after its prompt; on a terminal the prompt is dim."""

    begun = -1

    def show(self, delta: Any) -> None:
        number = delta.completion.number
        if number != self.begun:
            self.begun = number
            if self.count > 1:
                console.rule(f"{number + 1} of {self.count}")
            prompt = self.prompt(delta.completion)
            _write(typer.style(prompt, dim=True) if console.is_terminal else prompt)
        _write(delta.text)
        if delta.full_text is not None:
            console.print()

    def interrupted(self) -> None:
        console.print()


class _JsonLines(_InOrder):
    """Writes one JSON line for each text, once it is complete."""

    def show(self, delta: Any) -> None:
        if delta.full_text is None:
            return
        text = delta.completion
        line = {
            "prompt": self.prompt(text),
            "text": delta.full_text,
            "tokens": text.tokens,
            "logprobs": text.logprobs,
            "stopped": text.stopped,
            "seed": text.seed,
        }
        _write(json.dumps(line, ensure_ascii=False) + "\n")

    def interrupted(self) -> None:
        """Do nothing: only complete lines are written."""


def _read_standard_input() -> str:
    from pretrain_cli.errors import DataError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise DataError("standard input: not UTF-8; give the prompt as UTF-8 text") from None


def _is_waiting(stream: TextIO) -> bool:
    """Return True if input was piped in. Does not wait for an open, empty pipe, which a parent
    process may have left; `--prompt -` waits."""
    if stream.isatty():
        return False
    try:
        return bool(select.select([stream], [], [], 0)[0])
    except (OSError, ValueError):  # the stream does not support select
        return True


def _write(text: str) -> None:
    """Write text unchanged. rich would turn tabs into spaces and `:x:` into an emoji."""
    sys.stdout.write(text)
    sys.stdout.flush()
