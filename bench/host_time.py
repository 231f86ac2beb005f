"""Host time of one call of `qbits.ops` with given tensors: without a launch (no elements), and with it.

And of a forward of one layer with one row, beside torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Report, arguments, host_ns, peer
from qbits import ops
from qbits.codebooks import create_dynamic_map
from qbits.nn import Linear4bit

# the driver's queue takes about a thousand launches before it makes the caller wait
CALLS_PER_REPEAT = 400
# until the clocks are up: the first second of calls takes up to 40 % longer
WARM_UP_CALLS = 400_000


def calls(n: int, device: str) -> dict[str, Callable[[], Any]]:
    """Every op of interest on `n` elements, outputs given."""
    x = torch.randn(n, device=device, dtype=torch.bfloat16)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.ones((n + 63) // 64, device=device)
    codes = torch.zeros(n, dtype=torch.uint8, device=device)
    table = create_dynamic_map().to(device)
    out_4bit, out_8bit = (packed, absmax), (codes, absmax)
    rows = 1 if n else 0
    y, dot = torch.empty_like(x), torch.empty(rows, rows, dtype=x.dtype, device=device)
    row = x.view(rows, n) if n else x.view(0, 0)
    bfloat16 = torch.bfloat16
    return {
        "quantize_4bit": lambda: ops.quantize_4bit(x, "nf4", 64, out=out_4bit),
        "dequantize_4bit": lambda: ops.dequantize_4bit(packed, absmax, n, "nf4", 64, bfloat16, out=y),
        "quantize_blockwise": lambda: ops.quantize_blockwise(x, table, 64, out=out_8bit),
        "dequantize_blockwise": lambda: ops.dequantize_blockwise(codes, absmax, table, 64, bfloat16, out=y),
        "pack_4bit": lambda: ops.pack_4bit(codes, "nf4", out=packed),
        "gemm_4bit": lambda: ops.gemm_4bit(row, packed, absmax, rows, n, "nf4", 64, out=dot),
        "quantize_4bit, allocating": lambda: ops.quantize_4bit(x, "nf4", 64),
    }


def forwards(device: str) -> dict[str, Callable[[], Any]]:
    """One layer with one row, in two dimensions and in three; the GPU is done before the host is."""
    linear = torch.nn.Linear(1024, 1024, bias=False, device=device, dtype=torch.bfloat16)
    layer = Linear4bit.from_linear(linear, "nf4")
    flat = torch.randn(1, 1024, device=device, dtype=torch.bfloat16)
    deep = flat.view(1, 1, 1024)
    return {
        "Linear4bit": lambda: layer(flat),
        "Linear4bit, 3 dimensions": lambda: layer(deep),
        "nn.Linear": lambda: linear(flat),
        "nn.Linear, 3 dimensions": lambda: linear(deep),
    }


def peer_calls(n: int, device: str, bnb: Any) -> dict[str, Callable[[], Any]]:
    """What torch and bitsandbytes take for calls of the same kind."""
    x = torch.randn(n, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    found: dict[str, Callable[[], Any]] = {"torch.add, out given": lambda: torch.add(x, x, out=y)}
    if bnb:
        packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=device)
        absmax = torch.empty((n + 63) // 64, device=device)
        quantize = bnb.functional.quantize_4bit
        found["bitsandbytes quantize_4bit"] = lambda: quantize(
            x, absmax=absmax, out=packed, blocksize=64, quant_type="nf4"
        )
    return found


def measure(report: Report, device: str, bnb: Any, num_repeats: int) -> None:
    """One row for each call: no elements, then 4096."""
    empty, small = calls(0, device), calls(4096, device)
    host_ns(small["pack_4bit"], CALLS_PER_REPEAT, WARM_UP_CALLS // CALLS_PER_REPEAT)
    for name in small:
        before = host_ns(empty[name], CALLS_PER_REPEAT, num_repeats)
        whole = host_ns(small[name], CALLS_PER_REPEAT, num_repeats)
        report.add(call=name, device=device, before_launch_us=before / 1e3, with_launch_us=whole / 1e3)
    with torch.no_grad():
        for name, call in forwards(device).items():
            whole = host_ns(call, CALLS_PER_REPEAT, num_repeats)
            report.add(call=name, device=device, before_launch_us=None, with_launch_us=whole / 1e3)
    for name, call in peer_calls(4096, device, bnb).items():
        try:
            whole = host_ns(call, CALLS_PER_REPEAT, num_repeats)
        except Exception as error:
            report.note(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            report.add(call=name, device=device, before_launch_us=None, with_launch_us=whole / 1e3)


def main() -> None:
    """On the GPU where there is one, else on the CPU, where the work of 4096 elements is included."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("host_time", device)
    if device == "cpu":
        report.note("on the CPU the second time contains the work on 4096 elements")
    measure(report, device, peer("bitsandbytes"), 3 if options.quick else 40)
    report.write(options)


if __name__ == "__main__":
    main()
