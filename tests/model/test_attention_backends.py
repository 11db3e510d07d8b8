"""Masks as drawn matrices; eager against a loop over queries, and other backends against eager."""

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain_cli.model import blocked_attention
from pretrain_cli.model.attention_backends import BACKENDS, Mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CPU = torch.device("cpu")
W, T = 8, 27
WINDOWS = [1, W - 1, W, W + 1, T - 1, T, T + 1, None]
LENGTHS = [1, W - 1, W, W + 1, 2 * W - 1, 2 * W, 2 * W + 1, T]
GROUPS = [1, 2, 4]
DOCUMENTS = {  # where documents start, in two rows
    "one": ((), ()),
    "one and two": ((), (T - 1,)),
    "at the blocks' borders": ((W, 2 * W, 3 * W), (2 * W,)),
    "beside the borders": ((W - 1, 2 * W + 1), (W + 1, 3 * W - 1)),
    "of one token": (range(1, T), (1, 2, W, W + 1, W + 2)),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # a bfloat16 has 8 bits: 2⁻⁸ is 4e-3


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Set blocks of five queries: lengths here are several blocks, the last one shorter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_attention, "QUERIES_PER_BLOCK", 5)
        yield


def made(queries, keys, *, group=2, dtype=torch.float32, head_dim=16, seed=0, device=CPU):
    """Return random q, k, v: 4 query heads, 4 / group key heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, queries, 4, head_dim, generator=generator)
    k, v = (torch.randn(2, keys, 4 // group, head_dim, generator=generator) for _ in "kv")
    return [x.to(device, dtype) for x in (q, k, v)]


def attend(name, q, k, v, window, scale=0.4, documents=None):
    backend = BACKENDS[name]
    mask = Mask(q.shape[1], k.shape[1], window, documents)
    return backend.attend(q, k, v, backend.lower(mask, q.device, q.dtype), scale)


def by_hand(q, k, v, window, scale=0.4, documents=None):
    """Attend one query and head at a time, over its visible keys only."""
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    for row, i, h in itertools.product(*map(range, q.shape[:3])):
        position = k.shape[1] - q.shape[1] + i
        first = 0 if window is None else max(0, position - window + 1)
        if documents is not None:
            numbers = documents[row].tolist()
            first = max(first, numbers.index(numbers[position]))
        keys = k[row, first : position + 1, h // group]
        values = v[row, first : position + 1, h // group]
        out[row, i, h] = torch.softmax(keys @ q[row, i, h] * scale, dim=0) @ values
    return out


def starting_at(*starts, length=T, device=CPU):
    """Return document numbers (B, T): each row's documents start at 0 and at these positions."""
    positions = torch.arange(length, device=device)
    return torch.stack([sum((positions >= s).long() for s in (0, *row)) for row in starts])


def drawn(matrix):
    return ["".join("█" if seen else "·" for seen in row) for row in matrix.tolist()]


def test_a_causal_mask_is_a_lower_triangle():
    assert drawn(Mask(4, 4, None).matrix(CPU)) == [
        "█···",
        "██··",
        "███·",
        "████",
    ]


def test_a_window_counts_the_query_itself():
    assert drawn(Mask(5, 5, 3).matrix(CPU)) == [
        "█····",
        "██···",
        "███··",
        "·███·",
        "··███",
    ]


def test_a_window_of_one_is_the_diagonal():
    assert drawn(Mask(3, 3, 1).matrix(CPU)) == [
        "█··",
        "·█·",
        "··█",
    ]


def test_queries_are_at_the_last_positions_of_the_keys():
    assert drawn(Mask(2, 5, None).matrix(CPU)) == [
        "████·",
        "█████",
    ]
    assert drawn(Mask(3, 5, 3).matrix(CPU)) == [
        "███··",
        "·███·",
        "··███",
    ]


def test_each_document_is_a_triangle():
    documents = torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 4, 5]])
    first, second = Mask(5, 5, None, documents).matrix(CPU)
    assert drawn(first) == [
        "█····",
        "██···",
        "··█··",
        "··██·",
        "··███",
    ]
    assert drawn(second) == [
        "█····",
        "·█···",
        "·██··",
        "·███·",
        "····█",
    ]


def test_a_window_slides_inside_each_document():
    (matrix,) = Mask(6, 6, 2, torch.tensor([[0, 0, 0, 1, 1, 1]])).matrix(CPU)
    assert drawn(matrix) == [
        "█·····",
        "██····",
        "·██···",
        "···█··",
        "···██·",
        "····██",
    ]


