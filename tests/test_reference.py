"""The NumPy reference reproduces every golden vector, so a wrong reference cannot hide a wrong kernel."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import reference


@pytest.mark.parametrize("name", sorted(reference.MAPS))
def test_maps_match_their_hashes(name):
    assert golden.sha256(reference.MAPS[name]()) == golden.MAP_SHA256[name]


def test_variants_of_maps_match_their_hashes():
    assert golden.sha256(reference.linear_map(add_zero=False)) == golden.MAP_SHA256["linear_no_zero"]
    assert golden.sha256(reference.normal_map(use_extra_value=False)) == golden.MAP_SHA256["normal_symmetric"]
    assert golden.sha256(reference.NF4_VALUES) == golden.MAP_SHA256["nf4"]
    stored = np.where(reference.FP4_VALUES == 0, np.float32(0), reference.FP4_VALUES)
    assert golden.sha256(stored) == golden.MAP_SHA256["fp4"]


def test_nf4_thresholds_are_midpoints():
    mid = (reference.NF4_VALUES[:-1] + reference.NF4_VALUES[1:]) / np.float32(2)
    assert (mid == reference.NF4_THRESHOLDS).all()


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_quantize_4bit_matches_golden(codebook):
    x = golden.bfloat16_of(golden.INPUT_4BIT)
    packed, absmax = reference.quantize_4bit(x, codebook, 64)
    assert packed.tobytes().hex() == golden.PACKED_4BIT[codebook]
    assert absmax.tobytes().hex() == golden.ABSMAX_4BIT
    decoded = reference.decode_4bit(packed, absmax, x.size, codebook, 64)
    for dtype in reference.DTYPES:
        rounded = reference.round_to(decoded, dtype)
        assert golden.sha256(rounded) == golden.DECODED_4BIT_SHA256[codebook, dtype], dtype


@pytest.mark.parametrize("name", sorted(golden.EDGES_4BIT))
def test_quantize_4bit_matches_golden_edges(name):
    edge = golden.EDGES_4BIT[name]
    for codebook, want in (("nf4", edge.nf4), ("fp4", edge.fp4)):
        packed, absmax = reference.quantize_4bit(golden.float32_of(edge.input), codebook, 64)
        assert packed.tobytes().hex() == want, codebook
        assert absmax.tobytes().hex() == edge.absmax, codebook


def test_quantize_blockwise_matches_golden():
    x = golden.bfloat16_of(golden.INPUT_8BIT)
    table = reference.dynamic_map()
    codes, absmax = reference.quantize_blockwise(x, table, 256)
    assert codes.tobytes().hex() == golden.CODES_8BIT
    assert absmax.tobytes().hex() == golden.ABSMAX_8BIT
    assert golden.sha256(reference.decode_blockwise(codes, absmax, table, 256)) == golden.DECODED_8BIT_SHA256


@pytest.mark.parametrize("name", sorted(golden.CODES_8BIT_OF_MAP))
def test_quantize_blockwise_matches_golden_for_other_maps(name):
    x = golden.bfloat16_of(golden.INPUT_8BIT)
    if name == "dynamic_unsigned":
        x = np.abs(x)
    codes, _ = reference.quantize_blockwise(x, reference.MAPS[name](), 256)
    first, whole = golden.CODES_8BIT_OF_MAP[name]
    assert codes[:8].tobytes().hex() == first
    assert golden.sha256(codes) == whole


def test_quantize_blockwise_matches_golden_ties_and_zeros():
    codes, _ = reference.quantize_blockwise(golden.float32_of(golden.TIES_8BIT), reference.dynamic_map(), 256)
    assert codes.tobytes().hex() == golden.TIES_8BIT_CODES
    zeros = np.zeros(256, np.float32)
    for signed, code in ((True, 127), (False, 0)):
        codes, absmax = reference.quantize_blockwise(zeros, reference.dynamic_map(signed), 256)
        assert (codes == code).all()
        assert absmax.tobytes() == bytes(4)


def test_nested_matches_golden():
    x = golden.nested_input()
    assert golden.sha256(x) == golden.NESTED_INPUT_SHA256
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    assert golden.sha256(packed) == golden.NESTED_PACKED_SHA256
    assert golden.sha256(absmax) == golden.NESTED_ABSMAX_SHA256
    codes, scale, offset = reference.quantize_absmax(absmax)
    assert golden.sha256(codes) == golden.NESTED_CODES_SHA256
    assert scale.tobytes().hex() == golden.NESTED_SCALE
    assert offset.tobytes().hex() == golden.NESTED_OFFSET
    decoded_absmax = reference.decode_absmax(codes, scale, offset)
    assert golden.sha256(decoded_absmax) == golden.NESTED_DECODED_ABSMAX_SHA256
    decoded = reference.decode_4bit(packed, decoded_absmax, x.size, "nf4", 64)
    assert golden.sha256(decoded) == golden.NESTED_DECODED_SHA256


def test_rounding_to_16_bits_is_to_nearest_even():
    """Against torch's own conversion, over every exponent and around every kind of tie."""
    torch = pytest.importorskip("torch")
    words = np.arange(0, 2**32, 2**32 // (2**18 - 5), dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16) + 0x8000
    values = np.concatenate([words, ties, ties + 1, ties - 1]).view(np.float32)
    values = values[~np.isnan(values)]
    for dtype in ("float16", "bfloat16"):
        want = torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.int16).numpy()
        got = reference.round_to(values, dtype).view(np.int16)
        assert (got == want).all(), dtype
