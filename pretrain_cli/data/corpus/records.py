"""Texts of JSON lines and of a Parquet column, each with its number, from 1.

Only one text is held in memory at a time.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pretrain_cli.data.corpus.compression import Damaged
from pretrain_cli.errors import DataError

READ_AT_ONCE = 2**20
"""Bytes of a Parquet file read at a time."""


def json_lines(
    stream: IO[bytes], path: Path, key: str, replaces: Callable[[str], bool]
) -> Iterator[tuple[int, bytes]]:
    """Yield the texts of JSON lines. `replaces` is asked whether to replace bytes of a line that
    are not UTF-8."""
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            if not replaces(f":{number}"):
                continue
            text = line.decode("utf-8-sig", errors="replace")
        try:
            row = json.loads(text, parse_int=float)  # int() refuses 5,000 digits
        except json.JSONDecodeError as error:
            what = error.msg.removesuffix(" at")
            raise DataError(
                f"{path}:{number}: not a JSON line ({what} at column {error.colno}); "
                "mend or remove it"
            ) from None
        except RecursionError:
            raise DataError(f"{path}:{number}: nested too deep; mend or remove it") from None
        if not isinstance(row, dict) or key not in row:
            keys = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(
                f"{path}:{number}: no text under '{key}' (it has {keys}); "
                "name the key with --text-key"
            )
        if not isinstance(row[key], str):
            raise DataError(
                f"{path}:{number}: what is under '{key}' is not text; name another key with "
                "--text-key, or mend or remove the line"
            )
        # JSON can escape half of a surrogate pair, which UTF-8 can't encode
        yield number, row[key].encode(errors="surrogatepass")


def parquet_rows(
    stream: IO[bytes], path: Path, key: str, *, can_seek: bool, spool: Path | None
) -> Iterator[tuple[int, bytes]]:
    """Yield the texts of a column. Streams and compressed files are copied to `spool` first,
    because Parquet is read from its end."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet takes pyarrow; pip install pyarrow") from None
    # Parquet's metadata is at the end of the file, so a stream is copied first
    with path.open("rb") if can_seek else tempfile.TemporaryFile(dir=spool) as file:
        if not can_seek:
            shutil.copyfileobj(stream, file, READ_AT_ONCE)
        try:
            # these buffer options keep a row group, often the whole file, out of memory
            table = parquet.ParquetFile(
                file, page_checksum_verification=True, buffer_size=READ_AT_ONCE, pre_buffer=False
            )
            names = table.schema_arrow.names
            if key not in names:
                raise DataError(
                    f"{path}: no column '{key}' (it has {', '.join(names)}); "
                    "name the column with --text-key"
                )
            kind = table.schema_arrow.field(key).type
            value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)):
                raise DataError(
                    f"{path}: column '{key}' holds {kind}, not text; name another with --text-key"
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[key]):
                column = batch.column(0)
                if value is not kind:
                    column = column.dictionary_decode()
                # as bytes, because our caller handles invalid UTF-8
                for cell in column.cast(pyarrow.large_binary()):
                    number += 1
                    yield number, cell.as_py() or b""
        except pyarrow.ArrowException as error:
            raise Damaged(str(error).splitlines()[0]) from None