@pytest.mark.parametrize(
    ("window", "plain"), [(None, True), (6, True), (5, True), (4, False), (1, False)]
)
def test_a_window_no_shorter_than_the_keys_is_plain_causal(window, plain):
    assert Mask(5, 5, window).is_plain_causal is plain
    assert not Mask(5, 5, window, torch.zeros(1, 5)).is_plain_causal


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", WINDOWS)
def test_eager_is_a_softmax_over_the_keys_each_query_sees(window, group):
    q, k, v = made(T, T, group=group)
    torch.testing.assert_close(attend("eager", q, k, v, window), by_hand(q, k, v, window))


@pytest.mark.parametrize("window", [3, 20, None])
def test_eager_sees_the_keys_that_a_cache_adds(window):
    q, k, v = made(5, 12)
    torch.testing.assert_close(attend("eager", q, k, v, window), by_hand(q, k, v, window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "blocks"])
def test_backends_equal_eager(backend, window, group, dtype):
    q, k, v = made(T, T, group=group, dtype=dtype)
    with torch.no_grad():
        ours, expected = attend(backend, q, k, v, window), attend("eager", q, k, v, window)
    assert ours.dtype == dtype
    assert ours.shape == (2, T, 4, 16)
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [W - 1, W, W + 1])
@pytest.mark.parametrize("backend", ["sdpa", "flex", "blocks"])
def test_lengths_need_not_be_multiples_of_the_window(backend, window, length):
    q, k, v = made(length, length)
    with torch.no_grad():
        ours, expected = attend(backend, q, k, v, window), attend("eager", q, k, v, window)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 2, W - 1, W, W + 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "blocks"])
