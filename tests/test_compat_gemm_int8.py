"""bitsandbytes' products of codes under their own names: int64 sums, and bitsandbytes on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits
from qbits import errors
from qbits.compat.bitsandbytes import functional


def codes(*shape: int, device: str) -> torch.Tensor:
    """Every code, -128 too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A @ B in int64."""
    return (A.cpu().long() @ B.cpu().long()).int()


def test_int8_linear_matmul_is_exact_for_any_rank(device):
    B = codes(7, 33, device=device)
    for shape in ((33,), (5, 33), (2, 3, 33), (0, 33)):
        A = codes(*shape, device=device)
        got = functional.int8_linear_matmul(A, B)
        assert torch.equal(got.cpu(), product(A, B.t()))
        out = torch.empty_like(got)
        assert functional.int8_linear_matmul(A, B, out=out) is out
        assert torch.equal(out, got)


def test_igemm_honours_views_and_flags(device):
    A, B = codes(5, 33, device=device), codes(33, 7, device=device)
    want = product(A, B)
    assert torch.equal(functional.igemm(A, B).cpu(), want)
    for left, turned_left in ((A, False), (A.t().contiguous(), True)):
        for right, turned_right in ((B, False), (B.t().contiguous(), True)):
            got = functional.igemm(left, right, transposed_A=turned_left, transposed_B=turned_right)
            assert torch.equal(got.cpu(), want)
    assert torch.equal(functional.igemm(A.t().contiguous().t(), B.t().contiguous().t()).cpu(), want)


def test_igemm_of_three_dimensions(device):
    A, B = codes(3, 5, 33, device=device), codes(33, 7, device=device)
    assert torch.equal(functional.igemm(A, B).cpu(), product(A, B))
    batches = codes(3, 33, 7, device=device)
    assert torch.equal(functional.igemm(A, batches).cpu(), product(A, batches))
    other = codes(3, 5, 8, device=device)
    want = torch.einsum("bsi,bso->io", A.cpu().long(), other.cpu().long()).int()
    assert torch.equal(functional.igemm(A, other).cpu(), want)


def test_batched_igemm_multiplies_each_pair(device):
    A, B = codes(3, 5, 33, device=device), codes(3, 33, 7, device=device)
    want = product(A, B)
    assert torch.equal(functional.batched_igemm(A, B).cpu(), want)
    turned = A.mT.contiguous(), B.mT.contiguous()
    got = functional.batched_igemm(*turned, transposed_A=True, transposed_B=True)
    assert torch.equal(got.cpu(), want)
    with pytest.raises(errors.ShapeError, match=r"^qbits::batched_igemm: A and B must be matrices"):
        functional.batched_igemm(A, B[:2])


@pytest.mark.parametrize("bias", [None, torch.float16, torch.float32])
def test_int8_mm_dequant_is_the_product_with_scales(device, bias):
    """The sums and the scales apart give what the fused product gives, rounded to float16."""
    A, B = codes(6, 40, device=device), codes(9, 40, device=device)
    rows, columns = torch.rand(6, device=device) * 4, torch.rand(9, device=device) * 4
    addend = None if bias is None else torch.randn(9, device=device).to(bias)
    got = functional.int8_mm_dequant(functional.int8_linear_matmul(A, B), rows, columns, bias=addend)
    wide = None if addend is None else addend.float().cpu().numpy()
    operands = (t.cpu().numpy() for t in (A, B, rows, columns))
    want = reference.gemm_int8(*operands, wide)
    assert_same_bits(got, np.asarray(reference.round_to(want, "float16")))
    out = torch.empty_like(got)
    assert (
        functional.int8_mm_dequant(functional.int8_linear_matmul(A, B), rows, columns, out=out, bias=addend)
        is out
    )
    assert torch.equal(out, got)


def test_products_agree_with_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    A, B = codes(6, 40, device="cpu"), codes(9, 40, device="cpu")
    theirs = bitsandbytes.functional.int8_linear_matmul(A, B)
    ours = functional.int8_linear_matmul(A, B)
    assert torch.equal(ours, theirs)
    rows, columns, bias = torch.rand(6) * 4, torch.rand(9) * 4, torch.randn(9).half()
    theirs = bitsandbytes.functional.int8_mm_dequant(theirs, rows, columns, bias=bias)
    ours = functional.int8_mm_dequant(ours, rows, columns, bias=bias)
    # its factor is 1.8e-5 too large, and it rounds more often
    assert torch.allclose(ours.float(), theirs.float(), rtol=2.0**-10 + 2e-5, atol=2.0**-10)


def test_refusals_name_what_is_wrong(device):
    A = codes(2, 8, device=device)
    sums = functional.int8_linear_matmul(A, A)
    one, two = torch.ones(1, device=device), torch.ones(2, device=device)
    for call, kind, sentence in (
        (lambda: functional.int8_linear_matmul(A, A, dtype=torch.float16), errors.DtypeError,
         "int8_linear_matmul: dtype must be torch.int32, got torch.float16"),
        (lambda: functional.int8_linear_matmul(A, A[0]), errors.ShapeError,
         "int8_linear_matmul: A and B must have shapes [*, K] and [N, K], got shapes [2, 8] and [8]"),
        (lambda: functional.int8_linear_matmul(A, A, out=sums[:1]), errors.ShapeError,
         "int8_linear_matmul: out must have shape [2, 2], got [1, 2]"),
        (lambda: functional.int8_linear_matmul(A, A, out=sums.float()), errors.DtypeError,
         "int8_linear_matmul: out must be torch.int32, got torch.float32"),
        (lambda: functional.int8_mm_dequant(A, two, two), errors.DtypeError,
         "int8_mm_dequant: A must be torch.int32, got torch.int8"),
        (lambda: functional.int8_mm_dequant(sums, one, two), errors.ShapeError,
         "int8_mm_dequant: row_stats must have 2 elements, got 1"),
        (lambda: functional.igemm(A, A), errors.ShapeError,
         "igemm: A and B must be matrices that can be multiplied, got shapes [2, 8] and [2, 8]"),
    ):  # fmt: skip
        with pytest.raises(kind) as refusal:
            call()
        assert str(refusal.value) == f"qbits::{sentence}"
