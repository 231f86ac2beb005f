//! Few rows of input on Hopper: the kernels of cuda/gemm_int8_skinny_sm90.cu.

use super::sm90::{self, Operands, codes_map};
use super::{Problem, Product};
use crate::cuda::{Launch, Limits, Params, TensorMap};
use crate::error::Result;
use crate::ops::symbol;

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct SkinnyParams {
    input: TensorMap,
    weight: TensorMap,
    operands: Operands,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_int8_skinny_sm90.cuh; `param_bytes` is compared at load.
unsafe impl Params for SkinnyParams {}

/// One kernel.
#[derive(Clone, Copy)]
struct Variant {
    family: &'static str,
    /// Rows of the input and of the weight in a tile.
    tokens: u64,
    columns: u64,
    /// Of the ring.
    stages: u64,
    /// Thread blocks of a cluster that divide K.
    parts: u64,
}

const fn variant(family: &'static str, tokens: u64, columns: u64, stages: u64, parts: u64) -> Variant {
    Variant { family, tokens, columns, stages, parts }
}

const FEW_OF_LONG: Variant = variant("gemm_int8_skinny_16x128k1", 16, 128, 5, 1);
const FEW: [Variant; 3] = [
    variant("gemm_int8_skinny_16x64k1", 16, 64, 10, 1),
    variant("gemm_int8_skinny_16x64k2", 16, 64, 10, 2),
    variant("gemm_int8_skinny_16x64k4", 16, 64, 10, 4),
];
const DOZENS: [Variant; 3] = [
    variant("gemm_int8_skinny_64x64k1", 64, 64, 6, 1),
    variant("gemm_int8_skinny_64x64k2", 64, 64, 6, 2),
    variant("gemm_int8_skinny_64x64k4", 64, 64, 6, 4),
];
const SQUARE: Variant = variant("gemm_int8_skinny_128x128k1", 128, 128, 5, 1);
const SQUARE_HALVES: Variant = variant("gemm_int8_skinny_128x128k2", 128, 128, 5, 2);

/// Rows of the weight from which on an H200 streams them faster in tiles of 128.
const LONG_N: i64 = 16384;
/// Tiles of 64 rows from which on K is not divided, and is divided by two in place of four. Measured on an H200.
const WHOLE_TILES: u64 = 200;
const HALVED_TILES: u64 = 40;
/// Largest grid in y.
const MAX_GRID_Y: u64 = 65_535;

/// Whether these kernels take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    sm90::fits(problem, limits) && (problem.m as u64).div_ceil(SQUARE.tokens) <= MAX_GRID_Y
}

impl Variant {
    fn of(problem: &Problem, limits: &Limits) -> Self {
        let tiles = |variant: &Self| {
            (problem.n as u64).div_ceil(variant.columns) * (problem.m as u64).div_ceil(variant.tokens)
        };
        let divided = |variants: &[Self; 3]| match (problem.n as u64).div_ceil(64) {
            WHOLE_TILES.. => variants[0],
            HALVED_TILES.. => variants[1],
            _ => variants[2],
        };
        match problem.m {
            ..=16 if problem.n >= LONG_N => FEW_OF_LONG,
            ..=16 => divided(&FEW),
            17..=64 => divided(&DOZENS),
            _ if 2 * tiles(&SQUARE) <= limits.num_sms.into() => SQUARE_HALVES,
            _ => SQUARE,
        }
    }

    /// Of a thread block: the ring, the sums that others send, the rows' factors, barriers.
    const fn shared_bytes(&self) -> u32 {
        let ring = self.stages * (self.tokens + self.columns) * sm90::BOX_BYTES;
        let sums = (self.parts - 1) * self.tokens * self.columns * 4 / self.parts;
        (ring + sums + 4 * self.tokens + 16 * self.stages + 8) as u32
    }
}

/// A cluster for each tile.
pub(super) fn plan(
    op: &str,
    product: &Product,
    limits: &Limits,
    weights_are_ready: bool,
) -> Result<(Launch, SkinnyParams)> {
    let problem = product.problem();
    let variant = Variant::of(&problem, limits);
    let grid = (problem.n as u64).div_ceil(variant.columns) * variant.parts;
    let launch = Launch {
        grid_y: (problem.m as u64).div_ceil(variant.tokens) as u32,
        shared_bytes: variant.shared_bytes(),
        cluster: variant.parts as u32,
        dependent: weights_are_ready,
        waits: true,
        ..Launch::new(symbol(variant.family, problem.dtype), grid, 2 * variant.columns as u32 + 32)
    };
    let params = SkinnyParams {
        input: codes_map(&product.input, variant.tokens).encode(op)?,
        weight: codes_map(&product.weight, variant.columns).encode(op)?,
        operands: Operands::new(product, weights_are_ready),
    };
    Ok((launch, params))
}

#[cfg(test)]
mod tests {
    use super::super::tests::product;
    use super::*;
    use crate::cuda::H200;
    use crate::cuda::recorder::{Machine, Recorder};
    use crate::tensor::Dtype;

    #[test]
    fn plans_are_those_of_the_launch_table() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, n, k, expected) in [
            (1, 28672, 8192, "16x128k1_bfloat16<<<224, 288, 92312, dependent>>>"),
            (16, 14336, 4096, "16x64k1_bfloat16<<<224, 160, 102632, dependent>>>"),
            (16, 8192, 8192, "16x64k2_bfloat16<<<256, 160, 104680, cluster 2, dependent>>>"),
            (3, 1280, 5120, "16x64k4_bfloat16<<<80, 160, 105704, cluster 4, dependent>>>"),
            (64, 14336, 4096, "64x64k1_bfloat16<<<224, 160, 98664, dependent>>>"),
            (17, 4096, 4096, "64x64k2_bfloat16<<<128, 160, 106856, cluster 2, dependent>>>"),
            (33, 100, 16, "64x64k4_bfloat16<<<8, 160, 110952, cluster 4, dependent>>>"),
            (128, 8192, 8192, "128x128k2_bfloat16<<<128, 288, 197208, cluster 2, dependent>>>"),
            (256, 8192, 8192, "128x128k1_bfloat16<<<64 x 2, 288, 164440, dependent>>>"),
        ] {
            let product = product(m, n, k, Dtype::Bfloat16);
            assert!(fits(&product.problem(), &H200), "{expected}");
            let (launch, params) = plan("gemm_int8", &product, &H200, true).unwrap();
            assert_eq!(launch.to_string(), format!("gemm_int8_skinny_{expected}"));
            assert_eq!(params.operands.weights_ready, 1);
        }
    }

    #[test]
    fn more_tiles_than_a_grid_has_are_left_to_other_kernels() {
        let problem = product(1, 128, 4096, Dtype::Bfloat16).problem();
        assert!(fits(&Problem { m: 65_535 * 128, ..problem }, &H200));
        assert!(!fits(&Problem { m: 65_535 * 128 + 1, ..problem }, &H200));
    }
}
