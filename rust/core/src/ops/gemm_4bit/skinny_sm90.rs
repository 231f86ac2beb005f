//! One to eight rows of input on Hopper: the kernels of cuda/gemm_4bit_skinny_sm90.cu.

use super::skinny::{SkinnyParams, TILE_ROWS, params};
use super::{Gemm4bit, Problem};
use crate::cuda::{Launch, Limits, Params, Promotion, Swizzle, Symbol, TensorMap, Tiled};
use crate::error::Result;
use crate::tensor::Dtype;

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct SkinnySm90Params {
    packed_map: TensorMap,
    absmax_map: TensorMap,
    problem: SkinnyParams,
    weights_ready: i32,
    zero: u32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_skinny_sm90.cuh; `param_bytes` is compared at load.
unsafe impl Params for SkinnySm90Params {}

/// Columns of the weight in one stage, of 16 rows.
const PANEL: i64 = 2048;
/// Columns and rows of a stage where two thread blocks divide the columns.
const HALVES_PANEL: i64 = 1024;
const HALVES_ROWS: u64 = 32;
/// Longest rows of the kernels whose names say so.
const SHORT_K: i64 = 8192;
const LONG_K: i64 = 14336;
/// Most rows of the input.
const MAX_ROWS: i64 = 8;
/// TMA moves multiples of this: scales of a row, and of a panel of it.
const COPY_BYTES: i64 = 16;

/// Whether two thread blocks of a cluster divide the columns: a multiprocessor's registers do not hold the input.
fn is_halved(m: i64, k: i64) -> bool {
    m > 4 && k > SHORT_K
}

/// Whether these kernels take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    let Problem { m, n, k, block_size, .. } = *problem;
    let per_copy = if problem.is_nested { COPY_BYTES } else { COPY_BYTES / 4 };
    // Of nested scales TMA brings more than a panel has, where that has fewer than it can bring.
    let panel = if is_halved(m, k) && !problem.is_nested { HALVES_PANEL } else { PANEL };
    limits.capability == (9, 0)
        && problem.dtype != Dtype::Float32
        && (1..=MAX_ROWS).contains(&m)
        && (1..=LONG_K).contains(&k)
        && k % 256 == 0
        && i32::try_from(n).is_ok()
        && block_size >= 64
        && panel % (per_copy * block_size) == 0
        && k % (per_copy * block_size) == 0
        && problem.is_aligned
}

/// One block per multiprocessor, with the tiles spread evenly over them. It takes half of the shared memory: the block
/// of the next kernel can load its weight meanwhile, and a ring of twice the length is 3 to 12 % slower on an H200.
pub(super) fn plan(
    op: &Gemm4bit,
    limits: &Limits,
    weights_are_ready: bool,
) -> Result<(Launch, SkinnySm90Params)> {
    let is_long = op.K > SHORT_K;
    let (cluster, rows) = if is_halved(op.num_rows(), op.K) { (2, HALVES_ROWS) } else { (1, TILE_ROWS) };
    let num_tiles = (op.N as u64).div_ceil(rows);
    let groups = num_tiles.min(u64::from(limits.num_sms / cluster)).max(1);
    let (tokens, threads, shared_bytes) = match (op.num_rows(), is_long) {
        (..=1, _) => (1, 320, 107_664),
        (2, _) => (2, 320, 108_688),
        (3..=4, false) => (4, 320, 112_784),
        (3..=4, true) => (4, 576, 118_928),
        (_, false) => (8, 576, 127_120),
        (_, true) => (8, 576, 148_624),
    };
    // One warp more, and the scales as codes beside the floats.
    let (threads, shared_bytes) =
        if op.absmax_scale.is_some() { (threads + 32, shared_bytes + 6144) } else { (threads, shared_bytes) };
    let family = match (is_long, op.absmax_scale.is_some()) {
        (false, false) => "gemm_4bit_skinny_columns8192",
        (false, true) => "gemm_4bit_skinny_columns8192_nested",
        (true, false) => "gemm_4bit_skinny_columns14336",
        (true, true) => "gemm_4bit_skinny_columns14336_nested",
    };
    let symbol = Symbol { family, dtype: Some(op.input.dtype), codebook: "", number: tokens };
    let plain = Launch::new(symbol, groups * u64::from(cluster), threads);
    let launch = Launch { shared_bytes, cluster, dependent: weights_are_ready, waits: true, ..plain };
    let problem = params(op, (num_tiles / groups) as i32, (num_tiles % groups) as i32);
    Ok((launch, SkinnySm90Params::new(op, problem, weights_are_ready)?))
}

