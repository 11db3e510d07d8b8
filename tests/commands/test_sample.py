"""`pretrain sample`: text from a run, a checkpoint or a model folder, printed unchanged."""

import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from pretrain_cli.data.tokenizers.tokenizer import load_tokenizer

GREEDY = "--temperature 0 --max-tokens 24 --dtype float32 --prompt 'green bottles'"


@pytest.mark.usefixtures("trained")
def test_sample_without_options_uses_the_newest_run(pretrain):
    outcome = pretrain("sample")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "runs/tiny/checkpoints/step-000060\n"
    assert len(outcome.out) > 10


@pytest.mark.usefixtures("trained")
def test_a_run_a_checkpoint_and_a_model_folder_give_equal_text(pretrain):
    shutil.copytree("runs/tiny/checkpoints/step-000060", "elsewhere")
    shutil.rmtree("elsewhere/training")  # a Hugging Face folder has none
    texts = {
        pretrain(f"sample {where} {GREEDY}").out
        for where in ("runs/tiny", "runs/tiny/checkpoints/step-000060", "elsewhere", "")
    }
    assert len(texts) == 1
    hot = "--max-tokens 60 --temperature 2 --n 4 --prompt 'green bottles'"
    older = pretrain(f"sample runs/tiny/checkpoints/step-000040 {hot}").out
    assert older != pretrain(f"sample runs/tiny {hot}").out


@pytest.mark.usefixtures("trained")
def test_greedy_text_equals_that_of_transformers(pretrain):
    """Open our checkpoint in transformers directly, without an export."""
    transformers = importlib.import_module("transformers")
    folder = "runs/tiny/checkpoints/step-000060"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("green bottles", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert pretrain(f"sample {GREEDY}").out == f"{text}\n"


def test_a_transformers_folder_gives_the_text_of_transformers(pretrain, tmp_path):
    transformers = importlib.import_module("transformers")
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        bos_token_id=None, eos_token_id=256, pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "theirs")
    prompt = torch.tensor([tokenizer.encode_prompt("green bottles")])
    mask = torch.ones_like(prompt)
    # ids above 256 pad the vocabulary and have no text
    ids = model.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False,
                         suppress_tokens=list(range(257, 320)), pad_token_id=256)[0]  # fmt: skip
    text = tokenizer.decode(ids.tolist())
    outcome = pretrain(f"sample theirs {GREEDY}")
    assert outcome.code == 0, outcome.err
    # trailing bytes that do not complete a character are held back
    assert outcome.out.rstrip("\n\ufffd") == text.rstrip("\n\ufffd")


@pytest.mark.usefixtures("trained")
def test_the_prompt_may_come_from_standard_input(pretrain):
    typed = pretrain(f"sample {GREEDY}").out
    line = GREEDY.replace(" --prompt 'green bottles'", "")
    assert pretrain(f"sample {line}", "green bottles").out == typed
    assert pretrain(f"sample {line} --prompt -", "green bottles").out == typed


@pytest.mark.usefixtures("trained")
def test_text_is_printed_unchanged(pretrain):
    """Print markup, emoji codes, control characters and spaces unchanged."""
    prompt = "a\tb [bold]c[/] [/x] :smile: \\ \x07 é\r \n   "
    outcome = pretrain(f"sample --max-tokens 1 --temperature 0 --prompt {shlex.quote(prompt)}")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(prompt)


@pytest.mark.usefixtures("trained")
def test_a_seed_determines_the_text_and_n_gives_several(pretrain):
    line = "sample --max-tokens 40 --dtype float32 --prompt green"
    first, second = pretrain(f"{line} --seed 1").out, pretrain(f"{line} --seed 2").out
    assert first == pretrain(f"{line} --seed 1").out
    assert first != second
    several = pretrain(f"{line} --seed 1 --n 2").out
    assert several.index(first) < several.index(second)
    assert several.count(" of 2 ") == 2


@pytest.mark.usefixtures("trained")
def test_prompts_of_a_file_keep_their_order_and_single_prompt_text(pretrain):
    """Use 7 prompts of different lengths, most beyond the window of 8, in batches of 3 and 7."""
    prompts = ["And if one green bottle " * k + "x" * k for k in range(1, 6)] + ["a", "green"]
    Path("prompts.txt").write_text("\n\n".join(prompts) + "\n")
    line = "sample --max-tokens 30 --dtype float32 --json"
    together = rows(pretrain(f"{line} --prompts prompts.txt --batch-size 3 --n 2 --seed 4"))
    assert [row["prompt"] for row in together] == [p for prompt in prompts for p in [prompt] * 2]
    assert [row["seed"] for row in together] == list(range(4, 18))
    for row in together[::3]:
        alone = rows(pretrain(f"{line} --seed {row['seed']} --prompt {shlex.quote(row['prompt'])}"))
        assert len(alone) == 1
        assert alone[0].pop("logprobs") == pytest.approx(row.pop("logprobs"), abs=1e-3)
        assert alone[0] == row
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    again = rows(pretrain(f"{line} --prompts prompts.jsonl --batch-size 7 --n 2 --seed 4"))
    assert [row["tokens"] for row in again] == [row["tokens"] for row in together]


