//! Exact products of 8-bit integer matrices, with scales and bias in float32 and one rounding.
//! Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339, section 2.

use std::ops::Range;

use super::Execution;
use super::float::Float;
use super::gemm_int8_panels::{Sums, multiply};
use super::isa::{Isa, Level};
use super::threads::FloatEnvironment;
#[cfg(target_arch = "x86_64")]
use super::{gemm_int8_avx2 as avx2, gemm_int8_avx512 as avx512};

/// RN(1 / 127^2): what turns a product of codes into one of fractions of both scales.
const INVERSE_127_SQUARED: f32 = f32::from_bits(0x3882_0610);
/// RN(1 / 127).
const INVERSE_127: f32 = f32::from_bits(0x3c01_0204);

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

/// What the rows of one panel share, in lines of sixteen columns: scales, bias, and the weights of the outliers.
struct Panel {
    columns: Range<usize>,
    scales: Vec<[f32; 16]>,
    bias: Vec<[f32; 16]>,
    /// [outliers][lines]
    outliers: Vec<[f32; 16]>,
}

/// One row of a panel on its way to the output.
pub(super) struct Row<'a> {
    sums: Sums<'a>,
    factor: f32,
    panel: &'a Panel,
    /// [outliers]
    outliers: &'a [f32],
}

impl Row<'_> {
    /// Scales sixteen sums at a time and hands them to `store`. Inlined into functions that have the CPU's vectors.
    #[inline(always)]
    pub(super) fn finish<T: Float>(&self, output: &mut [T], store: impl Fn(&mut [T; 16], &[f32; 16])) {
        let num_lines = self.panel.scales.len();
        for (i, output) in output.chunks_mut(16).enumerate() {
            let mut values = match self.sums {
                Sums::Narrow(sums) => sums.as_chunks::<16>().0[i].map(|sum| sum as f32),
                Sums::Wide(sums) => sums.as_chunks::<16>().0[i].map(|sum| sum as f32),
            };
            let (scales, bias) = (&self.panel.scales[i], &self.panel.bias[i]);
            for j in 0..16 {
                values[j] = (values[j] * self.factor).mul_add(scales[j], bias[j]);
            }
            if !self.outliers.is_empty() {
                let mut sums = [0.0f32; 16];
                for (x, weights) in self.outliers.iter().zip(self.panel.outliers.chunks(num_lines)) {
                    for j in 0..16 {
                        sums[j] = x.mul_add(weights[i][j], sums[j]);
                    }
                }
                for j in 0..16 {
                    values[j] += sums[j];
                }
            }
            match output.try_into() {
                Ok(output) => store(output, &values),
                Err(_) => output.iter_mut().zip(values).for_each(|(to, value)| *to = T::from_f32(value)),
            }
        }
    }
}

fn finish<T: Float>(row: Row<'_>, output: &mut [T], isa: Isa) {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::finish(row, output) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::finish(row, output) },
        Level::Scalar => row.finish(output, |output, values| {
            output.iter_mut().zip(values).for_each(|(to, value)| *to = T::from_f32(*value));
        }),
    }
}

/// An output [M, N] that threads fill panel by panel.
struct Output<T> {
    data: *mut T,
    columns: usize,
}

// SAFETY: threads write disjoint columns, as `row` demands of its callers.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    fn new(output: &mut [T], codes: &Codes<'_>) -> Self {
        assert_eq!(codes.input.len(), codes.rows * codes.depth, "an input [M, K]");
        assert_eq!(codes.weight.len(), codes.columns * codes.depth, "a weight [N, K]");
        assert_eq!(output.len(), codes.rows * codes.columns, "an output [M, N]");
        Self { data: output.as_mut_ptr(), columns: codes.columns }
    }

    /// # Safety
    /// Row and columns lie within the output, which is borrowed for so long, and nobody else has these columns.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, m: usize, columns: &Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe {
            let first = self.data.add(m * self.columns + columns.start);
            std::slice::from_raw_parts_mut(first, columns.len())
        }
    }
}

