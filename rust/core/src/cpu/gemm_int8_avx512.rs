//! Products of 8-bit codes with AVX-512 VNNI, and their scaling sixteen at a time.

use std::arch::x86_64::*;

use super::avx512::store;
use super::float::Float;
use super::gemm_int8::Row;
use super::gemm_int8_panels::Line;

/// Rows of the input in a tile: with three registers of sums each they leave five of 32 for the operands.
pub(super) const ROWS: usize = 9;
/// Registers of sums of a row.
pub(super) const LINES: usize = 3;

/// Adds the products of `input` [words, ROWS] and `weight` [words, LINES], whose codes are 128 more, to `sums`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn add_tile(input: &[u32], weight: &[Line], sums: &mut [Line]) {
    let sums = sums.as_chunks_mut::<LINES>().0;
    let sums: &mut [[Line; LINES]; ROWS] = sums.try_into().expect("sums of a tile");
    let mut total = [[_mm512_setzero_si512(); LINES]; ROWS];
    for (total, sums) in total.iter_mut().zip(sums.iter()) {
        for (total, line) in total.iter_mut().zip(sums) {
            *total = load(line);
        }
    }
    for (input, weight) in input.as_chunks::<ROWS>().0.iter().zip(weight.as_chunks::<LINES>().0) {
        let weight = [load(&weight[0]), load(&weight[1]), load(&weight[2])];
        for (total, x) in total.iter_mut().zip(input) {
            let x = _mm512_set1_epi32(*x as i32);
            for (total, weight) in total.iter_mut().zip(weight) {
                *total = _mm512_dpbusd_epi32(*total, weight, x);
            }
        }
    }
    for (total, sums) in total.iter().zip(sums) {
        for (total, line) in total.iter().zip(sums) {
            // SAFETY: a line is 64 bytes at a multiple of 64.
            unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), *total) };
        }
    }
}

/// `weight` [rows, depth] as a panel [words, LINES], 128 added to its codes. Lines without a row keep what they hold.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn pack_panel(weight: &[i8], depth: usize, panel: &mut [Line]) {
    for (line, rows) in weight.chunks(16 * depth).enumerate() {
        for (first, panel) in (0..depth).step_by(64).zip(panel.chunks_mut(16 * LINES)) {
            let mut words = [_mm512_setzero_si512(); 16];
            for (words, row) in words.iter_mut().zip(rows.chunks(depth)) {
                let row = &row[first..depth.min(first + 64)];
                // SAFETY: the mask has a bit for each of up to 64 bytes of the row.
                *words = unsafe { _mm512_maskz_loadu_epi8(u64::MAX >> (64 - row.len()), row.as_ptr()) };
            }
            let words = transposed(words);
            for (panel, words) in panel.iter_mut().skip(line).step_by(LINES).zip(words) {
                // SAFETY: a line is 64 bytes at a multiple of 64.
                unsafe {
                    let words = _mm512_xor_si512(words, _mm512_set1_epi8(i8::MIN));
                    _mm512_store_si512(panel.0.as_mut_ptr().cast(), words);
                }
            }
        }
    }
}

/// Rows and columns of sixteen words each, exchanged.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut quads = rows;
    for (quad, rows) in quads.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
        let (low01, high01) =
            (_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
        let (low23, high23) =
            (_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
        // word j of every quarter of four rows
        *quad = [
            _mm512_unpacklo_epi64(low01, low23),
            _mm512_unpackhi_epi64(low01, low23),
            _mm512_unpacklo_epi64(high01, high23),
            _mm512_unpackhi_epi64(high01, high23),
        ];
    }
    let mut columns = rows;
    for j in 0..4 {
        const EVEN: i32 = 0b10_00_10_00;
        const ODD: i32 = 0b11_01_11_01;
        let (a, b, c, d) = (quads[j], quads[4 + j], quads[8 + j], quads[12 + j]);
        let (even_low, even_high) = (_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<EVEN>(c, d));
        let (odd_low, odd_high) = (_mm512_shuffle_i32x4::<ODD>(a, b), _mm512_shuffle_i32x4::<ODD>(c, d));
        columns[j] = _mm512_shuffle_i32x4::<EVEN>(even_low, even_high);
        columns[4 + j] = _mm512_shuffle_i32x4::<EVEN>(odd_low, odd_high);
        columns[8 + j] = _mm512_shuffle_i32x4::<ODD>(even_low, even_high);
        columns[12 + j] = _mm512_shuffle_i32x4::<ODD>(odd_low, odd_high);
    }
    columns
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes at a multiple of 64.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

/// Rounds the values of a row to the output.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn finish<T: Float>(row: Row<'_>, output: &mut [T]) {
    row.finish(output, |to, values| {
        // SAFETY: sixteen values: 64 bytes.
        store(to, unsafe { _mm512_loadu_ps(values.as_ptr()) });
    });
}
