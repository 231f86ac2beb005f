"""The scheme "switchback" over whole models: `quantize_`, `dequantize_`, files, reports, the command line."""

from __future__ import annotations

import copy

import pytest
import qbits
import torch
from layers import bytes_of_state
from qbits import errors
from qbits.cli import main
from qbits.nn import Linear4bit, SwitchBackLinear
from qbits.schemes import SwitchBack
from torch import nn


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8)))


@pytest.mark.parametrize("scheme", ["switchback", SwitchBack(vectorwise=False)])
def test_layers_are_replaced_and_keep_their_parameters(scheme):
    """The same Parameter objects, so that optimizers, ties and hooks hold on."""
    source = model()
    first, parameters = source[0], list(source.parameters())
    first.mark = "kept"
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    tied = source[2].append(nn.Linear(8, 32))
    source[2][2].weight, source[2][2].in_features, source[2][2].out_features = first.weight, 64, 32
    del tied[2]
    assert qbits.quantize_(source, scheme, progress=False) is source
    layer = source[0]
    assert type(layer) is SwitchBackLinear and layer.vectorwise == (scheme == "switchback")
    assert all(a is b for a, b in zip(source.parameters(), parameters, strict=True))
    assert layer.mark == "kept" and layer.min_rows == "auto" and type(source[2][0]) is SwitchBackLinear
    source(torch.randn(3, 64))
    assert calls == [1]
    before = bytes_of_state(source)
    qbits.quantize_(source, "nf4", progress=False)  # converted layers are left alone
    assert type(source[0]) is SwitchBackLinear and bytes_of_state(source) == before
    assert qbits.dequantize_(source) is source
    assert type(source[0]) is nn.Linear and source[0].weight is parameters[0] and source[0].mark == "kept"
    assert not hasattr(source[0], "min_rows") and bytes_of_state(source) == before


def test_shared_weights_stay_shared():
    source = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    source[1].weight = source[0].weight
    qbits.quantize_(source, "switchback", progress=False)
    assert source[0].weight is source[1].weight and source[0].bias is not source[1].bias
    source[0].prepare_for_eval()
    assert not source[1].is_prepared


def test_a_prepared_layer_without_its_weight_becomes_its_decoded_codes():
    source = nn.Sequential(SwitchBackLinear(64, 8, dtype=torch.bfloat16).eval())
    source[0].prepare_for_eval(keep_weight=False)
    want = source[0].dequantize()
    qbits.dequantize_(source)
    assert type(source[0]) is nn.Linear and torch.equal(source[0].weight, want)
    assert source[0].weight.dtype == torch.bfloat16


def test_quantized_layers_are_left_alone_and_mixtures_are_possible():
    source = model()
    qbits.quantize_(source, {"2.0": "switchback", "0": "nf4"}, progress=False)
    assert type(source[0]) is Linear4bit and type(source[2][0]) is SwitchBackLinear
    layer = source[0]
    qbits.quantize_(source, "switchback", progress=False)
    assert source[0] is layer


def test_files_hold_the_float_weights(tmp_path):
    source = qbits.quantize_(model(), "switchback", progress=False).eval()
    qbits.save(source, tmp_path / "model.safetensors")
    floats = model()
    qbits.load(tmp_path / "model.safetensors", floats)
    assert bytes_of_state(floats) == bytes_of_state(source) and type(floats[0]) is nn.Linear
    again = qbits.quantize_(model(), "switchback", progress=False).eval()
    qbits.load(tmp_path / "model.safetensors", again)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), source(x))
    qbits.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    qbits.save(qbits.nn.prepare_for_eval(again), tmp_path / "prepared.safetensors")
    assert (tmp_path / "prepared.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_files_of_prepared_layers_hold_their_codes(tmp_path):
    source = qbits.quantize_(model(), "switchback", progress=False).eval()
    x = torch.randn(3, 64)
    want = source(x)
    qbits.nn.prepare_for_eval(source, keep_weight=False)
    qbits.save(source, tmp_path / "codes.safetensors")
    twin = copy.deepcopy(source)
    for layer in (twin[0], twin[2][0]):
        layer.W_int8.zero_()
    qbits.load(tmp_path / "codes.safetensors", twin)
    assert torch.equal(twin(x), want)


def test_reports_name_the_scheme_and_the_error_of_the_codes():
    source = model()
    original = copy.deepcopy(source)
    report = qbits.quantize_(source, "switchback", progress=False, report=True)
    assert [change.scheme for change in report.layers] == ["switchback"] * 2
    assert all(change.bytes_before == change.bytes_after for change in report.layers)
    assert all(40 < change.sqnr < 60 for change in report.layers)  # 8 bits of a uniform weight: about 49 dB
    compared = qbits.compare(original, source)
    assert [error.values["sqnr"] for error in compared.layers] == [c.sqnr for c in report.layers]
    memory = qbits.memory_report(source)
    assert memory.by_layer["0"].scheme == "switchback" and memory.total == qbits.memory_report(original).total


def test_the_command_line_has_nothing_to_write_for_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "a", "b", "--scheme", "switchback"])
    assert "invalid choice: 'switchback'" in capsys.readouterr().err
    qbits.save(model(), tmp_path / "model.safetensors")
    with pytest.raises(errors.ArgumentValueError) as caught:
        qbits.quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.safetensors", "switchback")
    assert str(caught.value) == (
        "qbits::quantize_checkpoint: scheme must be one with codes in the file, got switchback, "
        "which leaves weights as they are"
    )
    assert not (tmp_path / "out.safetensors").exists()
