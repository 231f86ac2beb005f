//! Products with decoded rows of a 4-bit weight with AVX2.

use std::arch::x86_64::*;

use super::avx2::{load, store};
use super::gemm_4bit::{DOT_ROWS as ROWS, VECTOR};
use super::gemm_4bit_outer as outer;

/// Dot products of [`ROWS`] decoded rows with up to four rows of input, all of one length, a multiple of 16.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dot(rows: [&[f32]; ROWS], inputs: &[f32]) -> [[f32; 4]; ROWS] {
    let mut results = [[0.0; 4]; ROWS];
    let len = rows[0].len();
    // Four by two sums, and what they are made of, are what sixteen registers hold.
    for (i, pair) in inputs.chunks(2 * len).enumerate() {
        let sums = dot_pair(rows, [&pair[..len], &pair[pair.len() - len..]]);
        for (result, sums) in results.iter_mut().zip(sums) {
            result[2 * i..2 * i + 2].copy_from_slice(&sums);
        }
    }
    results
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_pair(rows: [&[f32]; ROWS], inputs: [&[f32]; 2]) -> [[f32; 2]; ROWS] {
    let len = rows[0].len() / 8;
    let rows = rows.map(|row| &row.as_chunks::<8>().0[..len]);
    let inputs = inputs.map(|input| &input.as_chunks::<8>().0[..len]);
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    for i in 0..len {
        let x = inputs.map(|input| load(&input[i]));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = load(&row[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm256_fmadd_ps(w, x, *sum);
            }
        }
    }
    sums.map(|sums| sums.map(|sum| add_lanes(sum)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes(sums: __m256) -> f32 {
    let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
    let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)))
}

/// Adds to `sums` [outer::ROWS, V] the products of `rows` [outer::ROWS, K] with `input` [K, V].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_outer_products(
    rows: [&[f32]; outer::ROWS],
    input: &[[f32; VECTOR]],
    sums: &mut [[f32; VECTOR]],
) {
    let vectors = sums.len() / outer::ROWS;
    let (halves, _) = rows.as_chunks::<4>();
    for (rows, sums) in halves.iter().zip(sums.chunks_mut(4 * vectors)) {
        for vector in 0..vectors {
            outer_products(*rows, input, sums, vectors, vector);
        }
    }
}

/// Four rows by sixteen lanes: eight sums, as in [`dot_pair`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn outer_products(
    rows: [&[f32]; 4],
    input: &[[f32; VECTOR]],
    totals: &mut [[f32; VECTOR]],
    vectors: usize,
    vector: usize,
) {
    let len = input.len() / vectors;
    let rows = rows.map(|row| &row[..len]);
    let mut sums = [[_mm256_setzero_ps(); 2]; 4];
    for (k, x) in input[vector..].iter().step_by(vectors).enumerate().take(len) {
        let (x, _) = x.as_chunks::<8>();
        let x = [load(&x[0]), load(&x[1])];
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = _mm256_set1_ps(row[k]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm256_fmadd_ps(w, x, *sum);
            }
        }
    }
    for (total, sums) in totals[vector..].iter_mut().step_by(vectors).zip(sums) {
        let (halves, _) = total.as_chunks_mut::<8>();
        for (half, sum) in halves.iter_mut().zip(sums) {
            store(half, _mm256_add_ps(load(half), sum));
        }
    }
}
