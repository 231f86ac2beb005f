//! The checked launch: plan against device and kernel, the right context, the caller's stream; nothing else.

use super::driver::Driver;
use super::module::Kernel;
use super::settings::{Settings, settings};
use super::{Limits, Runtime, Stream, runtime};
use crate::{Dtype, Error, ErrorKind, Result};
use cudarc::driver::sys::{self, CUpointer_attribute as Attribute};
use std::ffi::{c_uint, c_void};
use std::fmt;
use std::io::Write;

/// Names a kernel without a string: lookups compare it, and only messages spell it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Symbol {
    /// The op and its variant: `quantize_4bit`, `gemm_4bit_sm90`.
    pub family: &'static str,
    /// Of the floating-point tensor.
    pub dtype: Option<Dtype>,
    /// `nf4`, `fp4`, ...; empty where the kernel is for every codebook.
    pub codebook: &'static str,
    /// Block size or tile; 0 where there is none.
    pub number: u32,
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.family)?;
        if let Some(dtype) = self.dtype {
            write!(f, "_{dtype}")?;
        }
        if !self.codebook.is_empty() {
            write!(f, "_{}", self.codebook)?;
        }
        if self.number != 0 {
            write!(f, "_{}", self.number)?;
        }
        Ok(())
    }
}

/// A plan: which kernel, and in which shape. `QBITS_PRINT_PLANS=1` prints each to standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel.
    pub symbol: Symbol,
    /// Number of blocks in x; none means that there is nothing to do.
    pub grid: u64,
    /// Number of blocks in y.
    pub grid_y: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster; 1 where there are none.
    pub cluster: u32,
    /// The kernel may start before earlier work of the stream has ended, because it waits for that itself.
    pub dependent: bool,
    /// The same, as far as the device's image of it was compiled for 9.0 or later, which has the instruction. A dependent
    /// launch takes the host 0.3 us less.
    pub waits: bool,
}

impl Launch {
    /// Without dynamic shared memory, clusters and overlap.
    pub const fn new(symbol: Symbol, grid: u64, threads: u32) -> Self {
        Self { symbol, grid, grid_y: 1, threads, shared_bytes: 0, cluster: 1, dependent: false, waits: false }
    }
}

impl fmt::Display for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { symbol, grid, grid_y, threads, shared_bytes, cluster, dependent, waits: _ } = self;
        write!(f, "{symbol}<<<{grid}")?;
        if *grid_y != 1 {
            write!(f, " x {grid_y}")?;
        }
        write!(f, ", {threads}, {shared_bytes}")?;
        if *cluster != 1 {
            write!(f, ", cluster {cluster}")?;
        }
        if *dependent {
            write!(f, ", dependent")?;
        }
        f.write_str(">>>")
    }
}

/// Blocks in y of any grid on any device.
pub const MAX_GRID_Y: u32 = 65_535;

/// The mirror of the one struct that a kernel takes.
///
/// # Safety
/// The type is `repr(C)` with the fields of the kernel's struct, in order and of the same size and alignment.
/// Its size is compared with the kernel's at every launch; the meaning of its fields cannot be.
pub unsafe trait Params: Copy {}

/// Checks the plan and enqueues the kernel. Never synchronizes or allocates, so it may be captured into a
/// graph; `QBITS_CHECK=full` synchronizes outside of captures.
///
/// # Safety
/// Every pointer in `params` must be valid on the stream's device, for what the kernel reads and writes
/// there, until the stream has run it. `stream.handle` must be a live stream of that device's primary
/// context, or null.
///
/// # Errors
/// When the plan exceeds the device or the kernel, when the GPU has no image of the kernel, and when the
/// driver refuses.
#[inline]
pub unsafe fn launch<P: Params>(op: &str, launch: &Launch, params: &P, stream: Stream) -> Result<()> {
    if launch.grid == 0 {
        return Ok(());
    }
    let runtime = runtime(op)?;
    // SAFETY: `params` is valid for `size_of::<P>()` bytes, and the caller answers for what it holds.
    unsafe { runtime.launch(op, launch, std::ptr::from_ref(params).cast(), size_of::<P>(), stream) }
}

