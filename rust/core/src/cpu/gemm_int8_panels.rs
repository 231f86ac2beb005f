//! Exact sums of products of 8-bit codes, panel by panel: rows of the weight side by side, in pieces that stay in L1.
//! After Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, doi:10.1145/1356052.1356053.

use std::ops::Range;

use super::Execution;
use super::gemm_int8::Codes;
use super::isa::{Isa, Level};
use super::threads::{for_each, part_len};
#[cfg(target_arch = "x86_64")]
use super::{gemm_int8_avx2 as avx2, gemm_int8_avx512 as avx512};

/// Words of a column of a panel, or of a row of the input. A word is multiplied at once: four codes, or two of 16 bits.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u32; 16]);

/// Rows of the input that are multiplied by one panel before the next: their sums stay in L2.
const ROWS_AT_ONCE: usize = 252;
/// Bytes of a panel that all these rows use before the next: they stay in L1 beside a few rows of the input.
const PIECE_BYTES: usize = 24 * 1024;
/// Codes whose sums fit into 32 bits whatever they are: a multiple of every word, below 131071.
const SEGMENT: usize = 1 << 16;
/// Codes of the largest K whose sums fit into 32 bits.
const MAX_NARROW: usize = 131_071;

/// Sums of one row of the input with the rows of the weight in a panel, of whole lines: what lies behind the last row of
/// the weight means nothing.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sums<'a> {
    /// K is at most 131071.
    Narrow(&'a [i32]),
    /// Any K.
    Wide(&'a [i64]),
}

/// How sums are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// Four codes of the input times four of the weight, plus 128 so that they have no sign, into 32 bits that wrap:
    /// `128 * sum(input)` is subtracted again. Everything is exact modulo 2^32, and the sum itself fits.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// Two codes of 16 bits times two.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The same in plain Rust.
    Scalar,
}

impl Kernel {
    fn of(isa: Isa) -> Self {
        match isa.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if is_x86_feature_detected!("avx512vnni") => Self::Vnni,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => Self::Avx2,
            Level::Scalar => Self::Scalar,
        }
    }

    /// The input's codes are signed bytes, the weight's are 128 more; else both are words of 16 bits.
    fn has_offset(self) -> bool {
        self.group() == 4
    }

    /// Codes of a word.
    fn group(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => 4,
            _ => 2,
        }
    }

    /// Rows of the input in one tile.
    fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => avx512::ROWS,
            _ => PLAIN_ROWS,
        }
    }

    /// Lines of a panel, 16 rows of the weight each.
    fn lines(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => avx512::LINES,
            _ => 1,
        }
    }

    /// Adds the products of `input` [words, rows] and `weight` [words, lines] to `sums` [rows, lines].
    fn add_tile(self, input: &[u32], weight: &[Line], sums: &mut [Line]) {
        match self {
            // SAFETY: `Kernel::of` names these only where the CPU has the features.
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => unsafe { avx512::add_tile(input, weight, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::add_tile(input, weight, sums) },
            Self::Scalar => add_tile(input, weight, sums),
        }
    }
}

/// Rows of the input in a tile of words of 16 bits: with two registers of eight sums each they fill AVX2's sixteen.
pub(super) const PLAIN_ROWS: usize = 6;

fn add_tile(input: &[u32], weight: &[Line], sums: &mut [Line]) {
    let halves = |word: u32| (i32::from(word as i16), i32::from((word >> 16) as i16));
    for (input, weight) in input.as_chunks::<PLAIN_ROWS>().0.iter().zip(weight) {
        for (sums, x) in sums.iter_mut().zip(input) {
            let (x0, x1) = halves(*x);
            for (sum, w) in sums.0.iter_mut().zip(&weight.0) {
                let (w0, w1) = halves(*w);
                *sum = sum.wrapping_add((x0 * w0 + x1 * w1) as u32);
            }
        }
    }
}

/// The codes of a word; what lies behind the last is 0.
fn word(codes: &[i8], group: usize) -> u32 {
    let at = |i: usize| codes.get(i).copied().unwrap_or(0);
    match group {
        4 => u32::from_le_bytes(std::array::from_fn(|i| at(i) as u8)),
        _ => u32::from(i16::from(at(0)) as u16) | u32::from(i16::from(at(1)) as u16) << 16,
    }
}

/// The input as tiles want it, and what the offset adds to the sums.
struct Input {
    /// [row blocks][words][rows of a tile]
    words: Vec<u32>,
    /// [row blocks * rows of a tile][segments]: what sums begin with
    starts: Vec<i32>,
    num_words: usize,
    num_segments: usize,
}

