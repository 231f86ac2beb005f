//! What the families on Hopper's wgmma share: mirrors and maps of cuda/gemm_4bit_wgmma.cuh.

use super::{Gemm4bit, Problem, bias_number, codebook_number};
use crate::cuda::{Limits, Swizzle, Tiled};
use crate::ops::{address, block_shift};
use crate::tensor::Dtype;

/// Mirror of the operands that need no tensor map.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Gemm4bitOperands {
    absmax: *const u8,
    absmax_scale: *const u8,
    absmax_offset: *const u8,
    absmax_codebook: *const u8,
    bias: *const u8,
    output: *mut u8,
    m: i32,
    n: i32,
    k: i32,
    block_shift: i32,
    codebook: i32,
    bias_dtype: i32,
    pub weights_ready: i32,
}

impl Gemm4bitOperands {
    /// Of an op that [`fits`].
    pub fn new(op: &Gemm4bit, weights_are_ready: bool) -> Self {
        Self {
            absmax: op.absmax.data,
            absmax_scale: address(op.absmax_scale),
            absmax_offset: address(op.absmax_offset),
            absmax_codebook: address(op.absmax_codebook),
            bias: address(op.bias),
            output: op.output.data,
            m: op.num_rows() as i32,
            n: op.N as i32,
            k: op.K as i32,
            block_shift: block_shift(op.block_size),
            codebook: codebook_number(op.codebook),
            bias_dtype: bias_number(op.bias),
            weights_ready: weights_are_ready.into(),
        }
    }
}

/// Largest size that the kernels count in 32 bits: their loops go on for up to one tile of every thread block.
const MAX_SIZE: i64 = (1 << 31) - (1 << 17);

/// Whether kernels with maps of input and weight and 32-bit sizes take the problem.
pub(super) fn fits(problem: &Problem, limits: &Limits) -> bool {
    limits.capability == (9, 0)
        && problem.dtype != Dtype::Float32
        && problem.k > 0
        && problem.k % 64 == 0
        && problem.m.max(problem.n).max(problem.k) <= MAX_SIZE
        && problem.is_aligned
}

/// The input [k / 64, m, 64], so that a box of `blocks` x `rows` x 64 lies in shared memory as wgmma reads it.
pub(super) fn input_map(op: &Gemm4bit, rows: u32, blocks: u32) -> Tiled<3> {
    Tiled {
        data: op.input.data,
        dtype: op.input.dtype,
        dims: [64, op.num_rows() as u64, op.K as u64 / 64],
        strides: [2, 2 * op.K as u64, 128],
        box_dims: [64, rows, blocks],
        swizzle: Swizzle::Bytes128,
    }
}

/// The packed weight [n, k / 2], in boxes of `rows` x `row_bytes`.
pub(super) fn packed_map(op: &Gemm4bit, rows: u32, row_bytes: u32) -> Tiled<2> {
    Tiled {
        data: op.packed.data,
        dtype: Dtype::Uint8,
        dims: [op.K as u64 / 2, op.N as u64],
        strides: [1, op.K as u64 / 2],
        box_dims: [row_bytes, rows],
        swizzle: match row_bytes {
            32 => Swizzle::Bytes32,
            64 => Swizzle::Bytes64,
            128 => Swizzle::Bytes128,
            _ => Swizzle::None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::product;
    use super::*;
    use crate::cuda::H200;

    #[test]
    fn sizes_that_a_loop_would_count_beyond_31_bits_are_left_to_other_kernels() {
        let problem = product(40, 4096, 4096, 64, false).problem();
        let fits = |problem: Problem| fits(&problem, &H200);
        for size in [1 << 30, MAX_SIZE] {
            assert!(fits(Problem { m: size, ..problem }) && fits(Problem { n: size, ..problem }));
            assert!(fits(Problem { k: size, ..problem }));
        }
        for size in [MAX_SIZE + 64, (1 << 31) - 64, 1 << 31, 1 << 40] {
            assert!(!fits(Problem { m: size, ..problem }) && !fits(Problem { n: size, ..problem }));
            assert!(!fits(Problem { k: size, ..problem }));
        }
    }
}
