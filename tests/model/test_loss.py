"""The chunked loss against PyTorch's own cross entropy over whole logits: values and gradients."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain_cli.model import counting, loss
from pretrain_cli.model.decoder import Decoder
from pretrain_cli.model.loss import cross_entropy, softmax_, with_z_loss
from pretrain_cli.model.loss_backends import LOSS_BACKENDS
from pretrain_cli.model.presets import preset

B, T, D, V = 3, 9, 12, 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Process 4 of 27 rows at a time: six chunks and a shorter seventh."""
    monkeypatch.setattr(counting, "CHUNK_ELEMENTS", {"cpu": 4 * V + 3})


@pytest.fixture
def case():
    """Return hidden, weight and targets; some targets are ignored, in one chunk all of them."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets.view(-1)[4:8] = -100
    targets.view(-1)[26] = -100
    return hidden, weight, targets


@pytest.fixture
def even_chunks(monkeypatch):
    """Process 4 of 27 rows at a time, as on a GPU: the last chunk begins one row earlier."""
    monkeypatch.setattr(counting, "CHUNK_ROWS", (4, 4))
    monkeypatch.setattr(counting, "TILE", 1)
    as_on_a_gpu = counting.loss_chunks(B * T, V, "cuda")
    assert as_on_a_gpu[0] == (23, 27, 1)
    assert len(as_on_a_gpu) == 7
    monkeypatch.setattr(loss, "loss_chunks", lambda tokens, vocab_size, device: as_on_a_gpu)


def by_torch(hidden, weight, targets):
    """Return the mean cross entropy over targets that are not ignored, in float64."""
    logits = hidden.double() @ weight.double().T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("chunked", [True, False, "torch"], ids=["chunked", "whole", "torch"])
def test_value_and_gradients_equal_those_of_cross_entropy(case, chunked):
    if chunked == "torch" and LOSS_BACKENDS["torch"].unavailable(torch.device("cpu")):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden, weight, targets = case
    expected = by_torch(*case)
    ours = cross_entropy(hidden, weight, targets, normalizer=None, chunked=chunked)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    mine = torch.autograd.grad(ours, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("elements", [1, V, 5 * V, 27 * V, 1000 * V])
def test_the_chunk_size_does_not_change_the_loss(case, elements, monkeypatch):
    monkeypatch.setattr(counting, "CHUNK_ELEMENTS", {"cpu": elements})
    ours = cross_entropy(*case, normalizer=None, chunked=True)
    torch.testing.assert_close(ours.double(), by_torch(*case), rtol=1e-6, atol=0)
    ours.backward()
    expected = torch.autograd.grad(by_torch(*case), case[1])[0]
    torch.testing.assert_close(case[1].grad, expected.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_chunks_of_one_size_count_every_token_once(case, even_chunks, z_loss):
    hidden, weight, targets = case
    logits = (hidden.double() @ weight.double().T).flatten(0, 1)
    counted = targets.flatten() != -100
    expected = by_torch(*case) + z_loss * (logits.logsumexp(-1).square() * counted).sum() / 22
    ours = with_z_loss(*case, normalizer=None, chunked=True, z_loss=z_loss).minimized
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    mine = torch.autograd.grad(ours, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        same = with_z_loss(*case, normalizer=None, chunked=True, z_loss=z_loss).minimized
    torch.testing.assert_close(same.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab_size", [4096, 4095])
@pytest.mark.parametrize("tokens", [3000, 17, 9000])
def test_the_loss_on_a_gpu_equals_that_in_float64(vocab_size, tokens, relative_error):
    generator = torch.Generator("cuda").manual_seed(3)
    hidden, weight = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16().requires_grad_()
        for shape in ((1, tokens, 64), (vocab_size, 64))
    )
    targets = torch.randint(vocab_size, (1, tokens), device="cuda", generator=generator)
    targets[0, ::7] = -100
    wide = weight.detach().float().requires_grad_()
    ours = cross_entropy(hidden, wide, targets, normalizer=None, chunked=True)
    expected = by_torch(hidden, wide, targets)
    torch.testing.assert_close(ours.double(), expected, rtol=5e-3, atol=0)
    mine = torch.autograd.grad(ours, (hidden, wide))
    theirs = torch.autograd.grad(expected, (hidden, wide))
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a.float(), b.float()) < 0.02
    with torch.no_grad():
        same = cross_entropy(hidden, wide, targets, normalizer=None, chunked=True)
    torch.testing.assert_close(same, ours.detach())


class Shapes(TorchDispatchMode):
    """Record the shape of every tensor created."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_only_a_chunk_of_logits_exists_at_a_time(case):
    with Shapes() as shapes:
        cross_entropy(*case, normalizer=None, chunked=True).backward()
    rows = {shape[0] for shape in shapes.seen if shape[1:] == (V,)}
    assert max(rows - {D}) == 4  # the weights are (D, V)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_softmax_runs_on_a_few_rows_at_a_time(case, rows, monkeypatch):
    monkeypatch.setattr(loss, "SOFTMAX_ELEMENTS", rows * V + 1)
    taken = []

    def softmax(logits, share, z_loss):
        taken.append(len(logits))
        return softmax_(logits, share, z_loss)

    ours = cross_entropy(*case, normalizer=None, chunked=True, softmax=softmax)
    assert sum(taken) == B * T
    assert max(taken) == rows
    torch.testing.assert_close(ours.double(), by_torch(*case), rtol=1e-6, atol=0)
    ours.backward()
    expected = torch.autograd.grad(by_torch(*case), case[1])[0]
    torch.testing.assert_close(case[1].grad, expected.float(), rtol=1e-5, atol=1e-7)


