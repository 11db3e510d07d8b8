"""Detokenizing: whole characters, every byte by the end, and no part of a stop string."""

import json

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain_cli.data.tokenizers.tokenizer import HUB, load_tokenizer, read_tokenizer
from pretrain_cli.engine.sampling.detokenize import StopStrings, TextStream

TEXTS = [
    "Hello world",
    " leading space, then 你好 and 👩‍👩‍👧‍👦 and \U0001f9ff\U0001f9ff!",
    "naïve — “quoted”\n\n\tdef f(x):\r\n",
    "\N{REPLACEMENT CHARACTER} is a character too\N{REPLACEMENT CHARACTER}",
    "ਪੰਜਾਬੀ ꧁ꦗꦮ꧂ 𓀀𓀁",
]


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """Tokenizer with byte fallback, as llama2's and gemma3's: bytes for all but a few words."""
    vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.add_special_tokens(["</s>"])
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(backend.to_str())))
    return read_tokenizer(path, name="fallback")


def streamed(tokenizer, prompt, ids):
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.add(token) for token in ids]
    return [*pieces, stream.end()]


@pytest.fixture(params=["bytes", "fallback", *HUB])
def tokenizer(request):
    if request.param == "fallback":
        return request.getfixturevalue("byte_fallback")
    try:
        return load_tokenizer(request.param)
    except Exception as error:
        pytest.skip(f"{request.param} is unavailable: {error}")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The start"])
def test_pieces_join_to_the_decoded_text(tokenizer, prompt, text):
    before = tokenizer.encode_prompt(prompt)
    ids = tokenizer.encode_prompt(prompt + text)
    if ids[: len(before)] != before:
        pytest.skip("the prompt's last token continues into the text")
    pieces = streamed(tokenizer, before, ids[len(before) :])
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(before)) :]


def test_a_character_of_several_tokens_is_returned_whole(byte_fallback):
    for tokenizer in (load_tokenizer("bytes"), byte_fallback):
        pieces = streamed(tokenizer, tokenizer.encode_prompt("a"), ids_of(tokenizer, "é😀b"))
        assert [piece for piece in pieces if piece] == ["é", "😀", "b"]


def ids_of(tokenizer, text):
    if tokenizer.name == "bytes":
        return list(text.encode())
    return [4 if char == "b" else 6 + byte for char in text for byte in char.encode()]


@pytest.mark.parametrize("broken", [b"\xf0\x9f", b"\xff", b"\xc3\xc3"])
def test_bytes_that_form_no_character_are_returned_at_the_end(broken):
    tokenizer = load_tokenizer("bytes")
    prompt = tokenizer.encode_prompt("a")
    expected = (b"a" + broken).decode(errors="replace")[1:]
    assert "".join(streamed(tokenizer, prompt, list(broken))) == expected
    continued = (b"a" + broken + b"xyz").decode(errors="replace")[1:]
    assert "".join(streamed(tokenizer, prompt, list(broken + b"xyz"))) == continued


def test_an_invalid_byte_after_a_character_does_not_end_the_stream(byte_fallback):
    """DecodeStream raises here: byte fallback replaces all bytes of a run that is not UTF-8."""
    ids = [*ids_of(byte_fallback, "é"), 6 + 0xFF, *ids_of(byte_fallback, "bé")]
    pieces = streamed(byte_fallback, byte_fallback.encode_prompt("a"), ids)
    assert [piece for piece in pieces if piece] == ["é", "\ufffd\ufffdb", "é"]


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["aa", "b"], strings=["aab"])  # the longest possible beginning is held back
@example(pieces=["b", "ab", "a", "c"], strings=["abac", "bb"])
def test_text_ends_before_the_first_stop_string(pieces, strings):
    """Compare with a search in the text received so far."""
    stop = StopStrings(tuple(strings))
    released, seen = "", ""
    for piece in pieces:
        seen += piece
        released += stop.add(piece)
        starts = [seen.find(string) for string in strings if string in seen]
        assert stop.found == bool(starts)
        if starts:
            assert released == seen[: min(starts)]
            return
        assert seen.startswith(released)
        held = seen[len(released) :]
        assert not held or any(string.startswith(held) for string in strings)
    assert released + stop.end() == seen
