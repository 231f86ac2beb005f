"""`nn.Linear8bit`: parameters through moves, casts and copies, the forward in every mode; `OutlierPool`."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from layers import SHAPES, bytes_of_state, quantized
from qbits import errors, functional, ops
from qbits.nn import Linear8bit, OutlierPool
from qbits.schemes import Int8, LLMInt8
from torch import nn
from torch.utils.checkpoint import checkpoint

SCHEMES = ["int8", "llm-int8"]


def inputs_with_outliers(*shape: int, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(shape, device=device)
    x.view(-1, shape[-1])[0, shape[-1] // 2] = 20.0
    return x


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_matmul_int8_of_the_quantized_weight(scheme, shape, device):
    linear = nn.Linear(shape[1], shape[0], device=device)
    layer = Linear8bit.from_linear(linear, scheme)
    codes, scales = ops.quantize_rowwise(linear.weight.detach())
    x = inputs_with_outliers(2, 3, shape[1], device=device)
    threshold = 6.0 if scheme == "llm-int8" else 0.0
    want = functional.matmul_int8(x, codes, scales, linear.bias, threshold=threshold)
    assert torch.equal(layer(x), want) and layer.threshold == threshold
    assert torch.equal(layer.dequantize(), ops.dequantize_rowwise(codes, scales, torch.float32))
    assert layer.bias is linear.bias and isinstance(layer, nn.Linear)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_trainable_layer_is_the_training_product(threshold, device):
    """Its state_dict is nn.Linear's, and all three gradients flow."""
    layer = Linear8bit(64, 8, threshold=threshold, trainable=True, device=device)
    x = inputs_with_outliers(3, 64, device=device).requires_grad_()
    y = layer(x)
    assert torch.equal(y, functional.matmul_int8(x, layer.weight, None, layer.bias, threshold=threshold))
    y.sum().backward()
    assert all(t.grad is not None for t in (x, layer.weight, layer.bias))
    plain = nn.Linear(64, 8)
    plain.load_state_dict(layer.state_dict())
    layer.half().load_state_dict(plain.state_dict())
    assert layer.weight.dtype == torch.float16 and not layer.is_quantized
    shared = Linear8bit.from_linear(plain, trainable=True)
    assert shared.weight is plain.weight and shared.bias is plain.bias
    shared.quantize_()
    assert shared.weight.dtype == torch.int8 and not shared.weight.requires_grad


def test_parameters_are_codes_and_scales():
    layer = quantized("int8", (8, 128))
    shapes = {name: (p.dtype, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": (torch.int8, (8, 128), False),
        "bias": (torch.float32, (8,), True),
        "weight_scale": (torch.float32, (8,), False),
    }
    assert not list(layer.buffers())


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad", "autocast"])
def test_forward_changes_nothing(mode):
    """[D35] Same keys, dtypes and bytes before and after; no attribute is set; train and eval are alike."""
    layer = quantized("llm-int8").train(mode == "train")
    before, attributes = bytes_of_state(layer), dict(vars(layer))
    versions = [p._version for p in layer.parameters()]
    x = inputs_with_outliers(3, 64).bfloat16()
    with torch.set_grad_enabled(mode != "no_grad"), torch.autocast("cpu", enabled=mode == "autocast"):
        for _ in range(3):
            y = layer(x)
    assert bytes_of_state(layer) == before and dict(vars(layer)) == attributes
    assert [p._version for p in layer.parameters()] == versions
    assert torch.equal(y, layer.eval()(x))


def test_unquantized_forward_names_the_call_that_quantizes():
    layer = Linear8bit(64, 8)
    for call in (lambda: layer(torch.zeros(1, 64)), layer.dequantize, layer.to_linear, layer.record):
        with pytest.raises(errors.NotQuantizedError) as caught:
            call()
        assert str(caught.value) == (
            "qbits::matmul_int8: weight must be quantized, call quantize_() first, got torch.float32 [8, 64]"
        )
    assert layer.quantize_().quantize_() is layer
    assert layer(torch.zeros(1, 64)).shape == (1, 8)


def test_output_dtype_follows_every_input():
    """[D35] No cast to float16: a float32 and a bfloat16 input beyond its range stay finite."""
    layer = Linear8bit.from_linear(nn.Linear(64, 8), "llm-int8")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype
    large = torch.full((1, 64), 1e6)
    assert bool(layer(large).isfinite().all()) and bool(layer(large.bfloat16()).isfinite().all())
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(torch.randn(2, 64)).dtype == torch.float16


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.float16),
    "to": lambda m: m.to(torch.bfloat16),
    "share_memory": lambda m: m.share_memory(),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_reach_the_bias_alone(cast):
    """[D33] Codes and scales keep dtype and bytes, parameters their identity and order."""
    layer = quantized("int8")
    before, parameters = bytes_of_state(layer), list(layer.named_parameters())
    CASTS[cast](layer)
    after = bytes_of_state(layer)
    assert {k: v for k, v in after.items() if k != "bias"} == {k: v for k, v in before.items() if k != "bias"}
    due = {"half": torch.float16, "type": torch.float16, "bfloat16": torch.bfloat16, "to": torch.bfloat16}
    assert layer.bias.dtype == {**due, "double": torch.float64}.get(cast, torch.float32)
    for (name, p), (name_before, p_before) in zip(layer.named_parameters(), parameters, strict=True):
        assert name == name_before and p is p_before
    assert layer.weight_dtype == torch.float32


