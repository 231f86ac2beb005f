//! 4-bit blockwise quantization: codes two to a byte, one `absmax` per block, plain or nested statistics.
//! Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314, section 3.

use super::{address, block_shift, launch_over, symbol, with_float};
use crate::backend::{Cpu, Cuda, Run};
use crate::codebook::{Codebook4, DYNAMIC_SIGNED};
use crate::cpu::{self, Absmax, Execution, Nested};
use crate::cuda::{Launch, Params, Symbol, launch};
use crate::error::Result;
use crate::op;
use crate::spec::{FLOAT32, FLOATS, Of, Rule, UINT8};
use crate::tensor::{Dtype, Tensor};

/// Words for the 16-entry codebooks that ops take.
pub const CODEBOOKS: &[&str] = &["nf4", "fp4", "af4"];
/// Elements that share one scale.
pub const BLOCK_SIZES: &[i64] = &[32, 64, 128, 256, 512, 1024, 2048, 4096];
/// Blocks of absmax that share one second-level scale.
pub const NESTED_BLOCK_SIZE: i64 = 256;
/// Block scales: float32, or 8-bit codes when nested.
pub const ABSMAX: &[Dtype] = &[Dtype::Float32, Dtype::Uint8];
/// How the four arguments of block scales go together.
pub const ABSMAX_RULES: [Rule; 4] = [
    Rule::Needs("absmax_scale", "absmax_offset"),
    Rule::Needs("absmax_offset", "absmax_scale"),
    Rule::Needs("absmax_codebook", "absmax_scale"),
    Rule::DtypeIfGiven("absmax", "absmax_scale", Dtype::Uint8, Dtype::Float32),
];

op! {
    /// Quantize a tensor to 4-bit codes, two to a byte, with one `absmax` per block.
    ///
    /// `y = x * (1 / absmax)`; the code is that of the nearest value of the codebook. The even element stands in the
    /// high nibble. A block with a NaN or an Inf stores it as `absmax` and decodes to NaN.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3; af4: Yoshida, NF4 Isn't Information
    /// Theoretically Optimal (and that's Good), arXiv:2306.06965.
    quantize_4bit => Quantize4bit {
        input: Flat(FLOATS, "n"),
        codebook: OneOfStr(CODEBOOKS),
        block_size: OneOf(BLOCK_SIZES),
        packed: Out(Of::Is(Dtype::Uint8), "ceil_div(n, 2)"),
        absmax: Out(Of::Is(Dtype::Float32), "ceil_div(n, block_size)"),
    }
}

op! {
    /// Decode 4-bit codes: `output = codebook[code] * absmax` in float32, rounded once to `dtype`.
    ///
    /// Nested statistics (`absmax` of uint8 codes): `absmax = absmax_codebook[code] * absmax_scale + absmax_offset`,
    /// rounded after the product and after the sum; `absmax_scale` holds one entry per 256 blocks, and a missing
    /// `absmax_codebook` is the signed dynamic map.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
    dequantize_4bit => Dequantize4bit {
        packed: Flat(UINT8, "ceil_div(n, 2)"),
        absmax: Flat(ABSMAX, "ceil_div(n, block_size)"),
        n: Int,
        codebook: OneOfStr(CODEBOOKS),
        block_size: OneOf(BLOCK_SIZES),
        dtype: OneOfDtype(FLOATS),
        absmax_scale: OptionalFlat(FLOAT32, "ceil_div(ceil_div(n, block_size), 256)"),
        absmax_offset: OptionalFlat(FLOAT32, "1"),
        absmax_codebook: OptionalFlat(FLOAT32, "256"),
        output: Out(Of::Arg("dtype"), "n"),
    }
    rules: ABSMAX_RULES
}

op! {
    /// Pack 4-bit codes, two to a byte: the even element in the high nibble.
    ///
    /// Only the low four bits of a code are read. An odd count is padded with the code of 0.0 in `codebook`.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314 (layout of its implementation).
    pack_4bit => Pack4bit {
        codes: Flat(UINT8, "n"),
        codebook: OneOfStr(CODEBOOKS),
        packed: Out(Of::Is(Dtype::Uint8), "ceil_div(n, 2)"),
    }
}

