"""The unquantized linear layer as a Function: values, gradients of two orders, dtypes, strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qbits import errors
from qbits.autograd import StandardLinearFunction
from qbits.functional import standard_linear
from qbits.nn import StandardLinear
from torch.utils.checkpoint import checkpoint

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def operands(dtypes: Any, device: str, shape: Any = (2, 3, 16)) -> tuple[torch.Tensor, ...]:
    shapes = [shape, (8, shape[-1]), (8,)]
    return tuple(
        torch.randn(s, device=device, dtype=d, requires_grad=True)
        for s, d in zip(shapes, dtypes, strict=True)
    )


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS])
def test_output_and_gradients_against_float64(dtypes, device):
    """[D22] Sums and the bias in float32, one rounding, each gradient in its tensor's dtype."""
    leaves = operands(dtypes, device)
    y = standard_linear(*leaves)
    grad = torch.randn_like(y)
    y.backward(grad)
    x, weight, bias = (leaf.detach().double() for leaf in leaves)
    operand, due = weight.to(y.dtype).double(), grad.reshape(-1, 8).double()
    want = {
        "output": (x @ operand.t() + bias).reshape(-1, 8),
        "x": due @ operand,
        "weight": due.t() @ x.reshape(-1, 16),
        "bias": due.sum(0),
    }
    got = {"output": y.detach(), "x": leaves[0].grad, "weight": leaves[1].grad, "bias": leaves[2].grad}
    assert [y.dtype, *(leaf.grad.dtype for leaf in leaves)] == [dtypes[0], *dtypes]
    for name, values in got.items():
        error = (values.double().reshape(want[name].shape) - want[name]).abs().max()
        # one rounding to the dtype, and float32 sums of at most 17 terms
        assert error <= want[name].abs().max() * (torch.finfo(values.dtype).eps + 17 * 2**-24), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_output_is_that_of_torch_bit_for_bit(dtype, device):
    leaves = operands([dtype] * 3, device)
    assert torch.equal(standard_linear(*leaves), torch.nn.functional.linear(*leaves))


def test_a_second_backward_works(device):
    leaves = operands([torch.float32] * 3, device)
    grads = []
    for y in (StandardLinearFunction.apply(*leaves), torch.nn.functional.linear(*leaves)):
        first = torch.autograd.grad(y.pow(2).sum(), leaves, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
    for got, want in zip(*grads, strict=True):
        # chained float32 products of at most 16 terms
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_saved_are_input_and_weight_where_they_are_needed(needs, device):
    """[D29] Never the bias."""
    leaves = operands([torch.float32] * 3, device, (3, 16))
    leaves = tuple(t.detach().requires_grad_(bool(n)) for t, n in zip(leaves, needs, strict=True))
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = standard_linear(*leaves)
    assert saved == ([(3, 16)] if needs[1] else []) + ([(8, 16)] if needs[0] else [])
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [bool(n) for n in needs]


def test_strided_operands_and_in_place_outputs(device):
    """[D29] Any stride, and the output is no view that autograd refuses to let change."""
    x = torch.randn(4, 3, 40, device=device).transpose(0, 1)[..., 4:20].requires_grad_()
    weight = torch.randn(16, 8, device=device).t().requires_grad_()
    bias = torch.randn(8, device=device, requires_grad=True)
    y = standard_linear(x, weight, bias)
    grads = torch.autograd.grad(y.mul_(2).sum(), (x, weight, bias))
    want = torch.nn.functional.linear(x, weight, bias) * 2
    torch.testing.assert_close(y, want)
    for got, due in zip(grads, torch.autograd.grad(want.sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(got, due)
    assert standard_linear(x[0, 0], weight, bias).shape == (8,)


@pytest.mark.parametrize("M, K", [(0, 16), (3, 0)])
def test_empty_operands(M, K, device):
    x, weight, bias = operands([torch.float32] * 3, device, (M, K))
    y = standard_linear(x, weight, bias)
    assert K or torch.equal(y, bias.expand(M, 8))
    y.sum().backward()
    assert not x.grad.any() and not weight.grad.any() and bias.grad.tolist() == [float(M)] * 8


def test_autocast_rounds_operands_and_backward_keeps_to_it(device):
    leaves = operands([torch.float32] * 3, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = standard_linear(*leaves)
    want = standard_linear(leaves[0].bfloat16(), *leaves[1:])
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    grad = torch.randn_like(y)
    got, due = (torch.autograd.grad(out, leaves, grad) for out in (y, want))
    assert torch.equal(got[0].bfloat16(), due[0].bfloat16()) and all(map(torch.equal, got[1:], due[1:]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layer_equals_eager_bit_for_bit(dynamic, device):
    torch._dynamo.reset()
    layer = StandardLinear(16, 8, device=device)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 5) if dynamic else (3,):
        x = torch.randn(2, n, 16, device=device, requires_grad=True)
        leaves = (x, layer.weight, layer.bias)
        got, want = compiled(x), layer(x)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (got, want)]
        assert torch.equal(got, want) and all(map(torch.equal, *grads))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant, device):
    model = torch.nn.Sequential(StandardLinear(16, 16), torch.nn.ReLU(), StandardLinear(16, 8)).to(device)
    x = torch.randn(3, 16, device=device, requires_grad=True)
    leaves = (x, *model.parameters())
    plain = torch.autograd.grad(model(x).pow(2).sum(), leaves)
    checkpoint(model, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, due) for leaf, due in zip(leaves, plain, strict=True))


def test_the_module_is_a_linear_layer(device):
    layer, linear = StandardLinear(16, 8, device=device), torch.nn.Linear(16, 8, device=device)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(3, 16, device=device)
    assert torch.equal(layer(x), linear(x)) and isinstance(layer, torch.nn.Linear)


def test_bad_arguments_are_refused():
    with pytest.raises(errors.ShapeError) as caught:
        StandardLinear(16, 8)(torch.zeros(3, 15))
    assert str(caught.value) == "qbits::standard_linear: input must have shape [*, 16], got [3, 15]"
    with pytest.raises(errors.DtypeError) as caught_dtype:
        StandardLinear(16, 8)(torch.zeros(3, 16, dtype=torch.float64))
    assert str(caught_dtype.value) == (
        "qbits::standard_linear: input must be float32, float16 or bfloat16, got float64"
    )
