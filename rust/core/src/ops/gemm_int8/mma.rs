//! Tensor cores from Ampere on: the kernels of cuda/gemm_int8_mma.cu.

use super::{MAX_EXACT_K, Problem, Product};
use crate::cuda::{Launch, Limits, Symbol};
use crate::tensor::Dtype;

/// Dynamic shared memory of every kernel: what a block may have by default is less.
const SHARED_BYTES: u32 = 65_536;
/// Threads of every kernel.
const THREADS: u32 = 256;
/// Rows of input and weight in the tiles of the two kernels.
const SMALL: u64 = 32;
const LARGE: u64 = 128;

/// Whether the kernels take the problem: their copies are of sixteen bytes, their sums of 32 bits, and unquantized
/// columns are multiplied in 16 bits.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    limits.capability >= (8, 0)
        && problem.k <= MAX_EXACT_K
        && problem.k % 16 == 0
        && problem.is_aligned
        && !(problem.has_outliers && problem.dtype == Dtype::Float32)
}

/// Small tiles where there are few rows, or where large ones would leave multiprocessors without any.
pub(super) fn plan(product: &Product, limits: &Limits) -> Launch {
    let problem = product.problem();
    let num_tiles = |tile: u64| (problem.m as u64).div_ceil(tile) * (problem.n as u64).div_ceil(tile);
    let is_small = problem.m <= 64 || num_tiles(LARGE) < u64::from(limits.num_sms) / 4;
    let tile = if is_small { SMALL } else { LARGE };
    let family = if product.outliers.is_some() { "gemm_int8_outliers_mma" } else { "gemm_int8_mma" };
    let symbol = Symbol { family, dtype: Some(problem.dtype), codebook: "", number: tile as u32 };
    Launch { shared_bytes: SHARED_BYTES, waits: true, ..Launch::new(symbol, num_tiles(tile), THREADS) }
}
