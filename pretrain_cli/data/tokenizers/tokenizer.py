"""Tokenizers: published by name, local, from the hub, byte-level, or trained on the corpus.

Each is a `tokenizer.json` of the `tokenizers` library, so a trained model opens in transformers
with the same tokenization. Special tokens typed in a text are plain text. Documents are delimited
by the ids of the tokenizer's own convention:

    gemma3   <bos> text <eos>         gpt2, qwen3, bytes, bpe   text <|endoftext|>
    llama2   <s> text </s>
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from pretrain_cli.errors import ConfigError, DataError, did_you_mean

HUB = {
    "gemma3": "google/gemma-3-270m",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gpt2": "openai-community/gpt2",
    "llama2": "meta-llama/Llama-2-7b-hf",
}
"""Published names, and the hub repository of each tokenizer.json."""

BUILT_IN = ("bytes", "bpe")
END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<eos>", "</s>", "<|end_of_text|>", "<|eot_id|>")

# The split that GPT-4 made common: words with their leading space, numbers of up to three digits,
# runs of punctuation, line ends with their indentation.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """Converts text to ids and back; knows the ids that begin and end a document."""

    name: str
    json: str
    """The complete tokenizer.json, as stored in datasets and checkpoints."""
    backend: tokenizers.Tokenizer
    bos: int | None
    eos: int
    pad: int | None

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def marked(self, *, bos: str | None, eos: str | None, allow_special: bool) -> "Tokenizer":
        """Return the tokenizer with other document marks: a token's name, 'none' for no beginning,
        or None for its own convention. `allow_special` keeps the meaning of special tokens in
        texts."""
        if allow_special:
            self.backend.encode_special_tokens = False
        if bos is eos is None:
            return self
        begin = None if bos == "none" else self.bos if bos is None else self._id(bos, "--bos")
        end = self.eos if eos is None else self._id(eos, "--eos")
        return replace(self, bos=begin, eos=end)

    def _id(self, token: str, option: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ConfigError(f"{option}: '{token}' is no token of {self.name}; name one that is")
        return found

    def encode_prompt(self, text: str) -> list[int]:
        """Return the first ids of a document that begins with this text.

        Without a BOS token, documents begin after the end mark of the previous one, so an empty
        prompt is that mark.
        """
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        if self.bos is not None:
            return [self.bos, *ids]
        return ids or [self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these ids, without document marks."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and a tokenizer_config.json with which transformers uses it
        unchanged.

        transformers would otherwise choose a class by model type and rebuild the tokenizer by the
        rules of that class. PreTrainedTokenizerFast is the one class of versions 4 and 5 that does
        not.
        """
        (folder / "tokenizer.json").write_text(self.json, encoding="utf-8")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        for key, token in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad)):
            if token is not None:
                config[f"{key}_token"] = self.backend.id_to_token(token)
        config["document_marks"] = [config.get("bos_token"), config["eos_token"]]
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by published name, path of a tokenizer.json or its folder, hub id, or
    `bytes`."""
    if name == "bytes":
        return _byte_level()
    if name == "bpe":
        raise ConfigError("tokenizer 'bpe' is trained on a corpus; there is none to load")
    if path := find_file(name):
        return read_tokenizer(path, name=name)
    return read_tokenizer(_published(name) if name in HUB else _from_hub(name), name=name)


def find_file(name: str) -> Path | None:
    """Return the file that a name means; None for a published name or a possible hub id. Raises
    ConfigError or DataError for anything else."""
    path = Path(name)
    is_folder = path.is_dir() and name not in HUB
    if is_folder:
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    is_path = is_folder or name.startswith((".", "/")) or name.endswith(".json")
    if name in HUB or (name.count("/") == 1 and not is_path):
        return None
    if is_path or "/" in name:
        raise DataError(f"{path}: no such tokenizer file; give a tokenizer.json or its folder")
    known = [*HUB, *BUILT_IN]
    raise ConfigError(
        f"tokenizer '{name}' is not one of {', '.join(known)}, a path or a hub id"
        f"{did_you_mean(name, known)}"
    )


def read_tokenizer(path: Path, *, name: str) -> Tokenizer:
    """Read a tokenizer.json file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; it should hold the tokenizer") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; give a tokenizer.json") from None
    config: Any = {}
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{beside}: not JSON ({error}); mend or remove it") from None
    hint = config.get("eos_token")
    hint = hint["content"] if isinstance(hint, dict) else hint
    tokenizer = _tokenizer(name, text, hint, where=path)
    match config.get("document_marks"):  # written by `save`: the choice of --bos and --eos
        case [bos, str(eos)]:
            return tokenizer.marked(bos=bos or "none", eos=eos, allow_special=False)
        case _:
            return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of this size; it is smaller if the texts have nothing more to
    merge."""
    if vocab_size < 257:
        raise ConfigError(
            f"--vocab-size: {vocab_size} is too small for a byte-level BPE; give at least 257"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _tokenizer("bpe", backend.to_str(), None, where=None)


def byte_characters() -> dict[int, str]:
    """Return the printable character by which byte-level tokenizers write each byte: visible
    Latin-1 characters as themselves, the other bytes as the characters 256, 257, … in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + i) for i, byte in enumerate(unseen)
    }


