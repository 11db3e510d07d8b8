"""Token files of other programs, used for training in place: nothing is converted or copied.

    llm.c, modded-nanogpt   256 int32 (magic, version, token count, zeros), then the tokens:
                            uint16 for magic 20240520, uint32 (Llama 3) for 20240801;
                            a separator precedes each document
    nanoGPT                 tokens only; a separator follows each document

The files do not record their tokenizer, so the user names it. Every id is checked against its
vocabulary: small files when they are opened, large ones as they are read.
"""

import glob
import hashlib
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain_cli.data.dataset import VERIFIED_WHEN_OPENED, Dataset, Split, text_bytes
from pretrain_cli.data.shards import MANIFEST, Shard, TokenStream, token_dtype
from pretrain_cli.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from pretrain_cli.errors import ConfigError, DataError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKENS_PER_READ = 2**20
"""Bytes read at a time when files are opened, and tokens searched at a time when counting
documents."""
SAMPLED = 2**30
"""Approximate number of bytes checked in files too large to be read completely."""
HELD_OUT = 100
"""Divisor of the held-out share: without validation files, the last 1/100 of the tokens validate.
"""
HELD_OUT_AT_MOST = 10_000_000

TRAIN = re.compile(r"(?<![A-Za-z])train(?![A-Za-z])")
VAL = re.compile(r"(?<![A-Za-z])val(id(ation)?)?(?![A-Za-z])")
ANY_NUMBER = re.compile(r"(\d|[*?]|\[[^]]*\])+")


@dataclass(frozen=True)
class Format:
    """Layout of tokens in a file."""

    name: str
    dtype: str
    header: int
    """Bytes before the first token."""
    separator_leads: bool


HEADED = {
    MAGIC: (VERSION, Format("16-bit tokens behind llm.c's header", "uint16", HEADER_BYTES, True)),
    20240801: (7, Format("32-bit tokens behind llm.c's header", "uint32", HEADER_BYTES, True)),
}
"""Version and format by magic number."""
OTHER_KINDS = range(20240101, 20241231 + 1)
"""Magic numbers of other llm.c files, which are dates. Bare GPT-2 tokens cannot begin with
these."""
ZIP = int.from_bytes(b"PK\x03\x04", "little")
BARE = {
    "uint16": Format("bare 16-bit tokens, as nanoGPT writes them", "uint16", 0, False),
    "uint32": Format("bare 32-bit tokens", "uint32", 0, False),
}


class SeparatedStarts:
    """DocumentStarts found by searching for separators each time starts are requested.

    The first token of a row counts as a start, of a document or of the rest of one.
    """

    def __init__(self, tokens: TokenStream, separator: int, *, leads: bool) -> None:
        self.tokens, self.separator, self.leads = tokens, separator, leads

    def __len__(self) -> int:
        blocks = range(0, len(self.tokens), TOKENS_PER_READ)
        return sum(len(self.between(first, first + TOKENS_PER_READ)) for first in blocks)

    def between(self, first: int, last: int) -> np.ndarray:
        last = min(last, len(self.tokens))
        if first == 0 < last:
            return np.concatenate([[0], self.between(1, last)])
        behind = 0 if self.leads else 1
        tokens = self.tokens.read(first - behind, last - first)
        return np.flatnonzero(tokens == self.separator) + first


def is_foreign(path: str) -> bool:
    """Return whether this path or pattern names token files rather than a dataset."""
    place = Path(path)
    if place.is_dir():
        return not (place / MANIFEST).is_file() and any(place.glob("*.bin"))
    return place.is_file() or place.suffix == ".bin" or glob.has_magic(path)


