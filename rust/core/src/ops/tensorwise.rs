//! Quantization of a whole tensor with one scale, or with none, by any ascending map of 256 values.
//! Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.

use super::blockwise_8bit::{Dequantize8bitParams, THREADS, plan_decoder};
use super::{symbol, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::codebook::validate_map;
use crate::cpu::{self, Execution};
use crate::cuda::{Launch, Limits, Params, launch, limits};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, UINT8};
use crate::tensor::Dtype;

op! {
    /// Quantize a tensor to 8-bit codes of an ascending map, with one `absmax` for all of it.
    ///
    /// `y = x / absmax`; the code is that of the nearest map value, ties to the even index. A NaN or an Inf anywhere
    /// is stored as `absmax`, and everything decodes to NaN.
    ///
    /// Reference: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.
    quantize => Quantize {
        input: Flat(FLOATS, "n"),
        codebook: Flat(FLOAT32, "256"),
        codes: Out(Of::Is(Dtype::Uint8), "n"),
        absmax: Out(Of::Is(Dtype::Float32), ""),
        scratch: Scratch("4096"),
    }
}

op! {
    /// Decode 8-bit codes with one scale: `output = codebook[code] * absmax` in float32, rounded once to `dtype`.
    ///
    /// Reference: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.
    dequantize => Dequantize {
        codes: Flat(UINT8, "n"),
        absmax: Flat(FLOAT32, "1"),
        codebook: Flat(FLOAT32, "256"),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "n"),
    }
}

op! {
    /// Codes of already scaled values: the nearest entry of an ascending map, ties to the even index.
    ///
    /// Values outside the map take its first or last code; a NaN takes the code of 0.0.
    ///
    /// Reference: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.
    quantize_no_absmax => QuantizeNoAbsmax {
        input: Flat(FLOATS, "n"),
        codebook: Flat(FLOAT32, "256"),
        codes: Out(Of::Is(Dtype::Uint8), "n"),
    }
}

op! {
    /// Decode 8-bit codes without a scale: `output = codebook[code]`, rounded once to `dtype`.
    ///
    /// Reference: Dettmers, 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.
    dequantize_no_absmax => DequantizeNoAbsmax {
        codes: Flat(UINT8, "n"),
        codebook: Flat(FLOAT32, "256"),
        dtype: OneOfDtype(FLOATS),
        output: Out(Of::Arg("dtype"), "n"),
    }
}

impl Run<Quantize> for Cpu {
    unsafe fn run(&self, op: &Quantize) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let map = validate_map("quantize", op.codebook.as_slice())?;
            let absmax = cpu::quantize::<T>(op.input.as_slice(), map, op.codes.as_slice_mut(), execution);
            op.absmax.as_slice_mut()[0] = absmax;
        });
        Ok(())
    }
}

impl Run<Dequantize> for Cpu {
    unsafe fn run(&self, op: &Dequantize) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let map = op.codebook.as_slice().try_into().expect("256 checked entries");
            let absmax = op.absmax.as_slice::<f32>()[0];
            cpu::dequantize::<T>(op.codes.as_slice(), absmax, map, op.output.as_slice_mut(), execution);
        });
        Ok(())
    }
}

impl Run<QuantizeNoAbsmax> for Cpu {
    unsafe fn run(&self, op: &QuantizeNoAbsmax) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.input.dtype, T => unsafe {
            let map = validate_map("quantize_no_absmax", op.codebook.as_slice())?;
            cpu::quantize_no_absmax::<T>(op.input.as_slice(), map, op.codes.as_slice_mut(), execution);
        });
        Ok(())
    }
}

impl Run<DequantizeNoAbsmax> for Cpu {
    unsafe fn run(&self, op: &DequantizeNoAbsmax) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        with_float!(op.dtype, T => unsafe {
            let map = op.codebook.as_slice().try_into().expect("256 checked entries");
            cpu::dequantize_no_absmax::<T>(op.codes.as_slice(), map, op.output.as_slice_mut(), execution);
        });
        Ok(())
    }
}

/// Mirror of the struct of the kernel that searches the largest magnitude.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct AbsmaxParams {
    pub input: *const u8,
    pub partial_absmax: *mut u8, // [grid] uint32
    pub n: i64,
}
// SAFETY: repr(C), field by field the struct of cuda/tensorwise.cu; `param_bytes` is compared at load.
unsafe impl Params for AbsmaxParams {}