impl Input {
    fn new(codes: &Codes<'_>, kernel: Kernel, execution: Execution) -> Self {
        let (depth, rows) = (codes.depth, kernel.rows());
        let num_words = depth.div_ceil(kernel.group());
        let num_segments = if depth <= MAX_NARROW { 1 } else { depth.div_ceil(SEGMENT) };
        let segment = if num_segments == 1 { depth } else { SEGMENT };
        let num_blocks = codes.rows.div_ceil(rows);
        let mut words = vec![0; num_blocks * num_words * rows];
        let mut starts = vec![0; num_blocks * rows * num_segments];
        let blocks_in_part = part_len(codes.input.len(), rows * depth, execution.threads) / (rows * depth);
        let parts = words.chunks_mut(blocks_in_part * num_words * rows);
        let parts = parts.zip(starts.chunks_mut(blocks_in_part * rows * num_segments)).enumerate();
        for_each(execution.threads, parts, |(part, (words, starts))| {
            let first = part * blocks_in_part * rows * depth;
            let last = codes.input.len().min(first + blocks_in_part * rows * depth);
            for (i, row) in codes.input[first..last].chunks(depth).enumerate() {
                let block = &mut words[i / rows * num_words * rows..];
                for (word_in_row, codes) in row.chunks(kernel.group()).enumerate() {
                    block[word_in_row * rows + i % rows] = word(codes, kernel.group());
                }
                if kernel.has_offset() {
                    for (start, codes) in starts[i * num_segments..].iter_mut().zip(row.chunks(segment)) {
                        let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
                        *start = sum.wrapping_mul(-128);
                    }
                }
            }
        });
        Self { words, starts, num_words, num_segments }
    }
}

/// Rows `rows` of the weight as tiles want them: [words][lines].
fn pack_panel(codes: &Codes<'_>, rows: Range<usize>, kernel: Kernel, panel: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if kernel == Kernel::Vnni {
        let weight = &codes.weight[rows.start * codes.depth..rows.end * codes.depth];
        // SAFETY: `Kernel::of` names it only where the CPU has the features.
        return unsafe { avx512::pack_panel(weight, codes.depth, panel) };
    }
    let (group, lines) = (kernel.group(), kernel.lines());
    for (i, n) in rows.enumerate() {
        let row = &codes.weight[n * codes.depth..][..codes.depth];
        let column = panel[i / 16..].iter_mut().step_by(lines);
        for (line, codes) in column.zip(row.chunks(group)) {
            line.0[i % 16] = word(codes, group);
        }
    }
}

/// Calls `row` with the sums of every row of the input and every panel of the weight. `panel` makes what the calls for one
/// panel share, from its rows of the weight. None of M, N and K is 0.
pub(super) fn multiply<P>(
    codes: &Codes<'_>,
    execution: Execution,
    panel: impl Fn(Range<usize>) -> P + Sync,
    row: impl Fn(&P, usize, Sums<'_>) + Sync,
) {
    let kernel = Kernel::of(execution.isa);
    let input = Input::new(codes, kernel, execution);
    let width = 16 * kernel.lines();
    let work_of_panel = width * codes.depth * codes.rows;
    let panels = codes.columns.div_ceil(width);
    let panels_in_part = part_len(panels * work_of_panel, work_of_panel, execution.threads) / work_of_panel;
    let parts = (0..panels).step_by(panels_in_part);
    for_each(execution.threads, parts, |first| {
        let mut packed = vec![Line([0; 16]); input.num_words * kernel.lines()];
        for i in first..panels.min(first + panels_in_part) {
            let rows = i * width..codes.columns.min((i + 1) * width);
            pack_panel(codes, rows.clone(), kernel, &mut packed);
            let shared = panel(rows.clone());
            for first_row in (0..codes.rows).step_by(ROWS_AT_ONCE) {
                let num_rows = ROWS_AT_ONCE.min(codes.rows - first_row);
                multiply_rows(&input, first_row..first_row + num_rows, &packed, kernel, |m, sums| {
                    row(&shared, m, sums);
                });
            }
        }
    });
}

/// The sums of some rows of the input, from a multiple of a tile's on, with one panel.
fn multiply_rows(
    input: &Input,
    rows: Range<usize>,
    panel: &[Line],
    kernel: Kernel,
    mut row: impl FnMut(usize, Sums<'_>),
) {
    let (tile_rows, lines, num_words) = (kernel.rows(), kernel.lines(), input.num_words);
    let width = 16 * lines;
    let num_blocks = rows.len().div_ceil(tile_rows);
    let segment = if input.num_segments == 1 { num_words } else { SEGMENT / kernel.group() };
    let piece = PIECE_BYTES / (4 * width);
    let mut sums = vec![Line([0; 16]); num_blocks * tile_rows * lines];
    let mut totals = vec![0i64; if input.num_segments == 1 { 0 } else { sums.len() * 16 }];
    for s in 0..input.num_segments {
        for (i, sums) in sums.chunks_mut(lines).enumerate() {
            let start = input.starts[(rows.start + i) * input.num_segments + s];
            sums.fill(Line([start as u32; 16]));
        }
        let last = num_words.min((s + 1) * segment);
        for begin in (s * segment..last).step_by(piece) {
            let end = last.min(begin + piece);
            for (i, sums) in sums.chunks_mut(tile_rows * lines).enumerate() {
                let block = &input.words[(rows.start / tile_rows + i) * num_words * tile_rows..];
                kernel.add_tile(
                    &block[begin * tile_rows..end * tile_rows],
                    &panel[begin * lines..end * lines],
                    sums,
                );
            }
        }
        let sums = sums.iter().flat_map(|line| line.0);
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += i64::from(sum as i32));
    }
    for (i, m) in rows.enumerate() {
        match totals.is_empty() {
            true => row(m, Sums::Narrow(Line::as_sums(&sums[i * lines..][..lines]))),
            false => row(m, Sums::Wide(&totals[i * width..][..width])),
        }
    }
}

impl Line {
    /// The words of neighbouring lines as sums.
    fn as_sums(lines: &[Self]) -> &[i32] {
        // SAFETY: a line is sixteen words of 32 bits without padding, and every pattern of them is an i32.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), 16 * lines.len()) }
    }
}
