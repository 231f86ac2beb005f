//! Few rows of input on Hopper: the kernels of cuda/gemm_4bit_transposed_sm90.cu.

use super::{Gemm4bitTransposed, Gemm4bitTransposedParams, MAX_SPLITS, Plan, SLAB, THREADS};
use crate::cuda::{Family, Launch, Limits, Params, Promotion, Swizzle, Symbol, TensorMap, Tiled, images};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct TransposedSm90Params {
    packed_map: TensorMap,
    absmax_map: TensorMap,
    input_map: TensorMap,
    problem: Gemm4bitTransposedParams,
    zero: u32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_transposed_sm90.cuh; `param_bytes` is compared at load.
unsafe impl Params for TransposedSm90Params {}

/// Rows of the input up to which these kernels win over decoding and the framework's GEMM.
pub(super) const MOST_FUSED: i64 = 32;
/// Rows of the weight in one stage.
const STAGE_ROWS: u64 = 128;
/// TMA moves multiples of this.
const COPY_BYTES: i64 = 16;
/// Largest size that the kernels count in 32 bits: their loops go on for up to one stage.
const MAX_SIZE: i64 = (1 << 31) - (1 << 17);

/// Rows of the input that a thread block multiplies at once.
fn tokens(m: i64) -> u32 {
    if m <= 8 { 8 } else { 16 }
}

/// Whether these kernels take the problem.
pub(super) fn fits(op: &Gemm4bitTransposed, limits: &Limits, forced: Option<Family>) -> bool {
    let is_aligned = |tensor: &Tensor, bytes: usize| (tensor.data as usize).is_multiple_of(bytes);
    let per_copy = if op.absmax_scale.is_some() { COPY_BYTES } else { COPY_BYTES / 4 };
    limits.capability == (9, 0)
        && images().iter().any(|held| held.name == "gemm_4bit_transposed_sm90")
        && !matches!(forced, Some(Family::Simt | Family::Skinny))
        && op.input.dtype != Dtype::Float32
        && (1..=MAX_SIZE).contains(&op.N)
        && (1..=MAX_SIZE).contains(&op.K)
        && op.N % 8 == 0
        && op.block_size >= 64
        && op.K % (per_copy * op.block_size) == 0
        && [&op.input, &op.packed, &op.absmax].into_iter().all(|tensor| is_aligned(tensor, 16))
        && is_aligned(&op.output, 8)
}

/// For `m` rows of the input: the parts of the weight's rows that keep the multiprocessors busy the longest.
pub(super) fn plan(op: &Gemm4bitTransposed, m: i64, limits: &Limits) -> Plan {
    let tokens = tokens(m);
    let ctas_per_split = (op.K as u64).div_ceil(SLAB) * (m as u64).div_ceil(tokens.into());
    let rows_of = |splits: u64| (op.N as u64).div_ceil(splits * STAGE_ROWS) * STAGE_ROWS;
    let cost = |splits: &u64| {
        (ctas_per_split * splits).div_ceil(limits.num_sms.into()) * (rows_of(*splits) + STAGE_ROWS)
    };
    let rows_per_split = rows_of((1..=MAX_SPLITS).min_by_key(cost).unwrap_or(1));
    let num_splits = (op.N as u64).div_ceil(rows_per_split);
    let symbol = |family, number| Symbol { family, dtype: Some(op.input.dtype), codebook: "", number };
    let family = match op.absmax_scale {
        None => "gemm_4bit_transposed_columns",
        Some(_) => "gemm_4bit_transposed_columns_nested",
    };
    let (threads, shared_bytes) = if tokens == 8 { (544, 191_584) } else { (256, 203_872) };
    let multiply = Launch::new(symbol(family, tokens), ctas_per_split * num_splits, threads);
    let grid = ((m * op.K) as u64).div_ceil(u64::from(4 * THREADS));
    let add = Launch::new(symbol("gemm_4bit_transposed_columns_sum", 0), grid, THREADS);
    let launches = [Launch { shared_bytes, ..multiply }, Launch { dependent: true, ..add }];
    Plan { launches, rows_per_split, num_splits }
}

impl TransposedSm90Params {
    /// Of a call that [`fits`], with the rows of the input that `problem` names.
    pub(super) fn new(op: &Gemm4bitTransposed, problem: Gemm4bitTransposedParams) -> Result<Self> {
        let [n, k, block_size] = [op.N as u64, op.K as u64, op.block_size as u64];
        let packed = Tiled {
            data: op.packed.data,
            dtype: Dtype::Uint8,
            dims: [k / 2, n],
            strides: [1, k / 2],
            box_dims: [SLAB as u32 / 2, STAGE_ROWS as u32],
            swizzle: Swizzle::Bytes128,
        };
        let (dtype, item_bytes) =
            if op.absmax_scale.is_some() { (Dtype::Uint8, 1) } else { (Dtype::Float32, 4) };
        let absmax = Tiled {
            data: op.absmax.data,
            dtype,
            dims: [k / block_size, n],
            strides: [item_bytes, k / block_size * item_bytes],
            box_dims: [COPY_BYTES as u32 / item_bytes as u32, STAGE_ROWS as u32],
            swizzle: Swizzle::None,
        };
        let input = Tiled {
            data: problem.input,
            dtype: op.input.dtype,
            dims: [n, problem.m as u64],
            strides: [2, 2 * n],
            box_dims: [64, tokens(problem.m)],
            swizzle: Swizzle::Bytes128,
        };
        Ok(Self {
            packed_map: packed.encode_promoting("gemm_4bit_transposed", Promotion::Bytes128)?,
            absmax_map: absmax.encode_promoting("gemm_4bit_transposed", Promotion::Bytes128)?,
            input_map: input.encode_promoting("gemm_4bit_transposed", Promotion::Bytes128)?,
            problem,
            zero: 0,
        })
    }
}
