"""Compiles the CUDA kernels for the CPU and launches them: for tests without a GPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"
QUANTIZERS = ("blockwise_4bit", "blockwise_8bit", "tensorwise", "nested")
# No contraction: NUMERICS names every fused multiply-add. Kernels read vectors out of arrays of other types.
FLAGS = ("-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w")
SANITIZER = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1")


def cuda_include_folders() -> list[Path]:
    """Where the CUDA headers of the installed nvidia-* packages are."""
    folders = []
    for package, header in (
        ("nvidia-cuda-runtime", "cuda_fp16.h"),
        ("nvidia-cuda-crt", "crt/host_defines.h"),
        ("nvidia-cuda-cccl", "nv/target"),
    ):
        files = importlib.metadata.files(package) or []
        path = next(
            file
            for file in files
            if file.as_posix().endswith(f"include/{header}") or file.as_posix().endswith(f"cccl/{header}")
        )
        folders.append(Path(str(path.locate())).parents[len(Path(header).parts) - 1])
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


def build(folder: Path, sanitize: bool, modules: Sequence[str] = QUANTIZERS) -> None:
    """scheduler.so, and one library for each module with the kernels under their own names."""
    for source in [*CUDA.glob("*.cuh"), *(CUDA / f"{name}.cu" for name in modules)]:
        shutil.copy(source, folder)
    for name in ("ptx.cuh", "ptx_sm90.cuh"):
        shutil.copy(HERE / name, folder)  # in place of the one with assembly
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


class Emulator:
    """The compiled modules of one folder."""

    def __init__(self, folder: Path, modules: Sequence[str] = QUANTIZERS) -> None:
        # Modules find the scheduler of their own folder; a global one would serve all of them.
        self._scheduler = ctypes.CDLL(str(folder / "scheduler.so"))
        self._scheduler.launch.restype = ctypes.c_bool
        self._modules = {name: ctypes.CDLL(str(folder / f"{name}.so")) for name in modules}

    def launch(
        self,
        module: str,
        kernel: str,
        params: ctypes.Structure,
        grid: int | tuple[int, int],
        threads: int = 256,
        cluster: int = 1,
    ) -> None:
        """One launch, finished on return."""
        grid_x, grid_y = grid if isinstance(grid, tuple) else (grid, 1)
        library = self._modules[module]
        known = self._scheduler.launch(
            ctypes.cast(library[kernel], ctypes.c_void_p),
            ctypes.cast(library.poison, ctypes.c_void_p),
            ctypes.byref(params),
            ctypes.sizeof(params),
            ctypes.c_uint(grid_x),
            ctypes.c_uint(grid_y),
            threads,
            cluster,
        )
        assert known, f"no kernel takes {ctypes.sizeof(params)} bytes"
