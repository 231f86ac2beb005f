//! The driver calls that qbits makes: a table of functions, resolved from libcuda at the first use.

use super::TensorMap;
use crate::{Error, ErrorKind, Result};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// A `CUresult` as an integer. A newer driver returns codes that cudarc's enum lacks, and a Rust enum that
/// holds one is undefined behaviour.
pub(super) type Status = c_int;

pub(super) const SUCCESS: Status = 0;
pub(super) const NO_BINARY_FOR_GPU: Status = 209;
pub(super) const UNSUPPORTED_PTX_VERSION: Status = 222;

/// cuKernelGetParamInfo came with 12.4. Older drivers lack it, and cannot load what nvcc 13 writes either.
const MIN_DRIVER_VERSION: c_int = 12_040;

/// Why there is no driver to work with: known once, told by every op under its own name.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub kind: ErrorKind,
    pub sentence: String,
}

impl Refusal {
    pub fn error(&self, op: &str) -> Error {
        Error::new(self.kind, format!("qbits::{op}: {}", self.sentence))
    }
}

macro_rules! driver_table {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// libcuda, or what stands in for it in tests. Field by field the functions' signatures in `cuda.h`,
        /// with enums as integers.
        #[derive(Clone, Copy)]
        pub(super) struct Driver {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl Driver {
            fn resolve() -> std::result::Result<Self, Refusal> {
                // SAFETY: `load` asked `is_culib_present` first, without which this would panic.
                let library = unsafe { sys::culib() };
                let missing = |symbol: &str| Refusal {
                    kind: ErrorKind::Driver,
                    sentence: format!("the NVIDIA driver must have {symbol}, got one that is too old"),
                };
                Ok(Self {
                    $($field: {
                        let name = concat!($symbol, "\0").as_bytes();
                        type Function = unsafe extern "C" fn($($argument),*) -> Status;
                        // SAFETY: the field's type is the function's signature in cuda.h.
                        let symbol = unsafe { library.get::<Function>(name) };
                        *symbol.map_err(|_| missing($symbol))?
                    },)*
                })
            }
        }
    };
}

driver_table! {
    init = "cuInit" (c_uint);
    driver_version = "cuDriverGetVersion" (*mut c_int);
    error_name = "cuGetErrorName" (Status, *mut *const c_char);
    error_string = "cuGetErrorString" (Status, *mut *const c_char);
    device_count = "cuDeviceGetCount" (*mut c_int);
    device_get = "cuDeviceGet" (*mut sys::CUdevice, c_int);
    device_name = "cuDeviceGetName" (*mut c_char, c_int, sys::CUdevice);
    device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_uint, sys::CUdevice);
    device_total_bytes = "cuDeviceTotalMem_v2" (*mut usize, sys::CUdevice);
    primary_context_retain = "cuDevicePrimaryCtxRetain" (*mut sys::CUcontext, sys::CUdevice);
    context_get_current = "cuCtxGetCurrent" (*mut sys::CUcontext);
    context_set_current = "cuCtxSetCurrent" (sys::CUcontext);
    context_synchronize = "cuCtxSynchronize" ();
    exchange_capture_mode = "cuThreadExchangeStreamCaptureMode" (*mut c_uint);
    library_load_data = "cuLibraryLoadData" (
        *mut sys::CUlibrary, *const c_void, *mut c_void, *mut c_void, c_uint, *mut c_void, *mut c_void, c_uint
    );
    library_get_kernel = "cuLibraryGetKernel" (*mut sys::CUkernel, sys::CUlibrary, *const c_char);
    kernel_get_function = "cuKernelGetFunction" (*mut sys::CUfunction, sys::CUkernel);
    kernel_param_info = "cuKernelGetParamInfo" (sys::CUkernel, usize, *mut usize, *mut usize);
    kernel_get_attribute = "cuKernelGetAttribute" (*mut c_int, c_uint, sys::CUkernel, sys::CUdevice);
    kernel_set_attribute = "cuKernelSetAttribute" (c_uint, c_int, sys::CUkernel, sys::CUdevice);
    launch_kernel = "cuLaunchKernelEx" (
        *const sys::CUlaunchConfig, sys::CUfunction, *mut *mut c_void, *mut *mut c_void
    );
    pointer_attributes = "cuPointerGetAttributes" (c_uint, *mut c_uint, *mut *mut c_void, sys::CUdeviceptr);
    stream_create = "cuStreamCreate" (*mut sys::CUstream, c_uint);
    stream_context = "cuStreamGetCtx" (sys::CUstream, *mut sys::CUcontext);
    stream_is_capturing = "cuStreamIsCapturing" (sys::CUstream, *mut c_uint);
    stream_synchronize = "cuStreamSynchronize" (sys::CUstream);
    stream_wait_event = "cuStreamWaitEvent" (sys::CUstream, sys::CUevent, c_uint);
    event_create = "cuEventCreate" (*mut sys::CUevent, c_uint);
    event_record = "cuEventRecord" (sys::CUevent, sys::CUstream);
    event_destroy = "cuEventDestroy_v2" (sys::CUevent);
    encode_tiled = "cuTensorMapEncodeTiled" (
        *mut TensorMap, c_uint, u32, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_uint, c_uint,
        c_uint, c_uint
    );
    memory_alloc_async = "cuMemAllocAsync" (*mut sys::CUdeviceptr, usize, sys::CUstream);
    memory_free = "cuMemFree_v2" (sys::CUdeviceptr);
    memory_set = "cuMemsetD8Async" (sys::CUdeviceptr, u8, usize, sys::CUstream);
    memory_copy = "cuMemcpyDtoDAsync_v2" (sys::CUdeviceptr, sys::CUdeviceptr, usize, sys::CUstream);
    memory_read = "cuMemcpyDtoHAsync_v2" (*mut c_void, sys::CUdeviceptr, usize, sys::CUstream);
}

