"""Writes the generated tables of README.md: ops from their declarations, speeds from the result files.

    python bench/readme_tables.py            # rewrites what stands between the markers
    python bench/readme_tables.py --check    # fails where README.md is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qbits import _core

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results(name: str) -> list[dict[str, Any]]:
    """Result files of a benchmark, one a machine."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}_*.json"))]


def machine(result: dict[str, Any]) -> str:
    """One line below a table: where, when and with which versions it was measured."""
    versions = result["versions"]
    where = f"{result['gpu']}, driver {result['driver']}" if "gpu" in result else result["cpu"]
    return (
        f"\n{where}; torch {versions['torch']}, bitsandbytes {versions['bitsandbytes']}; {result['date']}; "
        f"sources {result['source_hash'][:12]}.\n"
    )


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def times(value: float | None) -> str:
    """A factor."""
    return "-" if value is None else f"{value:.1f}x"


def ops_table() -> str:
    """Every op: what goes in, what comes out, what it does."""
    rows = []
    for spec in _core.specs():
        arguments = [arg for arg in spec["args"] if arg["role"] not in ("output", "scratch")]
        outputs = [arg["name"] for arg in spec["args"] if arg["role"] == "output"]
        names = ", ".join(arg["name"] + ("=None" if arg["role"] == "optional" else "") for arg in arguments)
        summary = spec["doc"].split("\n\n")[0].replace("\n", " ").strip()
        rows.append([f"`{spec['name']}({names})`", ", ".join(f"`{name}`" for name in outputs), summary])
    lines = [["op", "returns", "what it does"], ["---"] * 3, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def quantizers_table() -> str:
    """Time, share of the copy, and the peer; bfloat16 and float32."""
    text = ""
    for result in results("quantizers"):
        rows = [
            [
                f"{row['op']}, {row['dtype']}",
                number(row["us"]),
                number(row["tb_per_s"], 2),
                percent(row.get("share_of_copy")),
                number(row.get("peer_us")),
                times(row.get("speedup")),
            ]
            for row in result["rows"]
            if row["dtype"] != "float16"
        ]
        heads = ["8192 x 8192", "us", "TB/s", "of the copy", "bitsandbytes us", "faster"]
        text += table(heads, rows) + machine(result)
    return text


README_TOKENS = (1, 16, 64, 256, 1024)


def gemm_table() -> str:
    """The fused product against cuBLAS and the peer, NF4 and bfloat16."""
    text = ""
    for result in results("gemm_4bit"):
        rows = [
            [
                f"{row['N']} x {row['K']}, M = {row['M']}",
                number(row["us"]),
                percent(row["share_of_floor"]),
                number(row.get("dependent_us")),
                number(row["cublas_us"]),
                times(row["speedup_over_cublas"]),
                f"{number(row.get('peer_us'))} {row.get('peer') or ''}".strip(),
                times(row.get("speedup")),
            ]
            for row in result["rows"]
            if (row["op"], row["dtype"]) == ("gemm_4bit nf4", "bfloat16") and row["M"] in README_TOKENS
        ]
        heads = [
            "N x K",
            "us",
            "of the floor",
            "dependent us",
            "cuBLAS bf16 us",
            "faster",
            "best peer us",
            "faster",
        ]
        text += table(heads, rows) + machine(result)
    return text


def host_time_table() -> str:
    """Host time of a call, without and with its launch."""
    text = ""
    for result in results("host_time"):
        rows = [
            [row["call"], number(row["before_launch_us"], 2), number(row["with_launch_us"], 2)]
            for row in result["rows"]
        ]
        text += table(["call", "no launch, us", "whole, us"], rows) + machine(result)
    return text


def cpu_table() -> str:
    """The CPU backend against torch and the peer."""
    text = ""
    for result in results("cpu"):
        rows = [
            [
                row["op"],
                str(row["num_threads"]),
                number(row["us"] / 1e3, 2),
                times(row["scaling"]),
                number(None if row["torch_us"] is None else row["torch_us"] / 1e3, 2),
                number(None if row["peer_us"] is None else row["peer_us"] / 1e3, 2),
            ]
            for row in result["rows"]
        ]
        heads = ["4 Mi elements", "threads", "ms", "over one thread", "torch ms", "bitsandbytes ms"]
        text += table(heads, rows) + machine(result)
    return text


TABLES: dict[str, Callable[[], str]] = {
    "ops": ops_table,
    "quantizers": quantizers_table,
    "gemm_4bit": gemm_table,
    "host_time": host_time_table,
    "cpu": cpu_table,
}


def regenerated(text: str) -> str:
    """README's text with every marked table made anew."""

    def replace(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise SystemExit(f"README.md: table must be one of {[*TABLES]}, got {match[2]}")
        return f"{match[1]}{TABLES[match[2]]() or 'Not measured yet.' + chr(10)}{match[4]}"

    return MARKED.sub(replace, text)


def main() -> None:
    """Rewrites README.md, or compares with `--check`."""
    text = README.read_text()
    wanted = regenerated(text)
    if "--check" not in sys.argv:
        README.write_text(wanted)
    elif wanted != text:
        raise SystemExit(
            "README.md must hold the tables of the declarations and result files: run this script"
        )


if __name__ == "__main__":
    main()
