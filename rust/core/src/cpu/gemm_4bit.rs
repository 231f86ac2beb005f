//! A 4-bit weight times a dense input, fused: weights are decoded a few rows at a time and never stored whole.

use super::blockwise_4bit::{GROUP, decode};
use super::float::Float;
use super::isa::Isa;
use super::threads::{FloatEnvironment, for_each, part_len};
use super::{Absmax, Execution};
use crate::codebook::Codebook4;

/// Rows of input that one pass over the weight serves. Decoding costs about as much as two of them.
const MAX_TOKENS: usize = 64;

/// A weight [N, K] as `quantize_4bit` leaves it. Blocks run over the flattened rows and may straddle them.
#[derive(Clone, Copy, Debug)]
pub struct Weight4<'a> {
    /// [ceil_div(N * K, 2)]
    pub packed: &'a [u8],
    /// Of [ceil_div(N * K, block_size)] blocks.
    pub absmax: Absmax<'a>,
    /// N
    pub rows: usize,
    /// K
    pub columns: usize,
    /// What the codes stand for.
    pub codebook: Codebook4,
    /// Elements that share an absmax.
    pub block_size: usize,
}

/// `output = input @ weight.T + bias`: input [M, K], bias [N] widened to float32, output [M, N]. Weights, products and
/// sums are float32; each result rounds once. K = 0 leaves the bias.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_4bit<T: Float>(
    input: &[T],
    weight: Weight4<'_>,
    bias: Option<&[f32]>,
    output: &mut [T],
    execution: Execution,
) {
    let Weight4 { rows, columns, .. } = weight;
    let elements = rows * columns;
    assert_eq!(weight.packed.len(), elements.div_ceil(2), "two codes to a byte");
    weight.absmax.check_len(elements.div_ceil(weight.block_size));
    assert!(bias.is_none_or(|bias| bias.len() == rows), "a bias for every row of the weight");
    if output.is_empty() {
        return;
    }
    assert_eq!(output.len() % rows, 0, "an output of whole rows");
    assert_eq!(input.len(), output.len() / rows * columns, "as many rows of input as of output");
    let _ieee = FloatEnvironment::ieee();
    for (i, output) in output.chunks_mut(MAX_TOKENS * rows).enumerate() {
        let tokens = output.len() / rows;
        let input = &input[i * MAX_TOKENS * columns..][..tokens * columns];
        let mut products = vec![0.0; tokens * rows];
        multiply(input, weight, &mut products, execution);
        for (m, output) in output.chunks_mut(rows).enumerate() {
            for (n, output) in output.iter_mut().enumerate() {
                *output = T::from_f32(products[n * tokens + m] + bias.map_or(0.0, |bias| bias[n]));
            }
        }
    }
}

/// `products` [N, M] = weight @ input.T
fn multiply<T: Float>(input: &[T], weight: Weight4<'_>, products: &mut [f32], execution: Execution) {
    let Weight4 { rows, columns, .. } = weight;
    let tokens = products.len() / rows;
    let input: Vec<f32> = input.iter().map(|x| x.to_f32()).collect();
    let rows_in_part = part_len(rows * columns * tokens, columns.max(1) * tokens, execution.threads)
        / (columns.max(1) * tokens);
    let parts = products.chunks_mut(rows_in_part * tokens).enumerate();
    for_each(execution.threads, parts, |(i, products)| {
        multiply_rows(&input, weight, i * rows_in_part, products, execution.isa);
    });
}

/// `products` [its length / M, M] of the rows that begin with `first_row`.
fn multiply_rows(input: &[f32], weight: Weight4<'_>, first_row: usize, products: &mut [f32], isa: Isa) {
    let columns = weight.columns;
    let tokens = if columns == 0 { return } else { input.len() / columns };
    let mut decoded = vec![0.0; columns + GROUP];
    for (row, products) in products.chunks_mut(tokens).enumerate() {
        let begin = (first_row + row) * columns;
        let skip = begin % GROUP;
        let decoded = &mut decoded[..skip + columns];
        decode(weight.packed, weight.absmax, weight.codebook, weight.block_size, begin - skip, decoded, isa);
        for (product, input) in products.iter_mut().zip(input.chunks(columns)) {
            *product = dot_scalar(&decoded[skip..], input);
        }
    }
}

/// Sixteen sums side by side, added pairwise at the end: the error grows with K / 16, and the loop vectorizes.
fn dot_scalar(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}
