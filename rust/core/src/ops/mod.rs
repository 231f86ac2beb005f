//! One file per concept: the declarations, the launch plans, and the two implementations of each op.

pub mod blockwise_4bit;
pub mod blockwise_8bit;
pub mod gemm_4bit;
pub mod gemm_4bit_transposed;
pub mod gemm_int8;
pub mod int8;
pub mod nested;
pub mod tensorwise;

use crate::cpu::Float;
use crate::cuda::{Launch, Symbol, images};
use crate::tensor::{Dtype, Tensor};

/// Most blocks of a grid; kernels walk on from there.
const MAX_GRID: u64 = (1 << 31) - 1;

/// Evaluates an expression with `T` standing for the float type of a checked dtype.
macro_rules! with_float {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::Dtype::Float32 => {
                type $T = f32;
                $body
            }
            $crate::tensor::Dtype::Float16 => {
                type $T = half::f16;
                $body
            }
            $crate::tensor::Dtype::Bfloat16 => {
                type $T = half::bf16;
                $body
            }
            other => unreachable!("a checked float dtype, got {other}"),
        }
    };
}
pub(crate) use with_float;

/// The weight of a product on the CPU, from the fields of the op; unsafe as `host_absmax` is.
macro_rules! host_weight {
    ($op:expr) => {
        $crate::cpu::Weight4 {
            packed: $op.packed.as_slice(),
            absmax: $crate::ops::blockwise_4bit::host_absmax(
                &$op.absmax,
                $op.absmax_scale,
                $op.absmax_offset,
                $op.absmax_codebook,
            ),
            rows: $op.N as usize,
            columns: $op.K as usize,
            codebook: $crate::ops::blockwise_4bit::codebook_of($op.codebook),
            block_size: $op.block_size as usize,
        }
    };
}
pub(crate) use host_weight;

/// A launch over `n` elements, `per_block` to a thread block, without dynamic shared memory, of a kernel that waits.
fn launch_over(symbol: Symbol, n: i64, per_block: u64, threads: u32) -> Launch {
    let grid = (n as u64).div_ceil(per_block).min(MAX_GRID);
    Launch { waits: true, ..Launch::new(symbol, grid, threads) }
}

/// The kernel of `family` for a dtype.
fn symbol(family: &'static str, dtype: Dtype) -> Symbol {
    Symbol { family, dtype: Some(dtype), codebook: "", number: 0 }
}

/// Address of an optional tensor, null where there is none.
fn address(tensor: Option<Tensor>) -> *const u8 {
    tensor.map_or(std::ptr::null(), |tensor| tensor.data.cast_const())
}

/// Whether the build holds the image: those that Hopper's own instructions need are left out of other builds.
fn is_built(image: &str) -> bool {
    images().iter().any(|held| held.name == image)
}

/// Number of the bias' dtype in the kernels' parameters.
fn bias_number(bias: Option<Tensor>) -> i32 {
    match bias.map(|bias| bias.dtype) {
        None | Some(Dtype::Float32) => 0,
        Some(Dtype::Float16) => 1,
        Some(_) => 2,
    }
}

/// The elements of a float tensor of any checked dtype, widened.
///
/// # Safety
/// As [`Run::run`](crate::backend::Run::run).
unsafe fn widen(tensor: &Tensor) -> Vec<f32> {
    // SAFETY: the caller's promise.
    with_float!(tensor.dtype, T => unsafe { tensor.as_slice::<T>().iter().map(|x| x.to_f32()).collect() })
}

/// log2 of a block size, which is a power of two.
fn block_shift(block_size: i64) -> i32 {
    block_size.trailing_zeros() as i32
}

#[cfg(test)]
mod tests;
