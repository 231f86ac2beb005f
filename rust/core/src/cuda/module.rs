//! Kernel images: what the build embedded, loaded when first needed, each kernel checked once per device.

use super::device::Gpu;
use super::driver::{Driver, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION};
use super::{Runtime, Symbol, runtime};
use crate::{Error, ErrorKind, Result};
use cudarc::driver::sys::{self, CUfunction_attribute as Attribute};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_uint};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

// ARCHS, SOURCE_HASH and IMAGES
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether a device runs any kernels of this build: sources that are not for one GPU alone are all built for the same list.
///
/// # Errors
/// Without a driver, and for an ordinal that is none.
pub fn has_kernels(op: &str, ordinal: i32) -> Result<bool> {
    let runtime = runtime(op)?;
    let gpu = runtime.gpu(op, ordinal)?;
    let fits = || runtime.modules.images.iter().any(|image| image.fits(gpu.limits.capability));
    Ok(*gpu.has_kernels.get_or_init(fits))
}

/// Bytes on the boundary that cuLibraryLoadData wants for a fatbin.
#[repr(C, align(64))]
pub(super) struct Aligned<T: ?Sized>(pub T);

/// One compiled `cuda/*.cu`.
pub struct Image {
    /// The source's name without its ending.
    pub name: &'static str,
    /// What it was compiled for, as nvcc spells it: `80`, `90a`, `compute_80`.
    pub archs: &'static [&'static str],
    /// Its kernels, sorted by name.
    pub kernels: &'static [KernelInfo],
    pub(super) bytes: &'static Aligned<[u8]>,
}

/// What the compiler reported about a kernel: the largest of all architectures.
pub struct KernelInfo {
    /// The symbol.
    pub name: &'static str,
    /// Registers of one thread.
    pub registers: u32,
    /// Static shared memory of one block.
    pub shared_bytes: u32,
    /// Size of its one parameter.
    pub param_bytes: u32,
    /// Most threads of a block: its launch bounds.
    pub max_threads: u32,
}

impl Image {
    /// Whether a GPU of this compute capability runs the image.
    pub fn fits(&self, capability: (i32, i32)) -> bool {
        self.archs.iter().any(|arch| arch_fits(arch, capability))
    }
}

/// Machine code runs within its major generation from its minor number on, `a` code on exactly its own GPU,
/// PTX on everything from its own GPU on.
fn arch_fits(arch: &str, (major, minor): (i32, i32)) -> bool {
    let (ptx, number) = match arch.strip_prefix("compute_") {
        Some(number) => (true, number),
        None => (false, arch),
    };
    let exact = number.ends_with('a');
    let Ok(built) = number.trim_end_matches(['a', 'f']).parse::<i32>() else { return false };
    let device = 10 * major + minor;
    match (ptx, exact) {
        (_, true) => device == built,
        (true, false) => device >= built,
        (false, false) => major == built / 10 && device >= built,
    }
}

/// The images of this build.
pub fn images() -> &'static [Image] {
    IMAGES
}

/// What this build knows of a kernel, to compare plans and mirrors with.
pub fn kernel_info(name: &str) -> Option<&'static KernelInfo> {
    IMAGES.iter().flat_map(|image| image.kernels).find(|kernel| kernel.name == name)
}

/// A kernel that was checked on one device. What it allows is already the smaller of its own limit and the
/// device's.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub handle: sys::CUkernel,
    pub param_bytes: usize,
    pub max_threads: u32,
    pub max_dynamic_shared_bytes: u32,
    /// It was compiled for 9.0 or later, so that it can wait for earlier work itself.
    pub can_wait: bool,
}

/// What was loaded, and which kernels were checked.
pub(super) struct Modules {
    images: &'static [Image],
    /// One for each image; the lock is held while a kernel is prepared, so that each image is loaded once.
    libraries: Mutex<Vec<Option<sys::CUlibrary>>>,
    kernels: RwLock<HashMap<(Symbol, i32), Kernel, BuildHasherDefault<WordHasher>>>,
}

impl Modules {
    pub fn new(images: &'static [Image]) -> Self {
        let libraries = Mutex::new(vec![None; images.len()]);
        Self { images, libraries, kernels: RwLock::new(HashMap::default()) }
    }
}

