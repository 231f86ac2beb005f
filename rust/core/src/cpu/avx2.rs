//! AVX2 loads, stores and reductions of every element type, as eight float32.

use std::arch::x86_64::*;

use super::absmax::max_abs_bits_scalar;
use super::float::Float;
use crate::Dtype;

/// Eight elements, exact.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load<T: Float>(from: &[T; 8]) -> __m256 {
    let from = from.as_ptr();
    if T::DTYPE == Dtype::Float32 {
        // SAFETY: T is f32, and the array holds eight: 32 bytes.
        return unsafe { _mm256_loadu_ps(from.cast()) };
    }
    // SAFETY: the other types have two bytes, and the array holds eight: 16 bytes.
    let halves = unsafe { _mm_loadu_si128(from.cast()) };
    match T::DTYPE {
        Dtype::Float16 => _mm256_cvtph_ps(halves),
        _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))),
    }
}

/// Rounds eight values to a two-byte type, as its `from_f32` does.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round<T: Float>(values: __m256) -> __m128i {
    if T::DTYPE == Dtype::Float16 {
        return _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
    }
    let bits = _mm256_castps_si256(values);
    let high = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
    let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
    let words = _mm256_blendv_epi8(rounded, quiet, is_nan);
    // Packs within halves of the register, then brings both results together.
    let packed = _mm256_packus_epi32(words, words);
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(packed))
}

/// Stores eight values, rounded to the type.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn store<T: Float>(to: &mut [T; 8], values: __m256) {
    let to = to.as_mut_ptr();
    match T::DTYPE {
        // SAFETY: T is f32, and the array holds eight: 32 bytes.
        Dtype::Float32 => unsafe { _mm256_storeu_ps(to.cast(), values) },
        // SAFETY: the other types have two bytes, and the array holds eight: 16 bytes.
        _ => unsafe { _mm_storeu_si128(to.cast(), round::<T>(values)) },
    }
}

/// The magnitude's bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn abs_bits(values: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(values), _mm256_set1_epi32(0x7fff_ffff))
}

/// Four chains of maxima, because one would wait for the latency of each.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn max_abs_bits<T: Float>(values: &[T]) -> u32 {
    let (vectors, tail) = values.as_chunks::<8>();
    let mut max = [_mm256_setzero_si256(); 4];
    let (groups, rest) = vectors.as_chunks::<4>();
    for group in groups {
        for (max, vector) in max.iter_mut().zip(group) {
            *max = _mm256_max_epu32(*max, abs_bits(load(vector)));
        }
    }
    for vector in rest {
        max[0] = _mm256_max_epu32(max[0], abs_bits(load(vector)));
    }
    let max = _mm256_max_epu32(_mm256_max_epu32(max[0], max[1]), _mm256_max_epu32(max[2], max[3]));
    let max = _mm_max_epu32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b1110>(max));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32::<0b01>(max));
    (_mm_cvtsi128_si32(max) as u32).max(max_abs_bits_scalar(tail))
}
