"""Damaged checkpoints: each is refused with a sentence that names the key, and the model stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import qbits
import torch
from damages import DAMAGES, NATIVE_DAMAGES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qbits.checkpoint import CheckpointReader
from qbits.errors import CheckpointFormatError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def make_model() -> nn.Sequential:
    # 10 blocks, the last one short; an odd row length
    return nn.Sequential(nn.Linear(41, 15), nn.LayerNorm(15))


def make_tensors(tmp_path: Path, scheme: str, format: str = "bnb") -> dict[str, Tensor]:
    qbits.save(
        qbits.quantize_(make_model(), scheme, progress=False), tmp_path / "good.safetensors", format=format
    )
    return load_file(tmp_path / "good.safetensors")


def refuse(path: Path, *words: str) -> None:
    """Loading into a model refuses the file with one sentence, and the model stays as it was."""
    model = make_model()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(path, model)
    assert str(error.value).startswith("qbits::load: ")
    for word in words:
        assert word in str(error.value)
    assert [type(m) for m in model] == [type(m) for m in before]
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def refuse_alone(path: Path, *words: str) -> None:
    """Loading without a model refuses the file with the same words."""
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(path)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses_a_file_whose(tmp_path, name):
    scheme, damage, key, words = DAMAGES[name]
    tensors = make_tensors(tmp_path, scheme)
    damage(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    refuse(tmp_path / "bad.safetensors", key, words)
    if name != "shape is transposed":  # which only a model can tell
        refuse_alone(tmp_path / "bad.safetensors", key, words)


def test_load_names_the_cause_of_an_absmax_that_a_forward_of_bitsandbytes_repacked(tmp_path):
    tensors = make_tensors(tmp_path, "nf4")
    tensors["0.weight.absmax"] = torch.ones(2, 5, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "bad.safetensors")
    assert str(error.value) == (
        "qbits::load: 0.weight.absmax must be 1-D float32; bitsandbytes' CPU forward repacks weights in "
        "place and then saves wrong ones: save the model anew, before any forward, got bfloat16 [2, 5]"
    )


@pytest.mark.parametrize("name", NATIVE_DAMAGES)
def test_load_refuses_a_native_file_whose(tmp_path, name):
    scheme, damage, key = NATIVE_DAMAGES[name]
    tensors = make_tensors(tmp_path, scheme, "qbits")
    damage(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    refuse(tmp_path / "bad.safetensors", key)
    refuse_alone(tmp_path / "bad.safetensors", key)


@pytest.mark.parametrize("format", ["bnb", "qbits"])
def test_load_refuses_a_file_that_is_cut_anywhere(tmp_path, format):
    make_tensors(tmp_path, "nf4-dq", format)
    data = (tmp_path / "good.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    for length in range(0, len(data), 7):
        bad.write_bytes(data[:length])
        with pytest.raises(CheckpointFormatError) as error:
            qbits.load(bad)
        assert str(error.value).startswith(f"qbits::load: {bad} must be a complete safetensors file, got: ")


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_load_takes_or_refuses_a_file_with_any_bytes_changed(tmp_path, data):
    good = tmp_path / "good.safetensors"
    if not good.exists():
        make_tensors(tmp_path, "nf4-dq")
    content = bytearray(good.read_bytes())
    # The header and the JSON decide most; they are hit half of the time.
    texts = content.find(b'{"quant_type"'), len(content)
    spans = st.sampled_from([(0, 1200), texts, (0, len(content))])
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = data.draw(spans)
        content[data.draw(st.integers(start, stop - 1))] = data.draw(st.integers(0, 255))
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    try:
        model = qbits.load(bad, make_model())
    except CheckpointFormatError as error:
        assert str(error).startswith("qbits::load: ")
    else:
        assert model(torch.zeros(1, 41)).shape == (1, 15)


def test_load_refuses_what_is_not_there_and_what_is_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a \.safetensors file or a folder"):
        qbits.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or one index of shards"):
        qbits.load(tmp_path)
    torch.save({}, tmp_path / "model.bin")
    with pytest.raises(CheckpointFormatError, match=r"path must be a \.safetensors file or a folder"):
        qbits.load(tmp_path / "model.bin")


def make_shards(tmp_path: Path) -> Path:
    qbits.save(qbits.quantize_(make_model(), progress=False), tmp_path, max_shard_size=500)
    return tmp_path / "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda index: "{", CheckpointFormatError, "JSON object with a weight_map"),
        (lambda index: "[]", CheckpointFormatError, "JSON object with a weight_map"),
        (lambda index: '{"weight_map": 3}', CheckpointFormatError, "JSON object with a weight_map"),
        (
            lambda index: index.replace("model-00001", "../model-00001"),
            CheckpointFormatError,
            "files of its own folder",
        ),
        (lambda index: index.replace("model-00001", "model-00009"), FileNotFoundError, "must exist"),
        (lambda index: index.replace('"0.bias"', '"0.other"'), CheckpointFormatError, "0.other must be in"),
    ],
)
def test_load_refuses_a_damaged_index(tmp_path, change, kind, words):
    index = make_shards(tmp_path)
    index.write_text(change(index.read_text()))
    with pytest.raises(kind) as error:
        qbits.load(tmp_path)
    assert words in str(error.value)


def test_load_refuses_a_key_that_two_shards_hold(tmp_path):
    make_shards(tmp_path)
    extra = tmp_path / "model-00002-of-00002.safetensors"
    tensors = load_file(extra)
    save_file(tensors | {"0.bias": torch.zeros(15)}, extra)
    with pytest.raises(CheckpointFormatError, match=r"0\.bias must be in one file, got it in \["):
        qbits.load(tmp_path)


def test_load_refuses_another_codebook_than_the_layers(tmp_path):
    make_tensors(tmp_path, "nf4")
    model = qbits.quantize_(make_model(), "fp4", progress=False)
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "good.safetensors", model)
    assert str(error.value) == "qbits::load: 0.weight must be fp4 as the model's layer is, got nf4"


def test_load_refuses_a_quantized_weight_of_another_module(tmp_path):
    make_tensors(tmp_path, "nf4")
    model = nn.Sequential(nn.Conv1d(41, 15, 1), nn.LayerNorm(15))
    with pytest.raises(CheckpointFormatError) as error:
        qbits.load(tmp_path / "good.safetensors", model)
    assert str(error.value) == "qbits::load: 0.weight must belong to a linear layer, got another module"


def test_reader_names_a_dtype_that_torch_lacks(tmp_path):
    header = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with (
        CheckpointReader(tmp_path / "a.safetensors") as reader,
        pytest.raises(CheckpointFormatError) as error,
    ):
        reader.info("a")
    assert "a must have one of the dtypes" in str(error.value)
    assert str(error.value).endswith("got F8_E8M0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "gguf"}, "format must be one of ['auto', 'bnb', 'qbits'], got 'gguf'"),
        (
            {"max_shard_size": "5XB"},
            'max_shard_size must be a positive size such as "5GB" or "200MiB", got \'5XB\'',
        ),
        ({"max_shard_size": 0}, 'max_shard_size must be a positive size such as "5GB" or "200MiB", got 0'),
        (
            {"metadata": {"format": "tf"}},
            "metadata must map text to text and leave the keys format and qbits free, got 'format': 'tf'",
        ),
        (
            {"metadata": {"step": 3}},
            "metadata must map text to text and leave the keys format and qbits free, got 'step': 3",
        ),
    ],
)
def test_save_refuses_arguments_and_writes_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError) as error:
        qbits.save(make_model(), tmp_path / "new", **arguments)
    assert str(error.value) == f"qbits::save: {message}"
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_af4_in_the_format_of_bitsandbytes(tmp_path):
    with pytest.raises(ValueError) as error:
        qbits.save(
            qbits.quantize_(make_model(), "af4", progress=False), tmp_path / "a.safetensors", format="bnb"
        )
    assert str(error.value) == "qbits::save: format must be 'qbits' or 'auto' for ['af4'], got 'bnb'"


@pytest.mark.parametrize(
    ("buffer", "got"),
    [
        (torch.zeros(2, device="meta"), "torch.float32 on meta"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128 on cpu"),
    ],
)
def test_save_refuses_a_tensor_that_a_file_cannot_hold_and_keeps_the_old_file(tmp_path, buffer, got):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    model = make_model()
    model.register_buffer("extra", buffer)
    with pytest.raises(ValueError) as error:
        qbits.save(model, path)
    assert str(error.value) == (
        f"qbits::save: extra must be a tensor with data that safetensors knows, got {got}"
    )
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
