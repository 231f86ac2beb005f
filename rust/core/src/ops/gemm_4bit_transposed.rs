//! Product of an input with a transposed 4-bit weight: the gradient of a linear layer's input.
//! Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3.

mod sm90;

use super::blockwise_4bit::{ABSMAX, ABSMAX_RULES, BLOCK_SIZES, CODEBOOKS};
use super::gemm_4bit::codebook_number;
use super::{MAX_GRID, address, block_shift, host_weight, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::cpu::{self, Execution};
use crate::cuda::{Family, Launch, Limits, Params, Symbol, forced_family, launch, limits};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, UINT8};
use crate::tensor::{Dtype, Tensor};

op! {
    /// Multiply by a transposed 4-bit weight: `output = input @ dequantize_4bit(packed, ...).reshape(N, K)`.
    ///
    /// The gradient of the input of `gemm_4bit`, of the gradient of its output. The sum runs in float32 and is rounded
    /// once to the input's dtype.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3, equation 5.
    gemm_4bit_transposed => Gemm4bitTransposed {
        input: In(FLOATS, "*M, N"),
        packed: Flat(UINT8, "ceil_div(N * K, 2)"),
        absmax: Flat(ABSMAX, "ceil_div(N * K, block_size)"),
        N: Int,
        K: Int,
        codebook: OneOfStr(CODEBOOKS),
        block_size: OneOf(BLOCK_SIZES),
        absmax_scale: OptionalFlat(FLOAT32, "ceil_div(ceil_div(N * K, block_size), 256)"),
        absmax_offset: OptionalFlat(FLOAT32, "1"),
        absmax_codebook: OptionalFlat(FLOAT32, "256"),
        output: Out(Of::Like("input"), "*M, K"),
        scratch: Scratch("K * 2048"),
    }
    rules: ABSMAX_RULES
}

/// Rows of the input that one pass over the weight serves at most; the scratch holds [`MAX_SPLITS`] partial sums of each.
const MAX_ROWS: i64 = 32;
const MAX_SPLITS: u64 = 16;

/// Rows of the input up to which the fused kernels and loops win over decoding and the framework's GEMM; on Hopper
/// [`sm90::MOST_FUSED`]. The older kernels on an H200: at 8192 x 8192 and 16 rows 41 us against 83; at 32 rows 77, but of
/// 4096 x 4096 34 against 23.
const MOST_FUSED_MMA: i64 = 16;
const MOST_FUSED_SIMT: i64 = 8;
const MOST_FUSED_CPU: i64 = 8;

impl Run<Gemm4bitTransposed> for Cpu {
    unsafe fn run(&self, op: &Gemm4bitTransposed) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let output = op.output.as_slice_mut();
            cpu::gemm_4bit_transposed::<T>(op.input.as_slice(), host_weight!(op), output, execution);
        });
        Ok(())
    }

    fn declines(&self, op: &Gemm4bitTransposed) -> Result<bool> {
        Ok(op.num_rows() > MOST_FUSED_CPU)
    }
}

/// Mirror of the struct of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Gemm4bitTransposedParams {
    input: *const u8,
    packed: *const u8,
    absmax: *const u8,
    absmax_scale: *const u8,
    absmax_offset: *const u8,
    absmax_codebook: *const u8,
    partial: *mut u8,
    output: *mut u8,
    m: i64,
    n: i64,
    k: i64,
    rows_per_split: i64,
    block_shift: i32,
    codebook: i32,
    num_splits: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_transposed.cu; `param_bytes` is compared at load.
unsafe impl Params for Gemm4bitTransposedParams {}

/// Columns of the weight that one thread block computes.
const SLAB: u64 = 256;
/// Rows of the weight that a warp multiplies at once.
const STEP: u64 = 16;
/// Threads of every kernel.
const THREADS: u32 = 256;
/// Thread blocks of the plain kernel that a multiprocessor runs at once.
const SIMT_BLOCKS_PER_SM: u64 = 6;
/// What starting and ending a thread block costs, in rows of the weight.
const ROWS_OF_OVERHEAD: u64 = 96;

/// The kernel that multiplies, the one that adds, and how many rows of the weight each thread block takes.
#[derive(Clone, Copy, Debug)]
struct Plan {
    launches: [Launch; 2],
    rows_per_split: u64,
    num_splits: u64,
}

impl Gemm4bitTransposed {
    /// Rows of input and output; none where the output is empty.
    fn num_rows(&self) -> i64 {
        self.output.len().checked_div(self.K).unwrap_or(0)
    }

    /// Whether the kernels with tensor cores take the problem.
    fn has_mma(&self, limits: &Limits, forced: Option<Family>) -> bool {
        limits.capability >= (8, 0)
            && forced != Some(Family::Simt)
            && self.input.dtype != Dtype::Float32
            && self.K % 32 == 0
            && (self.packed.data as usize).is_multiple_of(16)
    }

