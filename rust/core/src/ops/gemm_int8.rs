//! Exact product of 8-bit integer matrices with a scaling epilogue, and its form with columns that stay unquantized.
//! Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.

mod mma;
mod simt;
mod skinny_sm90;
mod sm90;

use super::{address, bias_number, is_built, widen, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::cpu::{self, Codes, Execution, Outliers, Scales};
use crate::cuda::{Family, Launch, Limits, Params, Symbol, forced_family, launch, limits};
use crate::error::{Error, ErrorKind, Result};
use crate::op;
use crate::spec::{BOOL, FLOAT32, FLOATS, INT8, Of, Rule};
use crate::tensor::{Dtype, Tensor};

/// Most columns whose sums surely fit 32 bits: codes are -128 to 127.
pub(super) const MAX_EXACT_K: i64 = 131_071;
/// Dtypes of the output.
const OUTPUTS: &[Dtype] = &[Dtype::Float32, Dtype::Float16, Dtype::Bfloat16, Dtype::Int32];

op! {
    /// Multiply 8-bit codes: `output = (input @ weight.T) * input_scales[:, None] / 127**2 * weight_scales + bias`.
    ///
    /// The sum is exact. With `r = input_scales[m] / 127**2`, the result is `fma(float32(sum) * r, weight_scales[n], bias[n])`
    /// in float32, rounded once to `dtype`. Without `input_scales` r is 1; `weight_scale` is one scale for all rows of the
    /// weight, and without either it is 1. For int32 the sum itself is the result, and K is at most 131071.
    ///
    /// Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.
    gemm_int8 => GemmInt8 {
        input: In(INT8, "M, K"),
        weight: In(INT8, "N, K"),
        dtype: OneOfDtype(OUTPUTS),
        input_scales: OptionalFlat(FLOAT32, "M"),
        weight_scales: OptionalFlat(FLOAT32, "N"),
        weight_scale: OptionalFlat(FLOAT32, "1"),
        bias: Optional(FLOATS, "N"),
        output: Out(Of::Arg("dtype"), "M, N"),
    }
    rules: [
        Rule::Excludes("weight_scale", "weight_scales"),
        Rule::NoneFor("input_scales", "dtype", Dtype::Int32),
        Rule::NoneFor("weight_scales", "dtype", Dtype::Int32),
        Rule::NoneFor("weight_scale", "dtype", Dtype::Int32),
        Rule::NoneFor("bias", "dtype", Dtype::Int32),
    ]
}

op! {
    /// Multiply 8-bit codes, and the columns of a mask unquantized: `gemm_int8(...) + input[:, mask] @ weight[:, mask].T`.
    ///
    /// The second product takes the weight as decoded, `weight * weight_scales / 127` rounded to the dtype of the input. Both
    /// are added in float32 and rounded once. The columns of the mask are zero in `input_codes`, as
    /// `quantize_rowwise_outliers` leaves them.
    ///
    /// Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.2.
    gemm_int8_outliers => GemmInt8Outliers {
        input_codes: In(INT8, "M, K"),
        input_scales: Flat(FLOAT32, "M"),
        input: In(FLOATS, "M, K"),
        outlier_mask: In(BOOL, "K"),
        weight: In(INT8, "N, K"),
        weight_scales: Flat(FLOAT32, "N"),
        bias: Optional(FLOATS, "N"),
        output: Out(Of::Like("input"), "M, N"),
        outliers: Scratch("4 * K"),
        num_outliers: Scratch("4"),
    }
}

/// What both ops have in common, as the kernels and loops take it.
#[derive(Clone, Copy, Debug)]
struct Product {
    input: Tensor,
    weight: Tensor,
    input_scales: Option<Tensor>,
    weight_scales: Option<Tensor>,
    bias: Option<Tensor>,
    output: Tensor,
    outliers: Option<OutlierColumns>,
}

/// The columns that are multiplied unquantized.
#[derive(Clone, Copy, Debug)]
struct OutlierColumns {
    input: Tensor,
    mask: Tensor,
    /// Scratch: the columns of the mask, ascending.
    list: Tensor,
    /// Scratch: how many they are.
    count: Tensor,
}

impl GemmInt8 {
    fn product(&self) -> Result<Product> {
        let k = self.input.shape()[1];
        if self.dtype == Dtype::Int32 && k > MAX_EXACT_K {
            let rule = format!("K must be at most {MAX_EXACT_K} for dtype int32, got {k}");
            return Err(Error::new(ErrorKind::Shape, format!("qbits::gemm_int8: {rule}")));
        }
        Ok(Product {
            input: self.input,
            weight: self.weight,
            input_scales: self.input_scales,
            weight_scales: self.weight_scales.or(self.weight_scale),
            bias: self.bias,
            output: self.output,
            outliers: None,
        })
    }
}

impl GemmInt8Outliers {
    fn product(&self) -> Result<Product> {
        let k = self.outlier_mask.len();
        if i32::try_from(k).is_err() {
            let rule = format!("K must be at most {}, got {k}", i32::MAX);
            return Err(Error::new(ErrorKind::Shape, format!("qbits::gemm_int8_outliers: {rule}")));
        }
        Ok(Product {
            input: self.input_codes,
            weight: self.weight,
            input_scales: Some(self.input_scales),
            weight_scales: Some(self.weight_scales),
            bias: self.bias,
            output: self.output,
            outliers: Some(OutlierColumns {
                input: self.input,
                mask: self.outlier_mask,
                list: self.outliers,
                count: self.num_outliers,
            }),
        })
    }
}

/// What decides how a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Rows of the input.
    pub m: i64,
    /// Rows of the weight.
    pub n: i64,
    /// Columns of both.
    pub k: i64,
    /// Of the output.
    pub dtype: Dtype,
    /// Some columns are multiplied unquantized.
    pub has_outliers: bool,
    /// Input and weight start on 16 bytes.
    pub is_aligned: bool,
}

