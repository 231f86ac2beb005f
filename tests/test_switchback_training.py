"""The training proof in short: few steps, int8 in every layer, a control whose weight gradient is wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qbits.nn import SwitchBackLinear

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="needs the source tree")


@pytest.fixture
def proof(monkeypatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    import switchback_training

    return switchback_training


@pytest.mark.parametrize("task", ["Digits", "Manual"])
def test_a_few_steps_run_in_int8_and_follow_bfloat16(proof, task, device):
    """The same weights and batches: int8 in each layer, forward and backward, and nearly the same losses."""
    setting = proof.Setting(32, 1, num_steps=6, batch_rows=4, seeds=(0,), warm_up_steps=2, validate_every=3)
    data = getattr(proof, task)(device)
    data.validation = lambda setting: [data.batch(8, torch.Generator().manual_seed(7))]
    dense, int8 = (proof.train(data, arm, 0, setting, device) for arm in ("bfloat16", "switchback"))
    assert dense.products == dict.fromkeys(["0.qkv", "0.projection", "0.up", "0.down"], 0)
    assert int8.products == dict.fromkeys(dense.products, 2)
    assert int8.steps == dense.steps == [3, 6] and int8.losses != dense.losses
    for got, want in zip(int8.losses, dense.losses, strict=True):
        assert abs(got / want - 1) < 0.01


def test_the_control_has_a_wrong_weight_gradient_and_nothing_else(proof, device):
    """Tokens whose gradients differ in size get the same weight in its sum."""
    dense = torch.nn.Linear(64, 48, device=device)
    x = torch.randn(256, 64, device=device)
    sizes = torch.logspace(-3, 0, 256, device=device)[:, None]
    grad = (torch.randn(256, 48, device=device) * sizes).bfloat16()
    exact = grad.double().t() @ x.double()
    errors, others = {}, []
    for name, layer in {
        "switchback": SwitchBackLinear(64, 48, min_rows=0, device=device),
        "control": proof.WrongLinear(64, 48, device=device),
    }.items():
        layer.load_state_dict(dense.state_dict())
        source = x.clone().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            output = layer(source)
        output.backward(grad)
        errors[name] = float((layer.weight.grad - exact).norm() / exact.norm())
        others.append((output.detach(), source.grad, layer.bias.grad))
    assert errors["switchback"] < 0.005 and errors["control"] > 0.5
    assert all(torch.equal(a, b) for a, b in zip(*others, strict=True))


def curves(proof: Any, **changes: float) -> list[Any]:
    """Two seeds of each arm around a loss of 1, and of 1.05 for the control."""
    found = []
    for arm, count in (("bfloat16", 0), ("switchback", 2), ("control", 3)):
        loss = changes.get(arm, 1.05 if arm == "control" else 1.0)
        for seed, off in enumerate((-0.02, 0.02)):
            products = {"0.up": int(changes.get("count", count)) if arm == "switchback" else count}
            found.append(proof.Curve("task", arm, seed, [10], [loss + off], products))
    return found


def test_the_bar_is_missed_by_what_must_miss_it(proof, capsys):
    report = proof.Report("switchback_training", "cpu")
    assert proof.judge(report, curves(proof))
    assert proof.judge(report, curves(proof, switchback=1.009))
    assert not proof.judge(report, curves(proof, switchback=1.011))
    assert not proof.judge(report, curves(proof, switchback=0.989))
    assert not proof.judge(report, curves(proof, control=1.005))
    assert not proof.judge(report, curves(proof, count=1))
    assert report.rows[0]["switchback_off"] == 0.0 and report.rows[0]["control_off"] == 0.05


def test_the_curves_are_drawn_from_the_result_file(proof, tmp_path, capsys):
    report = proof.Report("switchback_training", "cpu")
    for curve in curves(proof):
        report.add(**vars(curve))
    proof.judge(report, curves(proof))
    report.write(argparse.Namespace(quick=False, out=tmp_path))
    results = tmp_path / "switchback_training_cpu.json"
    assert len(json.loads(results.read_text())["rows"]) == 7
    proof.draw(results, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
