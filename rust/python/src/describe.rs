//! What Python derives things from: the declarations as data, the dispatch rule, and the state of the machine.

use crate::call::{num_threads, to_dtype};
use crate::exception::raise;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use qbits_core::backend::{OPS, runs_on_triton};
use qbits_core::cpu::Isa;
use qbits_core::cuda;
use qbits_core::ops::{gemm_4bit, gemm_int8};
use qbits_core::spec::{Arg, Of, Role, Rule};
use qbits_core::{Device, Dtype, Error};

/// Adds the functions of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(specs, module)?)?;
    module.add_function(wrap_pyfunction!(info, module)?)?;
    module.add_function(wrap_pyfunction!(plan_gemm_4bit, module)?)?;
    module.add_function(wrap_pyfunction!(plan_gemm_int8, module)?)
}

fn dtype_names(dtypes: &[Dtype]) -> Vec<&'static str> {
    dtypes.iter().map(|dtype| dtype.name()).collect()
}

/// Every op as data: name, doc, arguments and rules, in the order of the declaration.
#[pyfunction]
fn specs(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for op in OPS {
        let spec = (op.compiled)().spec;
        let doc: Vec<_> = spec.doc.iter().map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let entry = PyDict::new(py);
        entry.set_item("name", spec.name)?;
        entry.set_item("doc", doc.join("\n"))?;
        entry.set_item("has_triton", op.has_triton)?;
        let args = PyList::empty(py);
        for arg in spec.args {
            args.append(describe_arg(py, arg)?)?;
        }
        entry.set_item("args", args)?;
        let rules = PyList::empty(py);
        for rule in spec.rules {
            match rule {
                Rule::Needs(arg, other) => rules.append(("needs", arg, other))?,
                Rule::DtypeIfGiven(arg, given, then, otherwise) => {
                    rules.append(("dtype_if_given", arg, given, then.name(), otherwise.name()))?;
                }
                Rule::Excludes(arg, other) => rules.append(("excludes", arg, other))?,
                Rule::NoneFor(arg, of, dtype) => rules.append(("none_for", arg, of, dtype.name()))?,
            }
        }
        entry.set_item("rules", rules)?;
        list.append(entry)?;
    }
    Ok(list)
}

fn describe_arg<'py>(py: Python<'py>, arg: &Arg) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("name", arg.name)?;
    let tensor = |role: &str, dtypes: &[Dtype], shape: &str, flat: bool| -> PyResult<()> {
        entry.set_item("role", role)?;
        entry.set_item("dtypes", dtype_names(dtypes))?;
        entry.set_item("shape", shape)?;
        entry.set_item("flat", flat)
    };
    match arg.role {
        Role::In(dtypes, shape) => tensor("input", dtypes, shape, false)?,
        Role::Flat(dtypes, shape) => tensor("input", dtypes, shape, true)?,
        Role::Optional(dtypes, shape) => tensor("optional", dtypes, shape, false)?,
        Role::OptionalFlat(dtypes, shape) => tensor("optional", dtypes, shape, true)?,
        Role::Out(of, shape) => {
            let (like, dtypes): (Option<&str>, &[Dtype]) = match &of {
                Of::Is(dtype) => (None, std::slice::from_ref(dtype)),
                Of::Like(name) | Of::Arg(name) => (Some(name), &[]),
            };
            tensor("output", dtypes, shape, true)?;
            entry.set_item("dtype_of", like)?;
        }
        Role::Scratch(bytes) => tensor("scratch", &[Dtype::Uint8], bytes, true)?,
        Role::Int => entry.set_item("role", "int")?,
        Role::Float => entry.set_item("role", "float")?,
        Role::OneOf(choices) => {
            entry.set_item("role", "int")?;
            entry.set_item("choices", choices.to_vec())?;
        }
        Role::OneOfStr(choices) => {
            entry.set_item("role", "str")?;
            entry.set_item("choices", choices.to_vec())?;
        }
        Role::OneOfDtype(dtypes) => {
            entry.set_item("role", "dtype")?;
            entry.set_item("choices", dtype_names(dtypes))?;
        }
    }
    Ok(entry)
}

