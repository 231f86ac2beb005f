"""What the benchmarks share: timing by graph replay, result files, the machine's description, peers."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from qbits import _core

RESULTS = Path(__file__).resolve().parent / "results"
NUM_REPEATS = 7
MIN_REPEAT_MS = 20.0
ROTATING_BYTES = 240e6  # four times the 60 MB L2 of an H200: every operand is cold


def arguments(description: str | None, **switches: str) -> argparse.Namespace:
    """`--out DIR` for the result file, `--quick` for a run that only shows that everything works, more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repeats; writes no result file"
    )
    parser.add_argument("--only", default="", help="run only rows whose name contains this")
    for name, help_text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_text)
    return parser.parse_args()


def peer(name: str) -> ModuleType | None:
    """A module to compare with, or None where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        print(f"# no {name}: {type(error).__name__}: {error}", flush=True)
        return None


def cpu_model() -> str:
    """The processor's own name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.*)", text)
    return found[1] if found else platform.processor()


def driver_version() -> str | None:
    """The version that nvidia-smi reports."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def environment(device: str) -> dict[str, Any]:
    """Everything that a number depends on."""
    info = _core.info()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "qbits": info["version"]}
    for name in ("bitsandbytes", "numpy"):
        module = peer(name)
        versions[name] = getattr(module, "__version__", "not installed")
    described: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "source_hash": info["source_hash"],
        "versions": versions,
        "cpu": cpu_model(),
        "num_cores": os.cpu_count(),
        "cpu_isa": info["cpu_isa"],
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "num_sms": properties.multi_processor_count,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
        }
    return described


@dataclass
class Report:
    """The rows of one benchmark; printed as they come, written as JSON at the end."""

    name: str
    device: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._environment = environment(self.device)
        for key, value in self._environment.items():
            print(f"# {key}: {value}", flush=True)

    def add(self, **row: Any) -> None:
        """Prints and keeps a row; numbers are rounded to what was measured."""
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def note(self, text: str) -> None:
        """A sentence that belongs to the numbers."""
        self.notes.append(text)
        print(f"# {text}", flush=True)

    def write(self, arguments: argparse.Namespace) -> None:
        """`<name>_<gpu or cpu>.json` in the folder of `--out`."""
        if arguments.quick:
            return
        where = self._environment["gpu"] if self.device == "cuda" else "cpu"
        path = arguments.out / f"{self.name}_{re.sub('[^a-z0-9]+', '_', where.lower())}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"name": self.name, **self._environment, "notes": self.notes, "rows": self.rows}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"# wrote {path}", flush=True)


@dataclass
class EqualToCpu:
    """Calls ops on the CPU and on the GPU, which must give the same bits, and counts the calls."""

    num_checks: int = 0

    def __call__(self, op: Callable[..., Any], *args: Any) -> Any:
        """Return the CPU's result."""
        want = op(*args)
        got = op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in args))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
            if not torch.equal(a.cpu().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                raise SystemExit(f"bench: {op.__name__} must equal the CPU backend, got other bits")
        self.num_checks += 1
        return want


class Replay:
    """A captured graph of calls over rotating operands."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._num_calls = len(calls)
        self._calls = calls  # their operands: the graph knows addresses only
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()  # loads kernels, fills caches of plans
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call() for call in calls]  # kept, so that every call writes memory of its own
        self._num_replays = 1
        self.first_us = self.time_us()
        self._num_replays = max(1, round(MIN_REPEAT_MS / max(self.first_us * self._num_calls * 1e-3, 1e-3)))

    def replay(self) -> None:
        """All calls, once."""
        self._graph.replay()

    def time_us(self) -> float:
        """Microseconds of one call, mean over at least MIN_REPEAT_MS of replays."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._num_replays):
            self.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (self._num_replays * self._num_calls)


class Eager:
    """Calls one after the other, for peers that cannot be captured; their gaps on the host count."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self._calls = calls
        calls[0]()

    def time_us(self) -> float:
        """Microseconds of one call between two events, mean over ten rounds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            for call in self._calls:
                call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / (10 * len(self._calls))


@dataclass(frozen=True)
class Timing:
    """Median and extremes of the repeats."""

    us: float
    low_us: float
    high_us: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Of all samples but the first, which warms up."""
        kept = samples[1:]
        return cls(statistics.median(kept), min(kept), max(kept))


def interleaved(replays: Mapping[str, Replay | Eager], num_repeats: int = NUM_REPEATS) -> dict[str, Timing]:
    """A B A B ...: ratios hold only between neighbours."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(num_repeats + 1):
        for name, replay in replays.items():
            samples[name].append(replay.time_us())
    return {name: Timing.of(times) for name, times in samples.items()}


@dataclass(frozen=True)
class Sustained:
    """What a long run settled at."""

    us: float
    sm_mhz: float | None
    watts: float | None


def sustained(replay: Replay, seconds: float) -> Sustained:
    """Replays without a pause; medians of the run's second half, clock and power as nvidia-smi has them."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "100"]
    query += ["-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}"]
    try:
        log = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        log = None
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        times.append(replay.time_us())
    printed = ""
    if log is not None:
        log.terminate()
        printed = log.communicate()[0]
    found = re.findall(r"^(\d+), ([\d.]+)$", printed, re.MULTILINE)
    late = found[len(found) // 2 :]
    clocks, powers = ([float(pair[i]) for pair in late] for i in range(2))
    return Sustained(
        statistics.median(times[len(times) // 2 :]),
        statistics.median(clocks) if clocks else None,
        statistics.median(powers) if powers else None,
    )


def host_ns(call: Callable[[], Any], num_calls: int, num_repeats: int = NUM_REPEATS) -> float:
    """Nanoseconds of one call on the host, best of the repeats; the device's queue is emptied between."""
    best = float("inf")
    for _ in range(num_repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for _ in range(num_calls):
            call()
        best = min(best, (time.perf_counter_ns() - begin) / num_calls)
    return best


def wall_us(call: Callable[[], Any], min_ms: float = 100.0, num_repeats: int = NUM_REPEATS) -> Timing:
    """Microseconds of one call that ends when it returns."""
    call()
    begin = time.perf_counter()
    call()
    num_calls = max(1, round(min_ms * 1e-3 / max(time.perf_counter() - begin, 1e-7)))
    samples = []
    for _ in range(num_repeats + 1):
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        samples.append((time.perf_counter() - begin) * 1e6 / num_calls)
    return Timing.of(samples)


def num_sets(bytes_per_call: float) -> int:
    """How many sets of operands rotate."""
    return max(2, round(ROTATING_BYTES / bytes_per_call + 0.5))
