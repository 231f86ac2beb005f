//! The two backends, the trait that each op implements for both, and the list of all ops.

use crate::cuda::{Stream, full_check, run_between_canaries};
use crate::error::Result;
use crate::ops::{
    blockwise_4bit, blockwise_8bit, gemm_4bit, gemm_4bit_transposed, gemm_int8, int8, nested, tensorwise,
};
use crate::spec::{Bind, Compiled, Value};

/// Runs an op whose arguments were checked. An op without one of the two implementations does not compile.
pub trait Run<Op> {
    /// Computes `op`: at once on the CPU, enqueued on the stream on CUDA.
    ///
    /// # Safety
    /// The op must have been bound from values that `check_inputs` and `check_outputs` accepted, and the memory behind
    /// its tensors must be live, initialized where it is read, and untouched by others until the work is done.
    unsafe fn run(&self, op: &Op) -> Result<()>;

    /// Arguments that a kernel may read before earlier work of the stream has ended, if nobody writes them.
    const WEIGHTS: &[&str] = &[];

    /// Whether the caller's framework computes the op faster by ops of its own, where it has them.
    const MAY_DECLINE: bool = false;

    /// Whether it does so for this call, whose outputs may have no memory yet.
    fn declines(&self, _op: &Op) -> Result<bool> {
        Ok(false)
    }
}

/// Host memory: loops over slices.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Most threads that an op may use.
    pub num_threads: usize,
}

/// A CUDA device: kernels on the caller's stream.
#[derive(Clone, Copy, Debug)]
pub struct Cuda {
    /// Where the work is enqueued; also names the device.
    pub stream: Stream,
    /// The arguments of [`Run::WEIGHTS`] are written by no work in flight: kernels may read them before earlier work of the
    /// stream has ended.
    pub weights_are_ready: bool,
}

/// The backend of one call.
#[derive(Clone, Copy, Debug)]
pub enum Backend {
    /// Host memory.
    Cpu(Cpu),
    /// A CUDA device.
    Cuda(Cuda),
}

/// Asks a backend about a call whose inputs were checked.
pub type Question = fn(&[Value], &Backend) -> Result<bool>;

/// One row of the list of ops: the declaration, and the call with values that it has accepted.
#[derive(Debug)]
pub struct Op {
    /// The declaration, parsed.
    pub compiled: fn() -> &'static Compiled,
    /// Binds the values and runs the op. Safety: as [`Run::run`].
    pub run: unsafe fn(&[Value], &Backend) -> Result<()>,
    /// Binds the values and asks [`Run::declines`]; None where the op never does.
    pub declines: Option<Question>,
    /// [`Run::WEIGHTS`] on CUDA.
    pub weights: &'static [&'static str],
}

/// # Safety
/// As [`Run::run`].
unsafe fn run<O: Bind>(values: &[Value], backend: &Backend) -> Result<()>
where
    Cpu: Run<O>,
    Cuda: Run<O>,
{
    // SAFETY: the caller keeps the promises of `Run::run`, which outputs between canaries keep too.
    unsafe {
        match backend {
            Backend::Cpu(cpu) => cpu.run(&O::from_checked(values)),
            Backend::Cuda(cuda) if full_check() => {
                let run = |values: &[Value]| cuda.run(&O::from_checked(values));
                run_between_canaries(O::compiled().spec, values, cuda.stream, run)
            }
            Backend::Cuda(cuda) => cuda.run(&O::from_checked(values)),
        }
    }
}

fn declines<O: Bind>(values: &[Value], backend: &Backend) -> Result<bool>
where
    Cpu: Run<O>,
    Cuda: Run<O>,
{
    let op = O::from_checked(values);
    match backend {
        Backend::Cpu(cpu) => cpu.declines(&op),
        Backend::Cuda(cuda) => cuda.declines(&op),
    }
}

macro_rules! ops {
    ($($Op:ty),+ $(,)?) => {
        /// Every op of the crate.
        pub static OPS: &[Op] = &[$(Op {
            compiled: <$Op as Bind>::compiled,
            run: run::<$Op>,
            declines: if <Cuda as Run<$Op>>::MAY_DECLINE { Some(declines::<$Op>) } else { None },
            weights: <Cuda as Run<$Op>>::WEIGHTS,
        }),+];
    };
}

ops![
    blockwise_4bit::Quantize4bit,
    blockwise_4bit::Dequantize4bit,
    blockwise_4bit::Pack4bit,
    blockwise_4bit::Unpack4bit,
    blockwise_8bit::QuantizeBlockwise,
    blockwise_8bit::DequantizeBlockwise,
    nested::QuantizeAbsmax,
    tensorwise::Quantize,
    tensorwise::Dequantize,
    tensorwise::QuantizeNoAbsmax,
    tensorwise::DequantizeNoAbsmax,
    gemm_4bit::Gemm4bit,
    gemm_4bit_transposed::Gemm4bitTransposed,
    int8::QuantizeRowwise,
    int8::QuantizeRowwiseOutliers,
    int8::QuantizeColumnwise,
    int8::QuantizeColumnwiseAndTranspose,
    int8::QuantizeGlobal,
    int8::QuantizeGlobalTranspose,
    int8::QuantizeDualRowwise,
    int8::QuantizeDualGlobal,
    int8::DequantizeRowwise,
    int8::DequantizeColumnwise,
    int8::DequantizeGlobal,
    gemm_int8::GemmInt8,
    gemm_int8::GemmInt8Outliers,
];
