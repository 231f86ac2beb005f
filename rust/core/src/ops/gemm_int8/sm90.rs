//! Many rows of input on Hopper: the kernels of cuda/gemm_int8_sm90.cu; and what those of few rows share with them.

use super::{MAX_EXACT_K, Problem, Product};
use crate::cuda::{Launch, Limits, Params, Swizzle, TensorMap, Tiled};
use crate::error::Result;
use crate::ops::{address, bias_number, symbol};
use crate::tensor::{Dtype, Tensor};

/// Mirror of the operands that need no tensor map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Operands {
    input_scales: *const u8,
    weight_scales: *const u8,
    bias: *const u8,
    output: *mut u8,
    m: i32,
    n: i32,
    k: i32,
    weight_scale_stride: i32,
    bias_dtype: i32,
    pub weights_ready: i32,
}

impl Operands {
    /// Of a product that [`fits`].
    pub fn new(product: &Product, weights_are_ready: bool) -> Self {
        let Problem { m, n, k, .. } = product.problem();
        Self {
            input_scales: address(product.input_scales),
            weight_scales: address(product.weight_scales),
            bias: address(product.bias),
            output: product.output.data,
            m: m as i32,
            n: n as i32,
            k: k as i32,
            weight_scale_stride: product.weight_scale_stride(),
            bias_dtype: bias_number(product.bias),
            weights_ready: weights_are_ready.into(),
        }
    }
}

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Sm90Params {
    input: TensorMap,
    weight: TensorMap,
    output: TensorMap,
    operands: Operands,
    num_token_tiles: i32,
    num_column_tiles: i32,
    raster_tokens: i32,
    output_by_tma: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_int8_sm90.cuh; `param_bytes` is compared at load.
unsafe impl Params for Sm90Params {}

/// Rows of the weight in a tile.
pub(super) const TILE_COLUMNS: u64 = 128;
/// Tiles of the input that are walked together before the rows of the weight move on.
const RASTER_TOKENS: u64 = 8;
/// Bytes of a row of a box, and columns of codes in a stage.
pub(super) const BOX_BYTES: u64 = 128;
/// Largest size that the kernels count in 32 bits: their loops go on for up to one tile of every thread block.
const MAX_SIZE: i64 = (1 << 31) - (1 << 17);

/// One kernel.
struct Variant {
    family: &'static str,
    /// Rows of the input in a tile.
    tokens: u64,
    shared_bytes: u32,
}

const WIDE: Variant = Variant { family: "gemm_int8_tile256x128", tokens: 256, shared_bytes: 230_544 };
const NARROW: Variant = Variant { family: "gemm_int8_tile128x128", tokens: 128, shared_bytes: 230_064 };

/// Whether kernels with maps of input and weight, 32-bit sizes and 32-bit sums take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    limits.capability == (9, 0)
        && !problem.has_outliers
        && (1..=MAX_EXACT_K).contains(&problem.k)
        && problem.k % 16 == 0
        && problem.m.max(problem.n) <= MAX_SIZE
        && num_tiles(problem, NARROW.tokens) <= MAX_SIZE as u64
        && problem.is_aligned
}

/// Tiles of `tokens` rows of the input.
fn num_tiles(problem: &Problem, tokens: u64) -> u64 {
    let columns = (problem.n as u64).div_ceil(TILE_COLUMNS);
    (problem.m as u64).div_ceil(tokens).saturating_mul(columns)
}

/// Whether the largest tiles occupy half of the multiprocessors, or K is too short to be divided instead.
pub(super) fn fills(problem: &Problem, limits: &Limits) -> bool {
    2 * num_tiles(problem, WIDE.tokens) >= u64::from(limits.num_sms) || problem.k < 2048
}

impl Variant {
    /// The small tiles cost 12 % more a row, which they save where the last round of large tiles is mostly empty.
    fn of(problem: &Problem, limits: &Limits) -> Self {
        let rounds = |variant: &Self| num_tiles(problem, variant.tokens).div_ceil(limits.num_sms.into());
        if 112 * rounds(&NARROW) < 200 * rounds(&WIDE) { NARROW } else { WIDE }
    }
}

/// The codes [rows, k], in boxes of `rows`.
pub(super) fn codes_map(codes: &Tensor, rows: u64) -> Tiled<2> {
    let [num_rows, k] = [codes.shape()[0] as u64, codes.shape()[1] as u64];
    Tiled {
        data: codes.data,
        dtype: Dtype::Int8,
        dims: [k, num_rows],
        strides: [1, k],
        box_dims: [BOX_BYTES as u32, rows as u32],
        swizzle: Swizzle::Bytes128,
    }
}

