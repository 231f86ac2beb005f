//! The code tables, as float32 bytes: Python builds its tensors from the one source of these numbers.

use crate::exception::raise;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qbits_core::{Error, ErrorKind, codebook};

/// Probability up to which the normal map takes quantiles.
const NORMAL_OFFSET: f64 = 0.967_708_3;

fn bytes<'py>(py: Python<'py>, values: &[f32]) -> Bound<'py, PyBytes> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    PyBytes::new(py, &bytes)
}

/// Adds the functions of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(create_dynamic_map, module)?)?;
    module.add_function(wrap_pyfunction!(create_linear_map, module)?)?;
    module.add_function(wrap_pyfunction!(create_fp8_map, module)?)?;
    module.add_function(wrap_pyfunction!(create_normal_map, module)?)?;
    module.add_function(wrap_pyfunction!(codebook_4bit, module)?)
}

/// The dynamic tree map.
#[pyfunction]
fn create_dynamic_map<'py>(
    py: Python<'py>,
    signed: bool,
    max_exponent_bits: u32,
    total_bits: u32,
) -> PyResult<Bound<'py, PyBytes>> {
    let map = codebook::create_dynamic_map(signed, max_exponent_bits, total_bits);
    Ok(bytes(py, &map.map_err(|error| raise(py, error))?))
}

/// Evenly spaced values.
#[pyfunction]
fn create_linear_map<'py>(
    py: Python<'py>,
    signed: bool,
    total_bits: u32,
    add_zero: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let map = codebook::create_linear_map(signed, total_bits, add_zero);
    Ok(bytes(py, &map.map_err(|error| raise(py, error))?))
}

/// The 8-bit float map of bitsandbytes, which is not OCP's.
#[pyfunction]
fn create_fp8_map<'py>(
    py: Python<'py>,
    signed: bool,
    exponent_bits: u32,
    precision_bits: u32,
    total_bits: u32,
) -> PyResult<Bound<'py, PyBytes>> {
    let map = codebook::create_fp8_map(signed, exponent_bits, precision_bits, total_bits);
    Ok(bytes(py, &map.map_err(|error| raise(py, error))?))
}

/// Quantiles of the normal distribution, which are constants: other offsets have none.
#[pyfunction]
fn create_normal_map<'py>(
    py: Python<'py>,
    offset: f64,
    use_extra_value: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    if offset != NORMAL_OFFSET {
        let rule =
            format!("offset must be {NORMAL_OFFSET}, the one whose quantiles are built in, got {offset}");
        let message = format!("qbits::create_normal_map: {rule}");
        return Err(raise(py, Error::new(ErrorKind::Value, message)));
    }
    Ok(bytes(py, &codebook::create_normal_map(use_extra_value)))
}

/// The 16 values of "nf4", "fp4", "af4" or "int4", by code, as checkpoints store them.
#[pyfunction]
fn codebook_4bit<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
    let values = match name {
        "int4" => &codebook::INT4,
        _ => codebook::Codebook4::from_name(name)
            .ok_or_else(|| {
                let rule = "name must be one of [\"nf4\", \"fp4\", \"af4\", \"int4\"]";
                raise(py, Error::new(ErrorKind::Value, format!("qbits::codebook_4bit: {rule}, got {name:?}")))
            })?
            .values(),
    };
    Ok(bytes(py, values))
}
