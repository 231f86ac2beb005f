//! int8 encoding and decoding with AVX-512. Each function works on whole vectors and returns how many elements those are.

use std::arch::x86_64::*;

use super::avx512::{abs_bits, load, store};
use super::float::Float;
use super::int8::{ElementScales, RECIPROCAL_OF_127};

/// Sixteen scales, from element `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn load_scales(scales: ElementScales, first: usize) -> __m512 {
    match scales {
        ElementScales::One(scale) => _mm512_set1_ps(scale),
        ElementScales::Each(scales) => {
            load(scales[first..].first_chunk::<16>().expect("a scale for each element"))
        }
    }
}

/// `int8::max_with`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn max_with<T: Float>(row: &[T], maxima: &mut [u32]) -> usize {
    let (vectors, _) = row.as_chunks::<16>();
    let (maxima, _) = maxima.as_chunks_mut::<16>();
    for (vector, max) in vectors.iter().zip(maxima) {
        let max = max.as_mut_ptr().cast();
        // SAFETY: `max` points to sixteen numbers of four bytes: 64 bytes.
        unsafe {
            _mm512_storeu_si512(max, _mm512_max_epu32(_mm512_loadu_si512(max), abs_bits(load(vector))))
        };
    }
    vectors.len() * 16
}

/// `int8::encode`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn encode<T: Float>(input: &[T], inverses: ElementScales, codes: &mut [i8]) -> usize {
    let (vectors, _) = input.as_chunks::<16>();
    let (codes, _) = codes.as_chunks_mut::<16>();
    for (i, (vector, codes)) in vectors.iter().zip(codes).enumerate() {
        let inverse = load_scales(inverses, i * 16);
        let is_usable = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(inverse, _mm512_setzero_ps());
        let code = _mm512_maskz_cvtps_epi32(is_usable, _mm512_mul_ps(load(vector), inverse));
        // SAFETY: the array holds sixteen bytes.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(code)) };
    }
    vectors.len() * 16
}

/// `int8::decode`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn decode<T: Float>(codes: &[i8], scales: ElementScales, output: &mut [T]) -> usize {
    let (outputs, _) = output.as_chunks_mut::<16>();
    let (vectors, _) = codes.as_chunks::<16>();
    for (i, (output, codes)) in outputs.iter_mut().zip(vectors).enumerate() {
        // SAFETY: the array holds sixteen bytes.
        let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        let scaled =
            _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), load_scales(scales, i * 16));
        store(output, _mm512_mul_ps(scaled, _mm512_set1_ps(RECIPROCAL_OF_127)));
    }
    vectors.len() * 16
}
