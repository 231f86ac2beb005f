"""Reports: bytes and errors as plain arithmetic gives them, tables, plots."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import qbits
import torch
from qbits import functional
from qbits.report import ErrorReport, LayerError, measure_error
from torch import nn


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40, bias=False), nn.LayerNorm(40))


def make_pair() -> tuple[nn.Sequential, nn.Sequential]:
    model = make_model()
    quantized = copy.deepcopy(model)
    qbits.quantize_(quantized, {"0": "nf4", "2": "fp4-dq"}, progress=False)
    return model, quantized


def test_memory_report_counts_every_byte_once():
    _, quantized = make_pair()
    quantized.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    quantized.alias = quantized[3]
    report = qbits.memory_report(quantized)
    assert report.by_scheme == {
        "int64": 24,
        "nf4": 64 * 96 // 2 + 64 * 96 // 64 * 4,
        "float32": 96 * 4 + 2 * 40 * 4,
        # 60 blocks: a code each, and one scale for up to 256 of them, and the offset
        "fp4-dq": 96 * 40 // 2 + 60 + 4 + 4,
    }
    assert report.total == sum(report.by_scheme.values())
    assert report.total == sum(layer.num_bytes for layer in report.by_layer.values())
    assert {name: layer.scheme for name, layer in report.by_layer.items()} == {
        "": "float",
        "0": "nf4",
        "2": "fp4-dq",
        "3": "float",
    }


def test_int8_layers_are_reported_with_their_scales():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 40, bias=False))
    quantized = copy.deepcopy(model)
    changes = qbits.quantize_(quantized, {"0": "int8", "1": "llm-int8"}, progress=False, report=True)
    assert [(c.scheme, c.bytes_after) for c in changes.layers] == [
        ("int8", 64 * 96 + 96 * 4),
        ("llm-int8", 96 * 40 + 40 * 4),
    ]
    by_scheme = {"int8": 64 * 96 + 96 * 4, "float32": 96 * 4, "llm-int8": 96 * 40 + 40 * 4}
    assert qbits.memory_report(quantized).by_scheme == by_scheme
    found = qbits.compare(model, quantized)
    # rows of uniform values: 127 steps up to the largest, so 10 log10(12 * 127^2 / 3) = 48 dB
    assert all(47 < layer.values["sqnr"] < 49 for layer in found.layers)


def test_memory_report_counts_a_shared_weight_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    assert qbits.memory_report(model).total == 64 * 64 * 4
    qbits.quantize_(model, "nf4", progress=False)
    assert qbits.memory_report(model).by_scheme == {"nf4": 64 * 64 // 2 + 64 * 4}


def test_memory_report_writes_a_table_with_the_total():
    lines = qbits.memory_report(nn.Linear(64, 3)).to_markdown().splitlines()
    assert lines == [
        "| scheme  | bytes |  share |",
        "|---------|------:|-------:|",
        "| float32 |   780 | 100.0% |",
        "| total   |   780 |        |",
    ]


def test_measure_error_is_what_float64_gives():
    reference, approximation = torch.randn(3000, 701), torch.randn(3000, 701)
    r, a = reference.double().flatten(), approximation.double().flatten()
    found = measure_error(reference, approximation)
    # Sums of 2.1 million terms in another order: far below 1e-9 in float64.
    assert math.isclose(found["sqnr"], 10 * math.log10((r @ r) / ((r - a) @ (r - a))), rel_tol=1e-9)
    assert math.isclose(found["cos"], torch.cosine_similarity(r, a, dim=0), rel_tol=1e-9)
    assert found["max_abs"] == (r - a).abs().max()


@pytest.mark.parametrize(
    ("reference", "approximation", "sqnr", "cos"),
    [
        (torch.ones(3), torch.ones(3), math.inf, 1.0),
        (torch.zeros(3), torch.zeros(3), math.inf, 1.0),
        (torch.zeros(3), torch.ones(3), -math.inf, 0.0),
        (torch.empty(0), torch.empty(0), math.inf, 1.0),
    ],
)
def test_measure_error_has_no_nan_at_its_limits(reference, approximation, sqnr, cos):
    found = measure_error(reference, approximation)
    assert (found["sqnr"], found["cos"]) == (sqnr, pytest.approx(cos, abs=1e-15))


def test_measure_error_refuses_other_shapes():
    with pytest.raises(ValueError) as error:
        measure_error(torch.zeros(2), torch.zeros(3))
    assert str(error.value) == "qbits::measure_error: approximation must have shape (2,), got (3,)"


def test_compare_of_weights_is_the_error_of_each_layer():
    model, quantized = make_pair()
    report = qbits.compare(model, quantized)
    assert [(layer.name, layer.scheme) for layer in report.layers] == [("0", "nf4"), ("2", "fp4-dq")]
    packed = functional.quantize_4bit(model[0].weight.detach(), codebook="nf4")
    assert report.layers[0].values == measure_error(model[0].weight, functional.dequantize_4bit(packed))
    # NF4 of normal data at block 64 has 20.7 dB, of uniform data a little more; a wrong layer has about 0.
    assert report.layers[0].values["sqnr"] > 18
    assert json.loads(json.dumps(report.to_dict()))["metrics"] == ["sqnr", "cos", "max_abs"]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: {"input": x}])
def test_compare_of_outputs_runs_both_models(form):
    model, quantized = make_pair()
    x = torch.randn(7, 64)
    report = qbits.compare(model, quantized, form(x), metrics=("max_abs", "sqnr"))
    first = measure_error(model[0](x), quantized[0](x))
    second = measure_error(model[:3](x), quantized[:3](x))
    assert report.layers[0].values == {name: first[name] for name in ("max_abs", "sqnr")}
    assert report.layers[1].values == {name: second[name] for name in ("max_abs", "sqnr")}
    assert all(not module._forward_hooks for m in (model, quantized) for module in m.modules())


def test_compare_takes_the_worst_call_of_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, input):
            return self.layer(self.layer(input))

    model = Twice()
    quantized = qbits.quantize_(copy.deepcopy(model), progress=False)
    x = torch.randn(5, 64)
    calls = [
        measure_error(model.layer(x), quantized.layer(x)),
        measure_error(model(x), quantized(x)),
    ]
    found = qbits.compare(model, quantized, x).layers[0].values
    assert found["sqnr"] == min(call["sqnr"] for call in calls)
    assert found["max_abs"] == max(call["max_abs"] for call in calls)


def test_compare_refuses_unknown_metrics_and_strange_models():
    model, quantized = make_pair()
    with pytest.raises(ValueError) as error:
        qbits.compare(model, quantized, metrics=("psnr",))
    assert str(error.value) == (
        "qbits::compare: metrics must be some of ['sqnr', 'cos', 'max_abs'], got ['psnr']"
    )
    with pytest.raises(ValueError) as error:
        qbits.compare(model, model)
    assert str(error.value) == (
        "qbits::compare: quantized must share quantized layers with ref by name, got none"
    )
    with pytest.raises(TypeError) as error:
        qbits.compare(model, quantized, 3)
    assert str(error.value) == "qbits::compare: inputs must be a tensor, a sequence or a mapping, got int"


def make_errors() -> ErrorReport:
    values = {"a": (20.0, 0.5), "b": (10.0, 0.1), "c": (30.0, 0.9)}
    layers = [LayerError(n, "nf4", {"sqnr": s, "max_abs": m}) for n, (s, m) in values.items()]
    return ErrorReport(("sqnr", "max_abs"), tuple(layers))


def test_error_report_orders_by_the_first_metric():
    report = make_errors()
    assert [layer.name for layer in report.worst(2)] == ["b", "a"]
    assert [layer.name for layer in ErrorReport(("max_abs",), report.layers).worst(2)] == ["c", "a"]
    assert report.mean("sqnr") == 20.0


def test_error_report_plots_an_image(tmp_path):
    make_errors().plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError) as error:
        make_errors().plot(tmp_path / "no.png", metric="cos")
    assert str(error.value) == "qbits::ErrorReport.plot: metric must be one of ['sqnr', 'max_abs'], got 'cos'"
    assert not (tmp_path / "no.png").exists()


def test_error_report_says_how_to_get_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as error:
        make_errors().plot(tmp_path / "errors.png")
    assert str(error.value) == "qbits::ErrorReport.plot: needs matplotlib; install qbits[demo]"


def test_quantize_reports_what_it_did():
    model = make_model()
    before = copy.deepcopy(model)
    report = qbits.quantize_(model, {"0": "nf4", "2": "fp4-dq"}, report=True, progress=False)
    assert [(c.name, c.scheme, c.bytes_before, c.bytes_after) for c in report.layers] == [
        ("0", "nf4", 64 * 96 * 4, 64 * 96 // 2 + 96 * 4),
        ("2", "fp4-dq", 96 * 40 * 4, 96 * 40 // 2 + 60 + 4 + 4),
    ]
    errors = qbits.compare(before, model)
    assert [c.sqnr for c in report.layers] == [layer.values["sqnr"] for layer in errors.layers]
    assert [c.max_abs for c in report.layers] == [layer.values["max_abs"] for layer in errors.layers]
    assert report.bytes_before == 64 * 96 * 4 + 96 * 40 * 4
    assert report.to_markdown().count("\n") == 3
