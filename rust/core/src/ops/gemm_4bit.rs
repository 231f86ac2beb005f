//! Product of an input with a 4-bit weight that is decoded on the way.
//! Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3.

use super::blockwise_4bit::{ABSMAX, ABSMAX_RULES, BLOCK_SIZES, CODEBOOKS, codebook_of, host_absmax};
use super::{MAX_GRID, address, block_shift, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::codebook::Codebook4;
use crate::cpu::{self, Execution, Float, Weight4};
use crate::cuda::{Family, Launch, Limits, Params, Symbol, forced_family, launch, limits};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, UINT8};
use crate::tensor::{Dtype, Tensor};

op! {
    /// Multiply by a 4-bit weight: `output = input @ dequantize_4bit(packed, ...).reshape(N, K).T + bias`.
    ///
    /// The sum runs in float32, the bias is added in float32, and the result is rounded once to the input's dtype.
    /// The weight is flat: blocks may straddle rows, so any N and K are legal.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3, equation 5.
    gemm_4bit => Gemm4bit {
        input: In(FLOATS, "M, K"),
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
        output: Out(Of::Like("input"), "M, N"),
    }
    rules: ABSMAX_RULES
}

/// How `qbits.ops` computes a product: "fused", or "dequantize" (decode the weight, then the framework's GEMM). Both are
/// right for every shape; this is the one place that says which is faster.
pub fn path(m: i64, k: i64, is_float32: bool, is_cuda: bool) -> &'static str {
    let most_fused = match (is_cuda, is_float32 || k % 64 != 0) {
        (true, false) => MOST_FUSED_MMA,
        (true, true) => MOST_FUSED_SIMT,
        (false, _) => MOST_FUSED_CPU,
    };
    if m <= most_fused { "fused" } else { "dequantize" }
}

/// Rows of the input up to which the tensor-core kernel wins: at 32 rows and 8192 x 8192 an H200 takes 63 us, decoding and
/// cuBLAS 84.
const MOST_FUSED_MMA: i64 = 32;
/// Rows of the input up to which the other kernels win on a GPU.
const MOST_FUSED_SIMT: i64 = 8;
/// Rows of the input up to which the fused loop wins on a CPU: at 16 rows torch's GEMM on two cores is twice as fast.
const MOST_FUSED_CPU: i64 = 8;

/// The elements of a float tensor of any checked dtype, widened.
///
/// # Safety
/// As [`Run::run`].
unsafe fn widen(tensor: &Tensor) -> Vec<f32> {
    // SAFETY: the caller's promise.
    with_float!(tensor.dtype, T => unsafe { tensor.as_slice::<T>().iter().map(|x| x.to_f32()).collect() })
}

impl Run<Gemm4bit> for Cpu {
    unsafe fn run(&self, op: &Gemm4bit) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let bias = op.bias.map(|bias| widen(&bias));
            let weight = Weight4 {
                packed: op.packed.as_slice(),
                absmax: host_absmax(&op.absmax, op.absmax_scale, op.absmax_offset, op.absmax_codebook),
                rows: op.N as usize,
                columns: op.K as usize,
                codebook: codebook_of(op.codebook),
                block_size: op.block_size as usize,
            };
            cpu::gemm_4bit::<T>(op.input.as_slice(), weight, bias.as_deref(), op.output.as_slice_mut(), execution);
        });
        Ok(())
    }
}

/// Mirror of the kernels' struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Gemm4bitSkinnyParams {
    input: *const u8,
    packed: *const u8,
    absmax: *const u8,
    absmax_scale: *const u8,
    absmax_offset: *const u8,
    absmax_codebook: *const u8,
    bias: *const u8,
    output: *mut u8,
    m: i64,
    n: i64,
    k: i64,
    block_shift: i32,
    codebook: i32,
    bias_dtype: i32,
    tiles_per_cta: i32,
    num_larger_ctas: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/gemm_4bit_skinny.cuh; `param_bytes` is compared at load.
unsafe impl Params for Gemm4bitSkinnyParams {}

/// Rows of the weight in one tile of the tensor cores.
const TILE_ROWS: u64 = 16;
/// Threads of a multiprocessor that the tensor-core kernel uses: one block of 512 or two of 256.
const MMA_THREADS_PER_SM: u32 = 512;
/// Its table of decoded pairs; the partial sums of its warps come behind it.
const MMA_TABLE_BYTES: u32 = 33792;
/// Longest rows whose offsets the tensor-core kernel holds in 32 bits.
const MMA_MAX_K: i64 = 1 << 24;

/// Rows of the weight that one thread block of the other kernels computes.
const SIMT_ROWS: u64 = 8;

/// How a product is launched: the kernel, and how many tiles of rows each of its thread blocks owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct GemmPlan {
    launch: Launch,
    tiles_per_cta: i32,
    num_larger_ctas: i32,
}

