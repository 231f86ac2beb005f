"""`prepare_for_eval` of SwitchBack layers: exact, reversible, safe through state_dicts, moves and modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from layers import bytes_of_state
from qbits import errors, ops
from qbits.errors import QbitsWarning
from qbits.nn import SwitchBackLinear, prepare_for_eval, unprepare
from torch import nn

forms = pytest.mark.parametrize("vectorwise", [False, True])


def made(vectorwise: bool = True, device: str = "cpu", **options: Any) -> SwitchBackLinear:
    return SwitchBackLinear(64, 8, vectorwise=vectorwise, min_rows=0, device=device, **options).eval()


@forms
@pytest.mark.parametrize("keep_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_prepared_forward_has_the_same_bits(vectorwise, keep_weight, bias, device):
    """[D26, D27]"""
    layer = made(vectorwise, device, bias=bias)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 64, device=device, dtype=dtype)
        want = layer.unprepare()(x)
        with torch.autocast(device, dtype=torch.float16):
            narrow = layer(x)
        assert layer.prepare_for_eval() is layer and layer.is_prepared
        assert torch.equal(layer(x), want)
        with torch.no_grad():
            assert torch.equal(layer(x), want)
        with torch.autocast(device, dtype=torch.float16):
            assert torch.equal(layer(x), narrow) and narrow.dtype == torch.float16
    layer.prepare_for_eval(keep_weight=keep_weight)
    assert torch.equal(layer(x), want) and layer(x[0, 0]).shape == (8,)
    quantize = ops.quantize_rowwise if vectorwise else ops.quantize_global
    if keep_weight:
        codes, scales = quantize(layer.weight)
        assert torch.equal(layer.W_int8, codes) and torch.equal(layer.state_W, scales)
    assert layer.state_W.shape == ((8,) if vectorwise else (1,)) and layer.state_W.dtype == torch.float32


@forms
def test_prepared_forward_is_differentiable_in_input_and_bias(vectorwise, device):
    """The reference returned a detached result."""
    layer = made(vectorwise, device).prepare_for_eval(keep_weight=False)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 64, device=device, dtype=dtype, requires_grad=True)
        y = layer(x)
        grad = torch.randn_like(y)
        got_x, got_bias = torch.autograd.grad(y, (x, layer.bias), grad)
        decode = ops.dequantize_rowwise if vectorwise else ops.dequantize_global
        weight = decode(layer.W_int8, layer.state_W, dtype)
        want = (grad.double() @ weight.double(), grad.double().sum((0, 1)))
        for got, due in zip((got_x, got_bias), want, strict=True):
            error = (got.double() - due).abs().max()
            assert error <= due.abs().max() * (torch.finfo(got.dtype).eps + 8 * 2**-24)
        assert (got_x.dtype, got_bias.dtype) == (dtype, torch.float32)


def test_threshold_uses_the_weight_while_it_is_there(device):
    layer = made(device=device, threshold=2.0)
    x = torch.randn(5, 64, device=device) * 2
    want = layer(x)
    assert torch.equal(layer.prepare_for_eval()(x), want)
    weight = layer.weight.detach()
    layer.prepare_for_eval(keep_weight=False)
    mask = (x.abs() >= 2).any(0)
    change = (x * mask) @ (weight - ops.dequantize_rowwise(layer.W_int8, layer.state_W, torch.float32)).t()
    torch.testing.assert_close(want - layer(x), change, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_with_the_weight_kept_the_state_dict_stays(training):
    """[D26] Idempotent, exact to undo, and training un-prepares by itself."""
    layer = made().train(training)
    before, weight = bytes_of_state(layer), layer.weight
    for _ in range(2):
        layer.prepare_for_eval()
        assert bytes_of_state(layer) == before and layer.weight is weight
    layer.eval()
    assert layer.is_prepared
    layer.train()
    assert not layer.is_prepared and layer.W_int8 is None and layer.state_W is None
    layer.prepare_for_eval().unprepare().unprepare()
    assert not layer.is_prepared and layer.weight is weight and bytes_of_state(layer) == before


def test_eval_after_steps_of_a_prepared_layer_is_fresh():
    """A layer that is prepared in training mode trains on, and eval() takes the weight of then."""
    layer = made().train().prepare_for_eval()
    x = torch.randn(3, 64)
    layer(x).square().sum().backward()
    with torch.no_grad():
        layer.weight -= layer.weight.grad
    want = made()
    want.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), want(x)) and layer.is_prepared


def test_without_the_weight_the_state_dict_holds_the_codes():
    """[D26] The reference's keys."""
    layer, tied = made(), nn.Linear(64, 8)
    tied.weight = layer.weight
    layer.prepare_for_eval(keep_weight=False)
    assert layer.weight is None and tied.weight is not None
    state = layer.state_dict()
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == {
        "bias": (torch.float32, (8,)),
        "W_int8": (torch.int8, (8, 64)),
        "state_W": (torch.float32, (8,)),
    }
    assert layer.prepare_for_eval() is layer and layer.prepare_for_eval(keep_weight=False) is layer
    assert "weight" not in dict(layer.named_parameters())