@pytest.mark.usefixtures("trained")
def test_json_lines_have_tokens_logprobs_and_the_stop_reason(pretrain):
    outcome = pretrain(f"sample {GREEDY} --json")
    assert outcome.err.startswith("runs/tiny/checkpoints/step-000060\n")
    (row,) = rows(outcome)
    assert row["stopped"] == "max-tokens"
    assert len(row["tokens"]) == len(row["logprobs"]) == 24
    assert bytes(row["tokens"]).decode() == row["text"]
    assert f"green bottles{row['text']}\n" == pretrain(f"sample {GREEDY}").out
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "runs/tiny/checkpoints/step-000060", dtype=torch.float32
    )
    ids = torch.tensor([[*b"green bottles", *row["tokens"]]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, 12:-1, :257].log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 13:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, rtol=1e-3, atol=1e-4)
    stop = row["text"][5:9]
    (stopped,) = rows(pretrain(f"sample {GREEDY} --json --stop never --stop {shlex.quote(stop)}"))
    assert stopped["stopped"] == "stop"
    assert stopped["text"] == row["text"][: row["text"].index(stop)]
    assert stopped["tokens"] == row["tokens"][: row["text"].index(stop) + len(stop)]
    (full,) = rows(pretrain("sample --json --temperature 0 --max-tokens 999999999999", "x" * 2040))
    assert full["stopped"] == "positions" or full["stopped"] == "end"


@pytest.mark.usefixtures("trained")
def test_an_interrupted_text_ends_with_a_newline(pretrain, monkeypatch):
    batch, turns = importlib.import_module("pretrain_cli.engine.sampling.batch"), []
    sample_next = batch.sample_next

    def interrupted(*args):
        turns.append(args)
        if len(turns) == 6:
            raise KeyboardInterrupt
        return sample_next(*args)

    whole = pretrain(f"sample {GREEDY}").out
    monkeypatch.setattr(batch, "sample_next", interrupted)
    outcome = pretrain(f"sample {GREEDY}")
    assert outcome.code == 130
    assert outcome.out == whole[: len("green bottles") + 5] + "\n"


def rows(outcome):
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.mark.usefixtures("trained")
def test_text_ends_at_max_tokens(pretrain):
    outcome = pretrain("sample --max-tokens 3 --temperature 0 --prompt green")
    assert outcome.out.startswith("green")
    assert len(outcome.out) <= len("green") + 3 + 1  # 3 one-byte tokens, a newline


# --- refused -------------------------------------------------------------------------------------


def test_sample_without_any_run_is_refused(refused):
    message = refused("sample")
    assert message.startswith("runs/: no run with a checkpoint; train one with 'pretrain train'")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nowhere", "nowhere: no such run, checkpoint or model folder"),
        ("corpus", "corpus: neither a run with checkpoints nor a model folder (no config.json)"),
        ("--n 0", "--n: 0 is not at least 1"),
        ("--max-tokens 0", "--max-tokens: 0 is not at least 1"),
        ("--temperature -1", "--temperature: -1.0 is not at least 0"),
        ("--temperature nan", "--temperature: nan is not at least 0"),
        ("--top-k 0", "--top-k: 0 is not at least 1"),
        ("--top-p 1.5", "--top-p: 1.5 is not above 0, up to 1"),
        ("--min-p 2", "--min-p: 2.0 is not above 0, up to 1"),
        ("--repetition-penalty 0", "--repetition-penalty: 0.0 is not above 0"),
        ("--batch-size 0", "--batch-size: 0 is not at least 1"),
        ("--prompts nowhere", "--prompts: nowhere: No such file or directory; give a file"),
        ("--prompts corpus --prompt a", "--prompts: has prompts, and --prompt is one"),
        ("--device cuda:99", "train.device: 'cuda:99' is not there"),
        ("--dtype float8", "speed.dtype: 'float8' can't be used: it is a way to train"),
        ("--seed 99999999999999999999", "--seed: 99999999999999999999 "),
    ],
)  # fmt: skip
def test_invalid_sample_options_are_refused(refused, options, said):
    assert refused(f"sample {options}").startswith(said)


@pytest.mark.usefixtures("trained")
def test_a_prompt_that_fills_every_position_is_refused(refused, pretrain):
    message = refused("sample", "x" * 3000)
    assert message == "--prompt: its 3,000 tokens fill the model's 2,048 positions; shorten it"
    assert pretrain("sample", "x" * 3000).out == ""


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_checkpoint_is_refused_or_skipped(pretrain, refused, name):
    """Refuse a truncated checkpoint; for its run, use the one before it and print a notice."""
    newest = Path("runs/tiny/checkpoints/step-000060")
    cut(newest / name)
    message = refused(f"sample {newest}")
    assert message.startswith(f"{newest / name}: checksum differs")
    assert "use another checkpoint" in message
    outcome = pretrain(f"sample runs/tiny {GREEDY}")
    assert outcome.code == 0
    assert f"{newest / name}: checksum differs, the file was cut short or altered; skipped" in (
        outcome.out
    )
    assert outcome.err == "runs/tiny/checkpoints/step-000040\n"
    cut(Path("runs/tiny/checkpoints/step-000040") / name)
    assert "none of its 2 checkpoints passes its checksums" in refused("sample runs/tiny")


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_model_folder_is_refused(refused, name):
    """Find the damage in the files themselves: the folder has no checksums."""
    shutil.copytree("runs/tiny/checkpoints/step-000060", "model")
    shutil.rmtree("model/training")
    cut(Path("model", name))
    assert refused("sample model").startswith(f"model/{name}: ")


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
