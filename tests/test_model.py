"""quantize_ and dequantize_: which layers change, what stays as it was, and how much memory it takes."""

from __future__ import annotations

import copy
import re

import pytest
import qbits
import torch
from memory import needs_linux, peak_bytes
from qbits import functional, ops
from qbits.compat import bitsandbytes as bnb
from qbits.errors import QbitsWarning
from qbits.nn import Linear4bit, Linear8bit, QuantizedLinear
from qbits.schemes import FP4, NF4, Int8
from torch import nn
from torch.nn.utils import parametrize


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, input):
        return input + self.down(torch.relu(self.up(input)))


class Language(nn.Module):
    """A small language model, with an embedding, two blocks and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.blocks = nn.Sequential(Block(), Block())
        self.to_logits = nn.Linear(64, 96, bias=False)
        if tied:
            self.to_logits.weight = self.embed.weight

    def forward(self, tokens):
        return self.to_logits(self.blocks(self.embed(tokens)))


INNER = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def quantized_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.is_quantized]


def snapshot(model: nn.Module) -> dict[str, object]:
    """Types of all modules and copies of all tensors, to show that nothing has changed."""
    return {name: type(m) for name, m in model.named_modules()} | {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value is after[name]
        assert same or (isinstance(value, torch.Tensor) and not value.isfinite().all()), name


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp4", "fp4-dq", "af4", NF4(128), FP4(32, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_gives_each_layer_the_codes_of_its_weight(device, scheme, dtype):
    model = Language().to(device, dtype)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in INNER}
    assert qbits.quantize_(model, scheme, only=["up", "down"], progress=False) is model
    assert quantized_names(model) == INNER
    for name, weight in weights.items():
        chosen = qbits.schemes.as_scheme(scheme)
        due = functional.quantize_4bit(
            weight,
            codebook=chosen.codebook,
            block_size=chosen.block_size,
            double_quant=chosen.double_quant,
        )
        layer = model.get_submodule(name)
        assert layer.scheme == chosen
        assert layer.weight.device == weight.device
        assert torch.equal(layer.dequantize(), functional.dequantize_4bit(due))


@pytest.mark.parametrize("scheme", ["int8", "llm-int8", Int8(4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_to_int8_keeps_the_rows_of_each_weight_and_the_threshold(device, scheme, dtype):
    model = Language().to(device, dtype)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in INNER}
    qbits.quantize_(model, scheme, only=["up", "down"], compute_dtype=torch.float16, progress=False)
    assert quantized_names(model) == INNER
    for name, weight in weights.items():
        layer, (codes, scales) = model.get_submodule(name), ops.quantize_rowwise(weight)
        assert isinstance(layer, Linear8bit) and layer.scheme == qbits.schemes.as_scheme(scheme)
        assert torch.equal(layer.weight, codes) and torch.equal(layer.weight_scale, scales)
    assert model(torch.arange(12, device=device)).dtype == dtype
    decoded = {name: model.get_submodule(name).dequantize() for name in INNER}
    qbits.dequantize_(model)
    assert all(torch.equal(model.get_submodule(name).weight, w) for name, w in decoded.items())
    assert vars(model.blocks[0].up).keys() == vars(nn.Linear(1, 1)).keys()


def test_int8_layers_share_codes_and_scales_where_they_shared_a_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    qbits.quantize_(model, "llm-int8", progress=False)
    assert model[2].weight is model[0].weight and model[2].weight_scale is model[0].weight_scale
    assert model[2].bias is not model[0].bias and model[2].threshold == 6.0
    qbits.dequantize_(model)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize(
    "make", [lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), lambda: bnb.nn.LinearNF4(64, 64)]
)
def test_dequantize_leaves_nothing_of_a_compat_layer(make):
    model = nn.Sequential(make().to("cpu"))
    decoded = model[0].dequantize()
    qbits.dequantize_(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, decoded)
    assert vars(model[0]).keys() == vars(nn.Linear(1, 1)).keys()


def test_quantize_leaves_a_trainable_int8_layer_alone():
    model = nn.Sequential(Linear8bit(64, 64, trainable=True), nn.Linear(64, 64))
    qbits.quantize_(model, "int8", progress=False)
    assert quantized_names(model) == ["1"] and model[0].weight.requires_grad
    qbits.dequantize_(model)
    assert type(model[0]) is Linear8bit and type(model[1]) is nn.Linear


def test_quantize_changes_the_outputs_only_by_the_weights_error():
    model = Language()
    reference = copy.deepcopy(model)
    qbits.quantize_(model, progress=False)
    with torch.no_grad():
        for name in quantized_names(model):
            reference.get_submodule(name).weight.copy_(model.get_submodule(name).dequantize())
    tokens = torch.arange(12)
    # Two float32 products of the same operands in another order of at most 128 terms.
    torch.testing.assert_close(model(tokens), reference(tokens), rtol=1e-5, atol=1e-5)


def test_quantize_takes_schemes_by_name():
    model = Language()
    rules = {"blocks.0.*": "fp4", re.compile(r".*\.down"): None, "*.*": NF4(block_size=128)}
    qbits.quantize_(model, rules, progress=False)
    assert {name: str(model.get_submodule(name).scheme) for name in quantized_names(model)} == {
        "blocks.0.up": "fp4",
        "blocks.0.down": "fp4",
        "blocks.1.up": "nf4 (block 128)",
    }


def test_auto_skip_leaves_the_head_that_the_model_names():
    model = Language()
    model.get_output_embeddings = lambda: model.to_logits
    qbits.quantize_(model, progress=False)
    assert quantized_names(model) == INNER


@pytest.mark.parametrize("name", ["lm_head", "classifier", "score", "qa_outputs", "embed_out"])
def test_auto_skip_leaves_heads_by_name(name):
    model = nn.ModuleDict({"body": Block(), name: nn.Linear(64, 8)})
    qbits.quantize_(model, progress=False)
    assert quantized_names(model) == ["body.up", "body.down"]


def test_auto_skip_leaves_a_layer_tied_to_an_embedding_without_a_warning():
    model = Language(tied=True)
    qbits.quantize_(model, progress=False, strict=True)
    assert quantized_names(model) == INNER
    assert model.to_logits.weight is model.embed.weight


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({"skip": []}, []),
        ({"skip": ["blocks.1.*"]}, ["blocks.1.up", "blocks.1.down"]),
        ({"skip": ["down", "re:to_.*"]}, ["blocks.0.down", "blocks.1.down", "to_logits"]),
        ({"skip": lambda name, module: module.bias is None}, ["blocks.0.down", "blocks.1.down", "to_logits"]),
        ({"only": ["up"]}, ["blocks.0.down", "blocks.1.down", "to_logits"]),
        ({"only": ["blocks.*"], "skip": ["blocks.0.*"]}, ["blocks.0.up", "blocks.0.down", "to_logits"]),
    ],
)
def test_skip_and_only_choose_layers(arguments, left):
    model = Language()
    qbits.quantize_(model, progress=False, **arguments)
    assert quantized_names(model) == [name for name in [*INNER, "to_logits"] if name not in left]


@pytest.mark.parametrize("argument", ["skip", "only"])
def test_quantize_refuses_a_text_where_a_list_is_due(argument):
    with pytest.raises(TypeError) as error:
        qbits.quantize_(Language(), **{argument: "lm_head"})
    assert str(error.value) == (
        f"qbits::quantize_: {argument} must be a list of patterns, got the text 'lm_head'"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_refuses_a_weight_that_is_not_finite_before_any_change(device, value, dtype):
    model = Language().to(device, dtype)
    model.blocks[1].down.weight.data[63, 127] = value
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        qbits.quantize_(model, progress=False)
    assert str(error.value) == ("qbits::quantize_: weight of blocks.1.down must be finite, got NaN or Inf")
    assert_unchanged(model, before)


def test_quantize_refuses_an_unknown_scheme_before_any_change():
    model = Language()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got 'nf8'"):
        qbits.quantize_(model, {"up": "nf4", "down": "nf8"}, progress=False)
    assert_unchanged(model, before)


def test_quantize_refuses_a_linear_layer_as_the_model():
    with pytest.raises(ValueError) as error:
        qbits.quantize_(nn.Linear(64, 64))
    assert str(error.value) == (
        "qbits::quantize_: model must hold its linear layers as submodules, got a Linear itself"
    )


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(64, 64)
    layer.forward = lambda input: input
    return layer


def parametrized() -> nn.Linear:
    layer = nn.Linear(64, 64)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(64, 64, dtype=torch.float64), "layer (its weight is float64)"),
        (lambda: OwnForward(64, 64), "layer (OwnForward has a forward of its own)"),
        (replaced_forward, "layer (Linear has a forward of its own)"),
        (parametrized, "layer (its weight is computed from other parameters)"),
        (lambda: nn.LazyLinear(64), "layer (its weight is not initialized yet)"),
        (
            lambda: nn.MultiheadAttention(64, 2),
            "layer.out_proj (nn.MultiheadAttention reads its weight directly)",
        ),
    ],
)
def test_quantize_lists_layers_that_it_cannot_convert(make, reason):
    model = nn.ModuleDict({"good": nn.Linear(64, 64), "layer": make()})
    with pytest.raises(ValueError) as error:
        qbits.quantize_(model, strict=True, progress=False)
    assert str(error.value) == f"qbits::quantize_: layers must be convertible, got {reason}"
    assert quantized_names(model) == []
    with pytest.warns(QbitsWarning, match=f"left as they are: {re.escape(reason)}"):
        qbits.quantize_(model, progress=False)
    assert quantized_names(model) == ["good"]


def test_quantize_does_not_break_a_tie_with_an_embedding():
    model = Language(tied=True)
    with pytest.warns(QbitsWarning, match="to_logits .its weight is shared with a module that is no linear"):
        qbits.quantize_(model, skip=[], progress=False)
    assert model.to_logits.weight is model.embed.weight


def test_quantize_keeps_bias_hooks_flags_and_attributes():
    model = Language()
    layer = model.blocks[0].up
    bias, calls = layer.bias, []
    layer.name_of_mine = "first"
    layer.eval()
    hook = layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    qbits.quantize_(model, progress=False)
    new = model.blocks[0].up
    assert new.bias is bias
    assert new.name_of_mine == "first"
    assert (new.training, model.blocks[1].up.training) == (False, True)
    new(torch.zeros(1, 64))
    assert calls == [Linear4bit]
    hook.remove()
    new(torch.zeros(1, 64))
    assert calls == [Linear4bit]


def test_quantize_keeps_shared_weights_and_shared_modules():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.c = self.a

    model = Shared()
    biases = model.a.bias, model.b.bias
    qbits.quantize_(model, progress=False)
    assert model.c is model.a
    assert model.b is not model.a
    assert model.b.weight is model.a.weight
    assert model.b.weight_absmax is model.a.weight_absmax
    assert (model.a.bias, model.b.bias) == biases
    x = torch.randn(2, 64)
    # Both are the same product in float32; adding and taking off a bias below 1 rounds it by 2^-23 at most.
    torch.testing.assert_close(model.b(x) - model.b.bias, model.a(x) - model.a.bias, rtol=0, atol=2**-21)
    qbits.dequantize_(model)
    assert type(model.a) is type(model.b) is nn.Linear
    assert model.c is model.a
    assert model.b.weight is model.a.weight
    assert (model.a.bias, model.b.bias) == biases


def test_quantize_leaves_quantized_layers_alone():
    model = qbits.quantize_(Language(), {"blocks.0.*": "fp4"}, progress=False)
    first, weight = model.blocks[0].up, model.blocks[0].up.weight.clone()
    qbits.quantize_(model, "nf4", skip=[], progress=False)
    assert model.blocks[0].up is first
    assert torch.equal(first.weight, weight)
    assert model.blocks[1].up.scheme.codebook == "nf4"


def test_quantize_moves_the_model_to_the_device(device):
    model = Language()
    bias = model.blocks[0].up.bias
    qbits.quantize_(model, device=device, progress=False)
    assert {p.device.type for p in model.parameters()} == {device}
    assert model.blocks[0].up.bias is bias


def test_quantize_to_meta_keeps_no_data():
    model = qbits.quantize_(Language(), device="meta", progress=False)
    assert all(p.is_meta for p in model.parameters())


def test_quantize_on_meta_allocates_nothing():
    with torch.device("meta"):
        model = Language()
    qbits.quantize_(model, "nf4-dq", progress=False)
    assert quantized_names(model) == [*INNER, "to_logits"]
    assert all(p.is_meta for p in model.parameters())


def test_compute_dtype_reaches_every_layer():
    model = qbits.quantize_(Language(), compute_dtype=torch.bfloat16, progress=False)
    assert {model.get_submodule(n).compute_dtype for n in quantized_names(model)} == {torch.bfloat16}


@pytest.mark.parametrize("masked", [False, True])
def test_quantized_transformer_encoder_runs_in_eval(masked):
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    qbits.quantize_(model, skip=["out_proj"], progress=False)
    assert quantized_names(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    reference = qbits.dequantize_(copy.deepcopy(model))
    x, mask = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    arguments = {"src_key_padding_mask": mask} if masked else {}
    with torch.inference_mode():
        output, due = model(x, **arguments), reference(x, **arguments)
    torch.testing.assert_close(output[~mask], due[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_gives_back_plain_layers_with_the_decoded_weights(dtype):
    model = qbits.quantize_(Language(), "nf4-dq", progress=False)
    decoded = {name: model.get_submodule(name).dequantize(dtype) for name in quantized_names(model)}
    bias = model.blocks[0].up.bias
    assert qbits.dequantize_(model, dtype) is model
    assert quantized_names(model) == []
    for name, weight in decoded.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert vars(layer).keys() == vars(nn.Linear(1, 1)).keys()
    assert model.blocks[0].up.bias is bias
    assert bias.dtype == (dtype or torch.float32)
    model.blocks(torch.zeros(1, 64, dtype=dtype))


def test_dequantize_only_takes_patterns():
    model = qbits.quantize_(Language(), skip=["to_logits"], progress=False)
    qbits.dequantize_(model, only=["blocks.0.*"])
    assert quantized_names(model) == ["blocks.1.up", "blocks.1.down"]


def test_quantize_shows_progress_on_a_terminal_only(capsys):
    qbits.quantize_(Language(), progress=True)
    assert capsys.readouterr() == ("", "")


@needs_linux
def test_quantize_holds_one_layer_more_at_most():
    # 12 layers of 36 MiB: a float copy of the model is 432 MiB, all packed layers beside it would be 61 MiB.
    model = nn.Sequential(*(nn.Linear(3072, 3072, bias=False, device="meta") for _ in range(12)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    qbits.quantize_(nn.Sequential(nn.Linear(64, 64)), progress=False)  # threads and tables exist
    layer_bytes = 3072 * 3072 * 4
    assert peak_bytes(lambda: qbits.quantize_(model, progress=False)) < layer_bytes
    assert quantized_names(model) == [str(i) for i in range(12)]


@pytest.mark.gpu
def test_quantize_onto_the_gpu_holds_one_float_layer_at_most():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    qbits.quantize_(model, device="cuda", progress=False)
    grown = torch.cuda.max_memory_allocated() - start
    layer_bytes = 2048 * 2048 * 4
    # All packed layers (a seventh of the floats), one of them twice, and one float layer at a time.
    assert grown < qbits.memory_report(model).total + 1.3 * layer_bytes
