//! The call of an op from Python's eager mode: outputs as one argument, tracing told apart, autograd told of writes.

use crate::call::{MAX_ARGS, call};
use crate::exception::{is_traced, raise};
use pyo3::Borrowed;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyTuple};
use qbits_core::backend::Op;
use qbits_core::{Error, ErrorKind};

/// What torch and `qbits.ops` do for eager calls.
struct Hooks {
    /// Number of dispatch modes that are on.
    num_modes: Py<PyAny>,
    /// (name, inputs, out): the call through torch's dispatcher.
    traced: Py<PyAny>,
    /// (tensors): tells autograd that they were written; refuses those that have no version.
    increment_version: Py<PyAny>,
    /// (tensors): the same for any objects.
    written: Py<PyAny>,
}

static HOOKS: PyOnceLock<Hooks> = PyOnceLock::new();

/// Sets what eager calls need of torch, once for the process.
#[pyfunction]
fn set_eager_hooks(
    py: Python<'_>,
    num_modes: Py<PyAny>,
    traced: Py<PyAny>,
    increment_version: Py<PyAny>,
    written: Py<PyAny>,
) {
    HOOKS.get_or_init(py, || Hooks { num_modes, traced, increment_version, written });
}

/// Adds the functions of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(set_eager_hooks, module)?)
}

/// Calls `op` with its inputs and, last, `out`: None, the output, or a tuple of the outputs.
pub fn call_eagerly<'py>(
    py: Python<'py>,
    op: &'static Op,
    args: &[Borrowed<'_, 'py, PyAny>],
) -> PyResult<Bound<'py, PyAny>> {
    let (Some((out, inputs)), Some(hooks)) = (args.split_last(), HOOKS.get(py)) else {
        return Err(PyRuntimeError::new_err("qbits.ops must set the hooks and pass every argument"));
    };
    let compiled = (op.compiled)();
    let traced = || hooks.traced.bind(py).call1((compiled.spec.name, PyTuple::new(py, inputs)?, out));
    if hooks.num_modes.bind(py).call0()?.is_truthy()? {
        return traced();
    }
    let num_outputs = compiled.outputs().len();
    let outputs = match num_outputs {
        1 => None,
        _ if out.is_none() => None,
        _ => Some(as_tuple(py, compiled.spec.name, out, num_outputs)?),
    };
    let none = py.None().into_bound(py);
    let mut items = [none.as_borrowed(); MAX_ARGS];
    let num_items = inputs.len() + num_outputs;
    items[..inputs.len()].copy_from_slice(inputs);
    match &outputs {
        Some(outputs) => {
            for (slot, output) in items[inputs.len()..num_items].iter_mut().zip(outputs.iter_borrowed()) {
                *slot = output;
            }
        }
        None => items[inputs.len()] = *out,
    }
    let answer = match call(py, op, &items[..num_items], true) {
        Err(error) if is_traced(py, &error) => return traced(),
        answer => answer?,
    };
    if answer.is_declined || out.is_none() {
        return answer.into_object(py);
    }
    if answer.has_elements {
        let tensors = match &outputs {
            Some(outputs) => outputs.clone(),
            None => PyTuple::new(py, [out])?,
        };
        // Inference tensors have no version, foreign arrays no autograd.
        if call_with(&hooks.increment_version, &tensors).is_err() {
            call_with(&hooks.written, &tensors)?;
        }
    }
    match outputs {
        None => Ok((*out).to_owned()),
        Some(outputs) if outputs.iter_borrowed().any(|output| output.is_none()) => answer.into_object(py),
        Some(outputs) => Ok(outputs.into_any()),
    }
}

/// `function(argument)`, without a tuple of the argument.
fn call_with<'py>(function: &Py<PyAny>, argument: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: a live callable and a live argument, ended by null; the result is a new reference or an error.
    unsafe {
        let none = std::ptr::null_mut::<ffi::PyObject>();
        let answer = ffi::PyObject_CallFunctionObjArgs(function.as_ptr(), argument.as_ptr(), none);
        Bound::from_owned_ptr_or_err(argument.py(), answer)
    }
}

/// The outputs of a call in a tuple.
fn as_tuple<'py>(
    py: Python<'py>,
    op: &str,
    out: &Bound<'py, PyAny>,
    num_outputs: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let tuple = match (out.cast::<PyTuple>(), out.cast::<PyList>()) {
        (Ok(tuple), _) if tuple.len() == num_outputs => return Ok(tuple.clone()),
        (_, Ok(list)) if list.len() == num_outputs => return Ok(list.to_tuple()),
        (Ok(tuple), _) => format!("a tuple of {}", tuple.len()),
        (_, Ok(list)) => format!("a list of {}", list.len()),
        _ => out.get_type().name()?.to_string(),
    };
    let message = format!("qbits::{op}: out must be a tuple of {num_outputs} outputs, got {tuple}");
    Err(raise(py, Error::new(ErrorKind::Type, message)))
}
