"""LLM.int8() beside bitsandbytes 0.50.2 on the CPU: the same codes and files, and products that agree."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import qbits
import torch
from qbits import nn, ops
from qbits.compat import bitsandbytes as ours
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def original() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def make_theirs(original: Any, threshold: float, N: int = 96, K: int = 128) -> torch.nn.Module:
    """A frozen layer of theirs, in float16, the only dtype that it quantizes as it is."""
    layer = original.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
    layer.weight.data = torch.randn(N, K, dtype=torch.float16)
    layer.bias.data = torch.randn(N, dtype=torch.float16)
    return layer.to("cpu").eval()


def my_codes(x: torch.Tensor, threshold: float) -> torch.Tensor:
    quantizer = ops.quantize_rowwise_outliers(x, threshold) if threshold else ops.quantize_rowwise(x)
    return quantizer[0]


def inputs(M: int, K: int, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(M, K, device=device).clamp(-5, 5)
    x[1, [3, 70]] = torch.tensor([25.0, -6.0], device=device)
    return x.half()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_products_of_frozen_layers_agree(original, threshold):
    """Codes and scales are equal; theirs multiplies by 6.200124e-5 in place of 1/127^2, 2e-5 too much."""
    theirs = make_theirs(original, threshold)
    mine = ours.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=threshold)
    mine.load_state_dict(theirs.state_dict())
    mine.bias.data = theirs.bias.data.clone()
    x = inputs(7, 128)
    want, got = theirs(x), mine(x)
    assert torch.equal(mine.weight.data, theirs.state.CB) and torch.equal(mine.weight.SCB, theirs.state.SCB)
    if threshold:
        assert torch.equal(mine.state.idx, theirs.state.idx)
    # both round to float16, theirs up to three times (product, outliers, sum), besides the factor 2e-5
    bound = (4 * 2.0**-11 + 2e-5) * (want.abs().double() + 128**0.5 * (25 if threshold else 1))
    # theirs takes 127 * (1 / s) for 127 / s, an ulp off, so that codes of ties differ
    codes, scales, _ = original.functional.int8_vectorwise_quant(x.clone(), threshold=threshold)
    other = (codes.short() - my_codes(x, threshold).short()).abs()
    assert other.max() <= 1 and other.double().mean() < 1 / 500
    weight = mine.dequantize(torch.float32).double().abs()
    bound += other.double() * scales.double()[:, None] / 127 @ weight.t()
    assert ((got.double() - want.double()).abs() <= bound).all()
    exact = x.double() @ mine.dequantize(torch.float32).double().t()
    assert (got.double() - exact - mine.bias.double()).abs().mean() <= 1.02 * (
        want.double() - exact - mine.bias.double()
    ).abs().mean()


def test_gradients_of_a_frozen_layer_agree(original):
    theirs = make_theirs(original, 0.0)
    mine = ours.nn.Linear8bitLt(128, 96, has_fp16_weights=False)
    mine.load_state_dict(theirs.state_dict())
    mine.bias.data = theirs.bias.data.clone()
    grad = torch.randn(7, 96).half()
    found = []
    for layer in (mine, theirs):
        x = inputs(7, 128).requires_grad_()
        layer(x).backward(grad)
        found.append((x.grad, layer.bias.grad))
    exact = grad.double() @ mine.dequantize(torch.float32).double()
    errors = [(g[0].double() - exact).abs().max() for g in found]
    assert errors[0] <= 2 * errors[1]
    assert torch.equal(found[0][1], grad.float().sum(0).half())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_training_layer_is_no_further_from_the_exact_product(original, threshold):
    """[D36] Theirs trains on the CPU through a decoded weight; ours in int8 stays within the papers' bars."""
    weight, x, grad = torch.randn(96, 128) / 12, inputs(64, 128).float(), torch.randn(64, 96)
    layer = ours.nn.Linear8bitLt(128, 96, bias=False, threshold=threshold)
    layer.weight.data = weight.clone()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    exact = (x @ weight.t(), grad @ weight, grad.t() @ x)
    for got, want, bar in zip((y, leaf.grad, layer.weight.grad), exact, (0.03, 0.02, 0.02), strict=True):
        assert (got - want).norm() / want.norm() < bar


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_files_are_exchanged_both_ways(original, tmp_path, threshold):
    theirs = torch.nn.Sequential(make_theirs(original, threshold))
    theirs(inputs(3, 128))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    model = torch.nn.Sequential(torch.nn.Linear(128, 96, dtype=torch.float16))
    qbits.load(tmp_path / "theirs.safetensors", model)
    assert isinstance(model[0], nn.Linear8bit)
    assert torch.equal(model[0].weight, theirs[0].state_dict()["weight"])
    assert torch.equal(model[0].bias, theirs[0].bias)
    qbits.save(model, tmp_path / "ours.safetensors")
    mine, due = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert mine.keys() == due.keys()
    assert all(torch.equal(mine[k], due[k]) and mine[k].dtype == due[k].dtype for k in due)
    back = torch.nn.Sequential(make_theirs(original, threshold))
    back.load_state_dict(mine)
    x = inputs(3, 128)
    assert torch.equal(back(x), theirs(x))


def test_a_parameter_of_theirs_becomes_one_of_ours(original):
    weight = torch.randn(8, 64, dtype=torch.float16)
    theirs = original.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    mine = ours.nn.Int8Params(theirs.data, **theirs.__dict__)
    due = ours.nn.Int8Params(weight).to("cpu")
    assert torch.equal(mine.data, theirs.data) and torch.equal(mine.SCB, due.SCB)
    assert (mine.data.short() - due.data.short()).abs().max() <= 1
