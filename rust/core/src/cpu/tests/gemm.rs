//! Products with a 4-bit weight against float64, over shapes, types, paths and threads.

use super::*;
use crate::codebook::{Codebook4, DYNAMIC_SIGNED};
use crate::cpu::{Absmax, Nested, Weight4, dequantize_4bit, gemm_4bit, quantize_4bit, quantize_absmax};
use half::f16;

fn wave(n: usize, step: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * step).sin() * (1.0 + (i % 7) as f32)).collect()
}

struct Case {
    tokens: usize,
    rows: usize,
    columns: usize,
    codebook: Codebook4,
    block_size: usize,
    nested: bool,
}

/// Output of every path at several numbers of threads, which must agree with float64 and each other.
fn check<T: Float>(case: &Case) {
    let &Case { tokens, rows, columns, codebook, block_size, nested } = case;
    let elements = rows * columns;
    let scalar = Execution { isa: Isa::SCALAR, threads: 1 };
    let mut packed = vec![0; elements.div_ceil(2)];
    let mut absmax = vec![0.0; elements.div_ceil(block_size)];
    quantize_4bit(&wave(elements, 0.7371), codebook, block_size, &mut packed, &mut absmax, scalar);
    let mut codes = vec![0; absmax.len()];
    let mut scale = vec![0.0; absmax.len().div_ceil(256)];
    let offset = quantize_absmax(&absmax, &mut codes, &mut scale, scalar);
    let absmax = match nested {
        true => Absmax::Nested(Nested { codes: &codes, scale: &scale, offset, map: &DYNAMIC_SIGNED }),
        false => Absmax::Plain(&absmax),
    };
    let mut decoded = vec![0.0f32; elements];
    dequantize_4bit(&packed, absmax, codebook, block_size, &mut decoded, scalar);
    let input: Vec<T> = wave(tokens * columns, 1.313).into_iter().map(T::from_f32).collect();
    let bias = wave(rows, 0.9);
    let weight = Weight4 { packed: &packed, absmax, rows, columns, codebook, block_size };

    for isa in Isa::available() {
        let run = |threads| {
            let mut output = vec![T::from_f32(f32::NAN); tokens * rows];
            gemm_4bit(&input, weight, Some(&bias), &mut output, Execution { isa, threads });
            output
        };
        let output = run(1);
        assert_eq!(output.to_bytes(), run(3).to_bytes(), "three threads");
        for (i, y) in output.iter().enumerate() {
            let (m, n) = (i / rows, i % rows);
            let terms = input[m * columns..][..columns].iter().zip(&decoded[n * columns..][..columns]);
            let terms = terms.map(|(x, &w)| f64::from(x.to_f32()) * f64::from(w));
            let (sum, magnitude) = terms.fold((f64::from(bias[n]), 1.0), |(s, a), t| (s + t, a + t.abs()));
            // one rounding of the output, and of at most 512 + K / 8 + 5 sums, none larger than `magnitude`
            let eps = [0.0, 0.0, 2f64.powi(-8), 0.0, 2f64.powi(-24)][size_of::<T>()];
            let sums = (columns.min(512) as f64 + columns as f64 / 8.0 + 5.0) * 2f64.powi(-24) * magnitude;
            let error = (f64::from(y.to_f32()) - sum).abs();
            assert!(error <= sums + eps * (sum.abs() + sums), "[{m}, {n}] {} {error}", isa.name());
        }
    }
}

#[test]
fn gemm_4bit_is_float64_within_the_error_of_its_sums() {
    for (tokens, rows, columns) in [
        (1, 1, 1),
        (1, 5, 64),
        (3, 9, 32),
        (2, 7, 96),
        (1, 33, 1),
        (5, 3, 77),
        (4, 130, 192),
        (8, 6, 2080),
        (13, 10, 1024),
        (70, 11, 130),
        (9, 4, 3001),
    ] {
        for (block_size, codebook) in [(32, Codebook4::Nf4), (64, Codebook4::Fp4), (128, Codebook4::Af4)] {
            let nested = tokens % 2 == 1;
            let case = Case { tokens, rows, columns, codebook, block_size, nested };
            check::<f32>(&case);
            check::<f16>(&case);
            check::<bf16>(&case);
        }
    }
}

#[test]
fn gemm_4bit_agrees_where_threads_share_the_rows() {
    for (tokens, columns) in [(1, 512), (3, 480), (17, 333)] {
        let (rows, block_size) = (517, 64);
        check::<f32>(&Case { tokens, rows, columns, codebook: Codebook4::Nf4, block_size, nested: false });
    }
}

#[test]
fn gemm_4bit_without_columns_is_the_bias() {
    for execution in executions() {
        let empty = |rows| Weight4 {
            packed: &[],
            absmax: Absmax::Plain(&[]),
            rows,
            columns: 0,
            codebook: Codebook4::Nf4,
            block_size: 64,
        };
        let mut output = [7.0f32; 6];
        gemm_4bit(&[], empty(3), Some(&[1.0, 2.0, 3.0]), &mut output, execution);
        assert_eq!(output, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        gemm_4bit(&[], empty(3), None, &mut output, execution);
        assert_eq!(output, [0.0; 6]);
        gemm_4bit::<f32>(&[], empty(0), None, &mut [], execution);
        gemm_4bit::<f32>(&[], empty(3), None, &mut [], execution);
    }
}

#[test]
fn gemm_4bit_shows_nan_in_the_rows_that_have_it_only() {
    for execution in executions() {
        for columns in [64, 48] {
            let mut input = wave(8 * columns, 0.3);
            input[2 * columns + 5] = f32::INFINITY;
            let mut packed = vec![0; 4 * columns];
            let mut absmax = vec![0.0; (8 * columns).div_ceil(32)];
            quantize_4bit(&input, Codebook4::Nf4, 32, &mut packed, &mut absmax, execution);
            let absmax = Absmax::Plain(&absmax);
            let weight = Weight4 {
                packed: &packed,
                absmax,
                rows: 8,
                columns,
                codebook: Codebook4::Nf4,
                block_size: 32,
            };
            for tokens in [1, 20] {
                let mut output = vec![0.0f32; tokens * 8];
                gemm_4bit(&vec![1.0f32; tokens * columns], weight, None, &mut output, execution);
                // 48 columns: the block of 32 with the Inf begins in row 2 and ends there
                assert!(output.iter().enumerate().all(|(i, y)| y.is_nan() == (i % 8 == 2)), "{output:?}");
            }
        }
    }
}
