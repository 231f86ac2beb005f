"""Properties that hold for every input: thousands of generated tensors, maps, sizes and broken calls."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from calls import SPECS, valid_call
from compare import assert_same_bits, tensor_of, widened
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qbits import errors, ops
from reference import BLOCK_SIZES_4BIT, BLOCK_SIZES_8BIT, CODEBOOKS, DTYPES

COMMON = settings(
    deadline=None,
    max_examples=100,
    derandomize=True,  # a red run must be red again
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
MANY = settings(COMMON, max_examples=300)

# every bit pattern: NaN, Inf, zeros and subnormal numbers included
ANY_FLOATS = hnp.arrays(np.uint32, st.integers(0, 300)).map(lambda words: words.view(np.float32))
FINITE_FLOATS = hnp.arrays(
    np.float32, st.integers(1, 300), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)
MAPS = hnp.arrays(
    np.float32, 256, elements=st.floats(-1, 1, width=32, allow_subnormal=True), fill=st.nothing()
).map(np.sort)


@COMMON
@given(
    x=ANY_FLOATS,
    codebook=st.sampled_from(CODEBOOKS),
    block_size=st.sampled_from(BLOCK_SIZES_4BIT),
    dtype=st.sampled_from(DTYPES),
)
def test_quantize_4bit_equals_the_reference_for_all_bit_patterns(device, x, codebook, block_size, dtype):
    with np.errstate(invalid="ignore"):
        tensor = tensor_of(x, dtype, device)
    packed, absmax = ops.quantize_4bit(tensor, codebook, block_size)
    want_packed, want_absmax = reference.quantize_4bit(widened(tensor), codebook, block_size)
    assert_same_bits(absmax, want_absmax)
    assert_same_bits(packed, want_packed)


ANY_MATRICES = hnp.arrays(np.uint32, st.tuples(st.integers(0, 40), st.integers(0, 40))).map(
    lambda words: words.view(np.float32)
)


@MANY
@given(x=ANY_MATRICES, threshold=st.floats(2.0**-100, 2.0**100, width=32), dtype=st.sampled_from(DTYPES))
def test_int8_quantizers_equal_the_reference_for_all_bit_patterns(device, x, threshold, dtype):
    with np.errstate(invalid="ignore"):
        tensor = tensor_of(x, dtype, device).view(x.shape)
    values = widened(tensor).reshape(x.shape)
    by_row, row_scales, _ = reference.quantize_rowwise(values)
    by_column, column_scales = reference.quantize_columnwise(values)
    by_tensor, scale = reference.quantize_global(values)
    kept, kept_scales, mask = reference.quantize_rowwise(values, threshold)
    for got, wanted in (
        (ops.quantize_dual_rowwise(tensor), (by_row, row_scales, by_column.T, column_scales)),
        (ops.quantize_columnwise(tensor), (by_column, column_scales)),
        (ops.quantize_dual_global(tensor), (by_tensor, by_tensor.T, scale)),
        (ops.quantize_rowwise_outliers(tensor, threshold), (kept, kept_scales, mask.view(np.uint8))),
    ):
        for result, want in zip(got, wanted, strict=True):
            assert_same_bits(result, np.ascontiguousarray(want))


@MANY
@given(x=ANY_MATRICES)
def test_int8_codes_decode_to_within_half_a_step_and_quantize_to_themselves(device, x):
    # 127 times the scale must be finite
    x = np.where(np.abs(x) < 2.0**120, x, np.float32(1))
    codes, scales = ops.quantize_rowwise(torch.from_numpy(x).to(device))
    assert not bool((codes == -128).any())
    decoded = ops.dequantize_rowwise(codes, scales, torch.float32)
    error = (decoded.double() - torch.from_numpy(x).to(device).double()).abs()
    # half a step, two roundings of at most 2^-24 of the scale, and groups below 2^-119, which count as zero
    assert bool((error <= scales.double()[:, None] * (0.5 / 127 + 2.0**-22) + 2.0**-119).all())
    assert_same_bits(ops.quantize_rowwise(decoded)[0], codes)


@COMMON
@given(x=ANY_FLOATS, table=MAPS, block_size=st.sampled_from(BLOCK_SIZES_8BIT), dtype=st.sampled_from(DTYPES))
def test_quantize_blockwise_equals_the_reference_for_all_bit_patterns_and_maps(
    device, x, table, block_size, dtype
):
    tensor, codebook = tensor_of(x, dtype, device), tensor_of(table, "float32", device)
    codes, absmax = ops.quantize_blockwise(tensor, codebook, block_size)
    want_codes, want_absmax = reference.quantize_blockwise(widened(tensor), table, block_size)
    assert_same_bits(absmax, want_absmax)
    assert_same_bits(codes, want_codes)


@COMMON
@given(x=ANY_FLOATS, table=MAPS, dtype=st.sampled_from(DTYPES))
def test_whole_tensor_ops_equal_the_reference_for_all_bit_patterns_and_maps(device, x, table, dtype):
    tensor, codebook = tensor_of(x, dtype, device), tensor_of(table, "float32", device)
    codes, absmax = ops.quantize(tensor, codebook)
    want_codes, want_absmax = reference.quantize(widened(tensor), table)
    assert_same_bits(absmax, np.array([want_absmax]))
    assert_same_bits(codes, want_codes)
    want = reference.quantize_no_absmax(widened(tensor), table)
    assert_same_bits(ops.quantize_no_absmax(tensor, codebook), want)


@COMMON
@given(
    packed=hnp.arrays(np.uint8, st.integers(0, 150)),
    scales=hnp.arrays(np.uint32, 10).map(lambda words: words.view(np.float32)),
    odd=st.booleans(),
    codebook=st.sampled_from(CODEBOOKS),
    dtype=st.sampled_from(DTYPES),
)
def test_dequantize_4bit_equals_the_reference_for_all_scales(device, packed, scales, odd, codebook, dtype):
    n = max(0, 2 * packed.size - odd)
    absmax = scales[: reference.ceil_div(n, 32)]
    output = ops.dequantize_4bit(
        tensor_of(packed[: reference.ceil_div(n, 2)], "uint8", device),
        tensor_of(absmax, "float32", device),
        n,
        codebook,
        32,
        dtype,
    )
    want = reference.decode_4bit(packed[: reference.ceil_div(n, 2)], absmax, n, codebook, 32)
    assert_same_bits(output, reference.round_to(want, dtype))


@COMMON
@given(absmax=ANY_FLOATS.map(np.abs))
def test_quantize_absmax_equals_the_reference_for_all_bit_patterns(device, absmax):
    codes, scale, offset = ops.quantize_absmax(tensor_of(absmax, "float32", device))
    want_codes, want_scale, want_offset = reference.quantize_absmax(absmax)
    assert_same_bits(offset, np.array([want_offset]))
    assert_same_bits(scale, want_scale)
    assert_same_bits(codes, want_codes)


@COMMON
@given(codes=hnp.arrays(np.uint8, st.integers(0, 400)), codebook=st.sampled_from(CODEBOOKS))
def test_unpack_inverts_pack(device, codes, codebook):
    packed = ops.pack_4bit(tensor_of(codes, "uint8", device), codebook)
    assert_same_bits(ops.unpack_4bit(packed, codes.size), codes & 15)


@COMMON
@given(x=FINITE_FLOATS, power=st.integers(-20, 20), codebook=st.sampled_from(CODEBOOKS))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(device, x, power, codebook):
    assume(np.abs(x).max() > 1e-20)
    tensor = tensor_of(x, "float32", device)
    packed, absmax = ops.quantize_4bit(tensor, codebook, 4096)
    packed_scaled, absmax_scaled = ops.quantize_4bit(tensor * 2.0**power, codebook, 4096)
    # 1e-20 * 2^-20 is a normal number; where an element becomes subnormal it is far below every threshold
    assert torch.equal(absmax_scaled, absmax * 2.0**power)
    values = [
        ops.dequantize_4bit(p, absmax, x.size, codebook, 4096, torch.float32) for p in (packed, packed_scaled)
    ]
    assert torch.equal(*values)


@COMMON
@given(x=FINITE_FLOATS, seed=st.integers(0, 2**32 - 1), codebook=st.sampled_from(CODEBOOKS))
def test_a_permutation_inside_a_block_permutes_the_codes(device, x, seed, codebook):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(x.size)).to(device)
    tensor = tensor_of(x, "float32", device)
    packed, absmax = ops.quantize_4bit(tensor, codebook, 4096)
    packed_permuted, absmax_permuted = ops.quantize_4bit(tensor[order], codebook, 4096)
    assert torch.equal(absmax, absmax_permuted)
    codes, codes_permuted = (ops.unpack_4bit(p, x.size) for p in (packed, packed_permuted))
    assert torch.equal(codes[order], codes_permuted)


@COMMON
@given(x=FINITE_FLOATS, codebook=st.sampled_from(CODEBOOKS))
def test_decoded_values_are_monotonic_in_the_input(device, x, codebook):
    ascending = tensor_of(np.sort(x), "float32", device)
    packed, absmax = ops.quantize_4bit(ascending, codebook, 4096)
    output = ops.dequantize_4bit(packed, absmax, x.size, codebook, 4096, torch.float32)
    assert (output[1:] >= output[:-1]).all()


@COMMON
@given(
    M=st.integers(0, 12),
    N=st.integers(0, 40),
    K=st.integers(0, 200),
    codebook=st.sampled_from(CODEBOOKS),
    block_size=st.sampled_from(BLOCK_SIZES_4BIT),
    nested=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_gemm_4bit_of_any_shape_is_close_to_float64(device, M, N, K, codebook, block_size, nested, seed):
    random = np.random.default_rng(seed)
    packed, absmax = reference.quantize_4bit(random.standard_normal(N * K, np.float32), codebook, block_size)
    keywords = {}
    given_absmax = tensor_of(absmax, "float32", device)
    if nested:
        codes, scale, offset = reference.quantize_absmax(absmax)
        absmax, given_absmax = (
            reference.decode_absmax(codes, scale, offset),
            tensor_of(codes, "uint8", device),
        )
        keywords = {
            "absmax_scale": tensor_of(scale, "float32", device),
            "absmax_offset": torch.tensor(float(offset), device=device),
        }
    x, bias = random.standard_normal((M, K)).astype(np.float32), random.standard_normal(N).astype(np.float32)
    output = ops.gemm_4bit(
        tensor_of(x, "float32", device).view(M, K),
        tensor_of(packed, "uint8", device),
        given_absmax,
        N,
        K,
        codebook,
        block_size,
        bias=tensor_of(bias, "float32", device),
        **keywords,
    )
    want = reference.gemm_4bit(x, packed, absmax, (N, K), codebook, block_size, bias)
    weight = reference.decode_4bit(packed, absmax, N * K, codebook, block_size).reshape(N, K)
    # every order of K float32 additions stays within K + 2 roundings of the sum of magnitudes
    limit = (K + 2) * 2.0**-24 * (np.abs(x) @ np.abs(weight).T + np.abs(bias)) + 1e-30
    assert (np.abs(widened(output).reshape(M, N) - want) <= limit).all()


WORDS = st.one_of(
    st.none(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [*CODEBOOKS, *BLOCK_SIZES_4BIT, torch.float32, torch.float64, torch.int8, "float16", [], ()]
    ),
)


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    """Any small tensor that torch can make: every dtype, rank 0 to 3, sliced and transposed."""
    dtype = draw(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64])
    )
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 16, 64, 256]), max_size=3))
    tensor = torch.zeros(shape, dtype=dtype)
    if draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, 1)
    if draw(st.booleans()) and tensor.dim() > 0:
        tensor = tensor[..., ::2]
    return tensor


@pytest.mark.parametrize("op", sorted(SPECS))
@MANY
@given(data=st.data())
def test_any_arguments_give_a_result_or_one_sentence(op, data):
    """Nothing but a refusal in the form of this project may come out, and a refused call writes nothing."""
    call = valid_call(op, with_optional=data.draw(st.booleans()), n=300, M=2, N=7, K=33)
    names = [*call.args, *call.outputs]
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        place = call.args if name in call.args else call.outputs
        place[name] = data.draw(st.one_of(WORDS, any_tensor()))
    try:
        call.run_core()
    except errors.QbitsError as refusal:
        assert str(refusal).startswith(f"qbits::{op}: ")
        assert " must " in str(refusal)
        assert ", got " in str(refusal)
        for guard in call.guards:
            assert (guard.tensor.reshape(-1).view(torch.uint8) == 0xFF).all()
    for guard in call.guards:
        guard.assert_intact()
