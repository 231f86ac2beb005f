//! Launches of the kernels in cuda/int8_columns.cu.

use super::{
    QuantizeColumnwise, QuantizeColumnwiseAndTranspose, QuantizeDualGlobal, QuantizeDualRowwise,
    QuantizeGlobal, QuantizeGlobalTranspose,
};
use crate::backend::{Cuda, Run};
use crate::cuda::{Launch, Params, Stream, Symbol, launch};
use crate::error::Result;
use crate::ops::symbol;
use crate::ops::tensorwise::{AbsmaxParams, plan_absmax};
use crate::tensor::{Dtype, Tensor};

/// Mirror of the struct of all kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct QuantizeInt8Params {
    input: *const u8,
    codes: *mut u8,         // null for transposed codes alone
    transposed: *mut u8,    // null for codes alone
    row_scales: *mut u8,    // null but for dual codes with row scales
    column_scales: *mut u8, // [columns], or [1]
    partial_absmax: *const u8,
    rows: i64,
    columns: i64,
    num_partials: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/int8_columns.cu; `param_bytes` is compared at load.
unsafe impl Params for QuantizeInt8Params {}

/// Partial maxima of a tensor, as many as the scratch holds: every thread block of the second kernel reads all.
const MAX_PARTIALS: u64 = 512;

/// What a thread block covers.
#[derive(Clone, Copy, Debug)]
enum Cover {
    /// So many rows of 32 vectors.
    Span(u64),
    /// 128 rows of 64 columns.
    Tile,
    /// 1024 vectors of the flat tensor.
    Flat,
}

impl Cover {
    fn grid(self, dtype: Dtype, rows: i64, columns: i64) -> u64 {
        let (rows, columns, per_vector) = (rows as u64, columns as u64, 16 / dtype.size() as u64);
        match self {
            Self::Span(num_rows) => rows.div_ceil(num_rows) * columns.div_ceil(32 * per_vector),
            Self::Tile => rows.div_ceil(128) * columns.div_ceil(64),
            Self::Flat => (rows * columns).div_ceil(1024 * per_vector),
        }
    }
}

impl QuantizeInt8Params {
    fn new(input: &Tensor, column_scales: &Tensor) -> Self {
        let columns = input.shape().last().copied().unwrap_or(1);
        let rows = input.shape().iter().rev().skip(1).product();
        let (none, nothing) = (std::ptr::null_mut(), std::ptr::null());
        let (input, column_scales) = (input.data, column_scales.data);
        Self {
            input,
            codes: none,
            transposed: none,
            row_scales: none,
            column_scales,
            partial_absmax: nothing,
            rows,
            columns,
            num_partials: 0,
        }
    }

    fn plan(&self, family: &'static str, dtype: Dtype, cover: Cover) -> Launch {
        let grid = cover.grid(dtype, self.rows, self.columns);
        Launch { waits: true, ..Launch::new(symbol(family, dtype), grid, 256) }
    }

    /// Zeroes where maxima will be: all that an empty matrix needs.
    fn plan_clear(&self) -> Launch {
        let symbol = Symbol { family: "clear_maxima", dtype: None, codebook: "", number: 0 };
        let rows = if self.row_scales.is_null() { 0 } else { self.rows };
        let grid = (self.columns.max(rows) as u64).div_ceil(4096);
        Launch { waits: true, ..Launch::new(symbol, grid, 256) }
    }

    /// Codes by the scales of columns, and of rows where there are such.
    ///
    /// # Safety
    /// As [`launch`].
    unsafe fn by_columns(
        &self,
        name: &'static str,
        dtype: Dtype,
        cover: Cover,
        stream: Stream,
    ) -> Result<()> {
        let search =
            if self.row_scales.is_null() { "find_column_maxima" } else { "find_row_and_column_maxima" };
        // SAFETY: the caller's promise.
        unsafe {
            launch(name, &self.plan_clear(), self, stream)?;
            launch(name, &self.plan(search, dtype, Cover::Span(256)), self, stream)?;
            launch(name, &self.plan(name, dtype, cover), self, stream)
        }
    }

