"""Codes, scales and decoded values against bitsandbytes, where NUMERICS says that it can be trusted."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits, dtype_of
from qbits import ops
from qbits.codebooks import create_dynamic_map
from reference import DTYPES

SIZE = 2**20
SHARE_OF_EQUAL_CODES = (
    0.9999  # on a GPU its reciprocal is approximate, which may flip a code near a threshold
)


@pytest.fixture
def functional():
    """bitsandbytes.functional."""
    return pytest.importorskip("bitsandbytes").functional


def assert_agree(got: torch.Tensor, want: torch.Tensor, share: float) -> None:
    """At least this share of the elements is equal."""
    assert got.eq(want.reshape(got.shape)).double().mean().item() >= share


@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_codes_and_scales_equal_the_peers(device, functional, dtype, block_size):
    x = torch.randn(SIZE, device=device).to(dtype_of(dtype))
    packed, absmax = ops.quantize_4bit(x, "nf4", block_size)
    peer_packed, state = functional.quantize_4bit(x, blocksize=block_size, quant_type="nf4")
    assert torch.equal(absmax, state.absmax.reshape(-1))
    codes, peer_codes = (ops.unpack_4bit(p.reshape(-1), SIZE) for p in (packed, peer_packed))
    assert_agree(codes, peer_codes, 1 if device == "cpu" else SHARE_OF_EQUAL_CODES)


def test_fp4_values_equal_the_peers(device, functional):
    x = torch.randn(SIZE, device=device)
    packed, absmax = ops.quantize_4bit(x, "fp4", 64)
    peer_packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="fp4")
    assert torch.equal(absmax, state.absmax.reshape(-1))
    ours, theirs = (
        ops.dequantize_4bit(p, absmax, SIZE, "fp4", 64, torch.float32)
        for p in (packed, peer_packed.reshape(-1))
    )
    # values, not codes: FP4 has two codes for zero; the thresholds of its CPU build lie a few ulp beside ours
    assert_agree(ours, theirs, SHARE_OF_EQUAL_CODES)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1001,), (48, 128)])
def test_a_payload_of_the_peer_decodes_to_the_peers_values(device, functional, dtype, codebook, shape):
    x = torch.randn(shape, device=device).to(dtype_of(dtype))
    for nested in (False, True):
        packed, state = functional.quantize_4bit(
            x, blocksize=64, quant_type=codebook, compress_statistics=nested
        )
        want = functional.dequantize_4bit(packed, state)
        keywords = {}
        if nested:
            keywords = {
                "absmax_scale": state.state2.absmax,
                "absmax_offset": state.offset,
                "absmax_codebook": state.state2.code,
            }
        output = ops.dequantize_4bit(
            packed.reshape(-1), state.absmax, x.numel(), codebook, 64, x.dtype, **keywords
        )
        # equal values; the sign of a zero is the one thing that differs (FP4 code 8)
        assert torch.equal(output.view(shape), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_8bit_payload_of_the_peer_decodes_to_the_peers_values(device, functional, dtype):
    x = torch.randn(2**16, device=device).to(dtype_of(dtype))
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    output = ops.dequantize_blockwise(codes, state.absmax, state.code, 256, x.dtype)
    state.dtype = torch.float32  # its own rounding to float16 differs from one CPU to another
    assert_same_bits(output, functional.dequantize_blockwise(codes, state).to(x.dtype))


@pytest.mark.gpu
def test_8bit_codes_equal_the_peers_on_the_gpu(functional):
    """Its CPU codes come from a blurred table (0.15 % differ), so this bar holds on the GPU only."""
    x, table = torch.randn(SIZE, device="cuda"), create_dynamic_map().cuda()
    codes, absmax = ops.quantize_blockwise(x, table, 256)
    peer_codes, state = functional.quantize_blockwise(x, code=table, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    assert_agree(codes, peer_codes, SHARE_OF_EQUAL_CODES)