impl Gemm4bit {
    /// The first kernel of cuda/gemm_4bit_skinny.cu that may run.
    fn plan(&self, limits: &Limits, family: Option<Family>) -> GemmPlan {
        let is_aligned = |tensor: &Tensor, bytes: usize| (tensor.data as usize).is_multiple_of(bytes);
        let has_mma = limits.capability >= (8, 0) && family != Some(Family::Simt);
        let is_sixteen_bit = self.input.dtype != Dtype::Float32;
        if has_mma
            && is_sixteen_bit
            && self.K % 64 == 0
            && self.K <= MMA_MAX_K
            && is_aligned(&self.packed, 16)
            && is_aligned(&self.input, 16)
        {
            return self.plan_mma(limits);
        }
        let is_wordwise = self.K % 8 == 0 && is_aligned(&self.packed, 4) && is_aligned(&self.input, 16);
        let family = match (is_wordwise, self.absmax_scale.is_some()) {
            (true, false) => "gemm_4bit_skinny_words",
            (true, true) => "gemm_4bit_skinny_words_nested",
            (false, false) => "gemm_4bit_skinny_general",
            (false, true) => "gemm_4bit_skinny_general_nested",
        };
        let tokens = if self.input.shape()[0] == 1 { 1 } else { 4 };
        let launch = Launch {
            symbol: Symbol { family, dtype: Some(self.input.dtype), codebook: "", number: tokens },
            grid: (self.N as u64).div_ceil(SIMT_ROWS).min(MAX_GRID),
            threads: 256,
            shared_bytes: 0,
        };
        GemmPlan { launch, tiles_per_cta: 0, num_larger_ctas: 0 }
    }

    /// Tensor cores: as few waves of thread blocks as hold all tiles, with the tiles spread evenly over them.
    fn plan_mma(&self, limits: &Limits) -> GemmPlan {
        let num_tiles = (self.N as u64).div_ceil(TILE_ROWS);
        let num_sms = u64::from(limits.num_sms);
        // Measured on an H200: two blocks of 256 threads per multiprocessor win for tall weights and short, middling ones.
        let is_middling = num_tiles > num_sms && num_tiles <= 2 * num_sms && self.K <= 4096;
        let threads = if num_tiles > 4 * num_sms || is_middling { 256 } else { 512 };
        let slots = num_sms * u64::from(MMA_THREADS_PER_SM / threads);
        let is_block32 = self.block_size == 32;
        let tiles_at_once = if is_block32 || num_tiles <= 2 * slots { 2 } else { 4 };
        let family = match (tiles_at_once, is_block32, self.absmax_scale.is_some()) {
            (_, true, false) => "gemm_4bit_skinny_rows32_block32",
            (_, true, true) => "gemm_4bit_skinny_rows32_block32_nested",
            (2, _, false) => "gemm_4bit_skinny_rows32",
            (2, _, true) => "gemm_4bit_skinny_rows32_nested",
            (_, _, false) => "gemm_4bit_skinny_rows64",
            (_, _, true) => "gemm_4bit_skinny_rows64_nested",
        };
        let tokens = if self.input.shape()[0] <= 4 || is_block32 { 4 } else { 8 };
        let waves = num_tiles.div_ceil(slots * tiles_at_once);
        let grid = num_tiles.min(waves * slots);
        let launch = Launch {
            symbol: Symbol { family, dtype: Some(self.input.dtype), codebook: "", number: tokens },
            grid,
            threads,
            shared_bytes: MMA_TABLE_BYTES + threads * (tiles_at_once * TILE_ROWS) as u32,
        };
        let tiles_per_cta = num_tiles.checked_div(grid).unwrap_or(0) as i32;
        let num_larger_ctas = num_tiles.checked_rem(grid).unwrap_or(0) as i32;
        GemmPlan { launch, tiles_per_cta, num_larger_ctas }
    }
}

impl Run<Gemm4bit> for Cuda {
    unsafe fn run(&self, op: &Gemm4bit) -> Result<()> {
        if op.output.is_empty() {
            return Ok(());
        }
        let limits = limits("gemm_4bit", self.stream.device)?;
        let plan = op.plan(limits, forced_family("gemm_4bit")?);
        let params = Gemm4bitSkinnyParams {
            input: op.input.data,
            packed: op.packed.data,
            absmax: op.absmax.data,
            absmax_scale: address(op.absmax_scale),
            absmax_offset: address(op.absmax_offset),
            absmax_codebook: address(op.absmax_codebook),
            bias: address(op.bias),
            output: op.output.data,
            m: op.input.shape()[0],
            n: op.N,
            k: op.K,
            block_shift: block_shift(op.block_size),
            codebook: match codebook_of(op.codebook) {
                Codebook4::Nf4 => 0,
                Codebook4::Fp4 => 1,
                Codebook4::Af4 => 2,
            },
            bias_dtype: match op.bias.map(|bias| bias.dtype) {
                None | Some(Dtype::Float32) => 0,
                Some(Dtype::Float16) => 1,
                Some(_) => 2,
            },
            tiles_per_cta: plan.tiles_per_cta,
            num_larger_ctas: plan.num_larger_ctas,
        };
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe { launch("gemm_4bit", &plan.launch, &params, self.stream) }
    }
}