/// Persistent blocks that walk over the tiles.
pub(super) fn plan(
    op: &str,
    product: &Product,
    limits: &Limits,
    weights_are_ready: bool,
) -> Result<(Launch, Sm90Params)> {
    let problem = product.problem();
    let variant = Variant::of(&problem, limits);
    let grid = num_tiles(&problem, variant.tokens).min(limits.num_sms.into());
    let launch = Launch {
        shared_bytes: variant.shared_bytes,
        dependent: weights_are_ready,
        waits: true,
        ..Launch::new(symbol(variant.family, problem.dtype), grid, 384)
    };
    let item_bytes = problem.dtype.size() as u64;
    let row_bytes = item_bytes * problem.n as u64;
    let box_items = (BOX_BYTES / item_bytes) as u32;
    let output = Tiled {
        data: product.output.data,
        dtype: problem.dtype,
        dims: [problem.n as u64, problem.m as u64],
        strides: [item_bytes, row_bytes],
        box_dims: [box_items, box_items],
        swizzle: Swizzle::Bytes128,
    };
    let output_by_tma = row_bytes.is_multiple_of(16) && (product.output.data as usize).is_multiple_of(16);
    let num_token_tiles = (problem.m as u64).div_ceil(variant.tokens);
    let params = Sm90Params {
        input: codes_map(&product.input, variant.tokens).encode(op)?,
        weight: codes_map(&product.weight, TILE_COLUMNS).encode(op)?,
        output: if output_by_tma { output.encode(op)? } else { TensorMap::default() },
        operands: Operands::new(product, weights_are_ready),
        num_token_tiles: num_token_tiles as i32,
        num_column_tiles: (problem.n as u64).div_ceil(TILE_COLUMNS) as i32,
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

    #[test]
    fn plans_are_those_of_the_launch_table() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, n, k, dtype, expected) in [
            (1024, 4096, 4096, Dtype::Bfloat16, "256x128_bfloat16<<<128, 384, 230544>>>"),
            (16384, 8192, 8192, Dtype::Float16, "256x128_float16<<<132, 384, 230544>>>"),
            (4096, 5120, 1280, Dtype::Int32, "256x128_int32<<<132, 384, 230544>>>"),
            (1024, 5120, 1280, Dtype::Bfloat16, "128x128_bfloat16<<<132, 384, 230064>>>"),
            (1024, 1280, 5120, Dtype::Float32, "128x128_float32<<<80, 384, 230064>>>"),
            (4096, 1280, 5120, Dtype::Bfloat16, "128x128_bfloat16<<<132, 384, 230064>>>"),
        ] {
            let product = product(m, n, k, dtype);
            assert!(fits(&product.problem(), &H200), "{expected}");
            let (launch, params) = plan("gemm_int8", &product, &H200, false).unwrap();
            assert_eq!(launch.to_string(), format!("gemm_int8_tile{expected}"));
            assert_eq!((params.output_by_tma, params.operands.weights_ready), (1, 0));
            assert_eq!(params.raster_tokens, params.num_token_tiles.min(8));
        }
    }

    #[test]
    fn maps_cut_codes_and_outputs_into_rows_of_128_bytes() {
        let _recorder = Recorder::install(Machine::h200());
        let params = plan("gemm_int8", &product(1000, 4096, 144, Dtype::Float32), &H200, true).unwrap().1;
        assert_eq!(params.operands.weights_ready, 1);
        // address, type, 128-byte swizzle, 256-byte promotion; dimensions, stride, box
        let words = |map: TensorMap| format!("{map:?}");
        let starts = |map: TensorMap, numbers: &str| words(map).starts_with(&format!("TensorMap([{numbers}"));
        assert!(starts(params.input, "4096, 0, 3, 3, 144, 1000, 144, 128, 256,"), "{}", words(params.input));
        assert!(
            starts(params.weight, "8192, 0, 3, 3, 144, 4096, 144, 128, 128,"),
            "{}",
            words(params.weight)
        );
        assert!(
            starts(params.output, "24576, 7, 3, 3, 4096, 1000, 16384, 32, 32,"),
            "{}",
            words(params.output)
        );
    }

    #[test]
    fn outputs_that_the_copy_engine_cannot_write_have_no_map() {
        let _recorder = Recorder::install(Machine::h200());
        let aligned = product(300, 128, 4096, Dtype::Bfloat16);
        let misaligned = Product { output: tensor(0x6008, Dtype::Bfloat16, &[300, 128]), ..aligned };
        for product in [product(300, 100, 4096, Dtype::Bfloat16), misaligned] {
            let (_, params) = plan("gemm_int8", &product, &H200, true).unwrap();
            assert_eq!((params.output_by_tma, params.output), (0, TensorMap::default()));
        }
    }

    #[test]
    fn what_maps_or_32_bits_cannot_hold_is_left_to_other_kernels() {
        let problem = product(1024, 4096, 4096, Dtype::Bfloat16).problem();
        let fits = |problem: Problem| super::fits(&problem, &H200);
        assert!(
            fits(problem) && fits(Problem { k: 16, ..problem }) && fits(Problem { k: 131_056, ..problem })
        );
        assert!(fits(Problem { m: MAX_SIZE, n: 1, ..problem }));
        for refused in [
            Problem { k: 0, ..problem },
            Problem { k: 8, ..problem },
            Problem { k: 131_072, ..problem },
            Problem { m: MAX_SIZE + 1, n: 1, ..problem },
            Problem { n: 1 << 31, m: 1, ..problem },
            Problem { m: 1 << 30, n: 1 << 30, ..problem },
            Problem { is_aligned: false, ..problem },
            Problem { has_outliers: true, ..problem },
        ] {
            assert!(!fits(refused), "{refused:?}");
        }
        assert!(!super::fits(&problem, &Limits { capability: (10, 0), ..H200 }));
    }
}
