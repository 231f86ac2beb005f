//! The Python module `qbits._core`: Python objects to `Value`s, errors to exceptions, and nothing else.

mod buffer;
mod call;
mod dependent;
mod describe;
mod eager;
mod exception;
mod fastcall;
mod lend;
mod maps;

use pyo3::prelude::*;

/// Operators on DLPack tensors; see `qbits.ops`, which allocates nothing twice and traces.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    fastcall::register(module)?;
    module.add_class::<buffer::Buffer>()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    dependent::register(module)?;
    eager::register(module)?;
    describe::register(module)?;
    maps::register(module)?;
    call::register(module)
}
