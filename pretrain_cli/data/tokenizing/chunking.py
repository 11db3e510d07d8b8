"""Find cuts in a long document that leave its token ids unchanged.

A tokenizer takes 100 to 185 bytes of memory for each byte of a string, and is slower on long ones,
so long documents are encoded in pieces. Most cuts change the ids; these don't, as a rule:

    after a newline that stands alone between two characters that aren't spaces
    before a space that stands alone

No rule holds for every tokenizer and every text, so each cut is tried: the text around it must
encode to the same ids whole and cut. Where a text has no such places (a run of one letter, letters
without a space), the ids tell: a border between two of them, far enough from both ends, that comes
out the same when the text begins there.

Some tokenizers (llama2) put a space before every text they are given. What continues a document is
given to them behind a newline, whose ids are taken off again.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer

AROUND = 120
"""Characters on either side of a cut that it is tried on."""
PHASES = 16
"""Lengths of the text before a cut that an unsure one is tried on."""
TRIES = 8
PLACES = (
    re.compile(r"(?<=\S\n)(?=\S)"),
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(r"(?<=\w[^\w\s])(?=\w)"),
)
"""From the surest to the least sure; the last, behind a mark that stands alone between letters, is
for text that has no spaces."""


class Chunker:
    """Cuts documents for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def lead(self) -> tuple[str, int]:
        """Return the text put before a continuing piece, and the number of ids it adds."""
        left, right = "some words\n", "other words"
        if self._ids(left) + self._ids(right) == self._ids(left + right):
            return "", 0
        return "\n", len(self._ids("\n"))

    def continuing(self, text: str) -> str:
        """The piece as it is to be encoded, where it doesn't begin its document."""
        return self.lead[0] + text

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Cut a text into pieces of about `size` characters, or more where there is no place."""
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
        """A document that comes in parts, in blocks of at most about `size` characters; and of
        each whether the cut behind it is exact."""
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
        """The last place in this range that a text can be cut at, by the surest rule there is."""
        for rule in PLACES:
            for cut in islice(_backwards(rule, text, first, last), TRIES):
                if self._holds(text, cut, thoroughly=rule is PLACES[-1]):
                    return cut
        return None

    def _holds(self, text: str, cut: int, *, thoroughly: bool) -> bool:
        """Return whether the text around a cut has the same ids whole and cut. `thoroughly` also
        tries a shorter context before it, because some tokenizers' ids depend on repetitions."""
        right = text[cut : cut + AROUND]
        after = self._continued(right)
        for reach in range(AROUND, AROUND - (PHASES if thoroughly else 1), -1):
            left = text[max(0, cut - reach) : cut]
            if self._continued(left) + after != self._continued(left + right):
                return False
        return True

    def _by_ids(self, text: str, *, begins: bool) -> tuple[int, bool]:
        """(a border between two ids, whether it is exact), in a text without other places that may
        begin its document."""
        lead, count = ("", 0) if begins else self.lead
        encoding = self.tokenizer.backend.encode(lead + text, add_special_tokens=False)
        ids = encoding.ids[count:]
        borders = [start - len(lead) for start, _ in encoding.offsets[count:]]
        middle = len(ids) // 2
        for number in range(max(middle, 1), min(middle + TRIES, len(ids))):
            cut = borders[number]
            if cut <= borders[number - 1]:  # a character of several ids
                continue
            after = self._continued(text[cut:])
            sure = len(after) // 2
            if not sure or after[:sure] != ids[number : number + sure]:
                continue
            if self._ids(lead + text[:cut])[count:] == ids[:number]:  # spaces end otherwise alone
                return cut, True
        return max(1, len(text) // 2), False

    def _continued(self, text: str) -> list[int]:
        return self._ids(self.continuing(text))[self.lead[1] :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.backend.encode(text, add_special_tokens=False).ids


def _backwards(rule: re.Pattern[str], text: str, first: int, last: int) -> Iterator[int]:
    """The places in a range that a rule finds, from the last on."""
    for high in range(last, first, -2048):
        found = [match.start() for match in rule.finditer(text, max(first, high - 2048), high)]
        yield from reversed(found)
