"""Merging: the parts become one dataset, or one line says why not. A killed merge loses nothing."""

import os
import shutil

import pytest

from pretrain_cli.data.dataset import find_damage, open_dataset
from pretrain_cli.data.shards import read_manifest, rows_of
from pretrain_cli.data.tokenizing.merge import merge
from pretrain_cli.data.tokenizing.request import Part
from pretrain_cli.errors import DataError

PARTS = 3
TEXTS = [f"document {number} " * (1 + number % 5 * 70) for number in range(40)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_documents, make):
    """Folder with a corpus, the dataset `whole` of it, and `parts` with three parts of it."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_documents(folder / "corpus", TEXTS)
    options = {"val_fraction": 0.3, "shard_tokens": 2**12}
    make(corpus, folder / "whole", **options)
    for number in range(1, PARTS + 1):
        make(corpus, folder / "parts", part=Part(number, PARTS), **options)
    return folder


@pytest.fixture
def parts(made, tmp_path):
    """Copy of the parts, in order."""
    shutil.copytree(made / "parts", tmp_path / "out")
    return sorted((tmp_path / "out").iterdir())


def refusal(*given, **options):
    with pytest.raises(DataError) as error:
        merge(*given, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_merge_holds_the_documents_of_the_whole_corpus(made, parts, tmp_path, read_back):
    merged = merge(parts[::-1])
    assert merged.folder == tmp_path / "out"
    whole = read_manifest(made / "whole")
    for split in ("train", "val"):
        documents = read_back(merged.folder, split)
        assert len(documents) > 5
        assert sorted(documents) == sorted(read_back(made / "whole", split))
        assert merged.manifest.splits[split] == whole.splits[split]
    assert merged.manifest.sources == whole.sources
    assert merged.manifest.options == whole.options
    assert not list(find_damage(merged.folder, merged.manifest, thoroughly=True))
    assert len(open_dataset(merged.folder).train) == whole.splits["train"].tokens

    def by_name(folder):
        return sorted((row["name"], row["sha256"], row["tokens"]) for row in rows_of(folder))

    assert by_name(merged.folder) == by_name(made / "whole")


def test_a_merge_takes_no_space_and_leaves_the_parts(parts, contents):
    before = [contents(part) for part in parts]
    merged = merge(parts)
    assert (merged.folder / "train-00000.bin").samefile(parts[0] / "train-00000.bin")
    assert [contents(part) for part in parts] == before
    for part in parts:
        shutil.rmtree(part)
    assert len(open_dataset(merged.folder).train)


def test_a_file_system_without_links_gets_copies(parts, monkeypatch, contents):
    expected = contents(merge(parts, parts[0].parent.parent / "linked").folder)

    def refuses(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuses)
    assert contents(merge(parts, parts[0].parent.parent / "copied").folder) == expected


def test_a_second_merge_has_nothing_to_do(parts, contents):
    first = merge(parts)
    before = contents(first.folder)
    second = merge(parts)
    assert (first.was_there, second.was_there) == (False, True)
    assert second.manifest == first.manifest
    assert contents(first.folder) == before


def test_another_dataset_is_replaced_only_by_force(made, parts, tmp_path, contents):
    shutil.copytree(made / "whole", tmp_path / "other")
    (tmp_path / "other/train-00099.bin").touch()
    (tmp_path / "other/val-00099.idx.partial").touch()
    assert refusal(parts, tmp_path / "other") == (
        f"{tmp_path / 'other'}: holds another dataset; replace it with --force, or choose another "
        "folder with --out"
    )
    expected = contents(merge(parts, tmp_path / "new").folder)
    assert contents(merge(parts, tmp_path / "other", force=True).folder) == expected


def test_a_folder_of_other_things_is_left_alone(parts, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    assert "exists and is not a dataset" in refusal(parts, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


# --- parts that don't belong together ------------------------------------------------------------


def test_a_missing_part_is_named(parts):
    out = parts[0].parent
    assert refusal([parts[0], parts[2]]) == (f"{out}: 1 of 3 parts missing (2); run --part 2/3")
    assert not (out / "dataset.json").exists()


def test_a_doubled_part_is_named(parts, tmp_path):
    again = shutil.copytree(parts[1], tmp_path / "again")
    assert refusal([*parts, again]) == (
        f"{again}: part 2 of 3 again, after {parts[1]}; give each part once"
    )


def test_an_unfinished_part_is_named(parts):
    unfinished = parts[1].rename(f"{parts[1]}.partial")
    assert refusal([parts[0], unfinished, parts[2]]).startswith(
        f"{unfinished}: this part is not finished"
    )


def test_a_dataset_that_is_no_part_is_refused(made, parts):
    assert refusal([*parts, made / "whole"]).startswith(f"{made / 'whole'}: not a part;")


def test_no_parts_are_refused():
    assert refusal([]).startswith("--merge: no parts given")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": Part(2, 4)}, "part 2 of 4, and .* is one of 3; give the parts of one count"),
        ({"tokenizer": "gpt2"}, "part 2 of 3 was made with another tokenizer"),
        ({"val_fraction": 0.5}, "part 2 of 3 was made with another val fraction than"),
        ({"allow_special": True}, "part 2 of 3 was made with another allow special than"),
    ],
)
def test_a_part_made_in_another_way_is_named(made, parts, make, load, tmp_path, changes, said):
    load(changes.get("tokenizer", "bytes"))  # skips without its file
    options = {"val_fraction": 0.3, "shard_tokens": 2**12, "part": Part(2, 3)} | changes
    other = make(made / "corpus", tmp_path / "other", **options).folder
    message = refusal([parts[0], other, parts[2]])
    assert message.startswith(f"{other}: ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(message)


@pytest.mark.parametrize("change", ["added", "grown"])
def test_parts_of_a_corpus_that_changed_are_refused(made, parts, make, tmp_path, change):
    corpus = shutil.copytree(made / "corpus", tmp_path / "corpus")
    with (corpus / ("more.txt" if change == "added" else "00000.txt")).open("a") as file:
        file.write("more")
    options = {"val_fraction": 0.3, "shard_tokens": 2**12, "part": Part(2, 3)}
    other = make(corpus, tmp_path / "other", **options).folder
    message = refusal([parts[0], other, parts[2]])
    assert message.startswith(f"{other}: part 2 of 3 was dealt from another list of files than")


def test_a_damaged_part_is_named(parts):
    os.truncate(parts[1] / "train-00000.bin", 10)
    message = refusal(parts)
    assert message.startswith(f"{parts[1]}/train-00000.bin: 10 bytes where dataset.json says")
    assert message.endswith("tokenize this part again with --force")
    assert not (parts[0].parent / "dataset.json").exists()


# --- kills ---------------------------------------------------------------------------------------

MERGE = "pretrain_cli.data.tokenizing.merge"


@pytest.mark.parametrize(
    ("function", "call"),
    [
        *((f"{MERGE}._place", call) for call in (1, 2, 3, 9, 20)),
        (f"{MERGE}._claim", 1),
        (f"{MERGE}._join_files", 1),
        (f"{MERGE}.sha256_of", 1),
        (f"{MERGE}.write_whole", 1),
        ("pathlib.Path.replace", 2),
        ("pathlib.Path.replace", 24),
    ],
)
@pytest.mark.parametrize("replaces", [False, True])
def test_a_killed_merge_is_run_again(driven, made, parts, contents, function, call, replaces):
    folder, out = parts[0].parent.parent, parts[0].parent
    whole = merge(parts, folder / "expected")
    expected = contents(whole.folder)
    if replaces:
        for path in (made / "whole").iterdir():
            shutil.copyfile(path, out / path.name)
    before = [contents(part) for part in parts]
    command = ["tokenize", "--merge", *map(str, parts), *(["--force"] if replaces else [])]
    assert driven(command, folder, {}, (function, call)).code == -9
    assert [contents(part) for part in parts] == before
    if (out / "dataset.json").exists():  # a dataset is whole or absent
        assert not list(find_damage(out, read_manifest(out), thoroughly=True))
    assert driven(command, folder, {}).code == 0
    assert [contents(part) for part in parts] == before
    for part in parts:
        shutil.rmtree(part)
    assert contents(out) == expected


def test_a_killed_part_continues(driven, made, parts, contents, tmp_path):
    expected = contents(parts[1])
    options = "--tokenizer bytes --val-fraction 0.3 --shard-tokens 4096 --out again --part 2/3"
    command = ["tokenize", str(made / "corpus"), *options.split()]
    writer = "pretrain_cli.data.tokenizing.writer"
    for function in (f"{writer}.DatasetWriter.append", f"{writer}.write_whole"):
        assert driven(command, tmp_path, {}, (function, 1)).code == -9
        assert not (tmp_path / "again/part-00002-of-00003/dataset.json").exists()
    assert driven(command, tmp_path, {}).code == 0
    assert contents(tmp_path / "again/part-00002-of-00003") == expected