impl Runtime {
    /// # Safety
    /// As [`launch`]; `params` is valid for `param_bytes`.
    unsafe fn launch(
        &self,
        op: &str,
        launch: &Launch,
        params: *const c_void,
        param_bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        let settings = settings(op)?;
        let gpu = self.gpu(op, stream.device)?;
        if settings.print_plans {
            // A closed standard error is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{launch}");
        }
        let kernel = self.kernel(op, launch.symbol, gpu)?;
        check_plan(op, launch, &kernel, param_bytes, &gpu.limits)?;
        let driver = &self.driver;
        let _entered = gpu.enter(driver, op)?;
        if settings.full_check {
            check_stream(driver, op, stream, gpu.context(driver, op)?)?;
        }
        let (mut attributes, num_attributes) = attributes(launch, &kernel);
        let config = sys::CUlaunchConfig {
            // `check_plan` compared it with the device's limit, which is below 2^31.
            gridDimX: launch.grid as c_uint,
            gridDimY: launch.grid_y,
            gridDimZ: 1,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.handle.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: num_attributes,
        };
        let mut argument = params.cast_mut();
        // SAFETY: the kernel takes one parameter of `param_bytes`, which `check_plan` compared and the driver
        // copies before it returns; a CUkernel may stand for a CUfunction; the caller answers for the stream
        // and the pointers.
        let status = unsafe {
            (driver.launch_kernel)(&config, kernel.handle.cast(), &mut argument, std::ptr::null_mut())
        };
        if status != super::driver::SUCCESS {
            return Err(driver.failure(op, &format!("cuLaunchKernelEx({launch})"), status));
        }
        if settings.full_check { await_kernel(driver, op, launch, stream) } else { Ok(()) }
    }
}

/// The launch's attributes, and how many of them count.
#[inline]
fn attributes(launch: &Launch, kernel: &Kernel) -> ([sys::CUlaunchAttribute; 2], c_uint) {
    use sys::CUlaunchAttributeID as Id;
    let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
    let none = || attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, sys::CUlaunchAttributeValue { pad: [0; 64] });
    let (mut attributes, mut count) = ([none(), none()], 0);
    if launch.cluster != 1 {
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
        attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value);
        count += 1;
    }
    if launch.dependent || launch.waits && kernel.can_wait {
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        attributes[count] = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value);
        count += 1;
    }
    (attributes, count as c_uint)
}

/// What is wrong with a plan, where something is.
#[inline]
fn check_plan(op: &str, launch: &Launch, kernel: &Kernel, param_bytes: usize, limits: &Limits) -> Result<()> {
    let refuse = |what: &str, most: u64, got: u64| {
        let message = format!("qbits::{op}: {what} of {} must be at most {most}, got {got}", launch.symbol);
        Err(Error::new(ErrorKind::Value, message))
    };
    if launch.grid > limits.max_grid_x {
        return refuse("grid", limits.max_grid_x, launch.grid);
    }
    if launch.grid_y == 0 || launch.grid_y > MAX_GRID_Y {
        let rule =
            format!("grid_y of {} must be from 1 to {MAX_GRID_Y}, got {}", launch.symbol, launch.grid_y);
        return Err(Error::new(ErrorKind::Value, format!("qbits::{op}: {rule}")));
    }
    if launch.cluster > limits.max_cluster {
        return refuse("cluster", limits.max_cluster.into(), launch.cluster.into());
    }
    if launch.cluster == 0 || !launch.grid.is_multiple_of(launch.cluster.into()) {
        let (symbol, cluster, grid) = (launch.symbol, launch.cluster, launch.grid);
        let rule = format!("grid of {symbol} must be a multiple of its cluster of {cluster}, got {grid}");
        return Err(Error::new(ErrorKind::Value, format!("qbits::{op}: {rule}")));
    }
    if launch.dependent && limits.capability < (9, 0) {
        let (symbol, (major, minor)) = (launch.symbol, limits.capability);
        let rule = format!("a dependent launch of {symbol} must have compute capability 9.0 or more");
        let message = format!("qbits::{op}: {rule}, got {major}.{minor}");
        return Err(Error::new(ErrorKind::UnsupportedHardware, message));
    }
    if launch.threads == 0 {
        let message = format!("qbits::{op}: threads of {} must be at least 1, got 0", launch.symbol);
        return Err(Error::new(ErrorKind::Value, message));
    }
    if launch.threads > kernel.max_threads {
        return refuse("threads", kernel.max_threads.into(), launch.threads.into());
    }
    if launch.shared_bytes > kernel.max_dynamic_shared_bytes {
        return refuse("shared_bytes", kernel.max_dynamic_shared_bytes.into(), launch.shared_bytes.into());
    }
    if param_bytes != kernel.param_bytes {
        let (symbol, kernel_bytes) = (launch.symbol, kernel.param_bytes);
        let rule = format!("the parameters of {symbol} must have {kernel_bytes} bytes, as the kernel does");
        return Err(Error::new(ErrorKind::Driver, format!("qbits::{op}: {rule}, got {param_bytes}")));
    }
    Ok(())
}

/// Memory that an op is about to touch, by the name of its argument.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// The argument.
    pub name: &'a str,
    /// First byte.
    pub data: *const u8,
    /// Number of bytes.
    pub num_bytes: usize,
}

/// `QBITS_CHECK=full` is set. An invalid setting counts as unset here; the launch that follows refuses it.
pub fn full_check() -> bool {
    settings("").is_ok_and(|Settings { full_check, .. }| full_check)
}

