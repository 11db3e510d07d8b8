"""Parquet and Arrow: the text is a column, read in batches of rows, without the other columns."""

import mmap
from collections.abc import Iterable, Iterator
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from pretrain_cli.data.corpus.compression import Damaged
from pretrain_cli.data.corpus.records import READ_AT_ONCE, Records, Source
from pretrain_cli.errors import DataError

ROWS_AT_ONCE = 4096
"""Largest number of rows converted at a time."""
BATCH_BYTES = 2**18
"""Bytes of a batch of rows of Parquet. Damage costs the rows of its batch."""
TEXT_TYPES = {
    "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null",
}  # fmt: skip
"""Arrow types that hold text or nothing but nulls. A dictionary of one of these is text too."""


def parquet_rows(source: Source) -> Records:
    """Yield the texts of a column of a Parquet file."""
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


def arrow_rows(source: Source) -> Records:
    """Yield the texts of a column of an Arrow IPC file (Feather) or of an IPC stream."""
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


def _texts(batches: Iterable[Any], path: list[str]) -> Records:
    columns = (batch.column(batch.schema.get_field_index(path[0])) for batch in batches)
    parts = (
        column.slice(start, ROWS_AT_ONCE)
        for column in columns
        for start in range(0, len(column), ROWS_AT_ONCE)
    )
    yield from enumerate((cell for part in parts for cell in _cells(part, path[1:])), start=1)


def _cells(column: Any, inner: list[str]) -> Iterator[bytes | None]:
    """Yield the cells of a part of a column as bytes, because the caller handles invalid UTF-8."""
    import pyarrow
    from pyarrow import compute as functions

    compute: Any = functions
    if inner:  # null where the outer value is null
        column = compute.struct_field(column, inner)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pyarrow.large_binary())
    if column.null_count == len(column):
        yield from [None] * len(column)
        return
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    view = memoryview(data or b"")
    is_null = column.is_null().to_pylist() if column.null_count else None
    for row, (start, end) in enumerate(pairwise(ends.tolist())):
        yield None if is_null and is_null[row] else view[start:end].tobytes()
