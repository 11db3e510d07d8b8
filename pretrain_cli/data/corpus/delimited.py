"""CSV and TSV: the text is a column, which the first line names."""

import csv
import io
from collections.abc import Iterator

from pretrain_cli.data.corpus.json_records import to_bytes
from pretrain_cli.data.corpus.records import ParsedRecords, Record, Source, in_parts
from pretrain_cli.errors import DataError

LONGEST_FIELD = 2**30
"""Characters of a field; the csv module's own limit is 131,072."""


def csv_rows(source: Source) -> Iterator[ParsedRecords]:
    return in_parts(_rows(source, ",;\t|"))


def tsv_rows(source: Source) -> Iterator[ParsedRecords]:
    return in_parts(_rows(source, "\t,;|"))


def _rows(source: Source, delimiters: str) -> Iterator[Record]:
    """Yield the texts of a column. The delimiter is the first one under which the column exists. An
    empty field is a null, for which these formats have no other sign."""
    path, key = source.path, source.key
    csv.field_size_limit(LONGEST_FIELD)
    # invalid bytes pass through as surrogates, because our caller handles invalid UTF-8
    stream = io.TextIOWrapper(
        source.stream, encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    first = source.head.decode("utf-8-sig", errors="replace").partition("\n")[0]
    delimiter = next(
        (sign for sign in delimiters if key in next(csv.reader([first], delimiter=sign), [])),
        delimiters[0],
    )
    rows = csv.reader(stream, delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(rows, None)
        if names is None:
            return
        if names.count(key) != 1:
            wrong = "more than one" if key in names else "no"
            raise DataError(
                f"{path}: {wrong} column '{key}' (it has {', '.join(names)}); name the column with "
                "--text-key, or read all files as plain text with --input text"
            )
        column = names.index(key)
        line = rows.line_num + 1
        for row in rows:
            if row:
                if len(row) != len(names):
                    raise DataError(
                        f"{path}:{line}: {len(row)} fields, and the first line names {len(names)}; "
                        "mend or remove it"
                    )
                yield line, to_bytes(row[column]) or None
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line}: not a row of fields ({error}); mend or remove it"
        ) from None
    finally:
        stream.detach()  # which would close the file when it is forgotten
