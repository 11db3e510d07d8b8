"""Options of tokenizing."""

import glob
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain_cli.data.corpus.documents import ReadOptions
from pretrain_cli.data.corpus.hub import folder_name
from pretrain_cli.data.corpus.source_files import HUB
from pretrain_cli.data.shards import PARTIAL, SHARD_TOKENS
from pretrain_cli.errors import ConfigError

EncoderName = Literal["auto", "gigatoken", "tokenizers"]


@dataclass(frozen=True)
class Part:
    """Part of a corpus that one of several machines tokenizes."""

    number: int
    """From 1 to `of`."""
    of: int
    listing: str = ""
    """Hash of the whole corpus's list of files, once it is known."""


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """Input and options of tokenizing. The same request on the same files needs no second run."""

    paths: tuple[str, ...]
    out: Path
    tokenizer: str
    vocab_size: int | None = None
    """Vocabulary size to train, with `bpe` only."""
    bos: str | None = None
    """Token that begins a document; 'none' for no token, None for the tokenizer's own
    convention."""
    eos: str | None = None
    allow_special: bool = False
    """True if special tokens typed in a text keep their special meaning."""
    val_fraction: float = 0.01
    dedup: bool = False
    reading: ReadOptions = field(default_factory=ReadOptions)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shard_tokens: int = SHARD_TOKENS
    format: Literal["pretrain", "llm.c"] = "pretrain"
    append: bool = False
    force: bool = False
    part: Part | None = None
    """None for the whole corpus."""
    workers: int | None = None
    """Number of encoding processes; None means one per core."""
    encoder: EncoderName = "auto"
    """The dataset is the same with either encoder."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the options that determine the content of a dataset."""
        part = {} if self.part is None else {"part": asdict(self.part)}
        return {
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "bos": self.bos,
            "eos": self.eos,
            "allow_special": self.allow_special,
            "val_fraction": self.val_fraction,
            "dedup": self.dedup,
            "text_key": self.reading.text_key,
            "document_separator": self.reading.separator,
            "errors": self.reading.errors or "skip",
            "input": self.reading.kind,
            "shard_tokens": self.shard_tokens,
            "format": self.format,
            **part,
        }


def check(request: TokenizeRequest) -> None:
    """Raise ConfigError for options that contradict each other."""
    if not 0 <= request.val_fraction < 1:
        raise ConfigError(f"--val-fraction: {request.val_fraction} is not from 0 up to 1")
    if request.out.name in ("", ".."):
        raise ConfigError(f"--out: '{request.out}' has no name of its own; name a folder")
    if request.out.name.endswith(PARTIAL):
        whole = request.out.with_name(request.out.name.removesuffix(PARTIAL))
        raise ConfigError(
            f"--out: '{request.out}' is where {whole} lies until it is whole; choose another name"
        )
    if request.vocab_size is not None and request.tokenizer != "bpe":
        raise ConfigError(
            f"--vocab-size: {request.vocab_size} goes with --tokenizer bpe; "
            f"'{request.tokenizer}' has its own vocabulary"
        )
    if request.workers is not None and request.workers < 1:
        raise ConfigError(f"--workers: {request.workers} is not at least 1")
    if (separator := request.reading.separator) and set(separator) & {"\n", "\r"}:
        raise ConfigError(
            f"--document-separator: {separator!r} is more than a line; give the line alone"
        )
    if request.shard_tokens < 2**10:
        raise ConfigError(f"--shard-tokens: {request.shard_tokens} is not at least 1,024")
    if request.append and request.force:
        raise ConfigError(
            "--append and --force: the one keeps what is there, the other replaces it"
        )
    if request.append and request.tokenizer == "bpe":
        raise ConfigError(
            "--append: a 'bpe' is trained on its corpus, which would be another; give the "
            f"dataset's own with --tokenizer {request.out}"
        )


def default_folder(path: str) -> Path:
    """Return the folder of a dataset made from this path: data/input for input.txt, data/wiki.en
    for the folder wiki.en."""
    return Path("data", _name(path))


def _name(path: str) -> str:
    if path == "-":
        return "stdin"
    if path.startswith(HUB):
        return folder_name(path)
    if glob.has_magic(path):
        fixed = path[: glob.escape(path).find("[")].rpartition("/")[0]
        return Path(fixed).resolve().name or "corpus"
    resolved = Path(path).resolve()
    if not resolved.is_file():
        return resolved.name or "corpus"
    name = resolved.name
    for suffix in (".gz", ".zst", ".xz", ".bz2"):
        name = name.removesuffix(suffix)
    return Path(name).stem
