//! Many rows of input on Hopper: the kernels of cuda/gemm_4bit_large_sm90.cu.

use super::wgmma::{self, Gemm4bitOperands};
use super::{Gemm4bit, Problem};
use crate::cuda::{Launch, Limits, Params, Swizzle, Symbol, TensorMap, Tiled};
use crate::error::Result;

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct LargeParams {
    input: TensorMap,
    packed: TensorMap,
    output: TensorMap,
    operands: Gemm4bitOperands,
    num_row_tiles: i32,
    num_token_tiles: i32,
    raster_tokens: i32,
    output_by_tma: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_large.cuh; `param_bytes` is compared at load.
unsafe impl Params for LargeParams {}

/// Shared memory of every kernel.
const SHARED_BYTES: u32 = 230_656;
/// Rows of the weight in a tile.
const TILE_ROWS: u64 = 128;
/// Tiles of the input that are walked together before the rows of the weight move on.
const RASTER_TOKENS: u64 = 8;

/// One kernel.
struct Variant {
    family: &'static str,
    /// Rows of the input in a tile.
    tokens: u64,
    /// Parts of K whose sums are added.
    parts: u64,
    threads: u32,
}

const WIDE: Variant = Variant { family: "gemm_4bit_large_256k1", tokens: 256, parts: 1, threads: 384 };
const WIDE_SPLIT: Variant = Variant { family: "gemm_4bit_large_256k2", parts: 2, ..WIDE };
const WIDE_BLOCK32: Variant = Variant { family: "gemm_4bit_large_256k1_unit32", ..WIDE };
const NARROW: Variant = Variant { family: "gemm_4bit_large_128k1", tokens: 128, parts: 1, threads: 512 };
const NARROW_SPLIT: Variant = Variant { family: "gemm_4bit_large_128k2", parts: 2, ..NARROW };
const NARROW_BLOCK32: Variant = Variant { family: "gemm_4bit_large_128k2_unit32", ..NARROW_SPLIT };

/// Whether these kernels take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    let tiles = (problem.n as u64).div_ceil(TILE_ROWS).saturating_mul((problem.m as u64).div_ceil(128));
    let scales = problem.n.saturating_mul(problem.k) / 32;
    wgmma::fits(problem, limits) && i32::try_from(tiles).is_ok() && i32::try_from(scales).is_ok()
}

impl Variant {
    /// K is divided where the device holds all parts at once; at 8192 x 8192 and 256 rows an H200 takes 63 us so, else 108.
    fn of(op: &Gemm4bit, limits: &Limits) -> Self {
        let num_tiles = |tokens| (op.N as u64).div_ceil(TILE_ROWS) * (op.num_rows() as u64).div_ceil(tokens);
        let holds = |split: &Self| num_tiles(split.tokens) * split.parts <= u64::from(limits.num_sms);
        match op.block_size {
            32 if holds(&NARROW_BLOCK32) => NARROW_BLOCK32,
            32 => WIDE_BLOCK32,
            _ if holds(&NARROW_SPLIT) => NARROW_SPLIT,
            _ if op.num_rows() <= 128 => NARROW,
            _ if holds(&WIDE_SPLIT) => WIDE_SPLIT,
            _ => WIDE,
        }
    }
}

/// Persistent blocks that walk over the tiles; few tiles have their columns divided instead.
pub(super) fn plan(op: &Gemm4bit, limits: &Limits, weights_are_ready: bool) -> Result<(Launch, LargeParams)> {
    let variant = Variant::of(op, limits);
    let num_row_tiles = (op.N as u64).div_ceil(TILE_ROWS);
    let num_token_tiles = (op.num_rows() as u64).div_ceil(variant.tokens);
    let num_tiles = num_row_tiles * num_token_tiles;
    let grid =
        if variant.parts == 1 { num_tiles.min(limits.num_sms.into()) } else { num_tiles * variant.parts };
    let symbol = Symbol { family: variant.family, dtype: Some(op.input.dtype), codebook: "", number: 0 };
    let launch = Launch {
        shared_bytes: SHARED_BYTES,
        cluster: variant.parts as u32,
        dependent: weights_are_ready,
        waits: true,
        ..Launch::new(symbol, grid, variant.threads)
    };
    let input = wgmma::input_map(op, variant.tokens as u32, 1);
    let packed = wgmma::packed_map(op, 32, 64);
    let output = Tiled {
        data: op.output.data,
        dtype: op.output.dtype,
        dims: [op.N as u64, op.num_rows() as u64],
        strides: [2, 2 * op.N as u64],
        box_dims: [64, (variant.tokens / variant.parts) as u32],
        swizzle: Swizzle::Bytes128,
    };
    let output_by_tma = op.N % 8 == 0 && (op.output.data as usize).is_multiple_of(16);
    let params = LargeParams {
        input: input.encode("gemm_4bit")?,
        packed: packed.encode("gemm_4bit")?,
        output: if output_by_tma { output.encode("gemm_4bit")? } else { TensorMap::default() },
        operands: Gemm4bitOperands::new(op, weights_are_ready),
        num_row_tiles: num_row_tiles as i32,
        num_token_tiles: num_token_tiles as i32,
        raster_tokens: num_token_tiles.min(RASTER_TOKENS) as i32,
        output_by_tma: output_by_tma.into(),
    };
    Ok((launch, params))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{product, tensor};
    use super::*;
    use crate::cuda::H200;
    use crate::cuda::recorder::{Machine, Recorder};
    use crate::tensor::Dtype;

    #[test]
    fn plans_are_those_of_the_launch_table() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, n, k, block_size, expected) in [
            (256, 4096, 4096, 64, "128k2_bfloat16<<<128, 512, 230656, cluster 2>>>"),
            (256, 8192, 8192, 64, "256k2_bfloat16<<<128, 384, 230656, cluster 2>>>"),
            (192, 14336, 4096, 64, "256k1_bfloat16<<<112, 384, 230656>>>"),
            (100, 14336, 4096, 64, "128k1_bfloat16<<<112, 512, 230656>>>"),
            (4096, 28672, 8192, 64, "256k1_bfloat16<<<132, 384, 230656>>>"),
            (256, 4096, 4096, 32, "128k2_unit32_bfloat16<<<128, 512, 230656, cluster 2>>>"),
            (4096, 28672, 8192, 32, "256k1_unit32_bfloat16<<<132, 384, 230656>>>"),
        ] {
            let op = product(m, n, k, block_size, false);
            assert!(fits(&op.problem(), &H200), "{expected}");
            let (launch, params) = plan(&op, &H200, false).unwrap();
            assert_eq!(launch.to_string(), format!("gemm_4bit_large_{expected}"));
            assert_eq!((params.output_by_tma, params.operands.weights_ready), (1, 0));
        }
    }

    #[test]
    fn outputs_that_the_copy_engine_cannot_write_have_no_map() {
        let _recorder = Recorder::install(Machine::h200());
        let op = product(300, 100, 4096, 64, false);
        let misaligned = Gemm4bit {
            output: tensor(0x6008, Dtype::Bfloat16, &[300, 128]),
            ..product(300, 128, 64, 64, false)
        };
        for op in [op, misaligned] {
            let (_, params) = plan(&op, &H200, true).unwrap();
            assert_eq!((params.output_by_tma, params.output), (0, TensorMap::default()));
            assert_eq!(params.operands.weights_ready, 1);
        }
    }
}