impl Driver {
    /// libcuda of this machine.
    pub fn load() -> std::result::Result<Self, Refusal> {
        // SAFETY: loads and drops libcuda, whose initializers have no requirements.
        if !unsafe { sys::is_culib_present() } {
            let sentence =
                "device must be a CUDA device, got a machine without the NVIDIA driver (no libcuda)";
            return Err(Refusal { kind: ErrorKind::Device, sentence: sentence.into() });
        }
        Self::resolve()
    }

    /// Initializes the driver; returns the number of devices. Called once, before everything else.
    pub fn start(&self) -> std::result::Result<c_int, Refusal> {
        let refuse = |sentence: String| Refusal { kind: ErrorKind::Driver, sentence };
        let succeed = |call: &str, status| match status {
            SUCCESS => Ok(()),
            _ => Err(refuse(format!("{call} must succeed, got {}", self.words(status)))),
        };
        let (mut version, mut count) = (0, 0);
        // SAFETY: valid before cuInit; `version` outlives the call.
        succeed("cuDriverGetVersion", unsafe { (self.driver_version)(&mut version) })?;
        if version < MIN_DRIVER_VERSION {
            let (major, minor) = split_version(version);
            return Err(refuse(format!("the NVIDIA driver must support CUDA 12.4, got {major}.{minor}")));
        }
        // SAFETY: cuInit takes no flags but 0 and may be called again.
        succeed("cuInit", unsafe { (self.init)(0) })?;
        // SAFETY: the driver is initialized; `count` outlives the call.
        succeed("cuDeviceGetCount", unsafe { (self.device_count)(&mut count) })?;
        Ok(count)
    }

    /// The status of `call` as a result.
    #[inline]
    pub fn check(&self, op: &str, call: &str, status: Status) -> Result<()> {
        if status == SUCCESS { Ok(()) } else { Err(self.failure(op, call, status)) }
    }

    /// The error for a `call` that returned `status`.
    #[cold]
    pub fn failure(&self, op: &str, call: &str, status: Status) -> Error {
        let message = format!("qbits::{op}: {call} must succeed, got {}", self.words(status));
        Error::new(ErrorKind::Driver, message)
    }

    /// A status in the driver's own name and words.
    pub fn words(&self, status: Status) -> String {
        let text = |get: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            // SAFETY: both functions take any status, also before cuInit; the driver's strings are static.
            unsafe {
                let known = get(status, &mut text) == SUCCESS && !text.is_null();
                known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        match (text(self.error_name), text(self.error_string)) {
            (Some(name), Some(words)) => format!("{name}: {words}"),
            _ => format!("CUresult {status}, which the driver does not name"),
        }
    }
}

/// 13000 is 13.0.
pub(super) fn split_version(version: c_int) -> (c_int, c_int) {
    (version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::super::device::{driver_version, is_available, num_devices};
    use super::super::recorder::{Machine, Recorder};
    use crate::ErrorKind;

    #[test]
    fn a_driver_without_devices_is_told_in_its_own_words() {
        let _recorder = Recorder::install(Machine::h200().failing("cuInit", 100));
        assert!(!is_available());
        let error = num_devices().unwrap_err();
        assert_eq!(error.kind, ErrorKind::Driver);
        assert_eq!(
            error.message,
            "qbits::info: cuInit must succeed, got CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"
        );
    }

    #[test]
    fn a_status_that_the_driver_does_not_name_is_told_as_a_number() {
        let _recorder = Recorder::install(Machine::h200().failing("cuInit", 4711));
        let message = num_devices().unwrap_err().message;
        assert_eq!(
            message,
            "qbits::info: cuInit must succeed, got CUresult 4711, which the driver does not name"
        );
    }

    #[test]
    fn an_old_driver_is_refused_before_it_is_initialized() {
        let recorder = Recorder::install(Machine { driver_version: 11_080, ..Machine::h200() });
        let message = num_devices().unwrap_err().message;
        assert_eq!(message, "qbits::info: the NVIDIA driver must support CUDA 12.4, got 11.8");
        assert_eq!(recorder.calls(), ["cuDriverGetVersion"]);
    }

    #[test]
    fn the_version_is_split_into_major_and_minor() {
        let _recorder = Recorder::install(Machine { driver_version: 13_010, ..Machine::h200() });
        assert_eq!(driver_version().unwrap(), (13, 1));
    }

    #[test]
    fn a_machine_without_libcuda_answers_with_an_error() {
        // On a machine with a driver the call succeeds; on one without, it must not panic.
        if let Err(refusal) = super::Driver::load() {
            assert_eq!(refusal.kind, ErrorKind::Device);
            assert_eq!(
                refusal.error("quantize_4bit").message,
                "qbits::quantize_4bit: device must be a CUDA device, got a machine without the NVIDIA driver \
                 (no libcuda)"
            );
        }
    }
}
