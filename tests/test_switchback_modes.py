"""SwitchBack under autocast, checkpointing, threads, torch.compile and CUDA graphs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from qbits.functional import switchback_linear
from torch.utils.checkpoint import checkpoint

FORMS = [(False, False), (False, True), (True, False), (True, True)]
form = pytest.mark.parametrize("vectorwise, mem_efficient", FORMS)


@form
@pytest.mark.parametrize("around_backward", [False, True])
def test_autocast_gives_its_dtype_and_backward_keeps_to_it(
    vectorwise, mem_efficient, around_backward, device
):
    options = {"vectorwise": vectorwise, "mem_efficient": mem_efficient}
    x = torch.randn(3, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device, requires_grad=True)
    bias = torch.randn(8, device=device, requires_grad=True)
    leaves = (x, weight, bias)
    narrow = x.detach().bfloat16().requires_grad_()
    want = switchback_linear(narrow, weight, bias, **options)
    grad = torch.randn_like(want)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = switchback_linear(x, weight, bias, **options)
        with torch.autocast(device, enabled=False):
            assert switchback_linear(x, weight, bias, **options).dtype == torch.float32
    assert torch.equal(y, want) and y.dtype == torch.bfloat16
    got = torch.autograd.grad(y, leaves, grad)
    due = torch.autograd.grad(want, (narrow, weight, bias), grad)
    assert [g.dtype for g in got] == [torch.float32] * 3
    assert torch.equal(got[0].bfloat16(), due[0]) and all(map(torch.equal, got[1:], due[1:]))
    # the reverse: a float32 forward whose backward runs inside an autocast
    z = switchback_linear(x, weight, bias, **options)
    plain = torch.autograd.grad(z.square().sum(), leaves)
    z = switchback_linear(x, weight, bias, **options).square().sum()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=around_backward):
        assert all(map(torch.equal, torch.autograd.grad(z, leaves), plain))


@form
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(vectorwise, mem_efficient, use_reentrant, device):
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    bias = torch.randn(64, device=device, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        options = {"vectorwise": vectorwise, "mem_efficient": mem_efficient}
        hidden = torch.relu(switchback_linear(x, weight, bias, **options))
        return switchback_linear(hidden, weight, keep_quantized_weight=True, **options)  # the layer twice

    x = torch.randn(3, 64, device=device, requires_grad=True)
    leaves = (x, weight, bias)
    plain = torch.autograd.grad(block(x).square().sum(), leaves)
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, due) for leaf, due in zip(leaves, plain, strict=True))


def test_calls_in_two_threads_share_nothing(device):
    """[D13]"""
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    inputs = [torch.randn(n, 64, device=device, requires_grad=True) for n in (1, 7)]
    alone = [torch.autograd.grad(switchback_linear(t, weight).square().sum(), t)[0] for t in inputs]
    found: dict[int, torch.Tensor] = {}

    def train(i: int) -> None:
        for _ in range(20):
            found[i] = torch.autograd.grad(switchback_linear(inputs[i], weight).square().sum(), inputs[i])[0]

    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(2))


@form
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "threshold, keep, min_rows", [(0.0, False, 0), (0.0, True, 0), (2.0, False, 0), (0.0, False, 7)]
)
def test_compiled_forward_and_backward_equal_eager_bit_for_bit(
    vectorwise, mem_efficient, dynamic, threshold, keep, min_rows, device
):
    if mem_efficient:
        threshold = 0.0
    weight = torch.randn(48, 64, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return switchback_linear(
            x,
            weight,
            bias,
            vectorwise=vectorwise,
            mem_efficient=mem_efficient,
            threshold=threshold,
            keep_quantized_weight=keep,
            min_rows=min_rows,
        )

    torch._dynamo.reset()
    compiled: Any = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 3, 5) if dynamic else (3,):
        x = torch.randn(2, n, 64, device=device, requires_grad=True)
        leaves = (x, weight, bias)
        got, want = compiled(*leaves), call(*leaves)
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(y.pow(2).sum(), leaves) for y in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with torch.no_grad():
            assert torch.equal(compiled(*leaves), want)


def test_functorch_transforms_get_torch_s_own_refusal(device):
    weight = torch.randn(8, 64, device=device)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.grad(lambda t: switchback_linear(t, weight).sum())(torch.randn(3, 64, device=device))


@pytest.mark.gpu
def test_a_training_step_is_captured_in_a_cuda_graph():
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(96, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(96, device="cuda", requires_grad=True)
    leaves = (x, weight, bias)

    def step() -> Any:
        y = switchback_linear(x, weight, bias, threshold=3.0)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        weight.copy_(torch.randn_like(weight))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
