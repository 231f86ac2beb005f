//! int8 codes: every instruction set and number of threads against the scalar path on one thread, and the golden vectors.

use super::paths::{SCALAR, elements, others};
use super::*;
use crate::cpu::{
    ElementScales, Matrix, dequantize_matrix, find_column_scales, find_tensor_scale, quantize_matrix,
    quantize_rowwise, quantize_rowwise_outliers, quantize_transposed,
};
use half::f16;

/// Codes and scales of every quantizer, and what they decode to, as bytes.
fn run<T: Float>(elements: &[T], rows: usize, columns: usize, execution: Execution) -> Vec<Vec<u8>> {
    let input = Matrix { elements, rows, columns };
    let mut results = Vec::new();
    let mut keep = |codes: &[i8], scales: &[f32]| {
        results.push(codes.iter().map(|&code| code as u8).collect());
        results.push(scales.to_bytes());
    };
    let mut codes = vec![-77i8; rows * columns];
    let (mut row_scales, mut column_scales) = (vec![-1.0; rows], vec![-1.0; columns]);
    let mut mask = vec![9u8; columns];
    quantize_rowwise_outliers(input, 0.4, &mut codes, &mut row_scales, &mut mask, execution);
    keep(&codes, &row_scales);
    quantize_rowwise(input, &mut codes, &mut row_scales, execution);
    keep(&codes, &row_scales);
    let by_row = codes.clone();
    let inverses = find_column_scales(input, &mut column_scales, execution);
    for inverses in
        [ElementScales::Each(&inverses), ElementScales::One(find_tensor_scale(elements, execution).1)]
    {
        quantize_matrix(input, inverses, &mut codes, execution);
        keep(&codes, &column_scales);
        quantize_transposed(input, inverses, &mut codes, execution);
        keep(&codes, &[find_tensor_scale(elements, execution).0]);
    }
    results.push(mask);
    let by_row = Matrix { elements: &by_row, rows, columns };
    let scales = [None, Some(&row_scales[..])].map(|by_row| (by_row, ElementScales::One(3.7))).into_iter();
    for (row_scales, scales) in scales.chain([(None, ElementScales::Each(&column_scales))]) {
        let mut output = vec![T::default(); rows * columns];
        dequantize_matrix(by_row, row_scales, scales, &mut output, execution);
        results.push(output.to_bytes());
    }
    results
}

fn check<T: Float>(rows: usize, columns: usize) {
    let input = elements::<T>(rows * columns, (rows * 1000 + columns) as u64);
    let expected = run(&input, rows, columns, SCALAR);
    for execution in others(rows * columns) {
        assert!(run(&input, rows, columns, execution) == expected, "{rows} x {columns} {execution:?}");
    }
}

#[test]
fn paths_of_int8_agree_for_every_shape() {
    let shapes = [(0, 5), (5, 0), (1, 1), (1, 7), (2, 8), (3, 17), (64, 64), (65, 63), (7, 130), (130, 33)];
    for (rows, columns) in shapes.into_iter().chain([(700, 129), (2, 70_001), (70_001, 2)]) {
        check::<f32>(rows, columns);
        check::<f16>(rows, columns);
        check::<bf16>(rows, columns);
    }
}

#[test]
fn golden_vector_of_int8_rows() {
    let input: Vec<f16> = bytes(
        "90ba5536313b8ebd58b1003a21b926bb00000000000000000000000000000000
         f0570038003e004100b800be00c1f0d7b3b2e4b243bf86b51fc00046ff4570bd",
    )
    .chunks(2)
    .map(|pair| f16::from_le_bytes([pair[0], pair[1]]))
    .collect();
    let input = Matrix { elements: &input, rows: 4, columns: 8 };
    for execution in executions() {
        let (mut codes, mut scales, mut mask) = ([1i8; 32], [1.0; 4], [7u8; 8]);
        quantize_rowwise(input, &mut codes, &mut scales, execution);
        let due = "b5245281f145c5ae00000000000000007f00020200fefe81fcfbdaf9d47f7fe3";
        assert_eq!(hex(&codes.map(|code| code as u8)), due);
        assert_eq!(hex(&scales.to_bytes()), "00c0b13f000000000000fe420000c040");
        quantize_rowwise_outliers(input, 6.0, &mut codes, &mut scales, &mut mask, execution);
        let due = "00245281f100c500000000000000000000194c7fe700810000fbdaf9d4007f00";
        assert_eq!(hex(&codes.map(|code| code as u8)), due);
        assert_eq!(hex(&scales.to_bytes()), "00c0b13f000000000000204000e0bf40");
        assert_eq!(mask, [1, 0, 0, 0, 0, 1, 0, 1]);
    }
}
