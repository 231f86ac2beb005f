"""Quantizing a checkpoint on disk: the same bytes as quantizing the model, one tensor in memory at a time."""

from __future__ import annotations

import json
import os

import pytest
import qbits
import torch
from memory import needs_linux, peak_bytes
from qbits.checkpoint import quantize_checkpoint
from qbits.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"


class Model(nn.Module):
    """Linear layers, and 2-D weights that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 64)
        self.position_embeddings = nn.Embedding(16, 64)
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 40, bias=False)


def make_source(folder, dtype=torch.float32) -> Model:
    model = Model().to(dtype)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "scheme", ["nf4", "nf4-dq", "fp4", "fp4-dq", "af4", "int8", "llm-int8", {"up": "nf4", "down": "llm-int8"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["auto", "qbits"])
def test_quantize_checkpoint_writes_what_save_of_the_quantized_model_writes(tmp_path, scheme, dtype, format):
    model = make_source(tmp_path / "in", dtype)
    change = quantize_checkpoint(
        tmp_path / "in", tmp_path / "out.safetensors", scheme, format=format, progress=False
    )
    assert list(change.schemes) == ["down", "up"]
    qbits.quantize_(model, scheme, progress=False)
    qbits.save(model, tmp_path / "due.safetensors", format=format)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "due.safetensors").read_bytes()
    due = load_file(tmp_path / "due.safetensors").values()
    assert change.bytes_after == sum(t.numel() * t.element_size() for t in due)


def test_quantize_checkpoint_takes_every_shard_and_writes_shards(tmp_path):
    model = Model()
    qbits.save(model, tmp_path / "in", max_shard_size="10KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "nf4-dq", max_shard_size="6KB", progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    loaded = qbits.load(tmp_path / "out", Model())
    qbits.quantize_(model, "nf4-dq", progress=False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({}, ["down", "up"]),
        ({"skip": []}, ["down", "embed_tokens", "lm_head", "position_embeddings", "up"]),
        ({"skip": ["re:.*embed.*", "up"]}, ["down", "lm_head"]),
        ({"only": ["u*"]}, ["up"]),
    ],
)
def test_names_decide_without_a_config(tmp_path, arguments, layers):
    make_source(tmp_path / "in")
    change = quantize_checkpoint(tmp_path / "in", tmp_path / "out", progress=False, **arguments)
    assert list(change.schemes) == layers


def make_transformers_folder(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=50,
        max_position_embeddings=16,
    )
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def test_the_model_decides_where_transformers_knows_it(tmp_path):
    model = make_transformers_folder(tmp_path / "in")
    (tmp_path / "in" / "1_Pooling").mkdir()
    (tmp_path / "in" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"old weights")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / ".cache" / "x").write_text("")
    change = quantize_checkpoint(tmp_path / "in", tmp_path / "out", "fp4", progress=False)
    head = model.get_output_embeddings()
    due = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    assert set(change.schemes) == due
    assert "cls.predictions.transform.dense" in due
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert files - {"generation_config.json"} == {"1_Pooling/config.json", "config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert config["quantization_config"]["llm_int8_skip_modules"] == []  # the tied head is not in the file
    loaded = qbits.load(tmp_path / "out", type(model)(model.config))
    assert isinstance(loaded.bert.encoder.layer[1].output.dense, Linear4bit)
    assert loaded.get_output_embeddings().weight is loaded.bert.embeddings.word_embeddings.weight
    assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, head.weight)


def test_the_model_knows_layers_that_their_names_hide(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=50,
        max_position_embeddings=16,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path / "in")
    name = "encoder.embedding_hidden_mapping_in"
    assert name in quantize_checkpoint(tmp_path / "in", tmp_path / "with", progress=False).schemes
    (tmp_path / "in" / "config.json").unlink()
    assert name not in quantize_checkpoint(tmp_path / "in", tmp_path / "without", progress=False).schemes


def test_quantize_checkpoint_refuses_a_quantized_folder(tmp_path):
    make_transformers_folder(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    with pytest.raises(ValueError) as error:
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    assert str(error.value) == (
        f"qbits::quantize_checkpoint: {tmp_path / 'out' / 'config.json'} must be of a float model, "
        "got a quantized one"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantize_checkpoint_refuses_a_weight_that_is_not_finite_and_leaves_nothing(tmp_path, value):
    model = make_source(tmp_path / "in")
    model.up.weight.data[3, 5] = value
    save_file(model.state_dict(), tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", max_shard_size="4KB", progress=False)
    assert str(error.value) == "qbits::quantize_: weight of up must be finite, got NaN or Inf"
    assert list((tmp_path / "out").iterdir()) == []


def test_quantize_checkpoint_refuses_to_overwrite_its_source(tmp_path):
    make_source(tmp_path / "in")
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError) as error:
        quantize_checkpoint(tmp_path / "in", tmp_path / "in", progress=False)
    assert str(error.value) == (
        f"qbits::quantize_checkpoint: dst must differ from src, got {tmp_path / 'in'}"
    )
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before


def test_quantize_checkpoint_refuses_a_file_without_linear_weights(tmp_path):
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        quantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False)
    assert str(error.value) == (
        "qbits::quantize_checkpoint: src must hold linear weights to quantize, "
        f"got none in {tmp_path / 'a.safetensors'}"
    )


@needs_linux
def test_quantize_checkpoint_holds_one_layer_at_most(tmp_path):
    # Six layers of 64 MiB in three shards; packed they have 9 MiB each.
    layer_bytes = 4096 * 4096 * 4
    (tmp_path / "in").mkdir()
    weight_map = {}
    for shard in range(3):
        tensors = {f"{2 * shard + i}.weight": torch.full((4096, 4096), 0.5) for i in range(2)}
        weight_map |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
        save_file(tensors, tmp_path / "in" / f"model-{shard}.safetensors")
    del tensors
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "in" / "model.safetensors.index.json").write_text(index)

    def convert():
        return quantize_checkpoint(
            tmp_path / "in", tmp_path / "out", "nf4-dq", max_shard_size="20MB", progress=False
        )

    convert()  # what threads and libraries take once is no part of it
    # A packed layer has 9 MiB, a float layer 64: less than two packed ones means that none waits.
    assert peak_bytes(convert) < layer_bytes / 4
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