/// How `qbits.ops.gemm_4bit` computes a product on `cuda:{device}`, or on the CPU for -1: the name of a family of fused
/// kernels, "cpu" for the fused loop, or "dequantize" (decode, then torch's GEMM). Operands are taken as aligned.
#[pyfunction]
#[pyo3(signature = (M, N, K, dtype, block_size, device, is_nested=false))]
#[allow(non_snake_case)]
fn plan_gemm_4bit(
    M: i64,
    N: i64,
    K: i64,
    dtype: &Bound<'_, PyAny>,
    block_size: i64,
    device: i32,
    is_nested: bool,
) -> PyResult<&'static str> {
    let py = dtype.py();
    let fail = |error: Error| raise(py, error);
    let Some(dtype) = to_dtype(dtype)? else {
        return Err(PyTypeError::new_err("qbits::plan_gemm_4bit: dtype must be a dtype, got another object"));
    };
    let problem = gemm_4bit::Problem { m: M, n: N, k: K, dtype, block_size, is_nested, is_aligned: true };
    let limits = (device >= 0).then(|| cuda::limits("gemm_4bit", device)).transpose().map_err(fail)?;
    Ok(problem.fastest(limits, cuda::forced_family("gemm_4bit").map_err(fail)?).name())
}

/// The family of kernels by which `qbits.ops.gemm_int8`, or with `has_outliers` `gemm_int8_outliers`, computes a product on
/// `cuda:{device}`. Operands are taken as aligned.
#[pyfunction]
#[pyo3(signature = (M, N, K, dtype, device, has_outliers=false))]
#[allow(non_snake_case)]
fn plan_gemm_int8(
    M: i64,
    N: i64,
    K: i64,
    dtype: &Bound<'_, PyAny>,
    device: i32,
    has_outliers: bool,
) -> PyResult<&'static str> {
    let py = dtype.py();
    let fail = |error: Error| raise(py, error);
    let Some(dtype) = to_dtype(dtype)? else {
        return Err(PyTypeError::new_err("qbits::plan_gemm_int8: dtype must be a dtype, got another object"));
    };
    let problem = gemm_int8::Problem { m: M, n: N, k: K, dtype, has_outliers, is_aligned: true };
    let limits = cuda::limits("gemm_int8", device).map_err(fail)?;
    Ok(problem.fastest(limits, cuda::forced_family("gemm_int8").map_err(fail)?).name())
}

/// Version, kernels, CPU path and devices, for `qbits info` and for result files.
#[pyfunction]
fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let fail = |error: Error| raise(py, error);
    let entry = PyDict::new(py);
    entry.set_item("version", env!("CARGO_PKG_VERSION"))?;
    entry.set_item("cuda_archs", cuda::ARCHS.to_vec())?;
    entry.set_item("source_hash", cuda::SOURCE_HASH)?;
    entry.set_item("cpu_isa", Isa::get().map_err(fail)?.name())?;
    entry.set_item("num_threads", num_threads(py)?)?;
    entry.set_item("triton_on_cpu", runs_on_triton("info", Device::Cpu).map_err(fail)?)?;
    entry.set_item(
        "kernels",
        cuda::images().iter().map(|image| (image.name, image.kernels.len())).collect::<Vec<_>>(),
    )?;
    let devices = PyList::empty(py);
    let mut driver = None;
    if cuda::is_available() {
        let (major, minor) = cuda::driver_version().map_err(fail)?;
        driver = Some(format!("{major}.{minor}"));
        for ordinal in 0..cuda::num_devices().map_err(fail)? {
            let limits = cuda::limits("info", ordinal).map_err(fail)?;
            let (major, minor) = limits.capability;
            let usable = cuda::has_kernels("info", ordinal).map_err(fail)?;
            let device = PyDict::new(py);
            device.set_item("ordinal", ordinal)?;
            device.set_item("name", cuda::device_name(ordinal).map_err(fail)?)?;
            device.set_item("capability", format!("{major}.{minor}"))?;
            device.set_item("memory_bytes", limits.total_bytes)?;
            device.set_item("usable", usable)?;
            device.set_item(
                "reason",
                match (cuda::images().is_empty(), usable) {
                    (true, _) => "this build holds no kernels (QBITS_CUDA=0)".to_owned(),
                    (_, true) => String::new(),
                    _ => format!("no image fits; built for {}", cuda::ARCHS.join(", ")),
                },
            )?;
            let triton = runs_on_triton("info", Device::Cuda(ordinal)).map_err(fail)?;
            device.set_item("triton", triton)?;
            devices.append(device)?;
        }
    }
    entry.set_item("driver", driver)?;
    entry.set_item("devices", devices)?;
    Ok(entry)
}
