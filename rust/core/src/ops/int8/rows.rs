//! Launches of the kernels in cuda/int8_rowwise.cu.

use super::{
    DequantizeColumnwise, DequantizeGlobal, DequantizeRowwise, QuantizeRowwise, QuantizeRowwiseOutliers,
};
use crate::backend::{Cuda, Run};
use crate::cuda::{Launch, Limits, Params, Symbol, launch, limits};
use crate::error::Result;
use crate::ops::{MAX_GRID, symbol};
use crate::tensor::{Dtype, Tensor};

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct QuantizeRowwiseParams {
    input: *const u8,
    codes: *mut u8,
    scales: *mut u8,
    outlier_mask: *mut u8, // null without outliers
    rows: i64,
    columns: i64,
    threshold: f32,
}
// SAFETY: repr(C), field by field the struct of cuda/int8_rowwise.cu; `param_bytes` is compared at load.
unsafe impl Params for QuantizeRowwiseParams {}

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct OutlierColumnsParams {
    outlier_mask: *mut u8,
    codes: *mut u8,
    rows: i64,
    columns: i64,
}
// SAFETY: as above.
unsafe impl Params for OutlierColumnsParams {}

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DequantizeInt8Params {
    codes: *const u8,
    scales: *const u8,
    output: *mut u8,
    rows: i64,
    columns: i64,
}
// SAFETY: as above.
unsafe impl Params for DequantizeInt8Params {}

/// A launch of a kernel that waits for earlier ones; blocks beyond the largest grid are walked to.
fn walk(symbol: Symbol, grid: u64, threads: u32) -> Launch {
    Launch { waits: true, ..Launch::new(symbol, grid.min(MAX_GRID), threads) }
}

/// The kernel whose registers hold a row: by its number of vectors, threads of a thread block and its rows.
const ROW_KERNELS: [(u64, u32, u64); 7] = [
    (64, 256, 8),
    (128, 256, 8),
    (256, 256, 4),
    (512, 256, 2),
    (1024, 256, 1),
    (2048, 512, 1),
    (4096, 1024, 1),
];

/// `family` and `long_family` name the kernels for rows that fit the registers of a thread block and for those that do not.
fn plan_rows(
    family: &'static str,
    long_family: &'static str,
    dtype: Dtype,
    rows: i64,
    columns: i64,
) -> Launch {
    let vectors = (columns as u64).div_ceil(16 / dtype.size() as u64);
    match ROW_KERNELS.iter().find(|kernel| vectors <= kernel.0) {
        Some(&(most, threads, per_block)) => {
            let symbol = Symbol { number: most as u32, ..symbol(family, dtype) };
            walk(symbol, (rows as u64).div_ceil(per_block), threads)
        }
        None => walk(symbol(long_family, dtype), rows as u64, 512),
    }
}

/// Zeroes before the mask is marked, and codes of marked columns after it was; a thread block has at least 16 rows.
fn plan_outliers(rows: i64, columns: i64, limits: &Limits) -> [Launch; 2] {
    let symbol = |family| Symbol { family, dtype: None, codebook: "", number: 0 };
    let grid = (rows as u64).div_ceil(16).min(4 * u64::from(limits.num_sms));
    [
        walk(symbol("clear_outlier_mask"), (columns as u64).div_ceil(4096), 256),
        walk(symbol("zero_outlier_columns"), grid, 256),
    ]
}

/// A warp decodes 64 vectors of the output, eight warps are a thread block.
fn plan_decoder(family: &'static str, dtype: Dtype, rows: i64, columns: i64) -> Launch {
    let spans = (columns as u64).div_ceil(64 * 16 / dtype.size() as u64);
    walk(symbol(family, dtype), (rows as u64 * spans).div_ceil(8), 256)
}

impl Run<QuantizeRowwise> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeRowwise) -> Result<()> {
        let &[rows, columns] = op.input.shape() else { unreachable!("a checked matrix") };
        let params = QuantizeRowwiseParams {
            input: op.input.data,
            codes: op.values.data,
            scales: op.scales.data,
            outlier_mask: std::ptr::null_mut(),
            rows,
            columns,
            threshold: 0.0,
        };
        let plan = plan_rows("quantize_rowwise", "quantize_rowwise_long", op.input.dtype, rows, columns);
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe { launch("quantize_rowwise", &plan, &params, self.stream) }
    }
}

