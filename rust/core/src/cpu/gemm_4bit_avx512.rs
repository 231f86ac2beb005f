//! Products with a 4-bit weight with AVX-512: decoded in registers for few rows of input, else from decoded rows.

use std::arch::x86_64::*;

use super::avx512::{load, store};
use super::gemm_4bit::{DOT_ROWS as ROWS, VECTOR, Weight4};
use super::gemm_4bit_outer as outer;

/// Input that [`multiply_fused`] takes at a time: four by four sums fill half of the registers.
const TOKENS: usize = 4;

/// Elements of a unit, whose bytes one register holds in every copy that its lanes need: 64, or 32 where blocks or rows
/// end at odd multiples of 32. None where rows end elsewhere.
pub(super) fn unit(weight: &Weight4<'_>) -> Option<usize> {
    match weight.columns % 64 {
        0 if weight.block_size >= 64 => Some(64),
        0 | 32 => Some(32),
        _ => None,
    }
}

/// Element of a unit that lane `lane` of the vector `vector` holds. A unit's bytes are repeated over the register, and
/// every copy is shifted by its own count of nibbles; in a byte the even element has the high nibble.
const fn element(unit: usize, vector: usize, lane: usize) -> usize {
    let words = unit / 8;
    8 * (lane % words) + (nibble(unit, vector, lane) ^ 1)
}

const fn nibble(unit: usize, vector: usize, lane: usize) -> usize {
    vector + unit / 16 * (lane / (unit / 8))
}

/// Rows of input in the order in which the lanes decode the weight.
pub(super) fn arrange(input: &[f32], unit: usize) -> Vec<f32> {
    let order = |i: usize| i / unit * unit + element(unit, i % unit / 16, i % 16);
    (0..input.len()).map(|i| input[order(i)]).collect()
}

/// `products` [rows, M] of rows from `first_row` on, with `input` [M, K] from [`arrange`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn multiply_fused(input: &[f32], weight: &Weight4<'_>, first_row: usize, products: &mut [f32]) {
    match unit(weight) {
        Some(64) => multiply_units::<32>(input, weight, first_row, products),
        _ => multiply_units::<16>(input, weight, first_row, products),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn multiply_units<const BYTES: usize>(
    input: &[f32],
    weight: &Weight4<'_>,
    first_row: usize,
    products: &mut [f32],
) {
    let columns = weight.columns;
    let tokens = input.len() / columns;
    for (i, products) in products.chunks_mut(ROWS * tokens).enumerate() {
        let first_row = first_row + i * ROWS;
        let num_rows = products.len() / tokens;
        for first_token in (0..tokens).step_by(TOKENS) {
            let input = &input[first_token * columns..];
            let num_tokens = (tokens - first_token).min(TOKENS);
            let sums = match num_tokens {
                1 => tile::<BYTES, 1>(input, weight, first_row, num_rows),
                2 => tile::<BYTES, 2>(input, weight, first_row, num_rows),
                3 => tile::<BYTES, 3>(input, weight, first_row, num_rows),
                _ => tile::<BYTES, 4>(input, weight, first_row, num_rows),
            };
            for (products, sums) in products.chunks_mut(tokens).zip(sums) {
                products[first_token..][..num_tokens].copy_from_slice(&sums[..num_tokens]);
            }
        }
    }
}

/// Sums of [`ROWS`] rows of the weight by M rows of input. Rows past `num_rows` repeat the last one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tile<const BYTES: usize, const M: usize>(
    input: &[f32],
    weight: &Weight4<'_>,
    first_row: usize,
    num_rows: usize,
) -> [[f32; TOKENS]; ROWS] {
    let columns = weight.columns;
    let unit = 2 * BYTES;
    let values = load(weight.codebook.decoded_values());
    let shifts = shifts::<BYTES>();
    let log2_block = weight.block_size.trailing_zeros();
    let begins: [usize; ROWS] = std::array::from_fn(|row| (first_row + row.min(num_rows - 1)) * columns);
    let rows = begins.map(|begin| weight.packed[begin / 2..][..columns / 2].as_chunks::<BYTES>().0);
    let inputs: [&[[f32; 16]]; M] = std::array::from_fn(|m| input[m * columns..][..columns].as_chunks().0);
    let mut sums = [[_mm512_setzero_ps(); M]; ROWS];
    for i in 0..columns / unit {
        for row in 0..ROWS {
            let absmax = weight.absmax.get((begins[row] + i * unit) >> log2_block);
            let products = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
            let codes = repeat(&rows[row][i]);
            for vector in 0..unit / 16 {
                // VPERMPS looks at four bits, so the nibbles above need no mask.
                let w = _mm512_permutexvar_ps(_mm512_srlv_epi32(codes, shifts[vector]), products);
                for m in 0..M {
                    sums[row][m] =
                        _mm512_fmadd_ps(w, load(&inputs[m][i * (unit / 16) + vector]), sums[row][m]);
                }
            }
        }
    }
    add_lanes(sums)
}

