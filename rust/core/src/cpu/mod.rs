//! The CPU backend: every op as a function over slices, with SIMD chosen at run time and the work split over threads.
//!
//! The scalar loops are the reference. Each SIMD path gives the same codes, scales and decoded values to the bit, at
//! any number of threads; `gemm_4bit` differs in the order of its sums. Functions trust their arguments' values (block
//! sizes, ascending maps) to the specification of the op, and panic where lengths do not fit.

mod absmax;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blockwise_4bit;
#[cfg(target_arch = "x86_64")]
mod blockwise_4bit_avx2;
#[cfg(target_arch = "x86_64")]
mod blockwise_4bit_avx512;
mod blockwise_8bit;
#[cfg(target_arch = "x86_64")]
mod blockwise_8bit_avx2;
#[cfg(target_arch = "x86_64")]
mod blockwise_8bit_avx512;
mod buckets;
mod float;
mod gemm_4bit;
#[cfg(target_arch = "x86_64")]
mod gemm_4bit_avx2;
#[cfg(target_arch = "x86_64")]
mod gemm_4bit_avx512;
mod gemm_4bit_outer;
mod gemm_4bit_transposed;
mod gemm_int8;
#[cfg(target_arch = "x86_64")]
mod gemm_int8_avx2;
#[cfg(target_arch = "x86_64")]
mod gemm_int8_avx512;
mod gemm_int8_panels;
mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_avx2;
#[cfg(target_arch = "x86_64")]
mod int8_avx512;
mod isa;
mod nested;
mod tensorwise;
#[cfg(test)]
mod tests;
mod threads;

pub use blockwise_4bit::{dequantize_4bit, pack_4bit, quantize_4bit, unpack_4bit};
pub use blockwise_8bit::{dequantize_blockwise, quantize_blockwise};
pub use float::Float;
pub use gemm_4bit::{Weight4, gemm_4bit};
pub use gemm_4bit_transposed::gemm_4bit_transposed;
pub use gemm_int8::{Codes, Outliers, Scales, gemm_int8, gemm_int8_outliers, gemm_int8_raw};
pub use int8::{
    ElementScales, Matrix, dequantize_matrix, find_column_scales, find_tensor_scale, quantize_matrix,
    quantize_rowwise, quantize_rowwise_outliers, quantize_transposed,
};
pub use isa::Isa;
pub use nested::{Absmax, Nested, quantize_absmax};
pub use tensorwise::{dequantize, dequantize_no_absmax, quantize, quantize_no_absmax};

use crate::Result;

/// How a call runs: with which instructions and on how many threads. Neither changes a result.
#[derive(Clone, Copy, Debug)]
pub struct Execution {
    /// Instruction set.
    pub isa: Isa,
    /// Most threads that work at once, the caller's included.
    pub threads: usize,
}

impl Execution {
    /// The best instruction set of this CPU, or the one that `QBITS_CPU` names, on up to `threads` threads.
    ///
    /// # Errors
    /// Where `QBITS_CPU` names none, or one that this CPU lacks.
    pub fn new(threads: usize) -> Result<Self> {
        Ok(Self { isa: Isa::get()?, threads })
    }
}