    /// Codes by the scale of the tensor.
    ///
    /// # Safety
    /// As [`launch`]; `scratch` holds [`MAX_PARTIALS`] words.
    unsafe fn by_tensor(
        mut self,
        name: &'static str,
        dtype: Dtype,
        cover: Cover,
        scratch: &Tensor,
        stream: Stream,
    ) -> Result<()> {
        let n = self.rows * self.columns;
        let absmax = plan_absmax(dtype, n, MAX_PARTIALS);
        self.partial_absmax = scratch.data;
        self.num_partials = absmax.grid as i32;
        let absmax_params = AbsmaxParams { input: self.input, partial_absmax: scratch.data, n };
        let mut codes = self.plan(name, dtype, cover);
        codes.grid = codes.grid.max(1); // an empty tensor has its scale written
        // SAFETY: the caller's promise.
        unsafe {
            launch(name, &absmax, &absmax_params, stream)?;
            launch(name, &codes, &self, stream)
        }
    }
}

impl Run<QuantizeColumnwise> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeColumnwise) -> Result<()> {
        let params =
            QuantizeInt8Params { codes: op.values.data, ..QuantizeInt8Params::new(&op.input, &op.scales) };
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe { params.by_columns("quantize_columnwise", op.input.dtype, Cover::Span(64), self.stream) }
    }
}

impl Run<QuantizeColumnwiseAndTranspose> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeColumnwiseAndTranspose) -> Result<()> {
        let params = QuantizeInt8Params {
            transposed: op.values.data,
            ..QuantizeInt8Params::new(&op.input, &op.scales)
        };
        let name = "quantize_columnwise_and_transpose";
        // SAFETY: as above.
        unsafe { params.by_columns(name, op.input.dtype, Cover::Tile, self.stream) }
    }
}

impl Run<QuantizeDualRowwise> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeDualRowwise) -> Result<()> {
        let params = QuantizeInt8Params {
            codes: op.values.data,
            transposed: op.transposed.data,
            row_scales: op.scales.data,
            ..QuantizeInt8Params::new(&op.input, &op.transposed_scales)
        };
        // SAFETY: as above.
        unsafe { params.by_columns("quantize_dual_rowwise", op.input.dtype, Cover::Tile, self.stream) }
    }
}

impl Run<QuantizeGlobal> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeGlobal) -> Result<()> {
        let params =
            QuantizeInt8Params { codes: op.values.data, ..QuantizeInt8Params::new(&op.input, &op.scales) };
        // SAFETY: as above.
        unsafe { params.by_tensor("quantize_global", op.input.dtype, Cover::Flat, &op.scratch, self.stream) }
    }
}

impl Run<QuantizeGlobalTranspose> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeGlobalTranspose) -> Result<()> {
        let params = QuantizeInt8Params {
            transposed: op.values.data,
            ..QuantizeInt8Params::new(&op.input, &op.scales)
        };
        let name = "quantize_global_transpose";
        // SAFETY: as above.
        unsafe { params.by_tensor(name, op.input.dtype, Cover::Tile, &op.scratch, self.stream) }
    }
}

impl Run<QuantizeDualGlobal> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &QuantizeDualGlobal) -> Result<()> {
        let params = QuantizeInt8Params {
            codes: op.values.data,
            transposed: op.transposed.data,
            ..QuantizeInt8Params::new(&op.input, &op.scales)
        };
        let name = "quantize_dual_global";
        // SAFETY: as above.
        unsafe { params.by_tensor(name, op.input.dtype, Cover::Tile, &op.scratch, self.stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    #[test]
    fn grids_cover_rows_and_columns() {
        let tensor =
            |shape: &[i64]| Tensor::new(std::ptr::null_mut(), Dtype::Float16, Device::Cuda(0), shape);
        let params = QuantizeInt8Params::new(&tensor(&[300, 1000]), &tensor(&[1000]));
        let plan = |cover| params.plan("quantize", Dtype::Float16, cover).to_string();
        assert_eq!(plan(Cover::Span(256)), "quantize_float16<<<8, 256, 0>>>");
        assert_eq!(plan(Cover::Span(64)), "quantize_float16<<<20, 256, 0>>>");
        assert_eq!(plan(Cover::Tile), "quantize_float16<<<48, 256, 0>>>");
        assert_eq!(plan(Cover::Flat), "quantize_float16<<<37, 256, 0>>>");
        assert_eq!(params.plan_clear().to_string(), "clear_maxima<<<1, 256, 0>>>");
        let params = QuantizeInt8Params::new(&tensor(&[2, 3, 5]), &tensor(&[1]));
        assert_eq!((params.rows, params.columns), (6, 5));
    }
}
