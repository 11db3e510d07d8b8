"""`pretrain train` on the .bin files of other programs, run from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain_cli.data import dataset, token_files
from pretrain_cli.data.opening import open_data

VERSE = b"green bottles hanging on the wall,\nAnd if one green bottle should accidentally fall,\n"


def write(path, documents, *, header=True):
    """Write bytes as tokens, in llm.c's format or, without a header, in nanoGPT's."""
    ends = [[256, *text] if header else [*text, 256] for text in documents]
    tokens = np.concatenate(ends).astype("<u2")
    numbers = np.zeros(256, "<i4")
    numbers[:3] = 20240520, 1, len(tokens)
    Path(path).write_bytes((numbers.tobytes() if header else b"") + tokens.tobytes())


@pytest.fixture
def files(pretrain):
    """Two training shards and one validation shard, in the current folder."""
    write("song_train_000001.bin", [VERSE * 20, VERSE * 10])
    write("song_train_000002.bin", [VERSE * 30])
    write("song_val_000000.bin", [VERSE * 4] * 2)


def losses(run):
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [(row["kind"], row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.usefixtures("files")
def test_a_run_on_a_glob_pattern_of_token_files(pretrain, tiny):
    done = pretrain(f"train {tiny} --data 'song_train_*.bin' --tokenizer bytes --steps 2")
    assert (done.code, done.err) == (0, "")
    assert (
        "· song_train_*.bin: 16-bit tokens behind llm.c's header, in 2 files, "
        "song_train_000001.bin to song_train_000002.bin; validation on song_val_000000.bin\n"
    ) in done.out
    run = Path("runs/gemma3-tiny-song")
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert record["dataset"]["path"] == record["settings"]["data"]["path"] == "song_train_*.bin"
    assert record["settings"]["data"]["tokenizer"] == "bytes"
    assert record["dataset"]["tokens"] == 60 * len(VERSE) + 3
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (evaluation,) = [row for row in rows if row["kind"] == "evaluation"]
    assert evaluation["tokens"] == 8 * len(VERSE) + 2 - 1
    bits = evaluation["loss"] * evaluation["tokens"] / np.log(2)
    assert evaluation["bits_per_byte"] == pytest.approx(bits / (8 * len(VERSE)))

    checkpoint = run / "checkpoints/step-000002"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.encode("on the wall") == list(b"on the wall")
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == 320
    assert pretrain(f"sample {run} --max-tokens 3").code == 0


@pytest.mark.usefixtures("files")
def test_a_resumed_run_equals_an_uninterrupted_one(pretrain, tiny):
    line = (
        f"train {tiny} --data 'song_train_*.bin' --tokenizer bytes --set train.sample_tokens=0 "
        "--learning-rate 0.01 --schedule constant --set optimizer.warmup_steps=1 "
        "--set optimizer.weight_decay=0.1 --set optimizer.weight_decay_schedule=constant"
    )
    assert pretrain(f"{line} --steps 4 --out whole").code == 0
    assert pretrain(f"{line} --steps 2 --out halves").code == 0
    done = pretrain("train --resume halves --steps 4")
    assert (done.code, done.err) == (0, "")
    steps = [row for row in losses("halves") if row[0] == "step"]
    assert steps == [row for row in losses("whole") if row[0] == "step"]
    one, other = (
        load_file(Path(run, "checkpoints/step-000004/model.safetensors"))
        for run in ("whole", "halves")
    )
    for name, tensor in one.items():
        assert np.array_equal(tensor, other[name])


@pytest.mark.usefixtures("files")
def test_a_run_resumes_with_moved_token_files_but_not_with_others(pretrain, refused, tiny):
    line = f"train {tiny} --data 'song_train_*.bin' --tokenizer bytes --out run"
    assert pretrain(f"{line} --steps 1 --set train.sample_tokens=0").code == 0
    Path("moved").mkdir()
    for path in Path().glob("song_*.bin"):
        path.rename(Path("moved", path.name))
    shutil.copy("run/checkpoints/step-000001/tokenizer.json", "moved")
    assert "song_train_*.bin: no file matches" in refused("train --resume run --steps 2")
    moved = "train --resume run --data 'moved/song_train_*.bin' --tokenizer moved/tokenizer.json"
    assert pretrain(f"{moved} --steps 2").code == 0
    assert pretrain("train --resume run --steps 3").code == 0
    write("moved/song_train_000002.bin", [VERSE.upper() * 30])
    message = refused("train --resume run --steps 4")
    assert message.startswith("moved/song_train_*.bin: not the dataset that run was trained on")


def test_a_run_on_a_folder_of_nano_gpt_files(pretrain, tiny):
    Path("verses").mkdir()
    write("verses/train.bin", [VERSE] * 30, header=False)
    write("verses/val.bin", [VERSE] * 4, header=False)
    done = pretrain(f"train {tiny} --data verses --tokenizer bytes --steps 1")
    assert (done.code, done.err) == (0, "")
    assert "· verses: bare 16-bit tokens, as nanoGPT writes them, in train.bin; vali" in done.out
    assert "validation on val.bin\n" in done.out
    assert Path("runs/gemma3-tiny-verses/checkpoints/step-000001").is_dir()


def test_a_single_file_holds_out_its_end_for_validation(pretrain, tiny):
    write("song.bin", [VERSE * 40])
    done = pretrain(f"train {tiny} --data song.bin --tokenizer bytes --steps 1")
    assert (done.code, done.err) == (0, "")
    held_out = (40 * len(VERSE) + 1) // 100
    assert f"validation on the last {held_out} tokens, held out\n" in done.out
    evaluation = json.loads(Path("runs/gemma3-tiny-song/metrics.jsonl").read_text().splitlines()[2])
    assert evaluation["tokens"] == held_out - 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("prefetch", ["true", "false"])
def test_an_id_beyond_the_vocabulary_ends_a_run_on_large_files(
    pretrain, tiny, monkeypatch, prefetch
):
    """Write the id to a block that only training reads: opening reads the first and the last."""
    monkeypatch.setattr(token_files, "VERIFIED_WHEN_OPENED", 0)
    monkeypatch.setattr(token_files, "SAMPLED", 1)
    monkeypatch.setattr(token_files, "TOKENS_PER_READ", 64)
    monkeypatch.setattr(dataset, "DECODED", 64)
    monkeypatch.setattr(dataset, "DECODED_AT_ONCE", 64)
    with Path("song_train_000002.bin").open("rb+") as file:
        file.seek(1024 + 2 * 1000)
        file.write(b"\xff\xff")
    done = pretrain(
        f"train {tiny} --data 'song_train_*.bin' --tokenizer bytes --steps 99 "
        f"--set speed.prefetch={prefetch}"
    )
    assert done.code == 2
    assert done.err == (
        "error: song_train_000002.bin: token 1,000 is 65,535, beyond the 257 of the tokenizer; "
        "give the one that made the file with --tokenizer, or make the file again if it is "
        "damaged\n"
    )
    assert "GiB the sizes were checked, the contents were not" in done.out


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data 'song_train_*.bin'", "song_train_*.bin: .bin files don't say which tokenizer"),
        ("--data 'sing_*.bin' --tokenizer bytes", "sing_*.bin: no file matches; give a .bin file"),
        ("--data sing.bin --tokenizer bytes", "sing.bin: no such file; give a .bin file"),
        ("--data song_val_000000.bin --tokenizer llama3", "tokenizer 'llama3' is not one of"),
        ("--data model.bin --tokenizer bytes", "model.bin: begins as a model or another file"),
        ("--data weights.bin --tokenizer bytes", "weights.bin: token 0 is 52,429, beyond the 257"),
        ("--data empty.bin --tokenizer bytes", "empty.bin: holds no tokens"),
        ("--data short.bin --tokenizer bytes", "data.seq_len: 32 is beyond the dataset"),
        ("--data 'song_train_*.bin' --tokenizer bytes --set model.vocab_size=100",
         "model.vocab_size: 100 is too small for song_train_*.bin, which holds token 256"),
        ("--tokenizer bytes", "data.tokenizer: 'bytes' says what made the .bin files of --data"),
        ("--data 'song_train_*.bin' --set data.tokenizer=3", "data.tokenizer: 3 is not a string"),
    ],
)  # fmt: skip
def test_invalid_token_files_and_options_are_refused(refused, tiny, options, said):
    numbers = np.zeros(256, "<i4")
    numbers[:3] = 20240326, 3, 1024
    Path("model.bin").write_bytes(numbers.tobytes() + bytes(4096))
    Path("weights.bin").write_bytes(np.full(1000, 0.1, "<f4").tobytes())
    Path("empty.bin").write_bytes(b"")
    write("short.bin", [b"short"])
    assert refused(f"train {tiny} --steps 1 {options}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_a_tokenizer_other_than_the_datasets_is_refused(pretrain, refused, tiny):
    line = f"train {tiny} --set train.sample_tokens=0 --steps 1 --tokenizer"
    assert pretrain(f"{line} bytes --data data/corpus").code == 0
    pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus --out data/bpe")
    assert refused(f"{line} bytes --data data/bpe") == (
        "data.tokenizer: 'bytes' is not bpe-300, which made data/bpe; leave it out"
    )
    assert open_data("data/bpe", "data/bpe").separator == 0  # the first id of a trained BPE


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("given", ["data/corpus/train-00000.bin", "data/corpus/*.bin"])
def test_the_shards_of_a_dataset_are_refused_as_token_files(refused, tiny, given):
    message = refused(f"train {tiny} --steps 1 --data '{given}' --tokenizer bytes")
    assert message == (
        "data/corpus/train-00000.bin: part of a dataset; give its folder, --data data/corpus"
    )
