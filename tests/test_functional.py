"""`qbits.functional`: shapes, strides, dtypes, ``out=``, records and foreign arrays around the quantizers."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits, widened
from qbits import errors, functional, ops
from qbits.codebooks import create_dynamic_map, create_linear_map
from qbits.functional import QTensor4, QTensor8
from torch.utils import _pytree as pytree

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def views(device: str) -> dict[str, torch.Tensor]:
    """Strided tensors of every kind that a caller may hold, of 3 * 70 elements or so."""
    base = torch.randn(6, 70, 5, device=device)
    return {
        "transposed": base[:, :, 0].t(),
        "sliced": base[1:4, 5:60, 1],
        "last-dimension-slice": torch.randn(3, 210, device=device)[..., 70:140],
        "stride-0": torch.randn(70, device=device).expand(3, 70),
        "all-stride-0": torch.ones((), device=device).expand(3, 70),
        "unaligned": torch.randn(211, device=device)[1:].view(3, 70),
        "channels-last": torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last),
        "negative-free-flip": torch.randn(3, 70, device=device).flip(0),
        "scalar": torch.tensor(-2.5, device=device),
        "empty": torch.empty(3, 0, 2, device=device),
    }


@pytest.mark.parametrize("kind", views("cpu"))
def test_quantizers_read_logical_order(kind, device):
    """[D7] Blocks are consecutive in the row-major order of the elements, whatever the strides."""
    x = views(device)[kind]
    flat = widened(x.contiguous())
    q = functional.quantize_4bit(x, codebook="fp4", block_size=32)
    packed, absmax = reference.quantize_4bit(flat, "fp4", 32)
    assert_same_bits(q.packed, packed)
    assert_same_bits(q.absmax, absmax)
    q8 = functional.quantize_blockwise(x, block_size=64)
    codes, absmax = reference.quantize_blockwise(flat, reference.dynamic_map(), 64)
    assert q8.codes.shape == x.shape
    assert_same_bits(q8.codes, codes)
    assert_same_bits(q8.absmax, absmax)
    whole = functional.quantize(x)
    codes, scale = reference.quantize(flat, reference.dynamic_map())
    assert_same_bits(whole.codes, codes)
    assert whole.absmax.shape == () and float(whole.absmax) == scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_gives_back_shape_and_dtype(dtype, double_quant, device):
    x = torch.randn(3, 5, 77, device=device, dtype=dtype)
    q = functional.quantize_4bit(x, double_quant=double_quant)
    assert (q.shape, q.dtype, q.nested) == ((3, 5, 77), dtype, double_quant)
    y = functional.dequantize_4bit(q)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    absmax = q.absmax.cpu().numpy()
    if double_quant:
        absmax = reference.decode_absmax(
            absmax, q.absmax_scale.cpu().numpy(), np.float32(q.absmax_offset.item()), reference.dynamic_map()
        )
    values = reference.decode_4bit(q.packed.cpu().numpy(), absmax, x.numel(), "nf4", 64)
    assert_same_bits(y, reference.round_to(values, str(dtype).removeprefix("torch.")))
    wider = functional.dequantize_4bit(q, dtype=torch.float32)
    assert_same_bits(wider, values)


def test_error_bars_of_normal_data_hold(device):
    """Mean absolute and relative error at block size 64, N(0, 1)."""
    x = torch.randn(1024, 1024, device=device)
    for codebook, absolute, relative in (("nf4", 0.0728, 0.2033), ("fp4", 0.0965, 0.2601)):
        error = (functional.dequantize_4bit(functional.quantize_4bit(x, codebook=codebook)) - x).abs()
        assert error.mean() < absolute * 1.01
        assert (error / (x.abs() + 1e-8)).mean() < relative * 1.01
    error = (functional.dequantize_blockwise(functional.quantize_blockwise(x, block_size=4096)) - x).abs()
    assert error.mean() < 0.011
    assert (error / (x.abs() + 1e-8)).mean() < 0.018


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_blocks_decode_to_nan_and_others_are_untouched(value, device):
    """[D6, D8] What is broken shows; it never becomes a finite number."""
    x = torch.randn(256, device=device)
    x[70] = value
    y = functional.dequantize_4bit(functional.quantize_4bit(x))
    y8 = functional.dequantize_blockwise(functional.quantize_blockwise(x, block_size=64))
    for decoded in (y, y8):
        assert torch.isnan(decoded[64:128]).all()
        assert torch.isfinite(decoded[:64]).all() and torch.isfinite(decoded[128:]).all()


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "af4"])
def test_zero_blocks_decode_to_plus_zero(codebook, device):
    """[D8, D17] Also the subnormal ones and a short last block."""
    x = torch.zeros(150, device=device)
    x[64:128] = 1e-40
    y = functional.dequantize_4bit(functional.quantize_4bit(x, codebook=codebook))
    assert_same_bits(y, np.zeros(150, np.float32))
    y = functional.dequantize_blockwise(functional.quantize_blockwise(x, block_size=64))
    assert_same_bits(y, np.zeros(150, np.float32))


def test_pack_and_unpack_invert_each_other(device):
    codes = torch.randint(0, 16, (3, 7), dtype=torch.uint8, device=device)
    packed = functional.pack_4bit(codes.t(), codebook="fp4")
    assert packed.shape == (11,) and packed[-1].item() & 15 == 0
    assert torch.equal(functional.unpack_4bit(packed, 21), codes.t().reshape(-1))


def test_no_absmax_forms_encode_and_decode_scaled_values(device):
    table = create_linear_map().to(device)
    x = torch.randn(40, 7, device=device).t()
    codes = functional.quantize_no_absmax(x, table)
    assert codes.shape == x.shape
    flat = widened(x.contiguous())
    assert_same_bits(codes, reference.quantize_no_absmax(flat, reference.linear_map()))
    values = functional.dequantize_no_absmax(codes.t(), table, dtype=torch.float16)
    want = reference.decode_no_absmax(
        codes.t().contiguous().cpu().numpy().reshape(-1), reference.linear_map()
    )
    assert_same_bits(values, want.astype(np.float16))


def test_quantizing_what_requires_a_gradient_records_none(device):
    x = torch.randn(64, device=device, requires_grad=True)
    before = x.detach().clone()
    q = functional.quantize_4bit(x, double_quant=True)
    assert not any(t.requires_grad for t in (q.packed, q.absmax, functional.dequantize_4bit(q)))
    assert torch.equal(x, before) and x._version == 0


OUT_CALLS = {
    "dequantize_4bit": lambda x, out: functional.dequantize_4bit(functional.quantize_4bit(x), out=out),
    "dequantize_blockwise": lambda x, out: functional.dequantize_blockwise(
        functional.quantize_blockwise(x), out=out
    ),
    "dequantize": lambda x, out: functional.dequantize(functional.quantize(x), out=out),
    "dequantize_no_absmax": lambda x, out: functional.dequantize_no_absmax(
        functional.quantize_no_absmax(x, create_dynamic_map().to(x.device)),
        create_dynamic_map().to(x.device),
        out=out,
    ),
}


@pytest.mark.parametrize("call", OUT_CALLS)
@pytest.mark.parametrize("strided", [False, True])
def test_out_is_filled_and_returned_and_its_version_advances(call, strided, device):
    """[D3]"""
    x = torch.randn(5, 33, device=device)
    want = OUT_CALLS[call](x, None)
    out = torch.full((33, 5), 9.0, device=device).t() if strided else torch.full_like(want, 9.0)
    version = out._version
    assert OUT_CALLS[call](x, out) is out
    assert torch.equal(out, want)
    assert out._version > version


@pytest.mark.parametrize("call", OUT_CALLS)
def test_out_that_does_not_fit_is_refused_and_left_alone(call, device):
    x = torch.randn(5, 33, device=device)
    refusals = [
        (torch.ones(165, device=device), errors.ShapeError, "out must have shape [5, 33], got [165]"),
        (
            torch.ones(5, 33, device=device, dtype=torch.float16),
            errors.DtypeError,
            "out must be torch.float32, got torch.float16",
        ),
        (
            torch.ones(5, 33, device="meta"),
            errors.DeviceError,
            f"out must be on {x.device}, got meta",
        ),
        (
            torch.ones(5, 33, device=device, requires_grad=True),
            RuntimeError,
            "out must be None where a gradient is recorded, got a tensor",
        ),
    ]
    for out, error, words in refusals:
        with pytest.raises(error) as caught:
            OUT_CALLS[call](x, out)
        assert str(caught.value) == f"qbits::{call}: {words}"
        assert out.is_meta or bool((out == 1).all())


def test_out_that_overlaps_an_input_is_refused(device):
    memory = torch.zeros(512, dtype=torch.uint8, device=device)
    codes = memory[:64]
    table = create_dynamic_map().to(device)
    out = memory[60:316].view(torch.float32)
    with pytest.raises(errors.ArgumentValueError) as caught:
        functional.dequantize_no_absmax(codes, table, out=out)
    assert str(caught.value) == (
        "qbits::dequantize_no_absmax: out must not overlap an input, got one that does"
    )
    beside = memory[64:320].view(torch.float32)
    assert functional.dequantize_no_absmax(codes, table, out=beside) is beside


@pytest.mark.parametrize("strided", [False, True])
def test_both_outputs_of_an_8bit_quantizer_are_filled(strided, device):
    step = 2 if strided else 1
    x = torch.randn(300, device=device)
    for call, scales in ((functional.quantize_blockwise, (2,)), (functional.quantize, ())):
        codes = torch.zeros(300 * step, dtype=torch.uint8, device=device)[::step]
        absmax = torch.zeros(scales, device=device)
        q, want = call(x, out=(codes, absmax)), call(x)
        assert q.codes.data_ptr() == codes.data_ptr() and torch.equal(codes, want.codes)
        assert torch.equal(absmax, want.absmax)
        with pytest.raises(errors.ShapeError) as caught:
            call(x, out=(codes[:299], absmax))
        assert str(caught.value) == f"qbits::{call.__name__}: out must have shape [300], got [299]"


@pytest.mark.parametrize("call", ["dequantize_4bit", "dequantize_blockwise", "dequantize"])
def test_a_float_tensor_in_place_of_a_record_names_the_quantizer(call):
    maker, record = (
        ("quantize_4bit", "QTensor4") if call.endswith("4bit") else ("quantize_blockwise", "QTensor8")
    )
    with pytest.raises(errors.NotQuantizedError) as caught:
        getattr(functional, call)(torch.zeros(3))
    assert str(caught.value) == (
        f"qbits::{call}: weight must be a {record}, which {maker}() makes, got Tensor"
    )
    with pytest.raises(errors.ArgumentTypeError):
        getattr(functional, call)("nf4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
def test_dtypes_other_than_the_three_floats_are_refused(dtype, device):
    x = torch.zeros(8, device=device).to(dtype)
    for call in (functional.quantize_4bit, functional.quantize_blockwise, functional.quantize):
        with pytest.raises(errors.DtypeError, match=r"input must have (a )?dtype .+, got"):
            call(x)


def test_records_are_frozen_pytrees(device):
    q = functional.quantize_4bit(torch.randn(4, 64, device=device), double_quant=True)
    with pytest.raises(AttributeError):
        q.block_size = 32  # type: ignore[misc]
    leaves, spec = pytree.tree_flatten(q)
    assert [leaf.dtype for leaf in leaves] == [torch.uint8, torch.uint8, torch.float32, torch.float32]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, QTensor4) and again.shape == (4, 64) and again.packed is q.packed
    moved = pytree.tree_map(lambda t: t.clone(), q)
    assert torch.equal(functional.dequantize_4bit(moved), functional.dequantize_4bit(q))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    plain = functional.quantize_4bit(torch.randn(4, 64, device=device))
    assert len(pytree.tree_leaves(plain)) == 2
    q8 = pytree.tree_map(lambda t: t, functional.quantize_blockwise(torch.randn(64, device=device)))
    assert isinstance(q8, QTensor8) and q8.block_size == 256


class Foreign:
    """An array of a framework that qbits does not know, with nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_arrays_give_numpy_arrays(dtype):
    x = np.asfortranarray(np.random.default_rng(1).standard_normal((6, 64)).astype(dtype))
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    q, want = (functional.quantize_4bit(a, double_quant=True) for a in (x, tensor))
    for got, due in zip(pytree.tree_leaves(q), pytree.tree_leaves(want), strict=True):
        assert type(got) is np.ndarray
        assert_same_bits(torch.from_numpy(got.copy()), due)
    assert (q.shape, q.dtype) == ((6, 64), want.dtype)
    y = functional.dequantize_4bit(q)
    assert type(y) is np.ndarray and y.dtype == dtype and y.shape == (6, 64)
    assert np.array_equal(y, functional.dequantize_4bit(want).numpy())
    rows = np.ones((2, 3, 64), dtype)
    product = functional.linear_4bit(rows, q, np.ones(6, dtype))
    assert type(product) is np.ndarray and product.shape == (2, 3, 6)
    due = functional.linear_4bit(torch.from_numpy(rows), want, torch.ones(6, dtype=want.dtype))
    assert np.array_equal(product, due.numpy())
    q8 = functional.quantize_blockwise(x, block_size=64)
    assert type(q8.codes) is np.ndarray and q8.codes.shape == (6, 64)
    assert np.array_equal(
        functional.dequantize_blockwise(q8),
        functional.dequantize_blockwise(functional.quantize_blockwise(tensor, block_size=64)).numpy(),
    )
    out = np.zeros((6, 64), dtype)
    assert functional.dequantize_4bit(q, out=out) is out and np.array_equal(out, y)


