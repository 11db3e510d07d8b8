"""`--quantize int8` of sample, evaluate and benchmark sample: the same model in all three, and an
error where int8 is unavailable."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from pretrain_cli.engine.sampling.sample import refuse_int8_off_cpu
from pretrain_cli.errors import ConfigError
from tests.commands.test_evaluate import CHECKPOINT, evaluated
from tests.engine.evaluation.test_evaluate_checkpoint import reference


def rounded(weight):
    """Round a matrix to whole numbers from −127 to 127, times one scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.fixture
def rounded_folder(trained):
    """Checkpoint saved by transformers with rounded matrices; the embedding is not rounded."""
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    head = rounded(model.lm_head.weight.detach())
    with torch.no_grad():
        for layer in model.model.layers:
            for name, weight in layer.named_parameters():
                if "norm" not in name:
                    weight.copy_(rounded(weight))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained("rounded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("rounded", name).write_bytes(Path(CHECKPOINT, name).read_bytes())
    return Path("rounded")


def test_quantized_loss_is_reported_beside_the_original_loss(pretrain, rounded_folder):
    plain = evaluated(pretrain, "")
    result = evaluated(pretrain, "--quantize int8")
    nats, targets, _ = reference("data/corpus", folder=rounded_folder)
    assert result["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert result["unquantized"]["loss"] == plain["loss"]
    assert result["loss"] != plain["loss"]
    assert (result["quantize"], plain["quantize"], plain["unquantized"]) == ("int8", None, None)
    outcome = pretrain("evaluate --quantize int8")
    assert f"{result['loss'] - plain['loss']:+.5f} by int8" in outcome.out


def test_int8_text_equals_that_of_rounded_weights(pretrain, rounded_folder):
    line = "--temperature 0 --max-tokens 40 --dtype float32 --prompt '1 green' --json"
    expected, given = (
        json.loads(pretrain(f"sample {where} {line}").out)
        for where in (rounded_folder, "runs/tiny --quantize int8")
    )
    assert given["tokens"] == expected["tokens"]
    assert given["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
    plain = json.loads(pretrain(f"sample runs/tiny {line}").out)
    assert given["logprobs"] != pytest.approx(plain["logprobs"], abs=1e-5)


@pytest.mark.usefixtures("trained")
def test_a_notice_reports_faster_float_products_with_equal_text(pretrain):
    line = "sample --quantize int8 --temperature 0 --max-tokens 20 --dtype float32"
    one = pretrain(f"{line} --prompt '1 green'")
    apart = pretrain(f"{line} --prompt '1 green' --no-compile")
    assert "read as float32: int8 products are always compiled" in apart.out + apart.err
    assert apart.out.endswith(one.out.splitlines()[-1] + "\n")
    several = pretrain(f"{line} --prompt '1 green' --n 5 --batch-size 5 --json")
    assert "with 5 texts at a time that is faster" in several.err
    texts = {json.loads(row)["text"] for row in several.out.splitlines()}
    assert len(texts) == 1
    assert texts.pop() in one.out


@pytest.mark.slow
def test_a_compiled_int8_step_generates_the_same_text(pretrain, rounded_folder):
    line = "--temperature 0 --max-tokens 40 --dtype float32 --prompt '1 green'"
    plain = pretrain(f"sample runs/tiny --quantize int8 {line}")
    compiled = pretrain(f"sample runs/tiny --quantize int8 {line} --compile")
    assert "Compiled in" in compiled.out + compiled.err
    assert plain.out.split("\n", 1)[1] == compiled.out.split("\n", 1)[1]


@pytest.mark.slow
def test_int8_sampling_reads_one_byte_per_weight(pretrain):
    line = "benchmark sample --seq-len 20 --max-tokens 6 --rounds 1 --dtype float32"
    read = []
    for option in ("", "--quantize int8"):
        assert pretrain(f"{line} {option} --json out.json").code == 0
        found = json.loads(Path("out.json").read_text())
        assert found["results"][0]["decode_tokens_per_second"] > 0
        read.append(found["step_bytes"])
    assert 3 < read[0] / read[1] < 4  # less than 4: the KV cache is not quantized


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("command", ["sample", "evaluate", "benchmark sample"])
def test_quantize_types_other_than_int8_are_refused(refused, command):
    assert refused(f"{command} --quantize int4") == "--quantize: 'int4' is not int8"


@pytest.mark.usefixtures("trained")
def test_quantize_refuses_a_mixture_of_experts(refused):
    line = "benchmark sample --quantize int8 --model qwen3-30b-a3b"
    assert refused(line).startswith("--quantize: not of this model: the experts")


def test_int8_sampling_on_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="int8 is for writing text on a CPU, and the device is"):
        refuse_int8_off_cpu(torch.device("cuda"))
