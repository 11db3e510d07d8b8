"""Products of few rows on a CPU equal the plain product up to rounding."""

import pytest
import torch

from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.inference.cpu_linear import summed
from pretrain_cli.model.inference.decode import DecodeSession
from pretrain_cli.model.parameter_map import Merged
from tests.model.inference.test_decode import compare, draw

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("merged", [Merged(), Merged(qkv=False, gate_up=False)])
@pytest.mark.parametrize("family", ["gemma3", "qwen3", "moe"])
def test_packed_matrices_give_the_same_logits(make_config, wide, merged, family):
    plain, packed = (
        Decoder(make_config(family, tie_word_embeddings=merged.qkv), merged=merged)
        for _ in range(2)
    )
    for model in (plain, packed):
        wide(model)
    compare(plain, DecodeSession(packed, fast=True), draw(11, 4, 30))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_a_sum_along_rows_is_the_product_rounded_once(dtype, rounding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, generator=generator).to(dtype)
    weight = torch.randn(23, 40, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(summed(x, weight).double(), exact, rtol=rounding, atol=1e-5)
