//! A 4-bit weight times a dense input, fused: weights are decoded a few rows at a time and never stored whole.

use super::blockwise_4bit::{GROUP, decode};
use super::float::Float;
use super::isa::{Isa, Level};
use super::threads::{FloatEnvironment, for_each, part_len};
use super::{Absmax, Execution, gemm_4bit_outer as outer};
#[cfg(target_arch = "x86_64")]
use super::{gemm_4bit_avx2 as avx2, gemm_4bit_avx512 as avx512};
use crate::codebook::Codebook4;

/// Rows of input that one pass over the weight serves.
const MAX_TOKENS: usize = 192;
/// Rows of input up to which lanes run along K; above, they run along the rows of input. Where the weight never leaves
/// the registers, several passes beat that: 16 rows take 4 ms so, else 16, and 128 rows 30 and 42 (4096 x 4096, two cores).
const MAX_FEW_TOKENS: usize = 8;
/// Rows of the weight that [`dot`] takes.
pub(super) const DOT_ROWS: usize = 4;
/// Elements that every dot product is a multiple of, and rows of input side by side in an outer product.
pub(super) const VECTOR: usize = 16;

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
    let most_tokens = if fused_unit(&weight, execution.isa).is_some() { MAX_FEW_TOKENS } else { MAX_TOKENS };
    for (i, output) in output.chunks_mut(most_tokens * rows).enumerate() {
        let tokens = output.len() / rows;
        let input = &input[i * most_tokens * columns..][..tokens * columns];
        let mut products = vec![0.0; tokens * rows];
        multiply(input, weight, &mut products, execution);
        for (m, output) in output.chunks_mut(rows).enumerate() {
            for (n, output) in output.iter_mut().enumerate() {
                *output = T::from_f32(products[n * tokens + m] + bias.map_or(0.0, |bias| bias[n]));
            }
        }
    }
}

/// Columns at once where the weight is multiplied as it is decoded, in registers.
fn fused_unit(weight: &Weight4<'_>, isa: Isa) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if isa.level() == Level::Avx512 {
        return avx512::unit(weight);
    }
    let _ = (weight, isa);
    None
}

/// `products` [N, M] = weight @ input.T
fn multiply<T: Float>(input: &[T], weight: Weight4<'_>, products: &mut [f32], execution: Execution) {
    let Weight4 { rows, columns, .. } = weight;
    if columns == 0 {
        return;
    }
    let tokens = products.len() / rows;
    let isa = execution.isa;
    let input: Vec<f32> = input.iter().map(|x| x.to_f32()).collect();
    let input = Arranged::new(input, &weight, isa);
    let macs_in_row = columns * tokens;
    let unit = outer::ROWS * macs_in_row;
    let rows_in_part = part_len(rows * macs_in_row, unit, execution.threads) / macs_in_row;
    let parts = products.chunks_mut(rows_in_part * tokens).enumerate();
    for_each(execution.threads, parts, |(i, products)| {
        let first_row = i * rows_in_part;
        match &input {
            // SAFETY: `Arranged::new` asks for an `Isa` of this level, which exists only where the CPU has the features.
            #[cfg(target_arch = "x86_64")]
            Arranged::Fused(input) => unsafe { avx512::multiply_fused(input, &weight, first_row, products) },
            Arranged::Padded(input) => multiply_few(input, tokens, &weight, first_row, products, isa),
            Arranged::Tiles(tiles) => outer::multiply(tiles, tokens, &weight, first_row, products, isa),
        }
    });
}

/// The input [M, K] as a kernel wants it.
enum Arranged {
    /// In the order of the lanes that decode the weight, which then never leaves the registers.
    #[cfg(target_arch = "x86_64")]
    Fused(Vec<f32>),
    /// Rows filled up with zeros to a multiple of [`VECTOR`].
    Padded(Vec<f32>),
    /// Transposed.
    Tiles(Vec<outer::Tile>),
}

