//! 4-bit quantization and decoding with AVX-512.

use std::arch::x86_64::*;

use super::Absmax;
use super::absmax::Scale;
use super::avx512::{abs_bits, load, round, store, store_bits};
use super::float::Float;
use crate::Dtype;
use crate::codebook::{AF4_THRESHOLDS, Codebook4, FP4_CODE_OF_RANK, FP4_THRESHOLDS, NF4_THRESHOLDS};

/// Equal buckets over the range of y, each of which holds at most one threshold: a code is the bucket's first, or the
/// next one where y is above the threshold. The bucket is `y * scale + offset`, rounded to an integer.
struct Buckets {
    scale: f32,
    offset: f32,
    thresholds: [f32; 32],
    /// Codes up to the threshold.
    low: [u32; 32],
    /// Codes above it.
    high: [u32; 32],
}

impl Buckets {
    /// Buckets for ascending thresholds and the codes between them.
    const fn new(scale: f32, offset: f32, thresholds: &[f32], codes: &[u8]) -> Self {
        let mut buckets =
            Self { scale, offset, thresholds: [f32::INFINITY; 32], low: [0; 32], high: [0; 32] };
        let mut rank = 0;
        let mut i = 0;
        while i < 32 {
            buckets.low[i] = codes[rank] as u32;
            // The end of a bucket, i + 0.5, is never near enough to a threshold for the rounding of the sum to matter.
            if rank < thresholds.len() && thresholds[rank] * scale + offset < i as f32 + 0.5 {
                buckets.thresholds[i] = thresholds[rank];
                rank += 1;
            }
            buckets.high[i] = codes[rank] as u32;
            i += 1;
        }
        assert!(rank == thresholds.len(), "no two thresholds in one bucket");
        buckets
    }

    /// Of nf4, af4 (whose order is that of -y) and the magnitudes of fp4. Thirty buckets of 1/15 with a boundary at 0,
    /// which parts af4's closest pair; eleven of 1/11.
    fn of(codebook: Codebook4) -> &'static Self {
        const CODES: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        const fn negative(mut thresholds: [f32; 15]) -> [f32; 15] {
            let mut i = 0;
            while i < 15 {
                thresholds[i] = -thresholds[i];
                i += 1;
            }
            thresholds
        }
        static NF4: Buckets = Buckets::new(15.0, 15.5, &NF4_THRESHOLDS, &CODES);
        static AF4: Buckets = Buckets::new(15.0, 15.5, &negative(AF4_THRESHOLDS), &CODES);
        static FP4: Buckets = Buckets::new(11.0, 0.3, &FP4_THRESHOLDS, &FP4_CODE_OF_RANK);
        match codebook {
            Codebook4::Nf4 => &NF4,
            Codebook4::Af4 => &AF4,
            Codebook4::Fp4 => &FP4,
        }
    }
}

/// The tables of [`Buckets`] in registers.
struct Encoder {
    scale: __m512,
    offset: __m512,
    thresholds: [__m512; 2],
    low: [__m512i; 2],
    high: [__m512i; 2],
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(buckets: &Buckets) -> Self {
        let floats = |values: &[f32; 32]| {
            let (halves, _) = values.as_chunks::<16>();
            [load(&halves[0]), load(&halves[1])]
        };
        let codes =
            |values: &[u32; 32]| floats(&values.map(f32::from_bits)).map(|half| _mm512_castps_si512(half));
        Self {
            scale: _mm512_set1_ps(buckets.scale),
            offset: _mm512_set1_ps(buckets.offset),
            thresholds: floats(&buckets.thresholds),
            low: codes(&buckets.low),
            high: codes(&buckets.high),
        }
    }

    /// Codes of sixteen scaled elements, one to a lane. Signed: fp4, whose table holds magnitudes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn encode<const SIGNED: bool>(&self, y: __m512) -> __m512i {
        let u = if SIGNED { _mm512_castsi512_ps(abs_bits(y)) } else { y };
        let bucket = _mm512_cvtps_epi32(_mm512_fmadd_ps(u, self.scale, self.offset));
        let threshold = _mm512_permutex2var_ps(self.thresholds[0], bucket, self.thresholds[1]);
        let is_above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u, threshold);
        let low = _mm512_permutex2var_epi32(self.low[0], bucket, self.low[1]);
        if !SIGNED {
            return _mm512_mask_add_epi32(low, is_above, low, _mm512_set1_epi32(1));
        }
        let high = _mm512_permutex2var_epi32(self.high[0], bucket, self.high[1]);
        let magnitude = _mm512_mask_mov_epi32(low, is_above, high);
        let is_negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(y, _mm512_setzero_ps());
        _mm512_mask_or_epi32(magnitude, is_negative, magnitude, _mm512_set1_epi32(8))
    }
}

