"""The int8 quantizers of `qbits.functional`: strides, empties, records, frameworks, tracing, gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits, dtype_of, widened
from matrices import with_outliers
from qbits import errors, functional
from qbits.functional import QRows8
from test_functional import Foreign
from torch.utils import _pytree as pytree

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUANTIZERS = [
    functional.quantize_rowwise,
    functional.quantize_columnwise,
    functional.quantize_columnwise_and_transpose,
    functional.quantize_global,
    functional.quantize_global_transpose,
]


def views(device: str) -> dict[str, torch.Tensor]:
    """Strided matrices of every kind that a caller may hold."""
    return {
        "contiguous": torch.randn(20, 70, device=device),
        "transposed": torch.randn(70, 20, device=device).t(),
        "columns": torch.randn(20, 210, device=device)[:, 70:140],
        "rows": torch.randn(60, 70, device=device)[::3],
        "stride-0-rows": torch.randn(70, device=device).expand(20, 70),
        "stride-0": torch.full((), -2.0, device=device).expand(20, 70),
        "unaligned": torch.randn(1401, device=device)[1:].view(20, 70),
        "no-rows": torch.empty(0, 70, device=device),
        "no-columns": torch.empty(20, 0, device=device),
        "one": torch.tensor([[-3.0]], device=device),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", views("cpu"))
def test_every_quantizer_reads_elements_by_their_logical_place(device, kind, dtype):
    """[D15] Whatever the strides; zero rows have scale 0 and codes 0 [D17]; scales are float32 [D16]."""
    x = views(device)[kind].to(dtype) if kind == "contiguous" else views(device)[kind]
    values = widened(x.contiguous()).reshape(x.shape)
    by_row, row_scales, _ = reference.quantize_rowwise(values)
    by_column, column_scales = reference.quantize_columnwise(values)
    by_tensor, scale = reference.quantize_global(values)
    for quantize, codes, scales in zip(
        QUANTIZERS,
        (by_row, by_column, by_column.T, by_tensor, by_tensor.T),
        (row_scales, column_scales, column_scales, scale, scale),
        strict=True,
    ):
        q = quantize(x)
        assert q.outlier_mask is None and tuple(q.values.shape) == codes.shape
        assert_same_bits(q.values, codes, quantize.__name__)
        assert_same_bits(q.scales, scales, quantize.__name__)


@pytest.mark.parametrize("kind", views("cpu"))
def test_quantize_dual_equals_the_two_separate_calls(device, kind):
    x = views(device)[kind]
    for mode, singles in (
        ("row", (functional.quantize_rowwise, functional.quantize_columnwise_and_transpose)),
        ("global", (functional.quantize_global, functional.quantize_global_transpose)),
    ):
        for q, single in zip(functional.quantize_dual(x, mode=mode), singles, strict=True):
            assert_same_bits(q.values, single(x).values)
            assert_same_bits(q.scales, single(x).scales)


@pytest.mark.parametrize("dtype", FLOATS)
def test_global_codes_transposed_are_the_transposed_global_codes(device, dtype):
    """[D20] The scale is found and applied in float32, whatever the dtype."""
    x = torch.randn(129, 66, device=device).to(dtype)
    plain, transposed = functional.quantize_global(x), functional.quantize_global_transpose(x)
    assert torch.equal(transposed.values, plain.values.t())
    assert plain.scales.dtype == torch.float32 and torch.equal(plain.scales, transposed.scales)


def test_a_threshold_sets_columns_apart_and_leaves_the_input_alone(device):
    x = torch.from_numpy(with_outliers(np.random.default_rng(3), 30, 50, 4)).to(device)
    before, view = x.clone(), x.t().contiguous().t()
    q = functional.quantize_rowwise(view, threshold=6.0)
    codes, scales, mask = reference.quantize_rowwise(x.cpu().numpy(), 6.0)
    assert mask.sum() == 4
    assert_same_bits(q.values, codes)
    assert_same_bits(q.scales, scales)
    assert q.outlier_mask.dtype == torch.bool and q.outlier_mask.cpu().numpy().tolist() == mask.tolist()
    assert torch.equal(x, before)
    assert functional.quantize_rowwise(x, threshold=0.0).outlier_mask is None
    assert not functional.quantize_rowwise(x, threshold=1000).outlier_mask.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_decoders_take_strides_and_give_the_dtype_asked_for(device, dtype):
    """[D21] Products of codes and scales beyond float16's range do not overflow on the way."""
    x = torch.randn(12, 34, device=device) * 300
    for quantize, decode, dim in (
        (functional.quantize_rowwise, functional.dequantize_rowwise, 1),
        (functional.quantize_columnwise, functional.dequantize_columnwise, 0),
        (functional.quantize_global, functional.dequantize_global, 0),
    ):
        q = quantize(x)
        codes, scales = q.values.t().contiguous().t(), torch.stack([q.scales, q.scales], -1)[..., 0]
        got = decode(codes, scales, out_dtype=dtype)
        along = q.scales.cpu().numpy()
        want = reference.decode_int8(q.values.cpu().numpy(), along[:, None] if dim else along)
        assert (got.dtype, got.shape) == (dtype, x.shape)
        assert_same_bits(got, reference.round_to(want, str(dtype).removeprefix("torch.")))
    one = functional.dequantize_global(q.values, q.scales.view(()), out_dtype=dtype)
    assert_same_bits(one, got)


