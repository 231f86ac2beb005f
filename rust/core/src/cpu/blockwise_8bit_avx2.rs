//! 8-bit encoding and decoding with AVX2.

use std::arch::x86_64::*;

use super::avx2::{abs_bits, load, store};
use super::blockwise_8bit::Scaling;
use super::buckets::Buckets;
use super::float::Float;

/// Encodes whole vectors and returns how many elements those are. Equal thresholds count as one.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode<T: Float>(input: &[T], scaling: Scaling, buckets: &Buckets, codes: &mut [u8]) -> usize {
    let low = _mm256_set1_epi32(buckets.low as i32);
    let high = _mm256_set1_epi32(buckets.high as i32);
    let shift = _mm_cvtsi32_si128(buckets.shift as i32);
    let first = _mm256_set1_epi32((buckets.low >> buckets.shift) as i32);
    let negative_entries = _mm256_set1_epi32((buckets.entries.len() / 2) as i32);
    let one = _mm256_set1_epi32(1);
    let (vectors, _) = input.as_chunks::<8>();
    let (codes, _) = codes.as_chunks_mut::<8>();
    for (vector, codes) in vectors.iter().zip(codes) {
        let y = match scaling {
            Scaling::Multiply(inverse) => _mm256_mul_ps(load(vector), _mm256_set1_ps(inverse)),
            Scaling::Divide(absmax) => _mm256_div_ps(load(vector), _mm256_set1_ps(absmax)),
        };
        let y = _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_ORD_Q>(y, y));
        let is_negative = _mm256_srai_epi32::<31>(_mm256_castps_si256(y));
        let bits = abs_bits(y);
        let bits = _mm256_max_epu32(bits, _mm256_add_epi32(low, _mm256_min_epu32(bits, one)));
        let bits = _mm256_min_epu32(bits, high);
        let index = _mm256_sub_epi32(_mm256_srl_epi32(bits, shift), first);
        let index = _mm256_add_epi32(index, _mm256_and_si256(is_negative, negative_entries));
        // SAFETY: bits lie between `low` and `high`, so an index lies in the half of `entries` that its sign has.
        let entry = unsafe { _mm256_i32gather_epi32::<4>(buckets.entries.as_ptr().cast(), index) };
        let sum = _mm256_add_epi32(bits, entry);
        let rank = _mm256_srli_epi32::<24>(_mm256_xor_si256(sum, is_negative));
        // The low byte of each lane, four and four, side by side.
        let words = _mm256_packus_epi32(rank, rank);
        let bytes = _mm256_packus_epi16(words, words);
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(0, 0, 0, 0, 0, 0, 4, 0));
        *codes = _mm_cvtsi128_si64(_mm256_castsi256_si128(bytes)).to_le_bytes();
    }
    vectors.len() * 8
}

/// Decodes whole vectors and returns how many elements those are.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<T: Float>(codes: &[u8], map: &[f32; 256], absmax: f32, output: &mut [T]) -> usize {
    let absmax = _mm256_set1_ps(absmax);
    let (outputs, _) = output.as_chunks_mut::<8>();
    let (codes, _) = codes.as_chunks::<8>();
    for (output, codes) in outputs.iter_mut().zip(codes) {
        let index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*codes)));
        // SAFETY: an index is a byte, and the map has 256 values.
        let values = unsafe { _mm256_i32gather_ps::<4>(map.as_ptr(), index) };
        store(output, _mm256_mul_ps(values, absmax));
    }
    codes.len() * 8
}
