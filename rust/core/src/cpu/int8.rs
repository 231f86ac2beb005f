//! int8 codes with one scale for each row, each column, or the whole tensor.
//! Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2; Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Execution;
use super::absmax::{Scale, max_abs_bits};
use super::float::Float;
use super::isa::{Isa, Level};
use super::threads::{FloatEnvironment, for_each, part_len};
#[cfg(target_arch = "x86_64")]
use super::{int8_avx2, int8_avx512};

/// RN(1 / 127): codes decode to RN(RN(code * absmax) * this).
pub(super) const RECIPROCAL_OF_127: f32 = f32::from_bits(0x3c01_0204);
/// Elements that are worked on at once where rows do not matter.
const FLAT_ROW: usize = 4096;
/// Elements that are searched for outliers one by one where there is one among them.
const PIECE: usize = 64;
/// Rows and columns of a tile that is transposed: 4 KB of codes.
const TILE: usize = 64;

/// Elements in row-major order.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    /// rows * columns elements.
    pub elements: &'a [T],
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

/// What elements that lie side by side are scaled by.
#[derive(Clone, Copy, Debug)]
pub enum ElementScales<'a> {
    /// All by one.
    One(f32),
    /// Each by its own.
    Each(&'a [f32]),
}

impl<'a> ElementScales<'a> {
    /// Those of the `len` elements from `first` on.
    fn part(self, first: usize, len: usize) -> Self {
        match self {
            Self::One(scale) => Self::One(scale),
            Self::Each(scales) => Self::Each(&scales[first..first + len]),
        }
    }

    /// That of element `i`.
    pub(super) fn get(self, i: usize) -> f32 {
        match self {
            Self::One(scale) => scale,
            Self::Each(scales) => scales[i],
        }
    }
}

/// Quantizes every row by its own scale.
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_rowwise<T: Float>(
    input: Matrix<T>,
    codes: &mut [i8],
    scales: &mut [f32],
    execution: Execution,
) {
    for_each_row(input, codes, scales, execution, |row, codes| {
        quantize_row(row, max_abs_bits(row, execution.isa), codes, execution.isa)
    });
}

/// The same over elements below `threshold`. Columns with a larger one are marked in `mask` [columns], and their codes are
/// 0 in all rows.
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_rowwise_outliers<T: Float>(
    input: Matrix<T>,
    threshold: f32,
    codes: &mut [i8],
    scales: &mut [f32],
    mask: &mut [u8],
    execution: Execution,
) {
    assert_eq!(mask.len(), input.columns, "a mark for every column");
    mask.fill(0);
    let shared_mask = Mutex::new(&mut *mask);
    for_each_row(input, codes, scales, execution, |row, codes| {
        let bits = max_abs_bits(row, execution.isa);
        if bits < threshold.to_bits() {
            return quantize_row(row, bits, codes, execution.isa);
        }
        let (mut kept, mut outliers) = (row.to_vec(), Vec::new());
        for (piece, first) in kept.chunks_mut(PIECE).zip((0..).step_by(PIECE)) {
            if max_abs_bits(piece, execution.isa) < threshold.to_bits() {
                continue;
            }
            for (i, x) in piece.iter_mut().enumerate() {
                if x.to_f32().abs() >= threshold {
                    *x = T::default(); // a NaN is no outlier
                    outliers.push(first + i);
                }
            }
        }
        let mut mask = shared_mask.lock().unwrap_or_else(PoisonError::into_inner);
        outliers.into_iter().for_each(|column| mask[column] = 1);
        drop(mask);
        quantize_row(&kept, max_abs_bits(&kept, execution.isa), codes, execution.isa)
    });
    let outliers: Vec<_> = (0..mask.len()).filter(|&column| mask[column] != 0).collect();
    if !outliers.is_empty() {
        for row in codes.chunks_exact_mut(input.columns) {
            outliers.iter().for_each(|&column| row[column] = 0);
        }
    }
}