def open_foreign(path: str, tokenizer: str | None) -> Dataset:
    """Open a .bin file, the files matching a pattern, or those in a folder.

    Files with `val` in their names are the validation split. They are looked for among the given
    files, and beside them under the same names with `val` for `train`. Without any, the last tokens
    are held out.
    """
    train, val, left_out = _files_by_split(path)
    if tokenizer is None:
        raise ConfigError(
            f"{path}: .bin files don't say which tokenizer made them; name it with --tokenizer "
            "(gpt2 for most)"
        )
    named = load_tokenizer(tokenizer)
    form = _common_format([*train, *val], named)
    rows = [
        TokenStream(files, form.dtype, header=form.header, vocab_size=named.vocab_size)
        for files in (train, val)
        if files
    ]
    splits = rows if val else _hold_out(rows[0])
    validation = _listed(val) if val else f"the last {len(splits[1]):,} tokens, held out"
    notices = [f"{path}: {form.name}, in {_listed(train)}; validation on {validation}"]
    if left_out:
        notices.append(f"{path}: neither train nor val by name, left out: {_listed(left_out)}")
    key = f"{named.fingerprint} {form.name} {[len(row) for row in splits]}"
    fingerprint, largest, unread = _read_through(rows, form, key)
    # a leading separator is the tokenizer's BOS, such as Llama 3's <|begin_of_text|>, if it has one
    leads = form.separator_leads
    separator = named.bos if leads and named.bos is not None else named.eos
    return Dataset(
        Path(path),
        _name(Path(path)),
        named,
        separator=separator,
        fingerprint=fingerprint,
        largest_token=named.vocab_size - 1 if unread else largest,
        train=_split(splits[0], named, separator, leads=leads),
        val=_split(splits[1], named, separator, leads=leads),
        unverified_bytes=unread,
        separator_leads=leads,
        notices=tuple(notices),
    )


# --- choice of files -----------------------------------------------------------------------------


def _files_by_split(path: str) -> tuple[list[Path], list[Path], list[Path]]:
    """Return (training files, validation files, files left out), judging by their names."""
    place = Path(path)
    pattern = glob.escape(path) if place.exists() else path
    if place.is_dir():
        pattern = os.path.join(pattern, "*.bin")
    files = _matching(pattern)
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file"
        raise DataError(f"{path}: {what}; give a .bin file of tokens, or a pattern in quotes")
    for file in files:
        if file.suffix != ".bin":
            raise DataError(
                f"{file}: not a .bin file of tokens; of text, make a dataset with 'pretrain "
                "tokenize'"
            )
        if (file.parent / MANIFEST).is_file():
            raise DataError(f"{file}: part of a dataset; give its folder, --data {file.parent}")
    train = [file for file in files if TRAIN.search(file.stem)]
    val = [file for file in files if VAL.search(file.stem) and file not in train]
    left_out = [file for file in files if file not in train and file not in val]
    if not train:
        train, left_out = left_out, []
    if not train:  # if all files are validation files, train on them
        train, val = val, []
    return train, val or _beside(pattern), left_out


def _matching(pattern: str) -> list[Path]:
    return [path for name in sorted(glob.glob(pattern)) if (path := Path(name)).is_file()]


def _beside(pattern: str) -> list[Path]:
    """Return the validation files beside the training files: those with `val` in place of `train`,
    else with any number. For example, fineweb_val_000000 is alone beside fineweb_train_000001 and
    its successors."""
    folder, name = os.path.split(pattern)
    found = TRAIN.search(name)
    if not found:
        return []
    before, after = name[: found.start()], name[found.end() :]
    names = (f"{before}val{tail}" for tail in (after, ANY_NUMBER.sub("*", after)))
    return next(filter(None, (_matching(os.path.join(folder, name)) for name in names)), [])


def _listed(files: list[Path]) -> str:
    if len(files) == 1:
        return files[0].name
    return f"{len(files)} files, {files[0].name} to {files[-1].name}"


def _name(path: Path) -> str:
    """Return a name for runs: `fineweb` for fineweb_train_*.bin, the folder's name for
    train.bin."""
    if path.is_dir():
        return path.resolve().name
    words = [word for word in re.split(r"[\W_]+", path.stem) if word not in ("", "train")]
    return "-".join(words) or path.resolve().parent.name


# --- contents of files ---------------------------------------------------------------------------


def _common_format(files: list[Path], tokenizer: Tokenizer) -> Format:
    """Return the layout that all these files share."""
    first, *rest = files
    form = _format(first, tokenizer)
    for file in rest:
        if (other := _format(file, tokenizer)) != form:
            raise DataError(
                f"{file}: {other.name}, and {first} has {form.name}; give files of one kind"
            )
    return form


