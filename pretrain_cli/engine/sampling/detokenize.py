"""Tokens to text as they come: whole characters, and nothing of what a stop string begins with."""

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Tokens of the prompt that the first token's text may depend on: a leading space, bytes."""


class TextStream:
    """The text of tokens, in pieces that are whole characters.

    A character may take several tokens, as bytes, and a token's text depends on those before it. So
    the last tokens are decoded with and without the new one, and what that adds is given once it
    ends in no broken character. Bytes that never become one are given as what they decode to.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = prompt[-CONTEXT:]
        self.known = len(self.ids)
        """Number of ids whose text was returned or is the prompt's."""

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        self.ids.append(token)
        return self._new(held_back=True)

    def end(self) -> str:
        """Return the text that was held back."""
        return self._new(held_back=False)

    def _new(self, *, held_back: bool) -> str:
        decode = self.tokenizer.decode
        given, whole = decode(self.ids[: self.known]), decode(self.ids)
        if len(whole) <= len(given) or (held_back and whole.endswith(BROKEN)):
            return ""
        self.ids = self.ids[self.known :] if held_back else []
        self.known = len(self.ids)
        return whole[len(given) :]


class StopStrings:
    """Text up to the first of some strings, of which nothing is given out that may begin one."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Return the text that can be released. Sets `found` if a stop string ends it."""
        text = self.held + piece
        ends = [place for string in self.strings if (place := text.find(string)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """Return the text held back for a stop string that did not come."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """The longest beginning of the string, short of the whole, that the text ends in."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