impl Arranged {
    fn new(input: Vec<f32>, weight: &Weight4<'_>, isa: Isa) -> Self {
        let columns = weight.columns;
        let tokens = input.len() / columns;
        if tokens > MAX_FEW_TOKENS {
            return Self::Tiles(
                input.chunks(outer::TILE * columns).map(|rows| outer::Tile::new(rows, columns)).collect(),
            );
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(unit) = fused_unit(weight, isa) {
            return Self::Fused(avx512::arrange(&input, unit));
        }
        let padded_len = columns.next_multiple_of(VECTOR);
        let mut padded = vec![0.0; tokens * padded_len];
        for (padded, row) in padded.chunks_mut(padded_len).zip(input.chunks(columns)) {
            padded[..columns].copy_from_slice(row);
        }
        Self::Padded(padded)
    }
}

/// Decoded pieces of rows, each at a cache line with zeros behind it.
pub(super) struct Decoded {
    memory: Vec<f32>,
    line: usize,
    stride: usize,
}

impl Decoded {
    /// Room for pieces of up to `len` elements of so many rows.
    pub(super) fn new(rows: usize, len: usize) -> Self {
        // In front of a piece is room for what is decoded before it, since that begins at a group.
        let stride = GROUP + len.next_multiple_of(VECTOR);
        let memory = vec![0.0; rows * stride + VECTOR];
        let line = memory.as_ptr().align_offset(64);
        Self { memory, line, stride }
    }

    /// Decodes `len` elements of the weight from the flat index `begin` on.
    pub(super) fn fill(&mut self, row: usize, weight: &Weight4<'_>, begin: usize, len: usize, isa: Isa) {
        let skip = begin % GROUP;
        let output = &mut self.memory[self.line + row * self.stride + GROUP - skip..][..skip + len];
        decode(weight.packed, weight.absmax, weight.codebook, weight.block_size, begin - skip, output, isa);
    }

    /// The first `len` elements of a row's piece.
    pub(super) fn row(&self, row: usize, len: usize) -> &[f32] {
        &self.memory[self.line + row * self.stride + GROUP..][..len]
    }
}

/// `products` [rows, M] of the rows from `first_row` on, for few rows of input: dot products along K.
fn multiply_few(
    input: &[f32],
    tokens: usize,
    weight: &Weight4<'_>,
    first_row: usize,
    products: &mut [f32],
    isa: Isa,
) {
    let len = weight.columns.next_multiple_of(VECTOR);
    let mut decoded = Decoded::new(DOT_ROWS, weight.columns);
    for (i, products) in products.chunks_mut(DOT_ROWS * tokens).enumerate() {
        for row in 0..products.len() / tokens {
            let begin = (first_row + i * DOT_ROWS + row) * weight.columns;
            decoded.fill(row, weight, begin, weight.columns, isa);
        }
        let rows = std::array::from_fn(|row| decoded.row(row, len));
        for (j, inputs) in input.chunks(4 * len).enumerate() {
            let sums = dot(rows, inputs, isa);
            for (products, sums) in products.chunks_mut(tokens).zip(sums) {
                for (product, sum) in products[4 * j..].iter_mut().zip(sums) {
                    *product = sum;
                }
            }
        }
    }
}

/// Dot products of decoded rows with up to four rows of input, all of one length, a multiple of [`VECTOR`].
fn dot(rows: [&[f32]; DOT_ROWS], inputs: &[f32], isa: Isa) -> [[f32; 4]; DOT_ROWS] {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::dot(rows, inputs) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::dot(rows, inputs) },
        Level::Scalar => {
            let mut sums = [[0.0; 4]; DOT_ROWS];
            for (sums, row) in sums.iter_mut().zip(rows) {
                for (sum, input) in sums.iter_mut().zip(inputs.chunks(row.len())) {
                    *sum = dot_scalar(row, input);
                }
            }
            sums
        }
    }
}

/// Sixteen sums side by side, added pairwise at the end: the error grows with K / 16, and the loop vectorizes.
fn dot_scalar(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; VECTOR];
    for (a, b) in a.as_chunks::<VECTOR>().0.iter().zip(b.as_chunks::<VECTOR>().0) {
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
