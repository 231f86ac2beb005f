"""`functional.matmul_int8` in every mode of autograd, autocast and compilation, and what it refuses."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from qbits import errors, ops
from qbits.functional import matmul_int8
from torch.utils.checkpoint import checkpoint

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
THRESHOLDS = [0.0, 2.5]
KINDS = ["frozen", "training"]


def operands_of(kind: str, N: int, K: int, device: str, **options: Any) -> tuple[Any, Any]:
    """Weight and scales: codes that are frozen, or a float weight that trains."""
    weight = torch.randn(N, K, device=device, **options)
    return ops.quantize_rowwise(weight) if kind == "frozen" else (weight.requires_grad_(), None)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("grad_weight", ["int8", "16bit"])
def test_only_the_gradients_that_are_needed_are_made_and_saved_for(needs, threshold, grad_weight, device):
    """What is saved depends on flags alone: weight, input, and a mask for an int8 grad_weight."""
    x = torch.randn(3, 64, device=device, requires_grad=needs[0])
    weight = torch.randn(8, 64, device=device, requires_grad=needs[1])
    bias = torch.randn(8, device=device, requires_grad=needs[2])
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = matmul_int8(x, weight, None, bias, threshold=threshold, grad_weight=grad_weight)
    assert y.requires_grad == any(needs)
    mask = [(64,)] if needs[1] and threshold and grad_weight == "int8" else []
    assert sorted(saved) == sorted([(3, 64)] * needs[1] + [(8, 64)] * needs[0] + mask)
    if any(needs):
        y.sum().backward()
    assert [t.grad is not None for t in (x, weight, bias)] == list(needs)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_frozen_weight_saves_nothing_of_the_input(needs, threshold, device):
    codes, scales = operands_of("frozen", 8, 64, device)
    x = torch.randn(3, 64, device=device, requires_grad=needs[0])
    bias = torch.randn(8, device=device, requires_grad=needs[1])
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = matmul_int8(x, codes, scales, bias, threshold=threshold)
    assert saved == ([(8, 64), (8,)] if needs[0] else [])
    if any(needs):
        y.sum().backward()
    assert [t.grad is not None for t in (x, bias)] == list(needs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_gradients_have_the_dtype_of_their_tensor(dtype, bias_dtype, device):
    """[D22] 2049 ones: a bfloat16 sum would stop at 256, a float16 one at 2048."""
    x = torch.zeros(2049, 4, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(4, device=device, dtype=bias_dtype, requires_grad=True)
    matmul_int8(x, weight, None, bias).backward(torch.ones(2049, 4, device=device, dtype=dtype))
    assert [t.grad.dtype for t in (x, weight, bias)] == [dtype, torch.bfloat16, bias_dtype]
    assert torch.equal(bias.grad, torch.full((4,), 2049.0, device=device).to(bias_dtype))


def test_forward_and_backward_change_no_argument(device):
    """[D12, D32] Inputs, weights and gradients keep bytes and version counters, not even for a moment."""
    for kind, threshold in itertools.product(KINDS, THRESHOLDS):
        x = torch.randn(3, 64, device=device, requires_grad=True)
        weight, scales = operands_of(kind, 8, 64, device)
        tensors = [x, weight, *([] if scales is None else [scales]), grad := torch.randn(3, 8, device=device)]
        before = [(t.detach().clone(), t._version) for t in tensors]
        matmul_int8(x, weight, scales, threshold=threshold).backward(grad)
        assert all(torch.equal(t, b) and t._version == v for t, (b, v) in zip(tensors, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_a_saved_tensor_is_noticed(kind, device):
    """[D1, D14] Tensors are saved through autograd, which counts versions."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight, scales = operands_of(kind, 8, 64, device)
    y = matmul_int8(x, weight, scales)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_retained_graph_gives_the_same_gradients_twice(kind, threshold, device):
    x = torch.randn(5, 64, device=device, requires_grad=True)
    weight, scales = operands_of(kind, 8, 64, device)
    leaves = (x,) if kind == "frozen" else (x, weight)
    y = matmul_int8(x, weight, scales, threshold=threshold).square().sum()
    first = torch.autograd.grad(y, leaves, retain_graph=True)
    second = torch.autograd.grad(y, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_is_refused(kind, device):
    """Quantizers are straight-through: their second derivative would be a wrong number."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    grad = torch.randn(3, 8, device=device, requires_grad=True)
    y = matmul_int8(x, *operands_of(kind, 8, 64, device))
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_and_inference_record_nothing(kind, device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight, scales = operands_of(kind, 8, 64, device)
    want = matmul_int8(x, weight, scales, threshold=2.5).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = matmul_int8(x, weight, scales, threshold=2.5)
        assert not got.requires_grad and torch.equal(got, want)


def test_inference_tensors_are_legal_everywhere(device):
    with torch.inference_mode():
        codes, scales = operands_of("frozen", 8, 64, device)
        weight, x = torch.randn(8, 64, device=device), torch.randn(3, 64, device=device)
    trained = x.clone().requires_grad_()
    for operands in ((codes, scales), (weight, None)):
        matmul_int8(trained, *operands, threshold=2.5).sum().backward()
    float_weight = weight.clone().requires_grad_()
    matmul_int8(x, float_weight).sum().backward()
    assert bool(trained.grad.any()) and bool(float_weight.grad.any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_input_and_output(kind, autocast_dtype, device):
    """The weight is quantized from its own dtype, and the backward keeps the forward's state."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight, scales = operands_of(kind, 8, 64, device)
    bias = torch.randn(8, device=device, requires_grad=True)
    leaves = (x, bias) if kind == "frozen" else (x, bias, weight)
    with torch.autocast(device, dtype=autocast_dtype):
        y = matmul_int8(x, weight, scales, bias, threshold=2.5)
    narrow = x.detach().to(autocast_dtype).requires_grad_()
    want = matmul_int8(narrow, weight, scales, bias, threshold=2.5)
    assert y.dtype == autocast_dtype and torch.equal(y, want)
    got = torch.autograd.grad(y.float().sum(), leaves)
    due = torch.autograd.grad(want.float().sum(), (narrow, *leaves[1:]))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, due, strict=True))
    assert all(g.dtype == leaf.dtype for g, leaf in zip(got, leaves, strict=True))
    # the reverse: a float32 forward whose backward runs inside an autocast
    plain = torch.autograd.grad(matmul_int8(x, weight, scales, threshold=2.5).sum(), x)[0]
    z = matmul_int8(x, weight, scales, threshold=2.5).sum()
    with torch.autocast(device, dtype=autocast_dtype):
        assert torch.equal(torch.autograd.grad(z, x)[0], plain)
    with torch.autocast(device, dtype=autocast_dtype), torch.autocast(device, enabled=False):
        assert matmul_int8(x, weight, scales).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(kind, use_reentrant, device):
    first, second = (operands_of(kind, 64, 64, device) for _ in range(2))
    leaves = [weight for weight, scales in (first, second) if scales is None]

    def block(x: torch.Tensor) -> torch.Tensor:
        return matmul_int8(torch.relu(matmul_int8(x, *first, threshold=2.5)), *second, threshold=2.5)

    x = torch.randn(3, 64, device=device, requires_grad=True)
    plain = torch.autograd.grad(block(x).sum(), (x, *leaves))
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(t.grad, want) for t, want in zip((x, *leaves), plain, strict=True))


