"""bitsandbytes' `Int8Params` and `Linear8bitLt`: moves, copies, pieces, state_dicts, and the live state."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers import bytes_of_state
from qbits import errors, functional, nn, ops
from qbits.compat import bitsandbytes as bnb
from qbits.compat.bitsandbytes.nn import Int8Params, Linear8bitLt
from qbits.compat.bitsandbytes.nn.modules import maybe_rearrange_weight


def inputs(*shape: int, **options: Any) -> torch.Tensor:
    x = torch.randn(shape, **options)
    x.view(-1, shape[-1])[0, 5] = 30.0
    return x


def frozen(N: int = 8, K: int = 64, threshold: float = 6.0, **options: Any) -> Linear8bitLt:
    return Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold, **options)


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ------------------------------------------------------------------------------------------------- Int8Params


def test_attributes_are_the_instance_s_own_and_carry_over():
    """[D33]"""
    p = Int8Params(torch.randn(8, 64), nonsense=1)
    assert p.requires_grad and p.CB is None and p.SCB is None
    trained = Int8Params(torch.randn(8, 64), has_fp16_weights=True)
    assert not p.has_fp16_weights and trained.has_fp16_weights
    codes, scales = ops.quantize_rowwise(torch.randn(8, 64))
    q = Int8Params(codes, requires_grad=True, SCB=scales)
    assert q.SCB is scales and torch.equal(q.CB, codes) and not q.requires_grad
    again = Int8Params(q.data, requires_grad=False, **vars(q))
    assert again.SCB is scales and type(again) is Int8Params


MOVES = {
    "device": lambda p: p.to("cpu"),
    "device and dtype": lambda p: p.to("cpu", torch.float16),
    "keyword": lambda p: p.to(device="cpu"),
    "cpu": lambda p: p.cpu(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_move_quantizes_from_the_original_precision(move, dtype):
    """[D33] No detour through float16: 1e6 keeps its scale."""
    x = torch.randn(8, 64, dtype=dtype)
    x[3] *= 1e3 if dtype == torch.float16 else 1e6
    p = Int8Params(x, requires_grad=True)
    codes, scales = ops.quantize_rowwise(x)
    assert MOVES[move](p) is p and p.dtype == torch.int8 and not p.requires_grad
    assert torch.equal(p.data, codes) and torch.equal(p.SCB, scales) and torch.equal(p.CB, codes)
    moved = p.to("cpu")
    assert moved is not p and torch.equal(moved.data, codes) and torch.equal(moved.SCB, scales)


def test_casts_and_meta_quantize_nothing():
    p = Int8Params(torch.randn(8, 64), requires_grad=False)
    for cast, dtype in ((p.half, torch.float16), (p.bfloat16, torch.bfloat16), (p.float, torch.float32)):
        other = cast()
        assert type(other) is Int8Params and other.dtype == dtype and other.SCB is None
    assert p.to("meta").is_meta and p.to("meta").SCB is None
    q = Int8Params(torch.randn(8, 64)).to("cpu")
    half = q.half()
    assert half.dtype == torch.int8 and half.SCB.dtype == torch.float32 and torch.equal(half.data, q.data)
    meta = q.to("meta")
    assert meta.is_meta and meta.SCB.is_meta and not q.SCB.is_meta
    trained = Int8Params(torch.randn(8, 64), has_fp16_weights=True).to("cpu")
    assert trained.dtype == torch.float32 and trained.requires_grad and trained.has_fp16_weights


@pytest.mark.gpu
def test_codes_and_scales_move_together():
    p = Int8Params(torch.randn(8, 64)).cuda()
    assert p.is_cuda and p.SCB.is_cuda
    back = p.cpu()
    assert back.SCB.device.type == "cpu" and torch.equal(back.cuda().data, p.data)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["frozen", "float", "trained"])
def test_copies_keep_class_and_attributes(how, kind):
    p = Int8Params(torch.randn(8, 64), requires_grad=kind == "trained", has_fp16_weights=kind == "trained")
    p = p.to("cpu") if kind == "frozen" else p
    q = COPIES[how](p)
    assert type(q) is Int8Params and q.has_fp16_weights == p.has_fp16_weights
    assert torch.equal(q.data, p.data) and q.requires_grad == p.requires_grad
    assert (q.SCB is None) == (p.SCB is None) and (kind != "frozen" or torch.equal(q.SCB, p.SCB))
    assert (q.data_ptr() == p.data_ptr()) == (how == "copy")


def test_pieces_carry_their_rows_scales():
    p = Int8Params(torch.randn(8, 64)).to("cpu")
    for pieces in (torch.chunk(p, 4), p.chunk(4), torch.split(p, 2), p.split([2, 2, 2, 2])):
        assert len(pieces) == 4 and all(type(piece) is Int8Params for piece in pieces)
        assert torch.equal(torch.cat([piece.SCB for piece in pieces]), p.SCB)
        x = torch.randn(3, 64)
        whole = bnb.matmul(x, p)
        assert torch.equal(torch.cat([bnb.matmul(x, piece) for piece in pieces], 1), whole)
    columns = p.chunk(2, dim=1)
    assert all(torch.equal(piece.SCB, p.SCB) and piece.shape == (8, 32) for piece in columns)


# ----------------------------------------------------------------------------------------------- Linear8bitLt


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_frozen_layer_quantizes_when_it_moves(threshold, device):
    layer = frozen(threshold=threshold)
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    with pytest.raises(errors.NotQuantizedError) as caught:
        layer(torch.zeros(1, 64))
    assert str(caught.value) == (
        "qbits::matmul_int8: weight must be quantized, call .to(device) or quantize_() first, got "
        "torch.float32 [8, 64]"
    )
    held = layer.weight
    assert layer.to(device) is layer and type(layer.weight) is Int8Params and isinstance(layer, nn.Linear8bit)
    assert device != "cpu" or layer.weight is held
    codes, scales = ops.quantize_rowwise(weight.to(device))
    x = inputs(2, 3, 64, device=device)
    want = functional.matmul_int8(x, codes, scales, bias.to(device), threshold=threshold)
    assert torch.equal(layer(x), want) and layer.state.idx.tolist() == [5] if threshold else True
    assert layer.state.use_pool == (threshold > 0) and layer.state.outlier_pool is None


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_default_layer_trains(threshold, device):
    layer = Linear8bitLt(64, 8, threshold=threshold).to(device)
    assert layer.weight.dtype == torch.float32 and layer.weight.requires_grad and layer.weight.is_leaf
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = inputs(3, 64, device=device)
    y = layer(x)
    assert torch.equal(y, functional.matmul_int8(x, layer.weight, None, layer.bias, threshold=threshold))
    y.sum().backward()
    grad = layer.weight.grad.clone()
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.grad, grad.bfloat16())
    assert type(layer.weight) is Int8Params and layer(x).dtype == torch.float32


def test_early_positional_order_is_understood():
    with pytest.warns(errors.QbitsWarning, match="memory_efficient_backward must be left out, got True"):
        layer = Linear8bitLt(64, 8, True, False, True, 6.0, [1], "cpu")
    assert layer.threshold == 6.0 and layer.index == [1] and not layer.state.has_fp16_weights
    plain = Linear8bitLt(64, 8, True, False, False, 6.0)
    assert plain.threshold == 6.0 and plain.index is None
    with pytest.raises(TypeError, match="at most 7 positional arguments, got 8"):
        Linear8bitLt(64, 8, True, False, 6.0, None, "cpu", None)


def test_state_is_a_live_view_of_the_layer():
    """[D35] Nothing moves between weight and state; init_8bit_state has nothing to do."""
    layer = frozen().to("cpu")
    state, codes, scales = layer.state, layer.weight.data.clone(), layer.weight.SCB.clone()
    layer.init_8bit_state()
    assert torch.equal(state.CB, codes) and torch.equal(state.SCB, scales) and layer.weight.SCB is state.SCB
    layer.eval()
    assert not state.is_training and state.threshold == 6.0 and not state.has_fp16_weights
    state.reset_grads()
    assert torch.equal(layer.weight.CB, codes) and torch.equal(layer.state.SCB, scales)
    state.SCB = scales * 2
    state.CB = -codes
    assert torch.equal(layer.weight.data, -codes) and torch.equal(layer.weight.SCB, scales * 2)
    state.threshold = 3.0
    assert layer.threshold == 3.0 and layer.state.threshold == 3.0


def test_adapters_may_rebuild_the_weight():
    """As merging libraries do: a new Int8Params in the layer's place, then reset_grads."""
    layer, weight = frozen().to("cpu"), torch.randn(8, 64)
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=layer.weight.has_fp16_weights).to(
        "cpu"
    )
    layer.state.reset_grads()
    x = inputs(3, 64)
    want = functional.matmul_int8(x, *ops.quantize_rowwise(weight), layer.bias, threshold=6.0)
    assert torch.equal(layer(x), want)


