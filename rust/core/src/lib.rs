//! Quantization of tensors to 8 and 4 bits, on CPU and CUDA, usable without Python.
//!
//! `spec` holds the declaration language, `ops` one declaration per op with its plans, `cpu` and `cuda` the backends.

pub mod backend;
pub mod codebook;
pub mod cpu;
pub mod cuda;
pub mod dlpack;
pub mod error;
pub mod ops;
pub mod spec;
pub mod tensor;

pub use error::{Error, ErrorKind, Result};
pub use tensor::{Device, Dtype, Tensor};
