"""Files of int8 layers: keys, thresholds, bitsandbytes' own layers, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import qbits
import torch
from qbits.compat import bitsandbytes as bnb
from qbits.errors import CheckpointFormatError
from qbits.nn import Linear4bit, Linear8bit
from safetensors.torch import load_file, save_file
from test_checkpoint import make_quantized, zeroed
from torch import nn


def test_int8_layers_have_the_keys_of_their_format(tmp_path):
    model = make_quantized({"0": "int8", "2": "llm-int8"})
    for format, scales in (("bnb", ["SCB", "weight_format"]), ("qbits", ["weight_scale"])):
        qbits.save(model, tmp_path / "a.safetensors", format=format)
        keys = {k for k in load_file(tmp_path / "a.safetensors") if k[0] in "02"}
        assert keys == {"0.bias", *(f"{i}.{leaf}" for i in "02" for leaf in ("weight", *scales))}


@pytest.mark.parametrize("config", [None, 6.0, 4.5])
def test_the_threshold_comes_from_the_config_where_the_file_does_not_tell(tmp_path, config):
    """A folder of bitsandbytes names it in its config.json alone; a file by itself has none."""
    model = make_quantized("int8")
    qbits.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        record = {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": config}}
        (tmp_path / "config.json").write_text(json.dumps(record))
    loaded = qbits.load(tmp_path, zeroed(model))
    assert [loaded[i].threshold for i in (0, 2, 4)] == [config or 0.0] * 3
    existing = make_quantized("llm-int8")
    assert qbits.load(tmp_path, existing)[0].threshold == 6.0  # the layer's own stays


@pytest.mark.parametrize("text", ["[]", '{"schemes": {"0": {"codebook": "int3"}}}', "no json"])
def test_metadata_that_are_no_schemes_are_refused(tmp_path, text):
    model = make_quantized("int8")
    qbits.save(model, tmp_path / "a.safetensors")
    metadata = {"format": "pt", "qbits": text}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointFormatError, match=r"must hold each layer's scheme, got "):
        qbits.load(tmp_path / "a.safetensors", zeroed(model))


@pytest.mark.parametrize("threshold", ['"6"', "-1", "[]"])
def test_a_config_with_another_threshold_is_refused(tmp_path, threshold):
    model = make_quantized("nf4")
    qbits.save(model, tmp_path)
    record = f'{{"quantization_config": {{"load_in_8bit": true, "llm_int8_threshold": {threshold}}}}}'
    (tmp_path / "config.json").write_text(record)
    if threshold == "[]":
        assert isinstance(qbits.load(tmp_path, zeroed(model))[0], Linear4bit)  # no threshold at all
        return
    with pytest.raises(CheckpointFormatError, match=r"config\.json must be a model's configuration, got "):
        qbits.load(tmp_path, zeroed(model))


@pytest.mark.parametrize("format", ["bnb", "qbits"])
def test_bitsandbytes_own_layers_are_saved_and_loaded_in_place(tmp_path, format):
    """`Linear8bitLt` in a model: the same file as the native layer's, and back into it."""
    model = make_quantized("llm-int8")
    compat = nn.Sequential(*(bnb_layer(m) if isinstance(m, Linear8bit) else m for m in model))
    compat.register_buffer("steps", model.steps)
    qbits.save(model, tmp_path / "a.safetensors", format=format)
    qbits.save(compat, tmp_path / "b.safetensors", format=format)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    other = copy.deepcopy(compat)
    other[0].weight.data.zero_()
    other[0].weight.SCB.zero_()
    qbits.load(tmp_path / "a.safetensors", other)
    x = torch.randn(3, 64)
    assert type(other[0]) is type(compat[0]) and torch.equal(other(x), model(x))
    report = qbits.memory_report(compat).by_layer["0"]
    assert report.scheme == "llm-int8"


def bnb_layer(layer: Linear8bit) -> nn.Module:
    made = bnb.nn.Linear8bitLt(
        *(layer.in_features, layer.out_features, layer.bias is not None),
        has_fp16_weights=False,
        threshold=6.0,
    )
    made.load_state_dict(layer.state_dict())
    return made


def test_codes_without_scales_and_other_kinds_are_refused(tmp_path):
    model = make_quantized("int8")
    qbits.save(model, tmp_path / "a.safetensors")
    tensors = {k: v for k, v in load_file(tmp_path / "a.safetensors").items() if k != "2.SCB"}
    tensors.pop("2.weight_format")
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "b.safetensors", zeroed(model))
    assert str(error.value) == "qbits::load: 2.weight must stand beside its scales, got torch.int8 alone"
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "a.safetensors", make_quantized("nf4"))
    assert str(error.value) == "qbits::load: 0.weight must be nf4 as the model's layer is, got int8"
    qbits.save(make_quantized("nf4"), tmp_path / "c.safetensors")
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "c.safetensors", model)
    assert str(error.value) == "qbits::load: 0.weight must be int8 as the model's layer is, got nf4"
    assert isinstance(model[0], Linear8bit)