def refused(kind: type[Exception], call: Callable[..., object], *args: object, **keywords: object) -> str:
    """What the call is refused with."""
    with pytest.raises(kind) as refusal:
        call(*args, **keywords)
    return str(refusal.value)


def test_what_is_no_matrix_of_floats_is_refused(device):
    for quantize in (*QUANTIZERS, functional.quantize_dual):
        name = "quantize_dual_rowwise" if quantize is functional.quantize_dual else quantize.__name__
        symbols = "N, K" if quantize is functional.quantize_dual else "M, K"
        for shape in ((), (5,), (2, 3, 4)):
            message = refused(errors.ShapeError, quantize, torch.zeros(shape, device=device))
            rule = f"must have 2 dimensions [{symbols}], got shape {list(shape)}"
            assert message == f"qbits::{name}: input {rule}"
        for dtype in ("float64", "int8", "bool"):
            x = torch.zeros(2, 2, dtype=dtype_of(dtype), device=device)
            rule = f"must have dtype float32, float16 or bfloat16, got {dtype}"
            assert refused(errors.DtypeError, quantize, x) == f"qbits::{name}: input {rule}"


def test_a_threshold_or_mode_that_is_none_is_refused(device):
    x, quantize = torch.zeros(2, 2, device=device), functional.quantize_rowwise
    for threshold in (-1.0, float("nan")):
        message = refused(errors.ArgumentValueError, quantize, x, threshold=threshold)
        assert message == f"qbits::quantize_rowwise: threshold must be at least 0, got {threshold}"
    message = refused(errors.ArgumentValueError, quantize, x, threshold=float("inf"))
    rule = "threshold must be finite and above 0 as a float32, got inf"
    assert message == f"qbits::quantize_rowwise_outliers: {rule}"
    message = refused(errors.ArgumentValueError, functional.quantize_dual, x, mode="column")
    assert message == 'qbits::quantize_dual: mode must be one of ["row", "global"], got "column"'


def test_records_are_frozen_pytrees(device):
    x = torch.randn(4, 6, device=device)
    for threshold, num in ((0.0, 2), (1.0, 3)):
        q = functional.quantize_rowwise(x, threshold=threshold)
        with pytest.raises(AttributeError):
            q.scales = None  # type: ignore[misc]
        leaves, spec = pytree.tree_flatten(q)
        assert len(leaves) == num
        again = pytree.tree_unflatten(leaves, spec)
        assert isinstance(again, QRows8) and again.values is q.values and again.pair == (q.values, q.scales)
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_arrays_give_numpy_arrays(dtype):
    x = np.asfortranarray(np.random.default_rng(1).standard_normal((6, 33)).astype(dtype))
    tensor = torch.from_numpy(np.ascontiguousarray(x))

    def everything(x: object) -> list[object]:
        rows = functional.quantize_rowwise(x, threshold=1.5)
        decoded = functional.dequantize_rowwise(rows.values, rows.scales, out_dtype=torch.float32)
        return pytree.tree_leaves([rows, [quantize(x) for quantize in QUANTIZERS], decoded])

    for got, want in zip(everything(x), everything(tensor), strict=True):
        assert type(got) is np.ndarray
        assert np.array_equal(got, want.numpy())


def test_jax_arrays_give_jax_arrays():
    jax = pytest.importorskip("jax")
    x = jax.numpy.linspace(-1, 1, 384).reshape(6, 64)
    q = functional.quantize_rowwise(x)
    assert isinstance(q.values, jax.Array) and isinstance(q.scales, jax.Array)
    want = functional.quantize_rowwise(torch.from_numpy(np.array(x)))
    assert np.array_equal(np.asarray(q.values), want.values.numpy())


def test_an_array_of_an_unknown_framework_gets_what_it_can_read_by_dlpack():
    x = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    q = functional.quantize_columnwise(Foreign(x))
    assert torch.equal(
        torch.from_dlpack(q.values), functional.quantize_columnwise(torch.from_numpy(x)).values
    )


def test_meta_tensors_give_meta_tensors():
    x = torch.empty(3, 70, device="meta", dtype=torch.bfloat16)
    q = functional.quantize_rowwise(x, threshold=6.0)
    assert [(t.is_meta, t.shape, t.dtype) for t in (q.values, q.scales, q.outlier_mask)] == [
        (True, (3, 70), torch.int8),
        (True, (3,), torch.float32),
        (True, (70,), torch.bool),
    ]
    assert functional.quantize_global_transpose(x).values.shape == (70, 3)
    assert functional.dequantize_rowwise(*q.pair, out_dtype=torch.float16).dtype == torch.float16


def test_compiled_functions_equal_eager_ones(device):
    def everything(x: torch.Tensor) -> list[torch.Tensor]:
        rows = functional.quantize_rowwise(x.t(), threshold=2.0)
        both = functional.quantize_dual(x), functional.quantize_dual(x, mode="global")
        decoded = functional.dequantize_rowwise(*rows.pair, out_dtype=x.dtype)
        return [*pytree.tree_leaves([rows, both]), decoded]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (64, 65, 300):
        x = torch.randn(3, n, device=device)
        for got, want in zip(compiled(x), everything(x), strict=True):
            assert torch.equal(got, want)


def test_quantizing_what_requires_a_gradient_records_none(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    for quantize in QUANTIZERS:
        q = quantize(x)
        assert not q.scales.requires_grad and q.values.grad_fn is None
    with torch.inference_mode():
        assert functional.quantize_rowwise(x).values.shape == (4, 6)
