"""SwitchBack's output and gradients by their formulas, what is saved, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qbits import errors, ops
from qbits.autograd import (
    SwitchBackGlobal,
    SwitchBackGlobalMemEfficient,
    SwitchBackVectorwise,
    SwitchBackVectorwiseMemEfficient,
)
from qbits.functional import switchback_linear

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FORMS = [(False, False), (False, True), (True, False), (True, True)]
FUNCTIONS = {
    (False, False): SwitchBackGlobal,
    (False, True): SwitchBackGlobalMemEfficient,
    (True, False): SwitchBackVectorwise,
    (True, True): SwitchBackVectorwiseMemEfficient,
}
form = pytest.mark.parametrize("vectorwise, mem_efficient", FORMS)


def decoded(codes: torch.Tensor, scales: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The values of int8 codes in float64; ``dim`` is the one that the scales run along."""
    shape = [1, 1]
    shape[dim] = -1
    return codes.double() * scales.double().view(shape if scales.numel() > 1 else (1, 1)) / 127


def by_formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    grad: torch.Tensor,
    vectorwise: bool,
    mem_efficient: bool,
) -> dict[str, torch.Tensor]:
    """Output and gradients in float64 from the codes of the quantizers; x and grad are matrices."""
    rows = decoded(*ops.quantize_rowwise(x.contiguous()))
    grad_rows = decoded(*ops.quantize_rowwise(grad.contiguous()))
    quantize = ops.quantize_rowwise if vectorwise else ops.quantize_global
    forward = decoded(*quantize(weight))
    backward = forward
    if vectorwise:
        codes, scales = ops.quantize_columnwise_and_transpose(weight)
        backward = decoded(codes, scales).t()
    kept = decoded(*ops.quantize_rowwise(x.contiguous())).to(grad.dtype) if mem_efficient else x
    return {
        "output": rows @ forward.t() + (0 if bias is None else bias.double()),
        "x": grad_rows @ backward,
        "weight": grad.double().t() @ kept.double(),
        "bias": grad.double().sum(0),
    }


def assert_close(got: torch.Tensor, want: torch.Tensor, terms: int = 1) -> None:
    """Within the roundings of S5 in float32, of a float32 sum of ``terms``, and the last one to the dtype."""
    error = (got.double() - want).abs().max().item() if got.numel() else 0.0
    size = want.abs().max().item() if want.numel() else 0.0
    eps = torch.finfo(got.dtype).eps
    assert error <= size * (eps + (4 + terms**0.5) * 2**-23), (error, size)


@form
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape, N", [((5, 64), 48), ((2, 3, 37), 83), ((2, 1, 2, 64), 1), ((64,), 5), ((7, 1), 3)]
)
@pytest.mark.parametrize("keep", [False, True])
def test_output_and_gradients_are_those_of_the_formulas(
    vectorwise, mem_efficient, dtype, shape, N, keep, device
):
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(N, shape[-1], device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(N, device=device, dtype=dtype, requires_grad=True)
    options = {"vectorwise": vectorwise, "mem_efficient": mem_efficient, "keep_quantized_weight": keep}
    y = switchback_linear(x, weight, bias, **options)
    assert y.shape == (*shape[:-1], N) and y.dtype == dtype and y.is_contiguous() and not y._is_view()
    grad = torch.randn_like(y)
    y.backward(grad)
    rows, grad_rows = x.detach().reshape(-1, shape[-1]), grad.reshape(-1, N)
    want = by_formula(rows, weight.detach(), bias.detach(), grad_rows, vectorwise, mem_efficient)
    assert_close(y.detach().reshape(-1, N), want["output"])
    for name, leaf in (("x", x), ("weight", weight), ("bias", bias)):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)
        assert_close(leaf.grad.reshape(want[name].shape), want[name], rows.shape[0])


@pytest.mark.parametrize("vectorwise", [False, True])
def test_without_a_gradient_the_output_is_the_same(vectorwise, device):
    x, weight = torch.randn(3, 64, device=device), torch.randn(8, 64, device=device)
    recorded = switchback_linear(x, weight.clone().requires_grad_(), vectorwise=vectorwise)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = switchback_linear(x, weight.clone(), vectorwise=vectorwise)
        assert torch.equal(plain, recorded) and plain.grad_fn is None


