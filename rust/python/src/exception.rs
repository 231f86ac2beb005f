//! `Error` to the exception classes of `qbits.errors`.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};
use qbits_core::{Error, ErrorKind};

static CLASSES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();

/// Key of a kind in `qbits.errors.KINDS`.
fn key(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Shape => "shape",
        ErrorKind::Dtype => "dtype",
        ErrorKind::Type => "type",
        ErrorKind::Value => "value",
        ErrorKind::Device => "device",
        ErrorKind::Traced => "traced",
        ErrorKind::UnsupportedHardware => "unsupported_hardware",
        ErrorKind::Driver => "driver",
    }
}

fn class(py: Python<'_>, kind: ErrorKind) -> PyResult<Bound<'_, PyType>> {
    let classes = CLASSES.get_or_try_init(py, || {
        let kinds = py.import("qbits.errors")?.getattr("KINDS")?;
        Ok::<_, PyErr>(kinds.cast_into::<PyDict>()?.unbind())
    })?;
    let class = classes.bind(py).get_item(key(kind))?;
    Ok(class.ok_or_else(|| PyRuntimeError::new_err("qbits.errors.KINDS lacks a kind"))?.cast_into()?)
}

/// The exception of `error`.
pub fn raise(py: Python<'_>, error: Error) -> PyErr {
    match class(py, error.kind) {
        Ok(class) => PyErr::from_type(class, error.message),
        Err(failure) => failure,
    }
}

/// Whether `error` says that a tensor without memory reached the direct path.
pub fn is_traced(py: Python<'_>, error: &PyErr) -> bool {
    class(py, ErrorKind::Traced).is_ok_and(|class| error.is_instance(py, &class))
}
