//! Product of an input with a 4-bit weight that is decoded on the way.
//! Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3.

mod large;
mod mid;
mod skinny;
mod skinny_sm90;
mod wgmma;

use super::blockwise_4bit::{ABSMAX, ABSMAX_RULES, BLOCK_SIZES, CODEBOOKS, codebook_of};
use super::{bias_number, host_weight, is_built, widen, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::codebook::Codebook4;
use crate::cpu::{self, Execution};
use crate::cuda::{Family, Limits, forced_family, launch, limits};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, UINT8};
use crate::tensor::{Dtype, Tensor};

op! {
    /// Multiply by a 4-bit weight: `output = input @ dequantize_4bit(packed, ...).reshape(N, K).T + bias`.
    ///
    /// The sum runs in float32, the bias is added in float32, and the result is rounded once to the input's dtype.
    /// The weight is flat: blocks may straddle rows, so any N and K are legal. Dimensions before the last are rows.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3, equation 5.
    gemm_4bit => Gemm4bit {
        input: In(FLOATS, "*M, K"),
        packed: Flat(UINT8, "ceil_div(N * K, 2)"),
        absmax: Flat(ABSMAX, "ceil_div(N * K, block_size)"),
        N: Int,
        K: Int,
        codebook: OneOfStr(CODEBOOKS),
        block_size: OneOf(BLOCK_SIZES),
        bias: Optional(FLOATS, "N"),
        absmax_scale: OptionalFlat(FLOAT32, "ceil_div(ceil_div(N * K, block_size), 256)"),
        absmax_offset: OptionalFlat(FLOAT32, "1"),
        absmax_codebook: OptionalFlat(FLOAT32, "256"),
        output: Out(Of::Like("input"), "*M, N"),
    }
    rules: ABSMAX_RULES
}

/// What decides how a product is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Rows of the input.
    pub m: i64,
    /// Rows of the weight.
    pub n: i64,
    /// Columns of both.
    pub k: i64,
    /// Of input and output.
    pub dtype: Dtype,
    /// Weights that share a scale.
    pub block_size: i64,
    /// Block scales are codes themselves.
    pub is_nested: bool,
    /// Input, packed weight and block scales start on 16 bytes.
    pub is_aligned: bool,
}

/// How a product is computed. All ways are right for every problem that reaches them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the loops of the CPU.
    Cpu,
    /// By one kernel of this family.
    Fused(Family),
    /// The weight is decoded; the framework's GEMM does the rest.
    Dequantize,
}

impl Way {
    /// As Python and printed plans have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Fused(family) => family.name(),
            Self::Dequantize => "dequantize",
        }
    }
}

/// One line of what was measured: where a family is the fastest way.
struct Range {
    /// Compute capabilities, from this one
    since: (i32, i32),
    /// up to this one.
    until: (i32, i32),
    /// Most rows of the input.
    most_rows: i64,
    family: Family,
}

const HOPPER: (i32, i32) = (9, 0);
const ANY_GPU: (i32, i32) = (i32::MAX, 0);

const fn range(since: (i32, i32), until: (i32, i32), most_rows: i64, family: Family) -> Range {
    Range { since, until, most_rows, family }
}

/// The fastest family: the first line that holds and whose kernels can run. Where none does, decoding and the framework's
/// GEMM are faster. Measured on an H200 with NF4 in blocks of 64 and bfloat16, in us at 8192 x 8192: 16 rows `Mid` 16,
/// `Skinny` 33; 128 rows `Mid` 40, decoding and cuBLAS 70; 256 rows `Large` 63 against 83, 512 rows 125 against 132,
/// 1024 rows 225 against 259. The line of Ampere is of 32 rows: `Skinny` 63, decoding and cuBLAS 84.
const FASTEST: &[Range] = &[
    range(HOPPER, HOPPER, 8, Family::SkinnySm90),
    range(HOPPER, HOPPER, 8, Family::Skinny),
    range(HOPPER, HOPPER, 128, Family::Mid),
    range(HOPPER, HOPPER, 1024, Family::Large),
    range((8, 0), ANY_GPU, 32, Family::Skinny),
    range((0, 0), ANY_GPU, 8, Family::Simt),
];
/// Families in the order in which they are tried when decoding is no choice: `Simt` takes every problem.
const FALLBACKS: &[Family] = &[Family::Large, Family::Mid, Family::Skinny, Family::Simt];
/// Rows of the input up to which the fused loop wins on a CPU. Two cores with AVX-512, 4096 x 4096, float32: 4 ms at 16 rows
/// (decoding and torch 44), 30 at 128 (58). torch's bfloat16 GEMM may use matrix units: 7 at 32 rows (14 to 23).
const MOST_FUSED_CPU: i64 = 128;
const MOST_FUSED_CPU_16BIT: i64 = 32;

impl Range {
    fn holds(&self, problem: &Problem, limits: &Limits) -> bool {
        (self.since..=self.until).contains(&limits.capability) && problem.m <= self.most_rows
    }
}

