//! 8-bit encoding and decoding with AVX-512.

use std::arch::x86_64::*;

use super::avx512::{abs_bits, load, store};
use super::blockwise_8bit::Scaling;
use super::buckets::Buckets;
use super::float::Float;

/// Encodes whole vectors and returns how many elements those are. Equal thresholds count as one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn encode<T: Float>(input: &[T], scaling: Scaling, buckets: &Buckets, codes: &mut [u8]) -> usize {
    let low = _mm512_set1_epi32(buckets.low as i32);
    let high = _mm512_set1_epi32(buckets.high as i32);
    let shift = _mm_cvtsi32_si128(buckets.shift as i32);
    let first = _mm512_set1_epi32((buckets.low >> buckets.shift) as i32);
    let negative_entries = _mm512_set1_epi32((buckets.entries.len() / 2) as i32);
    let one = _mm512_set1_epi32(1);
    let (vectors, _) = input.as_chunks::<16>();
    let (codes, _) = codes.as_chunks_mut::<16>();
    for (vector, codes) in vectors.iter().zip(codes) {
        let y = match scaling {
            Scaling::Multiply(inverse) => _mm512_mul_ps(load(vector), _mm512_set1_ps(inverse)),
            Scaling::Divide(absmax) => _mm512_div_ps(load(vector), _mm512_set1_ps(absmax)),
        };
        let y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_ORD_Q>(y, y), y);
        let is_negative = _mm512_movepi32_mask(_mm512_castps_si512(y));
        let bits = abs_bits(y);
        let bits = _mm512_max_epu32(bits, _mm512_add_epi32(low, _mm512_min_epu32(bits, one)));
        let bits = _mm512_min_epu32(bits, high);
        let index = _mm512_sub_epi32(_mm512_srl_epi32(bits, shift), first);
        let index = _mm512_mask_add_epi32(index, is_negative, index, negative_entries);
        // SAFETY: bits lie between `low` and `high`, so an index lies in the half of `entries` that its sign has.
        let entry = unsafe { _mm512_i32gather_epi32::<4>(index, buckets.entries.as_ptr().cast()) };
        let sum = _mm512_srli_epi32::<24>(_mm512_add_epi32(bits, entry));
        let rank = _mm512_mask_xor_epi32(sum, is_negative, sum, _mm512_set1_epi32(0xff));
        // SAFETY: the array holds the sixteen bytes that are written.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(rank)) };
    }
    vectors.len() * 16
}

/// Decodes whole vectors and returns how many elements those are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn decode<T: Float>(codes: &[u8], map: &[f32; 256], absmax: f32, output: &mut [T]) -> usize {
    let absmax = _mm512_set1_ps(absmax);
    let (outputs, _) = output.as_chunks_mut::<16>();
    let (codes, _) = codes.as_chunks::<16>();
    for (output, codes) in outputs.iter_mut().zip(codes) {
        // SAFETY: the array holds the sixteen bytes that are read.
        let index = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        // SAFETY: an index is a byte, and the map has 256 values.
        let values = unsafe { _mm512_i32gather_ps::<4>(index, map.as_ptr()) };
        store(output, _mm512_mul_ps(values, absmax));
    }
    codes.len() * 16
}
