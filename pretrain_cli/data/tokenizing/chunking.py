"""Chunking: find cuts in a long document that leave its token ids unchanged.

A tokenizer takes 100 to 185 bytes of memory for each byte of a string and is slower on long
strings, so long documents are encoded in chunks. Most cuts change the ids. These usually do not:

    after a single newline between two non-space characters
    before a single space

No rule holds for every tokenizer and text, so each cut is tested: the text around it must encode to
the same ids whole and cut. In a text without such places (a run of one letter, letters without
spaces), the ids themselves are used: a border between two ids, far from both ends of the text, that
stays a border when the text starts there.

Some tokenizers (llama2) put a space before every text. They receive the continuation of a document
after a newline, whose ids are then removed.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer

AROUND = 120
"""Characters on either side of a cut that are encoded to test it."""
PHASES = 16
"""Number of different lengths of preceding text with which an uncertain cut is tested."""
TRIES = 8
PLACES = (
    re.compile(r"(?<=\S\n)(?=\S)"),
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(r"(?<=\w[^\w\s])(?=\w)"),
)
"""Patterns of possible cuts, most reliable first. The last, after a single mark between letters, is
for text without spaces."""


class Chunker:
    """Cuts documents into chunks for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def lead(self) -> tuple[str, int]:
        """Return the text put before a continuing chunk, and the number of ids it adds."""
        left, right = "some words\n", "other words"
        if self._ids(left) + self._ids(right) == self._ids(left + right):
            return "", 0
        return "\n", len(self._ids("\n"))

    def continuing(self, text: str) -> str:
        """Return the text to encode for a chunk that does not begin its document."""
        return self.lead[0] + text

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Cut a text into pieces of about `size` characters, or more if no cut is possible."""
        start, reach = 0, size
        while len(text) - start > 2 * size and start + reach < len(text) - AROUND:
            cut = self._place(text, start + reach - size // 2, start + reach)
            if cut is None:
                reach += size // 2
                continue
            yield text[start:cut]
            start, reach = cut, size
        yield text[start:]

    def blocks(self, texts: Iterator[str], size: int) -> Iterator[tuple[str, bool]]:
        """Yield (block, whether the cut after it is exact) for a document that arrives in parts.
        Blocks have at most about `size` characters, the last one less than twice as many."""
        held = ""
        begins = True
        for text in texts:
            held += text
            while len(held) >= 2 * size:
                cut = self._place(held, size // 2, size)
                exact = True
                if cut is None:
                    cut, exact = self._by_ids(held[: size // 8], begins=begins)
                yield held[:cut], exact
                held, begins = held[cut:], False
        if held:
            yield held, True

    def _place(self, text: str, first: int, last: int) -> int | None:
        """Return the last possible cut in a range, by the most reliable rule that finds one."""
        for rule in PLACES:
            for cut in islice(_backwards(rule, text, first, last), TRIES):
                if self._holds(text, cut, thoroughly=rule is PLACES[-1]):
                    return cut
        return None

    def _holds(self, text: str, cut: int, *, thoroughly: bool) -> bool:
        """Return whether the text around a cut has the same ids whole and cut. `thoroughly` also
        tests shorter preceding texts, because some tokenizers' ids depend on repetitions."""
        right = text[cut : cut + AROUND]
        after = self._continued(right)
        for reach in range(AROUND, AROUND - (PHASES if thoroughly else 1), -1):
            left = text[max(0, cut - reach) : cut]
            if self._continued(left) + after != self._continued(left + right):
                return False
        return True

    def _by_ids(self, text: str, *, begins: bool) -> tuple[int, bool]:
        """Return (border between two ids, whether the cut is exact) for a text without other
        cuts."""
        lead, count = ("", 0) if begins else self.lead
        encoding = self.tokenizer.backend.encode(lead + text, add_special_tokens=False)
        ids = encoding.ids[count:]
        borders = [start - len(lead) for start, _ in encoding.offsets[count:]]
        middle = len(ids) // 2
        for number in range(max(middle, 1), min(middle + TRIES, len(ids))):
            cut = borders[number]
            if cut <= borders[number - 1]:  # inside a character that has several ids
                continue
            after = self._continued(text[cut:])
            sure = len(after) // 2
            if not sure or after[:sure] != ids[number : number + sure]:
                continue
            # spaces before the cut may encode differently at the end of a text
            if self._ids(lead + text[:cut])[count:] == ids[:number]:
                return cut, True
        return max(1, len(text) // 2), False

    def _continued(self, text: str) -> list[int]:
        return self._ids(self.continuing(text))[self.lead[1] :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.backend.encode(text, add_special_tokens=False).ids


def _backwards(rule: re.Pattern[str], text: str, first: int, last: int) -> Iterator[int]:
    """Yield a pattern's matches in a range, last first."""
    for high in range(last, first, -2048):
        found = [match.start() for match in rule.finditer(text, max(first, high - 2048), high)]
        yield from reversed(found)
