"""Records of tokenizing: positions in the corpus, and what runs save and find."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from pretrain_cli.data.shards import Manifest, Shard, SplitName, TokenType

PROGRESS_VERSION: Final = 2
"""Version of progress.json. A run that another version began starts over: before 2, the position
inside a file of records was a number of documents."""

Row = dict[str, Any]
"""A line of files.jsonl."""


class Cursor(NamedTuple):
    """Position in the corpus, with counts of everything before it."""

    file: int = 0
    document: int = 0
    """Documents of the current file that are complete."""
    block: int = 0
    """Complete blocks of the next document."""
    ordinal: int = 0
    """Documents of the corpus that are complete."""
    duplicates: int = 0
    inexact_cuts: int = 0
    records: int = 0
    """Records of the current file that are complete, if it is a file of records."""


@dataclass
class Tally:
    """Running count of text."""

    documents: int = 0
    bytes: int = 0
    """Bytes of complete documents."""
    tokens: int = 0


@dataclass
class FileTally(Tally):
    """Running count of one file."""

    remarks: dict[str, int] = field(default_factory=dict)
    """Remarks on records that are complete."""


@dataclass(frozen=True)
class Extent:
    """Extent of an unfinished shard."""

    file: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class WriteState:
    """Content of a dataset at one point of writing."""

    dtype: TokenType
    closed: int
    """Number of finished shards; these never change."""
    open: dict[SplitName, Extent]
    splits: dict[SplitName, Tally]
    files_bytes: int
    """Length of files.jsonl."""


@dataclass(frozen=True)
class ResumePoint:
    """Position in the corpus and the state of the writer at that position."""

    place: Cursor
    of_file: FileTally
    """Text of the current file so far."""
    written: WriteState


class SavedProgress(BaseModel):
    """Contents of progress.json, saved every few seconds."""

    version: Literal[2]
    options: dict[str, Any]
    appends_to: str | None
    """Fingerprint of the dataset that is appended to."""
    file: list[Any] | None
    """Identity of the file at `here`; None after the last file."""
    here: ResumePoint
    file_began: ResumePoint
    """Beginning of that file, to return to if the file has changed."""
    shards: list[Shard]
    """Finished shards."""
    difference: str = ""
    """Why gigatoken isn't the encoder."""


class Encoding(BaseModel):
    """Contents of encoding.json: how the text that was added last was encoded."""

    encoder: str
    """Package and version."""
    why_not_gigatoken: str
    """Empty if it was, or isn't installed."""
    samples_compared: int
    """Texts for which gigatoken gave the ids of the tokenizers library."""
    bytes_per_second: int
    """Bytes of text, from the first one read to the last token written."""


@dataclass(frozen=True)
class Earlier:
    """State in which earlier runs left a dataset."""

    existing: Manifest | None
    """The dataset, unless it is to be replaced."""
    rows: Iterator[Row]
    """Its files."""
    saved: SavedProgress | None
    """Progress of an interrupted run."""
    finished: list[Row]
    """Files that the interrupted run finished."""
    tokenizer: Path
    """File of its tokenizer."""
