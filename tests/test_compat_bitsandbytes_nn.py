"""The compat `Params4bit` and `Linear4bit`: moves, copies, pieces and state_dicts."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers import native_of
from qbits import errors, functional
from qbits.compat import bitsandbytes as bnb
from qbits.compat.bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from torch import nn

F = bnb.functional


def layer_of(quant_type: str = "nf4", N: int = 8, K: int = 64, **options: Any) -> Linear4bit:
    return Linear4bit(K, N, quant_type=quant_type, **options)


def attributes(p: Params4bit) -> dict[str, Any]:
    return {name: value for name, value in vars(p).items() if name not in ("quant_state", "module")}


# ------------------------------------------------------------------------------------------------- Params4bit


def test_attributes_are_exactly_the_keywords():
    p = Params4bit(torch.randn(8, 64), blocksize=None, quant_type="nf4", nonsense=1)
    assert set(vars(p)) == {
        "blocksize",
        "bnb_quantized",
        "compress_statistics",
        "module",
        "quant_state",
        "quant_storage",
        "quant_type",
    }
    assert p.blocksize == 64 and not p.requires_grad and isinstance(p, nn.Parameter)
    module = nn.Linear(1, 1)
    again = Params4bit(p.data, requires_grad=False, **{**vars(p), "module": module})
    assert again.module is module and again.quant_type == "nf4"
    del module
    assert again.module is None  # a weak reference


MOVES = {
    "device": lambda p: p.to("cpu"),
    "device and dtype": lambda p: p.to("cpu", torch.float32),
    "keyword": lambda p: p.to(device="cpu"),
    "other": lambda p: p.to(torch.zeros(1)),
    "cpu": lambda p: p.cpu(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_move_quantizes_from_the_original_precision(move, dtype):
    x = torch.randn(8, 64, dtype=dtype)
    layer = layer_of()
    p = Params4bit(x, quant_type="nf4", module=layer)
    moved = MOVES[move](p)
    assert moved is p and p.bnb_quantized and p.shape == (256, 1) and p.dtype == torch.uint8
    want = functional.quantize_4bit(x, double_quant=True)
    assert torch.equal(p.data.view(-1), want.packed) and torch.equal(p.absmax, want.absmax)
    asked = torch.float32 if move in ("device and dtype", "other") else dtype
    assert p.quant_state.dtype == asked and layer.quant_state is p.quant_state


def test_a_float_parameter_is_cast_by_a_dtype_alone_and_stays_float_on_meta():
    p = Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=torch.bfloat16)
    for cast, dtype in ((p.half, torch.float16), (p.bfloat16, torch.bfloat16), (p.float, torch.float32)):
        other = cast()
        assert type(other) is Params4bit and other.dtype == dtype and not other.bnb_quantized
        assert attributes(other) == attributes(p)
    meta = p.to("meta")
    assert type(meta) is Params4bit and meta.is_meta and not meta.bnb_quantized and meta.quant_state is None


def test_a_cast_of_a_quantized_parameter_changes_the_decoded_dtype_alone():
    for storage in (torch.uint8, torch.float32):
        p = Params4bit(torch.randn(8, 64), quant_storage=storage).to("cpu")
        before = p.data.view(-1).view(torch.uint8).clone()
        other = p.half()
        assert other.dtype == storage and torch.equal(other.data.view(-1).view(torch.uint8), before)
        assert other.quant_state.dtype == torch.float16 and p.quant_state.dtype == torch.float32
        assert other.absmax.dtype == p.absmax.dtype and attributes(other) == attributes(p)


def test_a_move_copies_the_statistics_and_keeps_every_attribute():
    """[D31] No attribute is lost, so a later move cannot quantize bytes again; statistics are not shared."""
    layer = layer_of()
    p = Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=torch.bfloat16, module=layer).to("cpu")
    q = p.to("cpu")
    assert q is not p and type(q) is Params4bit and attributes(q) == attributes(p) and q.module is layer
    assert q.quant_state == p.quant_state and q.absmax.data_ptr() != p.absmax.data_ptr()
    assert torch.equal(q.to("cpu").data.view(torch.int16), p.data.view(torch.int16))
    meta = p.to("meta")
    assert meta.is_meta and meta.bnb_quantized and meta.absmax.is_meta and not p.absmax.is_meta


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back_is_exact():
    p = Params4bit(torch.randn(8, 64), quant_type="nf4").cuda()
    assert p.is_cuda and p.absmax.is_cuda and p.state2.absmax.is_cuda
    back = p.cpu()
    want = Params4bit(torch.empty(0))
    assert type(back) is type(want) and back.absmax.device.type == "cpu"
    again = back.cuda()
    assert torch.equal(again.data, p.data) and again.quant_state == p.quant_state


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: saved(m),
}


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_copies_keep_class_and_attributes(how, is_quantized):
    """[D31]"""
    p = Params4bit(torch.randn(8, 64), quant_type="nf4", quant_storage=torch.float16)
    p = p.to("cpu") if is_quantized else p
    q = COPIES[how](p)
    assert type(q) is Params4bit and attributes(q) == attributes(p) and torch.equal(q.data, p.data)
    assert (q.quant_state == p.quant_state) if is_quantized else q.quant_state is None
    assert (q.data_ptr() == p.data_ptr()) == (how == "copy")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copied_modules_own_their_weight(how):
    layer = layer_of().to("cpu")
    other = COPIES[how](layer)
    assert other.weight.module is other and layer.weight.module is layer
    assert other.quant_state is other.weight.quant_state and other.quant_state == layer.quant_state
    x = torch.randn(2, 64)
    assert torch.equal(other(x), layer(x))
    other.weight.absmax.zero_()
    assert layer.weight.absmax.any()


def test_a_copied_weight_follows_the_copy_of_whatever_module_holds_it():
    holder = nn.Module()
    holder.weight = Params4bit(torch.randn(8, 64), module=holder)
    copied = copy.deepcopy(holder)
    assert copied.weight.module is copied and copy.deepcopy(holder.weight).module is holder


def test_pieces_keep_their_attributes_and_join_to_the_whole():
    p = Params4bit(torch.randn(8, 64), quant_type="nf4").to("cpu")
    want = F.dequantize_4bit(p.data, p.quant_state)
    for pieces in (torch.chunk(p, 4), p.chunk(4), torch.split(p, 64), p.split(64)):
        assert len(pieces) == 4
        assert all(type(c) is Params4bit and attributes(c) == attributes(p) for c in pieces)
        assert all(c.quant_state is p.quant_state for c in pieces)
        joined = torch.cat(pieces)
        assert torch.equal(F.dequantize_4bit(joined, p.quant_state), want)
        with pytest.raises(errors.NotQuantizedError) as caught:
            F.dequantize_4bit(pieces[0], p.quant_state)
        assert str(caught.value) == (
            "qbits::QuantState: packed data must be whole, 256 bytes for shape [8, 64], got 64; join "
            "the pieces first"
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_from_prequantized_fills_every_field(nested, storage):
    """[D31]"""
    packed, state = F.quantize_4bit(
        torch.randn(8, 64), blocksize=128, compress_statistics=nested, quant_storage=storage
    )
    layer = layer_of()
    p = Params4bit.from_prequantized(packed, state.as_dict(packed=True), module=layer)
    assert attributes(p) == {
        "blocksize": 128,
        "compress_statistics": nested,
        "quant_type": "fp4",
        "quant_storage": storage,
        "bnb_quantized": True,
    }
    assert p.module is layer and layer.quant_state is p.quant_state and p.quant_state == state
    assert p.device == packed.device and p.nested_blocksize == (256 if nested else None)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        Params4bit.from_prequantized(packed[:-1], state.as_dict(packed=True))
    assert "data must hold 256 bytes in one row or column for shape [8, 64]" in str(caught.value)


# ------------------------------------------------------------------------------------------------- Linear4bit


@pytest.mark.parametrize("cls, quant_type", [(Linear4bit, "fp4"), (LinearFP4, "fp4"), (LinearNF4, "nf4")])
@pytest.mark.parametrize("compress", [False, True])
def test_layer_quantizes_when_it_moves(cls, quant_type, compress, device):
    layer = cls(64, 8, compress_statistics=compress)
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    assert layer.to(device) is layer and layer.weight.bnb_quantized and layer.weight.module is layer
    q = functional.quantize_4bit(weight.to(device), codebook=quant_type, double_quant=compress)
    x = torch.randn(2, 3, 64, device=device)
    assert torch.equal(layer(x), functional.linear_4bit(x, q, bias.to(device)))
    assert layer.compute_dtype is None and not layer.compute_type_is_set
    assert type(layer).__name__ == cls.__name__ and layer.quant_storage == torch.uint8


def test_unquantized_forward_names_the_call_that_quantizes():
    """[D32] An error, no print and no crash."""
    with pytest.raises(errors.NotQuantizedError) as caught:
        layer_of()(torch.zeros(1, 64))
    assert str(caught.value) == (
        "qbits::linear_4bit: weight must be quantized, call .to(device) or quantize_() first, got "
        "torch.float32 [8, 64]"
    )


def test_forward_changes_nothing_and_computes_in_each_call_s_dtype():
    """[D32] The bias keeps its dtype; the first input decides nothing; eval mode repacks nothing."""
    layer = layer_of().to("cpu").eval()
    before = {k: (v.dtype, v.clone()) for k, v in layer.state_dict().items()}
    attributes_before = dict(vars(layer))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    assert dict(vars(layer)) == attributes_before
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(after[k].dtype == dtype and torch.equal(after[k], v) for k, (dtype, v) in before.items())
    fixed = layer_of(compute_dtype=torch.bfloat16).to("cpu")
    x = torch.randn(2, 64)
    assert fixed.compute_type_is_set and torch.equal(fixed(x), fixed(x.bfloat16()).float())


def test_set_compute_type_follows_wide_inputs_and_keeps_a_given_dtype_on_float16():
    layer = layer_of()
    layer.set_compute_type(torch.zeros(1, dtype=torch.bfloat16))
    assert layer.compute_dtype == torch.bfloat16 and layer.compute_type_is_set
    layer.set_compute_type(torch.zeros(1, dtype=torch.float16))
    assert layer.compute_dtype == torch.bfloat16
    slow = layer_of(compute_dtype=torch.float32)
    with pytest.warns(errors.QbitsWarning, match="compute_dtype must be float16 for speed, got float32"):
        slow.set_compute_type(torch.zeros(1, dtype=torch.float16))
    assert slow.compute_dtype == torch.float32


def test_a_weight_that_sharding_stripped_uses_the_module_s_state():
    layer = layer_of().to("cpu")
    x = torch.randn(2, 64)
    want = layer(x)
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert torch.equal(layer(x), want) and type(layer.weight) is nn.Parameter


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_module_casts_reach_the_bias_alone(cast):
    for storage in (torch.uint8, torch.float32):
        layer = layer_of(quant_storage=storage).to("cpu")
        weight, packed, state = layer.weight, layer.weight.data.clone(), copy.deepcopy(layer.quant_state)
        getattr(layer, cast)()
        assert layer.weight is weight and torch.equal(layer.weight.data, packed)
        assert layer.quant_state == state and layer.quant_state.absmax.dtype == torch.uint8
        assert layer.bias.dtype != torch.float32 or cast == "float"


def test_meta_layer_survives_to_empty_and_takes_a_checkpoint():
    """[D31] Code tables are constants: to_empty cannot lose them."""
    want = layer_of().to("cpu")
    x = torch.randn(2, 64)
    meta = copy.deepcopy(want).to("meta")
    assert meta.weight.is_meta and meta.quant_state.absmax.is_meta
    empty = meta.to_empty(device="cpu")
    assert type(empty.weight) is Params4bit
    assert torch.equal(empty.quant_state.code, want.quant_state.code)
    assert torch.equal(empty.quant_state.state2.code, want.quant_state.state2.code)
    empty.load_state_dict(want.state_dict())
    assert torch.equal(empty(x), want(x))
    fresh = layer_of(device="meta")
    fresh.load_state_dict(want.state_dict(), assign=True)
    assert torch.equal(fresh(x), want(x)) and fresh.weight.module is fresh
    unquantized = layer_of(device="meta").to_empty(device="cpu")
    assert type(unquantized.weight) is Params4bit and not unquantized.weight.bnb_quantized


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_state_dict_has_the_reference_s_keys_and_both_layouts_load(compress, is_quantized):
    source = layer_of(compress_statistics=compress).to("cpu")
    state = source.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if compress else []
    first = ["weight", "bias", "weight.absmax", "weight.quant_map"]
    assert list(state) == [*first, *nested, "weight.quant_state.bitsandbytes__nf4"]
    x = torch.randn(2, 64)
    native = native_of(source).state_dict()
    for layout in (state, native):
        target = layer_of("fp4")  # takes over the type of the checkpoint
        target = target.to("cpu") if is_quantized else target
        target.load_state_dict(layout)
        assert torch.equal(target(x), source(x)) and target.weight.quant_type == "nf4"
        again = target.state_dict()
        assert list(again) == list(state) and all(torch.equal(again[k], v) for k, v in state.items())


def test_float_checkpoint_loads_into_either_state():
    linear = nn.Linear(64, 8)
    plain = layer_of()
    plain.load_state_dict(linear.state_dict())
    assert not plain.weight.bnb_quantized and torch.equal(plain.weight.data, linear.weight)
    layer = layer_of().to("cpu")
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), plain.to("cpu")(x))


def test_tied_weights_stay_tied():
    first, second = layer_of().to("cpu"), layer_of()
    second.weight = first.weight
    model = copy.deepcopy(nn.ModuleList([first, second]))
    assert model[0].weight is model[1].weight
    x = torch.randn(2, 64)
    assert torch.equal(model[0](x) - model[0].bias, first(x) - first.bias)
    model.half()
    assert model[0].weight is model[1].weight
    other = layer_of().to("cpu")
    weight = model[0].weight
    model.load_state_dict({f"{i}.{key}": t for i in (0, 1) for key, t in other.state_dict().items()})
    assert model[0].weight is weight and model[1].weight is weight
    assert torch.equal(model[1].dequantize(), other.dequantize())
    other.weight.data.zero_()
    assert weight.data.any()  # loading copies


@pytest.mark.parametrize("compress", [False, True])
def test_compiled_layer_equals_eager_bit_for_bit(compress):
    torch._dynamo.reset()
    layer = layer_of(compress_statistics=compress).to("cpu")
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 5):
        x = torch.randn(n, 64, requires_grad=True)
        got, want = compiled(x), layer(x)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), (x, layer.bias)) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
