//! Exact products of 8-bit integer matrices, with scales and bias in float32 and one rounding.
//! Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.

use super::Execution;
use super::float::Float;
use super::threads::{FloatEnvironment, for_each, part_len};

/// RN(1 / 127^2): what turns a product of codes into one of fractions of both scales.
const INVERSE_127_SQUARED: f32 = f32::from_bits(0x3882_0610);
/// RN(1 / 127).
const INVERSE_127: f32 = f32::from_bits(0x3c01_0204);
/// Codes whose products fit into 32 bits: 2^14 * 2^16 < 2^31.
const RUN: usize = 1 << 16;

/// The operands: `input` [M, K] and `weight` [N, K] of codes.
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    /// [M, K]
    pub input: &'a [i8],
    /// [N, K]
    pub weight: &'a [i8],
    /// M
    pub rows: usize,
    /// N
    pub columns: usize,
    /// K
    pub depth: usize,
}

/// What is done to a sum: `fma(f32(sum) * RN(input_scale / 127^2), weight_scale, bias)`.
#[derive(Clone, Copy, Debug)]
pub struct Scales<'a> {
    /// [M]; without them the factor of every row is 1.
    pub input: Option<&'a [f32]>,
    /// [N], or one for all; 1 without them.
    pub weight: Option<&'a [f32]>,
    /// [N]
    pub bias: Option<&'a [f32]>,
}

/// Columns that are multiplied unquantized: `sum over k of input[m, k] * T(weight[n, k] * scale[n] / 127)`.
#[derive(Clone, Copy, Debug)]
pub struct Outliers<'a, T> {
    /// [M, K]
    pub input: &'a [T],
    /// [K], not 0 for the columns that count.
    pub mask: &'a [u8],
}

impl Codes<'_> {
    fn check(&self) {
        assert_eq!(self.input.len(), self.rows * self.depth, "an input [M, K]");
        assert_eq!(self.weight.len(), self.columns * self.depth, "a weight [N, K]");
    }

    /// The sum at a place of the output.
    fn sum(&self, m: usize, n: usize) -> i64 {
        let input = &self.input[m * self.depth..][..self.depth];
        let weight = &self.weight[n * self.depth..][..self.depth];
        let runs = input.chunks(RUN).zip(weight.chunks(RUN));
        runs.map(|(input, weight)| i64::from(dot(input, weight))).sum()
    }
}

fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

impl Scales<'_> {
    fn row_factor(&self, m: usize) -> f32 {
        self.input.map_or(1.0, |scales| scales[m] * INVERSE_127_SQUARED)
    }

    fn weight_scale(&self, n: usize) -> f32 {
        self.weight.map_or(1.0, |scales| if scales.len() == 1 { scales[0] } else { scales[n] })
    }

    fn apply(&self, sum: i64, row_factor: f32, n: usize) -> f32 {
        (sum as f32 * row_factor).mul_add(self.weight_scale(n), self.bias.map_or(0.0, |bias| bias[n]))
    }
}

/// `output` [M, N] = the scaled sums, rounded once.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_int8<T: Float>(codes: Codes<'_>, scales: Scales<'_>, output: &mut [T], execution: Execution) {
    let _ieee = FloatEnvironment::ieee();
    for_each_row(codes, output, execution, |m, output| {
        let factor = scales.row_factor(m);
        for (n, output) in output.iter_mut().enumerate() {
            *output = T::from_f32(scales.apply(codes.sum(m, n), factor, n));
        }
    });
}

/// `output` [M, N] = the sums. K is at most 131071, so that they fit.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_int8_raw(codes: Codes<'_>, output: &mut [i32], execution: Execution) {
    for_each_row(codes, output, execution, |m, output| {
        for (n, output) in output.iter_mut().enumerate() {
            *output = codes.sum(m, n) as i32;
        }
    });
}

/// `output` [M, N] = the scaled sums and those of the outliers, added in float32 and rounded once.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_int8_outliers<T: Float>(
    codes: Codes<'_>,
    scales: Scales<'_>,
    outliers: Outliers<'_, T>,
    output: &mut [T],
    execution: Execution,
) {
    assert_eq!(outliers.mask.len(), codes.depth, "a mask [K]");
    assert_eq!(outliers.input.len(), codes.input.len(), "an unquantized input [M, K]");
    let _ieee = FloatEnvironment::ieee();
    let listed: Vec<usize> = (0..codes.depth).filter(|k| outliers.mask[*k] != 0).collect();
    // [N, number of outliers]: what those columns of the weight stand for, in the dtype of the input
    let mut weight = Vec::with_capacity(codes.columns * listed.len());
    for n in 0..codes.columns {
        let row = &codes.weight[n * codes.depth..][..codes.depth];
        let scale = scales.weight_scale(n);
        weight.extend(listed.iter().map(|k| T::from_f32(f32::from(row[*k]) * scale * INVERSE_127).to_f32()));
    }
    for_each_row(codes, output, execution, |m, output| {
        let factor = scales.row_factor(m);
        let row = &outliers.input[m * codes.depth..][..codes.depth];
        let input: Vec<f32> = listed.iter().map(|k| row[*k].to_f32()).collect();
        for (n, output) in output.iter_mut().enumerate() {
            let weight = &weight[n * listed.len()..][..listed.len()];
            let sum = input.iter().zip(weight).fold(0.0, |sum: f32, (x, w)| x.mul_add(*w, sum));
            *output = T::from_f32(scales.apply(codes.sum(m, n), factor, n) + sum);
        }
    });
}

/// Calls `work` for each row of the output [M, N].
fn for_each_row<T: Send>(
    codes: Codes<'_>,
    output: &mut [T],
    execution: Execution,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    codes.check();
    assert_eq!(output.len(), codes.rows * codes.columns, "an output [M, N]");
    if output.is_empty() {
        return;
    }
    let products = codes.columns * codes.depth.max(1);
    let rows_in_part = part_len(codes.rows * products, products, execution.threads) / products;
    let parts = output.chunks_mut(rows_in_part * codes.columns).enumerate();
    for_each(execution.threads, parts, |(i, output)| {
        for (j, output) in output.chunks_mut(codes.columns).enumerate() {
            work(i * rows_in_part + j, output);
        }
    });
}
