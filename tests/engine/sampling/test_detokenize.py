"""Tokens to text: whole characters, every byte in the end, and nothing of a stop string."""

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
    """A tokenizer as llama2's and gemma3's: words, and bytes for all else."""
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
        pytest.skip(f"{request.param} is not here: {error}")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The start"])
def test_pieces_make_up_the_text(tokenizer, prompt, text):
    before = tokenizer.encode_prompt(prompt)
    ids = tokenizer.encode_prompt(prompt + text)
    if ids[: len(before)] != before:
        pytest.skip("the prompt's last token goes on into the text")
    pieces = streamed(tokenizer, before, ids[len(before) :])
    assert "".join(pieces) == tokenizer.decode(ids)[len(tokenizer.decode(before)) :]


def test_a_character_of_several_tokens_comes_whole(byte_fallback):
    for tokenizer in (load_tokenizer("bytes"), byte_fallback):
        pieces = streamed(tokenizer, tokenizer.encode_prompt("a"), ids_of(tokenizer, "é😀b"))
        assert [piece for piece in pieces if piece] == ["é", "😀", "b"]


def ids_of(tokenizer, text):
    if tokenizer.name == "bytes":
        return list(text.encode())
    return [4 if char == "b" else 6 + byte for char in text for byte in char.encode()]


@pytest.mark.parametrize("broken", [b"\xf0\x9f", b"\xff", b"\xc3\xc3"])
def test_bytes_that_never_become_a_character_are_given_all_the_same(broken):
    tokenizer = load_tokenizer("bytes")
    prompt = tokenizer.encode_prompt("a")
    expected = (b"a" + broken).decode(errors="replace")[1:]
    assert "".join(streamed(tokenizer, prompt, list(broken))) == expected
    goes_on = (b"a" + broken + b"xyz").decode(errors="replace")[1:]
    assert "".join(streamed(tokenizer, prompt, list(broken + b"xyz"))) == goes_on


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["aa", "b"], strings=["aab"])  # what is held back must be the longest beginning
@example(pieces=["b", "ab", "a", "c"], strings=["abac", "bb"])
def test_text_ends_before_the_first_stop_string_whatever_the_pieces(pieces, strings):
    """Against a search in the text as far as it had come when one was found."""
    stop = StopStrings(tuple(strings))
    given_out, seen = "", ""
    for piece in pieces:
        seen += piece
        given_out += stop.add(piece)
        places = [seen.find(string) for string in strings if string in seen]
        assert stop.found == bool(places)
        if places:
            assert given_out == seen[: min(places)]
            return
        assert seen.startswith(given_out)
        kept = seen[len(given_out) :]
        assert not kept or any(string.startswith(kept) for string in strings)
    assert given_out + stop.end() == seen
