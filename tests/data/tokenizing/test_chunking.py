"""Chunking: long documents encoded in pieces have the same ids as encoded whole."""

import functools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_cli.data.corpus.documents import Document
from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer
from pretrain_cli.data.tokenizing import blocks as blocks_module
from pretrain_cli.data.tokenizing import encoder as encoder_module
from pretrain_cli.data.tokenizing.blocks import Block, Task, blocks_of
from pretrain_cli.data.tokenizing.chunking import Chunker
from pretrain_cli.data.tokenizing.encoder import LibraryEncoder
from pretrain_cli.data.tokenizing.encoding import TaskEncoder
from tests.data.conftest import encode_documents

KINDS = ["bytes", "bpe", "gpt2", "qwen3", "gemma3", "llama2"]
FRAGMENTS = [
    *("a" * 300, "a" * 37, "A", "ab" * 50, "xyz" * 60, ">" * 40, "-" * 90, "=" * 64, "></ "),
    *(" ", "  ", " " * 7, " " * 130, "\t", "\t\t\t", " \t ", "\u00a0", "\u3000", "\u200b"),
    *("\n", "\n\n", "\n" * 9, "\n" * 140, "\r\n", "\r\n\r\n", "\r", "\x85", "\u2028"),
    *("\ufeff", "\x00", "\x00" * 5, "e\u0301", "n\u0303o", "\u0301", "é", "각", "\ud7a3", "ﬁ", "Ⅷ"),
    *("👩\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "👍" * 30, "\U0001f9ff" * 20),
    *("<|endoftext|>", "<bos>", "<eos>", "<s>", "</s>", "<|im_end|>", "<unused7>", "<0x0A>"),
    *("你好世界", "，", "这是一个测试。", "こんにちは", "שלום", "مرحبا "),
    *("QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo0NTY3ODk=", "1234567890" * 6, "12", "3.14"),
    *("▁", "▁▁", " ▁", "_", "__init__", "</div>", "#", "## ", "* ", "{", "();", "...", "? "),
    *("The quick brown fox ", "jumps over\n", "    return x\n", "\n\n    def f(self):\n"),
    *("world. ", "½", "it's", "'s", " I'm", "don't ", "hello"),
]  # fmt: skip


@st.composite
def texts(draw, size):
    """Draw a text of about `size` characters, made of a few fragments in random order."""
    pool = draw(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=12))
    order = random.Random(draw(st.integers(0, 2**32)))
    parts: list[str] = []
    while size > 0:
        parts.append(order.choice(pool) * order.choice([1, 1, 1, 2, 5]))
        size -= len(parts[-1])
    return "".join(parts)


@pytest.fixture(scope="session")
def tokenizer(load):
    """Function that returns a tokenizer by name. For a name that ends in `special`, special tokens
    typed in a text keep their meaning; it is a separate object, because the setting is stored in
    the object."""

    @functools.cache
    def special(name):
        return load_tokenizer(name).marked(bos=None, eos=None, allow_special=True)

    def find(kind):
        name, *asked = kind.split()
        found = load(name)
        return special(name) if asked else found

    return find


def encode(tokenizer, blocks):
    work = TaskEncoder(tokenizer, LibraryEncoder(tokenizer), np.dtype("<u4"))
    return work(Task(blocks, 0)).tokens.tolist()


def cut_in_pieces(tokenizer, text, piece):
    """Return the ids of a text given as one block and encoded in pieces of this many characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "PIECE", piece)
        return encode(tokenizer, [Block(text.encode(), True, True)])


def cut_in_blocks(tokenizer, text, size, parts):
    """Return (blocks of a text that is read in parts, whether all cuts are reported as exact)."""
    data = [text[at : at + parts].encode() for at in range(0, len(text), parts)]
    document = Document(sum(map(len, data)), bytes(16), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_CHARACTERS", size)
        found = list(blocks_of(document, Chunker(tokenizer)))
    return found, all(block.exact for block in found)


def check(tokenizer, text, piece, size, parts):
    (whole,) = encode_documents(tokenizer, [text])
    assert cut_in_pieces(tokenizer, text, piece) == whole
    blocks, exact = cut_in_blocks(tokenizer, text, size, parts)
    assert b"".join(block.text for block in blocks) == text.encode()
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert max(len(block.text.decode()) for block in blocks) < 2 * size
    ids = encode(tokenizer, blocks)
    if exact:
        assert ids == whole
    else:
        assert tokenizer.decode(ids) == tokenizer.decode(whole)


# As without patches, a block is much longer than the longest token (about 128 characters), because
# only an eighth of it is searched for a border between ids if the text has no place for a cut.
CUTS = {
    "piece": st.sampled_from([130, 300, 700]),
    "size": st.just(8192),
    "parts": st.sampled_from([100, 5000, 10**6]),
}


@pytest.mark.parametrize("kind", [*KINDS, "qwen3 special"])
@settings(max_examples=5)
@given(text=texts(size=18_000), **CUTS)
def test_ids_equal_those_of_encoding_the_document_whole(tokenizer, kind, text, piece, size, parts):
    check(tokenizer(kind), text, piece, size, parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "qwen3 special", "gemma3 special"])
@settings(max_examples=250, derandomize=False)
@given(text=texts(size=30_000), **CUTS)
def test_ids_of_many_more_texts_equal_those_of_encoding_whole(
    tokenizer, kind, text, piece, size, parts
):
    check(tokenizer(kind), text, piece, size, parts)


RUNS = ["a", ">", "=", "\n", "▁", "ab", "你", "><", "é\t\t\t", f"x{' ' * 7}", f"><{' ' * 18}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_repeated_patterns_across_many_cuts_have_the_same_ids(tokenizer, kind, run):
    """The ids of a repeated pattern depend on its length, and no cut in it is reliable."""
    count = 18_000 // len(run)
    check(tokenizer(kind), f"begins {run * count} ends", 300, 8192, 5000)
    check(tokenizer(kind), "_".join(run * (140 + n) for n in range(20)), 200, 8192, 5000)


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_text_has_exact_cuts_and_pieces_of_the_given_size(tokenizer, kind):
    words = random.Random(0).choices(["The", "quick", "fox,", "jumps.\n", "over", "it"], k=9000)
    for text in (" ".join(words), "敏捷的棕色狐狸跳过了懒狗。" * 3000):
        blocks, exact = cut_in_blocks(tokenizer(kind), text, 8192, 5000)
        assert exact
        assert all(4096 <= len(block.text.decode()) <= 8192 for block in blocks[:-2])
        pieces = list(Chunker(tokenizer(kind)).pieces(text, 500))
        assert "".join(pieces) == text
        assert all(250 <= len(piece) <= 500 for piece in pieces[:-1])
        assert len(pieces[-1]) <= 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_fits_in_one_piece_is_not_cut(tokenizer, kind):
    cutter = Chunker(tokenizer(kind))
    for text in ("word " * 200, ""):
        assert list(cutter.pieces(text, 500)) == [text]
    assert list(cutter.blocks(iter(["word " * 199]), 500)) == [("word " * 199, True)]


@pytest.mark.parametrize(("kind", "lead"), [("gpt2", ""), ("llama2", "\n")])
def test_a_tokenizers_leading_space_is_added_to_documents_only(tokenizer, kind, lead):
    assert Chunker(tokenizer(kind)).lead[0] == lead
    text = "words " * 400
    assert cut_in_pieces(tokenizer(kind), text, 100) == encode_documents(tokenizer(kind), [text])[0]
