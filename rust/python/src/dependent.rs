//! Which weights nobody writes: those of the layers inside `qbits.dependent_launch`, on this thread.

use crate::exception::raise;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qbits_core::backend::Op;
use qbits_core::spec::Value;
use qbits_core::{Error, ErrorKind};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// Tensors of one weight, each with its address and the version that it had on entry.
type Weight = Vec<(usize, i64, Py<PyAny>)>;

thread_local! {
    /// Weights by the address of the first tensor; one map for each context that this thread is in.
    static CONTEXTS: RefCell<Vec<HashMap<usize, Weight>>> = const { RefCell::new(Vec::new()) };
    static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Enters a context: `weights` holds the tensors of each, in the order of the op's arguments, absent ones left out.
#[pyfunction]
fn enter_dependent_launch(weights: Vec<Bound<'_, PyTuple>>) -> PyResult<()> {
    let mut entered = HashMap::with_capacity(weights.len());
    for tensors in weights {
        let mut weight = Weight::with_capacity(tensors.len());
        for tensor in tensors.iter() {
            let address = tensor.call_method0("data_ptr")?.extract()?;
            weight.push((address, version(&tensor)?, tensor.unbind()));
        }
        if let Some((address, ..)) = weight.first() {
            entered.insert(*address, weight);
        }
    }
    CONTEXTS.with_borrow_mut(|contexts| contexts.push(entered));
    IS_INSIDE.set(true);
    Ok(())
}

/// Leaves the innermost context. Returns the addresses of the weights that were written inside.
#[pyfunction]
fn leave_dependent_launch(py: Python<'_>) -> PyResult<Vec<usize>> {
    let left = CONTEXTS.with_borrow_mut(|contexts| {
        let left = contexts.pop();
        IS_INSIDE.set(!contexts.is_empty());
        left
    });
    let mut written = Vec::new();
    for (address, weight) in left.unwrap_or_default() {
        if is_written(py, &weight)? {
            written.push(address);
        }
    }
    Ok(written)
}

/// Adds the functions of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(enter_dependent_launch, module)?)?;
    module.add_function(wrap_pyfunction!(leave_dependent_launch, module)?)
}

fn version(tensor: &Bound<'_, PyAny>) -> PyResult<i64> {
    tensor.getattr(intern!(tensor.py(), "_version"))?.extract()
}

fn is_written(py: Python<'_>, weight: &Weight) -> PyResult<bool> {
    for (_, before, tensor) in weight {
        if version(tensor.bind(py))? != *before {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the weight of this call is one of a context.
///
/// # Errors
/// When it was written since the context was entered.
#[inline]
pub fn is_ready(py: Python<'_>, op: &Op, values: &[Value]) -> PyResult<bool> {
    if op.weights.is_empty() || !IS_INSIDE.get() { Ok(false) } else { find(py, op, values) }
}

#[cold]
fn find(py: Python<'_>, op: &Op, values: &[Value]) -> PyResult<bool> {
    let spec = (op.compiled)().spec;
    let given: Vec<usize> = (spec.args.iter().zip(values))
        .filter_map(|(arg, value)| match value {
            Value::Tensor(tensor) if op.weights.contains(&arg.name) => Some(tensor.data as usize),
            _ => None,
        })
        .collect();
    CONTEXTS.with_borrow(|contexts| {
        let mut found = contexts.iter().rev().filter_map(|context| context.get(given.first()?));
        let Some(weight) = found.find(|weight| weight.iter().map(|entry| &entry.0).eq(&given)) else {
            return Ok(false);
        };
        if is_written(py, weight)? {
            let (name, first) = (spec.name, op.weights[0]);
            let rule =
                format!("{first} must stay as it is inside dependent_launch, got a weight that was written");
            return Err(raise(py, Error::new(ErrorKind::Value, format!("qbits::{name}: {rule}"))));
        }
        Ok(true)
    })
}
