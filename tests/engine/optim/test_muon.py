"""Muon on merged and stacked parameters against torch.optim.Muon on each separate matrix."""

import pytest
import torch

from pretrain_cli.config.build import build_config
from pretrain_cli.engine.optim import muon as muon_module
from pretrain_cli.engine.optim.muon import Block, Muon, in_chunks, orthogonalize
from pretrain_cli.engine.optim.optimizer import build_optimizer, set_rates
from pretrain_cli.engine.optim.schedule import StepRates
from pretrain_cli.errors import ConfigError
from tests.engine.jobs import recipe_of

MODELS = ["gemma3-tiny", "qwen3-tiny", "qwen3-30b-a3b"]


def is_hidden(name, tensor):
    return tensor.ndim == 2 and "embed" not in name and "lm_head" not in name


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize("model", MODELS)
def test_each_published_matrix_gets_the_step_of_torchs_muon(
    tiny_model, published, give_gradients, model, merged
):
    model = tiny_model(model, merged=merged)
    apart = {n: t.clone().requires_grad_() for n, t in published(model).items()}
    hidden = [t for name, t in apart.items() if is_hidden(name, t)]
    muon = torch.optim.Muon(
        hidden, lr=0.02, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"
    )
    others = {
        decay: [t for n, t in apart.items() if not is_hidden(n, t) and (t.ndim == 2) == decay]
        for decay in (True, False)
    }
    adamw = torch.optim.AdamW(
        [{"params": others[True], "weight_decay": 0.3}, {"params": others[False]}],
        lr=0.02, betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    recipe = recipe_of(model, name="muon", momentum=0.9, weight_decay=0.3)
    optimizer = build_optimizer(model, recipe, fused=True, dtype=torch.bfloat16)
    for step in range(4):
        give_gradients(model, step)
        for name, gradient in published(model, "grad").items():
            apart[name].grad = gradient
        muon.step()
        adamw.step()
        set_rates(optimizer, StepRates(0.02))
        optimizer.step()
    # The iteration is in bfloat16, and products of stacked matrices may round differently.
    for name, tensor in published(model).items():
        torch.testing.assert_close(tensor, apart[name].detach(), rtol=1e-4, atol=4e-4)


def test_muon_orthogonalizes_a_matrix_and_keeps_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((24, 40), (40, 24), (16, 16)):
        stack = torch.randn(3, rows, columns, generator=generator)
        for matrix, found in zip(stack, orthogonalize(stack.bfloat16()).float(), strict=True):
            u, _, v = torch.linalg.svd(matrix, full_matrices=False)
            inner = u.T @ found @ v.T  # diagonal if the singular vectors are equal
            singular = inner.diagonal()
            assert singular.min() > 0.5
            assert singular.max() < 1.3
            assert (inner - singular.diag()).abs().max() < 0.05


def plain_steps(weight, gradients, *, scale_rows, beta2, cautious, momentum, rate, decay):
    """Muon's refinements on one matrix, written out with a singular value decomposition."""
    buffer, squares = torch.zeros_like(weight), torch.zeros(len(weight), 1).double()
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer
        if scale_rows:
            update = update / update.norm(dim=1, keepdim=True)
        u, _, v = torch.linalg.svd(update, full_matrices=False)
        step = u @ v
        if beta2:
            squares = beta2 * squares + (1 - beta2) * step.square().mean(1, keepdim=True)
            step = step / squares.sqrt()
            step = step / step.norm() * min(step.shape) ** 0.5
        shrinks = (step * weight > 0).double() if cautious else torch.ones_like(weight)
        weight = weight - rate * decay * shrinks * weight
        weight = weight - rate * 0.2 * max(weight.shape) ** 0.5 * step
    return weight


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("scale_rows", [False, True])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
@pytest.mark.parametrize("cautious", [False, True])
def test_refinements_equal_their_definitions(monkeypatch, shape, scale_rows, beta2, cautious):
    def exactly(stack, iterations):
        u, _, v = torch.linalg.svd(stack, full_matrices=False)
        return u @ v

    monkeypatch.setattr(muon_module, "orthogonalize", exactly)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    parameter = torch.nn.Parameter(weight.clone())
    muon = Muon(
        [{"params": [parameter], "blocks": [[slice(None)]], "lr": 0.05}],
        momentum=0.9, weight_decay=0.3,
        scale_rows=scale_rows, beta2=beta2, cautious=cautious, dtype=torch.float32,
    )  # fmt: skip
    muon.state[parameter] = {
        "momentum_buffer": torch.zeros_like(parameter),
        "row_squares": torch.zeros(shape[0], 1),
    }
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
    expected = plain_steps(
        weight.double(), [g.double() for g in gradients], scale_rows=scale_rows, beta2=beta2,
        cautious=cautious, momentum=0.9, rate=0.05, decay=0.3,
    )  # fmt: skip
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_a_muon_step_is_about_as_large_as_an_adamw_step(tiny_model, give_gradients):
    model = tiny_model("qwen3-tiny", hidden_size=64, intermediate_size=128)
    before = [p.detach().clone() for p in model.blocks.parameters()]
    optimizer = build_optimizer(model, recipe_of(model, name="muon", weight_decay=0.0), fused=True)
    give_gradients(model, 1)
    set_rates(optimizer, StepRates(0.01))
    optimizer.step()
    for old, new in zip(before, model.blocks.parameters(), strict=True):
        if old.ndim == 2:
            size = (new - old).square().mean().sqrt().item() / 0.01
            assert 0.1 < size < 0.25


@pytest.mark.parametrize("model", MODELS)
def test_a_muon_step_with_found_inf_changes_nothing(tiny_model, give_gradients, model):
    model = tiny_model(model)
    optimizer = build_optimizer(model, recipe_of(model, name="muon"), fused=True)

    def step(found_inf, seed):
        give_gradients(model, seed)
        if found_inf:
            for parameter in model.parameters():
                parameter.grad.view(-1)[0] = float("nan")
        set_rates(optimizer, StepRates(0.01))
        optimizer.found_inf = torch.tensor(float(found_inf))
        optimizer.step()
        return [
            t.clone()
            for p in model.parameters()
            for t in (p.detach(), *map(torch.as_tensor, optimizer.state[p].values()))
        ]

    first, second = step(False, 1), step(True, 2)
    third = step(False, 3)
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, second, third))