/// One line of what was measured: where a family is the fastest way.
struct Range {
    /// Compute capabilities, from this one
    since: (i32, i32),
    /// up to this one.
    until: (i32, i32),
    /// Rows of the input, from this many on.
    least_rows: i64,
    /// Large tiles occupy at least half of the multiprocessors, or K is too short to be divided among the others.
    fills: bool,
    family: Family,
}

const HOPPER: (i32, i32) = (9, 0);
const ANY_GPU: (i32, i32) = (i32::MAX, 0);

const fn range(since: (i32, i32), until: (i32, i32), least_rows: i64, family: Family) -> Range {
    Range { since, until, least_rows, fills: false, family }
}

/// The fastest family: the first line that holds and whose kernels can run. `Simt` takes every problem.
/// Measured on an H200 with the kernels that these two of Hopper were made from, in us: 256 rows of 8192 x 8192 `SkinnySm90`
/// 38, 512 rows `Large` 46, of 4096 x 4096 `SkinnySm90` 21. The line of Ampere is not measured.
const FASTEST: &[Range] = &[
    Range { fills: true, ..range(HOPPER, HOPPER, 65, Family::Large) },
    range(HOPPER, HOPPER, 0, Family::SkinnySm90),
    range((8, 0), ANY_GPU, 0, Family::Mma),
    range((0, 0), ANY_GPU, 0, Family::Simt),
];

impl Problem {
    /// The one rule: by which family a GPU computes the product. A forced family counts wherever it can run.
    pub fn fastest(&self, limits: &Limits, forced: Option<Family>) -> Family {
        if let Some(family) = forced.filter(|family| self.fits(*family, limits)) {
            return family;
        }
        let is_fastest = |range: &&Range| {
            (range.since..=range.until).contains(&limits.capability)
                && self.m >= range.least_rows
                && (!range.fills || sm90::fills(self, limits))
                && self.fits(range.family, limits)
        };
        FASTEST.iter().find(is_fastest).map_or(Family::Simt, |range| range.family)
    }

    /// Whether the family has a kernel for the problem and the device.
    fn fits(&self, family: Family, limits: &Limits) -> bool {
        match family {
            Family::Large => is_built("gemm_int8_sm90") && sm90::fits(self, limits),
            Family::SkinnySm90 => is_built("gemm_int8_skinny_sm90") && skinny_sm90::fits(self, limits),
            Family::Mma => mma::fits(self, limits),
            family => family == Family::Simt,
        }
    }
}

/// Mirror of the struct of the kernels for all GPUs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GemmInt8Params {
    input: *const u8,
    weight: *const u8,
    input_scales: *const u8,
    weight_scales: *const u8,
    bias: *const u8,
    output: *mut u8,
    outlier_input: *const u8,
    outliers: *const u8,
    num_outliers: *const u8,
    m: i64,
    n: i64,
    k: i64,
    weight_scale_stride: i32,
    bias_dtype: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_int8.cuh; `param_bytes` is compared at load.
unsafe impl Params for GemmInt8Params {}

/// Mirror of the struct of the kernel that lists the columns of a mask.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ListColumnsParams {
    mask: *const u8,
    columns: *mut u8,
    num_columns: *mut u8,
    k: i64,
}
// SAFETY: as above.
unsafe impl Params for ListColumnsParams {}

/// Threads of the one thread block that lists the columns of a mask.
const LIST_THREADS: u32 = 1024;

impl Product {
    fn problem(&self) -> Problem {
        let is_aligned = |tensor: &Tensor| (tensor.data as usize).is_multiple_of(16);
        Problem {
            m: self.input.shape()[0],
            n: self.weight.shape()[0],
            k: self.input.shape()[1],
            dtype: self.output.dtype,
            has_outliers: self.outliers.is_some(),
            is_aligned: is_aligned(&self.input) && is_aligned(&self.weight),
        }
    }

    /// From the scale of one row of the weight to the next: 0 where all have the same.
    fn weight_scale_stride(&self) -> i32 {
        self.weight_scales.is_some_and(|scales| scales.len() > 1).into()
    }

