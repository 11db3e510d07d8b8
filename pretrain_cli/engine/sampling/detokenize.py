"""Convert tokens to text as they arrive: whole characters, and no part of a stop string.

TextStream uses the algorithm of `tokenizers.decoders.DecodeStream`. DecodeStream itself was tried
and has two faults:

- It never returns bytes at the end that form no character. transformers decodes them to U+FFFD.
- With byte fallback (Gemma 3, Llama 2) an invalid byte makes the byte tokens before it invalid too.
  If their character was already returned, `step` raises "Invalid prefix" for that token and all
  later ones. An untrained model writes such bytes.

Otherwise DecodeStream gives the same pieces. A workaround for both takes more code than TextStream.
"""

from pretrain_cli.data.tokenizers.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Last tokens of the prompt kept, as the first token's text may depend on them (a leading space,
a character split into bytes)."""


class TextStream:
    """Text of one completion, returned in pieces that are whole characters.

    A character may take several tokens, and a token's text depends on those before it. So the last
    tokens are decoded with and without the new one, and the difference is returned once it ends in
    a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = prompt[-CONTEXT:]
        self.known = len(self.ids)
        """Number of ids whose text was already returned or belongs to the prompt."""

    def add(self, token: int) -> str:
        """Return the text that is now certain."""
        self.ids.append(token)
        text = self.end()
        if not text or text.endswith(BROKEN):
            return ""
        self.ids = self.ids[self.known :]
        self.known = len(self.ids)
        return text

    def end(self) -> str:
        """Return the text that is held back, broken characters included."""
        decode = self.tokenizer.decode
        return decode(self.ids)[len(decode(self.ids[: self.known])) :]


class StopStrings:
    """Text up to the first stop string. Text that may begin a stop string is held back."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Return the text that can be released. Sets `found` if a stop string ends it."""
        text = self.held + piece
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        if starts:
            self.found, self.held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, string) for string in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """Return the held-back text, which turned out to begin no stop string."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest proper prefix of the string that the text ends with."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
