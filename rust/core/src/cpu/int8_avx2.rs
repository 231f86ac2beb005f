//! int8 encoding and decoding with AVX2. Each function works on whole vectors and returns how many elements those are.

use std::arch::x86_64::*;

use super::avx2::{abs_bits, load, store};
use super::float::Float;
use super::int8::{ElementScales, RECIPROCAL_OF_127};

/// Eight scales, from element `first` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_scales(scales: ElementScales, first: usize) -> __m256 {
    match scales {
        ElementScales::One(scale) => _mm256_set1_ps(scale),
        ElementScales::Each(scales) => {
            load(scales[first..].first_chunk::<8>().expect("a scale for each element"))
        }
    }
}

/// `int8::max_with`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn max_with<T: Float>(row: &[T], maxima: &mut [u32]) -> usize {
    let (vectors, _) = row.as_chunks::<8>();
    let (maxima, _) = maxima.as_chunks_mut::<8>();
    for (vector, max) in vectors.iter().zip(maxima) {
        let max = max.as_mut_ptr().cast();
        // SAFETY: `max` points to eight numbers of four bytes: 32 bytes.
        unsafe {
            _mm256_storeu_si256(max, _mm256_max_epu32(_mm256_loadu_si256(max), abs_bits(load(vector))))
        };
    }
    vectors.len() * 8
}

/// `int8::encode`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn encode<T: Float>(input: &[T], inverses: ElementScales, codes: &mut [i8]) -> usize {
    let (vectors, _) = input.as_chunks::<8>();
    let (codes, _) = codes.as_chunks_mut::<8>();
    for (i, (vector, codes)) in vectors.iter().zip(codes).enumerate() {
        let inverse = load_scales(inverses, i * 8);
        let is_usable = _mm256_cmp_ps::<_CMP_NEQ_UQ>(inverse, _mm256_setzero_ps());
        let code = _mm256_cvtps_epi32(_mm256_mul_ps(load(vector), inverse));
        let code = _mm256_and_si256(code, _mm256_castps_si256(is_usable));
        // The low byte of each lane, four and four, side by side.
        let words = _mm256_packs_epi32(code, code);
        let bytes = _mm256_packs_epi16(words, words);
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(0, 0, 0, 0, 0, 0, 4, 0));
        // SAFETY: the array holds eight bytes.
        unsafe { _mm_storel_epi64(codes.as_mut_ptr().cast(), _mm256_castsi256_si128(bytes)) };
    }
    vectors.len() * 8
}

/// `int8::decode`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn decode<T: Float>(codes: &[i8], scales: ElementScales, output: &mut [T]) -> usize {
    let (outputs, _) = output.as_chunks_mut::<8>();
    let (vectors, _) = codes.as_chunks::<8>();
    for (i, (output, codes)) in outputs.iter_mut().zip(vectors).enumerate() {
        // SAFETY: the array holds eight bytes.
        let codes = unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) };
        let scaled =
            _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), load_scales(scales, i * 8));
        store(output, _mm256_mul_ps(scaled, _mm256_set1_ps(RECIPROCAL_OF_127)));
    }
    vectors.len() * 8
}