def test_a_layer_without_its_weight_refuses_to_train_and_says_why():
    layer = made().prepare_for_eval(keep_weight=False).train()
    x = torch.randn(3, 64)
    words = (
        "qbits::switchback_linear: weight must be there to train, call unprepare() first, "
        "got a layer that was prepared without it"
    )
    with pytest.raises(errors.NotQuantizedError) as caught:
        layer(x)
    assert str(caught.value) == words
    with torch.no_grad():
        output = layer(x)
    assert torch.equal(output, layer.eval()(x))


@forms
def test_a_lost_weight_comes_back_decoded_with_a_warning(vectorwise):
    layer = made(vectorwise, dtype=torch.bfloat16)
    layer.prepare_for_eval(keep_weight=False)
    codes, scales, linear = layer.W_int8, layer.state_W, layer.to_linear()
    with pytest.warns(QbitsWarning, match="weight must be kept to come back exactly, got its int8 codes"):
        layer.unprepare()
    decode = ops.dequantize_rowwise if vectorwise else ops.dequantize_global
    assert torch.equal(linear.weight, layer.weight) and linear.bias is layer.bias
    assert torch.equal(layer.weight, decode(codes, scales, torch.bfloat16)) and layer.weight.requires_grad
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.train()(torch.randn(3, 64)).sum().backward()