    /// For `m` rows of the input.
    fn plan(&self, m: i64, limits: &Limits, forced: Option<Family>) -> Plan {
        let has_mma = self.has_mma(limits, forced);
        let (family, number, blocks_per_sm) = match (has_mma, self.absmax_scale.is_some()) {
            (true, false) => ("gemm_4bit_transposed_mma", if m <= 8 { 8 } else { 16 }, 1),
            (true, true) => ("gemm_4bit_transposed_mma_nested", if m <= 8 { 8 } else { 16 }, 1),
            (false, false) => ("gemm_4bit_transposed_simt", 0, SIMT_BLOCKS_PER_SM),
            (false, true) => ("gemm_4bit_transposed_simt_nested", 0, SIMT_BLOCKS_PER_SM),
        };
        let num_slabs = (self.K as u64).div_ceil(SLAB);
        let rows_of = |splits: u64| (self.N as u64).div_ceil(splits * STEP) * STEP;
        let slots = u64::from(limits.num_sms) * blocks_per_sm;
        let cost =
            |splits: &u64| (num_slabs * splits).div_ceil(slots) * (rows_of(*splits) + ROWS_OF_OVERHEAD);
        let rows_per_split = rows_of((1..=MAX_SPLITS).min_by_key(cost).unwrap_or(1)).max(STEP);
        let num_splits = (self.N as u64).div_ceil(rows_per_split).max(1);
        let symbol = |family, number| Symbol { family, dtype: Some(self.input.dtype), codebook: "", number };
        let multiply = Launch {
            shared_bytes: if has_mma { 4096 * number } else { 0 },
            ..Launch::new(symbol(family, number), num_slabs * num_splits, THREADS)
        };
        let elements = (m * self.K) as u64;
        let grid = elements.div_ceil(u64::from(THREADS)).min(MAX_GRID);
        let add = Launch::new(symbol("gemm_4bit_transposed_sum", 0), grid, THREADS);
        Plan { launches: [multiply, add], rows_per_split, num_splits }
    }
}

impl Run<Gemm4bitTransposed> for Cuda {
    unsafe fn run(&self, op: &Gemm4bitTransposed) -> Result<()> {
        if op.output.is_empty() {
            return Ok(());
        }
        let limits = limits("gemm_4bit_transposed", self.stream.device)?;
        let forced = forced_family("gemm_4bit_transposed")?;
        let tokens = op.num_rows();
        let row = |tensor: &Tensor, row: i64, len: i64| {
            tensor.data.wrapping_add((row * len) as usize * tensor.dtype.size())
        };
        for first in (0..tokens).step_by(MAX_ROWS as usize) {
            let m = MAX_ROWS.min(tokens - first);
            let is_sm90 = sm90::fits(op, limits, forced);
            let plan = if is_sm90 { sm90::plan(op, m, limits) } else { op.plan(m, limits, forced) };
            let params = Gemm4bitTransposedParams {
                input: row(&op.input, first, op.N),
                packed: op.packed.data,
                absmax: op.absmax.data,
                absmax_scale: address(op.absmax_scale),
                absmax_offset: address(op.absmax_offset),
                absmax_codebook: address(op.absmax_codebook),
                partial: op.scratch.data,
                output: row(&op.output, first, op.K),
                m,
                n: op.N,
                k: op.K,
                rows_per_split: plan.rows_per_split as i64,
                block_shift: block_shift(op.block_size),
                codebook: codebook_number(op.codebook),
                num_splits: plan.num_splits as i32,
            };
            let with_maps = is_sm90.then(|| sm90::TransposedSm90Params::new(op, params)).transpose()?;
            for kernel in plan.launches {
                // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device; the
                // scratch holds `MAX_SPLITS` times `MAX_ROWS` rows of K floats.
                unsafe {
                    match &with_maps {
                        Some(params) => launch("gemm_4bit_transposed", &kernel, params, self.stream),
                        None => launch("gemm_4bit_transposed", &kernel, &params, self.stream),
                    }
                }?;
            }
        }
        Ok(())
    }

    const MAY_DECLINE: bool = true;

    fn declines(&self, op: &Gemm4bitTransposed) -> Result<bool> {
        let limits = limits("gemm_4bit_transposed", self.stream.device)?;
        let forced = forced_family("gemm_4bit_transposed")?;
        let most = match (sm90::fits(op, limits, forced), op.has_mma(limits, forced)) {
            (true, _) => sm90::MOST_FUSED,
            (false, true) => MOST_FUSED_MMA,
            (false, false) => MOST_FUSED_SIMT,
        };
        Ok(op.num_rows() > most)
    }
}
