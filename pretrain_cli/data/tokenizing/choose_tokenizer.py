"""The tokenizer of a dataset in the making: the one that the request names, or a BPE trained on the
corpus. It is opened once, when it is first needed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from pretrain_cli.data.corpus.readers import FileReader
from pretrain_cli.data.corpus.source_files import STANDARD_INPUT, Corpus
from pretrain_cli.data.tokenizers.tokenizer import (
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from pretrain_cli.data.tokenizing.pipeline import Progress
from pretrain_cli.data.tokenizing.request import TokenizeRequest
from pretrain_cli.data.tokenizing.staging import staging_dir
from pretrain_cli.errors import ConfigError

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

    @cached_property
    def new(self) -> Tokenizer:
        """The tokenizer of a run that starts afresh, with the requested document marks. Trains a
        BPE."""
        if self.request.tokenizer != "bpe":
            return self._marked(self.named)
        size = self.request.vocab_size
        trained = train_bpe(self._sample(), BPE_VOCAB_SIZE if size is None else size)
        return self._marked(trained)

    @cached_property
    def resumed(self) -> Tokenizer:
        """The tokenizer of a dataset that is continued: a BPE was trained by the earlier run."""
        if self.request.tokenizer != "bpe":
            return self.new
        path = staging_dir(self.request.out) / "tokenizer.json"
        return self._marked(read_tokenizer(path, name="bpe"))

    def _marked(self, tokenizer: Tokenizer) -> Tokenizer:
        if self.request.tokenizer == "bpe":
            tokenizer = replace(tokenizer, name=f"bpe-{tokenizer.vocab_size}")
        return tokenizer.marked(
            bos=self.request.bos, eos=self.request.eos, allow_special=self.request.allow_special
        )

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