def test_calls_share_no_state(device):
    """[D11, D13] One weight twice in a graph, changed between two graphs, and in two threads."""
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    inputs = [torch.randn(n, 64, device=device, requires_grad=True) for n in (1, 7)]
    alone = [torch.autograd.grad(matmul_int8(t, weight, threshold=2.5).sum(), (t, weight)) for t in inputs]
    together = torch.autograd.grad(sum(matmul_int8(t, weight, threshold=2.5).sum() for t in inputs), weight)[
        0
    ]
    torch.testing.assert_close(together, alone[0][1] + alone[1][1], rtol=1e-6, atol=1e-5)
    found: dict[int, Any] = {}

    def train(i: int) -> None:
        for _ in range(20):
            found[i] = torch.autograd.grad(
                matmul_int8(inputs[i], weight, threshold=2.5).sum(), (inputs[i], weight)
            )

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(found[i], alone[i], strict=True))
    with torch.no_grad():
        weight.mul_(2)  # a step of an optimizer while gradients are kept: nothing of before is used again
    fresh = weight.detach().clone().requires_grad_()
    for leaf in (weight, fresh):
        matmul_int8(inputs[1], leaf, threshold=2.5).sum().backward()
    assert torch.equal(weight.grad, fresh.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_forward_and_backward_equal_eager_bit_for_bit(kind, threshold, dynamic, device):
    weight, scales = operands_of(kind, 48, 64, device)
    bias = torch.randn(48, device=device, requires_grad=True)
    leaves = (bias,) if kind == "frozen" else (bias, weight)

    def call(x: torch.Tensor) -> torch.Tensor:
        return matmul_int8(x, weight, scales, bias, threshold=threshold)

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3) if dynamic else (3,):
        x = torch.randn(2, n, 64, device=device, requires_grad=True)
        got, want = compiled(x), call(x)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), (x, *leaves)) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(x), want)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors_give_shapes_and_dtypes(kind):
    x = torch.empty(2, 3, 64, device="meta", dtype=torch.bfloat16)
    weight = torch.empty(8, 64, device="meta", dtype=torch.int8 if kind == "frozen" else torch.float32)
    scales = torch.empty(8, device="meta") if kind == "frozen" else None
    for threshold in THRESHOLDS:
        y = matmul_int8(x, weight, scales, threshold=threshold)
        assert y.is_meta and (y.shape, y.dtype) == ((2, 3, 8), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_outliers_is_captured_in_a_cuda_graph(kind):
    """[D35] No host synchronization."""
    weight, scales = operands_of(kind, 128, 256, "cuda")
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        matmul_int8(x, weight, scales, threshold=2.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = matmul_int8(x, weight, scales, threshold=2.5)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, matmul_int8(x, weight, scales, threshold=2.5))


def refusals(device: str) -> dict[str, tuple[Any, type[Exception], str]]:
    """Calls that break one rule each, with class and what the message says after the op's name."""
    codes, scales = operands_of("frozen", 8, 64, device)
    x, weight = torch.randn(3, 64, device=device), torch.randn(8, 64, device=device)
    shape, value = errors.ShapeError, errors.ArgumentValueError
    threshold, short = "threshold must be a number >= 0, got", torch.zeros(7, device=device)
    grads = "grad_weight must be one of ['int8', '16bit'], got 'fp8'"
    missing = "weight_scales must be given for an int8 weight, got None"
    needless = "weight_scales must be None for a torch.float32 weight, got a tensor"
    return {
        "K": (
            lambda: matmul_int8(x[:, :63], codes, scales),
            shape,
            "input must have shape [*, 64], got [3, 63]",
        ),
        "rank 0": (lambda: matmul_int8(x[0, 0], weight), shape, "input must have shape [*, 64], got []"),
        "rank": (lambda: matmul_int8(x, weight[0]), shape, "weight must have 2 dimensions, got shape [64]"),
        "no scales": (lambda: matmul_int8(x, codes), errors.NotQuantizedError, missing),
        "needless scales": (lambda: matmul_int8(x, weight, scales), value, needless),
        "threshold": (lambda: matmul_int8(x, weight, threshold=-1.0), value, f"{threshold} -1.0"),
        "nan": (lambda: matmul_int8(x, weight, threshold=float("nan")), value, f"{threshold} nan"),
        "grad_weight": (lambda: matmul_int8(x, weight, grad_weight="fp8"), value, grads),
        "type": (
            lambda: matmul_int8(x, [1.0]),
            errors.ArgumentTypeError,
            "weight must be a torch.Tensor, got list",
        ),
        "dtype": (
            lambda: matmul_int8(x.double(), codes, scales),
            errors.DtypeError,
            "input must have dtype float32, float16 or bfloat16, got float64",
        ),
        "scales": (
            lambda: matmul_int8(x, codes, scales[:7]),
            shape,
            "weight_scales must have N = 8 elements, got 7",
        ),
        "bias": (
            lambda: matmul_int8(x, codes, scales, short),
            shape,
            "bias must have shape [N] = [8], got [7]",
        ),
    }


# what the ops check themselves is told in their names
OWNERS = {"dtype": "quantize_rowwise", "scales": "gemm_int8", "bias": "gemm_int8"}


@pytest.mark.parametrize("case", refusals("cpu"))
def test_a_bad_argument_is_refused(case, device):
    call, error, message = refusals(device)[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == f"qbits::{OWNERS.get(case, 'matmul_int8')}: {message}"
