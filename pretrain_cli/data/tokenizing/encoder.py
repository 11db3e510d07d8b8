"""Encoders: from texts to token ids, with the tokenizers library or many times faster with
gigatoken.

The ids of the tokenizers library are the definition. gigatoken (extra `fast`) has to give the same:
for texts made to find differences before it is used at all, and for a sample of the corpus while it
runs. At the first difference, `EncodersDiffer` ends the work, and it is done again with the
library.
"""

import array
import functools
import importlib
import importlib.metadata
import json
import sys
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.request import EncoderName
from pretrain_cli.errors import ConfigError

PIECE = 2**13
"""Characters that the tokenizers library encodes at once; see chunking.py."""
PIECES = 2**8
"""Pieces that it encodes in one call."""
SAMPLE_CHARACTERS = 1024
BYTES_A_SAMPLE = 2**24
"""Bytes of text of which one sample is compared. The library is a hundred times slower, so this
costs a hundredth of the time."""
NAMES = 300
"""Added tokens whose names are encoded as text before."""
FIRST_BYTE = 0xDF
"""UTF-8 of the first DISPUTED character begins with it."""

Ids = tuple[np.ndarray, np.ndarray]
"""The ids of several texts, concatenated, and the number of ids of each."""

PROBES = (
    "def f(x):\n    return x  # two  spaces\n\n\n\tif True:\r\n\t\tpass\r\n",
    "It's we'll I'M they'VE don't 'tis 'S' rock'n'roll",
    " leading, trailing and  inner   spaces    \n \n  \n",
    "1 12 123 1234 12345.678 1,000,000 ½ ² ٣٤٥ १२३ 一二三 Ⅷ",
    "https://example.org/a_b?c=d&e=%20#f <a href='x'>y</a> {\"k\": [1, null]} $\\alpha_1^2$",
    "Größe naïve Straße Ærø İstanbul ǅ ﬁ ﬂ ſ K Å e\u0301 é o\u0308 \u1e9b\u0323",
    "Привет, мир! Ёлка ёж. Україна ґанок. Ελληνικά ΆΈ, ΐ. Հայերեն: ქართული ენა",
    "שָׁלוֹם עולם. مرحبا بالعالم، كيف الحال؟ پارسی ۱۲۳ ܐܪܡܝܐ ދިވެހި",
    "नमस्ते दुनिया। বাংলা ভাষা। தமிழ் மொழி తెలుగు ಕನ್ನಡ മലയാളം සිංහල ગુજરાતી ਪੰਜਾਬੀ ଓଡ଼ିଆ",
    "สวัสดีชาวโลก ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ བོད་སྐད། አማርኛ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ᠮᠣᠩᠭᠣᠯ",
    "你好，世界。東京は日本の首都です。カタカナ ｶﾀｶﾅ ㍿ 한국어 조합 각 𠀀𠮷 龍龘",
    "😀👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪❤️ \u200d\ufe0f © ™ ∑∫√∞ ← ↔ ▁ ▁▁ █ ░ 𝔘𝕟𝕚",
    "\x00\x01\x1b[0m\x7f\x80\x85\xa0\xad\u1680\u2000\u2003\u2028\u2029\u202e\u3000\ufeff\ufffd\uffff",
    "\ufdfa\u0130\u0149\u1fb3\u03b0\u0390 A\u030a \u1100\u1161\u11a8 \U000e0001\U0010ffff",
    "a" * 3000 + "-" * 300 + " " * 3000 + "\n" * 300 + "\t" * 300 + "=" * 3000,
    "\n", " ", "  ", "\r\n", "\u3000", ".", "a", "Ġ", "Ċ", "<0x0A>", "é", "e\u0301", "\ufeffx",
)  # fmt: skip
"""Texts on which encoders have differed, or are likely to."""

