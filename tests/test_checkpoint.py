"""save and load: equal outputs, equal bytes, shards, shared tensors, and how much memory they take."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import qbits
import torch
from memory import needs_linux, peak_bytes
from qbits.checkpoint import CheckpointReader
from qbits.errors import CheckpointFormatError
from qbits.nn import Linear4bit, QuantizedLinear
from qbits.records import QTensor4
from qbits.schemes import LLMInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

SCHEMES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "llm-int8"]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that blocks fit into and rows that they straddle, with and without bias, a norm, a buffer."""
    model = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 100, bias=False), nn.LayerNorm(100), nn.Linear(100, 9)
    )
    model.register_buffer("steps", torch.tensor(7))
    return model.to(dtype)


def make_quantized(scheme="nf4", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return qbits.quantize_(make_model(dtype), scheme, progress=False)


def zeroed(model: nn.Module) -> nn.Module:
    """A float model of the same form, all zeros, so that what it holds later came from a file."""
    fresh = qbits.dequantize_(copy.deepcopy(model))
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    return fresh


def assert_equal_models(model: nn.Module, other: nn.Module) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert theirs[key].dtype == tensor.dtype, key
        assert torch.equal(theirs[key], tensor), key


def folder_bytes(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "scheme"),
    [*itertools.product(["bnb", "qbits"], SCHEMES), ("qbits", "af4"), ("qbits", "af4-dq")],
)
def test_load_returns_what_save_wrote_and_save_writes_it_again(tmp_path, device, scheme, dtype, format):
    model = make_quantized(scheme, dtype).to(device)
    qbits.save(model, tmp_path / "a.safetensors", format=format)
    loaded = qbits.load(tmp_path / "a.safetensors", zeroed(model))
    assert_equal_models(model, loaded)
    assert [m.scheme for m in loaded.modules() if isinstance(m, QuantizedLinear)] == [
        m.scheme for m in model.modules() if isinstance(m, QuantizedLinear)
    ]
    qbits.save(loaded, tmp_path / "b.safetensors", format=format)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    x = torch.randn(3, 64, dtype=dtype, device=device)
    assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("format", ["bnb", "qbits"])
@pytest.mark.parametrize("scheme", ["nf4-dq", "llm-int8", {"0": "int8", "2": "fp4", "4": "llm-int8"}])
def test_shards_load_into_a_meta_model_and_are_written_again(tmp_path, format, scheme):
    model = make_quantized(scheme)
    qbits.save(model, tmp_path / "a", format=format, max_shard_size="4KB")
    with torch.device("meta"):
        fresh = make_model()
    loaded = qbits.load(tmp_path / "a", fresh)
    assert_equal_models(model, loaded)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    qbits.save(loaded, tmp_path / "b", format=format, max_shard_size="4KB")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_shards_hold_whole_layers_below_the_given_size(tmp_path):
    model = make_quantized()
    qbits.save(model, tmp_path, max_shard_size=6000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(index.values())) == sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert len(set(index.values())) == 3
    for prefix in ("0.", "2.", "3.", "4."):
        assert len({file for key, file in index.items() if key.startswith(prefix)}) == 1
    for file in set(index.values()):
        tensors = load_file(tmp_path / file)
        keys = {key.split(".")[0] for key in tensors}
        # A shard over the limit holds one layer alone.
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 6000 or len(keys) == 1


def test_auto_writes_bitsandbytes_keys_where_they_can_hold_the_model(tmp_path):
    qbits.save(make_quantized({"0": "nf4-dq", "2": "fp4"}), tmp_path / "bnb.safetensors")
    assert {k for k in load_file(tmp_path / "bnb.safetensors") if k[0] in "02"} == {
        "0.weight",
        "0.bias",
        "0.weight.absmax",
        "0.weight.quant_map",
        "0.weight.nested_absmax",
        "0.weight.nested_quant_map",
        "0.weight.quant_state.bitsandbytes__nf4",
        "2.weight",
        "2.weight.absmax",
        "2.weight.quant_map",
        "2.weight.quant_state.bitsandbytes__fp4",
    }
    qbits.save(make_quantized({"0": "nf4-dq", "2": "af4"}), tmp_path / "qbits.safetensors")
    assert {k for k in load_file(tmp_path / "qbits.safetensors") if k[0] in "02"} == {
        "0.weight",
        "0.bias",
        "0.weight_absmax",
        "0.weight_absmax_scale",
        "0.weight_absmax_offset",
        "0.weight_quant_state",
        "2.weight",
        "2.weight_absmax",
        "2.weight_quant_state",
    }