impl Run<QuantizeRowwiseOutliers> for Cuda {
    unsafe fn run(&self, op: &QuantizeRowwiseOutliers) -> Result<()> {
        const NAME: &str = "quantize_rowwise_outliers";
        let &[rows, columns] = op.input.shape() else { unreachable!("a checked matrix") };
        let limits = limits(NAME, self.stream.device)?;
        let params = QuantizeRowwiseParams {
            input: op.input.data,
            codes: op.values.data,
            scales: op.scales.data,
            outlier_mask: op.outlier_mask.data,
            rows,
            columns,
            threshold: op.threshold,
        };
        let mask_params =
            OutlierColumnsParams { outlier_mask: op.outlier_mask.data, codes: op.values.data, rows, columns };
        let plan = plan_rows(NAME, "quantize_rowwise_long_outliers", op.input.dtype, rows, columns);
        let [clear, zero] = plan_outliers(rows, columns, limits);
        // SAFETY: as above.
        unsafe {
            if rows == 1 {
                return launch(NAME, &plan, &params, self.stream); // writes the whole mask
            }
            launch(NAME, &clear, &mask_params, self.stream)?;
            launch(NAME, &plan, &params, self.stream)?;
            launch(NAME, &zero, &mask_params, self.stream)
        }
    }
}

/// Enqueues a decoder.
///
/// # Safety
/// As [`launch`].
unsafe fn decode(
    name: &'static str,
    family: &'static str,
    [codes, scales, output]: [&Tensor; 3],
    [rows, columns]: [i64; 2],
    cuda: &Cuda,
) -> Result<()> {
    let params =
        DequantizeInt8Params { codes: codes.data, scales: scales.data, output: output.data, rows, columns };
    // SAFETY: the caller's promise.
    unsafe { launch(name, &plan_decoder(family, output.dtype, rows, columns), &params, cuda.stream) }
}

impl Run<DequantizeRowwise> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &DequantizeRowwise) -> Result<()> {
        let &[rows, columns] = op.values.shape() else { unreachable!("a checked matrix") };
        let tensors = [&op.values, &op.scales, &op.output];
        // SAFETY: as above.
        unsafe { decode("dequantize_rowwise", "dequantize_rowwise", tensors, [rows, columns], self) }
    }
}

impl Run<DequantizeColumnwise> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &DequantizeColumnwise) -> Result<()> {
        let &[rows, columns] = op.values.shape() else { unreachable!("a checked matrix") };
        let tensors = [&op.values, &op.scales, &op.output];
        // SAFETY: as above.
        unsafe { decode("dequantize_columnwise", "dequantize_columnwise", tensors, [rows, columns], self) }
    }
}

impl Run<DequantizeGlobal> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &DequantizeGlobal) -> Result<()> {
        let tensors = [&op.values, &op.scales, &op.output];
        // SAFETY: as above. The tensor is one row.
        unsafe { decode("dequantize_global", "dequantize_rowwise", tensors, [1, op.values.len()], self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::H200;

    #[test]
    fn rows_are_planned_for_the_registers_that_hold_them() {
        let plan = |dtype, rows, columns| {
            plan_rows("quantize_rowwise", "quantize_rowwise_long", dtype, rows, columns).to_string()
        };
        assert_eq!(plan(Dtype::Bfloat16, 8192, 8192), "quantize_rowwise_bfloat16_1024<<<8192, 256, 0>>>");
        assert_eq!(plan(Dtype::Float32, 17, 256), "quantize_rowwise_float32_64<<<3, 256, 0>>>");
        assert_eq!(plan(Dtype::Float16, 5, 513), "quantize_rowwise_float16_128<<<1, 256, 0>>>");
        assert_eq!(plan(Dtype::Float16, 3, 32_768), "quantize_rowwise_float16_4096<<<3, 1024, 0>>>");
        assert_eq!(plan(Dtype::Float16, 3, 32_769), "quantize_rowwise_long_float16<<<3, 512, 0>>>");
        assert_eq!(plan(Dtype::Float32, 0, 64), "quantize_rowwise_float32_64<<<0, 256, 0>>>");
        assert_eq!(plan(Dtype::Float32, 5, 0), "quantize_rowwise_float32_64<<<1, 256, 0>>>");
        assert_eq!(plan_rows("f", "l", Dtype::Float32, 1 << 40, 1).grid, MAX_GRID);
    }

    #[test]
    fn outlier_columns_are_zeroed_by_no_more_blocks_than_the_device_holds() {
        let plans = |rows, columns| plan_outliers(rows, columns, &H200).map(|plan| plan.to_string());
        assert_eq!(
            plans(4096, 8192),
            ["clear_outlier_mask<<<2, 256, 0>>>", "zero_outlier_columns<<<256, 256, 0>>>"]
        );
        assert_eq!(plans(1 << 20, 1)[1], "zero_outlier_columns<<<528, 256, 0>>>");
    }
}
