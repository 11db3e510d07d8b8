"""JSON: lines of objects, one array of objects, or objects one after another.

Lines are told apart before they are parsed. An array is parsed value by value from a buffer that
grows to the longest value, so a file of any size is read in bounded memory.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from pretrain_cli.data.corpus.records import (
    READ_AT_ONCE,
    NotText,
    Part,
    Record,
    Source,
    UntilFailure,
    in_parts,
)
from pretrain_cli.errors import DataError

try:
    import orjson
except ImportError:
    orjson = None

DECODER = json.JSONDecoder(parse_int=float)  # int() refuses 5,000 digits
CUT = 16
"""Characters before the end of the buffer where an error may come from the cut: no literal and no
escape of JSON is longer."""
NEWLINE = ord("\n")
BYTE_ORDER_MARK = "\ufeff"
SPACE = " \t\r\n" + BYTE_ORDER_MARK
OTHER_WAYS = "name the key with --text-key, or read all files as plain text with --input text"


def json_rows(source: Source) -> Iterator[Part]:
    """Yield the records of a JSON file: lines, if its first line is an object and another follows;
    otherwise an array or a sequence of objects."""
    first, _, rest = _begin(source.head).partition(b"\n")
    return _lines(source) if rest.strip() and _object(first) else in_parts(json_values(source))


def has_json_text(head: bytes, key: str) -> bool:
    """Return whether a file begins with a JSON object, in an array or on a line of its own, that
    has text under this key."""
    begin = _begin(head)
    in_array = begin.startswith(b"[")
    row = _object(_begin(begin[1:]) if in_array else begin.partition(b"\n")[0], cut=in_array)
    try:
        return row is not None and isinstance(_under(row, key), str)
    except KeyError:
        return False


def _begin(head: bytes) -> bytes:
    return head.lstrip(SPACE.encode())


def _object(data: bytes, *, cut: bool = False) -> dict[str, Any] | None:
    """Parse an object; None if it is none. With `cut`, other text may follow it."""
    if not data.startswith(b"{"):
        return None
    text = data.decode(errors="replace")
    try:
        return DECODER.raw_decode(text)[0] if cut else DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def json_lines(source: Source) -> Iterator[Part]:
    """Yield the records of JSON lines, or of an array in their place. Blank lines are skipped."""
    if _begin(source.head).startswith(b"["):
        return in_parts(json_values(source))
    return _lines(source)


def _lines(source: Source) -> Iterator[Part]:
    first = 1
    for data in _whole_lines(source.stream):
        # numpy counts several times as fast as bytes.count
        newlines = int(np.count_nonzero(np.frombuffer(data, np.uint8) == NEWLINE))
        count = newlines + (not data.endswith(b"\n"))
        yield Lines(source.path, source.key, first, count, data)
        first += count


def _whole_lines(stream: Any) -> Iterator[bytes]:
    """Yield a stream in blocks of whole lines; a line longer than READ_AT_ONCE is alone. An
    exception is raised after the whole lines before it."""
    whole: list[bytes] = []
    rest: list[bytes] = []  # of a line that goes on
    blocks = UntilFailure(iter(lambda: stream.read1(READ_AT_ONCE), b""))
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end and sum(map(len, rest)) > READ_AT_ONCE:
            first = block.find(b"\n") + 1
            if whole:
                yield b"".join(whole)
            yield b"".join((*rest, block[:first]))
            whole, rest, block, end = [], [], block[first:], end - first
        if end:
            whole += *rest, block[:end]
            rest = []
        if block[end:]:
            rest.append(block[end:])
        if sum(map(len, whole)) >= READ_AT_ONCE // 2:
            yield b"".join(whole)
            whole = []
    if whole:
        yield b"".join(whole)
    blocks.raise_failure()
    if rest:
        yield b"".join(rest)


@dataclass(frozen=True)
class Lines:
    """Consecutive JSON lines."""

    path: Path
    key: str
    first: int
    """Number of the first line."""
    count: int
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def after(self, count: int) -> "Lines":
        begin = 0
        for _ in range(count):
            begin = self.data.index(b"\n", begin) + 1
        return replace(
            self, first=self.first + count, count=self.count - count, data=self.data[begin:]
        )

    def texts(self, replaces: Callable[[str], bool]) -> Iterator[Record]:
        begin = 0
        view = memoryview(self.data)
        for number in range(self.first, self.first + self.count):
            end = self.data.find(b"\n", begin) + 1 or len(self.data)
            place = f"{self.path}:{number}"
            row = _fast_row(view[begin:end])
            if row is None:
                line = self.data[begin:end]
                begin = end
                if not line.strip():
                    continue
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    if not replaces(f":{number}"):
                        continue
                    text = line.decode(errors="replace")
                row = _row(text, place)
            begin = end
            yield number, _text(row, self.key, place)


def _fast_row(line: memoryview) -> Any:
    """Return the value of a JSON line; None if only the standard library's reader can read it or
    say what is wrong, or if orjson isn't installed. orjson reads less: it refuses NaN, bytes that
    are not UTF-8 and half surrogate pairs."""
    if orjson is None:
        return None
    try:
        return orjson.loads(line)
    except ValueError:
        return None


def _row(line: str, place: str) -> Any:
    try:
        return DECODER.decode(line.removeprefix(BYTE_ORDER_MARK))
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise DataError(
            f"{place}: not a JSON line ({what} at column {error.colno}); mend or remove it"
        ) from None
    except RecursionError:
        raise DataError(f"{place}: nested too deep; mend or remove it") from None


def json_values(source: Source) -> Iterator[Record]:
    """Yield the texts of objects that follow each other or stand in an array. Raises NotText if the
    first object stands in no array and lacks the key: then it is no document but data."""
    values = _Values(source)
    for value in values:
        line, place = values.line, f"{source.path}:{values.line}: value {values.count}"
        if values.count == 1 and not values.in_array and isinstance(value, dict):
            try:
                _under(value, source.key)
            except KeyError:
                raise NotText(f"JSON without '{source.key}'") from None
        yield line, _text(value, source.key, place)


def _under(row: dict[str, Any], key: str) -> Any:
    """Return the value of a key, or of a path of keys, such as a.b. Raises KeyError if there is
    none."""
    if key in row:
        return row[key]
    first, _, rest = key.partition(".")
    inner = row[first] if rest else None
    if isinstance(inner, dict):
        return _under(inner, rest)
    if rest and inner is None:
        return None
    raise KeyError(key)


def _text(row: Any, key: str, place: str) -> bytes | None:
    """Return the text under a key as bytes; None for a null."""
    try:
        text = row[key] if key in row else _under(row, key)
        if text is None:
            return None
    except (KeyError, TypeError):
        has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place}: no text under '{key}' (it has {has}); {OTHER_WAYS}") from None
    if not isinstance(text, str):
        raise DataError(
            f"{place}: what is under '{key}' is not text; name another key with --text-key, or "
            "mend or remove it"
        )
    return to_bytes(text)


def to_bytes(text: str) -> bytes:
    """Return a text as UTF-8. What came from invalid bytes (surrogateescape) becomes these bytes
    again; half a surrogate pair, which JSON can escape, becomes invalid UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


