"""Eager against a loop over queries, and other backends against eager."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain_cli.model.attention_backends import blocks, flex
from pretrain_cli.model.attention_backends.backends import BACKENDS, best_backend
from tests.model.attention_backends.cases import (
    ON_A_CPU,
    Sizes,
    T,
    W,
    attend,
    by_hand,
    conditions,
    gradients,
    made,
    starting_at,
)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

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
        patch.setattr(blocks, "QUERIES_PER_BLOCK", 5)
        yield


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


@pytest.mark.parametrize("backend", ON_A_CPU)
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
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", 128)
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


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_a_key_affects_only_the_queries_of_its_window(backend):
    q, k, v = made(20, 20)
    with torch.no_grad():
        before = attend(backend, q, k, v, 5)
        v[:, 3] = 1e4
        after = attend(backend, q, k, v, 5)
    moved = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-3
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("backend", ON_A_CPU)
def test_the_scale_multiplies_the_scores_once(backend):
    q, k, v = made(6, 6)
    with torch.no_grad():
        ours = attend(backend, q, k, v, None, scale=0.05)
    torch.testing.assert_close(ours, by_hand(q, k, v, None, scale=0.05))


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


@pytest.fixture
def hopper(monkeypatch):
    """An H100 with Triton, as far as the choice of a backend asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flex, "no_triton", lambda: "")


def test_flex_does_not_train_on_a_cpu_and_gives_the_reason(hopper):
    refusal = BACKENDS["flex"].unavailable
    assert "no backward pass on a CPU" in (refusal(conditions("cpu")) or "")
    assert refusal(conditions("cpu", training=False)) is None
    assert refusal(conditions("cuda")) is None
    assert "mps" in (refusal(conditions("mps", training=False)) or "")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_eager_and_sdpa_are_available_on_every_device(backend):
    for device in ("cpu", "cuda", "mps"):
        assert BACKENDS[backend].unavailable(conditions(device)) is None


def test_varlen_is_refused_with_the_reason(hopper, monkeypatch):
    refusal = BACKENDS["varlen"].unavailable
    assert refusal(conditions()) is None
    assert refusal(conditions("cpu")) == "PyTorch's varlen_attn has no kernel for cpu"
    assert "bfloat16" in (refusal(conditions(dtype=torch.float32)) or "")
    assert "head_dim of 320" in (refusal(conditions(head_dim=320)) or "")
    assert "head_dim of 100" in (refusal(conditions(head_dim=100)) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in (refusal(conditions()) or "")


@pytest.mark.parametrize(
    ("here", "chosen", "because"),
    [
        (conditions("cpu"), "blocks", "on a CPU the fastest"),
        (conditions("mps"), "sdpa", "PyTorch's fused kernels"),
        (conditions(), "varlen", "FlashAttention's kernels, which skip"),
        (conditions(masked=False), "varlen", "FlashAttention's kernels, which skip"),
        (conditions(dtype=torch.float32), "flex", "not varlen: FlashAttention's kernels compute"),
        (conditions(dtype=torch.float32, masked=False), "sdpa", "not varlen: FlashAttention's"),
        (conditions(head_dim=320), "flex", "not varlen: FlashAttention has no kernel"),
    ],
    ids=str,
)
def test_auto_takes_the_best_backend_and_says_why_not_another(hopper, here, chosen, because):
    backend, reason = best_backend(here)
    assert backend == chosen
    assert because in reason


def test_auto_takes_sdpa_where_neither_varlen_nor_flex_can_run(hopper, monkeypatch):
    monkeypatch.setattr(flex, "no_triton", lambda: "Triton is not installed")
    backend, reason = best_backend(conditions(dtype=torch.float32))
    assert backend == "sdpa"
    assert "not varlen: " in reason
    assert "not flex: PyTorch's flex_attention is compiled, and Triton is not installed" in reason
