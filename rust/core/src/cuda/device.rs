//! Devices: their limits, their primary contexts, and whose context is current.

use super::driver::{Driver, split_version};
use super::{Runtime, runtime};
use crate::{Error, ErrorKind, Result};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::OnceLock;

/// What a plan must know of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The driver's number of the device.
    pub ordinal: i32,
    /// Compute capability: (9, 0) on Hopper.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub num_sms: u32,
    /// Threads of one block.
    pub max_threads_per_block: u32,
    /// Registers of one block.
    pub registers_per_block: u32,
    /// Shared memory of one block, static and dynamic, where a kernel opts in.
    pub shared_bytes_optin: u32,
    /// Blocks of a grid.
    pub max_grid_x: u64,
    /// Blocks of a cluster that every such device runs; 1 where there are no clusters.
    pub max_cluster: u32,
    /// Memory of the device.
    pub total_bytes: usize,
}

/// The limits of an H200, for tests of plans.
#[cfg(test)]
pub(crate) const H200: Limits = Limits {
    ordinal: 0,
    capability: (9, 0),
    num_sms: 132,
    max_threads_per_block: 1024,
    registers_per_block: 65_536,
    shared_bytes_optin: 232_448,
    max_grid_x: 2_147_483_647,
    max_cluster: 8,
    total_bytes: 150_000_000_000,
};

/// Blocks of a cluster that every GPU with clusters schedules (CUDA programming guide, thread block clusters).
const PORTABLE_CLUSTER: u32 = 8;

/// One device, as far as it was needed until now.
pub(super) struct Gpu {
    pub limits: Limits,
    pub handle: sys::CUdevice,
    name: String,
    context: OnceLock<sys::CUcontext>,
    /// The stream of `current_stream_for`.
    pub stream: OnceLock<sys::CUstream>,
    /// The answer of `has_kernels`, which calls ask for.
    pub has_kernels: OnceLock<bool>,
}

impl Gpu {
    fn open(driver: &Driver, op: &str, ordinal: i32) -> Result<Self> {
        let mut handle = 0;
        // SAFETY: the driver is initialized; `handle` outlives the call.
        driver.check(op, "cuDeviceGet", unsafe { (driver.device_get)(&mut handle, ordinal) })?;
        let attribute = |attribute: sys::CUdevice_attribute| {
            let mut value: c_int = 0;
            // SAFETY: `handle` is a device; `value` outlives the call.
            let status = unsafe { (driver.device_attribute)(&mut value, attribute as c_uint, handle) };
            driver.check(op, "cuDeviceGetAttribute", status)?;
            Ok(value)
        };
        let count = |kind| attribute(kind).map(i32::unsigned_abs);
        let mut total_bytes = 0;
        // SAFETY: `handle` is a device; `total_bytes` outlives the call.
        let status = unsafe { (driver.device_total_bytes)(&mut total_bytes, handle) };
        driver.check(op, "cuDeviceTotalMem", status)?;
        use sys::CUdevice_attribute as Attribute;
        let limits = Limits {
            ordinal,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            num_sms: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            max_threads_per_block: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            registers_per_block: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK)?,
            shared_bytes_optin: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            max_grid_x: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?.into(),
            max_cluster: match count(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? {
                0 => 1,
                _ => PORTABLE_CLUSTER,
            },
            total_bytes,
        };
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: `name` outlives the call, which writes at most 256 bytes.
        let status = unsafe { (driver.device_name)(name.as_mut_ptr(), 256, handle) };
        driver.check(op, "cuDeviceGetName", status)?;
        name[255] = 0;
        // SAFETY: the last byte is zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Self {
            limits,
            handle,
            name,
            context: OnceLock::new(),
            stream: OnceLock::new(),
            has_kernels: OnceLock::new(),
        })
    }

    /// The primary context, retained once and never released: it is torch's too, and outlives every static.
    #[inline]
    pub fn context(&self, driver: &Driver, op: &str) -> Result<sys::CUcontext> {
        if let Some(context) = self.context.get() {
            return Ok(*context);
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: `handle` is a device; `context` outlives the call.
        let status = unsafe { (driver.primary_context_retain)(&mut context, self.handle) };
        driver.check(op, "cuDevicePrimaryCtxRetain", status)?;
        // Two threads may both come here: a second retain is as harmless as a first one that is never
        // released.
        Ok(*self.context.get_or_init(|| context))
    }

    /// Makes the device's context current until the guard is dropped.
    #[inline]
    pub fn enter<'a>(&self, driver: &'a Driver, op: &str) -> Result<Entered<'a>> {
        let context = self.context(driver, op)?;
        let mut current = std::ptr::null_mut();
        // SAFETY: the driver is initialized; `current` outlives the call.
        driver.check(op, "cuCtxGetCurrent", unsafe { (driver.context_get_current)(&mut current) })?;
        if current == context {
            return Ok(Entered { driver, previous: None });
        }
        // SAFETY: `context` is a primary context that is never released.
        driver.check(op, "cuCtxSetCurrent", unsafe { (driver.context_set_current)(context) })?;
        Ok(Entered { driver, previous: Some(current) })
    }
}