def test_jax_arrays_give_jax_arrays():
    jax = pytest.importorskip("jax")
    x = jax.numpy.linspace(-1, 1, 384).reshape(6, 64)
    q = functional.quantize_4bit(x)
    assert isinstance(q.packed, jax.Array)
    y = functional.linear_4bit(jax.numpy.ones((2, 64)), q)
    assert isinstance(y, jax.Array) and y.shape == (2, 6)
    want = functional.dequantize_4bit(functional.quantize_4bit(torch.from_numpy(np.array(x))))
    assert np.array_equal(np.asarray(functional.dequantize_4bit(q)), want.numpy())


def test_an_array_of_an_unknown_framework_gets_what_it_can_read_by_dlpack():
    x = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    q = functional.quantize_4bit(Foreign(x))
    want = functional.quantize_4bit(torch.from_numpy(x))
    assert torch.equal(torch.from_dlpack(q.packed).reshape(-1), want.packed)
    assert torch.equal(torch.from_dlpack(q.absmax), want.absmax)


def test_ops_on_meta_tensors_give_meta_tensors():
    x = torch.empty(3, 70, device="meta")
    q = functional.quantize_4bit(x, double_quant=True)
    assert (q.packed.shape, q.absmax.shape, q.absmax_scale.shape) == ((105,), (4,), (1,))
    y = functional.dequantize_4bit(q, dtype=torch.bfloat16)
    assert y.is_meta and (y.shape, y.dtype) == ((3, 70), torch.bfloat16)
    z = functional.linear_4bit(torch.empty(2, 5, 70, device="meta"), q)
    assert z.is_meta and z.shape == (2, 5, 3)
    q8 = functional.quantize_blockwise(x)
    assert functional.dequantize_blockwise(q8).shape == (3, 70)


def test_compiled_functions_equal_eager_ones(device):
    def roundtrip(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = functional.quantize_4bit(x.t(), double_quant=True)
        q8 = functional.quantize_blockwise(x)
        return functional.dequantize_4bit(q), functional.dequantize_blockwise(q8)

    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (64, 65, 300):
        x = torch.randn(3, n, device=device)
        for got, want in zip(compiled(x), roundtrip(x), strict=True):
            assert torch.equal(got, want)


def test_absmax_and_packed_lengths_are_checked_against_the_shape(device):
    q = functional.quantize_4bit(torch.randn(4, 64, device=device))
    with pytest.raises(errors.ShapeError) as caught:
        functional.dequantize_4bit(QTensor4(q.packed, q.absmax[:3], q.shape, q.dtype, "nf4", 64))
    assert str(caught.value) == (
        "qbits::dequantize_4bit: absmax must have ceil_div(n, block_size) = 4 elements, got 3"
    )
    with pytest.raises(errors.ShapeError):
        functional.dequantize_4bit(QTensor4(q.packed, q.absmax, (4, 66), q.dtype, "nf4", 64))
    assert ops.dequantize_4bit(q.packed, q.absmax, 256, "nf4", 64, torch.float32).shape == (256,)