@pytest.mark.parametrize("elements", [1, 2 * 24 * 40, 10**9], ids=["one", "two", "all"])
@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0], ids=["plain", "taken", "skipped"])
def test_chunks_of_any_size_take_the_step_of_single_blocks(elements, found_inf):
    shapes = {
        (24, 40): [slice(None)],  # wide
        (40, 24): [slice(None)],  # tall
        (72, 40): [slice(0, 24), slice(24, 48), slice(48, 72)],  # merged rows
        (3, 48, 40): [slice(0, 24), slice(24, 48)],  # merged rows of stacked experts
        (5, 40, 24): [slice(None)],
    }

    def stepped(chunk_elements):
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator))
            for shape in shapes
            for _ in range(2)
        ]
        blocks = [rows for rows in shapes.values() for _ in range(2)]
        muon = Muon(
            [{"params": parameters, "blocks": blocks, "lr": 0.05}],
            momentum=0.9, weight_decay=0.3, chunk_elements=chunk_elements,
        )  # fmt: skip
        for parameter in parameters:
            muon.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            muon.step()
            muon.found_inf = None if found_inf is None else torch.tensor(found_inf)
        return [t.detach() for p in parameters for t in (p, muon.state[p]["momentum_buffer"])]

    for found, expected in zip(stepped(elements), stepped(None), strict=True):
        # a product of more matrices may round differently in bfloat16
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_chunks_hold_one_shape_and_stay_within_their_elements():
    def block(matrices, rows, columns):
        return Block(*(torch.zeros(matrices, rows, columns) for _ in range(3)))

    blocks = [block(1, 2, 3), block(1, 3, 2), block(1, 2, 3), block(5, 2, 3), block(1, 4, 5)]
    chunks = [[tuple(part.weight.shape) for part in chunk] for chunk in in_chunks(blocks, 13)]
    assert chunks == [
        [(1, 2, 3), (1, 2, 3)], [(2, 2, 3)], [(2, 2, 3)], [(1, 2, 3)], [(1, 3, 2)],
        [(1, 4, 5)],  # larger than a chunk
    ]  # fmt: skip
    assert [len(chunk) for chunk in in_chunks(blocks, None)] == [1] * 5


def test_a_block_fills_the_chunk_that_another_one_began():
    stacks = [Block(*[torch.zeros(3, 2, 3)] * 3) for _ in range(2)]
    chunks = [[len(part.weight) for part in chunk] for chunk in in_chunks(stacks, 12)]
    assert chunks == [[2], [1, 1], [2]]


def test_chunks_share_memory_with_their_parameters():
    weight = torch.zeros(6, 2, 3)
    for chunk in in_chunks([Block(*[weight[:, :1]] * 3)], 9):
        for part in chunk:
            part.weight.add_(1)
    assert weight[:, 0].eq(1).all()
    assert weight[:, 1].eq(0).all()


def test_muon_is_refused_with_fsdp(settings, run):
    with pytest.raises(ConfigError, match=r"optimizer.name: 'muon' makes whole matrices"):
        run(settings(optimizer__name="muon", train__parallel="fsdp"))


def test_momentum_is_refused_without_muon():
    with pytest.raises(ConfigError, match=r"optimizer.momentum: 0.9 has no meaning with .*'adamw'"):
        build_config({}, {"optimizer.name": "adamw", "optimizer.momentum": 0.9}, [])