@pytest.mark.gpu
def test_moving_to_the_gpu_and_back_is_exact():
    layer = quantized("llm-int8", (40, 256))
    parameters, before = list(layer.parameters()), bytes_of_state(layer)
    layer.cuda()
    assert all(p.is_cuda for p in layer.parameters())
    assert list(map(id, layer.parameters())) == list(map(id, parameters))
    assert layer(torch.randn(2, 256, device="cuda")).is_cuda
    assert bytes_of_state(layer.cpu()) == before


def saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(saved(m), weights_only=False),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("trainable", [False, True])
def test_copies_are_whole_and_independent(how, trainable):
    layer = Linear8bit.from_linear(nn.Linear(64, 8), "llm-int8", trainable=trainable).eval()
    before = bytes_of_state(layer)
    other = COPIES[how](layer)
    assert type(other) is Linear8bit and bytes_of_state(other) == before
    assert (other.scheme, other.trainable, other.training) == (LLMInt8(), trainable, False)
    other.weight.data.zero_()
    assert bytes_of_state(layer) == before


def test_tied_layers_stay_tied():
    first, second = quantized("int8"), quantized("int8")
    second.weight, second.weight_scale = first.weight, first.weight_scale
    copied = copy.deepcopy(nn.ModuleList([first, second])).half()
    assert copied[0].weight is copied[1].weight and copied[0].weight_scale is copied[1].weight_scale
    assert len(list(copied.parameters())) == 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_to_linear_gives_back_a_float_layer(dtype):
    layer = quantized("int8").eval()
    linear = layer.to_linear(dtype)
    assert type(linear) is nn.Linear and linear.weight.requires_grad and not linear.training
    assert torch.equal(linear.weight, layer.dequantize(dtype))
    assert (linear.bias is layer.bias) == (dtype is None)


def test_requantize_and_reset_replace_the_values_in_place():
    layer, weight = quantized("llm-int8"), torch.randn(8, 64)
    ids = [id(p) for p in layer.parameters()]
    assert layer.requantize_(weight) is layer and layer.threshold == 6.0
    codes, scales = ops.quantize_rowwise(weight)
    assert torch.equal(layer.weight, codes) and torch.equal(layer.weight_scale, scales)
    before = bytes_of_state(layer)
    layer.reset_parameters()
    after = bytes_of_state(layer)
    assert [id(p) for p in layer.parameters()] == ids
    assert after.keys() == before.keys() and all(after[k] != before[k] for k in before)


def test_a_bad_threshold_or_scheme_is_refused():
    for threshold in (-1.0, float("nan"), "6", True):
        with pytest.raises(errors.ArgumentValueError) as caught:
            Linear8bit(64, 8, threshold=threshold)
        assert str(caught.value) == f"qbits::Int8: threshold must be a number >= 0, got {threshold!r}"
    with pytest.raises(errors.ArgumentValueError) as caught:
        Linear8bit.from_linear(nn.Linear(64, 8), "nf4")
    assert str(caught.value) == "qbits::Linear8bit: scheme must be a Int8, got NF4"
    for trainable in (False, True):
        with pytest.raises(errors.ArgumentTypeError) as caught:
            Linear8bit.from_linear(quantized("int8"), trainable=trainable)
        assert str(caught.value) == ("qbits::from_linear: linear must be a float nn.Linear, got Linear8bit")