impl Problem {
    /// The one rule: how this product is computed the fastest on a GPU, or on the CPU without limits. A forced family counts
    /// wherever it can run.
    pub fn fastest(&self, limits: Option<&Limits>, forced: Option<Family>) -> Way {
        let Some(limits) = limits else {
            let most = if self.dtype == Dtype::Float32 { MOST_FUSED_CPU } else { MOST_FUSED_CPU_16BIT };
            return if self.m <= most { Way::Cpu } else { Way::Dequantize };
        };
        if let Some(family) = forced.filter(|family| self.fits(*family, limits)) {
            return Way::Fused(family);
        }
        let is_fastest = |range: &&Range| range.holds(self, limits) && self.fits(range.family, limits);
        let found = FASTEST.iter().find(is_fastest);
        found.map_or(Way::Dequantize, |range| Way::Fused(range.family))
    }

    /// The family of a launch: the fastest, or the first that can run where the caller has no GEMM of its own.
    fn family(&self, limits: &Limits, forced: Option<Family>) -> Family {
        match self.fastest(Some(limits), forced) {
            Way::Fused(family) => family,
            _ => *FALLBACKS.iter().find(|family| self.fits(**family, limits)).unwrap_or(&Family::Simt),
        }
    }

    /// Whether the family has a kernel for the problem and the device.
    fn fits(&self, family: Family, limits: &Limits) -> bool {
        match family {
            Family::SkinnySm90 => is_built("gemm_4bit_skinny_sm90") && skinny_sm90::fits(self, limits),
            Family::Skinny => skinny::fits(self, limits),
            Family::Mid => is_built("gemm_4bit_mid_sm90") && mid::fits(self, limits),
            Family::Large => is_built("gemm_4bit_large_sm90") && large::fits(self, limits),
            Family::Simt => true,
            Family::Mma => false,
        }
    }
}

impl Run<Gemm4bit> for Cpu {
    unsafe fn run(&self, op: &Gemm4bit) -> Result<()> {
        if op.output.is_empty() {
            return Ok(());
        }
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let bias = op.bias.map(|bias| widen(&bias));
            cpu::gemm_4bit::<T>(op.input.as_slice(), host_weight!(op), bias.as_deref(), op.output.as_slice_mut(), execution);
        });
        Ok(())
    }

    fn declines(&self, op: &Gemm4bit) -> Result<bool> {
        Ok(op.problem().fastest(None, None) == Way::Dequantize)
    }
}

/// Number of a codebook in the kernels' parameters.
pub(super) fn codebook_number(word: &str) -> i32 {
    match codebook_of(word) {
        Codebook4::Nf4 => 0,
        Codebook4::Fp4 => 1,
        Codebook4::Af4 => 2,
    }
}

impl Gemm4bit {
    /// Rows of input and output; none where the output is empty.
    fn num_rows(&self) -> i64 {
        self.output.len().checked_div(self.N).unwrap_or(0)
    }

    fn problem(&self) -> Problem {
        let is_aligned = |tensor: &Tensor| (tensor.data as usize).is_multiple_of(16);
        Problem {
            m: self.num_rows(),
            n: self.N,
            k: self.K,
            dtype: self.input.dtype,
            block_size: self.block_size,
            is_nested: self.absmax_scale.is_some(),
            is_aligned: is_aligned(&self.input) && is_aligned(&self.packed) && is_aligned(&self.absmax),
        }
    }
}

impl Run<Gemm4bit> for Cuda {
    unsafe fn run(&self, op: &Gemm4bit) -> Result<()> {
        if op.output.is_empty() {
            return Ok(());
        }
        let limits = limits("gemm_4bit", self.stream.device)?;
        let is_ready = self.weights_are_ready && limits.capability >= (9, 0);
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe {
            match op.problem().family(limits, forced_family("gemm_4bit")?) {
                Family::SkinnySm90 => {
                    let (plan, params) = skinny_sm90::plan(op, limits, is_ready)?;
                    launch("gemm_4bit", &plan, &params, self.stream)
                }
                Family::Large => {
                    let (plan, params) = large::plan(op, limits, is_ready)?;
                    launch("gemm_4bit", &plan, &params, self.stream)
                }
                Family::Mid => {
                    let (plan, params) = mid::plan(op, limits, is_ready)?;
                    launch("gemm_4bit", &plan, &params, self.stream)
                }
                Family::Skinny => {
                    let (plan, params) = skinny::plan_mma(op, limits);
                    launch("gemm_4bit", &plan, &params, self.stream)
                }
                _ => {
                    let (plan, params) = skinny::plan_simt(op);
                    launch("gemm_4bit", &plan, &params, self.stream)
                }
            }
        }
    }

    const WEIGHTS: &[&str] = &["packed", "absmax", "absmax_scale", "absmax_offset", "absmax_codebook"];
    const MAY_DECLINE: bool = true;

    fn declines(&self, op: &Gemm4bit) -> Result<bool> {
        let limits = limits("gemm_4bit", self.stream.device)?;
        Ok(op.problem().fastest(Some(limits), forced_family("gemm_4bit")?) == Way::Dequantize)
    }
}

#[cfg(test)]
mod tests;
