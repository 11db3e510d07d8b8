"""The kernel of the loss, run on a CPU by Triton's interpreter, against autograd in float64."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for GPUs")

ROWS, IGNORED, Z_LOSS = 5, 2, 0.1
CASES = [
    (dtype, vocab_size, z_loss)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for vocab_size in (5, 8192, 20001)  # less than a block; one; two and a ragged third
    for z_loss in (0.0, Z_LOSS)
]
KERNEL = """
import sys, torch
from pretrain_cli.model.loss_kernel import gradient_
def results(logits, *others):
    kept = logits.clone()
    sums = gradient_(kept, *others, write=False)
    assert torch.equal(kept, logits)
    assert all(map(torch.equal, sums, gradient_(logits, *others)))
    return (*sums, logits)
torch.save([results(*case) for case in torch.load(sys.argv[1])], sys.argv[2])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the inputs and the kernel's results of every case. A process of its own: Triton
    decides when it is imported that it interprets."""
    folder = tmp_path_factory.mktemp("kernel")
    generator = torch.Generator().manual_seed(5)
    cases = []
    for dtype, vocab_size, z_loss in CASES:
        logits = (torch.randn(ROWS, vocab_size, generator=generator) * 4).to(dtype)
        targets = torch.randint(vocab_size, (ROWS,), generator=generator)
        targets[IGNORED] = -100
        cases.append((logits, targets, (targets != -100) * 0.3, z_loss))
    torch.save(cases, folder / "cases")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", KERNEL, str(folder / "cases"), str(folder / "results")]
    subprocess.run(command, check=True, env=environment)
    return dict(zip(CASES, zip(cases, torch.load(folder / "results"), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_gives_the_gradient_that_autograd_does(case, results):
    (logits, targets, share, z_loss), (log_sum, target_logits, gradient) = results[case]
    x = logits.double().requires_grad_()
    expected_sum = x.logsumexp(-1)
    expected_logits = x.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    ((expected_sum - expected_logits + z_loss * expected_sum.square()) * share).sum().backward()
    counted = share > 0
    for ours, theirs in ((log_sum, expected_sum), (target_logits, expected_logits)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours[counted].double(), theirs.detach()[counted], rtol=1e-6, atol=1e-6
        )
        assert ours[IGNORED] == 0
    # The interpreter cuts bfloat16 off; a GPU rounds it.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}[case[0]]
    torch.testing.assert_close(gradient.double(), x.grad, rtol=rounding, atol=1e-6)
    assert not gradient[IGNORED].any()
