"""Gradients of the 4-bit linear: values, what is saved, and every mode of autograd around it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from qbits import functional
from qbits.functional import linear_4bit, quantize_4bit
from torch.utils.checkpoint import checkpoint

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 1, 2, 64)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_gradients_are_those_of_the_decoded_weight(dtype, shape, double_quant, device):
    """[D4] grad_input = G @ W and grad_bias = sum G, for any rank, against float64."""
    q = quantize_4bit(torch.randn(33, 64, device=device), double_quant=double_quant)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(33, device=device, dtype=dtype, requires_grad=True)
    y = linear_4bit(x, q, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    weight = functional.dequantize_4bit(q, dtype=dtype)
    rows = grad.reshape(-1, 33)
    want = {"input": rows.double() @ weight.double(), "bias": rows.double().sum(0)}
    torch_own = {"input": rows @ weight, "bias": rows.float().sum(0).to(dtype)}
    for name, leaf in (("input", x), ("bias", bias)):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)
        own_error = (torch_own[name].double() - want[name]).abs().max()
        error = (leaf.grad.double().reshape(want[name].shape) - want[name]).abs().max()
        assert error <= 2 * own_error + want[name].abs().max() * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_gradients_have_the_dtype_of_their_tensor(dtype, bias_dtype, device):
    """[D22]"""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(8, device=device, dtype=bias_dtype, requires_grad=True)
    linear_4bit(x, q, bias).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, bias_dtype)


@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_bias_gradient_accumulates_in_float32(bias_dtype, device):
    """[D22] 2049 ones: a bfloat16 sum would stop at 256, a float16 one at 2048."""
    q = quantize_4bit(torch.randn(4, 64, device=device))
    bias = torch.zeros(4, device=device, dtype=bias_dtype, requires_grad=True)
    linear_4bit(torch.zeros(2049, 64, device=device, dtype=torch.bfloat16), q, bias).sum().backward()
    assert bias.grad.tolist() == [torch.tensor(2049.0).to(bias_dtype).item()] * 4


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("needs_bias", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_only_what_is_needed_is_recorded_and_saved(needs_x, needs_bias, has_bias, device):
    """[D1, D14] Saved are the packed weight and its statistics, never the input, through torch's hooks."""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=needs_x)
    bias = torch.randn(8, device=device, requires_grad=needs_bias) if has_bias else None
    saved: list[tuple[int, torch.dtype]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tensor.numel(), tensor.dtype))
        return tensor.clone()  # what the hook gives back is what backward uses

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = linear_4bit(x, q, bias)
    recorded = needs_x or (has_bias and needs_bias)
    assert y.requires_grad == recorded and (y.grad_fn is not None) == recorded
    assert saved == ([(256, torch.uint8), (8, torch.float32)] if needs_x else [])
    if recorded:
        y.sum().backward()
        assert (x.grad is not None) == needs_x
        assert bias is None or (bias.grad is not None) == needs_bias
        tensors = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
        assert not tensors


