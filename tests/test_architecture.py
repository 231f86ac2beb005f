"""The shape of the project: the way imports run, named files exist, no op lacks test, oracle or source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import golden
import pytest
import qbits
import reference
from calls import SPECS
from qbits import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "qbits"
RUST = ROOT / "rust" / "core" / "src"
TESTS = ROOT / "tests"

# A module may import from its own layer and from those named later. Modules that stand in no layer are the
# vocabulary (errors, records, schemes, ...) that every layer may use.
PYTHON_LAYERS = [
    {"cli", "compat", "integrations"},
    {"model", "report", "checkpoint"},
    {"nn", "optim"},
    {"functional"},
    {"autograd"},
    {"ops"},
    {"triton_kernels"},
    {"_core"},
]
RUST_LAYERS = [{"backend"}, {"ops"}, {"cpu", "cuda"}, {"spec", "codebook", "dlpack"}, {"tensor", "error"}]
# backend and ops name each other: the list of ops is in one, the trait that each op implements in the other
RUST_SAME_LAYER = {"ops": {"backend"}}

SOURCE_CHECKOUT = pytest.mark.skipif(not PACKAGE.exists(), reason="needs the source tree")


def layer_of(module: str, layers: list[set[str]]) -> int | None:
    """Index of the layer that a module stands in."""
    return next((i for i, layer in enumerate(layers) if module in layer), None)


def python_imports(path: Path) -> Iterator[str]:
    """First part below `qbits` of everything that a file imports, lazy imports inside functions included."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            full = [f"{stem}.{alias.name}" if stem == "qbits" else stem for alias in node.names]
        else:
            continue
        for name in full:
            parts = name.split(".")
            if parts[0] == "qbits" and len(parts) > 1:
                yield parts[1]


@SOURCE_CHECKOUT
def test_python_imports_run_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        layer = layer_of(own, PYTHON_LAYERS)
        for imported in python_imports(path):
            other = layer_of(imported, PYTHON_LAYERS)
            if layer is not None and other is not None and other < layer:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert not wrong, "\n".join(wrong)


@SOURCE_CHECKOUT
def test_only_ops_and_code_tables_touch_the_native_module():
    users = {path.name for path in PACKAGE.rglob("*.py") if "_core" in python_imports(path)}
    assert users <= {"ops.py", "codebooks.py", "dependent.py", "info.py", "__init__.py"}, users


def rust_uses(path: Path) -> Iterator[str]:
    """First module below the crate of every path in a file, unit tests left out."""
    source = path.read_text().split("#[cfg(test)]\nmod tests")[0]
    source = re.sub(r"//.*", "", source)
    for group in re.findall(r"\buse crate::\{([^;]*)\};", source):
        yield from re.findall(r"(?:^|,)\s*([a-z_0-9]+)(?=::|,|\s*$)", group)
    yield from re.findall(r"\bcrate::([a-z_0-9]+)::", source)


@SOURCE_CHECKOUT
def test_rust_uses_run_one_way():
    wrong = []
    for path in sorted(RUST.rglob("*.rs")):
        own = path.relative_to(RUST).parts[0].removesuffix(".rs")
        layer = layer_of(own, RUST_LAYERS)
        if layer is None or path.name in ("tests.rs", "recorder.rs"):
            continue
        for used in rust_uses(path):
            other = layer_of(used, RUST_LAYERS)
            if other is not None and other < layer and used not in RUST_SAME_LAYER.get(own, set()):
                wrong.append(f"{path.relative_to(ROOT)} uses {used}")
    assert not wrong, "\n".join(wrong)


@SOURCE_CHECKOUT
def test_the_vocabulary_knows_neither_python_nor_the_driver():
    for name in ("tensor", "spec", "error", "dlpack", "codebook"):
        for path in [RUST / f"{name}.rs", *RUST.glob(f"{name}/*.rs")]:
            source = re.sub(r"//.*", "", path.read_text())
            assert not re.search(r"\b(pyo3|cudarc)\b", source), path
    assert "pyo3" not in (ROOT / "rust" / "core" / "Cargo.toml").read_text()


@SOURCE_CHECKOUT
def test_device_code_holds_no_host_functions():
    for path in sorted((ROOT / "cuda").rglob("*.cu*")):
        source = re.sub(r"//.*", "", path.read_text())
        for word in ("cudaMalloc", "cudaMemcpy", "<<<", "torch/", "std::vector", "printf(", "cudaStream"):
            assert word not in source, f"{path.name} holds {word}"


@SOURCE_CHECKOUT
def test_concepts_have_the_same_name_in_every_tree():
    concepts = {path.stem for path in (RUST / "ops").glob("*.rs")} - {"mod", "tests"}
    assert concepts, "no concepts found"
    for concept in concepts:
        assert (RUST / "cpu" / f"{concept}.rs").exists() or (RUST / "cpu" / concept).is_dir(), concept
        assert list((ROOT / "cuda").glob(f"{concept}*.cu")), concept
        assert (TESTS / f"test_{concept}.py").exists(), concept


GENERATED = {"images.rs"}  # written by the build


def named_paths(text: str) -> set[str]:
    """What looks like a path of the repository between backquotes or in a layout block."""
    inline = re.findall(r"`([\w./-]+/[\w.-]*|[\w-]+\.(?:py|rs|cu|cuh|toml|md|json))`", text)
    is_variable = re.compile(r"[A-Z_]+/")  # CUDA_HOME/bin
    return {
        path for path in inline if not is_variable.match(path) and not path.startswith(("http", "/"))
    } - GENERATED


