//! 8-bit blockwise quantization with any ascending map of 256 values.
//! Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.

use super::{block_shift, launch_over, symbol, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::codebook::validate_map;
use crate::cpu::{self, Execution};
use crate::cuda::{Launch, Params, launch};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, UINT8};
use crate::tensor::Dtype;

/// Elements that share one scale.
pub const BLOCK_SIZES: &[i64] = &[64, 128, 256, 512, 1024, 2048, 4096];

op! {
    /// Quantize a tensor to 8-bit codes of an ascending map, with one `absmax` per block.
    ///
    /// `y = x * (1 / absmax)`; the code is that of the nearest map value, ties to the even index. A block with a NaN
    /// or an Inf stores it as `absmax` and decodes to NaN.
    ///
    /// Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
    quantize_blockwise => QuantizeBlockwise {
        input: Flat(FLOATS, "n"),
        codebook: Flat(FLOAT32, "256"),
        block_size: OneOf(BLOCK_SIZES),
        codes: Out(Of::Is(Dtype::Uint8), "n"),
        absmax: Out(Of::Is(Dtype::Float32), "ceil_div(n, block_size)"),
    }
}

op! {
    /// Decode 8-bit codes: `output = codebook[code] * absmax` in float32, rounded once to `dtype`.
    ///
    /// Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
    dequantize_blockwise => DequantizeBlockwise {
        codes: Flat(UINT8, "n"),
        absmax: Flat(FLOAT32, "ceil_div(n, block_size)"),
        codebook: Flat(FLOAT32, "256"),
        block_size: OneOf(BLOCK_SIZES),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "n"),
    }
}

impl Run<QuantizeBlockwise> for Cpu {
    unsafe fn run(&self, op: &QuantizeBlockwise) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let map = validate_map("quantize_blockwise", op.codebook.as_slice())?;
            let (codes, absmax) = (op.codes.as_slice_mut(), op.absmax.as_slice_mut());
            let block_size = op.block_size as usize;
            cpu::quantize_blockwise::<T>(op.input.as_slice(), map, block_size, codes, absmax, execution);
        });
        Ok(())
    }
}

impl Run<DequantizeBlockwise> for Cpu {
    unsafe fn run(&self, op: &DequantizeBlockwise) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let map = op.codebook.as_slice().try_into().expect("256 checked entries");
            let (block_size, output) = (op.block_size as usize, op.output.as_slice_mut());
            cpu::dequantize_blockwise::<T>(op.codes.as_slice(), op.absmax.as_slice(), map, block_size, output, execution);
        });
        Ok(())
    }
}

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct QuantizeBlockwiseParams {
    input: *const u8,
    codebook: *const u8,
    codes: *mut u8,
    absmax: *mut u8,
    n: i64,
    block_shift: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/blockwise_8bit.cu; `param_bytes` is compared at load.
unsafe impl Params for QuantizeBlockwiseParams {}

/// Mirror of the struct of the 8-bit decoders, which tensorwise ops use too.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Dequantize8bitParams {
    pub codes: *const u8,
    pub absmax: *const u8, // null: 1
    pub codebook: *const u8,
    pub output: *mut u8,
    pub n: i64,
    pub block_shift: i32, // 63: one block holds everything
}
// SAFETY: as above, for cuda/blockwise_8bit.cuh.
unsafe impl Params for Dequantize8bitParams {}

/// Threads of every 8-bit kernel.
pub(super) const THREADS: u32 = 256;
/// Tiles of 16 KB of input that a thread block of the quantizer does, since it makes tables first.
const MANY_TILES: u64 = 4;
/// The last thread blocks do one, so that all multiprocessors end together: six for each of an H200, where 4 to 12 are
/// within 1 % for the signed dynamic map, and every one costs the other maps time.
const NUM_SMALL: u64 = 792;

impl QuantizeBlockwise {
    fn plan(&self) -> Launch {
        let num_tiles = (self.input.len() as u64).div_ceil(16384 / self.input.dtype.size() as u64);
        let num_small = num_tiles.min(NUM_SMALL);
        let grid = num_small + (num_tiles - num_small).div_ceil(MANY_TILES);
        launch_over(symbol("quantize_blockwise", self.input.dtype), grid as i64, 1, THREADS)
    }
}

/// A decoder of `family`: a block of threads writes 8 KB of output.
pub(super) fn plan_decoder(family: &'static str, dtype: Dtype, n: i64) -> Launch {
    launch_over(symbol(family, dtype), n, 8192 / dtype.size() as u64, THREADS)
}

impl Run<QuantizeBlockwise> for Cuda {
    unsafe fn run(&self, op: &QuantizeBlockwise) -> Result<()> {
        let params = QuantizeBlockwiseParams {
            input: op.input.data,
            codebook: op.codebook.data,
            codes: op.codes.data,
            absmax: op.absmax.data,
            n: op.input.len(),
            block_shift: block_shift(op.block_size),
        };
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe { launch("quantize_blockwise", &op.plan(), &params, self.stream) }
    }
}

impl Run<DequantizeBlockwise> for Cuda {
    unsafe fn run(&self, op: &DequantizeBlockwise) -> Result<()> {
        let params = Dequantize8bitParams {
            codes: op.codes.data,
            absmax: op.absmax.data,
            codebook: op.codebook.data,
            output: op.output.data,
            n: op.codes.len(),
            block_shift: block_shift(op.block_size),
        };
        let plan = plan_decoder("dequantize_blockwise", op.dtype, params.n);
        // SAFETY: as above.
        unsafe { launch("dequantize_blockwise", &plan, &params, self.stream) }
    }
}
