//! The two backends, the trait that each op implements for both, and the list of all ops.

use crate::cuda::{Stream, forces_triton, full_check, has_kernels, limits, run_between_canaries};
use crate::error::Result;
use crate::ops::{
    blockwise_4bit, blockwise_8bit, gemm_4bit, gemm_4bit_transposed, gemm_int8, int8, nested, tensorwise,
};
use crate::spec::{Bind, Compiled, Value};
use crate::tensor::Device;

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

    /// Whether `qbits.triton_kernels` computes the op too; then [`runs_on_triton`] decides.
    const HAS_TRITON: bool = false;

    /// Whether the caller's framework computes the op faster by ops of its own, where it has them.
    const MAY_DECLINE: bool = false;

    /// Whether it does so for this call, whose outputs may have no memory yet. Refuses here what `run` would refuse, since
    /// `run` is not called where Triton takes over.
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

impl Backend {
    fn device(&self) -> Device {
        match self {
            Self::Cpu(_) => Device::Cpu,
            Self::Cuda(cuda) => Device::Cuda(cuda.stream.device),
        }
    }
}

/// The oldest compute capability that Triton compiles int8 products for.
const TRITON_CAPABILITY: (i32, i32) = (8, 0);

/// Whether ops with [`Run::HAS_TRITON`] run on Triton: where `QBITS_BACKEND=triton` forces it (on the CPU only together with
/// `TRITON_INTERPRET=1`), and on GPUs that no kernel of this build fits.
///
/// # Errors
/// When `QBITS_BACKEND` has a value outside its set; for a device that is none.
pub fn runs_on_triton(op: &str, device: Device) -> Result<bool> {
    let Device::Cuda(ordinal) = device else { return forces_triton(op, true) };
    let is_needed = || Ok(!has_kernels(op, ordinal)? && limits(op, ordinal)?.capability >= TRITON_CAPABILITY);
    if forces_triton(op, false)? { Ok(true) } else { is_needed() }
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
    /// Binds the values and asks [`runs_on_triton`] and [`Run::declines`]; None where the op never does.
    pub declines: Option<Question>,
    /// [`Run::HAS_TRITON`] on CUDA.
    pub has_triton: bool,
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
    let is_declined = match backend {
        Backend::Cpu(cpu) => cpu.declines(&op)?,
        Backend::Cuda(cuda) => cuda.declines(&op)?,
    };
    let name = O::compiled().spec.name;
    Ok(is_declined || <Cuda as Run<O>>::HAS_TRITON && runs_on_triton(name, backend.device())?)
}

macro_rules! ops {
    ($($Op:ty),+ $(,)?) => {
        /// Every op of the crate.
        pub static OPS: &[Op] = &[$(Op {
            compiled: <$Op as Bind>::compiled,
            run: run::<$Op>,
            declines: if <Cuda as Run<$Op>>::MAY_DECLINE || <Cuda as Run<$Op>>::HAS_TRITON {
                Some(declines::<$Op>)
            } else {
                None
            },
            has_triton: <Cuda as Run<$Op>>::HAS_TRITON,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::recorder::{Machine, Recorder};

    fn machine(archs: &'static [&'static str], capability: (i32, i32)) -> Machine {
        let mut machine = Machine::h200().with_image(archs, &[("copy_float32_64", 24)]);
        machine.devices[0].capability = capability;
        machine
    }

    fn runs(device: Device) -> bool {
        runs_on_triton("quantize_rowwise", device).unwrap()
    }

    #[test]
    fn triton_serves_the_gpus_that_no_image_fits() {
        for (archs, capability, expected) in [
            (&["80", "90a"][..], (9, 0), false),
            (&["90a"][..], (8, 0), true),
            (&["80", "90a"][..], (12, 0), true),
            (&["80", "compute_80"][..], (12, 0), false),
            (&["80"][..], (7, 5), false),
        ] {
            let _recorder = Recorder::install(machine(archs, capability));
            assert_eq!(runs(Device::Cuda(0)), expected, "{archs:?} on {capability:?}");
            assert!(!runs(Device::Cpu));
        }
    }

    #[test]
    fn triton_is_forced_on_gpus_and_interpreted_on_the_cpu() {
        for (interpret_triton, on_cpu) in [(false, false), (true, true)] {
            let mut machine = machine(&["90a"], (9, 0));
            machine.settings.force_triton = true;
            machine.settings.interpret_triton = interpret_triton;
            let _recorder = Recorder::install(machine);
            assert!(runs(Device::Cuda(0)));
            assert_eq!(runs(Device::Cpu), on_cpu);
        }
    }
}