/// `output` [M, N] = the sums. K is at most 131071, so that they fit.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_int8_raw(codes: Codes<'_>, output: &mut [i32], execution: Execution) {
    let shared = Output::new(output, &codes);
    if output.is_empty() || codes.depth == 0 {
        return output.fill(0);
    }
    multiply(&codes, execution, std::convert::identity, |columns, m, sums| {
        // SAFETY: a panel of the weight is one thread's, and its rows are columns of the output.
        let output = unsafe { shared.row(m, columns) };
        match sums {
            Sums::Narrow(sums) => output.copy_from_slice(&sums[..output.len()]),
            Sums::Wide(sums) => output.iter_mut().zip(sums).for_each(|(to, sum)| *to = *sum as i32),
        }
    });
}

/// `output` [M, N] = the scaled sums, rounded once.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_int8<T: Float>(codes: Codes<'_>, scales: Scales<'_>, output: &mut [T], execution: Execution) {
    scaled_product(codes, scales, None, output, execution);
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
    scaled_product(codes, scales, Some(outliers), output, execution);
}

fn scaled_product<T: Float>(
    codes: Codes<'_>,
    scales: Scales<'_>,
    outliers: Option<Outliers<'_, T>>,
    output: &mut [T],
    execution: Execution,
) {
    let _ieee = FloatEnvironment::ieee();
    let shared = Output::new(output, &codes);
    if output.is_empty() {
        return;
    }
    let (listed, wide) = outliers.map_or_else(Default::default, |outliers| gather(&codes, outliers));
    let panel = |columns: Range<usize>| Panel::new::<T>(&codes, &scales, &listed, columns);
    let row = |panel: &Panel, m: usize, sums: Sums<'_>| {
        let factor = scales.input.map_or(1.0, |scales| scales[m] * INVERSE_127_SQUARED);
        let outliers = &wide[m * listed.len()..][..listed.len()];
        // SAFETY: a panel of the weight is one thread's, and its rows are columns of the output.
        let output = unsafe { shared.row(m, &panel.columns) };
        finish(Row { sums, factor, panel, outliers }, output, execution.isa);
    };
    if codes.depth > 0 {
        return multiply(&codes, execution, panel, row);
    }
    let (panel, zeros) = (panel(0..codes.columns), vec![0; codes.columns.next_multiple_of(16)]);
    (0..codes.rows).for_each(|m| row(&panel, m, Sums::Narrow(&zeros)));
}

/// The columns of the mask, ascending, and the input there [M, columns] in float32.
fn gather<T: Float>(codes: &Codes<'_>, outliers: Outliers<'_, T>) -> (Vec<usize>, Vec<f32>) {
    assert_eq!(outliers.mask.len(), codes.depth, "a mask [K]");
    assert_eq!(outliers.input.len(), codes.input.len(), "an unquantized input [M, K]");
    let listed: Vec<usize> = (0..codes.depth).filter(|k| outliers.mask[*k] != 0).collect();
    let at = |m: usize| listed.iter().map(move |k| outliers.input[m * codes.depth + k].to_f32());
    let wide = (0..codes.rows).flat_map(at).collect();
    (listed, wide)
}

impl Panel {
    fn new<T: Float>(
        codes: &Codes<'_>,
        scales: &Scales<'_>,
        listed: &[usize],
        columns: Range<usize>,
    ) -> Self {
        let weight_scale = |n: usize| match scales.weight {
            Some([one]) => *one,
            Some(scales) => scales[n],
            None => 1.0,
        };
        let decoded = |n: usize, k: usize| {
            let code = f32::from(codes.weight[n * codes.depth + k]);
            T::from_f32(code * weight_scale(n) * INVERSE_127).to_f32()
        };
        let outliers = listed.iter().flat_map(|k| lines(&columns, |n| decoded(n, *k))).collect();
        let bias = lines(&columns, |n| scales.bias.map_or(0.0, |bias| bias[n])).collect();
        let scales = lines(&columns, weight_scale).collect();
        Self { columns, scales, bias, outliers }
    }
}

/// Values of columns in lines of sixteen, filled up with zeros.
fn lines(columns: &Range<usize>, value: impl Fn(usize) -> f32) -> impl Iterator<Item = [f32; 16]> {
    let (first, last) = (columns.start, columns.end);
    (first..last)
        .step_by(16)
        .map(move |begin| std::array::from_fn(|i| if begin + i < last { value(begin + i) } else { 0.0 }))
}