def test_repr_names_the_scheme():
    assert repr(Linear8bit(64, 8, threshold=6.0)) == (
        "Linear8bit(in_features=64, out_features=8, bias=True, scheme='llm-int8', threshold=6)"
    )
    assert repr(Linear8bit(64, 8, bias=False, trainable=True)) == (
        "Linear8bit(in_features=64, out_features=8, bias=False, scheme='int8', threshold=0, trainable=True)"
    )
    assert Linear8bit(64, 8).scheme == Int8()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_compiled_layer_equals_eager_bit_for_bit(dynamic, trainable, device):
    torch._dynamo.reset()
    layer = Linear8bit.from_linear(nn.Linear(64, 8, device=device), "llm-int8", trainable=trainable)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 5) if dynamic else (3,):
        x = inputs_with_outliers(2, n, 64, device=device).requires_grad_()
        got, want = compiled(x), layer(x)
        leaves = (x, layer.bias, *([layer.weight] if trainable else []))
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_takes_any_batch(strict):
    layer = quantized("llm-int8").eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: batch},), strict=strict)
    x = inputs_with_outliers(11, 64)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_as_plain_ones(use_reentrant):
    trainable = Linear8bit(64, 64, threshold=6.0, trainable=True)
    model = nn.Sequential(quantized("llm-int8", (64, 64)), nn.ReLU(), trainable)
    x = inputs_with_outliers(3, 64).requires_grad_()
    leaves = (x, model[0].bias, trainable.weight, trainable.bias)
    plain = torch.autograd.grad(model(x).pow(2).sum(), leaves)
    checkpoint(model, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, due) for leaf, due in zip(leaves, plain, strict=True))


def test_a_frozen_weight_cannot_be_made_trainable():
    with pytest.raises(RuntimeError, match="floating point"):
        quantized("int8").weight.requires_grad_(True)


def test_pool_joins_the_columns_of_layers_of_one_width(device):
    """The pool's columns are outliers of every layer that has it, and their own are added to it."""
    pool = OutlierPool()
    first, second = (Linear8bit.from_linear(nn.Linear(64, 64, device=device), "llm-int8") for _ in range(2))
    narrow = Linear8bit.from_linear(nn.Linear(32, 8, device=device), "llm-int8")
    x = torch.randn(5, 64, device=device).clamp(-5, 5)
    with_outlier = x.clone()
    with_outlier[2, 7] = 30.0
    alone = second(x)
    for layer in (first, second, narrow):
        layer.outlier_pool = pool
    first(with_outlier)
    narrow(torch.full((1, 32), 9.0, device=device))
    assert pool.get_current_outlier_idx().tolist() == [7] and pool.model_dim == 64
    pooled = second(x)
    assert not torch.equal(pooled, alone)
    # column 7 in 16 bits, the others as before: by hand, with its codes left out
    codes, scales, mask = ops.quantize_rowwise_outliers(x, 6.0)
    assert not mask.any()
    mask[7] = True
    codes[:, 7] = 0
    record = second.record()
    want = ops.gemm_int8_outliers(codes, scales, x, mask, record.values, record.scales, second.bias.detach())
    assert torch.equal(pooled, want)
    pool.initialize()
    assert pool.get_current_outlier_idx().tolist() == [] and torch.equal(second(x), alone)


def test_pool_fills_in_a_compiled_layer_too(device):
    torch._dynamo.reset()
    layer = Linear8bit.from_linear(nn.Linear(64, 8, device=device), "llm-int8")
    layer.outlier_pool = OutlierPool()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, device=device).clamp(-5, 5)
    with torch.no_grad():
        compiled(inputs_with_outliers(3, 64, device=device))
        got = compiled(x)
        assert layer.outlier_pool.get_current_outlier_idx().tolist() == [32]
        assert torch.equal(got, layer(x))


def test_pool_takes_indices_and_sorts_them():
    pool = OutlierPool()
    pool.add_outliers(torch.tensor([9, 1]), 16)
    pool.add_outliers(torch.tensor([0, 9]), 16)
    pool.add_outliers(torch.tensor([3]), 64)  # of another width
    assert pool.get_current_outlier_idx().tolist() == [0, 1, 9]
    assert pool.get_current_outlier_idx().dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.parametrize("trainable", [False, True])
def test_forward_is_captured_in_a_cuda_graph(trainable):
    layer = Linear8bit.from_linear(nn.Linear(256, 128), "llm-int8", trainable=trainable).cuda()
    x = inputs_with_outliers(4, 256, device="cuda").bfloat16()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(x))
