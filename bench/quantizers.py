"""Quantize and dequantize on a GPU against a copy of the same bytes and ratio, and against bitsandbytes.

Correctness comes first: every timed op is compared with the CPU backend, bit for bit. Then each is timed by
graph replay over rotating buffers of random normal data, interleaved with the copy and the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import Eager, EqualToCpu, Replay, Report, Timing, arguments, interleaved, num_sets, peer
from qbits import ops
from qbits.codebooks import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from yardstick import Copy, Yardstick

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAPS: dict[str, Callable[[], torch.Tensor]] = {
    "dynamic": create_dynamic_map,
    "unsigned": lambda: create_dynamic_map(signed=False),
    "linear": create_linear_map,
    "e4m3": lambda: create_fp8_map(True, 4, 3, 8),
    "e5m2": lambda: create_fp8_map(True, 5, 2, 8),
    "normal": create_normal_map,
}
LONG_COPY_GOAL = 4.1  # TB/s that the plain copy must reach on an H200 for the yardstick to be one


@dataclass(frozen=True)
class Case:
    """One row: an op, its bytes, how to make operands, how to call it and the peer."""

    name: str
    dtype: torch.dtype
    read_bytes: float
    written_bytes: float
    make: Callable[[torch.Tensor], Any]  # operands, from normal data
    run: Callable[[Any], Any]
    peer: Callable[[Any], Any] | None = None

    @property
    def key(self) -> str:
        """Name and dtype."""
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def empty(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialized memory on the GPU."""
    return torch.empty(n, dtype=dtype, device="cuda")


