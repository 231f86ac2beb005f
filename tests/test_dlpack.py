"""Arrays of NumPy, JAX and CuPy in and out; capsules for torch; threads, the GIL and forked workers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import reference
import torch
from calls import SPECS, valid_call
from compare import assert_same_bits
from qbits import errors, ops

RANDOM = np.random.default_rng(25)


def run_python(source: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that finds the modules of this folder."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n{source}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_numpy_arrays_are_quantized_multiplied_and_handed_back():
    N, K, M = 12, 128, 3
    weight, x = (RANDOM.standard_normal(shape, np.float32) for shape in ((N, K), (M, K)))
    packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
    want_packed, want_absmax = reference.quantize_4bit(weight.reshape(-1), "nf4", 64)
    assert (np.from_dlpack(packed) == want_packed).all()
    assert (np.from_dlpack(absmax) == want_absmax).all()
    decoded = np.from_dlpack(ops.dequantize_4bit(packed, absmax, N * K, "nf4", 64, "float16"))
    want = reference.round_to(reference.decode_4bit(want_packed, want_absmax, N * K, "nf4", 64), "float16")
    assert decoded.dtype == np.float16
    assert (decoded == want).all()
    y = np.from_dlpack(ops.gemm_4bit(x, packed, absmax, N, K, "nf4", 64))
    assert y.shape == (M, N)
    exact = reference.gemm_4bit(x, want_packed, want_absmax, (N, K), "nf4", 64, None)
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("op", sorted(SPECS))
def test_every_op_takes_numpy_arrays_and_fills_numpy_outputs(op):
    call = valid_call(op)
    want = [tensor.clone() for tensor in call.run_allocating()]
    call.args = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in call.args.items()}
    for got, expected in zip(call.run_allocating(), want, strict=True):
        assert_same_bits(torch.from_dlpack(got), expected)
    call.outputs = {name: np.zeros(tuple(t.shape), t.numpy().dtype) for name, t in call.outputs.items()}
    call.run()
    for array, expected in zip(call.outputs.values(), want, strict=True):
        assert_same_bits(torch.from_numpy(np.atleast_1d(array)), expected)


def test_numpy_and_torch_may_be_mixed():
    x = torch.randn(1000)
    packed, absmax = ops.quantize_4bit(x, "nf4", 64, out=(np.zeros(500, np.uint8), np.zeros(16, np.float32)))
    want_packed, want_absmax = ops.quantize_4bit(x, "nf4", 64)
    assert (packed == want_packed.numpy()).all()
    assert (absmax == want_absmax.numpy()).all()


def test_a_buffer_lives_as_long_as_its_views():
    x = RANDOM.standard_normal(10_000, np.float32)
    codes = ops.quantize(x, reference.dynamic_map())[0]
    view = np.from_dlpack(codes)
    want = view.copy()
    del codes
    gc.collect()
    for _ in range(20):  # memory freed too early would be taken over by these
        ops.quantize(-x, reference.dynamic_map())
    assert (view == want).all()


def test_a_buffer_tells_what_it_holds():
    codes, absmax = ops.quantize(np.ones(5, np.float32), reference.dynamic_map())
    assert (codes.shape, codes.dtype, codes.__dlpack_device__()) == ((5,), "uint8", (1, 0))
    assert (absmax.shape, absmax.dtype) == ((), "float32")
    assert repr(codes) == "Buffer(shape=[5], dtype=uint8, device=cpu)"
    torch_view = torch.from_dlpack(codes)
    assert torch_view.tolist() == [255] * 5


def test_producers_are_released():
    """A capsule's producer may be freed once the call is over: no reference is kept."""

    class Array(np.ndarray):
        pass

    x = np.ones(1000, np.float32).view(Array)
    alive = weakref.ref(x)
    references = sys.getrefcount(x)
    for _ in range(10):
        ops.quantize_4bit(x, "nf4", 64)
    assert sys.getrefcount(x) == references
    del x
    gc.collect()
    assert alive() is None


def test_numpy_views_that_are_not_contiguous_are_refused():
    with pytest.raises(errors.ArgumentValueError) as refusal:
        ops.quantize_4bit(np.ones((64, 2), np.float32).T, "nf4", 64)
    message = "qbits::quantize_4bit: input must be contiguous, got a strided view of shape [2, 64]"
    assert str(refusal.value) == message


def test_arrays_of_unknown_dtypes_are_refused():
    for array in (np.ones(64, np.complex64), np.ones(64, np.float64), np.ones(64, np.uint32)):
        with pytest.raises(errors.DtypeError, match=r"^qbits::quantize_4bit: input must have "):
            ops.quantize_4bit(array, "nf4", 64)


def test_capsules_can_be_forced_for_torch(device):
    """With QBITS_DLPACK=capsule torch tensors take the way of every other array; results must not change."""
    source = f"""
import torch
torch.manual_seed(0)
from calls import SPECS, valid_calls
from qbits import ops
for op in SPECS:
    for call in valid_calls(op, {device!r}):
        call.run()
        for got, given in zip(call.run_allocating(), call.outputs.values()):
            assert type(got) is torch.Tensor, type(got)
            assert torch.equal(torch.from_dlpack(got).reshape(-1), given.reshape(-1)), op
packed, absmax = ops.quantize_4bit(torch.nn.Parameter(torch.ones(100, device={device!r})), "nf4", 64)
print(torch.from_dlpack(packed).tolist() == [255] * 50)
"""
    assert run_python(source, QBITS_DLPACK="capsule").strip() == "True"


def test_a_program_without_torch_in_sight_uses_numpy_alone():
    source = """
import numpy as np
from qbits import ops
packed, absmax = ops.quantize_4bit(np.arange(-32, 32, dtype=np.float32), "nf4", 64)
print(np.from_dlpack(absmax).tolist(), np.from_dlpack(packed).size)
"""
    assert run_python(source).strip() == "[32.0] 32"