/// Asks the driver whether every range lies in memory of the stream's device. Costs microseconds: for
/// [`full_check`] only.
///
/// # Errors
/// Names the first argument whose memory is not the device's, or is shorter than the op needs.
pub fn check_memory(op: &str, memory: &[Memory<'_>], stream: Stream) -> Result<()> {
    let runtime = runtime(op)?;
    let _entered = runtime.gpu(op, stream.device)?.enter(&runtime.driver, op)?;
    memory.iter().try_for_each(|memory| check_range(&runtime.driver, op, memory, stream.device))
}

/// Walks over neighbouring ranges: an allocator that maps memory piece by piece makes one tensor of several.
fn check_range(driver: &Driver, op: &str, memory: &Memory<'_>, device: i32) -> Result<()> {
    let Memory { name, data, num_bytes } = *memory;
    let (start, mut covered) = (data as u64, 0);
    while covered < num_bytes as u64 {
        let found = ask_pointer(driver, op, start + covered)?;
        if covered == 0 && (found.num_bytes == 0 || found.device != device && !found.managed) {
            let got = if found.num_bytes == 0 {
                format!("{data:p}, which the driver does not know")
            } else {
                format!("{data:p} on cuda:{}", found.device)
            };
            let message = format!("qbits::{op}: {name} must be memory of cuda:{device}, got {got}");
            return Err(Error::new(ErrorKind::Device, message));
        }
        let end = found.start.saturating_add(found.num_bytes);
        if end <= start + covered || found.device != device && !found.managed {
            let rule = format!("{name} must have {num_bytes} bytes of memory behind {data:p}");
            return Err(Error::new(ErrorKind::Value, format!("qbits::{op}: {rule}, got {covered}")));
        }
        covered = end - start;
    }
    Ok(())
}

/// The allocation around an address, as the driver knows it; without bytes where it knows none.
#[derive(Default)]
struct Found {
    device: i32,
    start: u64,
    num_bytes: u64,
    managed: bool,
}

fn ask_pointer(driver: &Driver, op: &str, address: u64) -> Result<Found> {
    let mut found = Found::default();
    // cuda.h writes this one as an unsigned int, older drivers as one byte
    let mut managed: c_uint = 0;
    let mut attributes = [
        Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL as c_uint,
        Attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR as c_uint,
        Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE as c_uint,
        Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED as c_uint,
    ];
    let mut values: [*mut c_void; 4] = [
        (&raw mut found.device).cast(),
        (&raw mut found.start).cast(),
        (&raw mut found.num_bytes).cast(),
        (&raw mut managed).cast(),
    ];
    // SAFETY: four attributes and four places of the sizes that cuda.h states; an unknown address leaves
    // zeros.
    let status =
        unsafe { (driver.pointer_attributes)(4, attributes.as_mut_ptr(), values.as_mut_ptr(), address) };
    driver.check(op, "cuPointerGetAttributes", status)?;
    found.managed = managed != 0;
    Ok(found)
}

/// The stream belongs to the context that was made current.
fn check_stream(driver: &Driver, op: &str, stream: Stream, context: sys::CUcontext) -> Result<()> {
    let mut owner = std::ptr::null_mut();
    // SAFETY: the caller of `launch` promises a live stream; `owner` outlives the call.
    let status = unsafe { (driver.stream_context)(stream.handle.cast(), &mut owner) };
    driver.check(op, "cuStreamGetCtx", status)?;
    if owner == context {
        return Ok(());
    }
    let rule = format!("stream must belong to the primary context of cuda:{}", stream.device);
    Err(Error::new(ErrorKind::Device, format!("qbits::{op}: {rule}, got {:p} of another", stream.handle)))
}

/// Nothing may wait for the stream, which must be live, on the current context.
pub(super) fn is_capturing(driver: &Driver, stream: Stream) -> bool {
    let mut capturing: c_uint = 0;
    // SAFETY: the caller answers for the stream; `capturing` outlives the call.
    let status = unsafe { (driver.stream_is_capturing)(stream.handle.cast(), &mut capturing) };
    // The legacy stream answers with an error while another stream is captured.
    status != super::driver::SUCCESS || capturing != 0
}

/// Waits for the kernel, so that its fault is told with its name; during a capture nothing runs, and nothing
/// may wait.
fn await_kernel(driver: &Driver, op: &str, launch: &Launch, stream: Stream) -> Result<()> {
    if is_capturing(driver, stream) {
        return Ok(());
    }
    // SAFETY: the caller of `launch` promises a live stream.
    let status = unsafe { (driver.stream_synchronize)(stream.handle.cast()) };
    driver.check(op, &format!("{launch}"), status)
}

#[cfg(test)]
mod tests;
