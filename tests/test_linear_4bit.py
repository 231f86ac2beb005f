"""`nn.Linear4bit`: its parameters through moves, casts and copies, and its forward in every mode."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers import SHAPES, bytes_of_state, quantized
from qbits import errors, functional
from qbits.nn import Linear4bit, LinearFP4, LinearNF4
from qbits.schemes import NF4, QuantScheme
from torch import nn
from torch.utils.checkpoint import checkpoint

SCHEMES = ["nf4", "nf4-dq", "fp4", "af4"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_linear_4bit_of_the_quantized_weight(scheme, shape, device):
    linear = nn.Linear(shape[1], shape[0], device=device)
    layer = Linear4bit.from_linear(linear, scheme)
    q = functional.quantize_4bit(linear.weight, codebook=scheme[:3], double_quant=scheme.endswith("dq"))
    x = torch.randn(2, 3, shape[1], device=device)
    assert torch.equal(layer(x), functional.linear_4bit(x, q, linear.bias))
    assert torch.equal(layer.dequantize(), functional.dequantize_4bit(q))
    assert layer.bias is linear.bias and not linear.weight.grad_fn
    assert isinstance(layer, nn.Linear)


def test_parameters_lie_row_by_row_where_blocks_do_not_straddle():
    layer = quantized("nf4-dq", (8, 128))
    shapes = {name: (p.dtype, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": (torch.uint8, (8, 64), False),
        "bias": (torch.float32, (8,), True),
        "weight_absmax": (torch.uint8, (8, 2), False),
        "weight_absmax_scale": (torch.float32, (1,), False),
        "weight_absmax_offset": (torch.float32, (1,), False),
    }
    assert not list(layer.buffers())
    flat = quantized("nf4", (5, 130))
    assert (flat.weight.shape, flat.weight_absmax.shape) == ((325,), (11,))


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad", "autocast"])
def test_forward_changes_nothing(mode):
    """[D32] Same keys, dtypes and bytes before and after; no attribute is set; train and eval are alike."""
    layer = quantized("nf4-dq").train(mode == "train")
    before, attributes = bytes_of_state(layer), dict(vars(layer))
    versions = [p._version for p in layer.parameters()]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.set_grad_enabled(mode != "no_grad"), torch.autocast("cpu", enabled=mode == "autocast"):
        for _ in range(3):
            y = layer(x)
    assert bytes_of_state(layer) == before and dict(vars(layer)) == attributes
    assert [p._version for p in layer.parameters()] == versions
    assert torch.equal(y, layer.eval()(x))


def test_unquantized_forward_names_the_call_that_quantizes():
    layer = Linear4bit(64, 8)
    for call in (lambda: layer(torch.zeros(1, 64)), layer.dequantize, layer.to_linear, layer.record):
        with pytest.raises(errors.NotQuantizedError) as caught:
            call()
        assert str(caught.value) == (
            "qbits::linear_4bit: weight must be quantized, call quantize_() first, got torch.float32 [8, 64]"
        )
    assert layer.quantize_().quantize_() is layer
    assert layer(torch.zeros(1, 64)).shape == (1, 8)


def test_output_dtype_follows_input_and_compute_dtype_is_never_latched():
    """[D32] bfloat16 first, then float32: each call computes in its own dtype."""
    layer = quantized()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        x = torch.randn(2, 64, dtype=dtype)
        assert torch.equal(layer(x), functional.linear_4bit(x, layer.record(), layer.bias))
        assert layer(x).dtype == dtype
    fixed = Linear4bit.from_linear(nn.Linear(64, 8), compute_dtype=torch.bfloat16)
    x = torch.randn(2, 64)
    assert torch.equal(fixed(x), fixed(x.bfloat16()).float())
    with torch.autocast("cpu", dtype=torch.float16):
        assert fixed(x).dtype == torch.float16


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "type": lambda m: m.type(torch.float16),
    "to": lambda m: m.to(torch.bfloat16),
    "share_memory": lambda m: m.share_memory(),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_casts_reach_the_bias_alone(cast, scheme):
    """Codes and statistics keep dtype and bytes, parameters their identity and order."""
    layer = quantized(scheme)
    before, parameters = bytes_of_state(layer), list(layer.named_parameters())
    CASTS[cast](layer)
    after = bytes_of_state(layer)
    assert {k: v for k, v in after.items() if k != "bias"} == {k: v for k, v in before.items() if k != "bias"}
    due = {"half": torch.float16, "type": torch.float16, "bfloat16": torch.bfloat16, "to": torch.bfloat16}
    assert layer.bias.dtype == {**due, "double": torch.float64}.get(cast, torch.float32)
    for (name, p), (name_before, p_before) in zip(layer.named_parameters(), parameters, strict=True):
        assert name == name_before and p is p_before
    assert layer.weight_dtype == torch.float32


def test_casts_of_an_unquantized_layer_reach_the_float_weight():
    layer = Linear4bit(64, 8).bfloat16()
    assert layer.weight.dtype == layer.weight_dtype == torch.bfloat16
    assert layer.quantize_().dequantize().dtype == torch.bfloat16


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back_is_exact():
    layer = quantized("nf4-dq", (40, 256))
    parameters, before = list(layer.parameters()), bytes_of_state(layer)
    layer.cuda()
    assert all(p.is_cuda for p in layer.parameters())
    assert list(map(id, layer.parameters())) == list(map(id, parameters))
    assert layer(torch.randn(2, 256, device="cuda")).is_cuda
    assert bytes_of_state(layer.cpu()) == before


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(saved(m), weights_only=False),
}


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", [Linear4bit, LinearFP4, LinearNF4])
def test_copies_are_whole_and_independent(how, cls):
    layer = cls.from_linear(nn.Linear(64, 8), compute_dtype=torch.bfloat16).eval()
    before = bytes_of_state(layer)
    other = COPIES[how](layer)
    assert type(other) is cls and bytes_of_state(other) == before
    assert (other.scheme, other.compute_dtype, other.training) == (layer.scheme, torch.bfloat16, False)
    other.weight.data.zero_()
    assert bytes_of_state(layer) == before


def test_tied_layers_stay_tied():
    first = quantized()
    second = Linear4bit(64, 8).quantize_()
    for name in ("weight", "weight_absmax"):
        setattr(second, name, getattr(first, name))
    model = nn.ModuleList([first, second])
    copied = copy.deepcopy(model).half()
    assert copied[0].weight is copied[1].weight and copied[0].weight_absmax is copied[1].weight_absmax
    assert len(list(copied.parameters())) == 4


def test_subclasses_fix_the_codebook():
    assert LinearNF4(64, 8).scheme.codebook == "nf4" and LinearFP4(64, 8).scheme.codebook == "fp4"
    assert LinearFP4.from_linear(nn.Linear(64, 8)).scheme == QuantScheme.from_dict({"codebook": "fp4"})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_to_linear_gives_back_a_float_layer(dtype):
    layer = quantized().eval()
    linear = layer.to_linear(dtype)
    assert type(linear) is nn.Linear and linear.weight.requires_grad and not linear.training
    assert torch.equal(linear.weight, layer.dequantize(dtype))
    assert (linear.bias is layer.bias) == (dtype is None)
    assert linear.bias.dtype == (dtype or torch.float32)


def test_requantize_replaces_the_values_in_place():
    layer, weight = quantized("nf4-dq"), torch.randn(8, 64)
    ids = [id(p) for p in layer.parameters()]
    assert layer.requantize_(weight) is layer
    assert [id(p) for p in layer.parameters()] == ids
    want = Linear4bit(64, 8, double_quant=True)
    want.weight.data = weight
    assert torch.equal(layer.dequantize(), want.quantize_().dequantize())
    with pytest.raises(errors.ShapeError) as caught:
        layer.requantize_(weight.t())
    assert str(caught.value) == "qbits::requantize_: weight must have shape [8, 64], got [64, 8]"


def test_a_record_is_copied_or_adopted_where_parameters_are_new():
    q = functional.quantize_4bit(torch.randn(8, 64))
    layer = Linear4bit(64, 8, device="meta")
    layer.load_record(q)
    assert layer.weight.data_ptr() != q.packed.data_ptr() and torch.equal(layer.weight.view(-1), q.packed)
    layer = Linear4bit(64, 8, device="meta")
    layer.load_record(q, adopt=True)
    assert layer.weight.data_ptr() == q.packed.data_ptr() and not layer.weight.is_meta
    other = functional.quantize_4bit(torch.randn(8, 64))
    weight, address = layer.weight, layer.weight.data_ptr()
    layer.load_record(other, adopt=True)
    assert layer.weight is weight and layer.weight.data_ptr() == address != other.packed.data_ptr()
    assert torch.equal(layer.weight.view(-1), other.packed)


def test_reset_parameters_draws_anew():
    layer = quantized()
    before = bytes_of_state(layer)
    layer.reset_parameters()
    after = bytes_of_state(layer)
    assert after.keys() == before.keys() and all(after[k] != before[k] for k in ("weight", "bias"))


REFUSED_ARGUMENTS = {
    "block_size": ({"block_size": 48}, ValueError),
    "codebook": ({"codebook": "nf5"}, ValueError),
    "double_quant": ({"double_quant": 1}, TypeError),
    "compute_dtype": ({"compute_dtype": torch.float64}, TypeError),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_a_bad_constructor_argument_is_refused(case):
    options, error = REFUSED_ARGUMENTS[case]
    with pytest.raises(error, match=rf"qbits::[\w.]+: {case} must .+, got ") as caught:
        Linear4bit(64, 8, **options)
    assert isinstance(caught.value, errors.QbitsError)


def test_from_linear_refuses_what_is_no_float_linear():
    for wrong in (nn.Conv1d(1, 1, 1), quantized()):
        with pytest.raises(errors.ArgumentTypeError) as caught:
            Linear4bit.from_linear(wrong)
        assert str(caught.value) == (
            f"qbits::from_linear: linear must be a float nn.Linear, got {type(wrong).__name__}"
        )


def test_repr_names_the_scheme():
    assert repr(Linear4bit.from_linear(nn.Linear(64, 8, bias=False), NF4(block_size=32))) == (
        "Linear4bit(in_features=64, out_features=8, bias=False, scheme='nf4', block_size=32, "
        "double_quant=False)"
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
def test_compiled_layer_equals_eager_bit_for_bit(dynamic, scheme, device):
    torch._dynamo.reset()
    layer = quantized(scheme, device=device)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 5) if dynamic else (3,):
        x = torch.randn(2, n, 64, device=device, requires_grad=True)
        got, want = compiled(x), layer(x)
        leaves = (x, layer.bias)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_takes_any_batch(strict):
    layer = quantized("nf4-dq").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(11, 64)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_as_plain_ones(use_reentrant):
    model = nn.Sequential(quantized(shape=(64, 64)), nn.ReLU(), quantized("nf4-dq", (64, 64)))
    x = torch.randn(3, 64, requires_grad=True)
    leaves = (x, model[0].bias, model[2].bias)
    plain = torch.autograd.grad(model(x).pow(2).sum(), leaves)
    checkpoint(model, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, due) for leaf, due in zip(leaves, plain, strict=True))
    assert all(p.grad is None for name, p in model.named_parameters() if "weight" in name)


def test_a_weight_cannot_be_made_trainable():
    with pytest.raises(RuntimeError, match="floating point"):
        quantized().weight.requires_grad_(True)


@pytest.mark.gpu
def test_forward_is_captured_in_a_cuda_graph():
    layer = quantized("nf4-dq", (128, 256)).cuda()
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))
