//! Products of 8-bit codes, widened to 16 bits, with AVX2, and their scaling.

use std::arch::x86_64::*;

use super::avx2::store;
use super::float::Float;
use super::gemm_int8::Row;
use super::gemm_int8_panels::{Line, PLAIN_ROWS as ROWS};

/// Adds the products of `input` [words, ROWS] and `weight` [words], pairs of 16 bits, to `sums` [ROWS].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_tile(input: &[u32], weight: &[Line], sums: &mut [Line]) {
    let sums: &mut [Line; ROWS] = sums.try_into().expect("sums of a tile");
    let mut total = [[_mm256_setzero_si256(); 2]; ROWS];
    for (total, line) in total.iter_mut().zip(sums.iter()) {
        *total = load(line);
    }
    for (input, weight) in input.as_chunks::<ROWS>().0.iter().zip(weight) {
        let weight = load(weight);
        for (total, x) in total.iter_mut().zip(input) {
            let x = _mm256_set1_epi32(*x as i32);
            for (total, weight) in total.iter_mut().zip(weight) {
                *total = _mm256_add_epi32(*total, _mm256_madd_epi16(x, weight));
            }
        }
    }
    for (total, line) in total.iter().zip(sums) {
        let to = line.0.as_mut_ptr().cast::<__m256i>();
        // SAFETY: a line is two vectors of 32 bytes at a multiple of 64.
        unsafe {
            _mm256_store_si256(to, total[0]);
            _mm256_store_si256(to.add(1), total[1]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line) -> [__m256i; 2] {
    let from = line.0.as_ptr().cast::<__m256i>();
    // SAFETY: a line is two vectors of 32 bytes at a multiple of 64.
    unsafe { [_mm256_load_si256(from), _mm256_load_si256(from.add(1))] }
}

/// Rounds the values of a row to the output.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn finish<T: Float>(row: Row<'_>, output: &mut [T]) {
    row.finish(output, |to, values| {
        for (to, values) in to.as_chunks_mut::<8>().0.iter_mut().zip(values.as_chunks::<8>().0) {
            // SAFETY: eight values: 32 bytes.
            store(to, unsafe { _mm256_loadu_ps(values.as_ptr()) });
        }
    });
}