def _byte_level() -> Tokenizer:
    """Return a BPE without merges: ids 0 to 255 are bytes, 256 ends a document."""
    vocab = {character: byte for byte, character in byte_characters().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = byte_level  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True)])
    return _tokenizer("bytes", backend.to_str(), None, where=None)


def _tokenizer(name: str, text: str, eos_hint: str | None, *, where: Path | None) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{where}: not a tokenizer.json ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    ends = [token for token in (END_OF_DOCUMENT, eos_hint, *KNOWN_ENDS) if token]
    eos = next((i for token in ends if (i := backend.token_to_id(token)) is not None), None)
    if eos is None:
        raise DataError(
            f"{where}: no end-of-document token; name one as eos_token in a tokenizer_config.json "
            "beside it"
        )
    # Models expect the token that their tokenizer itself puts before a text.
    added = backend.encode("").ids
    bos = added[0] if added and added[0] != eos else None
    return Tokenizer(name, text, backend, bos=bos, eos=eos, pad=backend.token_to_id("<pad>"))


def _published(name: str) -> Path:
    folder = os.environ.get("PRETRAIN_TOKENIZERS")
    if folder and (path := Path(folder, name, "tokenizer.json")).is_file():
        return path
    return _from_hub(HUB[name], asked=name)


def _from_hub(repository: str, *, asked: str | None = None) -> Path:
    """Return tokenizer.json of a hub repository, from the local cache if possible."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    cached = try_to_load_from_cache(repository, "tokenizer.json")
    if isinstance(cached, str):
        return Path(cached)
    name = asked or repository
    instead = (
        f"or put it at $PRETRAIN_TOKENIZERS/{asked}/tokenizer.json, " if asked else "or "
    ) + "give the path of a tokenizer.json, or use the built-in 'bytes' or 'bpe'"
    try:
        # fails at once without a network; the download would retry for half a minute
        get_hf_file_metadata(hf_hub_url(repository, "tokenizer.json"), timeout=5)
        return Path(hf_hub_download(repository, "tokenizer.json", etag_timeout=5))
    except Exception as error:  # from the hub, the network or the HTTP library
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "GatedRepoError" in kinds:
            reason = f"{repository} is gated: accept its licence on the hub and run 'hf auth login'"
        elif "LocalEntryNotFoundError" not in kinds and (
            kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "HFValidationError"}
        ):
            reason = f"the hub has no tokenizer.json in {repository}: check the name"
        else:
            reason = f"{repository} can't be reached ({type(error).__name__}): connect once"
        raise DataError(f"tokenizer '{name}': {reason}, {instead}") from None