/// Restores the context that was current before.
pub(super) struct Entered<'a> {
    driver: &'a Driver,
    previous: Option<sys::CUcontext>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(previous) = self.previous {
            // A failure cannot be told from here; the next call of this thread meets it again.
            // SAFETY: `previous` was current on this thread when the guard was made, or is null, which means
            // none.
            let _ = unsafe { (self.driver.context_set_current)(previous) };
        }
    }
}

/// The devices of the machine, opened one by one when they are first used.
pub(super) struct Gpus(Vec<OnceLock<Gpu>>);

impl Gpus {
    pub fn new(num_devices: c_int) -> Self {
        Self((0..num_devices).map(|_| OnceLock::new()).collect())
    }
}

impl Runtime {
    /// The device with this ordinal.
    #[inline]
    pub(super) fn gpu(&self, op: &str, ordinal: i32) -> Result<&Gpu> {
        let slot = usize::try_from(ordinal).ok().and_then(|index| self.gpus.0.get(index));
        let Some(slot) = slot else {
            let rule = format!("device must be one of the {} CUDA devices", self.gpus.0.len());
            return Err(Error::new(ErrorKind::Device, format!("qbits::{op}: {rule}, got cuda:{ordinal}")));
        };
        if let Some(gpu) = slot.get() {
            return Ok(gpu);
        }
        let gpu = Gpu::open(&self.driver, op, ordinal)?;
        Ok(slot.get_or_init(|| gpu))
    }
}

/// The limits of a device, asked from the driver once.
///
/// # Errors
/// Without a driver, and for an ordinal that is none.
pub fn limits(op: &str, ordinal: i32) -> Result<&'static Limits> {
    Ok(&runtime(op)?.gpu(op, ordinal)?.limits)
}

/// Number of CUDA devices.
///
/// # Errors
/// Says why the driver cannot be used.
pub fn num_devices() -> Result<i32> {
    // The driver counts in c_int.
    Ok(runtime("info")?.gpus.0.len() as i32)
}

/// There is a driver, and it has a device.
pub fn is_available() -> bool {
    num_devices().is_ok_and(|count| count > 0)
}

/// The driver's name of a device.
///
/// # Errors
/// As [`limits`].
pub fn device_name(ordinal: i32) -> Result<String> {
    Ok(runtime("info")?.gpu("info", ordinal)?.name.clone())
}

/// The newest CUDA version that the driver supports: (13, 0).
///
/// # Errors
/// As [`num_devices`].
pub fn driver_version() -> Result<(i32, i32)> {
    let driver = &runtime("info")?.driver;
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    driver.check("info", "cuDriverGetVersion", unsafe { (driver.driver_version)(&mut version) })?;
    Ok(split_version(version))
}

/// Runs `f` with the device's primary context current, and restores what was current before.
///
/// # Errors
/// As [`limits`], and those of `f`.
pub fn with_context<R>(op: &str, ordinal: i32, f: impl FnOnce() -> Result<R>) -> Result<R> {
    let runtime = runtime(op)?;
    let _entered = runtime.gpu(op, ordinal)?.enter(&runtime.driver, op)?;
    f()
}

#[cfg(test)]
mod tests {
    use super::super::recorder::{Machine, Recorder};
    use super::*;

