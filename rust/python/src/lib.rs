//! The Python module `qbits._core`: Python objects to `Value`s, errors to exceptions, and nothing else.

mod buffer;
mod call;
mod describe;
mod exception;
mod lend;
mod maps;

use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyDict, PyTuple};
use qbits_core::backend::OPS;

/// Operators on DLPack tensors; see `qbits.ops`, which allocates nothing twice and traces.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    for op in OPS {
        let spec = (op.compiled)().spec;
        let function = move |args: &Bound<'_, PyTuple>, keywords: Option<&Bound<'_, PyDict>>| {
            call::call(op, args, keywords)
        };
        // The interpreter keeps a pointer to the name for the life of the module, which is that of the process.
        let name: &'static std::ffi::CStr =
            Box::leak(std::ffi::CString::new(spec.name).expect("a name without NUL").into_boxed_c_str());
        module.add(spec.name, PyCFunction::new_closure(py, Some(name), None, function)?)?;
    }
    module.add_class::<buffer::Buffer>()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    describe::register(module)?;
    maps::register(module)?;
    call::register(module)
}