/// Calls `work` for every row with its codes, and stores the scale that it returns.
fn for_each_row<T: Float>(
    input: Matrix<T>,
    codes: &mut [i8],
    scales: &mut [f32],
    execution: Execution,
    work: impl Fn(&[T], &mut [i8]) -> f32 + Sync,
) {
    let Matrix { elements, rows, columns } = input;
    assert!(elements.len() == rows * columns && codes.len() == rows * columns && scales.len() == rows);
    let _ieee = FloatEnvironment::ieee();
    if columns == 0 {
        return scales.fill(0.0);
    }
    let len = part_len(elements.len(), columns, execution.threads);
    let parts = elements.chunks(len).zip(codes.chunks_mut(len)).zip(scales.chunks_mut(len / columns));
    for_each(execution.threads, parts, |((elements, codes), scales)| {
        let rows = elements.chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
        for ((row, codes), scale) in rows.zip(scales) {
            *scale = work(row, codes);
        }
    });
}

/// Codes of a row whose largest magnitude has these bits; its scale.
fn quantize_row<T: Float>(row: &[T], max_bits: u32, codes: &mut [i8], isa: Isa) -> f32 {
    let scale = Scale::of_int8(max_bits);
    encode(row, ElementScales::One(scale.inverse), codes, isa);
    scale.absmax
}

/// The scale of every column to `scales` [columns]; what columns are multiplied by for codes.
///
/// # Panics
/// Where lengths do not fit.
pub fn find_column_scales<T: Float>(input: Matrix<T>, scales: &mut [f32], execution: Execution) -> Vec<f32> {
    let Matrix { elements, rows, columns } = input;
    assert!(elements.len() == rows * columns && scales.len() == columns, "a scale for every column");
    let _ieee = FloatEnvironment::ieee();
    let mut maxima = vec![0; columns];
    if !elements.is_empty() {
        let shared_maxima = Mutex::new(&mut maxima);
        let len = part_len(elements.len(), columns, execution.threads);
        for_each(execution.threads, elements.chunks(len), |elements| {
            let mut own = vec![0; columns];
            for row in elements.chunks_exact(columns) {
                max_with(row, &mut own, execution.isa);
            }
            let mut maxima = shared_maxima.lock().unwrap_or_else(PoisonError::into_inner);
            maxima.iter_mut().zip(own).for_each(|(max, own)| *max = own.max(*max));
        });
    }
    let found = maxima.into_iter().map(Scale::of_int8).zip(scales);
    found
        .map(|(scale, stored)| {
            *stored = scale.absmax;
            scale.inverse
        })
        .collect()
}

/// The scale of all elements, and what they are multiplied by for codes.
pub fn find_tensor_scale<T: Float>(input: &[T], execution: Execution) -> (f32, f32) {
    let _ieee = FloatEnvironment::ieee();
    let max_bits = AtomicU32::new(0);
    let len = part_len(input.len(), FLAT_ROW, execution.threads);
    for_each(execution.threads, input.chunks(len), |input| {
        max_bits.fetch_max(max_abs_bits(input, execution.isa), Ordering::Relaxed);
    });
    let scale = Scale::of_int8(max_bits.into_inner());
    (scale.absmax, scale.inverse)
}

/// Codes of a matrix whose columns, or all of it, are multiplied by `inverses`.
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_matrix<T: Float>(
    input: Matrix<T>,
    inverses: ElementScales,
    codes: &mut [i8],
    execution: Execution,
) {
    let elements = input.elements;
    assert_eq!(elements.len(), codes.len(), "a code for every element");
    if elements.is_empty() {
        return;
    }
    let _ieee = FloatEnvironment::ieee();
    let columns = if let ElementScales::One(_) = inverses { FLAT_ROW } else { input.columns };
    let len = part_len(elements.len(), columns, execution.threads);
    for_each(execution.threads, elements.chunks(len).zip(codes.chunks_mut(len)), |(elements, codes)| {
        for (row, codes) in elements.chunks(columns).zip(codes.chunks_mut(columns)) {
            encode(row, inverses, codes, execution.isa);
        }
    });
}

