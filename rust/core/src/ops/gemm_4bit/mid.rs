//! Dozens of rows of input on Hopper: the kernels of cuda/gemm_4bit_mid_sm90.cu.

use super::wgmma::{self, Gemm4bitOperands};
use super::{Gemm4bit, Problem};
use crate::cuda::{Launch, Limits, MAX_GRID_Y, Params, Swizzle, Symbol, TensorMap, Tiled};
use crate::error::Result;
use crate::tensor::Dtype;

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MidParams {
    input: TensorMap,
    packed: TensorMap,
    absmax: TensorMap,
    operands: Gemm4bitOperands,
    rows_per_tile: i32,
    scales_by_copy: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_mid.cuh; `param_bytes` is compared at load.
unsafe impl Params for MidParams {}

/// One kernel: its tile, and what it needs of a multiprocessor.
struct Variant {
    /// Rows of the input in a tile,
    tokens: u64,
    /// and most rows of the weight.
    rows: u64,
    family: &'static str,
    threads: u32,
    shared_bytes: u32,
    /// Columns in a stage of the ring.
    stage_columns: u32,
}

macro_rules! variants {
    ($prefix:literal: $($name:literal $tokens:literal $rows:literal $threads:literal $shared:literal $stage:literal;)+) => {
        [$(Variant {
            tokens: $tokens,
            rows: $rows,
            family: concat!($prefix, $name),
            threads: $threads,
            shared_bytes: $shared,
            stage_columns: $stage,
        }),+]
    };
}

/// In the order of their tokens; for blocks of 64 and more.
const VARIANTS: [Variant; 8] = variants! { "gemm_4bit_mid_":
    "16x64" 16 64 640 173568 256;
    "16x128" 16 128 640 194048 256;
    "32x64" 32 64 640 220672 128;
    "32x128" 32 128 640 173568 256;
    "64x64" 64 64 512 193024 128;
    "64x128" 64 128 384 220672 128;
    "128x64" 128 64 384 216576 128;
    "128x128" 128 128 384 193024 128;
};
/// The same for blocks of 32.
const VARIANTS_BLOCK32: [Variant; 8] = variants! { "gemm_4bit_mid_":
    "16x64_block32" 16 64 640 181760 256;
    "16x128_block32" 16 128 640 206336 256;
    "32x64_block32" 32 64 640 226816 128;
    "32x128_block32" 32 128 640 214528 256;
    "64x64_block32" 64 64 512 196096 128;
    "64x128_block32" 64 128 384 226816 128;
    "128x64_block32" 128 64 384 218624 128;
    "128x128_block32" 128 128 384 196096 128;
};

/// Whether these kernels take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    wgmma::fits(problem, limits) && problem.m <= 128 * i64::from(MAX_GRID_Y)
}

/// Small tiles where few would idle a part of the device, and K divided within clusters of two where half of it would;
/// the choices are measured on an H200. Where tiles are many, as many blocks as share them evenly take several each.
pub(super) fn plan(op: &Gemm4bit, limits: &Limits, weights_are_ready: bool) -> Result<(Launch, MidParams)> {
    let (m, n, num_sms) = (op.num_rows() as u64, op.N as u64, u64::from(limits.num_sms));
    let tokens = [16, 32, 64].into_iter().find(|tokens| m <= *tokens).unwrap_or(128);
    let num_small = n.div_ceil(64);
    let rows = match num_small {
        _ if num_small <= num_sms / if tokens == 128 { 2 } else { 1 } => 64,
        _ if tokens == 64 && num_small > 2 * num_sms => 64,
        _ => 128,
    };
    let is_split = num_small <= num_sms / 2 || tokens == 128 && num_small <= num_sms;
    let cluster = if is_split { 2 } else { 1 };
    let variants = if op.block_size == 32 { &VARIANTS_BLOCK32 } else { &VARIANTS };
    let variant = variants.iter().find(|variant| (variant.tokens, variant.rows) == (tokens, rows));
    let variant = variant.unwrap_or_else(|| unreachable!("a variant of {tokens} x {rows}"));
    // Lower tiles on more multiprocessors pay where the weight's bytes count, not where products do.
    let rows_per_tile = match rows {
        128 if tokens < 64 => n.div_ceil(16 * n.div_ceil(128 * num_sms) * num_sms) * 16,
        _ => rows,
    };
    let num_tiles = n.div_ceil(rows_per_tile);
    let grid = if is_split { 2 * num_tiles } else { num_tiles.div_ceil(num_tiles.div_ceil(num_sms)) };
    let symbol = Symbol { family: variant.family, dtype: Some(op.input.dtype), codebook: "", number: 0 };
    let launch = Launch {
        grid_y: m.div_ceil(variant.tokens) as u32,
        shared_bytes: variant.shared_bytes,
        cluster,
        dependent: weights_are_ready,
        waits: true,
        ..Launch::new(symbol, grid, variant.threads)
    };
    let input = wgmma::input_map(op, variant.tokens as u32, variant.stage_columns / 64);
    let packed = wgmma::packed_map(op, rows_per_tile as u32, variant.stage_columns / 2);
    let absmax = absmax_map(op, rows_per_tile as u32, variant.stage_columns);
    let params = MidParams {
        input: input.encode("gemm_4bit")?,
        packed: packed.encode("gemm_4bit")?,
        absmax: absmax.map_or(Ok(TensorMap::default()), |map| map.encode("gemm_4bit"))?,
        operands: Gemm4bitOperands::new(op, weights_are_ready),
        rows_per_tile: rows_per_tile as i32,
        scales_by_copy: absmax.is_some().into(),
    };
    Ok((launch, params))
}

