//! Products of 8-bit codes: every path and any number of threads give the bits of plain sums.

use super::*;
use crate::cpu::{Codes, Outliers, Scales, gemm_int8, gemm_int8_outliers, gemm_int8_raw};
use half::bf16;

/// Every code, in an order without a short period.
fn codes(n: usize, seed: u32) -> Vec<i8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as i8
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// Numbers of several magnitudes.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    codes(n, seed).into_iter().map(|code| (f32::from(code) / 20.0).exp()).collect()
}

fn sum(codes: &Codes<'_>, m: usize, n: usize) -> i64 {
    let row = &codes.input[m * codes.depth..][..codes.depth];
    let column = &codes.weight[n * codes.depth..][..codes.depth];
    row.iter().zip(column).map(|(a, b)| i64::from(*a) * i64::from(*b)).sum()
}

fn executions() -> impl Iterator<Item = Execution> {
    Isa::available().flat_map(|isa| [1, 3].map(|threads| Execution { isa, threads }))
}

fn check(rows: usize, columns: usize, depth: usize) {
    let (input, weight) = (codes(rows * depth, 1), codes(columns * depth, 2));
    let codes = Codes { input: &input, weight: &weight, rows, columns, depth };
    let (rows_of, columns_of, bias) = (numbers(rows, 3), numbers(columns, 4), numbers(columns, 5));
    let scales = Scales { input: Some(&rows_of), weight: Some(&columns_of), bias: Some(&bias) };
    let unquantized: Vec<bf16> = numbers(rows * depth, 6).into_iter().map(bf16::from_f32).collect();
    let mask: Vec<u8> = (0..depth).map(|k| u8::from(k % 7 == 3)).collect();
    let outliers = Outliers { input: &unquantized, mask: &mask };
    let mut first: Option<Vec<bf16>> = None;
    for execution in executions() {
        let what = format!("{rows} x {columns} x {depth}, {} on {}", execution.isa.name(), execution.threads);
        let mut raw = vec![-1; rows * columns];
        if depth <= 131_071 {
            gemm_int8_raw(codes, &mut raw, execution);
        }
        let mut scaled = vec![f32::NAN; rows * columns];
        gemm_int8(codes, scales, &mut scaled, execution);
        for (i, (raw, scaled)) in raw.iter().zip(&scaled).enumerate() {
            let (m, n) = (i / columns, i % columns);
            let sum = sum(&codes, m, n);
            assert!(depth > 131_071 || i64::from(*raw) == sum, "{what}");
            let factor = rows_of[m] * f32::from_bits(0x3882_0610);
            let want = (sum as f32 * factor).mul_add(columns_of[n], bias[n]);
            assert_eq!(scaled.to_bits(), want.to_bits(), "{what}");
        }
        let mut output = vec![bf16::NAN; rows * columns];
        gemm_int8_outliers(codes, scales, outliers, &mut output, execution);
        assert_eq!(first.get_or_insert_with(|| output.clone()), &output, "{what}");
    }
}

#[test]
fn every_path_equals_plain_sums() {
    for (rows, columns, depth) in
        [(1, 1, 1), (7, 49, 3), (9, 48, 64), (10, 97, 65), (70, 33, 130), (260, 20, 515), (3, 100, 1030)]
    {
        check(rows, columns, depth);
    }
}

#[test]
fn every_path_is_exact_beyond_sums_of_32_bits() {
    check(2, 3, 131_071);
    check(2, 3, 200_001);
}

#[test]
fn the_largest_sums_are_exact() {
    for (a, b) in [(-128, -128), (-128, 127), (127, 127)] {
        for depth in [131_071, 131_072] {
            let (input, weight) = (vec![a; depth], vec![b; depth]);
            let codes = Codes { input: &input, weight: &weight, rows: 1, columns: 1, depth };
            for execution in executions() {
                let mut output = [0.0f32];
                let scales = Scales { input: None, weight: None, bias: None };
                gemm_int8(codes, scales, &mut output, execution);
                assert_eq!(output[0], sum(&codes, 0, 0) as f32, "{}", execution.isa.name());
            }
        }
    }
}

#[test]
fn no_rows_and_no_columns_give_nothing() {
    for execution in executions() {
        for (rows, columns) in [(0, 3), (3, 0), (0, 0)] {
            let (input, weight) = (codes(rows * 8, 1), codes(columns * 8, 2));
            let codes = Codes { input: &input, weight: &weight, rows, columns, depth: 8 };
            gemm_int8_raw(codes, &mut [], execution);
            let scales = Scales { input: None, weight: None, bias: None };
            gemm_int8::<f32>(codes, scales, &mut [], execution);
        }
        let empty = Codes { input: &[], weight: &[], rows: 2, columns: 1, depth: 0 };
        let mut output = [f32::NAN; 2];
        gemm_int8(empty, Scales { input: None, weight: None, bias: Some(&[2.5]) }, &mut output, execution);
        assert_eq!(output, [2.5; 2]);
    }
}
