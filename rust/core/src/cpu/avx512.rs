//! AVX-512 loads, stores and reductions of every element type, as sixteen float32.

use std::arch::x86_64::*;

use super::absmax::max_abs_bits_scalar;
use super::float::Float;
use crate::Dtype;

/// Sixteen elements, exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn load<T: Float>(from: &[T; 16]) -> __m512 {
    let from = from.as_ptr();
    if T::DTYPE == Dtype::Float32 {
        // SAFETY: T is f32, and the array holds sixteen: 64 bytes.
        return unsafe { _mm512_loadu_ps(from.cast()) };
    }
    // SAFETY: the other types have two bytes, and the array holds sixteen: 32 bytes.
    let halves = unsafe { _mm256_loadu_si256(from.cast()) };
    match T::DTYPE {
        Dtype::Float16 => _mm512_cvtph_ps(halves),
        _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))),
    }
}

/// Rounds sixteen values to a two-byte type, as its `from_f32` does, into the low half of each lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn round<T: Float>(values: __m512) -> __m512i {
    if T::DTYPE == Dtype::Float16 {
        return _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values));
    }
    // VCVTNEPS2BF16 would flush subnormals, so the rounding is done on the bits.
    let bits = _mm512_castps_si512(values);
    let high = _mm512_srli_epi32::<16>(bits);
    let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40))
}

/// Stores sixteen values, rounded to the type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn store<T: Float>(to: &mut [T; 16], values: __m512) {
    let to = to.as_mut_ptr();
    match T::DTYPE {
        // SAFETY: T is f32, and the array holds sixteen: 64 bytes.
        Dtype::Float32 => unsafe { _mm512_storeu_ps(to.cast(), values) },
        // SAFETY: the other types have two bytes, and the array holds sixteen: 32 bytes.
        _ => unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(round::<T>(values))) },
    }
}

/// Stores thirty-two elements of a two-byte type.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn store_bits<T: Float>(to: &mut [T; 32], bits: __m512i) {
    assert!(size_of::<T>() == 2, "a two-byte type");
    // SAFETY: the array holds thirty-two elements of two bytes: 64 bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), bits) };
}

/// The magnitude's bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn abs_bits(values: __m512) -> __m512i {
    _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fff_ffff))
}

/// Four chains of maxima, because one would wait for the latency of each.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn max_abs_bits<T: Float>(values: &[T]) -> u32 {
    let (vectors, tail) = values.as_chunks::<16>();
    let mut max = [_mm512_setzero_si512(); 4];
    let (groups, rest) = vectors.as_chunks::<4>();
    for group in groups {
        for (max, vector) in max.iter_mut().zip(group) {
            *max = _mm512_max_epu32(*max, abs_bits(load(vector)));
        }
    }
    for vector in rest {
        max[0] = _mm512_max_epu32(max[0], abs_bits(load(vector)));
    }
    let max = _mm512_max_epu32(_mm512_max_epu32(max[0], max[1]), _mm512_max_epu32(max[2], max[3]));
    _mm512_reduce_max_epu32(max).max(max_abs_bits_scalar(tail))
}