def test_no_grad_makes_no_node(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert linear_4bit(x, q).grad_fn is None


def test_second_backward_is_supported(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    weight = functional.dequantize_4bit(q)
    grads = []
    for y in (linear_4bit(x, q, bias), torch.nn.functional.linear(x, weight, bias)):
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.pow(2).sum(), (x, bias)))
    for got, want in zip(*grads, strict=True):
        # two chained float32 products of 64 and 8 terms
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_backward_twice_gives_the_same_bits(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    y = linear_4bit(x, q)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


def test_a_weight_that_is_changed_before_backward_is_noticed(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    y = linear_4bit(x, q)
    q.packed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_written_by_the_op_is_noticed(device):
    """``out=`` of an op advances the version counter, so that a saved tensor cannot change in silence."""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weights = torch.randn(3, 8, device=device)
    y = (linear_4bit(x, q) * weights).sum()
    linear_4bit(x.detach(), q, out=weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_expanded_gradient_is_read_by_logical_index(device):
    """[D15] The gradient of sum() has stride 0."""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    bias = torch.zeros(8, device=device, requires_grad=True)
    linear_4bit(x, q, bias).sum().backward()
    ones = torch.autograd.grad(linear_4bit(x, q, bias), (x, bias), torch.ones(2, 3, 8, device=device))
    assert torch.equal(x.grad, ones[0]) and torch.equal(bias.grad, ones[1])
    assert bias.grad.tolist() == [6.0] * 8


@pytest.mark.parametrize("M, N, K", [(0, 8, 64), (3, 0, 64), (3, 8, 0)])
def test_gradients_of_empty_operands(M, N, K, device):
    """[D2] Zeros of the inputs' shapes; with K = 0 the bias still gets the sum."""
    q = quantize_4bit(torch.randn(N, K, device=device))
    x = torch.randn(M, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    linear_4bit(x, q, bias).sum().backward()
    assert torch.equal(x.grad, torch.zeros(M, K, device=device))
    assert torch.equal(bias.grad, torch.full((N,), float(M), device=device))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant, device):
    first, second = (quantize_4bit(torch.randn(64, 64, device=device)) for _ in range(2))
    bias = torch.randn(64, device=device, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return linear_4bit(torch.relu(linear_4bit(x, first, bias)), second)

    x = torch.randn(3, 64, device=device, requires_grad=True)
    plain = torch.autograd.grad(block(x).sum(), (x, bias))
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, plain[0]) and torch.equal(bias.grad, plain[1])


def test_one_weight_twice_in_a_graph_and_in_two_threads(device):
    """[D13] Calls share no state."""
    q = quantize_4bit(torch.randn(64, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = functional.dequantize_4bit(q)
    chained = torch.autograd.grad(linear_4bit(linear_4bit(x, q), q).sum(), x)[0]
    want = torch.autograd.grad(torch.nn.functional.linear(x @ weight.t(), weight).sum(), x)[0]
    torch.testing.assert_close(chained, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    inputs = [torch.randn(n, 64, device=device, requires_grad=True) for n in (1, 7)]
    alone = [torch.autograd.grad(linear_4bit(t, q).sum(), t)[0] for t in inputs]
    found: dict[int, torch.Tensor] = {}

    def train(i: int) -> None:
        for _ in range(20):
            found[i] = torch.autograd.grad(linear_4bit(inputs[i], q).sum(), inputs[i])[0]

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(2))


@pytest.mark.parametrize("around_backward", [False, True])
def test_backward_keeps_the_forward_s_autocast_state(around_backward, device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = linear_4bit(x, q, bias)
    y.sum().backward()
    reference = x.detach().bfloat16().requires_grad_()
    linear_4bit(reference, q).sum().backward()
    assert torch.equal(x.grad, reference.grad.float()) and x.grad.dtype == torch.float32
    # the reverse: a float32 forward whose backward runs inside an autocast
    x.grad = None
    plain = torch.autograd.grad(linear_4bit(x, q).sum(), x)[0]
    z = linear_4bit(x, q).sum()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=around_backward):
        z.backward()
    assert torch.equal(x.grad, plain)


def test_compute_dtype_is_used_in_both_directions(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    y = linear_4bit(x, q, compute_dtype=torch.bfloat16)
    y.sum().backward()
    narrow = x.detach().bfloat16().requires_grad_()
    linear_4bit(narrow, q).sum().backward()
    assert (x.grad.dtype, y.dtype) == (torch.float32, torch.float32)
    assert torch.equal(x.grad, narrow.grad.float())


def test_functorch_transforms_get_torch_s_own_refusal(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.grad(lambda t: linear_4bit(t, q).sum())(x)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled_forward_and_backward_equal_eager_bit_for_bit(dynamic, double_quant, device):
    q = quantize_4bit(torch.randn(48, 64, device=device), double_quant=double_quant)
    bias = torch.randn(48, device=device, requires_grad=True)

    def call(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_4bit(x, q, b)

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3) if dynamic else (3,):
        x = torch.randn(2, n, 64, device=device, requires_grad=True)
        got, want = compiled(x, bias), call(x, bias)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), (x, bias)) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(x, bias), want)


def test_bytes_alive_between_forward_and_backward_are_the_packed_ones(device):
    """N*K/2 bytes and the statistics, where a decoded weight would be N*K*4."""
    q = quantize_4bit(torch.randn(256, 256, device=device))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        linear_4bit(torch.randn(4, 256, device=device, requires_grad=True), q)
    assert kept == 256 * 256 // 2 + 256 * 256 // 64 * 4