@form
def test_functions_apply_to_three_tensors(vectorwise, mem_efficient, device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    function = FUNCTIONS[vectorwise, mem_efficient]
    got = function.apply(x, weight, bias)
    want = switchback_linear(x, weight, bias, vectorwise=vectorwise, mem_efficient=mem_efficient)
    assert type(want.grad_fn).__name__ == f"{function.__name__}Backward"
    grads = [torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (got, want)]
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(function.apply(x, weight, None), function.apply(x, weight, torch.zeros_like(bias)))


@pytest.mark.parametrize("dtypes", [(a, b, c) for a in FLOATS for b in FLOATS for c in FLOATS])
def test_gradients_have_the_dtype_of_their_tensor(dtypes, device):
    """[D22, D18] Any mixture; the output has the input's dtype."""
    x_dtype, weight_dtype, bias_dtype = dtypes
    x = torch.randn(5, 16, device=device, dtype=x_dtype, requires_grad=True)
    weight = torch.randn(8, 16, device=device, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(8, device=device, dtype=bias_dtype, requires_grad=True)
    y = switchback_linear(x, weight, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    want = by_formula(x.detach(), weight.detach(), bias.detach(), grad, True, False)
    assert_close(y.detach(), want["output"])
    for name, leaf in (("x", x), ("weight", weight), ("bias", bias)):
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, want[name], 5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias_gradient_accumulates_in_float32(dtype, device):
    """[D22] 2049 ones: a bfloat16 sum would stop at 256, a float16 one at 2048."""
    bias = torch.zeros(4, device=device, requires_grad=True)
    x, weight = torch.zeros(2049, 8, device=device, dtype=dtype), torch.ones(4, 8, device=device, dtype=dtype)
    switchback_linear(x, weight, bias).sum().backward()
    assert bias.grad.tolist() == [2049.0] * 4


def test_large_values_do_not_overflow(device):
    """[D16, D18, D20] Scales and outputs are no float16, the bias is added before the rounding."""
    x = torch.full((2, 4), 3e4, device=device)
    weight = torch.full((3, 4), 1e5, device=device)
    bias = torch.full((3,), 1e9, device=device)
    for vectorwise in (False, True):
        y = switchback_linear(x, weight, bias, vectorwise=vectorwise)
        assert_close(y, torch.full((2, 3), 4 * 3e9 + 1e9, device=device, dtype=torch.float64))
    tiny = switchback_linear(torch.full((1, 4), 1e-9, device=device), weight * 1e-12)
    assert_close(tiny, torch.full((1, 3), 4e-16, device=device, dtype=torch.float64))


def saved_by(call: Any) -> tuple[Any, list[tuple[tuple[int, ...], torch.dtype]]]:
    saved: list[tuple[tuple[int, ...], torch.dtype]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor.clone()  # what the hook gives back is what backward uses

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


@form
@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
@pytest.mark.parametrize("keep", [False, True])
def test_only_what_is_needed_is_recorded_and_saved(vectorwise, mem_efficient, needs, keep, device):
    """[D1, D14, D23] Through torch's hooks, and by arguments alone."""
    x, weight, bias = (
        torch.randn(shape, device=device).requires_grad_(bool(flag))
        for shape, flag in zip([(3, 64), (8, 64), (8,)], needs, strict=True)
    )
    y, saved = saved_by(
        lambda: switchback_linear(
            x, weight, bias, vectorwise=vectorwise, mem_efficient=mem_efficient, keep_quantized_weight=keep
        )
    )
    due: list[tuple[tuple[int, ...], torch.dtype]] = []
    if needs[0] and keep:
        due += [((64, 8), torch.int8), ((64 if vectorwise else 1,), torch.float32)]
    elif needs[0]:
        due += [((8, 64), torch.float32)]
    if needs[1] and mem_efficient:
        due += [((3, 64), torch.int8), ((3,), torch.float32)]
    elif needs[1]:
        due += [((3, 64), torch.float32)]
    assert saved == due and y.requires_grad == any(needs)
    if any(needs):
        assert not [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
        y.sum().backward()
    for leaf, flag in zip((x, weight, bias), needs, strict=True):
        assert (leaf.grad is not None) == bool(flag)


def test_a_second_backward_is_refused(device):
    """Also where the incoming gradient is a constant, and only the saved weight leads further."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    for reduce in (lambda y: y.square().sum(), lambda y: y.sum()):
        (first,) = torch.autograd.grad(reduce(switchback_linear(x, weight)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_backward_twice_gives_the_same_bits(device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    y = switchback_linear(x, weight).square().sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, (x, weight)), strict=True))


@pytest.mark.parametrize("which", ["weight", "x"])
def test_what_is_changed_before_backward_is_noticed(which, device):
    """[D20] The weight that the backward quantizes is the one of the forward, or torch refuses."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    source = x.clone()
    y = switchback_linear(source, weight)
    with torch.no_grad():
        (weight if which == "weight" else source).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@form
def test_strided_operands_and_gradients_are_read_by_logical_index(vectorwise, mem_efficient, device):
    """[D15] Transposed, sliced, offset, and the expanded gradient of sum()."""
    options = {"vectorwise": vectorwise, "mem_efficient": mem_efficient}
    memory = torch.randn(2, 6, 3, 80, device=device)
    strided = {
        "sliced": memory[..., 5:69],
        "transposed": memory.transpose(1, 2)[..., :64],
        "by columns": torch.randn(64, 9, device=device).t(),
        "expanded": torch.randn(64, device=device).expand(4, 64),
    }
    weight = torch.randn(64, 10, device=device).t().requires_grad_()
    bias = torch.randn(20, device=device)[::2].requires_grad_()
    for name, source in strided.items():
        x, dense = (t.detach().requires_grad_() for t in (source, source.contiguous()))
        got, want = (
            switchback_linear(x, weight, bias, **options),
            switchback_linear(dense, weight.detach().contiguous(), bias, **options),
        )
        assert torch.equal(got, want), name
        grads = torch.autograd.grad(got.sum(), (x, weight, bias))
        ones = torch.ones_like(want)
        like = torch.autograd.grad(
            switchback_linear(dense, weight, bias, **options), (dense, weight, bias), ones
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, like, strict=True)), name
        assert grads[2].tolist() == [float(want.numel() // 10)] * 10
        turned = torch.randn(*want.shape[::-1], device=device).permute(*range(want.dim())[::-1])
        pair = [
            torch.autograd.grad(switchback_linear(dense, weight, bias, **options), (dense, weight, bias), g)
            for g in (turned, turned.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True)), name


@form
@pytest.mark.parametrize("M, N, K", [(0, 8, 16), (3, 0, 16), (3, 8, 0), (0, 0, 0)])
def test_empty_operands(vectorwise, mem_efficient, M, N, K, device):
    """[D2] Zeros of the inputs' shapes; with K = 0 the output is the bias, and the bias gets the sum."""
    x = torch.randn(M, K, device=device, requires_grad=True)
    weight = torch.randn(N, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    y = switchback_linear(x, weight, bias, vectorwise=vectorwise, mem_efficient=mem_efficient)
    assert y.shape == (M, N) and (K != 0 or torch.equal(y, bias.expand(M, N)))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(M, K, device=device))
    assert torch.equal(weight.grad, torch.zeros(N, K, device=device))
    assert torch.equal(bias.grad, torch.full((N,), float(M), device=device))


def test_an_output_may_be_written_in_place(device):
    """[D29, D35] It is no view that autograd refuses to let change."""
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    for min_rows in (0, 100):
        y = switchback_linear(x, weight, min_rows=min_rows)
        y.mul_(2)
        twice = torch.autograd.grad(y.sum(), x)[0]
        once = torch.autograd.grad(switchback_linear(x, weight, min_rows=min_rows).sum(), x)[0]
        torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_a_value_that_is_not_finite_is_nan(value, device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(8, 16, device=device)
    x[1, 2] = value
    y = switchback_linear(x, weight)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    weight[4, 0] = value
    y = switchback_linear(x.nan_to_num(0, 0, 0), weight)
    assert y[:, 4].isnan().all() and y[:, :4].isfinite().all()
    assert switchback_linear(x.nan_to_num(0, 0, 0), weight, vectorwise=False).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [2.0, 1e-3, 1e3])
def test_threshold_leaves_outlier_columns_unquantized(dtype, threshold, device):
    """Some columns, all, and none; the backward knows no threshold."""
    x = torch.randn(5, 64, device=device, dtype=dtype)
    x[:, 7] *= 20
    x.requires_grad_()
    weight = torch.randn(9, 64, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(9, device=device, requires_grad=True)
    y = switchback_linear(x, weight, bias, threshold=threshold)
    codes, scales, mask = ops.quantize_rowwise_outliers(x.detach(), threshold)
    assert torch.equal(mask, (x.detach().float().abs() >= threshold).any(0))
    want = (
        decoded(codes, scales) @ decoded(*ops.quantize_rowwise(weight.detach())).t() + bias.detach().double()
    )
    want += (x.detach().double() * mask) @ weight.detach().double().t()
    assert_close(y.detach(), want, 64)
    grad = torch.randn_like(y)
    leaves = (x, weight, bias)
    plain = torch.autograd.grad(switchback_linear(x, weight, bias), leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y, leaves, grad), plain, strict=True))


def test_infinite_outliers_stay_what_they_are(device):
    x, weight = torch.ones(2, 4, device=device), torch.ones(3, 4, device=device)
    x[0, 1] = float("inf")
    y = switchback_linear(x, weight, threshold=6.0)
    assert y[0].isposinf().all() and y[1].isfinite().all()


def test_fewer_rows_than_min_rows_run_in_16_bit(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    leaves = (x, weight, bias)
    dense = torch.nn.functional.linear(x, weight, bias)
    few = switchback_linear(x, weight, bias, min_rows=5)
    assert torch.equal(few, dense)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (few, dense)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(switchback_linear(x, weight, bias, min_rows=4), switchback_linear(x, weight, bias))
    assert not torch.equal(switchback_linear(x, weight, bias), dense)
    mixed = switchback_linear(x, weight.bfloat16(), bias, min_rows=5)  # by a Function of our own
    assert type(mixed.grad_fn).__name__ == "StandardLinearFunctionBackward" and mixed.dtype == torch.float32


W = torch.zeros(8, 64)
X = torch.zeros(3, 64)
REFUSED = {
    "input columns": (
        (torch.zeros(3, 63), W, None, {}),
        errors.ShapeError,
        "input must have shape [*, 64], got [3, 63]",
    ),
    "input scalar": (
        (torch.zeros(()), W, None, {}),
        errors.ShapeError,
        "input must have shape [*, 64], got []",
    ),
    "weight vector": (
        (X, torch.zeros(64), None, {}),
        errors.ShapeError,
        "weight must have 2 dimensions, got shape [64]",
    ),
    "bias length": ((X, W, torch.zeros(7), {}), errors.ShapeError, "bias must have shape [8], got [7]"),
    "input dtype": (
        (X.double(), W, None, {}),
        errors.DtypeError,
        "input must be float32, float16 or bfloat16, got float64",
    ),
    "weight dtype": (
        (X, W.to(torch.int8), None, {}),
        errors.DtypeError,
        "weight must be float32, float16 or bfloat16, got int8",
    ),
    "no tensor": (
        (None, W, None, {}),
        errors.ArgumentTypeError,
        "input must be a torch.Tensor, got NoneType",
    ),
    "device": (
        (X.to("meta"), W, None, {}),
        errors.DeviceError,
        "input must be on cpu like the weight, got meta",
    ),
    "threshold": (
        (X, W, None, {"threshold": -1.0}),
        ValueError,
        "threshold must be a number >= 0, got -1.0",
    ),
    "threshold nan": (
        (X, W, None, {"threshold": float("nan")}),
        ValueError,
        "threshold must be a number >= 0, got nan",
    ),
    "threshold text": (
        (X, W, None, {"threshold": "6"}),
        ValueError,
        "threshold must be a number >= 0, got '6'",
    ),
    "threshold and mem_efficient": (
        (X, W, None, {"threshold": 6.0, "mem_efficient": True}),
        ValueError,
        "threshold must be 0 with mem_efficient, whose codes lack those columns, got 6.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    (x, weight, bias, options), error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        switchback_linear(x, weight, bias, **options)
    assert str(caught.value) == f"qbits::switchback_linear: {words}"
    assert isinstance(caught.value, errors.QbitsError)
