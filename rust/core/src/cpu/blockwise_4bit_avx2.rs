//! 4-bit quantization and decoding with AVX2.

use std::arch::x86_64::*;

use super::Absmax;
use super::absmax::Scale;
use super::avx2::{abs_bits, load, max_abs_bits, store};
use super::float::Float;
use crate::codebook::{Codebook4, FP4_CODE_OF_RANK};

/// What an element is compared with, and how its rank becomes a code.
struct Encoder {
    /// Ascending, infinite where there are fewer.
    thresholds: [f32; 15],
    /// fp4: thresholds are of magnitudes, and the rank is looked up.
    is_fp4: bool,
    code_of_rank: __m256i,
}

impl Encoder {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(codebook: Codebook4) -> Self {
        let sign = order(codebook);
        let mut thresholds = [f32::INFINITY; 15];
        for (threshold, t) in thresholds.iter_mut().zip(codebook.thresholds()) {
            *threshold = sign * t;
        }
        let codes = i64::from_le_bytes(FP4_CODE_OF_RANK);
        let code_of_rank = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(codes));
        Self { thresholds, is_fp4: codebook == Codebook4::Fp4, code_of_rank }
    }

    /// Codes of eight scaled elements, one to a lane.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn encode(&self, y: __m256) -> __m256i {
        let u = if self.is_fp4 { _mm256_castsi256_ps(abs_bits(y)) } else { y };
        let thresholds = if self.is_fp4 { &self.thresholds[..7] } else { &self.thresholds[..] };
        let mut rank = _mm256_setzero_si256();
        for &threshold in thresholds {
            let is_above = _mm256_cmp_ps::<_CMP_GT_OQ>(u, _mm256_set1_ps(threshold));
            rank = _mm256_sub_epi32(rank, _mm256_castps_si256(is_above));
        }
        if !self.is_fp4 {
            return rank;
        }
        let is_negative = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(y, _mm256_setzero_ps()));
        let sign = _mm256_and_si256(is_negative, _mm256_set1_epi32(8));
        _mm256_or_si256(_mm256_permutevar8x32_epi32(self.code_of_rank, rank), sign)
    }
}

/// af4 descends, so its codes are the ranks of -y among the negative thresholds.
fn order(codebook: Codebook4) -> f32 {
    if codebook == Codebook4::Af4 { -1.0 } else { 1.0 }
}

/// 32 codes from four vectors, a byte each, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn narrow(codes: [__m256i; 4]) -> __m256i {
    let words = [_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3])];
    let bytes = _mm256_packus_epi16(words[0], words[1]);
    _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0))
}

/// Packs 64 codes, a byte each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pack(codes: [__m256i; 2]) -> __m256i {
    let weights = _mm256_set1_epi16(0x0110);
    let pairs =
        _mm256_packus_epi16(_mm256_maddubs_epi16(codes[0], weights), _mm256_maddubs_epi16(codes[1], weights));
    _mm256_permute4x64_epi64::<0b1101_1000>(pairs)
}

/// Quantizes whole blocks of a multiple of 64 elements, or an even number of blocks of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize<T: Float>(
    input: &[T],
    codebook: Codebook4,
    block_size: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    let encoder = Encoder::new(codebook);
    let blocks_in_group = (64 / block_size).max(1);
    let unit = block_size.max(64);
    let units = input.chunks_exact(unit).zip(packed.chunks_exact_mut(unit / 2));
    for ((input, packed), absmax) in units.zip(absmax.chunks_mut(blocks_in_group)) {
        let mut inverses = [0.0; 2];
        for (i, block) in input.chunks(block_size).enumerate() {
            let scale = Scale::from_bits(max_abs_bits(block));
            absmax[i] = scale.absmax;
            inverses[i] = scale.inverse * order(codebook);
        }
        if blocks_in_group == 1 {
            inverses[1] = inverses[0];
        }
        let (groups, _) = input.as_chunks::<32>();
        let (packed, _) = packed.as_chunks_mut::<32>();
        for (pair, packed) in groups.as_chunks::<2>().0.iter().zip(packed) {
            let codes = [
                encode_group(&encoder, &pair[0], inverses[0]),
                encode_group(&encoder, &pair[1], inverses[1]),
            ];
            // SAFETY: the array holds the 32 bytes that are written.
            unsafe { _mm256_storeu_si256(packed.as_mut_ptr().cast(), pack(codes)) };
        }
    }
}

/// Codes of 32 elements; of 0.0 where the inverse is 0, since 0 * Inf is NaN.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn encode_group<T: Float>(encoder: &Encoder, input: &[T; 32], inverse: f32) -> __m256i {
    let (vectors, _) = input.as_chunks::<8>();
    let mut codes = [_mm256_setzero_si256(); 4];
    for (codes, vector) in codes.iter_mut().zip(vectors) {
        let y = match inverse {
            0.0 => _mm256_setzero_ps(),
            _ => _mm256_mul_ps(load(vector), _mm256_set1_ps(inverse)),
        };
        *codes = encoder.encode(y);
    }
    narrow(codes)
}

/// Decodes whole groups of 32 elements, which begin at `first`, a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<T: Float>(
    packed: &[u8],
    absmax: Absmax<'_>,
    values: &[f32; 16],
    block_size: usize,
    first: usize,
    output: &mut [T],
) {
    let (tables, _) = values.as_chunks::<8>();
    let tables = [load(&tables[0]), load(&tables[1])];
    // The shift that brings an element's nibble down, in the 4 bytes of 8 elements; VPERMPS looks at three bits.
    let shifts = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
    let (groups, _) = output.as_chunks_mut::<32>();
    let (packed, _) = packed[first / 2..].as_chunks::<16>();
    for (i, (output, packed)) in groups.iter_mut().zip(packed).enumerate() {
        let scale = _mm256_set1_ps(absmax.get((first + 32 * i) / block_size));
        let products = tables.map(|table| _mm256_mul_ps(table, scale));
        let (words, _) = packed.as_chunks::<4>();
        let (outputs, _) = output.as_chunks_mut::<8>();
        for (output, word) in outputs.iter_mut().zip(words) {
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*word)), shifts);
            let low = _mm256_permutevar8x32_ps(products[0], codes);
            let high = _mm256_permutevar8x32_ps(products[1], codes);
            let fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            store(output, _mm256_blendv_ps(low, high, fourth_bit));
        }
    }
}