/// Mirror of the struct of the encoding kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct QuantizeParams {
    input: *const u8,
    codebook: *const u8,
    codes: *mut u8,
    absmax: *mut u8,           // null: elements are encoded as they are
    partial_absmax: *const u8, // [num_partials] uint32
    n: i64,
    num_partials: i32,
}
// SAFETY: as above.
unsafe impl Params for QuantizeParams {}

/// Thread blocks that search the largest magnitude, one partial result each: as many as the scratch holds.
const MAX_PARTIALS: u64 = 1024;
/// log2 of a block that holds every tensor.
const ONE_BLOCK: i32 = 63;

/// Thread blocks over 16 KB of input each, at least one, so that an empty tensor has its absmax written.
fn num_blocks(dtype: Dtype, n: i64, most: u64) -> u64 {
    (n as u64).div_ceil(16384 / dtype.size() as u64).clamp(1, most)
}

/// Leaves the maxima of at most `most` thread blocks.
pub(super) fn plan_absmax(dtype: Dtype, n: i64, most: u64) -> Launch {
    let grid = num_blocks(dtype, n, most);
    Launch { waits: true, ..Launch::new(symbol("quantize_absmax_of", dtype), grid, THREADS) }
}

/// Four thread blocks fill a multiprocessor; each builds its table of codes once and walks on.
fn plan_encode(dtype: Dtype, n: i64, limits: &Limits) -> Launch {
    let grid = num_blocks(dtype, n, 4 * u64::from(limits.num_sms));
    Launch::new(symbol("quantize", dtype), grid, THREADS)
}

impl Run<Quantize> for Cuda {
    unsafe fn run(&self, op: &Quantize) -> Result<()> {
        let limits = limits("quantize", self.stream.device)?;
        let absmax = plan_absmax(op.input.dtype, op.input.len(), MAX_PARTIALS);
        let params = QuantizeParams {
            input: op.input.data,
            codebook: op.codebook.data,
            codes: op.codes.data,
            absmax: op.absmax.data,
            partial_absmax: op.scratch.data,
            n: op.input.len(),
            num_partials: absmax.grid as i32,
        };
        let absmax_params =
            AbsmaxParams { input: op.input.data, partial_absmax: op.scratch.data, n: op.input.len() };
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe {
            launch("quantize", &absmax, &absmax_params, self.stream)?;
            launch("quantize", &plan_encode(op.input.dtype, params.n, limits), &params, self.stream)
        }
    }
}

impl Run<QuantizeNoAbsmax> for Cuda {
    unsafe fn run(&self, op: &QuantizeNoAbsmax) -> Result<()> {
        if op.input.is_empty() {
            return Ok(());
        }
        let limits = limits("quantize_no_absmax", self.stream.device)?;
        let params = QuantizeParams {
            input: op.input.data,
            codebook: op.codebook.data,
            codes: op.codes.data,
            absmax: std::ptr::null_mut(),
            partial_absmax: std::ptr::null(),
            n: op.input.len(),
            num_partials: 0,
        };
        // SAFETY: as above.
        unsafe {
            launch("quantize_no_absmax", &plan_encode(op.input.dtype, params.n, limits), &params, self.stream)
        }
    }
}

impl Run<Dequantize> for Cuda {
    unsafe fn run(&self, op: &Dequantize) -> Result<()> {
        let params = Dequantize8bitParams {
            codes: op.codes.data,
            absmax: op.absmax.data,
            codebook: op.codebook.data,
            output: op.output.data,
            n: op.codes.len(),
            block_shift: ONE_BLOCK,
        };
        let plan = plan_decoder("dequantize", op.dtype, params.n);
        // SAFETY: as above.
        unsafe { launch("dequantize", &plan, &params, self.stream) }
    }
}

impl Run<DequantizeNoAbsmax> for Cuda {
    unsafe fn run(&self, op: &DequantizeNoAbsmax) -> Result<()> {
        let params = Dequantize8bitParams {
            codes: op.codes.data,
            absmax: std::ptr::null(),
            codebook: op.codebook.data,
            output: op.output.data,
            n: op.codes.len(),
            block_shift: ONE_BLOCK,
        };
        let plan = plan_decoder("dequantize", op.dtype, params.n);
        // SAFETY: as above.
        unsafe { launch("dequantize_no_absmax", &plan, &params, self.stream) }
    }
}
