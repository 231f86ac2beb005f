"""`nn.SwitchBackLinear`: constructor, the rule of rows, forwards in every mode, copies, cached weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import qbits
import torch
from layers import bytes_of_state
from qbits import errors, functional, ops
from qbits.autograd import SwitchBackGlobalMemEfficient, SwitchBackVectorwise
from qbits.nn import (
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
    SwitchBackLinearVectorwiseMemEfficient,
    crossover,
    crossover_table,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

CLASSES = {
    SwitchBackLinearGlobal: (False, False),
    SwitchBackLinearGlobalMemEfficient: (False, True),
    SwitchBackLinearVectorwise: (True, False),
    SwitchBackLinearVectorwiseMemEfficient: (True, True),
}
classes = pytest.mark.parametrize("cls", CLASSES)


@classes
def test_forward_is_switchback_linear_of_its_parameters(cls, device):
    """[D24, D25, D28] All four, without triton, as real classes."""
    vectorwise, mem_efficient = CLASSES[cls]
    layer = cls(64, 8, min_rows=0, device=device)
    x = torch.randn(2, 3, 64, device=device)
    want = functional.switchback_linear(
        x, layer.weight, layer.bias, vectorwise=vectorwise, mem_efficient=mem_efficient
    )
    assert torch.equal(layer(x), want) and type(layer(x).grad_fn).__name__ == f"{layer._fn.__name__}Backward"
    plain = SwitchBackLinear(
        64, 8, vectorwise=vectorwise, mem_efficient=mem_efficient, min_rows=0, device=device
    )
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), want) and plain._fn is layer._fn
    assert issubclass(cls, SwitchBackLinear) and isinstance(layer, nn.Linear)


def test_arguments_have_their_names_and_defaults():
    layer = SwitchBackLinear(64, 8)
    assert (layer.vectorwise, layer.vector_wise_quantization, layer.mem_efficient) == (True, True, False)
    assert (layer.min_rows, layer.threshold, layer.keep_quantized_weight) == ("auto", 0.0, False)
    assert layer._fn is SwitchBackVectorwise
    other = SwitchBackLinear(64, 8, vector_wise_quantization=False, mem_efficient=True)
    assert not other.vectorwise and other._fn is SwitchBackGlobalMemEfficient
    assert repr(other) == (
        "SwitchBackLinear(in_features=64, out_features=8, bias=True, scheme='switchback', vectorwise=False, "
        "mem_efficient=True, min_rows='auto')"
    )


REFUSED = {
    "a class of the other kind": (
        lambda: SwitchBackLinearGlobal(4, 2, vectorwise=True),
        "SwitchBackLinearGlobal: vectorwise must be False, got True",
    ),
    "a class of the other memory": (
        lambda: SwitchBackLinearVectorwise(4, 2, mem_efficient=True),
        "SwitchBackLinearVectorwise: mem_efficient must be False, got True",
    ),
    "two names that differ": (
        lambda: SwitchBackLinear(4, 2, vectorwise=True, vector_wise_quantization=False),
        "SwitchBackLinear: vector_wise_quantization must be True, got False",
    ),
    "no bool": (
        lambda: SwitchBackLinear(4, 2, vectorwise=1),
        "SwitchBackLinear: vectorwise must be a bool, got 1",
    ),
    "min_rows": (
        lambda: SwitchBackLinear(4, 2, min_rows=-1),
        "SwitchBackLinear: min_rows must be 'auto' or an int >= 0, got -1",
    ),
    "threshold": (
        lambda: SwitchBackLinear(4, 2, threshold=-6.0),
        "SwitchBackLinear: threshold must be a number >= 0, got -6.0",
    ),
    "threshold beside mem_efficient": (
        lambda: SwitchBackLinearGlobalMemEfficient(4, 2, threshold=6.0),
        "SwitchBackLinear: threshold must be 0 with mem_efficient, whose codes lack those columns, got 6.0",
    ),
    "from_linear of another module": (
        lambda: SwitchBackLinear.from_linear(nn.ReLU()),
        "from_linear: linear must be a float nn.Linear, got ReLU",
    ),
    "another number of columns": (
        lambda: SwitchBackLinear(4, 2)(torch.zeros(3, 5)),
        "switchback_linear: input must have shape [*, 4], got [3, 5]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    call, words = REFUSED[case]
    with pytest.raises(errors.QbitsError) as caught:
        call()
    assert str(caught.value) == f"qbits::{words}"


@pytest.mark.parametrize("mode", ["eval", "train", "no_grad", "autocast"])
def test_forward_changes_nothing(mode):
    layer = SwitchBackLinear(64, 8, min_rows=0, threshold=2.0).train(mode == "train")
    before, attributes = bytes_of_state(layer), dict(vars(layer))
    versions = [p._version for p in layer.parameters()]
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.set_grad_enabled(mode != "no_grad"), torch.autocast("cpu", enabled=mode == "autocast"):
        for _ in range(3):
            y = layer(x)
    assert bytes_of_state(layer) == before and dict(vars(layer)) == attributes
    assert [p._version for p in layer.parameters()] == versions
    assert torch.equal(y, layer.eval()(x))


def test_state_dict_is_that_of_a_linear_layer():
    layer, linear = SwitchBackLinear(64, 8), nn.Linear(64, 8)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    assert bytes_of_state(layer) == bytes_of_state(linear)
    torch.manual_seed(3)
    first = SwitchBackLinear(64, 8)
    torch.manual_seed(3)
    assert torch.equal(first.weight, nn.Linear(64, 8).weight)


@pytest.mark.parametrize("rows", [4, 5, 6])
def test_few_rows_train_in_16_bit(rows, device):
    layer = SwitchBackLinear(64, 8, min_rows=5, device=device)
    x = torch.randn(rows, 64, device=device)
    dense = nn.functional.linear(x, layer.weight, layer.bias)
    int8 = functional.switchback_linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), dense if rows < 5 else int8)
    assert torch.equal(layer(x.view(1, rows, 64))[0], layer(x))
    assert torch.equal(layer.eval()(x), int8)  # the rule is one of training
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer.train()(x).dtype == torch.bfloat16


def test_auto_is_the_rule_of_the_table(monkeypatch):
    monkeypatch.setattr(crossover, "min_rows", lambda N, K, device: 5 if (N, K) == (8, 64) else 0)
    layer, x = SwitchBackLinear(64, 8), torch.randn(4, 64)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_rule_of_rows_is_data_that_can_be_printed():
    table = crossover_table()
    for model in crossover.MODELS:
        rows = model.min_rows(4096, 4096)
        assert 0 < rows < 16384 and f"| 4096 | 4096 | {rows} | estimate |" in table
        assert model.min_rows(14336, 4096) < 16384  # where int8 must win by the project's goals
        assert model.min_rows(16, 16) == crossover.NEVER
    for known in crossover.MEASURED:
        assert f"| {known.N} | {known.K} | {known.rows} | measured |" in table


def test_from_linear_and_to_linear_share_the_parameters():
    linear = nn.Linear(64, 8).eval()
    layer = SwitchBackLinearGlobal.from_linear(linear, min_rows=7)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert type(layer) is SwitchBackLinearGlobal and layer.min_rows == 7
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight is linear.weight and back.bias is linear.bias
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16
    assert linear.weight.dtype == torch.float32
    bare = SwitchBackLinear.from_linear(nn.Linear(64, 8, bias=False))
    assert bare.bias is None and bare.to_linear().bias is None


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@classes
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_independent(cls, how):
    layer = cls(64, 8, min_rows=3).eval().prepare_for_eval()
    other = COPIES[how](layer)
    assert type(other) is cls and other.min_rows == 3 and not other.training
    assert bytes_of_state(other) == bytes_of_state(layer) and torch.equal(other.W_int8, layer.W_int8)
    with torch.no_grad():
        other.weight.zero_()
        other.W_int8.zero_()
    assert layer.weight.any() and layer.W_int8.any()


def test_tied_layers_stay_tied_and_gradients_add_up(device):
    first, second = (SwitchBackLinear(64, 64, min_rows=0, device=device) for _ in range(2))
    second.weight = first.weight
    model = copy.deepcopy(nn.Sequential(first, second)).double().float()
    assert model[0].weight is model[1].weight
    x = torch.randn(3, 64, device=device)
    model(x).sum().backward()
    hidden = model[0](x)
    (inner,) = torch.autograd.grad(model[1](hidden).sum(), hidden)
    own = torch.autograd.grad(model[1](hidden.detach()).sum(), model[1].weight)[0]
    through = torch.autograd.grad(model[0](x), model[0].weight, inner)[0]
    torch.testing.assert_close(model[0].weight.grad, own + through)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("min_rows", [0, 9, "auto"])
def test_compiled_layer_equals_eager_bit_for_bit(dynamic, min_rows, device):
    torch._dynamo.reset()
    layer = SwitchBackLinear(64, 8, min_rows=min_rows, device=device)
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3, 7) if dynamic else (3,):
        x = torch.randn(2, n, 64, device=device, requires_grad=True)
        leaves = (x, layer.weight, layer.bias)
        got, want = compiled(x), layer(x)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (got, want)]
        assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_exported_layer_takes_any_batch(strict, prepared):
    layer = SwitchBackLinear(64, 8).eval()
    if prepared:
        layer.prepare_for_eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(3, 64),), dynamic_shapes=({0: batch},), strict=strict)
    x = torch.randn(11, 64)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_train_as_plain_ones(use_reentrant):
    model = nn.Sequential(
        SwitchBackLinear(64, 64, min_rows=0),
        nn.ReLU(),
        SwitchBackLinearGlobalMemEfficient(64, 8, min_rows=0, keep_quantized_weight=True),
    )
    x = torch.randn(3, 64, requires_grad=True)
    leaves = (x, *model.parameters())
    plain = torch.autograd.grad(model(x).pow(2).sum(), leaves)
    checkpoint(model, x, use_reentrant=use_reentrant).pow(2).sum().backward()
    assert all(torch.equal(leaf.grad, due) for leaf, due in zip(leaves, plain, strict=True))


def test_construction_on_meta_allocates_nothing():
    layer = SwitchBackLinear(64, 8, device="meta", min_rows=0)
    assert layer.weight.is_meta and layer(torch.zeros(3, 64, device="meta")).shape == (3, 8)
    source = SwitchBackLinear(64, 8, min_rows=0)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), source(x))
    empty = SwitchBackLinear(64, 8, device="meta", min_rows=0).to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    assert torch.equal(empty(x), source(x))


class Counter:
    """Counts the calls of the ops that quantize weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        for name in ("quantize_dual_rowwise", "quantize_global", "quantize_rowwise"):
            monkeypatch.setattr(ops, name, self.counting(name, getattr(ops, name)))

    def counting(self, name: str, op: Any) -> Any:
        def call(*args: Any) -> Any:
            if args[0].shape == (8, 64):
                self.calls.append(name)
            return op(*args)

        return call


