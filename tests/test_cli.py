"""The command line: what it prints, its exit codes, and one sentence for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import qbits
import torch
from qbits import cli, info
from qbits.cli import main
from safetensors.torch import load_file, save_file
from torch import nn


def make_file(path) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    save_file(model.state_dict(), path)
    return model


def test_quantize_and_inspect_a_file(tmp_path, capsys):
    model = make_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["--scheme", "nf4-dq", "--skip", "re:2", "--device", "cpu"]
    assert main(["quantize", str(tmp_path / "in.safetensors"), str(out), *arguments]) == 0
    before = sum(t.numel() * 4 for t in model.state_dict().values())
    after = sum(t.numel() * t.element_size() for t in load_file(out).values())
    printed = capsys.readouterr()
    assert printed.out == (
        f"1 layers to nf4-dq: {before:,} bytes became {after:,} ({after / before:.1%}) in {out}\n"
    )
    loaded = qbits.load(out, nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 8)))
    qbits.quantize_(model, "nf4-dq", only=["0"], progress=False)
    assert torch.equal(loaded[0].dequantize(), model[0].dequantize())

    assert main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line]
    assert rows[2][:4] == ["0.weight", "nf4-dq / 64", "[32, 64]", "float32"]
    assert ["1.weight", "float32", "[32]", "128"] in rows
    assert ["2.weight", "float32", "[8, 32]", "1,024"] in rows
    tensors = load_file(out)
    num_bytes = sum(t.numel() * t.element_size() for key, t in tensors.items() if key.startswith("0.weight"))
    assert f"{len(tensors)} keys: 1 quantized weights in {num_bytes:,} bytes, 5 other tensors in" in printed
    assert "every scale is finite and fits its weight" in printed


def test_quantize_repeats_skip_and_takes_a_format(tmp_path):
    make_file(tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = [
        str(tmp_path / "in.safetensors"),
        str(out),
        "--format",
        "qbits",
        "--skip",
        "1",
        "--skip",
        "2",
    ]
    assert main(["quantize", *arguments]) == 0
    assert "0.weight_absmax" in load_file(out)
    assert load_file(out)["2.weight"].dtype == torch.float32


def test_inspect_names_damaged_layers_and_exits_with_1(tmp_path, capsys):
    model = qbits.quantize_(nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 8)), progress=False)
    qbits.save(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["1.weight.absmax"][2] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert "| 0.weight " in printed
    assert printed.endswith(
        "damaged:\n- qbits::load: 1.weight.absmax must be finite and >= 0, got nan at 2\n"
    )


def test_info_shows_versions_kernels_and_why_none_runs(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"qbits         {qbits.__version__}" in printed
    assert f"torch         {torch.__version__}" in printed
    for op in qbits.ops.SPECS:
        assert f"| {op} " in printed
    if not qbits.is_available("cuda"):
        assert "no GPU to run on: " in printed or "no kernel runs: " in printed


def test_info_lists_every_gpu_with_its_reason():
    devices = [
        {
            "ordinal": 0,
            "name": "H200",
            "capability": "9.0",
            "memory_bytes": 141 * 2**30,
            "usable": True,
            "triton": False,
            "reason": "",
        },
        {
            "ordinal": 1,
            "name": "K80",
            "capability": "3.7",
            "memory_bytes": 12 * 2**30,
            "usable": False,
            "triton": False,
            "reason": "no image fits",
        },
        {
            "ordinal": 2,
            "name": "RTX 5090",
            "capability": "12.0",
            "memory_bytes": 32 * 2**30,
            "usable": False,
            "triton": True,
            "reason": "no image fits",
        },
    ]
    facts = info.env_info() | {"driver": "13.0", "devices": devices, "cuda_archs": ["80", "90a"]}
    facts["packages"] |= {"triton": "3.6.0"}
    text = info.describe(facts)
    assert "cuda:0  H200, compute capability 9.0, 141 GiB: kernels run" in text
    assert "cuda:1  K80, compute capability 3.7, 12 GiB: no kernel runs: no image fits" in text
    assert "32 GiB: no kernel runs: no image fits; int8 by Triton" in text
    assert "compiled for  80, 90a" in text
    assert "| op " in text
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if "|" in row]
    cells = {row[0]: row[2:] for row in rows}
    assert cells["gemm_4bit"] == ["yes", "no", "no"]
    assert cells["gemm_int8"] == ["yes", "no", "triton"]


MISTAKES = [
    (["quantize", "missing", "out"], "path must be a .safetensors file or a folder, got missing"),
    (
        ["inspect", "missing.safetensors"],
        "path must be a .safetensors file or a folder, got missing.safetensors",
    ),
    (
        ["quantize", "in.safetensors", "out", "--max-shard-size", "big"],
        "max_shard_size must be a positive size",
    ),
    (["quantize", "in.safetensors", "out", "--skip", "re:("], "pattern must be a regular expression"),
    (
        ["quantize", "in.safetensors", "out", "--device", "tpu"],
        "--device must be auto, cpu, cuda or cuda:N, got 'tpu'",
    ),
    (["quantize", "in.safetensors", "out", "--device", "cuda:99"], "--device must be a GPU"),
    (["quantize", "cut.safetensors", "out"], "must be a complete safetensors file"),
    (["inspect", "cut.safetensors"], "must be a complete safetensors file"),
    (
        ["demo", "--model", "missing", "--device", "cpu"],
        "--model must be a folder with a config.json, got missing",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_are_told_in_one_sentence_and_exit_with_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    make_file(tmp_path / "in.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "in.safetensors").read_bytes()[:300])
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"qbits {arguments[0]}: error: qbits::")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [[], ["bake"], ["quantize", "in"], ["quantize", "a", "b", "--scheme", "nf3"], ["demo", "--scheme", "x"]],
)
def test_a_call_that_does_not_parse_shows_the_usage_and_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: qbits" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qbits {qbits.__version__}\n"


def test_interruption_exits_with_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "qbits info: interrupted\n"


def test_the_module_runs_as_a_program_and_hands_its_exit_code_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "qbits", "inspect", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "qbits inspect: error: qbits::load: path must be a .safetensors file or a folder, "
        f"got {tmp_path / 'missing'}"
    )
    assert "Traceback" not in done.stderr