    fn params(&self) -> GemmInt8Params {
        let Problem { m, n, k, .. } = self.problem();
        GemmInt8Params {
            input: self.input.data,
            weight: self.weight.data,
            input_scales: address(self.input_scales),
            weight_scales: address(self.weight_scales),
            bias: address(self.bias),
            output: self.output.data,
            outlier_input: address(self.outliers.map(|columns| columns.input)),
            outliers: address(self.outliers.map(|columns| columns.list)),
            num_outliers: address(self.outliers.map(|columns| columns.count)),
            m,
            n,
            k,
            weight_scale_stride: self.weight_scale_stride(),
            bias_dtype: bias_number(self.bias),
        }
    }

    /// # Safety
    /// As [`Run::run`], for tensors of host memory.
    unsafe fn codes<'a>(&self) -> Codes<'a> {
        let Problem { m, n, k, .. } = self.problem();
        let (rows, columns, depth) = (m as usize, n as usize, k as usize);
        // SAFETY: the caller's promise.
        unsafe {
            Codes { input: self.input.as_slice(), weight: self.weight.as_slice(), rows, columns, depth }
        }
    }

    /// # Safety
    /// As [`Run::run`], on a GPU.
    unsafe fn launch(&self, op: &str, cuda: &Cuda) -> Result<()> {
        if self.output.is_empty() {
            return Ok(());
        }
        let limits = limits(op, cuda.stream.device)?;
        if let Some(columns) = &self.outliers {
            let symbol = Symbol { family: "gemm_int8_list_columns", dtype: None, codebook: "", number: 0 };
            let plan = Launch { waits: true, ..Launch::new(symbol, 1, LIST_THREADS) };
            let params = ListColumnsParams {
                mask: columns.mask.data,
                columns: columns.list.data,
                num_columns: columns.count.data,
                k: columns.mask.len(),
            };
            // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
            unsafe { launch(op, &plan, &params, cuda.stream)? };
        }
        // SAFETY: as above.
        unsafe {
            match self.problem().fastest(limits, forced_family(op)?) {
                Family::Large => {
                    let (plan, params) = sm90::plan(op, self, limits, cuda.weights_are_ready)?;
                    launch(op, &plan, &params, cuda.stream)
                }
                Family::SkinnySm90 => {
                    let (plan, params) = skinny_sm90::plan(op, self, limits, cuda.weights_are_ready)?;
                    launch(op, &plan, &params, cuda.stream)
                }
                Family::Mma => launch(op, &mma::plan(self, limits), &self.params(), cuda.stream),
                Family::Simt => launch(op, &simt::plan(self), &self.params(), cuda.stream),
                other => unreachable!("a family that fits, got {other:?}"),
            }
        }
    }
}

/// Calls `f` with scales and bias of a product in host memory.
///
/// # Safety
/// As [`Run::run`].
unsafe fn with_scales(product: &Product, f: impl FnOnce(Scales<'_>)) {
    // SAFETY: the caller's promise.
    unsafe {
        let bias = product.bias.map(|bias| widen(&bias));
        f(Scales {
            input: product.input_scales.map(|scales| scales.as_slice()),
            weight: product.weight_scales.map(|scales| scales.as_slice()),
            bias: bias.as_deref(),
        });
    }
}

impl Run<GemmInt8> for Cpu {
    unsafe fn run(&self, op: &GemmInt8) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        let product = op.product()?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        unsafe {
            let codes = product.codes();
            if op.dtype == Dtype::Int32 {
                cpu::gemm_int8_raw(codes, op.output.as_slice_mut(), execution);
                return Ok(());
            }
            with_float!(op.dtype, T => with_scales(&product, |scales| {
                cpu::gemm_int8::<T>(codes, scales, op.output.as_slice_mut(), execution);
            }));
        }
        Ok(())
    }

    fn declines(&self, op: &GemmInt8) -> Result<bool> {
        op.product().map(|_| false)
    }
}

impl Run<GemmInt8Outliers> for Cpu {
    unsafe fn run(&self, op: &GemmInt8Outliers) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        let product = op.product()?;
        // SAFETY: as above.
        with_float!(op.input.dtype, T => unsafe {
            let codes = product.codes();
            let outliers = Outliers { input: op.input.as_slice::<T>(), mask: op.outlier_mask.as_slice() };
            with_scales(&product, |scales| {
                cpu::gemm_int8_outliers::<T>(codes, scales, outliers, op.output.as_slice_mut(), execution);
            });
        });
        Ok(())
    }
}

impl Run<GemmInt8> for Cuda {
    const HAS_TRITON: bool = true;

    unsafe fn run(&self, op: &GemmInt8) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { op.product()?.launch("gemm_int8", self) }
    }

    const WEIGHTS: &[&str] = &["weight"];

    fn declines(&self, op: &GemmInt8) -> Result<bool> {
        op.product().map(|_| false)
    }
}

impl Run<GemmInt8Outliers> for Cuda {
    unsafe fn run(&self, op: &GemmInt8Outliers) -> Result<()> {
        // SAFETY: as above.
        unsafe { op.product()?.launch("gemm_int8_outliers", self) }
    }
}

#[cfg(test)]
mod tests;