def _format(path: Path, tokenizer: Tokenizer) -> Format:
    """Return the layout of a file. A header's token count must match the file's size; without a
    header, the tokens are as wide as the tokenizer needs."""
    try:
        size = path.stat().st_size
        numbers = np.fromfile(path, "<i4", 3).tolist()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    magic, version, count = (*numbers, 0, 0, 0)[:3]
    if magic not in HEADED and (magic == ZIP or magic in OTHER_KINDS):
        raise DataError(
            f"{path}: begins as a model or another file that holds no tokens; give a .bin file of "
            "tokens"
        )
    known, form = HEADED.get(magic, (version, BARE[token_dtype(tokenizer.vocab_size)]))
    width = np.dtype(form.dtype).itemsize
    if version != known:
        raise DataError(
            f"{path}: version {version} of llm.c's header, and {known} is the one that can be "
            "read; make the file again"
        )
    if tokenizer.vocab_size > 2 ** (8 * width):
        raise ConfigError(
            f"{path}: {form.name} can't be those of {tokenizer.name}, which has "
            f"{tokenizer.vocab_size:,}; give the tokenizer that made them with --tokenizer"
        )
    if magic in HEADED and size != form.header + count * width:
        raise DataError(
            f"{path}: {size:,} bytes, and its header's {count:,} tokens take "
            f"{form.header + count * width:,}; the file is cut short or damaged, get it again"
        )
    if size % width:
        raise DataError(
            f"{path}: {size:,} bytes are not a whole number of tokens; without llm.c's header it "
            f"is taken for {form.name}"
        )
    if size == form.header:
        raise DataError(f"{path}: holds no tokens; leave it out, or make it again")
    return form


def _hold_out(row: TokenStream) -> list[TokenStream]:
    """Return [training tokens, validation tokens]."""
    held_out = min(max(len(row) // HELD_OUT, 2), HELD_OUT_AT_MOST, len(row))
    border = len(row) - held_out
    return [row.part(0, border), row.part(border, len(row))]


def _read_through(rows: list[TokenStream], form: Format, key: str) -> tuple[str, int, int]:
    """Return (fingerprint, largest id, bytes not read) of files, checking all ids that are read.

    Of a large file, the first and last block and some evenly spaced blocks are read.
    """
    digest = hashlib.sha256(key.encode())
    dtype = np.dtype(form.dtype).newbyteorder("<")
    total = sum(row.nbytes for row in rows)
    every = 1 if total <= VERIFIED_WHEN_OPENED else math.ceil(total / SAMPLED)
    largest = read = 0
    for row in rows:
        for shard, path in enumerate(row.files.paths):
            blocks = range(0, row.files.lengths[shard], TOKENS_PER_READ // dtype.itemsize)
            # not through the memory map: its pages would count as this process's memory
            with open(path, "rb") as file:
                for offset in sorted({*blocks[::every], blocks[-1]}):
                    file.seek(form.header + offset * dtype.itemsize)
                    tokens = np.fromfile(file, dtype, blocks.step)
                    row.check(tokens, shard, offset)
                    digest.update(tokens.data)
                    largest = max(largest, int(tokens.max()))
                    read += tokens.nbytes
    return digest.hexdigest(), largest, total - read


def _split(row: TokenStream, tokenizer: Tokenizer, separator: int, *, leads: bool) -> Split:
    documents = SeparatedStarts(row, separator, leads=leads)
    return Split(row, documents, text_bytes(row, documents, tokenizer))


def header(tokens: int) -> bytes:
    """Return llm.c's header for a file of this many tokens."""
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()


def write_llm_c(folder: Path, shards: Sequence[Shard], *, name: str, separator: int | None) -> None:
    """Write one file per shard to `llm.c/`: NAME_train_000001.bin, …

    `separator` is written before the first token of a split if documents have no BOS mark.
    """
    target = folder / "llm.c"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    counts = {"train": 0, "val": 0}
    for shard in sorted(shards, key=lambda shard: shard.file):
        counts[shard.split] += 1
        first = counts[shard.split] == 1 and separator is not None
        path = target / f"{name}_{shard.split}_{counts[shard.split]:06d}.bin"
        with path.open("wb") as file, (folder / shard.file).open("rb") as tokens:
            file.write(header(shard.tokens + first))
            if first:
                file.write(np.array([separator], dtype="<u2").tobytes())
            shutil.copyfileobj(tokens, file, 2**20)
