//! Second-level quantization of block scales ("double quantization").
//! Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3.

use super::MAX_GRID;
use crate::backend::{Cpu, Cuda, Run};
use crate::cpu::{self, Execution};
use crate::cuda::{Launch, Params, Symbol, launch};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, Of};
use crate::tensor::Dtype;

op! {
    /// Quantize the block scales of a 4-bit tensor to 8 bits with the signed dynamic map, in blocks of 256.
    ///
    /// `offset = mean(absmax)`, summed in float64; `codes, scale = quantize_blockwise(absmax - offset, dynamic, 256)`.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3 (double quantization).
    quantize_absmax => QuantizeAbsmax {
        absmax: Flat(FLOAT32, "n"),
        codes: Out(Of::Is(Dtype::Uint8), "n"),
        scale: Out(Of::Is(Dtype::Float32), "ceil_div(n, 256)"),
        offset: Out(Of::Is(Dtype::Float32), ""),
        scratch: Scratch("ceil_div(n, 256) * 8"),
    }
}

impl Run<QuantizeAbsmax> for Cpu {
    unsafe fn run(&self, op: &QuantizeAbsmax) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        unsafe {
            let (codes, scale) = (op.codes.as_slice_mut(), op.scale.as_slice_mut());
            op.offset.as_slice_mut()[0] = cpu::quantize_absmax(op.absmax.as_slice(), codes, scale, execution);
        }
        Ok(())
    }
}

/// Mirror of the struct of the three kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct QuantizeAbsmaxParams {
    absmax: *const u8,
    codes: *mut u8,
    scale: *mut u8,
    offset: *mut u8,
    run_sums: *mut u8, // [ceil_div(n, 256)] float64
    n: i64,
}
// SAFETY: repr(C), field by field the struct of cuda/nested.cu; `param_bytes` is compared at load.
unsafe impl Params for QuantizeAbsmaxParams {}

impl QuantizeAbsmax {
    /// Sums of runs, their mean, codes: each kernel reads what the one before it wrote.
    fn plan(&self) -> [Launch; 3] {
        let blocks = |per_block: u64| (self.absmax.len() as u64).div_ceil(per_block).clamp(1, MAX_GRID);
        let launch = |family, grid, threads| {
            Launch::new(Symbol { family, dtype: None, codebook: "", number: 0 }, grid, threads)
        };
        [
            launch("quantize_absmax_sums", blocks(8192), 256),
            launch("quantize_absmax_offset", 1, 1024),
            launch("quantize_absmax", blocks(4096), 256),
        ]
    }
}

impl Run<QuantizeAbsmax> for Cuda {
    unsafe fn run(&self, op: &QuantizeAbsmax) -> Result<()> {
        let params = QuantizeAbsmaxParams {
            absmax: op.absmax.data,
            codes: op.codes.data,
            scale: op.scale.data,
            offset: op.offset.data,
            run_sums: op.scratch.data,
            n: op.absmax.len(),
        };
        for plan in op.plan() {
            // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
            unsafe { launch("quantize_absmax", &plan, &params, self.stream) }?;
        }
        Ok(())
    }
}