def test_fewer_queries_than_keys_are_at_the_last_positions(backend, window, queries):
    q, k, v = made(queries, T)
    with torch.no_grad():
        ours, expected = attend(backend, q, k, v, window), attend("eager", q, k, v, window)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("starts", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", [W - 1, W, T, None])
def test_eager_attends_only_to_keys_of_the_same_document(window, group, starts):
    q, k, v = made(T, T, group=group)
    documents = starting_at(*starts)
    ours = attend("eager", q, k, v, window, documents=documents)
    torch.testing.assert_close(ours, by_hand(q, k, v, window, documents=documents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("starts", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "blocks"])
def test_backends_equal_eager_inside_documents(backend, window, starts, dtype):
    q, k, v = made(T, T, dtype=dtype)
    documents = starting_at(*starts)
    with torch.no_grad():
        ours = attend(backend, q, k, v, window, documents=documents)
        expected = attend("eager", q, k, v, window, documents=documents)
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_of_one_document_equals_one_without_documents(backend, window):
    q, k, v = made(T, T)
    with torch.no_grad():
        ours = attend(backend, q, k, v, window, documents=starting_at((), ()))
        expected = attend(backend, q, k, v, window)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@pytest.mark.parametrize("window", [None, 600])
def test_documents_may_start_beyond_a_kernels_first_blocks_of_keys(backend, window, monkeypatch):
    """The last queries see no key of those blocks, in a fused kernel too."""
    monkeypatch.setattr(blocked_attention, "QUERIES_PER_BLOCK", 128)
    length = 1300
    q, k, v = made(length, length)
    documents = starting_at((1250,), (601, 1024), length=length)
    ours = attend(backend, q, k, v, window, documents=documents)
    expected = attend("eager", q, k, v, window, documents=documents)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@given(
    length=st.integers(1, 40),
    window=st.integers(1, 45),
    group=st.sampled_from(GROUPS),
    starts=st.tuples(*[st.sets(st.integers(1, 39))] * 2),
)
def test_backends_equal_eager_in_any_documents(backend, length, window, group, starts):
    q, k, v = made(length, length, group=group)
    documents = starting_at(*starts, length=length)
    ours = attend(backend, q, k, v, window, documents=documents)
    expected = attend("eager", q, k, v, window, documents=documents)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@given(length=st.integers(1, 40), window=st.integers(1, 45), group=st.sampled_from(GROUPS))
def test_backends_equal_eager_at_any_length_and_window(backend, length, window, group):
    q, k, v = made(length, length, group=group)
    ours, expected = attend(backend, q, k, v, window), attend("eager", q, k, v, window)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


def gradients(backend, tensors, window, documents=None):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = attend(backend, *leaves, window, documents=documents)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return torch.autograd.grad(out, leaves, pull)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [None, starting_at((W, 12), (3, 4, 5, 20))], ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_backends_have_the_gradients_of_eager(
    backend, window, group, documents, dtype, relative_error
):
    tensors = made(T, T, group=group, dtype=dtype)
    ours, expected = (gradients(name, tensors, window, documents) for name in (backend, "eager"))
    for mine, theirs in zip(ours, expected, strict=True):
        if theirs.norm() < 1e-4:  # with a window of 1, q and k have no effect
            assert mine.norm() < 1e-4
        else:
            assert relative_error(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex trains on CUDA; none is here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "starts", [None, ((128, 200), (1, 2, 64, 299))], ids=["whole", "documents"]
)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("window", [64, 100, 128, None])
def test_flex_and_sdpa_have_the_gradients_of_eager_on_a_gpu(
    window, group, starts, dtype, relative_error
):
    cuda = torch.device("cuda")
    tensors = made(300, 300, group=group, head_dim=64, device=cuda)
    documents = starting_at(*starts, length=300, device=cuda) if starts else None
    exact = gradients("eager", tensors, window, documents)
    tensors = [x.to(dtype) for x in tensors]
    bound = {torch.float32: 5e-3, torch.bfloat16: 3e-2}[dtype]  # tensor cores round to TF32
    for backend in ("flex", "sdpa"):
        ours = gradients(backend, tensors, window, documents)
        for mine, theirs in zip(ours, exact, strict=True):
            assert relative_error(mine, theirs) < bound


@pytest.mark.parametrize("window", [1, 3, 8, 9, None])
def test_sdpa_makes_no_square_matrix_for_a_whole_sequence(window):
    lowered = BACKENDS["sdpa"].lower(Mask(8, 8, window), CPU, torch.float32)
    assert not isinstance(lowered, torch.Tensor)


@pytest.mark.parametrize("starts", [None, ((100,), (7, 8))], ids=["whole", "documents"])
def test_sdpa_computes_at_most_twice_the_scores_of_the_window(monkeypatch, starts):
    """At most T · 2 · window scores are computed; a T × T mask would need T²."""
    documents = starting_at(*starts, length=256) if starts else None
    scores = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, **options):
        scores.append(q.shape[0] * q.shape[2] * k.shape[2])
        return fused(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q, k, v = made(256, 256)
    attend("sdpa", q, k, v, 8, documents=documents)
    assert sum(scores) <= q.shape[0] * 256 * 2 * 8


def test_a_single_query_after_a_cache_needs_no_mask():
    assert BACKENDS["sdpa"].lower(Mask(1, 8, 8), CPU, torch.float32) is False


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_affects_only_the_queries_of_its_window(backend):
    q, k, v = made(20, 20)
    with torch.no_grad():
        before = attend(backend, q, k, v, 5)
        v[:, 3] = 1e4
        after = attend(backend, q, k, v, 5)
    moved = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-3
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_multiplies_the_scores_once(backend):
    q, k, v = made(6, 6)
    with torch.no_grad():
        ours = attend(backend, q, k, v, None, scale=0.05)
    torch.testing.assert_close(ours, by_hand(q, k, v, None, scale=0.05))


class Sizes(TorchDispatchMode):
    """Record the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple) else (out,)
        self.noted.extend(x.numel() for x in tensors if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_with_a_window_no_tensor_grows_faster_than_the_length(backend):
    largest = {}
    for length in (1024, 4096):
        q, k, v = (x.requires_grad_() for x in made(length, length, group=4, head_dim=8))
        with Sizes() as sizes:
            attend(backend, q, k, v, 64).sum().backward()
        largest[length] = max(sizes.noted)
    assert largest[4096] <= 4.2 * largest[1024]
    assert largest[4096] < 4096 * 4096 / 8


@pytest.mark.slow
def test_a_folded_window_takes_at_most_a_quarter_of_full_attention():
    """Time forward and backward of 8192 positions, alternating a window of 512 and full attention.
    The best of up to 6 rounds counts, since other programs disturb the timing."""
    length, shares = 8192, []
    q, k, v = (x[:1].requires_grad_() for x in made(length, length, group=4, head_dim=64))
    backend = BACKENDS["sdpa"]
    masks = [backend.lower(Mask(length, length, window), CPU, q.dtype) for window in (512, None)]
    while len(shares) < 6 and min(shares, default=1) > 1 / 4:
        times = [time.perf_counter()]
        for mask in masks:
            backend.attend(q, k, v, mask, 0.125).sum().backward()
            times.append(time.perf_counter())
        shares.append((times[1] - times[0]) / (times[2] - times[1]))
    assert min(shares) <= 1 / 4


def test_flex_does_not_train_on_a_cpu_and_gives_the_reason():
    flex = BACKENDS["flex"]
    assert "no backward pass on a CPU" in (flex.unavailable(CPU, True) or "")
    assert flex.unavailable(CPU, False) is None
    assert flex.unavailable(torch.device("cuda"), True) is None
    assert "mps" in (flex.unavailable(torch.device("mps"), False) or "")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_eager_and_sdpa_are_available_on_every_device(backend):
    for device in ("cpu", "cuda", "mps"):
        assert BACKENDS[backend].unavailable(torch.device(device), True) is None