/// The same, codes [columns, rows].
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_transposed<T: Float>(
    input: Matrix<T>,
    inverses: ElementScales,
    codes: &mut [i8],
    execution: Execution,
) {
    let Matrix { elements, rows, columns } = input;
    assert!(elements.len() == rows * columns && codes.len() == rows * columns, "a code for every element");
    if elements.is_empty() {
        return;
    }
    let _ieee = FloatEnvironment::ieee();
    // Bands of columns, whose codes lie side by side.
    let bands = codes.chunks_mut(TILE * rows).enumerate();
    let threads =
        if part_len(elements.len(), 1, execution.threads) < elements.len() { execution.threads } else { 1 };
    for_each(threads, bands, |(band, codes)| {
        let (first, width) = (band * TILE, codes.len() / rows);
        let inverses = inverses.part(first, width);
        let mut tile = [[0i8; TILE]; TILE];
        for first_row in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - first_row);
            for (i, tile) in tile[..height].iter_mut().enumerate() {
                let start = (first_row + i) * columns + first;
                encode(&elements[start..start + width], inverses, &mut tile[..width], execution.isa);
            }
            for (column, codes) in codes.chunks_exact_mut(rows).enumerate() {
                let codes = &mut codes[first_row..first_row + height];
                codes.iter_mut().zip(&tile).for_each(|(code, row)| *code = row[column]);
            }
        }
    });
}

/// Decodes a matrix: every row by its own scale (`row_scales`), else by `scales`, of its columns or of all of it.
///
/// # Panics
/// Where lengths do not fit.
pub fn dequantize_matrix<T: Float>(
    codes: Matrix<i8>,
    row_scales: Option<&[f32]>,
    scales: ElementScales,
    output: &mut [T],
    execution: Execution,
) {
    let Matrix { elements, rows, columns } = codes;
    assert!(elements.len() == rows * columns && output.len() == rows * columns, "an output for every code");
    if elements.is_empty() {
        return;
    }
    let _ieee = FloatEnvironment::ieee();
    let is_flat = matches!((row_scales, scales), (None, ElementScales::One(_)));
    let columns = if is_flat { FLAT_ROW } else { columns };
    let len = part_len(elements.len(), columns, execution.threads);
    let parts = elements.chunks(len).zip(output.chunks_mut(len)).enumerate();
    for_each(execution.threads, parts, |(part, (codes, output))| {
        let first = part * (len / columns);
        let rows = codes.chunks(columns).zip(output.chunks_mut(columns));
        for (i, (codes, output)) in rows.enumerate() {
            let scales = row_scales.map_or(scales, |row_scales| ElementScales::One(row_scales[first + i]));
            decode(codes, scales, output, execution.isa);
        }
    });
}

/// maxima[i] = the larger of it and the magnitude of row[i], as bits.
fn max_with<T: Float>(row: &[T], maxima: &mut [u32], isa: Isa) {
    let done = match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { int8_avx512::max_with(row, maxima) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { int8_avx2::max_with(row, maxima) },
        Level::Scalar => 0,
    };
    for (max, x) in maxima[done..].iter_mut().zip(&row[done..]) {
        *max = x.to_f32().abs().to_bits().max(*max);
    }
}

/// RN(x * inverse) to the nearest integer, ties to even; 0 where the inverse is 0, whatever x is.
fn encode<T: Float>(input: &[T], inverses: ElementScales, codes: &mut [i8], isa: Isa) {
    if let ElementScales::One(0.0) = inverses {
        return codes.fill(0);
    }
    let done = match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { int8_avx512::encode(input, inverses, codes) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { int8_avx2::encode(input, inverses, codes) },
        Level::Scalar => 0,
    };
    for (i, (code, x)) in codes.iter_mut().zip(input).enumerate().skip(done) {
        let inverse = inverses.get(i);
        *code = if inverse == 0.0 { 0 } else { (x.to_f32() * inverse).round_ties_even() as i8 };
    }
}

/// RN(RN(code * scale) / 127), then one rounding to T.
fn decode<T: Float>(codes: &[i8], scales: ElementScales, output: &mut [T], isa: Isa) {
    let done = match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { int8_avx512::decode(codes, scales, output) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { int8_avx2::decode(codes, scales, output) },
        Level::Scalar => 0,
    };
    for (i, (output, code)) in output.iter_mut().zip(codes).enumerate().skip(done) {
        *output = T::from_f32(f32::from(*code) * scales.get(i) * RECIPROCAL_OF_127);
    }
}
