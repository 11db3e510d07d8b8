"""Parts: one corpus tokenized by several machines that share nothing but its files.

    --part 1/3 ──> OUT/part-00001-of-00003 ─┐
    --part 2/3 ──> OUT/part-00002-of-00003 ─┼─ --merge ──> OUT
    --part 3/3 ──> OUT/part-00003-of-00003 ─┘

Every machine lists the corpus and deals the files by size, so that all come to the same parts. A
part is a dataset of its own, complete when its folder has a manifest.
"""

import hashlib
import heapq
import re
from dataclasses import replace
from pathlib import Path

from pretrain_cli.data.corpus.source_files import Corpus, TextFile
from pretrain_cli.data.tokenizing.request import Part, TokenizeRequest
from pretrain_cli.errors import ConfigError, DataError

WRITTEN = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def parse_part(text: str) -> Part:
    """Read k/n. Raises ConfigError unless 1 ≤ k ≤ n."""
    written = WRITTEN.fullmatch(text)
    number, of = map(int, written.groups()) if written else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(f"--part: '{text}' is not k/n with k from 1 to n, such as 3/64")
    return Part(number, of)


def part_folder(out: Path, part: Part) -> Path:
    """Return the folder of a part of a dataset."""
    return out / f"part-{part.number:05d}-of-{part.of:05d}"


def take_part(request: TokenizeRequest, corpus: Corpus) -> tuple[TokenizeRequest, Corpus]:
    """Return the request for the part's own folder, and the part's files. Raises ConfigError for
    options that need the whole corpus, and DataError if there are more parts than files."""
    part = request.part
    if part is None:
        return request, corpus
    refused = {
        "--dedup": (
            request.dedup,
            "a part doesn't see the documents of the others; remove duplicates first, for example "
            "with datatrove",
        ),
        "--tokenizer bpe": (
            request.tokenizer == "bpe",
            "each part would train another one; train it on one machine, and give that dataset's "
            "folder with --tokenizer",
        ),
        "--append": (request.append, "append to the merged dataset"),
        "--format llm.c": (request.format == "llm.c", "a merge doesn't write it"),
        "a stream": (corpus.has_streams, "it can't be listed and dealt; save it to files"),
    }
    for option, (is_asked, why) in refused.items():
        if is_asked:
            raise ConfigError(f"--part: not with {option}: {why}")
    if part.of > len(corpus.files):
        raise DataError(
            f"--part: {part.number}/{part.of} of {len(corpus.files):,} files; give at most as many "
            "parts as there are files"
        )
    dealt = replace(corpus, files=deal(corpus.files, part))
    part = replace(part, listing=_checksum(corpus.files))
    return replace(request, part=part, out=part_folder(request.out, part)), dealt


def deal(files: list[TextFile], part: Part) -> list[TextFile]:
    """Return the files of a part, in their order: the largest file goes first, each to the part
    with the fewest bytes so far."""
    loads = [(0, number) for number in range(1, part.of + 1)]
    mine: list[int] = []
    for index in sorted(range(len(files)), key=lambda index: (-files[index].size, index)):
        load, number = loads[0]
        heapq.heapreplace(loads, (load + max(files[index].size, 1), number))
        if number == part.number:
            mine.append(index)
    return [files[index] for index in sorted(mine)]


def _checksum(files: list[TextFile]) -> str:
    """Return a hash of the names and sizes of all files: parts dealt from different listings don't
    belong together."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\n".encode())
    return digest.hexdigest()
