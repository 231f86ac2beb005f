//! Products with a 4-bit weight for many rows of input: outer products, whose lanes run along the rows of input.

use super::gemm_4bit::{Decoded, VECTOR, Weight4};
use super::isa::{Isa, Level};
#[cfg(target_arch = "x86_64")]
use super::{gemm_4bit_avx2 as avx2, gemm_4bit_avx512 as avx512};

/// Rows of the weight in one outer product: eight by three vectors of sums leave AVX-512 eight registers for factors.
pub(super) const ROWS: usize = 8;
/// Rows of input in one outer product.
pub(super) const TILE: usize = 3 * VECTOR;
/// Rows of the weight, and elements of each, that are decoded at a time: 4 KB, which stay in the first-level cache while
/// all tiles of the input go by.
const BLOCK_ROWS: usize = 32;
/// Also the number of products after which a sum is put aside: with 512 the error was up to four times torch's,
/// with 64 a little over twice.
const BLOCK_COLUMNS: usize = 32;

/// Up to [`TILE`] rows of input, transposed.
pub(super) struct Tile {
    /// [K, vectors] of [`VECTOR`] rows of input side by side; zeros fill up the last one.
    values: Vec<[f32; VECTOR]>,
    /// 1, 2 or 3.
    vectors: usize,
}

impl Tile {
    /// From `rows` [_, columns].
    pub(super) fn new(rows: &[f32], columns: usize) -> Self {
        let vectors = (rows.len() / columns).div_ceil(VECTOR);
        let mut values = vec![[0.0; VECTOR]; columns * vectors];
        for (m, row) in rows.chunks(columns).enumerate() {
            for (values, x) in values.chunks_mut(vectors).zip(row) {
                values[m / VECTOR][m % VECTOR] = *x;
            }
        }
        Self { values, vectors }
    }
}

/// `products` [rows, M] of the rows from `first_row` on.
pub(super) fn multiply(
    tiles: &[Tile],
    tokens: usize,
    weight: &Weight4<'_>,
    first_row: usize,
    products: &mut [f32],
    isa: Isa,
) {
    let columns = weight.columns;
    let vectors: usize = tiles.iter().map(|tile| tile.vectors).sum();
    let mut decoded = Decoded::new(BLOCK_ROWS, BLOCK_COLUMNS);
    for (i, products) in products.chunks_mut(BLOCK_ROWS * tokens).enumerate() {
        let num_rows = products.len() / tokens;
        let mut sums = vec![[0.0; VECTOR]; BLOCK_ROWS * vectors];
        for begin in (0..columns).step_by(BLOCK_COLUMNS) {
            let len = (columns - begin).min(BLOCK_COLUMNS);
            for row in 0..num_rows {
                decoded.fill(row, weight, (first_row + i * BLOCK_ROWS + row) * columns + begin, len, isa);
            }
            let mut rest = &mut sums[..];
            for tile in tiles {
                let (sums, later) = rest.split_at_mut(BLOCK_ROWS * tile.vectors);
                rest = later;
                let input = &tile.values[begin * tile.vectors..][..len * tile.vectors];
                // The last rows may be those of an earlier block: their sums are not read.
                for (j, sums) in
                    sums.chunks_mut(ROWS * tile.vectors).enumerate().take(num_rows.div_ceil(ROWS))
                {
                    let rows = std::array::from_fn(|row| decoded.row(j * ROWS + row, len));
                    add_outer_products(rows, input, sums, isa);
                }
            }
        }
        let mut sums = &sums[..];
        for (tile, first_token) in tiles.iter().zip((0..).step_by(TILE)) {
            for (row, products) in products.chunks_mut(tokens).enumerate() {
                let sums = sums[row * tile.vectors..][..tile.vectors].as_flattened();
                let products = &mut products[first_token..];
                let num = products.len().min(sums.len());
                products[..num].copy_from_slice(&sums[..num]);
            }
            sums = &sums[BLOCK_ROWS * tile.vectors..];
        }
    }
}

/// Adds to `sums` [ROWS, vectors] the products of `rows` [ROWS, K] with `input` [K, vectors].
fn add_outer_products(rows: [&[f32]; ROWS], input: &[[f32; VECTOR]], sums: &mut [[f32; VECTOR]], isa: Isa) {
    match isa.level() {
        // SAFETY: an `Isa` of this level exists only where the CPU has the features.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { avx512::add_outer_products(rows, input, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::add_outer_products(rows, input, sums) },
        Level::Scalar => add_outer_products_scalar(rows, input, sums),
    }
}

fn add_outer_products_scalar(rows: [&[f32]; ROWS], input: &[[f32; VECTOR]], sums: &mut [[f32; VECTOR]]) {
    let vectors = sums.len() / ROWS;
    for (i, total) in sums.iter_mut().enumerate() {
        let (row, vector) = (rows[i / vectors], i % vectors);
        let mut sum = [0.0; VECTOR];
        for (w, x) in row.iter().zip(input.chunks(vectors)) {
            for (sum, x) in sum.iter_mut().zip(x[vector]) {
                *sum += w * x;
            }
        }
        for (total, sum) in total.iter_mut().zip(sum) {
            *total += sum;
        }
    }
}