def pair_4bit(n: int, dtype: torch.dtype, codebook: str, block_size: int, bnb: Any) -> Iterator[Case]:
    """Quantize and dequantize with one codebook and block size."""
    coded, plain, name = n / 2 + n / block_size * 4, n * dtype.itemsize, f"{codebook} {block_size}"

    def floats(x: torch.Tensor) -> Any:
        return x, (empty(n // 2, torch.uint8), empty(n // block_size, torch.float32))

    def quantize(o: Any) -> Any:
        return ops.quantize_4bit(o[0], codebook, block_size, out=o[1])

    def quantize_peer(o: Any) -> Any:
        return bnb.functional.quantize_4bit(o[0], blocksize=block_size, quant_type=codebook)

    def packed(x: torch.Tensor) -> Any:
        return *ops.quantize_4bit(x, codebook, block_size), empty(n, dtype)

    def dequantize(o: Any) -> Any:
        return ops.dequantize_4bit(o[0], o[1], n, codebook, block_size, dtype, out=o[2])

    def dequantize_peer(o: Any) -> Any:
        return bnb.functional.dequantize_4bit(
            o[0].view(-1, 1), absmax=o[1], out=o[2], blocksize=block_size, quant_type=codebook
        )

    has_peer = bnb is not None and block_size == 64
    peers = (quantize_peer, dequantize_peer) if has_peer else (None, None)
    yield Case(f"quantize {name}", dtype, plain, coded, floats, quantize, peers[0])
    yield Case(f"dequantize {name}", dtype, coded, plain, packed, dequantize, peers[1])


def cases_4bit(n: int, dtype: torch.dtype, bnb: Any) -> Iterator[Case]:
    """NF4 and FP4, plain and nested."""
    for codebook, block_size in (("nf4", 64), ("fp4", 64), ("nf4", 128), ("nf4", 4096)):
        yield from pair_4bit(n, dtype, codebook, block_size, bnb)

    def nested(x: torch.Tensor) -> Any:
        packed, absmax = ops.quantize_4bit(x, "nf4", 64)
        return packed, ops.quantize_absmax(absmax), empty(n, dtype)

    def decode_nested(o: Any) -> Any:
        codes, scale, offset = o[1]
        return ops.dequantize_4bit(o[0], codes, n, "nf4", 64, dtype, scale, offset, out=o[2])

    statistics = n / 64 * (1 + 4 / 256)
    yield Case(
        "dequantize nf4 64 nested", dtype, n / 2 + statistics, n * dtype.itemsize, nested, decode_nested
    )


def pair_8bit(n: int, dtype: torch.dtype, name: str, block_size: int, bnb: Any) -> Iterator[Case]:
    """Quantize and dequantize with one map and block size."""
    table = MAPS[name]().cuda()
    coded, plain, label = n + n / block_size * 4, n * dtype.itemsize, f"8-bit {name} {block_size}"

    def floats(x: torch.Tensor) -> Any:
        return x, (empty(n, torch.uint8), empty(n // block_size, torch.float32))

    def quantize(o: Any) -> Any:
        return ops.quantize_blockwise(o[0], table, block_size, out=o[1])

    def quantize_peer(o: Any) -> Any:
        return bnb.functional.quantize_blockwise(o[0], code=table, blocksize=block_size)

    def codes(x: torch.Tensor) -> Any:
        return *ops.quantize_blockwise(x, table, block_size), empty(n, dtype)

    def dequantize(o: Any) -> Any:
        return ops.dequantize_blockwise(o[0], o[1], table, block_size, dtype, out=o[2])

    def dequantize_peer(o: Any) -> Any:
        return torch.ops.bitsandbytes.dequantize_blockwise(o[0], o[1], table, block_size, dtype)

    peers = (quantize_peer, dequantize_peer) if bnb is not None else (None, None)
    yield Case(f"quantize {label}", dtype, plain, coded, floats, quantize, peers[0])
    yield Case(f"dequantize {label}", dtype, coded, plain, codes, dequantize, peers[1])


def cases_8bit(n: int, dtype: torch.dtype, bnb: Any) -> Iterator[Case]:
    """Blockwise with the signed dynamic map and with another one; the whole tensor."""
    named = [(name, 256) for name in MAPS if dtype == torch.bfloat16 or name in ("dynamic", "linear")]
    for name, block_size in (*named, ("dynamic", 4096)):
        yield from pair_8bit(n, dtype, name, block_size, bnb)
    dynamic, plain = create_dynamic_map().cuda(), n * dtype.itemsize

    def floats(x: torch.Tensor) -> Any:
        return x, (empty(n, torch.uint8), torch.empty((), device="cuda"))

    def quantize(o: Any) -> Any:
        return ops.quantize(o[0], dynamic, out=o[1])

    def codes(x: torch.Tensor) -> Any:
        return *ops.quantize(x, dynamic), empty(n, dtype)

    def dequantize(o: Any) -> Any:
        return ops.dequantize(o[0], o[1], dynamic, dtype, out=o[2])

    # the maximum and the codes each read every element once
    yield Case("quantize 8-bit whole tensor", dtype, 2 * plain, n, floats, quantize)
    yield Case("dequantize 8-bit whole tensor", dtype, n, plain, codes, dequantize)


def cases_codes(n: int) -> Iterator[Case]:
    """Ops between codes, which have no float dtype, and the second level of nested statistics."""

    def codes(x: torch.Tensor) -> Any:
        return ops.quantize_no_absmax(x, create_linear_map().cuda()), empty(n // 2, torch.uint8)

    def packed(x: torch.Tensor) -> Any:
        return ops.pack_4bit(codes(x)[0], "nf4"), empty(n, torch.uint8)

    byte = torch.uint8
    yield Case("pack_4bit", byte, n, n / 2, codes, lambda o: ops.pack_4bit(o[0], "nf4", out=o[1]))
    yield Case("unpack_4bit", byte, n / 2, n, packed, lambda o: ops.unpack_4bit(o[0], n, out=o[1]))

    def scales(x: torch.Tensor) -> Any:
        absmax = ops.quantize_4bit(x, "nf4", 64)[1]
        out = (
            empty(absmax.numel(), byte),
            empty(-(-absmax.numel() // 256), torch.float32),
            torch.empty((), device="cuda"),
        )
        return absmax, out

    # the mean and the codes each read every scale once
    read, written = 2 * n / 64 * 4, n / 64 * (1 + 4 / 256)
    float32 = torch.float32
    yield Case(
        "quantize_absmax", float32, read, written, scales, lambda o: ops.quantize_absmax(o[0], out=o[1])
    )


def check(report: Report) -> None:
    """Every op on the GPU equals the CPU backend bit for bit on a million normal numbers and an odd tail."""
    dynamic, linear = create_dynamic_map(), create_linear_map()
    same = EqualToCpu()
    for dtype in FLOATS:
        x = torch.randn(2**20 + 37).to(dtype)
        for codebook in ("nf4", "fp4", "af4"):
            for block_size in (64, 4096):
                packed, absmax = same(ops.quantize_4bit, x, codebook, block_size)
                same(ops.dequantize_4bit, packed, absmax, x.numel(), codebook, block_size, dtype)
                parts = same(ops.quantize_absmax, absmax)
                same(
                    ops.dequantize_4bit, packed, parts[0], x.numel(), codebook, block_size, dtype, *parts[1:]
                )
        for table in (dynamic, linear):
            codes, absmax = same(ops.quantize_blockwise, x, table, 256)
            same(ops.dequantize_blockwise, codes, absmax, table, 256, dtype)
            codes, absmax = same(ops.quantize, x, table)
            same(ops.dequantize, codes, absmax, table, dtype)
    report.note(f"{same.num_checks} calls equal the CPU backend bit for bit")


def copy_replay(yardstick: Yardstick, copy: Copy) -> Replay:
    """The copy over its rotating places."""
    return Replay([lambda i=i: yardstick.launch(copy, i) for i in range(copy.num_sets)])


def best_copy(yardstick: Yardstick, read_bytes: float, written_bytes: float) -> tuple[Copy, Replay]:
    """The fastest unrolling and grid for this size and ratio."""
    timed = []
    for copy in yardstick.candidates(read_bytes, written_bytes):
        replay = copy_replay(yardstick, copy)
        rate = copy.bytes_per_call / min(replay.time_us() for _ in range(3))
        timed.append((rate, copy, replay))
    _, copy, replay = max(timed, key=lambda entry: entry[0])
    return copy, replay


def measure(report: Report, yardstick: Yardstick, case: Case, n: int, num_repeats: int) -> None:
    """One row: the op, the copy and the peer, interleaved."""
    num_bytes = case.read_bytes + case.written_bytes
    source = torch.float32 if case.dtype == torch.uint8 else case.dtype
    operands = [case.make(torch.randn(n, device="cuda").to(source)) for _ in range(num_sets(num_bytes))]
    copy, replay = best_copy(yardstick, case.read_bytes, case.written_bytes)
    replays = {"copy": replay, "ours": Replay([lambda o=o: case.run(o) for o in operands])}
    if case.peer:
        try:
            run_peer = case.peer
            # bitsandbytes' quantizers copy tables or leave the current stream: no graph holds them
            run = Eager if case.name.startswith("quantize") else Replay
            replays["peer"] = run([lambda o=o: run_peer(o) for o in operands])
        except Exception as error:
            report.note(f"peer of {case.key}: {type(error).__name__}: {str(error).splitlines()[0]}")
    times = interleaved(replays, num_repeats)
    ours = times["ours"]
    copy_rate = copy.bytes_per_call / times["copy"].us
    peer_time: Timing | None = times.get("peer")
    report.add(
        op=case.name,
        dtype=str(case.dtype).removeprefix("torch."),
        us=ours.us,
        low_us=ours.low_us,
        high_us=ours.high_us,
        num_bytes=round(num_bytes),
        tb_per_s=num_bytes / ours.us * 1e-6,
        floor_us=num_bytes / copy_rate,
        copy_tb_per_s=copy_rate * 1e-6,
        share_of_copy=num_bytes / ours.us / copy_rate,
        copy=str(copy),
        peer_us=peer_time.us if peer_time else None,
        speedup=peer_time.us / ours.us if peer_time else None,
        num_sets=len(operands),
    )


def measure_long_copy(report: Report, yardstick: Yardstick, num_repeats: int) -> None:
    """The plain copy of 800 MB: shows that the yardstick is as fast as the memory."""
    copy, replay = best_copy(yardstick, 4e8, 4e8)
    time = interleaved({"copy": replay}, num_repeats)["copy"]
    rate = copy.bytes_per_call / time.us * 1e-6
    report.add(
        op="copy 1:1, 800 MB",
        dtype="",
        us=time.us,
        num_bytes=copy.bytes_per_call,
        tb_per_s=rate,
        copy=str(copy),
    )
    if rate < LONG_COPY_GOAL:
        report.note(f"the long copy reaches {rate:.2f} TB/s, below the {LONG_COPY_GOAL} of an H200")


def main() -> None:
    """Checks, then times everything."""
    options = arguments(__doc__)
    torch.manual_seed(0)
    report = Report("quantizers", "cuda")
    n, num_repeats = (2**22, 2) if options.quick else (8192 * 8192, 7)
    check(report)
    bnb = peer("bitsandbytes")
    yardstick = Yardstick()
    measure_long_copy(report, yardstick, num_repeats)
    cases = [case for dtype in FLOATS for case in (*cases_4bit(n, dtype, bnb), *cases_8bit(n, dtype, bnb))]
    for case in [*cases, *cases_codes(n)]:
        if options.only in case.key:
            measure(report, yardstick, case, n, num_repeats)
    report.write(options)


if __name__ == "__main__":
    main()