op! {
    /// Unpack bytes to 4-bit codes, one to a byte.
    ///
    /// Reference: Dettmers et al., QLoRA, arXiv:2305.14314 (layout of its implementation).
    unpack_4bit => Unpack4bit {
        packed: Flat(UINT8, "ceil_div(n, 2)"),
        n: Int,
        codes: Out(Of::Is(Dtype::Uint8), "n"),
    }
}

/// The codebook of a checked word.
pub(super) fn codebook_of(word: &str) -> Codebook4 {
    Codebook4::from_name(word).unwrap_or_else(|| unreachable!("a checked codebook, got {word}"))
}

/// Block scales on the host, plain or nested.
///
/// # Safety
/// As [`Run::run`], for tensors that follow [`ABSMAX_RULES`].
pub(super) unsafe fn host_absmax<'a>(
    absmax: &Tensor,
    scale: Option<Tensor>,
    offset: Option<Tensor>,
    codebook: Option<Tensor>,
) -> Absmax<'a> {
    // SAFETY: the caller's promise; the rules say which dtype `absmax` has.
    unsafe {
        match (scale, offset) {
            (Some(scale), Some(offset)) => Absmax::Nested(Nested {
                codes: absmax.as_slice(),
                scale: scale.as_slice(),
                offset: offset.as_slice::<f32>()[0],
                map: codebook
                    .map_or(&DYNAMIC_SIGNED, |map| map.as_slice().try_into().expect("256 checked entries")),
            }),
            _ => Absmax::Plain(absmax.as_slice()),
        }
    }
}

impl Run<Quantize4bit> for Cpu {
    unsafe fn run(&self, op: &Quantize4bit) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: the caller's promise: checked lengths and dtypes, written tensors that share no memory.
        with_float!(op.input.dtype, T => unsafe {
            let (packed, absmax) = (op.packed.as_slice_mut(), op.absmax.as_slice_mut());
            let block_size = op.block_size as usize;
            cpu::quantize_4bit::<T>(op.input.as_slice(), codebook_of(op.codebook), block_size, packed, absmax, execution);
        });
        Ok(())
    }
}

impl Run<Dequantize4bit> for Cpu {
    unsafe fn run(&self, op: &Dequantize4bit) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above; the rules of the op are those of `host_absmax`.
        with_float!(op.dtype, T => unsafe {
            let absmax = host_absmax(&op.absmax, op.absmax_scale, op.absmax_offset, op.absmax_codebook);
            let (block_size, output) = (op.block_size as usize, op.output.as_slice_mut());
            cpu::dequantize_4bit::<T>(op.packed.as_slice(), absmax, codebook_of(op.codebook), block_size, output, execution);
        });
        Ok(())
    }
}

impl Run<Pack4bit> for Cpu {
    unsafe fn run(&self, op: &Pack4bit) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        let (codes, packed) = unsafe { (op.codes.as_slice(), op.packed.as_slice_mut()) };
        cpu::pack_4bit(codes, codebook_of(op.codebook), packed, execution);
        Ok(())
    }
}

impl Run<Unpack4bit> for Cpu {
    unsafe fn run(&self, op: &Unpack4bit) -> Result<()> {
        let execution = Execution::new(self.num_threads)?;
        // SAFETY: as above.
        let (packed, codes) = unsafe { (op.packed.as_slice(), op.codes.as_slice_mut()) };
        cpu::unpack_4bit(packed, codes, execution);
        Ok(())
    }
}

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Quantize4bitParams {
    input: *const u8,
    packed: *mut u8,
    absmax: *mut u8,
    n: i64,
    block_shift: i32,
}
// SAFETY: repr(C), field by field the struct of cuda/blockwise_4bit.cu; `param_bytes` is compared at load.
unsafe impl Params for Quantize4bitParams {}

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Dequantize4bitParams {
    packed: *const u8,
    absmax: *const u8,
    absmax_scale: *const u8,
    absmax_offset: *const u8,
    absmax_codebook: *const u8,
    output: *mut u8,
    n: i64,
    block_shift: i32,
}
// SAFETY: as above.
unsafe impl Params for Dequantize4bitParams {}

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Pack4bitParams {
    codes: *const u8,
    packed: *mut u8,
    n: i64,
    zero_code: i32,
}
// SAFETY: as above.
unsafe impl Params for Pack4bitParams {}

