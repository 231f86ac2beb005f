"""bitsandbytes' `matmul` and its state, and the outlier pooler."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from qbits import errors, functional, nn, ops
from qbits.compat import bitsandbytes as bnb
from qbits.compat.bitsandbytes.autograd._functions import GlobalOutlierPooler, MatmulLtState
from qbits.compat.bitsandbytes.nn import Int8Params


def inputs(*shape: int, **options: Any) -> torch.Tensor:
    x = torch.randn(shape, **options)
    x.view(-1, shape[-1])[0, 5] = 30.0
    return x


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ------------------------------------------------------------------------------------------------------ state


def test_state_has_fields_of_its_own():
    """[D33] No class attribute decides for another instance."""
    state, other = MatmulLtState(), MatmulLtState()
    state.threshold, state.has_fp16_weights, state.use_pool = 3.0, False, True
    assert (other.threshold, other.has_fp16_weights, other.is_training, other.use_pool) == (
        0,
        True,
        True,
        False,
    )
    names = ("CB", "SCB", "SB", "SBt", "CBt", "subB", "idx", "outlier_pool")
    assert all(getattr(other, name) is None for name in names)
    flags = ("force_no_igemmlt", "memory_efficient_backward", "has_accumulated_gradients")
    assert not any(getattr(other, name) for name in flags)
    state.CB = state.SCB = state.SBt = torch.zeros(1)
    state.reset_grads()
    assert state.CB is state.SCB is state.SBt is None and state.threshold == 3.0
    copied = copy.deepcopy(state)
    assert copied.threshold == 3.0 and saved(state).threshold == 3.0


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_names_of_tiled_layouts_read_as_none(name):
    with pytest.warns(FutureWarning, match=name):
        assert getattr(MatmulLtState(), name) is None


def test_tile_indices_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="formatB must be a tiled layout, got row"):
        _ = MatmulLtState().tile_indices
    with pytest.raises(AttributeError, match="no attribute 'CxC'"):
        _ = MatmulLtState().CxC


# ----------------------------------------------------------------------------------------------------- matmul


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_float_weight_trains(threshold, device):
    x, weight = inputs(2, 3, 64, device=device), torch.randn(8, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device)
    want = functional.matmul_int8(x, weight, None, bias, threshold=threshold)
    (grad,) = torch.autograd.grad(want.sum(), weight)
    for state in (None, MatmulLtState()):
        y = bnb.matmul(x, weight, state=state, threshold=threshold, bias=bias)
        assert torch.equal(y, want)
        assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], grad)
    assert torch.equal(
        bnb.MatMul8bitLt.apply(x, weight, None, bias, MatmulLtState()), bnb.matmul(x, weight, bias=bias)
    )


def test_a_state_tells_what_was_found_and_no_more(device):
    """[D12] A threshold that is passed holds for the call; codes and outlier columns are told after it."""
    x, weight = inputs(3, 64, device=device), torch.randn(8, 64, device=device)
    state = MatmulLtState()
    y = bnb.matmul(x, weight, state=state, threshold=6.0)
    assert state.threshold == 0.0 and state.idx.tolist() == [5] and state.idx.dtype == torch.int64
    codes, scales = ops.quantize_rowwise(weight)
    assert torch.equal(state.CB, codes) and torch.equal(state.SCB, scales)
    assert not torch.equal(bnb.matmul(x, weight, state=state), y) and state.idx is None
    state.threshold = 6.0
    assert torch.equal(bnb.matmul(x, weight, state=state), y)


def test_no_state_is_shared_and_none_is_trusted(device):
    """[D11, D13] Codes of an earlier call are not used again, whether gradients are kept or not."""
    x, weight = inputs(3, 64, device=device), torch.randn(8, 64, device=device, requires_grad=True)
    state = MatmulLtState()
    y = bnb.matmul(x, weight, state=state)
    y.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    state.CB = state.SCB = None  # a backward never looks at the state
    weight.grad = None
    y.sum().backward()
    assert torch.equal(weight.grad, first)
    state.is_training = False
    with torch.no_grad():
        bnb.matmul(x, weight, state=state)
        weight.mul_(3)
        assert torch.equal(bnb.matmul(x, weight, state=state), bnb.matmul(x, weight.clone()))


def test_frozen_codes_come_from_the_weight_or_the_state(device):
    x, weight = inputs(3, 64, device=device), torch.randn(8, 64, device=device)
    codes, scales = ops.quantize_rowwise(weight)
    want = functional.matmul_int8(x, codes, scales, threshold=6.0)
    state = MatmulLtState()
    state.has_fp16_weights, state.threshold = False, 6.0
    assert torch.equal(bnb.matmul(x, weight, state=state), want)  # quantized in the call
    assert torch.equal(state.CB, codes)
    state.CB, state.SCB = codes, scales
    assert torch.equal(bnb.matmul(x, torch.zeros_like(weight), state=state), want)
    state.CB = None
    assert torch.equal(bnb.matmul(x, codes, state=state), want)
    parameter = Int8Params(codes, requires_grad=False, SCB=scales)
    assert torch.equal(bnb.matmul(x, parameter, threshold=6.0), want)
    with pytest.raises(errors.NotQuantizedError) as caught:
        bnb.matmul(x, codes)
    assert str(caught.value) == "qbits::matmul: B must have its scales in state.SCB or B.SCB, got none"


@pytest.mark.parametrize("strided", [False, True])
def test_out_is_filled(strided, device):
    """[D3]"""
    x, weight = inputs(2, 3, 64, device=device), torch.randn(8, 64, device=device)
    out = torch.zeros(2, 3, 16, device=device)[..., ::2] if strided else torch.zeros(2, 3, 8, device=device)
    assert bnb.matmul(x, weight, out=out, threshold=6.0) is out
    assert torch.equal(out, bnb.matmul(x, weight, threshold=6.0))
    with pytest.raises(RuntimeError) as caught:
        bnb.matmul(x, weight.requires_grad_(), out=out)
    assert str(caught.value) == "qbits::matmul: out must be None where a gradient is recorded, got a tensor"


def test_pool_is_used_only_when_it_is_set_and_asked_for(device):
    x, weight = torch.randn(3, 64, device=device).clamp(-5, 5), torch.randn(8, 64, device=device)
    pool = GlobalOutlierPooler.get_instance()
    pool.initialize()
    pool.add_outliers(torch.tensor([9]), 64)
    want = bnb.matmul(x, weight, threshold=6.0)
    for use_pool, outlier_pool in ((True, None), (False, pool)):
        state = MatmulLtState(outlier_pool=outlier_pool)
        state.use_pool, state.threshold = use_pool, 6.0
        assert torch.equal(bnb.matmul(x, weight, state=state), want)
    state = MatmulLtState(outlier_pool=pool)
    state.use_pool, state.threshold = True, 6.0
    assert not torch.equal(bnb.matmul(x, weight, state=state), want)
    assert state.idx.tolist() == [9] and pool.outliers == {9}
    pool.initialize()


def test_the_pooler_is_one_object():
    with pytest.raises(RuntimeError, match="must come from get_instance"):
        GlobalOutlierPooler()
    assert GlobalOutlierPooler.get_instance() is GlobalOutlierPooler.get_instance()
    assert isinstance(GlobalOutlierPooler.get_instance(), nn.OutlierPool)
