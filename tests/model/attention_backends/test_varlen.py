"""The lowering of `varlen` against eager, through the kernel's contract in plain PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.model.attention_backends import varlen
from pretrain_cli.model.attention_backends.backends import BACKENDS
from pretrain_cli.model.attention_backends.mask import Documents, Mask
from tests.model.attention_backends.cases import (
    CPU,
    T,
    W,
    attend,
    gradients,
    made,
    starting_at,
)


def reference(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, **options):
    """Compute what PyTorch documents for varlen_attn, one sequence and head at a time.

    q (tokens, H, Dh), k and v (tokens, Hkv, Dh); sequence i has the tokens from starts[i] to
    starts[i + 1]. A query sees window_size[0] keys before its own and window_size[1] after it; −1
    is no limit.
    """
    assert starts.dtype == key_starts.dtype == torch.int32
    assert starts[0] == 0
    assert starts[-1] == len(q)
    assert options.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
    left, right = window_size
    group, out = q.shape[1] // k.shape[1], []
    for first, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert 0 <= end - first <= longest
        distance = torch.arange(end - first).unsqueeze(1) - torch.arange(end - first)
        seen = (distance >= -right if right >= 0 else distance == distance) & (
            distance <= left if left >= 0 else distance == distance
        )
        heads = []
        for head in range(q.shape[1]):
            query, key, value = q[first:end, head], k[first:end, head // group], v[first:end]
            scores = (query @ key.T).float() * scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
            heads.append(weights @ value[:, head // group])
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Replace the kernel, which only GPUs have; return the calls of it."""
    calls = []

    def called(*arguments, **options):
        calls.append((arguments, options))
        return reference(*arguments, **options)

    monkeypatch.setattr(varlen, "varlen_attn", called)
    monkeypatch.setattr(varlen, "OPTIONS", {"enable_gqa": None, "num_splits": None})
    return calls


def equal_eager(q, k, v, window, documents=None):
    ours, expected = (attend(name, q, k, v, window, documents=documents) for name in BOTH)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


BOTH = ("varlen", "eager")


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, T])
@pytest.mark.parametrize("window", [1, W - 1, W, W + 1, T - 1, T, T + 1, None])
def test_windows_see_the_keys_that_eager_sees(window, length, group, kernel):
    equal_eager(*made(length, length, group=group), window)
    assert bool(kernel) == (window is not None and window < length)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("starts", [((), ()), ((), (T - 1,)), ((W, 12), (3, 4, 5, 20))], ids=str)
@pytest.mark.parametrize("window", [1, W - 1, W, W + 1, T, None])
def test_documents_see_the_keys_that_eager_sees(window, starts, group, kernel):
    equal_eager(*made(T, T, group=group), window, starting_at(*starts))
    assert kernel


@given(
    length=st.integers(1, 40),
    window=st.integers(1, 45) | st.none(),
    starts=st.tuples(*[st.sets(st.integers(1, 39))] * 2),
)
def test_any_documents_and_windows_equal_eager(length, window, starts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", reference)
        equal_eager(*made(length, length), window, starting_at(*starts, length=length))


@pytest.mark.parametrize("documents", [None, starting_at((W, 12), (3, 4, 5, 20))], ids=str)
@pytest.mark.parametrize("window", [W, None])
def test_gradients_equal_those_of_eager(window, documents, relative_error):
    ours, expected = (gradients(name, made(T, T), window, documents) for name in BOTH)
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative_error(mine, theirs) < 2e-6


@pytest.mark.parametrize("window", [3, 20, None])
def test_fewer_queries_than_keys_take_no_varlen_kernel(window, kernel):
    equal_eager(*made(5, 12), window)
    assert not kernel


def test_keys_are_repeated_where_the_kernel_has_no_grouped_heads(monkeypatch):
    """PyTorch 2.11 has none."""
    monkeypatch.setattr(varlen, "OPTIONS", {})
    equal_eager(*made(T, T, group=4), W)


def test_the_number_of_documents_is_padded_to_one_shape():
    few, many = (
        varlen.starts_of(Documents(starting_at(tuple(range(1, count)), ()))) for count in (2, T)
    )
    assert few.shape == many.shape == (varlen.CAPACITY + 1,)
    assert few[:5].tolist() == [0, 1, T, 2 * T, 2 * T]


@pytest.mark.parametrize("starts", [((), ()), ((3,), (1, 2, 20))], ids=str)
def test_known_counts_give_the_same_starts(starts):
    numbers = starting_at(*starts)
    counts = tuple(len(row) + 1 for row in starts)
    known = varlen.starts_of(Documents(numbers, counts))
    assert known.tolist() == varlen.starts_of(Documents(numbers)).tolist()
    one = Documents(numbers, counts)[1:2]
    assert one.count == counts[1]
    assert varlen.starts_of(one)[: counts[1] + 1].tolist() == [0, *starts[1], T]


def test_a_mask_of_another_batch_is_refused():
    q, k, v = made(T, T)
    lowered = BACKENDS["varlen"].lower(Mask(T, T, W, rows=3), CPU, q.dtype)
    with pytest.raises(AssertionError, match="another number of rows"):
        BACKENDS["varlen"].attend(q, k, v, lowered, 0.1)
