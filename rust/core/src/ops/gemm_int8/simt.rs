//! Every problem on every GPU: the kernels of cuda/gemm_int8_simt.cu.

use super::{MAX_EXACT_K, Product};
use crate::cuda::Launch;
use crate::ops::symbol;

/// Rows of input and of weight that one thread block multiplies.
const TILE: u64 = 64;

/// One thread block for each tile of the output.
pub(super) fn plan(product: &Product) -> Launch {
    let problem = product.problem();
    let family = match (product.outliers.is_some(), problem.k > MAX_EXACT_K) {
        (false, false) => "gemm_int8_simt",
        (false, true) => "gemm_int8_simt_long",
        (true, false) => "gemm_int8_outliers_simt",
        (true, true) => "gemm_int8_outliers_simt_long",
    };
    let grid = (problem.m as u64).div_ceil(TILE) * (problem.n as u64).div_ceil(TILE);
    Launch { waits: true, ..Launch::new(symbol(family, problem.dtype), grid, 256) }
}
