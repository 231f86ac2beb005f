"""Compiles the CUDA kernels for the CPU and launches them: for tests without a GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[np.generic]

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"
QUANTIZERS = ("blockwise_4bit", "blockwise_8bit", "tensorwise", "nested")
INT8 = ("int8_rowwise", "int8_columns", "tensorwise")
# No contraction: NUMERICS names every fused multiply-add. Kernels read vectors out of arrays of other types.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w")
SANITIZER = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and the System V ABI"
)


HEADERS = {
    "nvidia-cuda-runtime": "cuda_fp16.h",
    "nvidia-cuda-crt": "crt/host_defines.h",
    "nvidia-cuda-cccl": "nv/target",
}


def cuda_include_folders() -> list[Path]:
    """Where the CUDA headers are: of the installed nvidia-* packages, else beside the nvcc on the path."""
    nvcc = shutil.which("nvcc")
    toolkit = Path(nvcc).resolve().parents[1] / "include" if nvcc else None
    folders = []
    for package, header in HEADERS.items():
        places = [toolkit, toolkit / "cccl"] if toolkit else []
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        ends = (f"include/{header}", f"cccl/{header}")
        found = [Path(str(file.locate())) for file in files if file.as_posix().endswith(ends)]
        found += [place / header for place in places if (place / header).is_file()]
        if not found:
            raise FileNotFoundError(f"{header}: neither {package} is installed nor nvcc on the path")
        folders.append(found[0].parents[len(Path(header).parts) - 1])
    return list(dict.fromkeys(folders))


def compile_all(commands: Iterable[list[str]]) -> None:
    """Runs the compilers side by side."""
    running = [
        (command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) for command in commands
    ]
    for command, process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{errors}")


def build(folder: Path, sanitize: bool, modules: Sequence[str] = QUANTIZERS, sources: Path = CUDA) -> None:
    """scheduler.so, and one library for each module with the kernels under their own names."""
    for source in [*CUDA.glob("*.cuh"), *(sources / f"{name}.cu" for name in modules)]:
        shutil.copy(source, folder)
    for name in ("ptx.cuh", "ptx_sm90.cuh", "ptx_wgmma.cuh"):
        shutil.copy(HERE / name, folder)  # in place of those with assembly
    flags = [*FLAGS, *(SANITIZER if sanitize else ()), f"-I{folder}", f"-I{HERE}"]
    flags += [f"-I{path}" for path in cuda_include_folders()]
    compiler = ["g++", *flags, "-include", "emulation.h", "-c", "-x", "c++"]
    compile_all(
        [
            ["g++", *flags, "-shared", str(HERE / "scheduler.cpp"), "-o", str(folder / "scheduler.so")],
            ["g++", *flags, "-c", str(HERE / "shared_memory.cpp"), "-o", str(folder / "shared_memory.o")],
            *([*compiler, str(folder / f"{name}.cu"), "-o", str(folder / f"{name}.o")] for name in modules),
        ]
    )
    linker = ["g++", *flags, "-shared", "-Wl,-Bsymbolic"]
    shared = [str(folder / "shared_memory.o"), str(folder / "scheduler.so")]
    compile_all(
        [*linker, str(folder / f"{name}.o"), *shared, "-o", str(folder / f"{name}.so")] for name in modules
    )


class Range(ctypes.Structure):
    """Memory of one array."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Call(ctypes.Structure):
    """What the scheduler takes: hopper.h."""

    _fields_ = [
        ("kernel", ctypes.c_void_p),
        ("poison", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("params_bytes", "params_alignment", "grid_x", "grid_y")),
        *((name, ctypes.c_uint32) for name in ("threads", "cluster", "shared_bytes")),
        ("num_inputs", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("inputs", Range * 8),
        ("outputs", Range * 4),
    ]


class EmulationError(AssertionError):
    """A kernel waits for ever, leaves its shared memory, or breaks another rule of the machine."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched, as plans have it."""

    module: str
    kernel: str
    grid: int | tuple[int, int]
    threads: int = 256
    cluster: int = 1
    shared_bytes: int = 0
    # Of a dependent launch: what earlier work writes until the kernel has waited for it, and may still read.
    inputs: Sequence[Array] = ()
    outputs: Sequence[Array] = ()


def ranges(arrays: Sequence[Array], num: int) -> ctypes.Array[Range]:
    """Their memory."""
    return (Range * num)(*(Range(array.ctypes.data, array.nbytes) for array in arrays))


class Emulator:
    """The compiled modules of one folder."""

    def __init__(self, folder: Path, modules: Sequence[str] = QUANTIZERS) -> None:
        # Modules find the scheduler of their own folder; a global one would serve all of them.
        self._scheduler = ctypes.CDLL(str(folder / "scheduler.so"))
        self._scheduler.run.restype = ctypes.c_char_p
        self._modules = {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in modules}

    def launch(self, launch: Launch, params: ctypes.Structure) -> None:
        """One launch, finished on return."""
        grid_x, grid_y = launch.grid if isinstance(launch.grid, tuple) else (launch.grid, 1)
        library = self._modules[launch.module]
        call = Call(
            ctypes.cast(library[launch.kernel], ctypes.c_void_p),
            ctypes.cast(library.poison, ctypes.c_void_p),
            ctypes.addressof(params),
            ctypes.sizeof(params), getattr(params, "alignment", 8), grid_x, grid_y, launch.threads,
            launch.cluster, launch.shared_bytes, len(launch.inputs), len(launch.outputs),
            ranges(launch.inputs, 8), ranges(launch.outputs, 4),
        )  # fmt: skip
        failure = self._scheduler.run(ctypes.byref(call))
        if failure is not None:
            raise EmulationError(f"{launch.kernel}: {failure.decode()}")