@SOURCE_CHECKOUT
def test_every_path_in_the_architecture_exists():
    document = ROOT / "ARCHITECTURE.md"
    paths = named_paths(document.read_text())
    assert paths, "ARCHITECTURE.md names no path"
    roots = [
        ROOT,
        PACKAGE,
        RUST,
        RUST / "ops",
        RUST / "cuda",
        RUST / "cpu",
        ROOT / "cuda",
        TESTS,
        ROOT / "bench",
    ]
    missing = [path for path in sorted(paths) if not any((root / path).exists() for root in roots)]
    assert not missing, missing


ORACLES = {
    "quantize_4bit": reference.quantize_4bit,
    "dequantize_4bit": reference.decode_4bit,
    "pack_4bit": reference.pack_4bit,
    "unpack_4bit": reference.unpack_4bit,
    "quantize_blockwise": reference.quantize_blockwise,
    "dequantize_blockwise": reference.decode_blockwise,
    "quantize_absmax": reference.quantize_absmax,
    "quantize": reference.quantize,
    "dequantize": reference.decode,
    "quantize_no_absmax": reference.quantize_no_absmax,
    "dequantize_no_absmax": reference.decode_no_absmax,
    "quantize_rowwise": reference.quantize_rowwise,
    "quantize_rowwise_outliers": reference.quantize_rowwise,
    "quantize_columnwise": reference.quantize_columnwise,
    "quantize_columnwise_and_transpose": reference.quantize_columnwise,
    "quantize_global": reference.quantize_global,
    "quantize_global_transpose": reference.quantize_global,
    "quantize_dual_rowwise": reference.quantize_rowwise,
    "quantize_dual_global": reference.quantize_global,
    "dequantize_rowwise": reference.decode_int8,
    "dequantize_columnwise": reference.decode_int8,
    "dequantize_global": reference.decode_int8,
    "gemm_4bit": reference.gemm_4bit,
    "gemm_4bit_transposed": reference.gemm_4bit_transposed,
    "gemm_int8": reference.gemm_int8,
    "gemm_int8_outliers": reference.gemm_int8_outliers,
}


def test_every_op_has_an_oracle_and_no_oracle_lacks_its_op():
    assert set(ORACLES) == set(SPECS)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_every_op_is_compared_with_its_oracle_in_some_test(op):
    oracle = f"reference.{ORACLES[op].__name__}("
    pattern = re.compile(rf"\bops\.{op}\(")
    texts = [path.read_text() for path in TESTS.glob("test_*.py")]
    assert any(pattern.search(text) and oracle in text for text in texts)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_every_op_names_its_source(op):
    assert re.search(r"Reference: .*(arXiv:\d{4}\.\d{4,5}|doi:)", SPECS[op]["doc"], re.DOTALL)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_every_op_has_a_docstring_that_tells_all_its_arguments(op):
    text = getattr(ops, op).__doc__
    assert text.split("\n")[0].endswith((".", "`", "``")), "the first line is one sentence"
    for section in ("Args:", "Raises:", "Reference:"):
        assert section in text, section
    for arg in SPECS[op]["args"]:
        if arg["role"] != "scratch":
            assert f"{arg['name']}:" in text, arg["name"]
    assert "out:" in text


def test_public_names_exist_and_are_documented():
    for module in (qbits, ops):
        for name in module.__all__:
            value = getattr(module, name)
            assert value.__doc__ or not callable(value), f"{module.__name__}.{name}"


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0
    return (node.end_lineno or node.lineno) - node.lineno - docstring


@SOURCE_CHECKOUT
def test_files_and_functions_stay_short():
    """About 400 lines a file, 60 a Python function."""
    long = []
    python = [*PACKAGE.rglob("*.py"), *TESTS.glob("*.py"), *(ROOT / "bench").glob("*.py")]
    for path in [*python, *(ROOT / "rust").rglob("src/**/*.rs"), *(ROOT / "cuda").glob("*.cu*")]:
        num_lines = path.read_text().count("\n")
        if num_lines > 450:
            long.append(f"{path.relative_to(ROOT)}: {num_lines} lines")
    for path in python:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and body_lines(node) > 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {body_lines(node)} lines")
    assert not long, "\n".join(long)


@SOURCE_CHECKOUT
def test_every_file_says_first_what_it_holds():
    silent = []
    for path in [*PACKAGE.rglob("*.py"), *TESTS.glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        if not path.read_text().startswith('"""'):
            silent.append(str(path.relative_to(ROOT)))
    for path in [*(ROOT / "rust").rglob("src/**/*.rs"), *(ROOT / "cuda").rglob("*.cu*")]:
        if not path.read_text().startswith(("//!", "//", "/*")):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, silent


@SOURCE_CHECKOUT
def test_the_tables_of_the_readme_are_up_to_date():
    command = [sys.executable, str(ROOT / "bench" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_golden_vectors_of_all_sections_are_used():
    """Guards against a table that nobody compares with: each name of golden.py occurs in a test."""
    texts = "".join(path.read_text() for path in TESTS.glob("test_*.py"))
    constants = [name for name in vars(golden) if name.isupper() and name != "ONE"]
    assert [name for name in constants if f"golden.{name}" not in texts] == []