DISPUTED = (
    (0x07FD, 0x07FD), (0x088F, 0x088F), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE),
    (0x0C3C, 0x0C3C), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA),
    (0x1715, 0x1715), (0x1ABF, 0x1ADD), (0x1AE0, 0x1AEB), (0x1DF6, 0x1DFA), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0xA82C, 0xA82C), (0x10940, 0x10959),
    (0x10D24, 0x10D27), (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EC5, 0x10EC7),
    (0x10EFA, 0x10EFB), (0x10EFD, 0x10EFF), (0x10F46, 0x10F50), (0x10F82, 0x10F85),
    (0x11070, 0x11070), (0x1133B, 0x1133B), (0x113C2, 0x113C2), (0x113CE, 0x113D0),
    (0x1145E, 0x1145E), (0x11839, 0x1183A), (0x1193D, 0x1193E), (0x11943, 0x11943),
    (0x119E0, 0x119E0), (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99),
    (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11DB0, 0x11DDB),
    (0x11DE0, 0x11DE9), (0x11F41, 0x11F42), (0x1611E, 0x1611E), (0x1612F, 0x1612F),
    (0x16D67, 0x16D67), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF0, 0x16FF6),
    (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E08F, 0x1E08F),
    (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF),
    (0x1E5EE, 0x1E5EF), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF),
    (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
)  # fmt: skip
"""Code points on which gigatoken 0.10 and tokenizers 0.22 differ, first and last of each range.

gigatoken knows the letters and digits of Unicode 17, and the combining marks since Unicode 10,
which NFC puts in order; tokenizers doesn't. Found by comparing every code point, alone and among
marks (tests/data/tokenizing/test_encoder.py)."""


class EncodersDiffer(Exception):
    """gigatoken gave other ids for a text than the tokenizers library."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Encoder(Protocol):
    """Encodes texts. Can be sent to another process."""

    name: str
    """Name and version of the package."""
    compared: int
    """Samples whose ids were compared with the library's, and were the same."""

    def encode(self, texts: Sequence[bytes], continues: Sequence[bool]) -> Ids:
        """Return the ids of UTF-8 texts. `continues` is true for a text that continues the
        document of the text before it."""
        ...


class LibraryEncoder:
    """Encodes with the tokenizers library, in short pieces: it takes 100 to 185 bytes of memory for
    each byte of a string."""

    compared = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = f"tokenizers {importlib.metadata.version('tokenizers')}"
        self.backend = tokenizer.backend
        self.chunker = Chunker(tokenizer)
        self.are_special_text = tokenizer.backend.encode_special_tokens

    def encode(self, texts: Sequence[bytes], continues: Sequence[bool]) -> Ids:
        # a tokenizer loses this setting when it is pickled
        self.backend.encode_special_tokens = self.are_special_text
        pieces: list[str] = []
        leads: list[int] = []
        firsts = [0]
        text, lead = self.chunker.lead if any(continues) or _are_long(texts) else ("", 0)
        for whole, continued in zip(texts, continues, strict=True):
            for number, piece in enumerate(self.chunker.pieces(whole.decode(), PIECE)):
                follows = number > 0 or continued
                pieces.append(text + piece if follows else piece)
                leads.append(lead if follows else 0)
            firsts.append(len(pieces))
        ids = array.array("I")  # converts lists several times as fast as numpy
        ends = [0]
        for first in range(0, len(pieces), PIECES):
            batch = slice(first, first + PIECES)
            encodings = self.backend.encode_batch_fast(pieces[batch], add_special_tokens=False)
            for encoding, lead in zip(encodings, leads[batch], strict=True):
                ids.extend(array.array("I", encoding.ids[lead:]))
                ends.append(len(ids))
        counts = np.diff(np.array(ends)[firsts])
        return np.frombuffer(ids, np.uint32) if ids else np.empty(0, np.uint32), counts


