//! Few rows of input: the kernels of cuda/gemm_4bit_skinny.cu, with tensor cores and without.

use super::{Gemm4bit, Problem, bias_number, codebook_number};
use crate::cuda::{Launch, Limits, Params, Symbol};
use crate::ops::{address, block_shift};
use crate::tensor::{Dtype, Tensor};

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct SkinnyParams {
    input: *const u8,
    packed: *const u8,
    absmax: *const u8,
    absmax_scale: *const u8,
    absmax_offset: *const u8,
    absmax_codebook: *const u8,
    bias: *const u8,
    output: *mut u8,
    m: i64,
    n: i64,
    k: i64,
    block_shift: i32,
    codebook: i32,
    bias_dtype: i32,
    tiles_per_cta: i32,
    num_larger_ctas: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_skinny.cuh; `param_bytes` is compared at load.
unsafe impl Params for SkinnyParams {}

/// Rows of the weight in one tile of the tensor cores.
pub(super) const TILE_ROWS: u64 = 16;
/// Threads of a multiprocessor that the tensor-core kernel uses: one block of 512 or two of 256.
const MMA_THREADS_PER_SM: u32 = 512;
/// Its table of decoded pairs; the partial sums of its warps come behind it.
const MMA_TABLE_BYTES: u32 = 33792;
/// Longest rows whose offsets the tensor-core kernel holds in 32 bits.
const MMA_MAX_K: i64 = 1 << 24;

/// Rows of the weight that one thread block of the other kernels computes.
const SIMT_ROWS: u64 = 8;

/// Whether the tensor-core kernels take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    limits.capability >= (8, 0)
        && problem.dtype != Dtype::Float32
        && problem.k % 64 == 0
        && problem.k <= MMA_MAX_K
        && problem.is_aligned
}

/// Tensor cores: as few waves of thread blocks as hold all tiles, with the tiles spread evenly over them.
pub(super) fn plan_mma(op: &Gemm4bit, limits: &Limits) -> (Launch, SkinnyParams) {
    let num_tiles = (op.N as u64).div_ceil(TILE_ROWS);
    let num_sms = u64::from(limits.num_sms);
    // Measured on an H200: two blocks of 256 threads per multiprocessor win for tall weights and short, middling ones.
    let is_middling = num_tiles > num_sms && num_tiles <= 2 * num_sms && op.K <= 4096;
    let threads = if num_tiles > 4 * num_sms || is_middling { 256 } else { 512 };
    let slots = num_sms * u64::from(MMA_THREADS_PER_SM / threads);
    let is_block32 = op.block_size == 32;
    let tiles_at_once = if is_block32 || num_tiles <= 2 * slots { 2 } else { 4 };
    let family = match (tiles_at_once, is_block32, op.absmax_scale.is_some()) {
        (_, true, false) => "gemm_4bit_skinny_rows32_block32",
        (_, true, true) => "gemm_4bit_skinny_rows32_block32_nested",
        (2, _, false) => "gemm_4bit_skinny_rows32",
        (2, _, true) => "gemm_4bit_skinny_rows32_nested",
        (_, _, false) => "gemm_4bit_skinny_rows64",
        (_, _, true) => "gemm_4bit_skinny_rows64_nested",
    };
    let tokens = if op.num_rows() <= 4 || is_block32 { 4 } else { 8 };
    let waves = num_tiles.div_ceil(slots * tiles_at_once);
    let grid = num_tiles.min(waves * slots);
    let symbol = Symbol { family, dtype: Some(op.input.dtype), codebook: "", number: tokens };
    let shared_bytes = MMA_TABLE_BYTES + threads * (tiles_at_once * TILE_ROWS) as u32;
    let launch = Launch { shared_bytes, ..Launch::new(symbol, grid, threads) };
    let tiles_per_cta = num_tiles.checked_div(grid).unwrap_or(0) as i32;
    let num_larger_ctas = num_tiles.checked_rem(grid).unwrap_or(0) as i32;
    (launch, params(op, tiles_per_cta, num_larger_ctas))
}

/// Plain arithmetic, for every problem.
pub(super) fn plan_simt(op: &Gemm4bit) -> (Launch, SkinnyParams) {
    let is_aligned = |tensor: &Tensor, bytes: usize| (tensor.data as usize).is_multiple_of(bytes);
    let is_wordwise = op.K % 8 == 0 && is_aligned(&op.packed, 4) && is_aligned(&op.input, 16);
    let family = match (is_wordwise, op.absmax_scale.is_some()) {
        (true, false) => "gemm_4bit_skinny_words",
        (true, true) => "gemm_4bit_skinny_words_nested",
        (false, false) => "gemm_4bit_skinny_general",
        (false, true) => "gemm_4bit_skinny_general_nested",
    };
    let tokens = if op.num_rows() == 1 { 1 } else { 4 };
    let symbol = Symbol { family, dtype: Some(op.input.dtype), codebook: "", number: tokens };
    let grid = (op.N as u64).div_ceil(SIMT_ROWS);
    (Launch::new(symbol, grid, 256), params(op, 0, 0))
}

/// What every kernel of few rows reads.
pub(super) fn params(op: &Gemm4bit, tiles_per_cta: i32, num_larger_ctas: i32) -> SkinnyParams {
    SkinnyParams {
        input: op.input.data,
        packed: op.packed.data,
        absmax: op.absmax.data,
        absmax_scale: address(op.absmax_scale),
        absmax_offset: address(op.absmax_offset),
        absmax_codebook: address(op.absmax_codebook),
        bias: address(op.bias),
        output: op.output.data,
        m: op.num_rows(),
        n: op.N,
        k: op.K,
        block_shift: block_shift(op.block_size),
        codebook: codebook_number(op.codebook),
        bias_dtype: bias_number(op.bias),
        tiles_per_cta,
        num_larger_ctas,
    }
}