PEAK = """
import re, torch
from pretrain_cli.model.loss import cross_entropy

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def loss():
    hidden = torch.randn(1, 2048, 64).bfloat16().requires_grad_()
    weight = torch.randn(2**16, 64).requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    cross_entropy(hidden, weight, torch.zeros(1, 2048).long(), normalizer=None, chunked=True)
    return status("VmHWM") - before

loss()  # libraries set themselves up
print(loss())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports a peak")
def test_peak_memory_holds_the_logits_once_in_bfloat16():
    out = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    ).stdout
    logits, weights = 2048 * 2**16 * 2 / 2**20, 2**16 * 64 * (2 + 4) / 2**20
    # Without bfloat16 products in hardware oneDNN makes float32 copies of parts.
    in_hardware = torch.cpu._is_avx512_bf16_supported()
    assert logits < float(out) < (1.15 * (logits + weights) if in_hardware else 2 * logits)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_an_upstream_factor_scales_the_gradients(case, chunked):
    hidden, weight, targets = case
    plain, tripled = (
        torch.autograd.grad(
            factor * cross_entropy(hidden, weight, targets, normalizer=None, chunked=chunked),
            (hidden, weight),
        )
        for factor in (1, 3)
    )
    for a, b in zip(tripled, plain, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_a_multiple_of_the_unit_gradient_multiplies_the_gradients(case, monkeypatch):
    hidden, weight, targets = case
    monkeypatch.setattr(loss, "_is_one", lambda outer: outer is loss.unit_gradient(outer.device))
    unit = loss.unit_gradient(hidden.device)
    gradients = []
    for factor, gradient in ((1, unit), (3, unit), (1, torch.tensor(3.0))):
        ours = cross_entropy(hidden, weight, targets, normalizer=None, chunked=True)
        gradients.append(torch.autograd.grad(factor * ours, (hidden, weight), gradient))
    for plain, *tripled in zip(*gradients, strict=True):
        for x in tripled:
            torch.testing.assert_close(x, 3 * plain)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_micro_batches_add_up_to_the_mean_of_the_step(case, chunked):
    """Micro-batches have different numbers of ignored targets."""
    hidden, weight, targets = case
    count = int((targets != -100).sum())
    assert count == 22
    assert len({int((row != -100).sum()) for row in targets}) > 1
    total = torch.zeros(())
    for h, t in zip(hidden.split(1), targets.split(1), strict=True):
        part = cross_entropy(h, weight, t, normalizer=count, chunked=chunked)
        part.backward(retain_graph=True)
        total = total + part.detach()
    expected = by_torch(*case)
    theirs = torch.autograd.grad(expected, (hidden, weight))
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-6, atol=0)
    for a, b in zip((hidden.grad, weight.grad), theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_targets_that_are_all_ignored_give_zero_and_no_gradient(case, chunked):
    hidden, weight, targets = case
    ours = cross_entropy(
        hidden, weight, torch.full_like(targets, -100), normalizer=None, chunked=chunked
    )
    ours.backward()
    assert ours.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_the_loss_without_gradients_is_the_same(case, chunked):
    with torch.no_grad():
        ours = cross_entropy(*case, normalizer=None, chunked=chunked)
    torch.testing.assert_close(ours.double(), by_torch(*case), rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
def test_bfloat16_hidden_states_give_float32_loss_and_weight_gradient(
    case, chunked, relative_error
):
    hidden, weight, targets = case
    rounded = hidden.detach().bfloat16().requires_grad_()
    expected = by_torch(rounded.float(), weight.detach().bfloat16().float(), targets)
    ours = cross_entropy(rounded, weight, targets, normalizer=None, chunked=chunked)
    ours.backward()
    assert ours.dtype == weight.grad.dtype == torch.float32
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), expected, rtol=5e-3, atol=0)
    theirs = torch.autograd.grad(by_torch(*case), (hidden, weight))
    assert relative_error(rounded.grad, theirs[0]) < 0.02
    assert relative_error(weight.grad, theirs[1]) < 0.02


def test_bfloat16_weights_get_a_bfloat16_gradient(case, relative_error):
    hidden, weight, targets = case
    rounded = weight.detach().bfloat16().requires_grad_()
    cross_entropy(
        hidden.detach().bfloat16(), rounded, targets, normalizer=None, chunked=True
    ).backward()
    assert rounded.grad.dtype == torch.bfloat16
    theirs = torch.autograd.grad(by_torch(*case), weight)[0]
    assert relative_error(rounded.grad, theirs) < 0.02


def test_large_logits_give_the_right_loss_without_overflow(case):
    hidden, weight, targets = case
    far = (hidden.detach() * 300).requires_grad_()
    ours = cross_entropy(far, weight, targets, normalizer=None, chunked=True)
    ours.backward()
    torch.testing.assert_close(ours.double(), by_torch(far, weight, targets), rtol=1e-5, atol=0)
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_tied_weights_sum_the_gradients_of_lookup_and_head(family, make_config, wide):
    """The chunked and the whole loss give the same sum of both gradients."""
    config = make_config(family, tie_word_embeddings=True)
    tokens = torch.randint(0, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    found = []
    for chunked in (True, False):
        model = Decoder(config, chunked_loss=chunked)
        wide(model)
        model(tokens[:, :-1], tokens[:, 1:]).minimized.backward()
        found.append(model.embedding.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    unseen = sorted(set(range(60)) - set(tokens.flatten().tolist()))
    assert found[0][unseen].abs().sum() > 0  # the head reaches every row


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("count", [None, 17])
def test_the_z_loss_and_its_gradients_equal_those_of_whole_logits(case, chunked, count):
    hidden, weight, targets = case
    logits = (hidden.double() @ weight.double().T).flatten(0, 1)
    counts = targets.flatten() != -100
    over = count or counts.sum()
    entropy = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") / over
    z_term = 0.3 * (logits.exp().sum(-1).log().square() * counts).sum() / over
    ours = with_z_loss(*case, normalizer=count, chunked=chunked, z_loss=0.3)
    for a, b in zip(ours, (entropy + z_term, entropy, z_term), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)
    assert not ours.cross_entropy.requires_grad
    assert not ours.z_loss.requires_grad
    mine = torch.autograd.grad(ours.minimized, (hidden, weight))
    theirs = torch.autograd.grad(entropy + z_term, (hidden, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-6)


def test_the_z_loss_of_logits_far_below_zero_has_a_gradient(case):
    """Covers a negative factor 1 + 2 z · log Σ exp logits."""
    hidden, weight, targets = case
    ones = torch.ones_like(weight, requires_grad=True)
    low = (-(hidden.detach().abs() + 1) * 100).requires_grad_()
    ours = with_z_loss(low, ones, targets, normalizer=None, chunked=True, z_loss=1e-2)
    whole = with_z_loss(low, ones, targets, normalizer=None, chunked=False, z_loss=1e-2)
    mine = torch.autograd.grad(ours.minimized, (low, ones))
    theirs = torch.autograd.grad(whole.minimized, (low, ones))
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_tied_embeddings_gradient_reuses_the_heads_tensor():
    """The lookup adds its rows to the head's gradient; no other V × D tensor is allocated."""
    model = Decoder(replace(preset("gemma3-tiny"), vocab_size=320))
    model.initialize(0)
    tokens = torch.randint(320, (2, 9))
    places = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == model.embedding.weight.shape:
                places.append(out.data_ptr())
            return out

    with Watch():
        model(tokens[:, :-1], tokens[:, 1:]).minimized.backward()
    assert set(places) == {model.embedding.weight.grad.data_ptr()}


@pytest.mark.parametrize("padding", [None, 3])
def test_a_tied_embeddings_gradient_sums_lookup_and_head(padding):
    """Their sum equals autograd's, without the padding token's lookup gradient."""
    config = replace(preset("gemma3-tiny"), vocab_size=64, pad_token_id=padding)
    tokens = torch.randint(5, (2, 12))  # some tokens repeat
    gradients = []
    for chunked in (True, False):
        model = Decoder(config, chunked_loss=chunked)
        model.initialize(0)
        for _ in range(2):  # gradients accumulate
            model(tokens[:, :-1], tokens[:, 1:]).minimized.backward()
        gradients.append(model.embedding.weight.grad)
    torch.testing.assert_close(*gradients)
