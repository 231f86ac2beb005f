"""The environment as Markdown: versions, GPUs, architectures, and which kernels run here or why not."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from qbits import _core, ops
from qbits.report import markdown_table

__all__ = ["describe", "env_info"]

_PACKAGES = ("safetensors", "numpy", "transformers", "bitsandbytes", "triton")


def env_info() -> dict[str, Any]:
    """What `describe` shows, as plain values: the native module's own facts and the versions around it."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        **_core.info(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "num_threads": torch.get_num_threads(),
        "packages": {name: found for name, found in packages.items() if found},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(info: Mapping[str, Any] | None = None) -> str:
    """The environment as Markdown, ready to be pasted into a report.

    Args:
        info: What `env_info` gives; None asks for it.
    """
    info = env_info() if info is None else info
    facts = {
        "qbits": f"{info['version']} (sources {info['source_hash'][:12]})",
        "compiled for": ", ".join(info["cuda_archs"]) or "the CPU only",
        "CUDA kernels": ", ".join(f"{name} ({count})" for name, count in info["kernels"]) or "none",
        "CPU kernels": f"{info['cpu_isa']}, {info['num_threads']} threads",
        "CUDA driver": info["driver"] or "none found",
        "torch": f"{info['torch']} (CUDA {info['torch_cuda'] or 'none'})",
        "Python": f"{info['python']}, {info['platform']}",
        **info["packages"],
    }
    width = max(map(len, facts))
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items()]
    devices = [
        f"cuda:{d['ordinal']}  {d['name']}, compute capability {d['capability']}, "
        f"{d['memory_bytes'] / 2**30:.0f} GiB: "
        + ("kernels run" if d["usable"] else f"no kernel runs: {d['reason']}")
        + ("; int8 by Triton" if d["triton"] else "")
        for d in info["devices"]
    ]
    if not devices:
        reason = "no CUDA driver" if not info["driver"] else "the driver shows no GPU"
        devices = [f"cuda    no GPU to run on: {reason}"]
    columns = [f"cuda:{d['ordinal']}" for d in info["devices"]] or ["cuda"]
    rows = [(name, *_cells(spec, info)) for name, spec in ops.SPECS.items()]
    return "\n\n".join(["\n".join(lines), "\n".join(devices), markdown_table(("op", "cpu", *columns), rows)])


def _cells(spec: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    """What runs an op on the CPU and on each GPU."""
    has_triton = spec["has_triton"] and "triton" in info["packages"]
    cells = ["triton" if has_triton and info["triton_on_cpu"] else str(info["cpu_isa"])]
    for device in info["devices"]:
        cells.append("triton" if has_triton and device["triton"] else "yes" if device["usable"] else "no")
    return cells if info["devices"] else [*cells, "no"]
