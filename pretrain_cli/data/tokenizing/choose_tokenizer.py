"""The tokenizer of a dataset in the making: the one that the request names, or a BPE trained on the
corpus. It is opened once, when it is first needed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import STANDARD_INPUT, Corpus
from pretrain_cli.data.shards import token_dtype
from pretrain_cli.data.tokenizers.tokenizer import (
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from pretrain_cli.data.tokenizing.pipeline import Progress
from pretrain_cli.data.tokenizing.progress import Earlier
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.errors import ConfigError, DataError

BPE_TRAINING_BYTES = 2**25
"""Bytes of text, spread over the corpus, on which a BPE is trained. More text changes little and
takes longer."""
BPE_VOCAB_SIZE = 8192
"""Vocabulary size of a trained BPE if none is given."""


class TokenizerChoice:
    """The tokenizer that a request asks for."""

    def __init__(self, request: TokenizeRequest, corpus: Corpus, progress: Progress) -> None:
        """Raises ConfigError if a BPE would be trained on a stream, which can be read only once."""
        self.request, self.corpus, self.progress = request, corpus, progress
        for file in corpus.files if request.tokenizer == "bpe" else ():
            if file.is_stream:
                name = "standard input" if file.name == STANDARD_INPUT else file.path
                raise ConfigError(
                    f"--tokenizer bpe: is trained on the text first, and {name} can be read once; "
                    "save it to a file"
                )

    @cached_property
    def named(self) -> Tokenizer:
        """The tokenizer that the request names, as it is in its file. Not for `bpe`."""
        return load_tokenizer(self.request.tokenizer)

    def is_in(self, path: Path) -> bool:
        """Return whether this file of an earlier run holds the tokenizer. A BPE was trained by that
        run."""
        if self.request.tokenizer == "bpe" or not path.is_file():
            return path.is_file()
        return path.read_bytes() == self.named.json.encode()

    def choose(self, earlier: Earlier, *, resumes: bool) -> Tokenizer:
        """Return the tokenizer to encode with; trains a BPE, unless it is that of the run that is
        continued. Raises DataError or ConfigError if it doesn't suit the existing dataset or the
        format."""
        request, existing = self.request, earlier.existing
        if request.tokenizer != "bpe":
            tokenizer = self.named
        elif not resumes:
            sample = self._sample()
            size = BPE_VOCAB_SIZE if request.vocab_size is None else request.vocab_size
            tokenizer = train_bpe(sample, size)
        else:
            tokenizer = read_tokenizer(earlier.tokenizer, name="bpe")
        if request.tokenizer == "bpe":
            tokenizer = replace(tokenizer, name=f"bpe-{tokenizer.vocab_size}")
        tokenizer = tokenizer.marked(
            bos=request.bos, eos=request.eos, allow_special=request.allow_special
        )
        if existing is not None:
            if tokenizer.fingerprint != existing.tokenizer_fingerprint:
                raise DataError(
                    f"{request.out}: was made with another tokenizer; append with that one"
                )
            tokenizer = replace(tokenizer, name=existing.tokenizer)
        if request.format == "llm.c" and token_dtype(tokenizer.vocab_size) != "uint16":
            raise ConfigError(
                f"--format llm.c: holds ids below 65,536, and {tokenizer.name} has "
                f"{tokenizer.vocab_size:,}; leave it out, or choose another tokenizer"
            )
        return tokenizer

    def _sample(self) -> Iterator[str]:
        """Yield text spread evenly over the corpus."""
        size = self.corpus.size
        stride = max(1, size // BPE_TRAINING_BYTES)
        number = before = 0
        for file in self.corpus.files:
            reader = FileReader(file, self.request.reading)
            for document in reader.documents():
                for block in document.blocks:
                    if number % stride == 0:
                        self.progress("training the tokenizer", before + reader.position, size, 0)
                        yield block.decode()
                    number += 1
            before += file.size