    #[test]
    fn limits_come_from_the_driver_once() {
        let recorder = Recorder::install(Machine::h200());
        assert_eq!(limits("quantize_4bit", 0).unwrap(), &H200);
        let num_calls = recorder.calls().len();
        assert_eq!(limits("quantize_4bit", 0).unwrap(), &H200);
        assert_eq!(recorder.calls().len(), num_calls);
        assert_eq!(device_name(0).unwrap(), "Recorded GPU 0");
    }

    #[test]
    fn an_ordinal_that_is_none_is_refused() {
        let _recorder = Recorder::install(Machine::with_devices(2));
        assert_eq!(num_devices().unwrap(), 2);
        for ordinal in [-1, 2] {
            let error = limits("quantize_4bit", ordinal).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Device);
            let expected =
                format!("qbits::quantize_4bit: device must be one of the 2 CUDA devices, got cuda:{ordinal}");
            assert_eq!(error.message, expected);
        }
    }

    #[test]
    fn a_device_that_fails_to_open_is_asked_again() {
        let recorder = Recorder::install(Machine::h200().failing("cuDeviceGetAttribute", 999));
        let message = limits("quantize_4bit", 0).unwrap_err().message;
        let expected =
            "qbits::quantize_4bit: cuDeviceGetAttribute must succeed, got CUDA_ERROR_UNKNOWN: unknown error";
        assert_eq!(message, expected);
        recorder.succeed("cuDeviceGetAttribute");
        assert_eq!(limits("quantize_4bit", 0).unwrap(), &H200);
    }

    #[test]
    fn limits_make_no_context() {
        let recorder = Recorder::install(Machine::h200());
        limits("quantize_4bit", 0).unwrap();
        assert!(!recorder.calls().contains(&"cuDevicePrimaryCtxRetain"));
    }

    #[test]
    fn the_context_is_made_current_and_restored() {
        let recorder = Recorder::install(Machine::with_devices(2));
        recorder.set_current(Some(0));
        with_context("quantize_4bit", 1, || {
            assert_eq!(recorder.current(), Some(1));
            Ok(())
        })
        .unwrap();
        assert_eq!(recorder.current(), Some(0));
    }

    #[test]
    fn a_thread_without_a_context_has_none_afterwards() {
        let recorder = Recorder::install(Machine::h200());
        with_context("quantize_4bit", 0, || Ok(())).unwrap();
        assert_eq!(recorder.current(), None);
    }

    #[test]
    fn the_context_is_restored_after_an_error_and_a_panic() {
        let recorder = Recorder::install(Machine::with_devices(2));
        recorder.set_current(Some(0));
        let refused = with_context::<()>("op", 1, || Err(Error::new(ErrorKind::Value, "refused")));
        assert_eq!(refused.unwrap_err().message, "refused");
        assert_eq!(recorder.current(), Some(0));
        let panicked =
            std::panic::catch_unwind(|| with_context::<()>("op", 1, || panic!("within the context")));
        assert!(panicked.is_err());
        assert_eq!(recorder.current(), Some(0));
    }

    #[test]
    fn a_context_that_is_current_is_left_alone() {
        let recorder = Recorder::install(Machine::h200());
        recorder.set_current(Some(0));
        with_context("quantize_4bit", 0, || Ok(())).unwrap();
        assert!(!recorder.calls().contains(&"cuCtxSetCurrent"));
    }

    #[test]
    fn a_primary_context_is_retained_once() {
        let recorder = Recorder::install(Machine::h200());
        for _ in 0..3 {
            with_context("quantize_4bit", 0, || Ok(())).unwrap();
        }
        let retains = recorder.calls().iter().filter(|call| **call == "cuDevicePrimaryCtxRetain").count();
        assert_eq!(retains, 1);
    }

    #[test]
    fn a_context_that_cannot_be_retained_is_an_error() {
        let _recorder = Recorder::install(Machine::h200().failing("cuDevicePrimaryCtxRetain", 2));
        let message = with_context("quantize_4bit", 0, || Ok(())).unwrap_err().message;
        let expected = "qbits::quantize_4bit: cuDevicePrimaryCtxRetain must succeed, got \
                        CUDA_ERROR_OUT_OF_MEMORY: out of memory";
        assert_eq!(message, expected);
    }
}
