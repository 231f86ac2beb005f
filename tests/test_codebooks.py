"""The public code tables: equal to the published hashes, fresh for each caller, checked once when given."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits
from golden import MAP_SHA256, sha256
from qbits import codebooks, functional
from qbits.errors import ShapeError

MAPS = {
    "dynamic": codebooks.create_dynamic_map,
    "dynamic_unsigned": lambda: codebooks.create_dynamic_map(signed=False),
    "linear": codebooks.create_linear_map,
    "linear_no_zero": lambda: codebooks.create_linear_map(add_zero=False),
    "linear_unsigned": lambda: codebooks.create_linear_map(signed=False),
    "normal": codebooks.create_normal_map,
    "normal_symmetric": lambda: codebooks.create_normal_map(use_extra_value=False),
    "e5m2": codebooks.create_fp8_map,
    "e4m3": lambda: codebooks.create_fp8_map(True, 4, 3, 8),
    "nf4": lambda: codebooks.get_4bit_type("nf4"),
    "fp4": lambda: codebooks.get_4bit_type("fp4"),
}


@pytest.mark.parametrize("name", MAPS)
def test_map_has_the_published_bits(name):
    table = MAPS[name]()
    assert table.dtype == torch.float32
    assert sha256(table.numpy()) == MAP_SHA256[name]


def test_af4_is_the_published_table_at_block_size_64_only():
    assert_same_bits(codebooks.get_4bit_type("af4"), reference.AF4_VALUES)
    with pytest.raises(NotImplementedError) as caught:
        codebooks.get_4bit_type("af4", block_size=128)
    assert str(caught.value) == (
        "qbits::get_4bit_type: block_size must be 64 for af4, whose values fit that, got 128"
    )


def test_int4_counts_down_from_seven_in_both_signs():
    magnitudes = np.arange(7, -1, -1, dtype=np.float32) / np.float32(7)
    want = np.concatenate([magnitudes, -magnitudes[::-1]])
    assert np.array_equal(codebooks.get_4bit_type("int4").numpy(), want)


def test_fp8_map_is_not_ocp_fp8():
    """[D9] e4m3 as a map has 480 where OCP has NaN, and 1/8 * 2^-8 as its smallest value."""
    table = codebooks.create_fp8_map(True, 4, 3, 8) * 480
    assert torch.isfinite(table).all()
    positive = table[table > 0]
    assert positive.max().item() == pytest.approx(480)
    assert positive.min().item() == pytest.approx(2.0**-11, rel=1e-6)


def test_unknown_4bit_type_is_refused():
    with pytest.raises(NotImplementedError) as caught:
        codebooks.get_4bit_type("nf5")
    assert str(caught.value) == (
        "qbits::get_4bit_type: typename must be one of ['nf4', 'fp4', 'int4', 'af4'], got 'nf5'"
    )


def test_fp8_map_bits_must_add_up():
    with pytest.raises(ValueError, match="must"):
        codebooks.create_fp8_map(True, 5, 3, 8)


def test_changing_a_returned_table_changes_no_later_result(device):
    x = torch.linspace(-1, 1, 300, device=device)
    before = functional.quantize_blockwise(x).codes.clone()
    codebooks.create_dynamic_map().zero_()
    codebooks.get_4bit_type("nf4").zero_()
    assert torch.equal(functional.quantize_blockwise(x).codes, before)
    assert sha256(codebooks.get_4bit_type("nf4").numpy()) == MAP_SHA256["nf4"]


def test_4bit_type_follows_the_default_device(device):
    assert codebooks.get_4bit_type("nf4", device).device.type == device
    with torch.device("meta"):
        assert codebooks.get_4bit_type("nf4").is_meta


DESCENT = "codebook must hold 256 finite values in ascending order, got others"
BAD_MAPS = {
    "unsorted": (codebooks.create_dynamic_map().flip(0), DESCENT),
    "nan": (torch.full((256,), torch.nan), DESCENT),
    "infinite": (torch.cat([codebooks.create_dynamic_map()[:255], torch.tensor([torch.inf])]), DESCENT),
    "short": (torch.zeros(255), "codebook must have shape [256], got [255]"),
    "two-dimensional": (torch.zeros(16, 16), "codebook must have shape [256], got [16, 16]"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_a_map_that_is_none_is_refused(name, device):
    table, words = BAD_MAPS[name]
    for call in (
        lambda: functional.quantize_blockwise(torch.zeros(8, device=device), codebook=table.to(device)),
        lambda: functional.quantize_blockwise(np.zeros(8, np.float32), codebook=table.numpy()),
    ):
        with pytest.raises(ShapeError) as caught:
            call()
        assert str(caught.value) == f"qbits::quantize_blockwise: {words}"


def test_a_map_is_checked_again_after_it_was_changed(device):
    table = codebooks.create_linear_map().to(device)
    x = torch.linspace(-1, 1, 64, device=device)
    functional.quantize_blockwise(x, codebook=table)
    table[0] = 1.0
    with pytest.raises(ShapeError):
        functional.quantize_blockwise(x, codebook=table)


def test_a_map_made_in_inference_mode_is_taken(device):
    with torch.inference_mode():
        table = codebooks.create_linear_map().to(device)
    x = torch.linspace(-1, 1, 64, device=device)
    want = functional.quantize_blockwise(x, codebook=codebooks.create_linear_map().to(device))
    assert torch.equal(functional.quantize_blockwise(x, codebook=table).codes, want.codes)


@pytest.mark.gpu
def test_a_map_on_another_device_is_copied():
    """A device-side table that lies elsewhere is copied, not misread."""
    x = torch.randn(500)
    want = functional.quantize_blockwise(x, codebook=codebooks.create_linear_map())
    got = functional.quantize_blockwise(x.cuda(), codebook=codebooks.create_linear_map())
    assert torch.equal(got.codes.cpu(), want.codes)