@pytest.fixture
def jax(monkeypatch):
    """JAX, which otherwise takes three quarters of the GPU's memory at once."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return pytest.importorskip("jax")


def test_jax_arrays_are_taken_and_never_written(jax):
    x = RANDOM.standard_normal(1000, np.float32)
    want_packed, want_absmax = reference.quantize_4bit(x, "nf4", 64)
    packed, absmax = ops.quantize_4bit(jax.numpy.asarray(x), "nf4", 64)
    assert (np.asarray(jax.dlpack.from_dlpack(packed)) == want_packed).all()
    assert (np.asarray(jax.dlpack.from_dlpack(absmax)) == want_absmax).all()
    half = jax.numpy.asarray(x).astype(jax.numpy.bfloat16)
    packed_half, _ = ops.quantize_4bit(half, "nf4", 64)
    widened = np.asarray(half.astype(jax.numpy.float32))
    assert (
        np.asarray(jax.dlpack.from_dlpack(packed_half)) == reference.quantize_4bit(widened, "nf4", 64)[0]
    ).all()
    output = jax.numpy.zeros(500, jax.numpy.uint8)
    with pytest.raises(errors.ArgumentValueError) as refusal:
        ops.quantize_4bit(jax.numpy.asarray(x), "nf4", 64, out=(output, absmax))
    assert str(refusal.value) == "qbits::quantize_4bit: packed must be writable, got read-only memory"
    assert not np.asarray(output).any()


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted(SPECS))
def test_cupy_arrays_are_taken_and_filled_on_their_stream(op):
    cupy = pytest.importorskip("cupy")
    call = valid_call(op, "cuda", n=100_000)
    want = [tensor.clone() for tensor in call.run_allocating()]
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        call.args = {
            k: cupy.from_dlpack(v) if isinstance(v, torch.Tensor) else v for k, v in call.args.items()
        }
        copies = {k: v.copy() if isinstance(v, cupy.ndarray) else v for k, v in call.args.items()}
        call.args = copies
        results = [cupy.from_dlpack(result) for result in call.run_allocating()]
        call.outputs = {
            name: cupy.zeros(tuple(t.shape), cupy.from_dlpack(t).dtype) for name, t in call.outputs.items()
        }
        call.run()
        stream.synchronize()
    for got, given, expected in zip(results, call.outputs.values(), want, strict=True):
        assert_same_bits(torch.from_dlpack(got), expected)
        assert_same_bits(torch.from_dlpack(given), expected)


@pytest.mark.gpu
def test_jax_arrays_on_the_gpu_are_taken(jax):
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    x = RANDOM.standard_normal(100_000, np.float32)
    want_packed, want_absmax = reference.quantize_4bit(x, "nf4", 64)
    for _ in range(10):
        packed, absmax = ops.quantize_4bit(jax.numpy.asarray(x) * 1, "nf4", 64)
        assert (np.asarray(jax.dlpack.from_dlpack(packed)) == want_packed).all()
        assert (np.asarray(jax.dlpack.from_dlpack(absmax)) == want_absmax).all()


def test_other_python_threads_run_while_an_op_computes():
    """The GIL is free during the work: a second thread counts on while a large tensor is quantized."""
    x = torch.randn(2**25)
    out = (torch.empty(2**24, dtype=torch.uint8), torch.empty(2**19))
    stop, counts = threading.Event(), []

    def count() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            time.sleep(0)
        counts.append(n)

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    counter = threading.Thread(target=count)
    try:
        counter.start()
        begin = time.perf_counter()
        for _ in range(10):
            ops.quantize_4bit(x, "nf4", 64, out=out)
        elapsed = time.perf_counter() - begin
    finally:
        stop.set()
        counter.join()
        torch.set_num_threads(threads_before)
    # a thread that held the GIL through 10 calls would let the counter in only 10 or so times
    assert counts[0] > 100, f"{counts[0]} turns in {elapsed:.3f} s"


def test_many_threads_at_once_give_the_same_bits():
    x = torch.randn(2**18 + 37)
    want = ops.quantize_4bit(x, "nf4", 64)
    failures = []

    def work() -> None:
        for _ in range(20):
            got = ops.quantize_4bit(x, "nf4", 64)
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                failures.append(got)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(num_threads):
    calls = [valid_call(op, n=2**19 + 37, M=4, N=1023, K=1024) for op in sorted(SPECS)]
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = [[tensor.clone() for tensor in call.run_allocating()] for call in calls]
        torch.set_num_threads(num_threads)
        for call, expected in zip(calls, want, strict=True):
            for got, wanted in zip(call.run_allocating(), expected, strict=True):
                assert_same_bits(got, wanted, call.name)
    finally:
        torch.set_num_threads(threads_before)


def test_ops_work_in_a_forked_worker():
    """The parent has used its thread pool; a child has none of its threads and must not wait for them.

    In a fresh process, and by NumPy: neither JAX nor torch's own OpenMP threads survive a fork.
    """
    source = """
import multiprocessing
import numpy as np
from qbits import ops

def sums():
    x = np.arange(-(2**19), 2**19, dtype=np.float32)
    packed, absmax = (np.from_dlpack(result) for result in ops.quantize_4bit(x, "nf4", 64))
    return int(packed.sum(dtype=np.int64)), float(absmax.sum(dtype=np.float64))

def work(queue):
    queue.put(sums())

want = sums()
context = multiprocessing.get_context("fork")
queue = context.Queue()
for _ in range(2):
    child = context.Process(target=work, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == want
    child.join(60)
    assert child.exitcode == 0
print("same")
"""
    assert run_python(source).strip() == "same"