class _Values:
    """Iterator over the JSON values of a stream. The elements of an array at the top are values of
    their own."""

    def __init__(self, source: Source) -> None:
        self.stream: IO[bytes] = source.stream
        self.path = source.path
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = "", 0
        """Buffer, and the position in it of the next value."""
        self.line, self.counted = 1, 0
        """Line of the value, and the position in the buffer up to which lines are counted."""
        self.count = 0
        """Values so far."""
        self.in_array = False

    def __iter__(self) -> Iterator[Any]:
        while sign := self._next_sign():
            if sign == "[" and not self.in_array:
                self.in_array = True
                self.at += 1
                if self._next_sign() == "]":
                    self._end_array()
                continue
            yield self._value()
            if self.in_array:
                sign = self._next_sign()
                if sign == "]":
                    self._end_array()
                elif sign == ",":
                    self.at += 1
                else:
                    self._refuse("Expecting ',' or ']'" if sign else "It ends within an array")
        if self.in_array:
            self._refuse("It ends within an array")

    def _end_array(self) -> None:
        self.in_array = False
        self.at += 1

    def _next_sign(self) -> str:
        """Return the next character that is not white space, without taking it; empty at the
        end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in SPACE:
                self.at += 1
            if self.at < len(self.text) or not self._read_more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        self.count += 1
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - CUT
                if not is_cut or not self._read_more():
                    self._refuse(error.msg.removesuffix(" at"))
            except RecursionError:
                self._refuse("nested too deep")
            else:
                self.at = end
                return value

    def _read_more(self) -> bool:
        """Drop what was parsed, and read as much again as is left, at least a block."""
        rest = self.text[self.at :]
        self.line += self.text.count("\n", self.counted, self.at)
        data = self.stream.read(max(READ_AT_ONCE, len(rest)))
        self.text = rest + self.decoder.decode(data, final=not data)
        self.at = self.counted = 0
        return bool(data)

    def _refuse(self, why: str) -> None:
        raise DataError(f"{self.path}:{self.line}: value {self.count}: not JSON ({why}); mend it")
