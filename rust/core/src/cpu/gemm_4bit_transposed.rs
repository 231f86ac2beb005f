//! A dense input times a transposed 4-bit weight, fused: rows are decoded one piece at a time and never stored whole.

use super::Execution;
use super::float::Float;
use super::gemm_4bit::{Decoded, VECTOR, Weight4};
use super::threads::{FloatEnvironment, for_each};

/// Columns that one thread computes at once: a piece of a row and the sums of a few rows of input stay in its L1.
const SLAB: usize = 512;
/// Rows of the weight whose products are summed before they are added to the rest: the error grows with N / 64.
const RUN: usize = 64;

/// `output = input @ weight`: input [M, N], output [M, K]. Weights, products and sums are float32; each result rounds
/// once. N = 0 gives zeros.
///
/// # Panics
/// Where lengths do not fit.
pub fn gemm_4bit_transposed<T: Float>(
    input: &[T],
    weight: Weight4<'_>,
    output: &mut [T],
    execution: Execution,
) {
    let Weight4 { rows, columns, .. } = weight;
    let elements = rows * columns;
    assert_eq!(weight.packed.len(), elements.div_ceil(2), "two codes to a byte");
    weight.absmax.check_len(elements.div_ceil(weight.block_size));
    if output.is_empty() {
        return;
    }
    assert_eq!(output.len() % columns, 0, "an output of whole rows");
    let tokens = output.len() / columns;
    assert_eq!(input.len(), tokens * rows, "as many rows of input as of output");
    let _ieee = FloatEnvironment::ieee();
    let input: Vec<f32> = input.iter().map(|x| x.to_f32()).collect();
    // [slab][token][column]
    let mut sums = vec![0.0; tokens * columns];
    let parts = sums.chunks_mut(tokens * SLAB).enumerate();
    for_each(execution.threads, parts, |(slab, sums)| {
        multiply(&input, &weight, slab * SLAB, sums, execution)
    });
    for (slab, sums) in sums.chunks(tokens * SLAB).enumerate() {
        let len = sums.len() / tokens;
        for (token, sums) in sums.chunks(len).enumerate() {
            let output = &mut output[token * columns + slab * SLAB..][..len];
            output.iter_mut().zip(sums).for_each(|(output, sum)| *output = T::from_f32(*sum));
        }
    }
}

/// Adds the products of the columns from `first` on to `sums` [M, len].
fn multiply(input: &[f32], weight: &Weight4<'_>, first: usize, sums: &mut [f32], execution: Execution) {
    let Weight4 { rows, columns, .. } = *weight;
    let len = SLAB.min(columns - first);
    let mut decoded = Decoded::new(1, len.next_multiple_of(VECTOR));
    let mut run = vec![0.0; sums.len()];
    for begin in (0..rows).step_by(RUN) {
        run.fill(0.0);
        for row in begin..rows.min(begin + RUN) {
            decoded.fill(0, weight, row * columns + first, len, execution.isa);
            let piece = decoded.row(0, len);
            for (sums, input) in run.chunks_mut(len).zip(input.chunks(rows)) {
                let factor = input[row];
                sums.iter_mut().zip(piece).for_each(|(sum, weight)| *sum += factor * weight);
            }
        }
        sums.iter_mut().zip(&run).for_each(|(sum, run)| *sum += run);
    }
}