def test_forward_changes_no_parameter_and_the_bias_keeps_its_dtype():
    """[D35]"""
    layer = frozen().to("cpu").eval()
    before, weight = bytes_of_state(layer), layer.weight
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert layer(inputs(2, 64).to(dtype)).dtype == dtype
    assert bytes_of_state(layer) == before and layer.weight is weight and layer.bias.dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_module_casts_reach_the_bias_alone(cast):
    layer = frozen().to("cpu")
    weight, before = layer.weight, bytes_of_state(layer)
    getattr(layer, cast)()
    after = bytes_of_state(layer)
    assert layer.weight is weight and layer.bias.dtype != torch.float32
    assert all(after[key] == before[key] for key in ("weight", "SCB", "weight_format"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copied_layers_own_weight_and_state(how):
    layer = frozen().to("cpu")
    other = COPIES[how](layer)
    x = inputs(3, 64)
    assert type(other) is Linear8bitLt and torch.equal(other(x), layer(x))
    other.state.SCB.zero_()
    other.state.use_pool = False
    assert bool(layer.state.SCB.any()) and layer.state.use_pool


@pytest.mark.parametrize("is_quantized", [False, True])
def test_state_dict_has_the_reference_s_keys_and_every_layout_loads(is_quantized):
    """[D35] Also into a layer that is still float, and the same before and after forwards."""
    source = frozen().to("cpu")
    state = source.state_dict()
    assert list(state) == ["weight", "bias", "SCB", "weight_format"]
    assert (state["weight_format"].dtype, state["weight_format"].shape) == (torch.uint8, ())
    x = inputs(3, 64)
    want = source(x)
    assert bytes_of_state(source) == {k: v for k, v in bytes_of_state(source).items()}
    native = nn.Linear8bit(64, 8)
    native.load_state_dict(state)
    old = {key: value for key, value in state.items() if key != "weight_format"}
    for layout in (state, native.state_dict(), old):
        target = frozen()
        target = target.to("cpu") if is_quantized else target
        target.load_state_dict(layout)
        assert torch.equal(target(x), want) and bytes_of_state(target) == bytes_of_state(source)
    codes_alone = {key: value for key, value in state.items() if key != "SCB"}
    with pytest.raises(errors.CheckpointFormatError, match=r"weight must stand beside weight_scale or SCB"):
        target.load_state_dict(codes_alone)
    floats = torch.nn.Linear(64, 8)
    target.load_state_dict(floats.state_dict())
    assert torch.equal(target.weight.data, ops.quantize_rowwise(floats.weight.detach())[0])


def test_meta_layer_takes_a_checkpoint_and_moves():
    want, x = frozen().to("cpu"), inputs(3, 64)
    empty = copy.deepcopy(want).to("meta").to_empty(device="cpu")
    assert type(empty.weight) is Int8Params and empty.weight.SCB.shape == (8,)
    empty.load_state_dict(want.state_dict())
    fresh = frozen(device="meta")
    fresh.load_state_dict(want.state_dict(), assign=True)
    for layer in (empty, fresh):
        assert torch.equal(layer.to("cpu")(x), want(x))
    unquantized = frozen(device="meta").to_empty(device="cpu")
    assert type(unquantized.weight) is Int8Params and unquantized.weight.SCB is None


def test_tied_weights_stay_tied():
    first, second = frozen().to("cpu"), frozen()
    second.weight = first.weight
    model = copy.deepcopy(torch.nn.ModuleList([first, second])).half()
    assert model[0].weight is model[1].weight
    trained, other = Linear8bitLt(64, 8), Linear8bitLt(64, 8)
    other.weight = trained.weight
    pair = torch.nn.ModuleList([trained, other])
    pair.to("cpu").half()
    assert pair[0].weight is pair[1].weight


def test_from_linear_and_quantize_make_the_compat_class():
    linear = torch.nn.Linear(64, 8)
    layer = Linear8bitLt.from_linear(linear, "llm-int8")
    assert type(layer.weight) is Int8Params and layer.bias is linear.bias
    x = inputs(3, 64)
    assert torch.equal(layer(x), nn.Linear8bit.from_linear(linear, "llm-int8")(x))
    assert frozen().quantize_().weight.dtype == torch.int8


@pytest.mark.parametrize("trains", [False, True])
def test_compiled_layer_equals_eager_bit_for_bit(trains, device):
    torch._dynamo.reset()
    layer = Linear8bitLt(64, 8, has_fp16_weights=trains, threshold=6.0).to(device)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(3, 64, device=device).requires_grad_()
    got, want = compiled(x), layer(x)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y.pow(2).sum(), (x, layer.bias)) for y in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rearranging_takes_the_format_out_and_leaves_rows():
    """The load pre-hook by its own name and arguments."""
    codes = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    rest: tuple[Any, ...] = ({}, True, [], [], [])
    for format in ("row", 0, torch.tensor(0, dtype=torch.uint8)):
        state = {"a.weight": codes, "a.weight_format": format}
        maybe_rearrange_weight(state, "a.", *rest)
        assert list(state) == ["a.weight"] and state["a.weight"] is codes
    state = {"a.weight": codes, "a.SCB": torch.ones(8), "a.weight_format": torch.tensor(2, dtype=torch.uint8)}
    maybe_rearrange_weight(state, "a.", *rest)
    # place 4 of the first Turing tile holds row 2, column 0
    assert state["a.weight"][2, 0] == codes.view(-1)[4] and state["a.weight"].shape == (8, 64)
    nothing: dict[str, Any] = {"a.weight_format": 7}
    maybe_rearrange_weight(nothing, "a.", *rest)
    assert nothing == {"a.weight_format": 7}
    with pytest.raises(errors.CheckpointFormatError, match="weight_format must be one of"):
        maybe_rearrange_weight({"a.weight": codes, "a.weight_format": 7}, "a.", *rest)
