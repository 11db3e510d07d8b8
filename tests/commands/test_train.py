"""`pretrain train`, run from the command line: train into a run folder, stop, resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml

from pretrain_cli.commands import display
from pretrain_cli.data.tokenizing.writer import DatasetWriter
from tests.commands.conftest import tree

RUN = {"run.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"}
CHECKPOINT = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
              "tokenizer_config.json", "training"}  # fmt: skip


@pytest.fixture
def dataset(pretrain, corpus):
    """Dataset `data/corpus`, 12 thousand bytes."""
    assert pretrain("tokenize --tokenizer bytes --val-fraction 0.1 corpus").code == 0
    return Path("data/corpus")


def record(run):
    return yaml.safe_load(Path(run, "run.yaml").read_text())


def metrics(run, kind="step"):
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.usefixtures("trained")
def test_a_run_folder_has_the_documented_files():
    assert {path.name for path in Path("runs/tiny").iterdir()} == RUN
    kept = sorted(path.name for path in Path("runs/tiny/checkpoints").iterdir())
    assert kept == ["step-000040", "step-000060"]  # the newest two of three
    for name in kept:
        assert {path.name for path in Path("runs/tiny/checkpoints", name).iterdir()} == CHECKPOINT
    steps = metrics("runs/tiny")
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert [row["tokens"] for row in steps] == list(range(128, 61 * 128, 128))
    assert steps[0]["loss"] > 5  # random weights: ln 320 = 5.8, for 320 ids
    assert steps[-1]["loss"] < 3
    (last,) = metrics("runs/tiny", "evaluation")[-1:]
    assert last["step"] == 60
    assert last["loss"] < 3
    (sample,) = map(json.loads, Path("runs/tiny/samples.jsonl").read_text().splitlines())
    assert sample["step"] == 60


@pytest.mark.usefixtures("dataset")
def test_train_prints_its_settings_steps_and_result(pretrain, tiny, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_A_LINE", 0.0)
    outcome = pretrain(f"train {tiny} --steps 3 --learning-rate 0.01")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    chosen = lines.pop(1)
    assert chosen.startswith("· Chosen: optimizer muon, embedding's rate 0.0")
    assert ", attention blocks (on a CPU the fastest" in chosen
    assert lines[0].startswith("· Vocabulary 320 instead of the model's 4,096: the dataset's")
    assert lines[1].startswith("gemma3-tiny ")
    assert "parameters on data/corpus" in lines[1]
    assert "128 tokens a step" in lines[2]
    assert lines[2].endswith("runs/gemma3-tiny-corpus")
    assert lines.pop(3).startswith("MFU of ")
    for number, line in enumerate(lines[3:6], start=1):
        assert line.startswith(f"step {number}/3  loss ")
        for word in ("lr ", "norm ", "tokens/s", "ETA", "memory"):
            assert word in line
    assert lines[6].startswith("step 3: validation loss ")
    assert "bits per byte" in lines[6]
    [saved] = [line for line in lines if line.startswith("saved ")]
    assert re.fullmatch(
        r"saved runs/gemma3-tiny-corpus/checkpoints/step-000003: [\d.]+ [kM]B, training waited "
        r"[\d.]+ s, written in [\d.]+ s",
        saved,
    )
    assert lines[-1].startswith("Done: 3 steps.")
    assert "pretrain sample runs/gemma3-tiny-corpus" in lines[-1]
    assert "pretrain train --resume runs/gemma3-tiny-corpus --steps 6" in lines[-1]


@pytest.mark.usefixtures("dataset")
def test_a_second_run_of_the_same_name_gets_a_number(pretrain, tiny):
    for name in ("gemma3-tiny-corpus", "gemma3-tiny-corpus-2", "gemma3-tiny-corpus-3"):
        assert pretrain(f"train {tiny} --steps 1 --set train.sample_tokens=0").code == 0
        assert Path("runs", name, "run.yaml").is_file()
    assert len(list(Path("runs").iterdir())) == 3


@pytest.mark.usefixtures("dataset")
def test_a_qwen_model_is_trained(pretrain):
    outcome = pretrain(
        "train --model qwen3-tiny --set model.num_hidden_layers=2 --set model.hidden_size=32 "
        "--set model.intermediate_size=48 --seq-len 32 --tokens-per-step 128 --tokens 500 --out q"
    )
    assert outcome.code == 0, outcome.err
    assert len(metrics("q")) == 4  # 500 tokens at 128 a step
    config = json.loads(Path("q/checkpoints/step-000004/config.json").read_text())
    assert config["model_type"] == "qwen3"


@pytest.mark.usefixtures("dataset")
def test_flags_and_set_win_over_the_file_and_the_file_over_defaults(pretrain, tiny, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "optimizer: {learning_rate: 0.5, clip: 3.0}\n"
        "data: {document_mask: true}\n"
        "train: {steps: 2, seed: 7, sample_tokens: 0}\n"
        "speed: {attention: eager}\n"
    )
    outcome = pretrain(
        f"train --config run.yaml {tiny} --learning-rate 0.002 --set optimizer.betas=[0.8,0.9] "
        "--out made"
    )
    assert outcome.code == 0, outcome.err
    settings = record("made")["settings"]
    assert settings["data"]["document_mask"] is True
    assert settings["optimizer"]["learning_rate"] == 0.002
    assert settings["optimizer"]["clip"] == 3.0
    assert settings["optimizer"]["betas"] == [0.8, 0.9]
    assert settings["optimizer"]["eps"] == 1e-10
    assert settings["train"]["seed"] == 7
    assert settings["train"]["steps"] == 2
    assert record("made")["speed"]["attention"] == {"asked": "eager", "in_force": "eager"}


@pytest.mark.usefixtures("dataset")
def test_run_yaml_has_the_given_and_the_resolved_settings(pretrain, tiny):
    pretrain(f"train {tiny} --steps 2 --out made --set speed.float32_matmul=high")
    made = record("made")
    assert made["asked"]["optimizer"]["learning_rate"] == "auto"
    assert made["settings"]["optimizer"]["learning_rate"] > 0
    auto = [key for section in ("data", "optimizer", "train")
            for key, value in made["settings"][section].items()
            if value == "auto"]  # fmt: skip
    assert set(auto) <= {"device", "micro_batch_size", "log_every"}  # `machine` has their values
    assert made["machine"]["micro_batch_size"] == 2
    matmul = made["speed"]["float32_matmul"]
    assert (matmul["asked"], matmul["in_force"]) == ("high", "highest")
    assert matmul["reason"]
    assert made["dataset"]["path"] == "data/corpus"


def test_with_no_dataset_the_demo_is_made_and_announced(pretrain, tiny, tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python/this.py").write_text("print('The Zen of Python')\n" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    outcome = pretrain(f"train {tiny} --steps 1")
    assert outcome.code == 0, outcome.err
    announced = outcome.out.splitlines()[0]
    assert "data/demo" in announced
    assert "pretrain tokenize FOLDER" in announced
    assert Path("data/demo/dataset.json").is_file()
    assert Path("runs/gemma3-tiny-demo/checkpoints/step-000001").is_dir()


def test_the_same_command_continues_after_a_stop_during_the_demo(
    pretrain, tiny, tmp_path, monkeypatch
):
    (tmp_path / "python").mkdir()
    (tmp_path / "python/this.py").write_text("print('The Zen of Python')\n" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    append = DatasetWriter.append

    def signalled(self, encoded):
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(0.2)
        return append(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "append", signalled)
        outcome = pretrain(f"train {tiny} --steps 1")
    assert (outcome.code, outcome.err) == (75, "")
    said = "· SIGUSR1: stopped before training began; the same command begins again"
    assert outcome.out.splitlines()[-1] == said
    assert not Path("data/demo").exists()
    assert not Path("runs").exists()
    assert pretrain(f"train {tiny} --steps 1").code == 0


def test_with_several_datasets_one_must_be_chosen(pretrain, refused, dataset, tiny):
    shutil.copytree(dataset, "data/other")
    message = refused(f"train {tiny} --steps 1")
    assert "data/corpus, data/other" in message
    assert "--data" in message
    assert pretrain(f"train {tiny} --steps 1 --data data/other").code == 0


# --- several datasets, and whole documents -------------------------------------------------------


@pytest.fixture
def other(pretrain, dataset):
    """Dataset `data/other`: another part of the same text, without a validation split."""
    line = "tokenize --tokenizer bytes --val-fraction 0 corpus/more corpus/verse-03.txt"
    assert pretrain(f"{line} --out data/other").code == 0
    return Path("data/other")


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize(
    "data", ["--data data/corpus:0.75 data/other:0.25", "--data data/corpus:3 --data data/other:1"]
)
def test_datasets_are_mixed_by_the_typed_weights(pretrain, tiny, data):
    outcome = pretrain(f"train {data} {tiny} --steps 4 --out mixed --learning-rate 0.01")
    assert outcome.code == 0, outcome.err
    # 16 samples of 32 tokens, mixed 3 : 1
    assert metrics("mixed")[-1]["sources"] == {"data/corpus": 384, "data/other": 128}
    assert "Tokens seen: data/corpus 384, data/other 128" in outcome.out
    (evaluation,) = metrics("mixed", "evaluation")
    assert list(evaluation["sources"]) == ["data/corpus"]  # data/other has no validation split
    assert "data/corpus: " in outcome.out.split("validation loss")[1]
    made = record("mixed")
    assert made["dataset"]["path"] == data.replace("--data ", "")
    assert pretrain("train --resume mixed --steps 5").code == 0
    assert metrics("mixed")[-1]["step"] == 5


@pytest.mark.usefixtures("other")
def test_an_unweighted_mixture_epoch_is_one_epoch_of_each_dataset(pretrain, tiny):
    sizes = {}
    for name in ("corpus", "other"):
        shards = json.loads(Path(f"data/{name}/dataset.json").read_text())["shards"]
        tokens = sum(shard["tokens"] for shard in shards if shard["split"] == "train")
        sizes[f"data/{name}"] = (tokens - 1) // 32 * 32
    tokens = sum(sizes.values())
    line = f"train {tiny} --tokens-per-step {tokens} --micro-batch-size 1 --steps 1 --out mixed"
    outcome = pretrain(f"{line} --data data/corpus data/other --set train.sample_tokens=0")
    assert outcome.code == 0, outcome.err
    assert metrics("mixed")[-1]["sources"] == sizes


def test_a_run_on_one_dataset_reports_no_sources(pretrain, tiny, dataset):
    outcome = pretrain(f"train {tiny} --data {dataset} --steps 1 --out made")
    assert "sources" not in metrics("made")[0] | metrics("made", "evaluation")[0]
    assert "Tokens seen" not in outcome.out


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("data/corpus", "data/corpus: is it a dataset? give it with --data data/corpus"),
        ("--data data/corpus:0.7 data/other", "data.path: data/other has no weight"),
        ("--data data/corpus:0 data/other:0", "data.path: the weights in data/corpus:0 data/other"),
        ("--data data/corpus:1 data/other:-1", "data.path: the weight in data/other:-1 is below"),
        ("--data data/corpus data/corpus", "data/corpus: the same tokens as data/corpus; give"),
        ("--data data/corpus nowhere:0.5", "data.path: data/corpus has no weight"),
        ("--data data/corpus:1 nowhere:0.5", "nowhere: no such dataset; make one with"),
        ("--set data.path=3", "data.path: 3 is not a path or a list of paths"),
        ("--data data/other --packing bestfit", "data.packing: 'bestfit' is not one of concat, be"),
        ("--data data/other data/corpus --seq-len 2000",
         "data.seq_len: 2,000 is beyond the dataset data/other, whose training split has 1,"),
        ("--data data/other --packing best-fit --seq-len 2000", "data.seq_len: 2,000 is beyond th"),
    ],
)  # fmt: skip
def test_invalid_dataset_combinations_are_refused(refused, tiny, options, said):
    sizes = "--tokens-per-step 4000" if "2000" in options else "--steps 1"
    assert refused(f"train {tiny} {sizes} --steps 1 {options}").startswith(said)


def test_datasets_of_different_tokenizers_are_refused(pretrain, refused, dataset, tiny):
    pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus --out data/bpe")
    message = refused(f"train {tiny} --data {dataset} data/bpe --steps 1")
    assert message.startswith("data/bpe: made with the tokenizer bpe-300 (")
    assert ", and data/corpus with bytes (" in message


def test_best_fit_packing_runs_once_and_reports_how_full_samples_are(pretrain, tiny, dataset):
    """Pack documents of about 400 tokens into samples of 33, so that every document is cut."""
    line = f"train {tiny} --data {dataset} --packing best-fit --steps 2 --out"
    outcome = pretrain(f"{line} first")
    assert outcome.code == 0, outcome.err
    index = dataset / "packing-best-fit-32.idx"
    built = index.stat().st_mtime_ns
    assert "· data/corpus: packing documents into samples of 32 tokens, once" in outcome.out
    assert " samples of whole documents, 9" in outcome.out
    assert "documents are longer than a sample, and " in outcome.out
    again = pretrain(f"{line} second")
    assert "packing documents into samples" not in again.out
    assert "% of their places filled" in again.out
    assert index.stat().st_mtime_ns == built
    losses = [[row["loss"] for row in metrics(run)] for run in ("first", "second")]
    assert losses[0] == losses[1]
    assert record("first")["settings"]["data"]["packing"] == "best-fit"


# --- stop and resume -----------------------------------------------------------------------------


@pytest.mark.usefixtures("dataset")
def test_ctrl_c_saves_and_prints_the_resume_command(pretrain, tiny):
    command = f"train {tiny} --device cpu --steps 100000 --set train.sample_tokens=0".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain_cli", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    run = Path("runs/gemma3-tiny-corpus")
    try:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if (run / "metrics.jsonl").is_file() and len(metrics(run)) > 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (75, "")
    step = metrics(run)[-1]["step"]
    assert out.splitlines()[-1] == (
        f"Stopped at step {step:,} of 100,000, saved. "
        "Continue with: pretrain train --resume runs/gemma3-tiny-corpus"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]

    outcome = pretrain(f"train --resume {run} --steps {step + 2}")
    assert outcome.code == 0, outcome.err
    assert f"Done: {step + 2:,} steps." in outcome.out
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 3))


def test_a_profile_silences_the_profilers_own_log(pretrain, trained, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "")  # so that monkeypatch restores it
    monkeypatch.delenv("KINETO_LOG_LEVEL")
    outcome = pretrain("train --resume runs/tiny --steps 65 --profile 1")
    assert outcome.code == 0, outcome.err
    assert "KINETO_LOG_LEVEL" in os.environ


def test_max_time_limits_one_process_and_is_not_kept_on_resume(pretrain, trained):
    for options, limit in (("--steps 61 --max-time 9h", "9h"), ("--steps 62", None)):
        outcome = pretrain(f"train --resume runs/tiny {options}")
        assert outcome.code == 0, outcome.err
        record = yaml.safe_load(Path("runs/tiny/run.yaml").read_text())
        assert record["settings"]["train"]["max_time"] == limit
    assert "train.max_time: 9h → None" in outcome.out


@pytest.mark.usefixtures("trained")
def test_resume_continues_a_finished_run_with_more_steps(pretrain):
    before = Path("runs/tiny/metrics.jsonl").read_text()
    outcome = pretrain("train --resume runs/tiny --steps 62")
    assert outcome.code == 0, outcome.err
    assert Path("runs/tiny/metrics.jsonl").read_text().startswith(before)
    assert [row["step"] for row in metrics("runs/tiny")] == list(range(1, 63))
    assert Path("runs/tiny/checkpoints/step-000062").is_dir()


@pytest.mark.usefixtures("trained")
def test_resume_continues_from_a_given_checkpoint(pretrain):
    outcome = pretrain("train --resume runs/tiny/checkpoints/step-000040 --steps 41")
    assert outcome.code == 0, outcome.err
    assert [row["step"] for row in metrics("runs/tiny")] == list(range(1, 42))


@pytest.mark.usefixtures("trained")
def test_resume_continues_for_more_tokens(pretrain):
    outcome = pretrain("train --resume runs/tiny --tokens 8000")
    assert outcome.code == 0, outcome.err
    assert metrics("runs/tiny")[-1]["step"] == 63  # 62.5 steps of 128


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["model.safetensors", "training/optimizer.safetensors"])
def test_resume_skips_a_truncated_checkpoint_with_a_notice(pretrain, refused, name):
    newest = Path("runs/tiny/checkpoints/step-000060")
    cut(newest / name)
    message = refused(f"train --resume {newest}")
    assert message.startswith(f"{newest / name}: checksum differs")
    outcome = pretrain("train --resume runs/tiny --steps 60")
    assert outcome.code == 0, outcome.err
    assert f"· {newest / name}: checksum differs" in outcome.out
    assert "steps 40 to 60" in outcome.out
    assert [row["step"] for row in metrics("runs/tiny")] == list(range(1, 61))


@pytest.mark.usefixtures("trained")
def test_resume_refuses_a_run_with_only_truncated_checkpoints(refused):
    for folder in Path("runs/tiny/checkpoints").iterdir():
        cut(folder / "model.safetensors")
    message = refused("train --resume runs/tiny")
    assert message == "runs/tiny: none of its 2 checkpoints passes its checksums"


@pytest.mark.usefixtures("trained")
def test_resume_refuses_another_dataset_but_allows_a_moved_one(pretrain, refused):
    pretrain("tokenize --tokenizer bytes --val-fraction 0.3 corpus --out data/other")
    message = refused("train --resume runs/tiny --steps 62 --data data/other")
    assert message.startswith("data/other: not the dataset that runs/tiny was trained on")
    shutil.move("data/corpus", "data/moved")  # a moved dataset counts as unchanged
    assert pretrain("train --resume runs/tiny --steps 61 --data data/moved").code == 0


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nowhere", "nowhere: no such run folder"),
        ("corpus", "corpus: no run.yaml; --resume takes the folder of a run"),
        ("runs/tiny --seed 3", "train.seed: 3 differs from the run's 0"),
        ("runs/tiny --learning-rate 1", "optimizer.learning_rate: 1.0 differs from the run's 0.01"),
        ("runs/tiny --seq-len 16", "data.seq_len: 16 differs from the run's 32"),
        ("runs/tiny --document-mask", "data.document_mask: True differs from the run's False"),
        ("runs/tiny --config run.yaml", "--config: run.yaml does not go with --resume"),
        ("runs/tiny --steps 5", "train.steps: 5 "),
        ("runs/tiny --plan", "--plan: of a new run; leave --resume"),
    ],
)  # fmt: skip
def test_resume_refuses_invalid_folders_and_changes(refused, options, said):
    assert refused(f"train --resume {options}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_resume_refuses_a_damaged_run_yaml(refused):
    Path("runs/tiny/run.yaml").write_text("settings:\n  model:\n")
    assert refused("train --resume runs/tiny").startswith("runs/tiny/run.yaml: damaged")


# --- weights to start from -----------------------------------------------------------------------

SIZES = "--seq-len 32 --micro-batch-size 2 --tokens-per-step 128 --dtype float32"


@pytest.mark.usefixtures("trained")
def test_training_starts_from_the_weights_of_a_model_folder(pretrain):
    checkpoint = "runs/tiny/checkpoints/step-000060"
    outcome = pretrain(f"train --init-from {checkpoint} {SIZES} --steps 1 --out again")
    assert outcome.code == 0, outcome.err
    assert metrics("again")[0]["loss"] < 3  # not the 5.8 of random weights


@pytest.mark.usefixtures("trained")
def test_weights_of_another_tokenizer_lend_the_rows_of_shared_tokens(pretrain):
    pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus --out data/bpe")
    checkpoint = "runs/tiny/checkpoints/step-000060"
    done = pretrain(f"train --init-from {checkpoint} --data data/bpe {SIZES} --steps 1 --out again")
    assert done.code == 0, done.err
    assert (
        f"Vocabulary of data/bpe (bpe-300) instead of {checkpoint}'s: 257 tokens are kept, 43 are "
        "new, drawn from the mean and covariance of the old, and 0 are dropped; 320 rows"
    ) in done.out


@pytest.mark.usefixtures("trained")
def test_the_plan_of_a_run_is_shown_and_nothing_is_written(pretrain, tmp_path):
    pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus --out data/bpe")
    checkpoint = "runs/tiny/checkpoints/step-000060"
    before = tree(tmp_path)
    done = pretrain(f"train --plan --init-from {checkpoint} --data data/bpe {SIZES} --steps 7")
    assert done.code == 0, done.err
    assert tree(tmp_path) == before
    assert "257 tokens are kept, 43 are new" in done.out
    assert "320 rows of the vocabulary" in done.out
    assert "7 of 128 tokens (4 samples of 32), 896 in all" in done.out


@pytest.mark.usefixtures("corpus")
def test_the_plan_shows_the_stages_and_most_epochs(pretrain):
    Path("more.txt").write_text("another text, " * 1000)
    for name in ("corpus", "more.txt"):
        assert pretrain(f"tokenize --tokenizer bytes {name} --out data/{name[:4]}").code == 0
    plan = f"train --plan {SIZES} --data data/corp --steps 50 --set"
    stage = "{after: 1K, path: [data/more:1, data/corp:3], seq_len: 64}"
    done = pretrain(f"{plan} 'data.stages=[{stage}]'")
    assert done.code == 0, done.err
    assert "After step 8: data/corp:3 data/more:1, samples of 64 tokens" in done.out + done.err
    assert "after 8       data/corp:3 data/more:1, samples of 64 tokens" in done.out
    done = pretrain(f"{plan} data.max_epochs=0.5")
    assert done.code == 2
    assert "of 50 steps, all datasets of the stage have been read 0.5 times" in done.err


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    ],
)  # fmt: skip
def test_init_from_a_truncated_model_folder_is_refused(refused, name):
    shutil.copytree("runs/tiny/checkpoints/step-000060", "model")
    shutil.rmtree("model/training")
    cut(Path("model", name))
    assert refused(f"train --init-from model {SIZES} --steps 1").startswith(f"model/{name}: ")


# --- refused before anything is computed or written ----------------------------------------------


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model gema3", "model: 'gema3' is not a model or a YAML file; did you mean gemma3?"),
        ("--model nowhere.yaml", "model: no file nowhere.yaml"),
        ("--data nowhere", "nowhere: no such dataset; make one with 'pretrain tokenize'"),
        ("--data corpus", "corpus: no dataset.json in it"),
        ("--max-time 4", "train.max_time: '4' is not a time such as 90s, 15m, 3h55m, 1d"),
        ("--config nowhere", "--config: no file 'nowhere', and none of the built-in ones"),
        ("--config corpus/verse-00.txt", "corpus/verse-00.txt: holds no settings"),
        ("--init-from corpus", "model.name: 'gemma3-tiny' does not go with --init-from corpus"),
        ("--attn fleks", "speed.attention: 'fleks' is not one of auto, eager, sdpa, blocks"),
        ("--attn flex --device cpu", "speed.attention: 'flex' can't be used: PyTorch's flex_atten"),
        ("--device cuda:99", "train.device: 'cuda:99' is not there"),
        ("--device gpu", "train.device: 'gpu' is not a device; give cpu, cuda, cuda:N or mps"),
        ("--seq-len 4096", "data.seq_len: 4,096 is beyond the model's 2,048 positions"),
        ("--tokens-per-step 100", "train.tokens_per_step: 100 is not a multiple of 64"),
        ("--tokens-per-step 192 --micro-batch-size 4",
         "train.tokens_per_step: 192 is not a multiple of 128 (micro-batch 4 × seq-len 32)"),
        ("--steps 5 --tokens 5000", "train.tokens: 5000 and train.steps: 5 are both given"),
        ("--set model.vocab_size=100", "model.vocab_size: 100 is too small for data/corpus"),
        ("--set model.hiden_size=64", "model.hiden_size: no such setting; did you mean"),
        ("--set optimizer.learnin_rate=1", "optimizer.learnin_rate: no such setting; did you mean "
         "optimizer.learning_rate?"),
        ("--out corpus", "--out: corpus is not an empty folder; choose another"),
        ("--out corpus/verse-00.txt", "--out: corpus/verse-00.txt is not an empty folder"),
        ("--out corpus/verse-00.txt/run", "--out: corpus/verse-00.txt/run "),
        ("--set train.parallel=fsdp", "train.parallel: 'fsdp' needs ranks"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_written(refused, tiny, options, said):
    steps = "" if "--steps" in options else "--steps 1"
    assert refused(f"train {tiny} {steps} {options}").startswith(said)


@pytest.mark.usefixtures("dataset")
def test_a_sequence_length_beyond_the_dataset_is_refused(refused, tiny):
    line = f"train {tiny} --seq-len 20000 --tokens-per-step 40000 --steps 1"
    message = refused(f"{line} --set model.max_position_embeddings=65536")
    assert message.startswith("data.seq_len: 20,000 is beyond the dataset data/corpus")
    assert "or more text" in message


@pytest.mark.usefixtures("trained")
def test_an_output_folder_that_holds_another_run_is_refused(refused, tiny):
    message = refused(f"train {tiny} --steps 1 --out runs/tiny")
    assert message == (
        "--out: runs/tiny holds another run; choose another folder, or continue that run with "
        "--resume runs/tiny"
    )


@pytest.mark.parametrize("change", ["cut", "altered"])
def test_a_changed_shard_is_refused(refused, dataset, tiny, change):
    shard = dataset / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data if change == "altered" else data[:-2])
    message = refused(f"train {tiny} --steps 1")
    what = (
        f"damaged between bytes 0 and {len(data):,} ("
        if change == "altered"
        else f"{len(data) - 2:,} by"
    )
    assert message.startswith(f"data/corpus/train-00000.bin: {what}")
    assert "tokenize again with --force" in message


def test_a_dataset_with_a_replaced_tokenizer_is_refused(pretrain, refused, dataset, tiny):
    pretrain("tokenize --tokenizer bpe --vocab-size 300 corpus --out elsewhere")
    shutil.copy("elsewhere/tokenizer.json", dataset)
    message = refused(f"train {tiny} --steps 1")
    assert message.startswith("data/corpus/tokenizer.json: not the tokenizer that made this dat")


def test_a_wrong_model_is_refused_before_the_demo_is_made(refused, tiny, tmp_path, monkeypatch):
    (tmp_path / "python").mkdir()
    (tmp_path / "python/this.py").write_text("print('The Zen of Python')\n" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python")})
    assert refused(f"train {tiny} --model gema3").startswith("model: 'gema3' is not a model")


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nowhere", "nowhere: no such folder; --init-from takes a model folder"),
        ("corpus", "corpus: no config.json"),
    ],
)
def test_init_from_a_folder_without_a_model_is_refused(refused, folder, said):
    assert refused(f"train --init-from {folder} --steps 1").startswith(said)


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
