"""`functional.linear_4bit` forward: shapes, strides, dtypes, bias, autocast, ``out=``, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compare import assert_same_bits
from qbits import errors, functional
from qbits.functional import QTensor4, linear_4bit, quantize_4bit

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_close_to_float64(
    got: torch.Tensor, x: torch.Tensor, q: QTensor4, bias: torch.Tensor | None
) -> None:
    """No further from float64 over the unrounded weight than twice what torch is with the rounded one."""
    exact = x.double() @ functional.dequantize_4bit(q, dtype=torch.float32).double().t()
    if bias is not None:
        exact = exact + bias.double()
    same = None if bias is None else bias.to(x.dtype)
    weight = functional.dequantize_4bit(q, dtype=x.dtype)
    torch_error = (torch.nn.functional.linear(x, weight, same).double() - exact).abs().max()
    # one rounding of the result is allowed even where torch happens to be exact
    one_rounding = exact.abs().max() * torch.finfo(x.dtype).eps
    assert (got.double() - exact).abs().max() <= 2 * torch_error + one_rounding


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (5, 96), (2, 3, 96), (2, 1, 3, 96)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_result_has_the_input_s_leading_shape_and_dtype(dtype, shape, double_quant, device):
    q = quantize_4bit(torch.randn(40, 96, device=device), double_quant=double_quant)
    x = torch.randn(shape, device=device, dtype=dtype)
    bias = torch.randn(40, device=device)
    y = linear_4bit(x, q, bias)
    assert (y.shape, y.dtype) == ((*shape[:-1], 40), dtype)
    assert_close_to_float64(y.reshape(-1, 40), x.reshape(-1, 96), q, bias)


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "af4"])
@pytest.mark.parametrize("N, K, block_size", [(7, 30, 64), (33, 100, 32), (5, 129, 4096), (1, 1, 64)])
def test_blocks_may_straddle_rows(codebook, N, K, block_size, device):
    """[D15] K is no multiple of the block size, and N*K may be odd."""
    q = quantize_4bit(torch.randn(N, K, device=device), codebook=codebook, block_size=block_size)
    x = torch.randn(3, K, device=device)
    assert_close_to_float64(linear_4bit(x, q), x, q, None)


def test_strided_inputs_are_read_by_logical_index(device):
    """[D15] Slices, transposes, stride 0 and unaligned views give what their contiguous copies give."""
    q = quantize_4bit(torch.randn(24, 64, device=device))
    base = torch.randn(10, 200, device=device)
    inputs = {
        "slice": base[:, 3:67],
        "transposed": torch.randn(64, 10, device=device).t(),
        "stride-0 rows": base[:1, :64].expand(6, 64),
        "stride-0 columns": base[:, :1].expand(10, 64),
        "unaligned": base.view(-1)[1 : 1 + 640].view(10, 64),
        "inner slice": torch.randn(2, 5, 192, device=device)[..., 64:128],
        "permuted": torch.randn(5, 2, 64, device=device).transpose(0, 1),
    }
    bias = torch.randn(48, device=device)[::2]
    for name, x in inputs.items():
        assert torch.equal(linear_4bit(x, q, bias), linear_4bit(x.contiguous(), q, bias.contiguous())), name


def test_odd_n_reads_no_bias_past_its_end(device):
    q = quantize_4bit(torch.randn(3, 64, device=device))
    memory = torch.full((8,), torch.nan, device=device)
    memory[1:4] = torch.tensor([1.0, 2.0, 3.0], device=device)
    y = linear_4bit(torch.zeros(2, 64, device=device), q, memory[1:4])
    assert torch.equal(y, torch.tensor([[1.0, 2.0, 3.0]] * 2, device=device))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_give_an_empty_result(shape, device):
    """[D2]"""
    q = quantize_4bit(torch.randn(5, 64, device=device))
    assert linear_4bit(torch.zeros(shape, device=device), q).shape == (*shape[:-1], 5)


def test_no_features_give_the_bias(device):
    """[D2] K = 0: the bias broadcast, or zeros; never memory that nobody wrote. N = 0: an empty result."""
    q = quantize_4bit(torch.zeros(5, 0, device=device))
    bias = torch.arange(5.0, device=device)
    assert torch.equal(linear_4bit(torch.zeros(2, 3, 0, device=device), q, bias), bias.expand(2, 3, 5))
    assert torch.equal(linear_4bit(torch.zeros(4, 0, device=device), q), torch.zeros(4, 5, device=device))
    none = quantize_4bit(torch.zeros(0, 64, device=device))
    assert linear_4bit(torch.zeros(2, 64, device=device), none).shape == (2, 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_bias_is_added_before_the_one_rounding(dtype, bias_dtype, device):
    """[D18] 1 + a bias of half a unit in the last place below the next tie: rounding first would lose it."""
    q = quantize_4bit(torch.ones(1, 64, device=device))
    x = torch.zeros(1, 64, device=device, dtype=dtype)
    x[0, 0] = 1
    x[0, 1] = torch.finfo(dtype).eps / 4
    bias = torch.full((1,), torch.finfo(dtype).eps * 3 / 8, device=device).to(bias_dtype)
    # 1 + eps/4 + 3/8 eps = 1 + 5/8 eps, which rounds to 1 + eps; the sum of the products alone rounds to 1
    if dtype == torch.float32:
        x[0, 1] = torch.finfo(dtype).eps  # float32 sums may round at each step: only the exact case is fixed
        bias.zero_()
    assert linear_4bit(x, q, bias).item() == 1 + torch.finfo(dtype).eps


def test_forward_changes_no_argument(device):
    """[D32] Inputs, weight and bias keep bytes, dtypes and version counters."""
    q = quantize_4bit(torch.randn(8, 64, device=device), double_quant=True)
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    bias = torch.randn(8, device=device)
    tensors = [x, bias, q.packed, q.absmax, q.absmax_scale, q.absmax_offset]
    before = [(t.clone(), t._version, t.dtype) for t in tensors]
    linear_4bit(x, q, bias, compute_dtype=torch.float32)
    for tensor, (value, version, dtype) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version and tensor.dtype == dtype


def test_result_is_fresh_and_takes_in_place_ops(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    y = linear_4bit(x, q)
    assert y.is_contiguous() and not y._is_view()
    y.relu_().sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with torch.no_grad():
        assert not linear_4bit(x, q)._is_view()


def test_same_call_gives_the_same_bits(device):
    q = quantize_4bit(torch.randn(100, 256, device=device))
    x = torch.randn(37, 256, device=device)
    assert_same_bits(linear_4bit(x, q), linear_4bit(x, q))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(autocast_dtype, device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x, bias = torch.randn(3, 64, device=device), torch.randn(8, device=device)
    with torch.autocast(device, dtype=autocast_dtype):
        y = linear_4bit(x, q, bias)
        with torch.autocast(device, enabled=False):
            plain = linear_4bit(x, q, bias)
    assert torch.equal(y, linear_4bit(x.to(autocast_dtype), q, bias))
    assert y.dtype == autocast_dtype
    assert torch.equal(plain, linear_4bit(x, q, bias))
    with torch.autocast(device, dtype=autocast_dtype), pytest.raises(errors.DtypeError):
        linear_4bit(x.double(), q)


def test_compute_dtype_rounds_operands_and_keeps_the_result_s_dtype(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device)
    y = linear_4bit(x, q, compute_dtype=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear_4bit(x.bfloat16(), q).float())
    half = linear_4bit(x.half(), q, compute_dtype=torch.float32)
    assert half.dtype == torch.float16
    assert torch.equal(half, linear_4bit(x.half().float(), q).half())


def test_inference_tensors_are_legal_everywhere(device):
    with torch.inference_mode():
        q = quantize_4bit(torch.randn(8, 64, device=device), double_quant=True)
        x = torch.randn(3, 64, device=device)
        y = linear_4bit(x, q)
    assert torch.equal(linear_4bit(x, q), y)
    trained = x.clone().requires_grad_()
    linear_4bit(trained, q).sum().backward()
    assert trained.grad is not None and bool(trained.grad.any())


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_out_is_filled(strided, compute_dtype, device):
    """[D3]"""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(2, 3, 64, device=device)
    out = torch.zeros(2, 3, 16, device=device)[..., ::2] if strided else torch.zeros(2, 3, 8, device=device)
    version = out._version
    assert linear_4bit(x, q, compute_dtype=compute_dtype, out=out) is out
    assert torch.equal(out, linear_4bit(x, q, compute_dtype=compute_dtype))
    assert out._version > version


def test_out_beside_the_input_in_one_matrix_is_legal_and_over_it_is_not(device):
    q = quantize_4bit(torch.randn(64, 64, device=device))
    memory = torch.randn(5, 128, device=device)
    want = linear_4bit(memory[:, :64], q)
    linear_4bit(memory[:, :64], q, out=memory[:, 64:])
    assert torch.equal(memory[:, 64:], want)
    before = memory.clone()
    with pytest.raises(errors.ArgumentValueError) as caught:
        linear_4bit(memory[:, :64], q, out=memory[:, 32:96])
    assert str(caught.value) == "qbits::linear_4bit: out must not overlap an input, got one that does"
    assert torch.equal(memory, before)


def test_out_where_a_gradient_is_recorded_is_refused(device):
    q = quantize_4bit(torch.randn(8, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    out = torch.zeros(3, 8, device=device)
    with pytest.raises(RuntimeError) as caught:
        linear_4bit(x, q, out=out)
    assert str(caught.value) == (
        "qbits::linear_4bit: out must be None where a gradient is recorded, got a tensor"
    )
    assert not out.any()
    with torch.no_grad():
        assert linear_4bit(x, q, out=out) is out


def refusals(device: str) -> dict[str, tuple[object, type[Exception], str]]:
    """Calls that break one rule each, with class and message."""
    q = quantize_4bit(torch.randn(8, 64, device=device))
    flat = quantize_4bit(torch.randn(512, device=device))
    x = torch.randn(3, 64, device=device)
    wrong = "qbits::linear_4bit: input must have shape [*, 64], got"
    return {
        "K": (lambda: linear_4bit(x[:, :63], q), errors.ShapeError, f"{wrong} [3, 63]"),
        "rank 0": (lambda: linear_4bit(x[0, 0], q), errors.ShapeError, f"{wrong} []"),
        "flat weight": (
            lambda: linear_4bit(x, flat),
            errors.ShapeError,
            "qbits::linear_4bit: weight must have 2 dimensions, got shape (512,)",
        ),
        "float weight": (
            lambda: linear_4bit(x, torch.randn(8, 64)),
            errors.NotQuantizedError,
            "qbits::linear_4bit: weight must be a QTensor4, which quantize_4bit() makes, got Tensor",
        ),
        "dtype": (
            lambda: linear_4bit(x.double(), q),
            errors.DtypeError,
            "qbits::gemm_4bit: input must have dtype float32, float16 or bfloat16, got float64",
        ),
        "bias length": (
            lambda: linear_4bit(x, q, torch.zeros(7, device=device)),
            errors.ShapeError,
            "qbits::gemm_4bit: bias must have shape [N] = [8], got [7]",
        ),
        "bias dtype": (
            lambda: linear_4bit(x, q, torch.zeros(8, device=device, dtype=torch.int64)),
            errors.DtypeError,
            "qbits::gemm_4bit: bias must have dtype float32, float16 or bfloat16, got int64",
        ),
        "compute_dtype of a foreign array": (
            lambda: linear_4bit(np.zeros((1, 64), np.float32), q, compute_dtype=torch.float16),
            errors.ArgumentValueError,
            "qbits::linear_4bit: compute_dtype must be None for a foreign array, got torch.float16",
        ),
    }


@pytest.mark.parametrize("case", refusals("cpu"))
def test_a_bad_argument_is_refused(case, device):
    call, error, message = refusals(device)[case]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    q = quantize_4bit(torch.randn(8, 64))
    with pytest.raises(errors.DeviceError):
        linear_4bit(torch.randn(3, 64, device="cuda"), q)
