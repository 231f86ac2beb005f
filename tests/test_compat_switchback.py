"""SwitchBack under bitsandbytes' names: argument order, defaults, classes, the Functions' names."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from qbits import autograd, compat, functional, nn
from qbits.compat import bitsandbytes as bnb
from qbits.compat.bitsandbytes.nn import triton_based_modules as modules

CLASSES = {
    modules.SwitchBackLinearGlobal: (False, False, nn.SwitchBackLinearGlobal),
    modules.SwitchBackLinearGlobalMemEfficient: (False, True, nn.SwitchBackLinearGlobalMemEfficient),
    modules.SwitchBackLinearVectorwise: (True, False, nn.SwitchBackLinearVectorwise),
    modules.SwitchBackLinearVectorwiseMemEfficient: (True, True, nn.SwitchBackLinearVectorwiseMemEfficient),
}


def test_arguments_stand_in_their_order_and_the_default_is_one_scale():
    layer = modules.SwitchBackLinear(64, 8, False, "cpu", torch.bfloat16, True, True)
    assert (layer.bias, layer.weight.dtype) == (None, torch.bfloat16)
    assert (layer.vector_wise_quantization, layer.mem_efficient) == (True, True)
    plain = modules.SwitchBackLinear(64, 8)
    assert (plain.vector_wise_quantization, plain.mem_efficient, plain.min_rows) == (False, False, 0)
    assert plain._fn is autograd.SwitchBackGlobal


@pytest.mark.parametrize("cls", CLASSES)
def test_classes_are_real_and_compute_what_the_modern_ones_do(cls, device):
    """[D24, D28] All four, with int8 for a single row, too."""
    vectorwise, mem_efficient, modern = CLASSES[cls]
    layer, other = cls(64, 8, device=device), modern(64, 8, min_rows=0, device=device)
    other.load_state_dict(layer.state_dict())
    for x in (torch.randn(1, 64, device=device), torch.randn(2, 3, 64, device=device)):
        assert torch.equal(layer(x), other(x)) and layer._fn is other._fn
        want = functional.switchback_linear(
            x, layer.weight, layer.bias, vectorwise=vectorwise, mem_efficient=mem_efficient
        )
        assert torch.equal(layer(x), want)
    assert isinstance(layer, modules.SwitchBackLinear) and isinstance(layer, nn.SwitchBackLinear)
    assert getattr(bnb.nn, cls.__name__) is cls
    restored = pickle.loads(pickle.dumps(layer))
    assert type(restored) is cls and torch.equal(restored.weight, layer.weight)
    linear = torch.nn.Linear(64, 8)
    assert cls.from_linear(linear).weight is linear.weight


def test_prepare_for_eval_by_apply_as_programs_there_do():
    model = torch.nn.Sequential(modules.SwitchBackLinearVectorwise(64, 8), torch.nn.Linear(8, 2)).eval()
    x = torch.randn(3, 64)
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.apply(lambda m: m.prepare_for_eval() if hasattr(m, "prepare_for_eval") else None)
    assert torch.equal(model(x), want) and model[0].W_int8.dtype == torch.int8


def test_functions_have_their_names_and_apply_to_three_tensors():
    x, weight = torch.randn(3, 64), torch.randn(8, 64, requires_grad=True)
    for name, options in {
        "_switchback_global": {"vectorwise": False},
        "_switchback_vectorrize": {},
        "_switchback_global_mem_efficient": {"vectorwise": False, "mem_efficient": True},
    }.items():
        want = functional.switchback_linear(x, weight, **options)
        assert torch.equal(getattr(modules, name).apply(x, weight, None), want)
    assert modules.StandardLinear is nn.StandardLinear
    assert modules.StandardLinearFunction is autograd.StandardLinearFunction


def test_the_module_path_resolves_and_needs_no_triton(monkeypatch):
    """[D25]"""
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    with compat.patched():
        from bitsandbytes.nn.triton_based_modules import SwitchBackLinear

        assert SwitchBackLinear is modules.SwitchBackLinear
    assert SwitchBackLinear(64, 8)(torch.randn(3, 64)).shape == (3, 8)