impl Runtime {
    /// The kernel on this device: loaded and checked at its first use, looked up afterwards.
    #[inline]
    pub(super) fn kernel(&self, op: &str, symbol: Symbol, gpu: &Gpu) -> Result<Kernel> {
        let key = (symbol, gpu.limits.ordinal);
        // A thread that panicked while it held a lock left the maps whole: they change in one step.
        let kernels = self.modules.kernels.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            return Ok(*kernel);
        }
        drop(kernels);
        let libraries = self.modules.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        let kernel = self.prepare(op, &symbol.to_string(), gpu, libraries)?;
        self.modules.kernels.write().unwrap_or_else(PoisonError::into_inner).insert(key, kernel);
        Ok(kernel)
    }

    /// Loads the image that holds the kernel, and the kernel onto the device.
    #[cold]
    fn prepare(
        &self,
        op: &str,
        name: &str,
        gpu: &Gpu,
        mut libraries: MutexGuard<'_, Vec<Option<sys::CUlibrary>>>,
    ) -> Result<Kernel> {
        let driver = &self.driver;
        let index = self.find(op, name, gpu.limits.capability)?;
        // Loading allocates, which a capture on any stream of the process would refuse.
        let _relaxed = RelaxedCapture::enter(driver, op)?;
        let _entered = gpu.enter(driver, op)?;
        let library = match libraries[index] {
            Some(library) => library,
            None => *libraries[index].insert(load(driver, op, &self.modules.images[index], gpu)?),
        };
        // Symbols are identifiers, which hold no zero byte.
        let symbol = CString::new(name).unwrap_or_default();
        let mut kernel = std::ptr::null_mut();
        // SAFETY: `library` is loaded and never unloaded; `symbol` ends in zero.
        let status = unsafe { (driver.library_get_kernel)(&mut kernel, library, symbol.as_ptr()) };
        driver.check(op, &format!("cuLibraryGetKernel({name})"), status)?;
        let mut function = std::ptr::null_mut();
        // With lazy loading the code reaches the device only now. Launches use the kernel, not this function:
        // it stays valid when somebody resets the primary context.
        // SAFETY: `kernel` is of a loaded library, and the device's context is current.
        let status = unsafe { (driver.kernel_get_function)(&mut function, kernel) };
        driver.check(op, &format!("cuKernelGetFunction({name})"), status)?;
        inspect(driver, op, name, kernel, gpu)
    }

    /// The image that holds the kernel and runs on the device.
    fn find(&self, op: &str, name: &str, capability: (i32, i32)) -> Result<usize> {
        let unsupported = |sentence: String| {
            Err(Error::new(ErrorKind::UnsupportedHardware, format!("qbits::{op}: {sentence}")))
        };
        let images = self.modules.images;
        if images.is_empty() {
            return unsupported(
                "this build of qbits must hold CUDA kernels, got one made for the CPU only".into(),
            );
        }
        let holds = |image: &&Image| image.kernels.iter().any(|kernel| kernel.name == name);
        let Some(index) = images.iter().position(|image| holds(&image) && image.fits(capability)) else {
            let (major, minor) = capability;
            let archs: Vec<&str> =
                images.iter().filter(holds).flat_map(|image| image.archs).copied().collect();
            let held = if archs.is_empty() { "none".into() } else { archs.join(", ") };
            return unsupported(format!(
                "the GPU must have an image of the kernel {name}, got compute capability {major}.{minor} \
                 (this build holds the kernel for: {held})"
            ));
        };
        Ok(index)
    }
}

/// Loads one image; every device shares it.
fn load(driver: &Driver, op: &str, image: &Image, gpu: &Gpu) -> Result<sys::CUlibrary> {
    let mut library = std::ptr::null_mut();
    let none = std::ptr::null_mut;
    let code = image.bytes.0.as_ptr().cast();
    // SAFETY: a whole fatbin, static and 64-byte aligned; no options are given.
    let status =
        unsafe { (driver.library_load_data)(&mut library, code, none(), none(), 0, none(), none(), 0) };
    if let NO_BINARY_FOR_GPU | UNSUPPORTED_PTX_VERSION = status {
        let (major, minor) = gpu.limits.capability;
        let (name, archs, words) = (image.name, image.archs.join(", "), driver.words(status));
        let rule = format!("the driver must load the image {name} (built for {archs})");
        let got = format!("got {words}, with compute capability {major}.{minor}");
        return Err(Error::new(ErrorKind::UnsupportedHardware, format!("qbits::{op}: {rule}, {got}")));
    }
    driver.check(op, &format!("cuLibraryLoadData({})", image.name), status)?;
    Ok(library)
}