/// How far the nibble of each lane is shifted, for each vector of a unit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn shifts<const BYTES: usize>() -> [__m512i; 4] {
    std::array::from_fn(|vector| {
        let bits: [f32; 16] = std::array::from_fn(|lane| {
            f32::from_bits(4 * nibble(2 * BYTES, vector % (BYTES / 8), lane) as u32)
        });
        _mm512_castps_si512(load(&bits))
    })
}

/// A unit's bytes, as often as they fill a register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn repeat<const BYTES: usize>(bytes: &[u8; BYTES]) -> __m512i {
    const { assert!(BYTES == 32 || BYTES == 16, "a half or a quarter of a register") };
    if BYTES == 32 {
        // SAFETY: the array holds the 32 bytes that are read.
        _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
    } else {
        // SAFETY: the array holds the 16 bytes that are read.
        _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    }
}

/// Dot products of [`ROWS`] decoded rows with up to four rows of input, all of one length, a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn dot(rows: [&[f32]; ROWS], inputs: &[f32]) -> [[f32; TOKENS]; ROWS] {
    match inputs.len() / rows[0].len() {
        1 => dot_tile::<1>(rows, inputs),
        2 => dot_tile::<2>(rows, inputs),
        3 => dot_tile::<3>(rows, inputs),
        _ => dot_tile::<4>(rows, inputs),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dot_tile<const M: usize>(rows: [&[f32]; ROWS], inputs: &[f32]) -> [[f32; TOKENS]; ROWS] {
    let len = rows[0].len() / 16;
    let rows = rows.map(|row| &row.as_chunks::<16>().0[..len]);
    let (vectors, _) = inputs.as_chunks::<16>();
    let inputs: [&[[f32; 16]]; M] = std::array::from_fn(|m| &vectors[m * len..][..len]);
    let mut sums = [[_mm512_setzero_ps(); M]; ROWS];
    for i in 0..len {
        let x = inputs.map(|input| load(&input[i]));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = load(&row[i]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(w, x, *sum);
            }
        }
    }
    add_lanes(sums)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_lanes<const M: usize>(sums: [[__m512; M]; ROWS]) -> [[f32; TOKENS]; ROWS] {
    let mut results = [[0.0; TOKENS]; ROWS];
    for (results, sums) in results.iter_mut().zip(sums) {
        for (result, sum) in results.iter_mut().zip(sums) {
            *result = _mm512_reduce_add_ps(sum);
        }
    }
    results
}

/// Adds to `sums` [outer::ROWS, V] the products of `rows` [outer::ROWS, K] with `input` [K, V].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn add_outer_products(
    rows: [&[f32]; outer::ROWS],
    input: &[[f32; VECTOR]],
    sums: &mut [[f32; VECTOR]],
) {
    match sums.len() / outer::ROWS {
        1 => outer_products::<1>(rows, input, sums),
        2 => outer_products::<2>(rows, input, sums),
        _ => outer_products::<3>(rows, input, sums),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn outer_products<const V: usize>(
    rows: [&[f32]; outer::ROWS],
    input: &[[f32; VECTOR]],
    totals: &mut [[f32; VECTOR]],
) {
    let (input, _) = input.as_chunks::<V>();
    let rows = rows.map(|row| &row[..input.len()]);
    let mut sums = [[_mm512_setzero_ps(); V]; outer::ROWS];
    for (k, x) in input.iter().enumerate() {
        let x: [__m512; V] = std::array::from_fn(|v| load(&x[v]));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = _mm512_set1_ps(row[k]);
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(w, x, *sum);
            }
        }
    }
    for (total, sum) in totals.iter_mut().zip(sums.as_flattened()) {
        store(total, _mm512_add_ps(load(total), *sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_hold_every_element_of_a_unit_once() {
        for unit in [32, 64] {
            let mut elements: Vec<usize> = (0..unit).map(|i| element(unit, i / 16, i % 16)).collect();
            elements.sort_unstable();
            assert_eq!(elements, (0..unit).collect::<Vec<_>>());
        }
    }
}
