"""The copy that memory-bound kernels are compared with: same bytes, same read:write ratio, same run."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).resolve().parent / "kernels" / "ratio_copy.cu"
THREADS = 512
VECTOR_BYTES = 16
VARIANTS = [
    tuple(int(number) for number in match)
    for match in re.findall(r"^RATIO_COPY\((\d+), (\d+), (\d+)\)", SOURCE.read_text(), re.MULTILINE)
]


def find_nvcc() -> str:
    """Nvcc of `QBITS_NVCC`, `CUDA_HOME`, the wheel `nvidia-cuda-nvcc`, or the path."""
    named = [os.environ.get("QBITS_NVCC"), os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")]
    wheels = [os.path.join(folder, "nvidia", "cu13", "bin", "nvcc") for folder in sys.path]
    for path in [*named, *wheels, shutil.which("nvcc")]:
        if path and os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise SystemExit("bench: nvcc must be in QBITS_NVCC, CUDA_HOME or PATH, got none")


def compile_kernels() -> bytes:
    """Machine code of `ratio_copy.cu` for the current device."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "ratio_copy.cubin")
        command = [
            find_nvcc(),
            "-std=c++20",
            "-O3",
            f"-arch=sm_{major}{minor}",
            "-cubin",
            f"-I{ROOT / 'cuda'}",
        ]
        subprocess.run([*command, str(SOURCE), "-o", image], check=True)
        return Path(image).read_bytes()


class Kernels:
    """The loaded module, launched through the driver on torch's current stream."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context current
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), compile_kernels()))
        self._functions: dict[tuple[int, ...], ctypes.c_void_p] = {}
        for variant in VARIANTS:
            function = ctypes.c_void_p()
            name = "ratio_copy_" + "_".join(str(number) for number in variant)
            self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
            self._functions[variant] = function

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"bench: the driver must accept the copy kernel, got error {status}")

    def launch(self, variant: tuple[int, ...], source: int, target: int, num_steps: int, grid: int) -> None:
        """Enqueues one copy from address to address."""
        values = (ctypes.c_void_p(source), ctypes.c_void_p(target), ctypes.c_int64(num_steps))
        pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        function = self._functions[variant]
        self._check(
            self._driver.cuLaunchKernel(function, grid, 1, 1, THREADS, 1, 1, 0, stream, pointers, None)
        )


@dataclass(frozen=True)
class Copy:
    """One way to copy about `num_bytes` in a ratio; `launch(i)` takes the i-th of the rotating places."""

    variant: tuple[int, ...]
    grid: int
    num_steps: int
    num_sets: int

    @property
    def bytes_per_call(self) -> int:
        """Bytes read and written by one launch."""
        read, write, unroll = self.variant
        return self.num_steps * unroll * (read + write) * THREADS * VECTOR_BYTES

    def __str__(self) -> str:
        read, write, unroll = self.variant
        return f"{read}:{write} unroll {unroll} grid {self.grid}"


class Yardstick:
    """Copies of any size and ratio, over two pools of random bytes that are larger than the L2."""

    def __init__(self, pool_bytes: int = 2**30) -> None:
        self._kernels = Kernels()
        self._pools = [
            torch.randint(0, 2**31 - 1, (pool_bytes // 4,), dtype=torch.int32, device="cuda")
            for _ in range(2)
        ]
        self._pool_bytes = pool_bytes
        self._num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def candidates(self, read_bytes: float, written_bytes: float) -> list[Copy]:
        """Every unrolling and grid of the ratio that is nearest to the asked one."""
        wanted = math.log(read_bytes / written_bytes)
        ratio = min({v[:2] for v in VARIANTS}, key=lambda v: abs(math.log(v[0] / v[1]) - wanted))
        found = []
        for variant in (v for v in VARIANTS if v[:2] == ratio):
            read, write, unroll = variant
            step_bytes = unroll * THREADS * VECTOR_BYTES
            num_steps = max(1, round((read_bytes + written_bytes) / (step_bytes * (read + write))))
            num_steps = min(num_steps, self._pool_bytes // (step_bytes * max(read, write)))
            num_sets = max(1, min(8, self._pool_bytes // (num_steps * step_bytes * max(read, write))))
            for grid in (4 * self._num_sms, num_steps):
                found.append(Copy(variant, min(grid, num_steps), num_steps, num_sets))
        return found

    def launch(self, copy: Copy, index: int) -> None:
        """Enqueues the copy at the index-th place."""
        read, write, unroll = copy.variant
        step_bytes = unroll * THREADS * VECTOR_BYTES
        place = index % copy.num_sets
        source = self._pools[0].data_ptr() + place * copy.num_steps * step_bytes * read
        target = self._pools[1].data_ptr() + place * copy.num_steps * step_bytes * write
        self._kernels.launch(copy.variant, source, target, copy.num_steps, copy.grid)