/// Packs the codes of 64 elements, of which `codes[i]` holds 16 * i and the next 15.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack(codes: [__m512i; 4]) -> __m256i {
    // Byte i of lane l: element 16 * i + l.
    let low = _mm512_or_si512(codes[0], _mm512_slli_epi32::<8>(codes[1]));
    let high = _mm512_or_si512(_mm512_slli_epi32::<16>(codes[2]), _mm512_slli_epi32::<24>(codes[3]));
    let all = _mm512_or_si512(low, high);
    // Byte i of lane j: the pair 16 * i + 2 * j, its even element in the high nibble.
    let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(all), _mm512_srli_epi64::<32>(all));
    let pairs = _mm512_cvtepi64_epi32(pairs);
    // Transpose the bytes to the order of the elements.
    let columns = _mm256_set_epi8(
        15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0, 15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8,
        4, 0,
    );
    let rows = _mm256_shuffle_epi8(pairs, columns);
    _mm256_permutevar8x32_epi32(rows, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0))
}

/// Quantizes whole blocks of a multiple of 64 elements, or an even number of blocks of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn quantize<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let encoder = Encoder::new(Buckets::of(codebook));
    match codebook {
        Codebook4::Nf4 => quantize_with::<T, false>(&encoder, 1.0, input, block_size, packed, absmax),
        Codebook4::Af4 => quantize_with::<T, false>(&encoder, -1.0, input, block_size, packed, absmax),
        Codebook4::Fp4 => quantize_with::<T, true>(&encoder, 1.0, input, block_size, packed, absmax),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_with<T: Float, const SIGNED: bool>(
    encoder: &Encoder,
    sign: f32,
    input: &[T],
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let (vectors, _) = input.as_chunks::<16>();
    let (groups, _) = vectors.as_chunks::<4>();
    let (packed, _) = packed.as_chunks_mut::<32>();
    if block_size == 32 {
        for ((group, packed), absmax) in groups.iter().zip(packed).zip(absmax.as_chunks_mut::<2>().0) {
            let x = [load(&group[0]), load(&group[1]), load(&group[2]), load(&group[3])];
            let first = scale_of(max(abs_bits(x[0]), abs_bits(x[1])), sign, &mut absmax[0]);
            let second = scale_of(max(abs_bits(x[2]), abs_bits(x[3])), sign, &mut absmax[1]);
            let codes = [
                encoder.encode::<SIGNED>(first.apply(x[0])),
                encoder.encode::<SIGNED>(first.apply(x[1])),
                encoder.encode::<SIGNED>(second.apply(x[2])),
                encoder.encode::<SIGNED>(second.apply(x[3])),
            ];
            store_packed(packed, pack(codes));
        }
        return;
    }
    let blocks = groups.chunks(block_size / 64).zip(packed.chunks_mut(block_size / 64));
    for ((groups, packed), absmax) in blocks.zip(absmax) {
        let mut largest = _mm512_setzero_si512();
        for group in groups {
            let a = max(abs_bits(load(&group[0])), abs_bits(load(&group[1])));
            let b = max(abs_bits(load(&group[2])), abs_bits(load(&group[3])));
            largest = max(largest, max(a, b));
        }
        let scale = scale_of(largest, sign, absmax);
        for (group, packed) in groups.iter().zip(packed) {
            let codes = [
                encoder.encode::<SIGNED>(scale.apply(load(&group[0]))),
                encoder.encode::<SIGNED>(scale.apply(load(&group[1]))),
                encoder.encode::<SIGNED>(scale.apply(load(&group[2]))),
                encoder.encode::<SIGNED>(scale.apply(load(&group[3]))),
            ];
            store_packed(packed, pack(codes));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn max(a: __m512i, b: __m512i) -> __m512i {
    _mm512_max_epu32(a, b)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn store_packed(to: &mut [u8; 32], packed: __m256i) {
    // SAFETY: the array holds the 32 bytes that are written.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), packed) };
}

/// A block's inverse in every lane, and the lanes that it counts in: none where it is 0, since 0 * Inf is NaN.
struct Inverse {
    inverse: __m512,
    lanes: __mmask16,
}

impl Inverse {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn apply(&self, x: __m512) -> __m512 {
        _mm512_maskz_mul_ps(self.lanes, x, self.inverse)
    }
}

/// Stores the absmax of lane maxima and returns its inverse with `sign`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn scale_of(largest: __m512i, sign: f32, absmax: &mut f32) -> Inverse {
    let scale = Scale::from_bits(_mm512_reduce_max_epu32(largest));
    *absmax = scale.absmax;
    let lanes = if scale.inverse == 0.0 { 0 } else { 0xffff };
    Inverse { inverse: _mm512_set1_ps(scale.inverse * sign), lanes }
}

/// How far ahead lines of the output are claimed for writing: 4 Mi elements to bfloat16 take 0.37 ms instead of 0.41.
const PREFETCH_BYTES: usize = 4096;

/// Decodes whole groups of 64 elements, which begin at `first`, a multiple of 64.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn decode<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    values: &[f32; 16],
    block_size: usize,
    first: usize,
    output: &mut [T],
) {
    let values = load(values);
    let (groups, _) = output.as_chunks_mut::<64>();
    let (packed, _) = packed[first / 2..].as_chunks::<32>();
    let shift = block_size.trailing_zeros();
    for (i, (output, packed)) in groups.iter_mut().zip(packed).enumerate() {
        let begin = first + 64 * i;
        // Sixteen products serve a whole block: decoding is a look-up.
        let products = |begin: usize| _mm512_mul_ps(values, _mm512_set1_ps(absmax.get(begin >> shift)));
        let low = products(begin);
        let high = if block_size == 32 { products(begin + 32) } else { low };
        for line in 0..size_of::<[T; 64]>() / 64 {
            _mm_prefetch::<_MM_HINT_ET0>(
                output.as_ptr().wrapping_byte_add(PREFETCH_BYTES + 64 * line).cast(),
            );
        }
        let (outputs, _) = output.as_chunks_mut::<32>();
        let (packed, _) = packed.as_chunks::<16>();
        if T::DTYPE == Dtype::Float32 {
            decode_float32(&packed[0], low, &mut outputs[0]);
            decode_float32(&packed[1], high, &mut outputs[1]);
        } else {
            let low_words = both_words::<T>(low);
            let high_words = if block_size == 32 { both_words::<T>(high) } else { low_words };
            decode_words(&packed[0], low_words, &mut outputs[0]);
            decode_words(&packed[1], high_words, &mut outputs[1]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode_float32<T: Float>(packed: &[u8; 16], products: __m512, output: &mut [T; 32]) {
    // The shift that brings an element's nibble down, in the 4 bytes of its 8 elements; VPERMPS looks at 4 bits.
    let shifts = _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4);
    let (words, _) = packed.as_chunks::<4>();
    let word = |i: usize| _mm512_set1_epi32(i32::from_le_bytes(words[i]));
    let (halves, _) = output.as_chunks_mut::<16>();
    for (i, half) in halves.iter_mut().enumerate() {
        let codes = _mm512_mask_mov_epi32(word(2 * i), 0xff00, word(2 * i + 1));
        store(half, _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts), products));
    }
}

/// Each product rounded to the type, in both words of its lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn both_words<T: Float>(products: __m512) -> __m512i {
    let words = round::<T>(products);
    _mm512_or_si512(words, _mm512_slli_epi32::<16>(words))
}

/// VPERMW looks at five bits, of which the first does not count in a table of [`both_words`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn decode_words<T: Float>(packed: &[u8; 16], table: __m512i, output: &mut [T; 32]) {
    // SAFETY: the array holds the 16 bytes that are read.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(packed.as_ptr().cast()) });
    let codes = _mm512_or_si512(_mm512_srli_epi32::<3>(bytes), _mm512_slli_epi32::<17>(bytes));
    store_bits(output, _mm512_permutexvar_epi16(codes, table));
}
