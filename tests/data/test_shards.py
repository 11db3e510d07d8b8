"""Format on disk: the manifest, tokens across shards, and document starts."""

import json
import shutil
import zlib
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.data.shards import (
    Amount,
    Checksums,
    IndexedStarts,
    read_manifest,
)
from pretrain_cli.errors import DataError


def test_a_manifest_is_read_back_as_it_was_written(tmp_path, write):
    written = write(tmp_path / "made")
    assert read_manifest(tmp_path / "made") == written
    assert written.total == Amount(documents=7, bytes=5 + 14 + 14 + 1 + 19 + 22, tokens=75 + 7)
    assert written.largest_token == 256


def test_the_fingerprint_depends_on_the_tokens_not_the_folder(tmp_path, write):
    training = [b"first", b"the second", b"third"]
    seen = {write(tmp_path / "made", training).fingerprint}
    shutil.move(tmp_path / "made", tmp_path / "moved")
    assert read_manifest(tmp_path / "moved").fingerprint in seen
    assert write(tmp_path / "made", training).fingerprint in seen
    for other in (training[::-1], training[:-1], [b"First", *training[1:]]):
        seen.add(write(tmp_path / "made", other).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("version", [1, 3, None])
def test_another_format_version_is_refused(tmp_path, write, version):
    write(tmp_path / "made")
    path = tmp_path / "made/dataset.json"
    content = json.loads(path.read_text()) | {"format_version": version, "added": "something"}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path / "made")
    assert str(error.value) == (
        f"{path}: format version {version}, and this version of pretrain reads 2; use the one that "
        "wrote it, or tokenize again"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 2}'])
def test_a_damaged_manifest_is_refused(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert str(error.value) == f"{tmp_path / 'dataset.json'}: damaged; tokenize again with --force"


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no dataset\.json in it; make .* 'pretrain tokenize'"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such dataset; make .* 'pretrain tokenize'"):
        read_manifest(tmp_path / "nowhere")


@given(portions=st.lists(st.binary(max_size=300), max_size=8), size=st.integers(1, 200))
def test_checksums_do_not_depend_on_the_size_of_the_writes(portions, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain_cli.data.shards.BLOCK_BYTES", size)
        checksums = Checksums()
        for portion in portions:
            checksums.add(portion)
    whole = b"".join(portions)
    blocks = [zlib.crc32(whole[at : at + size]) for at in range(0, len(whole), size)]
    assert np.frombuffer(checksums.blocks_bytes(), "<u4").tolist() == blocks


# --- rows of tokens ------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_any_read_equals_a_slice_of_all_tokens(stream, sizes, data):
    ends = np.cumsum([0, *sizes])
    row = stream(*[range(a, b) for a, b in pairwise(ends)])
    start = data.draw(st.integers(0, len(row)))
    count = data.draw(st.integers(0, len(row) + 3))
    read = row.read(start, count)
    assert read.dtype == np.int64
    assert read.tolist() == list(range(len(row)))[start : start + count]


@given(shards=st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), data=st.data())
def test_document_starts_are_found_between_any_two_positions(shards, data):
    """A shard inside a long document has no document start."""
    starts = [np.array(sorted(set(shard)), "<u8") for shard in shards]
    offsets = [0, *accumulate([10] * len(shards))][: len(shards)]
    whole = [
        int(at) + offset for shard, offset in zip(starts, offsets, strict=True) for at in shard
    ]
    found = IndexedStarts(starts, offsets)
    first = data.draw(st.integers(0, 60))
    last = data.draw(st.integers(first, 60))
    assert found.between(first, last).tolist() == [at for at in whole if first <= at < last]
    assert len(found) == len(whole)