class GigatokenEncoder:
    """Encodes with gigatoken, on this thread; texts with DISPUTED characters with the library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
        self.library = LibraryEncoder(tokenizer)
        read = json.loads(tokenizer.json)
        names = [token["content"] for token in read["added_tokens"][:NAMES]]
        self.json = tokenizer.json
        if tokenizer.backend.encode_special_tokens:  # then they are plain text
            read["added_tokens"] = [t for t in read["added_tokens"] if not t["special"]]
            self.json = json.dumps(read)
        self.lead = self.library.chunker.lead
        self.compared = 0
        self.bytes_since_sample = BYTES_A_SAMPLE
        _ = self.backend  # raises here for a tokenizer that gigatoken doesn't know
        for text in (*PROBES, "".join(f"{name} x{name}{name}\n" for name in names)):
            self.compare(text)

    @cached_property
    def backend(self) -> Any:
        return importlib.import_module("gigatoken.gigatoken_rs").load_hf_json(self.json)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "backend"}

    def encode(self, texts: Sequence[bytes], continues: Sequence[bool]) -> Ids:
        disputed = texts_with_disputed(texts)
        if not disputed.any():
            return self._encode(texts, continues)
        parts: list[Ids] = [(np.empty(0, np.uint32), np.empty(0, np.int64))]
        borders = [0, *(np.flatnonzero(np.diff(disputed)) + 1).tolist(), len(texts)]
        for first, last in pairwise(borders):
            encode = self.library.encode if disputed[first] else self._encode
            parts.append(encode(texts[first:last], continues[first:last]))
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([n for _, n in parts])

    def _encode(self, texts: Sequence[bytes], continues: Sequence[bool]) -> Ids:
        lead, count = self.lead
        if count:
            texts = [
                lead.encode() + text if continued else text
                for text, continued in zip(texts, continues, strict=True)
            ]
        made = self.backend.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(made.offsets.data)
        ids = np.asarray(made.content.data)[offsets[0] : offsets[-1]]
        counts = np.diff(offsets)
        if count and any(continues):
            leads = offsets[:-1][np.asarray(continues, dtype=bool)] - offsets[0]
            ids = np.delete(ids, (leads[:, None] + np.arange(count)).ravel())
            counts = counts - count * np.asarray(continues, dtype=np.int64)
        self._compare_a_sample(texts)
        return ids, counts

    def compare(self, text: str) -> None:
        """Raise EncodersDiffer unless the library gives the same ids."""
        expected, _ = self.library.encode([text.encode()], [False])
        (ids,) = self.backend.encode_batch([text.encode()], parallel=False)
        if not np.array_equal(ids, expected):
            raise EncodersDiffer(text)
        self.compared += 1

    def _compare_a_sample(self, texts: Sequence[bytes]) -> None:
        size = sum(map(len, texts))
        self.bytes_since_sample += size
        if self.bytes_since_sample < BYTES_A_SAMPLE or not size:
            return
        self.bytes_since_sample = 0
        sampled = zlib.crc32(texts[0])
        text = texts[sampled % len(texts)]
        start = sampled % max(1, len(text) - SAMPLE_CHARACTERS)
        self.compare(text[start : start + SAMPLE_CHARACTERS].decode(errors="ignore"))


def texts_with_disputed(texts: Sequence[bytes]) -> np.ndarray:
    """Return whether each UTF-8 text has a DISPUTED character. -> (n,) bool."""
    found = np.zeros(len(texts), bool)
    numbers = [number for number, text in enumerate(texts) if not text.isascii()]
    texts = [texts[number] for number in numbers]
    data = np.frombuffer(b"".join(texts) + bytes(3), np.uint8)
    begins = np.flatnonzero(data >= FIRST_BYTE)  # of characters up from the first disputed one
    if not len(begins):
        return found
    one, two, three, four = (data[begins + n].astype(np.int32) & 63 for n in range(4))
    lead = data[begins]
    points = np.where(
        lead < 0xE0,
        (one & 31) << 6 | two,
        np.where(
            lead < 0xF0,
            (one & 15) << 12 | two << 6 | three,
            (one & 7) << 18 | two << 12 | three << 6 | four,
        ),
    )
    ends = np.cumsum([len(text) for text in texts])
    having = np.searchsorted(ends, begins[_is_disputed()[points]], side="right")
    found[np.array(numbers)[having]] = True
    return found


@functools.cache
def _is_disputed() -> np.ndarray:
    table = np.zeros(sys.maxunicode + 1, bool)
    for first, last in DISPUTED:
        table[first : last + 1] = True
    return table


def choose_encoder(tokenizer: Tokenizer, asked: EncoderName = "auto") -> tuple[Encoder, str]:
    """Return an encoder, and the reason why it isn't gigatoken; empty if it is, or if it isn't
    installed. Raises ConfigError if gigatoken is asked for by name and can't be used."""
    if asked == "tokenizers":
        return LibraryEncoder(tokenizer), ""
    try:
        return GigatokenEncoder(tokenizer), ""
    except ImportError:
        if asked == "gigatoken":
            raise ConfigError(
                "--encoder gigatoken: not installed; pip install gigatoken, or leave it out"
            ) from None
        return LibraryEncoder(tokenizer), ""
    except EncodersDiffer as difference:
        why = f"gigatoken gives other ids for {shortened(difference.text)}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it is written in Rust, whose panics are no Exceptions
        why = f"gigatoken doesn't know this tokenizer ({str(error).splitlines()[0][:80]})"
    if asked == "gigatoken":
        raise ConfigError(f"--encoder gigatoken: {why}; leave it out") from None
    return LibraryEncoder(tokenizer), why


def shortened(text: str) -> str:
    """Return a text on one line, in quotes, of at most 60 characters."""
    return repr(text if len(text) <= 60 else f"{text[:59]}…")


def _are_long(texts: Sequence[bytes]) -> bool:
    return any(len(text) > PIECE for text in texts)