/// The block scales [n, k / block_size] in boxes of `rows` x `columns` of the weight, where TMA can copy them as the kernels
/// want them.
fn absmax_map(op: &Gemm4bit, rows: u32, columns: u32) -> Option<Tiled<2>> {
    let (row, box_row) = (op.K / op.block_size, columns / op.block_size.min(64) as u32);
    let is_copied = op.absmax_scale.is_none() && op.block_size <= 64 && row % 4 == 0 && box_row % 4 == 0;
    is_copied.then(|| Tiled {
        data: op.absmax.data,
        dtype: Dtype::Float32,
        dims: [row as u64, op.N as u64],
        strides: [4, 4 * row as u64],
        box_dims: [box_row, rows],
        swizzle: Swizzle::None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::product;
    use super::*;
    use crate::cuda::H200;
    use crate::cuda::recorder::{Machine, Recorder};

    #[test]
    fn plans_are_those_of_the_launch_table() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, n, k, block_size, expected, rows_per_tile) in [
            (16, 4096, 4096, 64, "16x64_bfloat16<<<128, 640, 173568, cluster 2>>>", 64),
            (16, 14336, 4096, 64, "16x128_bfloat16<<<128, 640, 194048>>>", 112),
            (17, 8192, 8192, 64, "32x64_bfloat16<<<128, 640, 220672>>>", 64),
            (64, 14336, 4096, 64, "64x128_bfloat16<<<112, 384, 220672>>>", 128),
            (64, 28672, 8192, 64, "64x64_bfloat16<<<112, 512, 193024>>>", 64),
            (128, 8192, 8192, 64, "128x128_bfloat16<<<128, 384, 193024, cluster 2>>>", 128),
            (128, 28672, 8192, 64, "128x128_bfloat16<<<112, 384, 193024>>>", 128),
            (128, 28672, 8192, 32, "128x128_block32_bfloat16<<<112, 384, 196096>>>", 128),
            (300, 100, 64, 4096, "128x64_bfloat16<<<4 x 3, 384, 216576, cluster 2>>>", 64),
        ] {
            let op = product(m, n, k, block_size, false);
            assert!(fits(&op.problem(), &H200), "{expected}");
            let (launch, params) = plan(&op, &H200, false).unwrap();
            assert_eq!(launch.to_string(), format!("gemm_4bit_mid_{expected}"));
            assert_eq!(params.rows_per_tile, rows_per_tile);
        }
    }

    #[test]
    fn scales_are_copied_where_boxes_hold_multiples_of_16_bytes() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, k, block_size, expected) in [
            (16, 4096, 64, true),
            (16, 4160, 64, false),
            (16, 4096, 128, false),
            (16, 4096, 32, true),
            (32, 4096, 64, false), // a stage of 32 x 64 has two scales a row
            (64, 4096, 64, false),
            (64, 4096, 32, true),
        ] {
            let (_, params) = plan(&product(m, 4096, k, block_size, false), &H200, false).unwrap();
            assert_eq!(params.scales_by_copy == 1, expected, "{m} {k} {block_size}");
            assert_eq!(params.absmax != TensorMap::default(), expected);
        }
    }

    #[test]
    fn a_ready_weight_starts_before_earlier_work_has_ended() {
        let _recorder = Recorder::install(Machine::h200());
        let op = product(40, 4096, 4096, 64, true);
        let (launch, params) = plan(&op, &H200, true).unwrap();
        assert!(launch.dependent && params.operands.weights_ready == 1);
        let (launch, params) = plan(&op, &H200, false).unwrap();
        assert!(!launch.dependent && params.operands.weights_ready == 0);
    }
}