@pytest.mark.parametrize("keep", [False, True])
def test_cached_weights_are_quantized_once_until_they_change(keep, monkeypatch, device):
    layer = SwitchBackLinear(64, 8, min_rows=0, keep_quantized_weight=keep, device=device)
    model, x = nn.Sequential(layer), torch.randn(3, 64, device=device)
    plain = torch.autograd.grad(model(x).square().sum(), layer.weight)[0]
    counter = Counter(monkeypatch)
    with qbits.cached_weights(model):
        grads = [torch.autograd.grad(model(x).square().sum(), layer.weight)[0] for _ in range(3)]
        assert len(counter.calls) == 1 and all(torch.equal(grad, plain) for grad in grads)
        with qbits.cached_weights(model):
            model(x)
        model(x)  # the inner context has dropped nothing
        assert len(counter.calls) == 1
        with torch.no_grad():
            layer.weight.mul_(2)
        changed = model(x)
        assert len(counter.calls) == 2
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model(x)
        model.load_state_dict(model.state_dict())
        model(x)
        assert len(counter.calls) == 4
        assert copy.deepcopy(layer)._weight_cache is None and pickle.loads(pickle.dumps(layer)) is not None
    assert torch.equal(model(x), changed) and torch.equal(model(x), changed) and len(counter.calls) == 6
    assert layer._weight_cache is None


def test_cached_weights_change_no_saved_tensor(device):
    """[C10] What is saved does not depend on hits."""
    layer = SwitchBackLinear(64, 8, min_rows=0, device=device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    counts = []
    with qbits.cached_weights(layer):
        for _ in range(2):
            saved: list[Any] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.shape), lambda t: t
            ):
                layer(x)
            counts.append(saved)
    assert counts[0] == counts[1] == [(8, 64), (3, 64)]


def test_cached_weights_refuse_what_is_no_module():
    with pytest.raises(errors.ArgumentTypeError) as caught:
        qbits.cached_weights([nn.Linear(1, 1)])
    assert str(caught.value) == "qbits::cached_weights: model must be a torch.nn.Module, got list"


def test_inference_tensors_are_never_cached(monkeypatch):
    with torch.inference_mode():
        layer = SwitchBackLinear(64, 8, min_rows=0)
        counter = Counter(monkeypatch)
        with qbits.cached_weights(layer):
            layer(torch.randn(3, 64))
            layer(torch.randn(3, 64))
    assert len(counter.calls) == 2
