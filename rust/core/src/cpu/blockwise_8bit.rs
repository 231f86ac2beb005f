//! 8-bit blockwise quantization with any ascending map of 256 values.
//! Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.1.

use super::Execution;
use super::absmax::Scale;
use super::buckets::Buckets;
use super::float::Float;
use super::isa::{Isa, Level};
use super::threads::{FloatEnvironment, for_each, part_len};
#[cfg(target_arch = "x86_64")]
use super::{blockwise_8bit_avx2 as avx2, blockwise_8bit_avx512 as avx512};
use crate::codebook::Thresholds;

/// Elements below which searching the thresholds costs less than building a table.
const MIN_TABLE: usize = 4096;

/// How an element becomes what the thresholds are compared with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scaling {
    /// x * inverse
    Multiply(f32),
    /// x / absmax, correctly rounded
    Divide(f32),
}

/// Quantizes `input` [n] with the ascending `map` to `codes` [n] and `absmax` [ceil_div(n, block_size)].
///
/// # Panics
/// Where lengths do not fit.
pub fn quantize_blockwise<T: Float>(
    input: &[T],
    map: &[f32; 256],
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
    execution: Execution,
) {
    assert_eq!(codes.len(), input.len(), "a code for every element");
    assert_eq!(absmax.len(), input.len().div_ceil(block_size), "an absmax for every block");
    let _ieee = FloatEnvironment::ieee();
    let encoder = Encoder::new(map, input.len(), execution.isa);
    let zero_code = encoder.zero_code();
    let len = part_len(input.len(), block_size, execution.threads);
    let parts = input.chunks(len).zip(codes.chunks_mut(len)).zip(absmax.chunks_mut(len / block_size));
    for_each(execution.threads, parts, |((input, codes), absmax)| {
        let blocks = input.chunks(block_size).zip(codes.chunks_mut(block_size)).zip(absmax);
        for ((block, codes), absmax) in blocks {
            let scale = Scale::of(block, execution.isa);
            *absmax = scale.absmax;
            match scale.inverse {
                0.0 => codes.fill(zero_code),
                inverse => encoder.encode(block, Scaling::Multiply(inverse), codes, execution.isa),
            }
        }
    });
}

/// Decodes `codes` [n] to `output` [n].
///
/// # Panics
/// Where lengths do not fit.
pub fn dequantize_blockwise<T: Float>(
    codes: &[u8],
    absmax: &[f32],
    map: &[f32; 256],
    block_size: usize,
    output: &mut [T],
    execution: Execution,
) {
    assert_eq!(codes.len(), output.len(), "a code for every element");
    assert_eq!(absmax.len(), output.len().div_ceil(block_size), "an absmax for every block");
    let _ieee = FloatEnvironment::ieee();
    let len = part_len(output.len(), block_size, execution.threads);
    let parts = codes.chunks(len).zip(output.chunks_mut(len)).zip(absmax.chunks(len / block_size));
    for_each(execution.threads, parts, |((codes, output), absmax)| {
        let blocks = codes.chunks(block_size).zip(output.chunks_mut(block_size)).zip(absmax);
        for ((codes, output), &absmax) in blocks {
            decode(codes, map, absmax, output, execution.isa);
        }
    });
}

/// What turns scaled elements into codes.
pub(super) struct Encoder {
    thresholds: Thresholds,
    /// Where SIMD has enough to do.
    buckets: Option<Buckets>,
}

impl Encoder {
    /// For `n` elements.
    pub(super) fn new(map: &[f32; 256], n: usize, isa: Isa) -> Self {
        let thresholds = Thresholds::new(map);
        let pays = isa != Isa::SCALAR && n >= MIN_TABLE;
        let buckets = if pays { Buckets::new(&thresholds) } else { None };
        Self { thresholds, buckets }
    }

    /// Code of 0.0.
    pub(super) fn zero_code(&self) -> u8 {
        self.thresholds.encode(0.0)
    }

    /// Codes of the scaled elements. NaN counts as 0.0.
    pub(super) fn encode<T: Float>(&self, input: &[T], scaling: Scaling, codes: &mut [u8], isa: Isa) {
        let done = self.encode_vectors(input, scaling, codes, isa);
        for (code, x) in codes[done..].iter_mut().zip(&input[done..]) {
            *code = self.thresholds.encode(match scaling {
                Scaling::Multiply(inverse) => x.to_f32() * inverse,
                Scaling::Divide(absmax) => x.to_f32() / absmax,
            });
        }
    }

    /// Encodes as many elements as fill vectors and returns their number.
    fn encode_vectors<T: Float>(&self, input: &[T], scaling: Scaling, codes: &mut [u8], isa: Isa) -> usize {
        let Some(buckets) = &self.buckets else { return 0 };
        let done = match isa.level() {
            // SAFETY: an `Isa` of this level exists only where the CPU has the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::encode(input, scaling, buckets, codes) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::encode(input, scaling, buckets, codes) },
            Level::Scalar => 0,
        };
        if let Some(code_of_rank) = &buckets.code_of_rank {
            codes[..done].iter_mut().for_each(|code| *code = code_of_rank[usize::from(*code)]);
        }
        done
    }
}

/// `map[code] * absmax`, rounded to the output's type.
pub(super) fn decode<T: Float>(codes: &[u8], map: &[f32; 256], absmax: f32, output: &mut [T], isa: Isa) {
    let done = match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::decode(codes, map, absmax, output) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::decode(codes, map, absmax, output) },
        Level::Scalar => 0,
    };
    for (output, &code) in output[done..].iter_mut().zip(&codes[done..]) {
        *output = T::from_f32(map[usize::from(code)] * absmax);
    }
}