/// Mirror of the kernel's struct.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Unpack4bitParams {
    packed: *const u8,
    codes: *mut u8,
    n: i64,
}
// SAFETY: as above.
unsafe impl Params for Unpack4bitParams {}

/// Threads of every kernel of this file.
const THREADS: u32 = 256;
/// Codes that one thread block packs or unpacks.
const REPACKED: u64 = 8192;

impl Quantize4bit {
    /// How it is launched: a block of threads owns 8192 sixteen-bit elements, or 4096 of 32 bits.
    fn plan(&self) -> Launch {
        let per_block = 16384 / self.input.dtype.size() as u64;
        let symbol = Symbol { codebook: self.codebook, ..symbol("quantize_4bit", self.input.dtype) };
        launch_over(symbol, self.input.len(), per_block, THREADS)
    }
}

impl Dequantize4bit {
    /// How it is launched: a block of threads writes 8 KB of output.
    fn plan(&self) -> Launch {
        let family = if self.absmax_scale.is_some() { "dequantize_4bit_nested" } else { "dequantize_4bit" };
        let symbol = Symbol { codebook: self.codebook, ..symbol(family, self.dtype) };
        launch_over(symbol, self.n, 8192 / self.dtype.size() as u64, THREADS)
    }
}

impl Run<Quantize4bit> for Cuda {
    unsafe fn run(&self, op: &Quantize4bit) -> Result<()> {
        let params = Quantize4bitParams {
            input: op.input.data,
            packed: op.packed.data,
            absmax: op.absmax.data,
            n: op.input.len(),
            block_shift: block_shift(op.block_size),
        };
        // SAFETY: the caller's promise: checked lengths and dtypes, live memory of the stream's device.
        unsafe { launch("quantize_4bit", &op.plan(), &params, self.stream) }
    }
}

impl Run<Dequantize4bit> for Cuda {
    unsafe fn run(&self, op: &Dequantize4bit) -> Result<()> {
        let params = Dequantize4bitParams {
            packed: op.packed.data,
            absmax: op.absmax.data,
            absmax_scale: address(op.absmax_scale),
            absmax_offset: address(op.absmax_offset),
            absmax_codebook: address(op.absmax_codebook),
            output: op.output.data,
            n: op.n,
            block_shift: block_shift(op.block_size),
        };
        // SAFETY: as above; the rules give a nested kernel all that it reads.
        unsafe { launch("dequantize_4bit", &op.plan(), &params, self.stream) }
    }
}

impl Run<Pack4bit> for Cuda {
    unsafe fn run(&self, op: &Pack4bit) -> Result<()> {
        let symbol = Symbol { family: "pack_4bit", dtype: None, codebook: "", number: 0 };
        let params = Pack4bitParams {
            codes: op.codes.data,
            packed: op.packed.data,
            n: op.codes.len(),
            zero_code: codebook_of(op.codebook).zero_code().into(),
        };
        let plan = launch_over(symbol, params.n, REPACKED, THREADS);
        // SAFETY: as above.
        unsafe { launch("pack_4bit", &plan, &params, self.stream) }
    }
}

impl Run<Unpack4bit> for Cuda {
    unsafe fn run(&self, op: &Unpack4bit) -> Result<()> {
        let symbol = Symbol { family: "unpack_4bit", dtype: None, codebook: "", number: 0 };
        let params = Unpack4bitParams { packed: op.packed.data, codes: op.codes.data, n: op.n };
        let plan = launch_over(symbol, params.n, REPACKED, THREADS);
        // SAFETY: as above.
        unsafe { launch("unpack_4bit", &plan, &params, self.stream) }
    }
}