def test_metadata_holds_the_schemes_and_the_callers_text(tmp_path):
    qbits.save(make_quantized("fp4"), tmp_path / "a.safetensors", format="qbits", metadata={"note": "mine"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    scheme = {"codebook": "fp4", "block_size": 64, "double_quant": False}
    assert metadata["format"] == "pt"
    assert metadata["note"] == "mine"
    assert json.loads(metadata["qbits"]) == {"version": 1, "schemes": dict.fromkeys("024", scheme)}


def test_equal_metadata_in_another_order_gives_equal_bytes(tmp_path):
    model = make_quantized()
    qbits.save(model, tmp_path / "a.safetensors", metadata={"x": "1", "y": "2", "a": "3"})
    qbits.save(model, tmp_path / "b.safetensors", metadata={"a": "3", "y": "2", "x": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_quantization_state_is_the_golden_text(tmp_path):
    model = nn.Sequential(nn.Linear(64, 2, bias=False, dtype=torch.bfloat16))
    qbits.save(qbits.quantize_(model, progress=False), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert list(tensors["0.weight"].shape) == [64, 1]
    # The 77 bytes that bitsandbytes 0.50.2 writes for this layer.
    assert bytes(tensors["0.weight.quant_state.bitsandbytes__nf4"].tolist()) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]}'
    )


def test_save_replaces_the_file_that_the_model_was_loaded_from(tmp_path):
    model = make_quantized()
    path = tmp_path / "a.safetensors"
    qbits.save(model, path)
    before = path.read_bytes()
    with torch.device("meta"):
        fresh = make_model()
    qbits.save(qbits.load(path, fresh), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_save_removes_the_shards_of_an_earlier_save(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    qbits.save(make_quantized(), tmp_path, max_shard_size="2KB")
    qbits.save(make_quantized(), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "tokenizer.json"]


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.head = nn.Linear(64, 32, bias=False)
            self.head.weight = self.embed.weight

    for format, scheme in (("bnb", "nf4"), ("qbits", "nf4"), ("bnb", "llm-int8"), ("qbits", "int8")):
        model = qbits.quantize_(Tied(), scheme, progress=False)
        qbits.save(model, tmp_path / "a.safetensors", format=format)
        keys = load_file(tmp_path / "a.safetensors").keys()
        assert not any(key.startswith(("b.weight", "head.")) for key in keys)
        for prepare in (lambda fresh: fresh, lambda fresh: qbits.quantize_(fresh, scheme, progress=False)):  # noqa: B023
            with torch.device("meta"):
                fresh = Tied()
            loaded = qbits.load(tmp_path / "a.safetensors", prepare(fresh))
            assert_equal_models(model, loaded)
            assert loaded.b.weight is loaded.a.weight
            scales = "weight_absmax" if scheme == "nf4" else "weight_scale"
            assert getattr(loaded.b, scales) is getattr(loaded.a, scales)
            assert loaded.head.weight is loaded.embed.weight


def test_load_keeps_bias_hooks_and_flags(tmp_path):
    model = make_quantized()
    qbits.save(model, tmp_path / "a.safetensors")
    fresh = zeroed(model)
    bias, calls = fresh[0].bias, []
    fresh[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    fresh[0].eval()
    qbits.load(tmp_path / "a.safetensors", fresh)
    assert isinstance(fresh[0], Linear4bit)
    assert fresh[0].bias is bias
    assert torch.equal(bias, model[0].bias)
    assert not fresh[0].training
    fresh[0](torch.zeros(1, 64))
    assert calls == [1]


def test_load_goes_to_the_device(tmp_path, device):
    model = make_quantized("nf4-dq")
    qbits.save(model, tmp_path / "a.safetensors")
    with torch.device("meta"):
        meta = make_model()
    for fresh in (meta, zeroed(model), make_quantized("nf4")):
        loaded = qbits.load(tmp_path / "a.safetensors", fresh, device=device)
        state = loaded.state_dict()
        headers = [key for key in state if key.endswith("quant_state")]  # JSON, which only the host reads
        assert {t.device.type for key, t in state.items() if t.dim() and key not in headers} == {device}
        assert_equal_models(model, loaded.cpu())


def test_load_without_a_model_gives_the_tensors_of_the_file(tmp_path):
    model = make_quantized("fp4-dq")
    qbits.save(model, tmp_path, max_shard_size="3KB")
    tensors = qbits.load(tmp_path)
    files = [load_file(f) for f in tmp_path.glob("*.safetensors")]
    due = {key: tensor for file in files for key, tensor in file.items()}
    assert tensors.keys() == due.keys()
    assert all(torch.equal(tensors[key], due[key]) for key in due)
    fresh = make_quantized("fp4")
    fresh.load_state_dict(tensors)
    assert_equal_models(model, fresh)


def test_float_checkpoint_loads_into_a_quantized_model(tmp_path):
    floats = make_model()
    save_file(floats.state_dict(), tmp_path / "float.safetensors")
    loaded = qbits.load(tmp_path / "float.safetensors", make_quantized("nf4-dq"))
    assert_equal_models(qbits.quantize_(floats, "nf4-dq", progress=False), loaded)


def test_load_refuses_other_names_and_takes_what_fits_where_asked(tmp_path):
    model = make_quantized()
    path = tmp_path / "a.safetensors"
    qbits.save(model, path)
    fresh = zeroed(model)
    fresh[4] = nn.Identity()
    fresh.append(nn.Linear(3, 2))
    before = fresh[5].weight.clone()
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(path, fresh)
    assert str(error.value) == (
        f"qbits::load: {path} must fit the model, got missing keys "
        "['5.bias', '5.weight'] and unexpected keys ['4.bias', '4.weight']"
    )
    assert type(fresh[0]) is nn.Linear
    qbits.load(path, fresh, strict=False)
    assert torch.equal(fresh[0].weight, model[0].weight)
    assert torch.equal(fresh[5].weight, before)


def test_load_passes_over_a_buffer_that_the_model_does_not_save(tmp_path):
    model = make_quantized()
    model.register_buffer("positions", torch.arange(4), persistent=True)
    qbits.save(model, tmp_path / "a.safetensors")
    fresh = zeroed(model)
    fresh.register_buffer("positions", torch.arange(8), persistent=False)
    qbits.load(tmp_path / "a.safetensors", fresh)
    assert fresh.positions.tolist() == list(range(8))


def test_keys_of_a_layer_may_be_split_over_shards(tmp_path):
    model = make_quantized("nf4-dq")
    qbits.save(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    folder = tmp_path / "split"
    folder.mkdir()
    weight_map = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal_models(model, qbits.load(folder, zeroed(model)))


def test_reader_gives_tensors_of_their_own_memory(tmp_path):
    save_file({"a": torch.arange(4)}, tmp_path / "a.safetensors")
    with CheckpointReader(tmp_path / "a.safetensors") as reader:
        tensor = reader.read("a")
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 200)
    assert tensor.tolist() == [0, 1, 2, 3]


class Config:
    """What save needs of a transformers model's configuration."""

    def to_json_string(self) -> str:
        return json.dumps({"model_type": "tiny", "quantization_config": {"old": True}})


def test_save_writes_a_config_that_names_the_quantization(tmp_path):
    model = qbits.quantize_(make_model(torch.bfloat16), "fp4-dq", only=["0"], progress=False)
    model.config = Config()
    qbits.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "tiny"
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["2", "4"],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
    qbits.save(qbits.dequantize_(model), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "tiny"}
    qbits.quantize_(model, LLMInt8(5.0), only=["0"], progress=False)
    qbits.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["load_in_8bit"] and written["_load_in_8bit"] and not written["load_in_4bit"]
    assert (written["llm_int8_threshold"], written["bnb_4bit_quant_type"]) == (5.0, "fp4")
    assert qbits.load(tmp_path, make_model(torch.bfloat16))[0].threshold == 5.0


def make_large_record() -> QTensor4:
    num_elements = 16384 * 4096  # 32 MiB packed, 4 MiB of absmax
    packed, absmax = torch.full((num_elements // 2,), 0x77, dtype=torch.uint8), torch.ones(num_elements // 64)
    return QTensor4(packed, absmax, (16384, 4096), torch.bfloat16, "nf4", 64)


@needs_linux
def test_save_and_load_hold_one_layer_at_a_time(tmp_path):
    def make_meta() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(4096, 16384, bias=False, device="meta") for _ in range(4)))

    record, model = make_large_record(), make_meta()
    layer_bytes = record.packed.numel() + record.absmax.numel() * 4
    for i in range(4):
        model[i] = Linear4bit(4096, 16384, bias=False, device="meta")
        model[i].load_record(make_large_record())
    del record
    assert peak_bytes(lambda: qbits.save(model, tmp_path, max_shard_size="50MB")) < layer_bytes / 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    # The model itself comes into being here; beside it there is less than one layer more, not the files.
    grown = peak_bytes(lambda: qbits.load(tmp_path, make_meta()))
    assert 4 * layer_bytes * 0.9 < grown < 5 * layer_bytes
