"""What only a GPU shows: graph capture, streams, several devices; and that none of it is needed to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from calls import SPECS, Call, valid_call, valid_calls
from compare import assert_same_bits, bits_of

OPS = sorted(SPECS)
SLEEP_CYCLES = 50_000_000  # about 30 ms on an H200: longer than any of these kernels


def run_python(source: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def fresh_inputs(call: Call) -> None:
    """Other numbers in the same memory, of the same kind."""
    device = str(next(iter(call.tensors().values())).device)
    optional = [arg["name"] for arg in call.spec["args"] if arg["role"] == "optional"]
    is_nested = any(call.args[name] is not None for name in optional)
    other = valid_call(call.name, device, with_optional=is_nested, **call.sizes)
    for name, tensor in call.tensors().items():
        if tensor.dtype == other.args[name].dtype:
            tensor.copy_(other.args[name])


def test_import_needs_no_gpu():
    source = (
        "import qbits, torch; x = qbits.ops.quantize_4bit(torch.ones(64), 'nf4', 64)[0]; print(int(x[0]))"
    )
    assert run_python(source, CUDA_VISIBLE_DEVICES="").strip() == str(0xFF)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_replays_of_a_captured_graph_follow_changed_inputs(op):
    for call in [*valid_calls(op, "cuda"), valid_call(op, "cuda", n=70_001, M=8, N=129, K=512)]:
        call.run()  # warm-up, as torch asks for
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call.run()
        for _ in range(3):
            fresh_inputs(call)
            for guard in call.guards:
                guard.tensor.fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            for got, want in zip(call.outputs.values(), call.run_allocating(), strict=True):
                assert_same_bits(got, want, f"{op} {call.sizes}")
            for guard in call.guards:
                guard.assert_intact()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_first_call_of_a_process_may_be_captured(op):
    """Kernels are loaded inside the capture: nothing there may synchronize or allocate."""
    source = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from calls import valid_call
call = valid_call({op!r}, "cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    call.run()
graph.replay()
torch.cuda.synchronize()
pairs = zip(call.outputs.values(), call.run_allocating())
print(all(torch.equal(a.reshape(-1), b.reshape(-1)) for a, b in pairs))
"""
    assert run_python(source).strip() == "True"


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_work_waits_for_the_producer_on_the_same_stream(op):
    stream = torch.cuda.Stream()
    call = valid_call(op, "cuda", n=100_000, M=8, N=256, K=1024)
    want = [tensor.clone() for tensor in call.run_allocating()]
    good = {name: tensor.clone() for name, tensor in call.tensors().items()}
    for tensor in call.tensors().values():
        tensor.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, tensor in call.tensors().items():
            tensor.copy_(good[name])
        results = call.run_allocating()
        copies = [result.clone() for result in results]
    stream.synchronize()
    for got, expected in zip(copies, want, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.gpu
def test_calls_return_before_the_work_is_done():
    """No op waits: with the stream asleep, the calls come back while it sleeps. Full checks do wait."""
    stream = torch.cuda.Stream()
    calls = [valid_call(op, "cuda") for op in OPS]
    for call in calls:
        call.run()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20 * SLEEP_CYCLES)
        for call in calls:
            call.run()
        assert stream.query() == (os.environ.get("QBITS_CHECK") == "full"), "an op waited for the device"
    stream.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_two_streams_do_not_disturb_each_other(op):
    calls = [valid_call(op, "cuda", n=2**20 + 37, M=4, N=512, K=2048) for _ in range(2)]
    want = [[tensor.clone() for tensor in call.run_allocating()] for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(10):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                call.run()
    torch.cuda.synchronize()
    for call, expected in zip(calls, want, strict=True):
        for got, wanted in zip(call.outputs.values(), expected, strict=True):
            assert_same_bits(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_every_run_gives_the_same_bits(op):
    call = valid_call(op, "cuda", n=2**20 + 37, M=8, N=512, K=2048)
    call.run()
    first = [bits_of(tensor).copy() for tensor in call.outputs.values()]
    for _ in range(20):
        call.run()
        for tensor, bits in zip(call.outputs.values(), first, strict=True):
            assert (bits_of(tensor) == bits).all()


@pytest.mark.gpu
def test_full_checks_accept_good_calls_and_name_bad_memory():
    source = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from calls import SPECS, valid_call
for op in SPECS:
    valid_call(op, "cuda").run()
torch.cuda.synchronize()
print("checked", len(SPECS))
"""
    assert run_python(source, QBITS_CHECK="full").split() == ["checked", str(len(OPS))]


@pytest.mark.gpu
def test_plans_are_printed_on_request():
    source = "import qbits, torch; qbits.ops.quantize_4bit(torch.ones(64, device='cuda'), 'nf4', 64)"
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "QBITS_PRINT_PLANS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "quantize_4bit_float32_nf4" in done.stderr
    assert "<<<" in done.stderr


@pytest.mark.multigpu
@pytest.mark.parametrize("op", OPS)
def test_a_tensor_of_the_second_device_is_served_while_the_first_is_current(op):
    assert torch.cuda.current_device() == 0
    call = valid_call(op, "cuda:1")
    for result, given in zip(call.run_allocating(), call.outputs.values(), strict=True):
        assert result.device == torch.device("cuda:1")
        call.run()
        assert_same_bits(given, result)
    assert torch.cuda.current_device() == 0
    on_first = valid_call(op, "cuda:0")
    on_first.args = {k: v.to("cuda:0") if isinstance(v, torch.Tensor) else v for k, v in call.args.items()}
    for result, given in zip(on_first.run_allocating(), call.outputs.values(), strict=True):
        assert_same_bits(result, given)


@pytest.mark.multigpu
@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_gpus_are_refused(op):
    call = valid_call(op, "cuda:0")
    names = [*call.tensors(), *call.outputs]
    for name in names[1:]:
        call = valid_call(op, "cuda:0")
        place = call.args if name in call.args else call.outputs
        place[name] = place[name].to("cuda:1")
        with pytest.raises(ValueError) as refusal:
            call.run()
        assert str(refusal.value) == f"qbits::{op}: {name} must be on cuda:0 like {names[0]}, got cuda:1"


@pytest.mark.multigpu
def test_the_stream_is_that_of_the_tensors_device():
    stream = torch.cuda.Stream("cuda:1")
    x = torch.randn(2**20, device="cuda:1")
    call = valid_call("quantize_4bit", "cuda:1", n=2**20)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        call.args["input"].copy_(x)
        call.run()
        copies = [tensor.clone() for tensor in call.outputs.values()]
    stream.synchronize()
    for got, want in zip(copies, call.run_allocating(), strict=True):
        assert_same_bits(got, want)
