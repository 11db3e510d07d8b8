"""A corpus to a tokenized dataset.

    files ── documents ── batches of about a megabyte ── encode in parallel ── shards

Which documents are held out for validation is decided by a hash of each one's text, so it does not
change when the corpus grows. A corpus with too few documents for that gives its last tokens.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain_cli.data.shards import MANIFEST, DatasetWriter, Manifest, read_manifest
from pretrain_cli.data.text import Corpus, Document, find_corpus
from pretrain_cli.data.tokenizer import BUILT_IN, Tokenizer, load_tokenizer, train_bpe
from pretrain_cli.errors import ConfigError, DataError

BATCH_BYTES = 2**20
BPE_TRAINING_BYTES = 2**25
"""A BPE is trained on this much of the corpus, spread over it: more changes little, and costs."""
DEMO = Path("data/demo")
DEMO_VOCAB_SIZE = 4096

Progress = Callable[[str, int, int, int], None]
"""(what is being done, bytes of text done, bytes in all, tokens made)."""


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """What to tokenize and how; the same request of the same files needs no second run."""

    paths: tuple[Path, ...]
    out: Path
    tokenizer: str
    vocab_size: int | None = None
    """Of `bpe` alone."""
    val_fraction: float = 0.01
    text_key: str = "text"
    suffix: str = ""
    """Only files that end so; every file where it is empty."""
    force: bool = False


@dataclass(frozen=True)
class Tokenized:
    """A dataset that is now there."""

    folder: Path
    manifest: Manifest
    skipped: list[Path]
    was_there: bool
    """It was there already, from the same files and options; nothing was done."""


def tokenize(request: TokenizeRequest, progress: Progress) -> Tokenized:
    """Make the dataset that is asked for, or find that it is there."""
    if not 0 <= request.val_fraction < 1:
        raise ConfigError(f"--val-fraction: {request.val_fraction} is not from 0 up to 1")
    if request.vocab_size is not None and request.tokenizer != "bpe":
        raise ConfigError(
            f"--vocab-size: {request.vocab_size} goes with --tokenizer bpe; "
            f"'{request.tokenizer}' has its own vocabulary"
        )
    corpus = find_corpus(request.paths, request.text_key, request.suffix)
    sources = {
        "paths": [str(path) for path in request.paths],
        "files": len(corpus.files),
        "digest": corpus.digest(),
        "tokenizer": request.tokenizer,
        "vocab_size": request.vocab_size,
        "val_fraction": request.val_fraction,
        "text_key": request.text_key,
    }
    existing = _existing(request, sources)
    if existing is not None:
        return Tokenized(request.out, existing, [], was_there=True)
    tokenizer = _prepare_tokenizer(request, corpus, progress)
    with DatasetWriter(request.out, tokenizer) as writer:
        done, made, total = 0, 0, corpus.size
        for batch in _batches(corpus.documents()):
            encoded = tokenizer.encode_documents([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                held_out = _is_held_out(document.text, request.val_fraction)
                writer.add("val" if held_out else "train", ids, document.size)
                done, made = done + document.size, made + len(ids)
            progress("tokenizing", done, total, made)
        if made == 0:
            raise DataError(_nothing(request, corpus))
        if request.val_fraction > 0 and not (writer.tokens("train") and writer.tokens("val")):
            _hold_out_tail(writer, tokenizer, request.val_fraction)
        manifest = writer.finish(sources)
    return Tokenized(request.out, manifest, list(corpus.skipped), was_there=False)


def demo_request() -> TokenizeRequest:
    """A dataset for trying things out: the running Python's own standard library sources."""
    library = Path(sysconfig.get_paths()["stdlib"])
    folders = [p for p in sorted(library.iterdir()) if p.is_dir() and p.name.isidentifier()]
    kept = [p for p in folders if not p.name.startswith("__") and next(p.rglob("*.py"), None)]
    return TokenizeRequest(
        paths=(*sorted(library.glob("*.py")), *kept),
        out=DEMO,
        tokenizer="bpe",
        vocab_size=DEMO_VOCAB_SIZE,
        val_fraction=0.005,
        suffix=".py",
    )


def _existing(request: TokenizeRequest, sources: dict) -> Manifest | None:
    """The manifest that is there and is what this request would make; refuse to replace another."""
    out = request.out
    if not out.exists():
        return None
    if not (out / MANIFEST).is_file():
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
            return None
        raise DataError(f"{out}: exists and is not a dataset; choose another folder with --out")
    if request.force:
        return None
    manifest = read_manifest(out)
    # of the corpus the digest tells, wherever it lies and however its path is written
    changed = [
        "corpus" if key in ("files", "digest") else key
        for key, value in sources.items()
        if key != "paths" and manifest.sources.get(key) != value
    ]
    is_file = request.tokenizer not in BUILT_IN and Path(request.tokenizer).exists()
    if is_file and load_tokenizer(request.tokenizer).fingerprint != manifest.tokenizer_fingerprint:
        changed.append("tokenizer")
    if not changed:
        return manifest
    what = ", ".join(dict.fromkeys(changed))
    raise DataError(
        f"{out}: holds a dataset made with another {what}; replace it with --force, or choose "
        "another folder with --out"
    )


def _prepare_tokenizer(request: TokenizeRequest, corpus: Corpus, progress: Progress) -> Tokenizer:
    if request.tokenizer != "bpe":
        return load_tokenizer(request.tokenizer)
    total = corpus.size
    stride = max(1, total // BPE_TRAINING_BYTES)

    def texts() -> Iterator[str]:
        done = 0
        for number, document in enumerate(corpus.documents()):
            done += document.size
            if number % stride == 0:
                progress("training the tokenizer", done, total, 0)
                yield document.text

    return train_bpe(texts(), request.vocab_size or 8192)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def _hold_out_tail(writer: DatasetWriter, tokenizer: Tokenizer, fraction: float) -> None:
    """Where all documents fell on one side, the last tokens are for validation and the others for
    training; a document may be cut for it."""
    split = "train" if writer.tokens("train") else "val"
    wanted = max(2, round(writer.tokens(split) * fraction))
    documents = writer.take_back(split)
    total = sum(len(ids) for ids, _ in documents)
    cut = max(1, total - wanted)
    position = 0
    for ids, size in documents:
        here = min(max(cut - position, 0), len(ids))  # tokens of this document before the cut
        position += len(ids)
        if here == len(ids):
            writer.add("train", ids, size)
        elif here == 0:
            writer.add("val", ids, size)
        else:
            tail = min(size, len(tokenizer.decode(ids[here:].tolist()).encode()))
            writer.add("train", ids[:here], size - tail)
            writer.add("val", ids[here:], tail)


def _nothing(request: TokenizeRequest, corpus: Corpus) -> str:
    where = ", ".join(str(path) for path in request.paths)
    if corpus.skipped:
        return (
            f"{where}: none of its {len(corpus.files)} files is UTF-8 text "
            f"({corpus.skipped[0].name} the first); convert them first"
        )
    return f"{where}: no text in its {len(corpus.files)} files; give a folder of text"
