"""Files of bitsandbytes 0.50.2 load to the same values, and the reverse."""

from __future__ import annotations

import warnings

import pytest
import qbits
import torch
from qbits.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def make_bnb_layer(bnb, quant_type, nested, dtype, storage=torch.uint8, shape=(96, 128), block_size=64):
    torch.manual_seed(3)
    layer = bnb.nn.Linear4bit(
        shape[1],
        shape[0],
        bias=True,
        quant_type=quant_type,
        compress_statistics=nested,
        compute_dtype=dtype,
        quant_storage=storage,
    )
    weight = torch.randn(shape).to(dtype)
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        blocksize=block_size,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=storage,
        module=layer,
    )
    layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cpu")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_file_of_bitsandbytes_loads_to_the_same_values(tmp_path, bnb, quant_type, nested, dtype, storage):
    theirs = nn.Sequential(make_bnb_layer(bnb, quant_type, nested, dtype, storage))
    save_file(theirs.state_dict(), tmp_path / "bnb.safetensors", metadata={"format": "pt"})
    due = bnb.functional.dequantize_4bit(theirs[0].weight.data, theirs[0].weight.quant_state)
    model = qbits.load(tmp_path / "bnb.safetensors", nn.Sequential(nn.Linear(128, 96, dtype=dtype)))
    assert isinstance(model[0], Linear4bit)
    assert model[0].scheme.name == quant_type + ("-dq" if nested else "")
    assert model[0].dequantize().dtype == dtype
    assert torch.equal(model[0].dequantize(), due)
    assert torch.equal(model[0].bias, theirs[0].bias)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_loads_our_file_to_the_same_values(tmp_path, bnb, scheme, block_size, dtype):
    chosen = qbits.schemes.as_scheme(scheme)
    chosen = type(chosen)(block_size, chosen.double_quant)
    model = nn.Sequential(nn.Linear(128, 96, dtype=dtype))
    qbits.quantize_(model, chosen, progress=False)
    qbits.save(model, tmp_path / "ours.safetensors")
    tensors = load_file(tmp_path / "ours.safetensors")
    statistics = {k: v for k, v in tensors.items() if k.startswith("0.weight.")}
    theirs = bnb.nn.Params4bit.from_prequantized(tensors["0.weight"], statistics, device="cpu")
    assert theirs.quant_state.blocksize == block_size
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), model[0].dequantize())


@pytest.mark.parametrize("nested", [False, True])
def test_file_of_bitsandbytes_is_the_file_of_qbits(tmp_path, bnb, nested):
    theirs = nn.Sequential(make_bnb_layer(bnb, "nf4", nested, torch.bfloat16))
    save_file(theirs.state_dict(), tmp_path / "bnb.safetensors", metadata={"format": "pt"})
    model = qbits.load(tmp_path / "bnb.safetensors", nn.Sequential(nn.Linear(128, 96, dtype=torch.bfloat16)))
    qbits.save(model, tmp_path / "ours.safetensors")
    mine, due = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "bnb.safetensors")
    assert mine.keys() == due.keys()
    assert all(torch.equal(mine[k], due[k]) and mine[k].dtype == due[k].dtype for k in due)