@forms
@pytest.mark.parametrize("source", ["weight", "codes"])
@pytest.mark.parametrize("target", ["float", "prepared", "codes"])
@pytest.mark.parametrize("assign", [False, True])
def test_either_key_set_loads_into_either_state(vectorwise, source, target, assign):
    """Strict included; codes become the layer's, a weight is quantized where the layer is prepared."""
    given = made(vectorwise)
    x = torch.randn(3, 64)
    want = given(x)
    if source == "codes":
        given.prepare_for_eval(keep_weight=False)
    layer = made(vectorwise)
    if target != "float":
        layer.prepare_for_eval(keep_weight=target == "prepared")
    result = layer.load_state_dict(copy.deepcopy(given.state_dict()), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(layer(x), want)
    assert layer.is_prepared == (source == "codes" or target != "float")
    assert (layer.weight is None) == (source == "codes")
    assert bytes_of_state(layer) == bytes_of_state(given)


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_and_zero_dimensional_scales_are_widened(vectorwise, dtype):
    given = made(vectorwise).prepare_for_eval(keep_weight=False)
    state = given.state_dict()
    state["state_W"] = state["state_W"].to(dtype)
    if not vectorwise:
        state["state_W"] = state["state_W"].reshape(())
    layer = made(vectorwise)
    layer.load_state_dict(state)
    assert layer.state_W.dtype == torch.float32 and layer.state_W.shape == given.state_W.shape
    assert torch.equal(layer.state_W, given.state_W.to(dtype).float())


BROKEN = {
    "codes that are floats": (
        {"W_int8": torch.zeros(8, 64)},
        errors.CheckpointFormatError,
        "qbits::load: W_int8 must be int8, got torch.float32",
    ),
    "no scales": (
        {"state_W": None},
        errors.CheckpointFormatError,
        "qbits::load: state_W must hold the scales of W_int8, got NoneType",
    ),
    "integer scales": (
        {"state_W": torch.zeros(8, dtype=torch.int32)},
        errors.CheckpointFormatError,
        "qbits::load: state_W must hold the scales of W_int8, got torch.int32",
    ),
    "another shape": (
        {"W_int8": torch.zeros(8, 63, dtype=torch.int8)},
        RuntimeError,
        r"size mismatch for W_int8: copying a param with shape \(8, 63\)",
    ),
    "scales of the other form": (
        {"state_W": torch.zeros(1)},
        RuntimeError,
        r"size mismatch for state_W: copying a param with shape \(1,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_and_changes_nothing(case):
    changes, error, words = BROKEN[case]
    state = {**made().prepare_for_eval(keep_weight=False).state_dict(), **changes}
    layer = made()
    before = bytes_of_state(layer)
    with pytest.raises(error, match=words):
        layer.load_state_dict({key: value for key, value in state.items() if value is not None})
    assert bytes_of_state(layer) == before and not layer.is_prepared


def test_missing_and_unexpected_keys_are_torch_s_own_errors():
    layer, state = made(), made().state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "W_int8", "state_W"'):
        made().prepare_for_eval(keep_weight=False).load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "W_int8"'):
        layer.load_state_dict({**state, "W_int8": torch.zeros(8, 64, dtype=torch.int8)})


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "to": lambda m: m.to(torch.bfloat16),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("keep_weight", [False, True])
def test_casts_leave_codes_and_scales_alone(cast, keep_weight):
    """[D26]"""
    layer = made().prepare_for_eval(keep_weight=keep_weight)
    codes, scales = layer.W_int8.clone(), layer.state_W.clone()
    CASTS[cast](layer)
    assert torch.equal(layer.W_int8, codes) and torch.equal(layer.state_W, scales)
    due = {"half": torch.float16, "type": torch.float16, "bfloat16": torch.bfloat16, "to": torch.bfloat16}
    assert layer.bias.dtype == due.get(cast, torch.float32)
    assert not keep_weight or layer.weight.dtype == layer.bias.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("keep_weight", [False, True])
def test_moving_to_the_gpu_and_back_is_exact(keep_weight):
    layer = made().prepare_for_eval(keep_weight=keep_weight)
    before, codes = bytes_of_state(layer), layer.W_int8
    layer.cuda()
    assert layer.W_int8.is_cuda and layer.state_W.is_cuda and layer(torch.randn(3, 64, device="cuda")).is_cuda
    assert bytes_of_state(layer.cpu()) == before and torch.equal(layer.W_int8, codes)


def test_the_whole_model_by_function_or_by_apply():
    model = nn.Sequential(made(), nn.ReLU(), nn.Sequential(SwitchBackLinear(8, 4), nn.Linear(4, 2))).eval()
    x = torch.randn(3, 64)
    want = model(x)
    assert prepare_for_eval(model) is model and model[0].is_prepared and model[2][0].is_prepared
    assert torch.equal(model(x), want)
    assert unprepare(model) is model and not model[0].is_prepared
    model.apply(lambda m: m.prepare_for_eval() if hasattr(m, "prepare_for_eval") else None)
    assert model[0].is_prepared and torch.equal(model(x), want)
    prepare_for_eval(model, keep_weight=False)
    assert model[0].weight is None and torch.equal(model(x), want)


def test_a_meta_layer_takes_codes():
    source = made().prepare_for_eval(keep_weight=False)
    layer = SwitchBackLinear(64, 8, device="meta").eval()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), source(x)) and layer.weight is None