/// Reads what the kernel needs, and opts into all the shared memory that it may have.
fn inspect(driver: &Driver, op: &str, name: &str, kernel: sys::CUkernel, gpu: &Gpu) -> Result<Kernel> {
    let attribute = |attribute: Attribute| {
        let mut value: c_int = 0;
        // SAFETY: `kernel` is of a loaded library; `value` outlives the call.
        let status =
            unsafe { (driver.kernel_get_attribute)(&mut value, attribute as c_uint, kernel, gpu.handle) };
        driver.check(op, &format!("cuKernelGetAttribute({name})"), status)?;
        Ok(value.unsigned_abs())
    };
    let registers = attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?;
    let own_max_threads = attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
    let static_shared_bytes = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
    // of the code before its translation: a newer GPU may run what was written for an older one
    let can_wait = attribute(Attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)? >= 90;
    let limits = &gpu.limits;
    let Some(max_dynamic_shared_bytes) = limits.shared_bytes_optin.checked_sub(static_shared_bytes) else {
        let (most, rule) = (limits.shared_bytes_optin, "must fit into the device's shared memory");
        let message =
            format!("qbits::{op}: {name} {rule} of {most} bytes, got {static_shared_bytes} static bytes");
        return Err(Error::new(ErrorKind::UnsupportedHardware, message));
    };
    // c_int: the device's limit came as one.
    let opted_in = max_dynamic_shared_bytes as c_int;
    let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as c_uint;
    // SAFETY: `kernel` is of a loaded library.
    let status = unsafe { (driver.kernel_set_attribute)(attribute, opted_in, kernel, gpu.handle) };
    driver.check(op, &format!("cuKernelSetAttribute({name})"), status)?;
    // Registers are given to a warp in units of 256.
    let warp_registers = (32 * registers).next_multiple_of(256).max(256);
    let max_threads = own_max_threads
        .min(limits.max_threads_per_block)
        .min(limits.registers_per_block / warp_registers * 32);
    let param_bytes = only_parameter(driver, op, name, kernel)?;
    Ok(Kernel { handle: kernel, param_bytes, max_threads, max_dynamic_shared_bytes, can_wait })
}

/// Bytes of the kernel's parameter. That there is only one is the build's to check: asking the driver for a second is an
/// error in the eyes of compute-sanitizer.
fn only_parameter(driver: &Driver, op: &str, name: &str, kernel: sys::CUkernel) -> Result<usize> {
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: `kernel` is of a loaded library; both numbers outlive the call.
    let status = unsafe { (driver.kernel_param_info)(kernel, 0, &mut offset, &mut bytes) };
    driver.check(op, &format!("cuKernelGetParamInfo({name})"), status)?;
    Ok(bytes)
}

/// While it lives, this thread may do what a capture in progress forbids; the capture itself is not
/// disturbed.
struct RelaxedCapture<'a> {
    driver: &'a Driver,
    previous: c_uint,
}

impl<'a> RelaxedCapture<'a> {
    fn enter(driver: &'a Driver, op: &str) -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_uint;
        // SAFETY: `mode` outlives the call, which writes the previous mode into it.
        let status = unsafe { (driver.exchange_capture_mode)(&mut mode) };
        driver.check(op, "cuThreadExchangeStreamCaptureMode", status)?;
        Ok(Self { driver, previous: mode })
    }
}

impl Drop for RelaxedCapture<'_> {
    fn drop(&mut self) {
        // SAFETY: `previous` is the mode that the driver returned; it outlives the call.
        let _ = unsafe { (self.driver.exchange_capture_mode)(&mut self.previous) };
    }
}

/// Hashes eight bytes at a time: a lookup is part of every launch, and the default hasher alone would take a
/// third of the time that a launch may cost. Keys are the crate's own, so nobody can choose them to collide.
#[derive(Default)]
pub(super) struct WordHasher(u64);

impl Hasher for WordHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // 2^64 divided by the golden ratio, made odd
            self.0 = (self.0.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }

    #[inline]
    fn finish(&self) -> u64 {
        // The map takes its bucket from the low bits; a product is best in the high ones.
        self.0.rotate_left(26)
    }
}

#[cfg(test)]
mod tests;