impl SkinnySm90Params {
    /// Of a call that [`fits`]. `weights_are_ready`: nobody writes the weight any more.
    fn new(op: &Gemm4bit, problem: SkinnyParams, weights_are_ready: bool) -> Result<Self> {
        let [n, k, block_size] = [op.N as u64, op.K as u64, op.block_size as u64];
        let (panel, rows) = match is_halved(op.num_rows(), op.K) {
            true => (HALVES_PANEL as u64, HALVES_ROWS as u32),
            false => (PANEL as u64, TILE_ROWS as u32),
        };
        // Pieces of 128 bytes, so that a stage is one box of which the swizzle exchanges parts by the row.
        let packed = Tiled {
            data: op.packed.data,
            dtype: Dtype::Uint8,
            dims: [128, n, k / 256],
            strides: [1, k / 2, 128],
            box_dims: [128, rows, panel as u32 / 256],
            swizzle: Swizzle::Bytes128,
        };
        let (dtype, item_bytes) =
            if op.absmax_scale.is_some() { (Dtype::Uint8, 1) } else { (Dtype::Float32, 4) };
        let panel_scales = (panel / block_size).max(COPY_BYTES as u64 / item_bytes);
        let absmax = Tiled {
            data: op.absmax.data,
            dtype,
            dims: [k / block_size, n],
            strides: [item_bytes, k / block_size * item_bytes],
            box_dims: [panel_scales as u32, rows],
            swizzle: match panel_scales * item_bytes {
                _ if item_bytes == 1 => Swizzle::None,
                128 => Swizzle::Bytes128,
                64 => Swizzle::Bytes64,
                32 => Swizzle::Bytes32,
                _ => Swizzle::None,
            },
        };
        Ok(Self {
            packed_map: packed.encode_promoting("gemm_4bit", Promotion::Bytes128)?,
            absmax_map: absmax.encode_promoting("gemm_4bit", Promotion::Bytes128)?,
            problem,
            weights_ready: weights_are_ready.into(),
            zero: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{product as call, tensor};
    use super::*;
    use crate::cuda::H200;
    use crate::cuda::recorder::{Machine, Recorder};

    #[test]
    fn plans_fill_every_multiprocessor_once() {
        let _recorder = Recorder::install(Machine::h200());
        for (m, n, k, is_nested, expected) in [
            (1, 8192, 8192, false, "columns8192_bfloat16_1<<<132, 320, 107664, dependent>>>"),
            (1, 4096, 14336, true, "columns14336_nested_bfloat16_1<<<132, 352, 113808, dependent>>>"),
            (2, 100, 1024, false, "columns8192_bfloat16_2<<<7, 320, 108688, dependent>>>"),
            (3, 28672, 8192, true, "columns8192_nested_bfloat16_4<<<132, 352, 118928, dependent>>>"),
            (4, 4096, 14336, false, "columns14336_bfloat16_4<<<132, 576, 118928, dependent>>>"),
            (5, 14336, 4096, false, "columns8192_bfloat16_8<<<132, 576, 127120, dependent>>>"),
            (8, 4096, 14336, false, "columns14336_bfloat16_8<<<132, 576, 148624, cluster 2, dependent>>>"),
            (5, 100, 9216, true, "columns14336_nested_bfloat16_8<<<8, 608, 154768, cluster 2, dependent>>>"),
        ] {
            let op = call(m, n, k, 64, is_nested);
            assert!(fits(&op.problem(), &H200), "{expected}");
            let launch = plan(&op, &H200, true).unwrap().0;
            assert_eq!(launch.to_string(), format!("gemm_4bit_skinny_{expected}"));
        }
    }

    #[test]
    fn calls_that_boxes_cannot_cut_are_left_to_other_kernels() {
        for (m, n, k, block_size, is_nested) in [
            (9, 4096, 4096, 64, false),
            (8, 4096, 14336, 512, false),
            (1, 4096, 14592, 64, false),
            (1, 4096, 4160, 64, false),
            (1, 4096, 4096, 32, false),
            (1, 4096, 4096, 1024, false),
            (1, 4096, 4096, 256, true),
            (1, 4096, 4352, 128, false),
            (1, 4096, 4352, 64, true),
        ] {
            let op = call(m, n, k, block_size, is_nested);
            assert!(!fits(&op.problem(), &H200), "{m} x {n} x {k}, {block_size}");
        }
        let op =
            Gemm4bit { absmax: tensor(0x3004, Dtype::Float32, &[1 << 18]), ..call(1, 4096, 4096, 64, false) };
        assert!(!fits(&op.problem(), &H200), "absmax is misaligned");
        assert!(!fits(&call(1, 4096, 4096, 64, false).problem(), &Limits { capability: (10, 0), ..H200 }));
    }

    #[test]
    fn maps_cut_a_stage_into_one_box_each() {
        let _recorder = Recorder::install(Machine::h200());
        let op = call(1, 4096, 8192, 128, false);
        let params = plan(&op, &H200, true).unwrap().1;
        assert_eq!(params.weights_ready, 1);
        // address, uint8, 128-byte swizzle, 128-byte promotion; dimensions, strides, box
        let packed = [0x2000, 0, 3, 2, 128, 4096, 32, 4096, 128, 128, 16, 8];
        assert_eq!(format!("{:?}", params.packed_map), format!("TensorMap({:?})", padded(&packed)));
        // 16 scales of 4 bytes: 64-byte swizzle
        let absmax = [0x3000, 7, 2, 2, 64, 4096, 256, 16, 16];
        assert_eq!(format!("{:?}", params.absmax_map), format!("TensorMap({:?})", padded(&absmax)));
        // Two thread blocks divide rows; nested: 8 codes of a panel, but 16 of a copy
        let params = plan(&call(8, 4096, 14336, 128, true), &H200, true).unwrap().1;
        let packed = [0x2000, 0, 3, 2, 128, 4096, 56, 7168, 128, 128, 32, 4];
        assert_eq!(format!("{:?}", params.packed_map), format!("TensorMap({:?})", padded(&packed)));
        let absmax = [0x3000, 0, 0, 2, 112, 4096, 112, 16, 32];
        assert_eq!(format!("{:?}", params.absmax_map), format!("TensorMap({:?})", padded(&absmax)));
    }

    fn padded(words: &[u64]) -> [u64; 16] {
        let mut map = [0; 16];
        map[..words.len()].copy_from_slice(words);
        map
    }
}
