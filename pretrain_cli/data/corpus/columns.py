"""Parquet and Arrow: the text is a column, read in batches of rows, without the other columns.

A batch stays one buffer until its texts are asked for.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from pretrain_cli.data.corpus.compression import Damaged
from pretrain_cli.data.corpus.records import READ_AT_ONCE, Record, Source
from pretrain_cli.errors import DataError

ROWS_AT_ONCE = 4096
"""Largest number of rows converted at a time."""
BATCH_BYTES = 2**18
"""Bytes of a batch of rows of Parquet. Damage costs the rows of its batch."""
TEXT_TYPES = {
    "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null",
}  # fmt: skip
"""Arrow types that hold text or nothing but nulls. A dictionary of one of these is text too."""


@dataclass(frozen=True)
class Cells:
    """Consecutive cells of a column."""

    first: int
    """Number of the first row."""
    data: bytes
    """Their texts, concatenated."""
    ends: np.ndarray
    """(n + 1,) int64, the borders between the texts."""
    are_null: np.ndarray | None
    """(n,) bool; None if there is no null."""

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def count(self) -> int:
        return len(self.ends) - 1

    def after(self, count: int) -> "Cells":
        are_null = None if self.are_null is None else self.are_null[count:]
        return replace(self, first=self.first + count, ends=self.ends[count:], are_null=are_null)

    def texts(self, replaces: Callable[[str], bool]) -> Iterator[Record]:
        are_null = None if self.are_null is None else self.are_null.tolist()
        for row, (start, end) in enumerate(pairwise(self.ends.tolist())):
            is_null = are_null is not None and are_null[row]
            yield self.first + row, None if is_null else self.data[start:end]


def parquet_rows(source: Source) -> Iterator[Cells]:
    """Yield the cells of a column of a Parquet file."""
    pyarrow = _pyarrow(source, "Parquet")
    from pyarrow import parquet

    # Parquet's metadata is at the end of the file
    with source.open_seekable() as file:
        try:
            # these buffer options keep a row group, often the whole file, out of memory
            table = parquet.ParquetFile(
                file, page_checksum_verification=True, buffer_size=READ_AT_ONCE, pre_buffer=False
            )
            path = _find_column(source, table.schema_arrow)
            facts = table.metadata
            groups = map(facts.row_group, range(facts.num_row_groups))
            row_bytes = sum(group.total_byte_size for group in groups) // max(1, facts.num_rows)
            rows = min(ROWS_AT_ONCE, BATCH_BYTES // max(1, row_bytes) + 1)
            batches = table.iter_batches(
                batch_size=rows,
                columns=[".".join(path)],
                use_threads=False,  # for one column they cost more than they give
            )
            yield from _texts(batches, path)
        except pyarrow.ArrowException as error:
            raise Damaged(str(error).splitlines()[0]) from None


def arrow_rows(source: Source) -> Iterator[Cells]:
    """Yield the cells of a column of an Arrow IPC file (Feather) or of an IPC stream."""
    pyarrow = _pyarrow(source, "Arrow")
    from pyarrow import ipc

    try:
        if not source.head.startswith(b"ARROW1"):
            stream = ipc.open_stream(source.stream)
            yield from _texts(stream, _find_column(source, stream.schema))
            return
        with source.open_seekable() as file:  # a map, so that a large batch stays on the disk
            data = pyarrow.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        path = _find_column(source, schema := ipc.open_file(data).schema)
        options = ipc.IpcReadOptions(included_fields=[schema.get_field_index(path[0])])
        table = ipc.open_file(data, options=options)
        yield from _texts(map(table.get_batch, range(table.num_record_batches)), path)
    except pyarrow.ArrowException as error:
        raise Damaged(str(error).splitlines()[0]) from None


def _pyarrow(source: Source, format: str) -> ModuleType:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{source.path}: reading {format} takes pyarrow; pip install pyarrow"
        ) from None
    return pyarrow


def _find_column(source: Source, schema: Any) -> list[str]:
    """Return the path to the column: its name, or the names of nested fields. Raises DataError if
    it is missing or holds no text."""
    key = source.key
    path = [key] if key in schema.names else key.split(".")
    try:
        kind = schema.field(path[0]).type
        for name in path[1:]:
            kind = kind.field(name).type
    except (KeyError, AttributeError):
        raise DataError(
            f"{source.path}: no column '{key}' (it has {', '.join(schema.names)}); "
            "name the column with --text-key"
        ) from None
    value = kind.value_type if str(kind).startswith("dictionary") else kind
    if str(value) not in TEXT_TYPES:
        raise DataError(
            f"{source.path}: column '{key}' holds {kind}, not text; name another with --text-key"
        )
    return path


def _texts(batches: Iterable[Any], path: list[str]) -> Iterator[Cells]:
    first = 1
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(path[0]))
        yield from _cells(column, path[1:], first)
        first += len(column)


def _cells(column: Any, inner: list[str], first: int) -> Iterator[Cells]:
    """Yield a column in parts, as bytes, because the caller handles invalid UTF-8."""
    import pyarrow
    from pyarrow import compute as functions

    compute: Any = functions
    for start in range(0, len(column), ROWS_AT_ONCE):
        rows = column.slice(start, ROWS_AT_ONCE)
        if inner:  # null where the outer value is null
            rows = compute.struct_field(rows, inner)
        if pyarrow.types.is_dictionary(rows.type):
            rows = rows.dictionary_decode()
        rows = rows.cast(pyarrow.large_binary())
        are_null = np.asarray(rows.is_null()) if rows.null_count else None
        if rows.null_count == len(rows):
            ends, data = np.zeros(len(rows) + 1, np.int64), memoryview(b"")
        else:
            _, offsets, buffer = rows.buffers()
            ends = np.frombuffer(offsets, np.int64)[rows.offset : rows.offset + len(rows) + 1]
            data = memoryview(buffer or b"")
        one = 0
        while one < len(rows):  # as many rows as READ_AT_ONCE bytes hold, and at least one
            fitting = int(np.searchsorted(ends, ends[one] + READ_AT_ONCE, side="right")) - 1
            end = max(one + 1, fitting)
            yield Cells(
                first + start + one,
                data[ends[one] : ends[end]].tobytes(),
                ends[one : end + 1] - ends[one],
                None if are_null is None else are_null[one:end],
            )
            one = end
