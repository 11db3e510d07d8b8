"""Training steps of a peer: the same losses and gradient norms as ours."""

import pytest
import torch

from pretrain_cli.config.run_config import SpeedConfig
from pretrain_cli.engine.benchmark import timing
from pretrain_cli.engine.benchmark.workload import Arm, Workload
from pretrain_cli.engine.runtime.speed import resolve_speed
from pretrain_cli.model.config import variant
from pretrain_cli.model.presets import preset

CPU = torch.device("cpu")
SMALL = {"hidden_size": 64, "vocab_size": 300, "num_attention_heads": 4, "head_dim": 16}
MODELS = {
    "gemma3-tiny": SMALL | {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "qwen3-tiny": SMALL | {"num_hidden_layers": 3},
    "qwen3-30b-a3b": SMALL | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "router_aux_loss_coef": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_steps_give_our_losses_and_gradient_norms(name, dtype):
    pytest.importorskip("transformers")
    model = variant(preset(name), MODELS[name])
    workload = Workload(name=name, model=model, seq_len=40, micro_batch_size=2, device="cpu")
    asked = SpeedConfig.model_validate({"dtype": dtype, "compile": False})
    taken = []
    for peer in ("", "transformers"):
        arm = Arm(name="arm", workload=workload, speed=asked, peer=peer)
        step = timing.build_step(arm, resolve_speed(asked, CPU), CPU)
        taken.append([tuple(number.item() for number in step()) for _ in range(4)])
    ours, theirs = taken
    assert theirs[-1][0] < 0.99 * theirs[0][0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4 if dtype == "float32" else 2e-2)
