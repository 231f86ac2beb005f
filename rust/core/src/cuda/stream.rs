//! Streams, events and stream-ordered memory, for callers that bring none of their own.

use super::driver::SUCCESS;
use super::runtime;
use crate::Result;
use cudarc::driver::sys;
use std::ffi::{c_uint, c_void};

/// A stream and the device that it belongs to. Borrowed: whoever made it keeps it alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// `CUstream`; null is the legacy default stream, where the caller chose that.
    pub handle: *mut c_void,
    /// Ordinal of the device.
    pub device: i32,
}

// SAFETY: the driver's name of a stream, which it takes from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// The stream of qbits on a device, for callers that name none. Made at the first call, non-blocking, never
/// destroyed.
///
/// # Errors
/// Without a driver, for an ordinal that is none, and when the driver refuses.
pub fn current_stream_for(op: &str, device: i32) -> Result<Stream> {
    let runtime = runtime(op)?;
    let (gpu, driver) = (runtime.gpu(op, device)?, &runtime.driver);
    if let Some(handle) = gpu.stream.get() {
        return Ok(Stream { handle: handle.cast(), device });
    }
    let _entered = gpu.enter(driver, op)?;
    let mut handle = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
    // SAFETY: the device's context is current; `handle` outlives the call.
    driver.check(op, "cuStreamCreate", unsafe { (driver.stream_create)(&mut handle, flags) })?;
    // Of two threads that come here at once, one leaves a stream unused.
    Ok(Stream { handle: gpu.stream.get_or_init(|| handle).cast(), device })
}

/// Waits until the stream has done all that was enqueued on it. For callers whose memory nobody else keeps
/// alive.
///
/// # Safety
/// `stream.handle` must be a live stream of the device's primary context, or null.
///
/// # Errors
/// When the work that was waited for has failed, or the stream is being captured.
pub unsafe fn synchronize(op: &str, stream: Stream) -> Result<()> {
    let runtime = runtime(op)?;
    let driver = &runtime.driver;
    let _entered = runtime.gpu(op, stream.device)?.enter(driver, op)?;
    // SAFETY: the caller promises a live stream.
    driver.check(op, "cuStreamSynchronize", unsafe { (driver.stream_synchronize)(stream.handle.cast()) })
}

/// Device memory that is allocated in the order of a stream, and freed when the device is done.
#[derive(Debug)]
pub struct Allocation {
    address: sys::CUdeviceptr,
    num_bytes: usize,
    device: i32,
}

// SAFETY: the address is the driver's name, which it takes from any thread.
unsafe impl Send for Allocation {}
// SAFETY: as above; there is no method that writes through `&self`.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// Memory that is valid on the stream from now on. No bytes make no allocation.
    ///
    /// # Safety
    /// `stream.handle` must be a live stream of the device's primary context, or null.
    ///
    /// # Errors
    /// When the driver refuses, most often for want of memory.
    pub unsafe fn new(op: &str, num_bytes: usize, stream: Stream) -> Result<Self> {
        let runtime = runtime(op)?;
        let driver = &runtime.driver;
        let _entered = runtime.gpu(op, stream.device)?.enter(driver, op)?;
        let mut address = 0;
        if num_bytes > 0 {
            // SAFETY: the caller promises a live stream; `address` outlives the call.
            let status =
                unsafe { (driver.memory_alloc_async)(&mut address, num_bytes, stream.handle.cast()) };
            driver.check(op, &format!("cuMemAllocAsync({num_bytes} bytes)"), status)?;
        }
        Ok(Self { address, num_bytes, device: stream.device })
    }

    /// First byte; null when there are none.
    pub fn data(&self) -> *mut u8 {
        self.address as *mut u8
    }

    /// Number of bytes.
    pub fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Sets every byte, in the order of the stream.
    ///
    /// # Safety
    /// As [`Allocation::new`].
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn fill(&self, op: &str, byte: u8, stream: Stream) -> Result<()> {
        let runtime = runtime(op)?;
        let _entered = runtime.gpu(op, self.device)?.enter(&runtime.driver, op)?;
        // SAFETY: the caller promises the stream; the memory is as long.
        let status =
            unsafe { (runtime.driver.memory_set)(self.address, byte, self.num_bytes, stream.handle.cast()) };
        runtime.driver.check(op, "cuMemsetD8Async", status)
    }

    /// Copies `num_bytes` from `first` on to other memory of the device, in the order of the stream.
    ///
    /// # Safety
    /// As [`Allocation::new`]; `to` is valid for as many bytes until the stream has done it.
    ///
    /// # Panics
    /// Where the allocation is shorter.
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn copy_to(
        &self,
        op: &str,
        first: usize,
        to: *mut u8,
        num_bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        assert!(first + num_bytes <= self.num_bytes, "a copy lies within its allocation");
        let runtime = runtime(op)?;
        let _entered = runtime.gpu(op, self.device)?.enter(&runtime.driver, op)?;
        let from = self.address + first as u64;
        // SAFETY: the caller promises the stream and `to`; the range was checked.
        let status =
            unsafe { (runtime.driver.memory_copy)(to as u64, from, num_bytes, stream.handle.cast()) };
        runtime.driver.check(op, "cuMemcpyDtoDAsync", status)
    }

    /// The bytes from `first` on, when the stream has done what was enqueued until now.
    ///
    /// # Safety
    /// As [`Allocation::new`].
    ///
    /// # Panics
    /// Where the allocation is shorter.
    ///
    /// # Errors
    /// When earlier work has failed, or the stream is being captured.
    pub unsafe fn read(&self, op: &str, first: usize, bytes: &mut [u8], stream: Stream) -> Result<()> {
        assert!(first + bytes.len() <= self.num_bytes, "what is read lies within its allocation");
        let runtime = runtime(op)?;
        let _entered = runtime.gpu(op, self.device)?.enter(&runtime.driver, op)?;
        let (from, to) = (self.address + first as u64, bytes.as_mut_ptr().cast());
        // SAFETY: the caller promises the stream, which is waited for while `bytes` lives; the range was checked.
        unsafe {
            let status = (runtime.driver.memory_read)(to, from, bytes.len(), stream.handle.cast());
            runtime.driver.check(op, "cuMemcpyDtoHAsync", status)?;
            synchronize(op, stream)
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // What fails here cannot be told: the process is ending, or the device already reported a fault.
        let Ok(runtime) = runtime("drop") else { return };
        let Ok(gpu) = runtime.gpu("drop", self.device) else { return };
        let Ok(_entered) = gpu.enter(&runtime.driver, "drop") else { return };
        if self.address == 0 {
            return;
        }
        // Neither the stream of the allocation, which its owner may have destroyed, nor those of whoever read the
        // memory are known now. So the device is waited for; where that is refused, as in a capture, the memory leaks.
        // SAFETY: the device's context is current; allocated by `new` and freed only here, after its last use.
        unsafe {
            if (runtime.driver.context_synchronize)() == SUCCESS {
                let _ = (runtime.driver.memory_free)(self.address);
            }
        }
    }
}

/// A point in the work of a stream, for another stream to wait for.
#[derive(Debug)]
pub struct Event {
    handle: sys::CUevent,
    device: i32,
}

// SAFETY: the handle is the driver's name, which it takes from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// An event without timing. Waiting for it before it was recorded waits for nothing.
    ///
    /// # Errors
    /// Without a driver, for an ordinal that is none, and when the driver refuses.
    pub fn new(op: &str, device: i32) -> Result<Self> {
        let runtime = runtime(op)?;
        let driver = &runtime.driver;
        let _entered = runtime.gpu(op, device)?.enter(driver, op)?;
        let mut handle = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: the device's context is current; `handle` outlives the call.
        driver.check(op, "cuEventCreate", unsafe { (driver.event_create)(&mut handle, flags) })?;
        Ok(Self { handle, device })
    }

    /// Marks what was enqueued on the stream until now.
    ///
    /// # Safety
    /// `stream.handle` must be a live stream of the event's device, or null.
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn record(&self, op: &str, stream: Stream) -> Result<()> {
        let runtime = runtime(op)?;
        let driver = &runtime.driver;
        let _entered = runtime.gpu(op, stream.device)?.enter(driver, op)?;
        // SAFETY: the event lives as long as `self`; the caller promises the stream.
        driver.check(op, "cuEventRecord", unsafe { (driver.event_record)(self.handle, stream.handle.cast()) })
    }

    /// Lets what is enqueued on the stream from now on wait for the mark.
    ///
    /// # Safety
    /// `stream.handle` must be a live stream, of any device, or null.
    ///
    /// # Errors
    /// When the driver refuses.
    pub unsafe fn wait(&self, op: &str, stream: Stream) -> Result<()> {
        let runtime = runtime(op)?;
        let driver = &runtime.driver;
        let _entered = runtime.gpu(op, stream.device)?.enter(driver, op)?;
        // SAFETY: as in `record`; 0 is the only flag that is needed.
        let status = unsafe { (driver.stream_wait_event)(stream.handle.cast(), self.handle, 0) };
        driver.check(op, "cuStreamWaitEvent", status)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(runtime) = runtime("drop") else { return };
        let Ok(gpu) = runtime.gpu("drop", self.device) else { return };
        let Ok(_entered) = gpu.enter(&runtime.driver, "drop") else { return };
        // The driver destroys an event only after the streams that wait for it.
        // SAFETY: made by `new` and destroyed only here.
        let _ = unsafe { (runtime.driver.event_destroy)(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::recorder::{Machine, Recorder};
    use super::*;

    #[test]
    fn each_device_has_one_stream_of_its_own() {
        let recorder = Recorder::install(Machine::with_devices(2));
        let first = current_stream_for("op", 0).unwrap();
        let second = current_stream_for("op", 1).unwrap();
        assert_eq!((first.device, second.device), (0, 1));
        assert!(!first.handle.is_null() && first.handle != second.handle);
        assert_eq!(current_stream_for("op", 0).unwrap(), first);
        assert_eq!(recorder.calls().iter().filter(|call| **call == "cuStreamCreate").count(), 2);
        assert_eq!(recorder.current(), None);
    }

    #[test]
    fn an_allocation_is_freed_once_when_the_device_is_done() {
        let recorder = Recorder::install(Machine::with_devices(2));
        let stream = current_stream_for("op", 1).unwrap();
        // SAFETY: the stream is never destroyed.
        let allocation = unsafe { Allocation::new("op", 100, stream) }.unwrap();
        assert_eq!(recorder.allocations(), [(allocation.data() as u64, 100, 1)]);
        assert_eq!(allocation.num_bytes(), 100);
        drop(allocation);
        assert_eq!(recorder.allocations(), []);
        let calls = recorder.calls();
        let freed = calls.iter().position(|call| *call == "cuMemFree_v2").unwrap();
        assert_eq!(calls[freed - 1], "cuCtxSynchronize");
        assert_eq!(recorder.current(), None);
    }

    #[test]
    fn no_bytes_make_no_allocation() {
        let recorder = Recorder::install(Machine::h200());
        // SAFETY: the stream is never destroyed.
        let allocation = unsafe { Allocation::new("op", 0, current_stream_for("op", 0).unwrap()) }.unwrap();
        assert!(allocation.data().is_null());
        drop(allocation);
        assert!(!recorder.calls().iter().any(|call| call.starts_with("cuMem")));
    }

    #[test]
    fn want_of_memory_is_told_with_the_size() {
        let _recorder = Recorder::install(Machine::h200().failing("cuMemAllocAsync", 2));
        let stream = current_stream_for("op", 0).unwrap();
        // SAFETY: the stream is never destroyed.
        let message = unsafe { Allocation::new("op", 100, stream) }.unwrap_err().message;
        let expected =
            "qbits::op: cuMemAllocAsync(100 bytes) must succeed, got CUDA_ERROR_OUT_OF_MEMORY: out of memory";
        assert_eq!(message, expected);
    }

    #[test]
    fn memory_that_cannot_be_waited_for_is_kept() {
        let recorder = Recorder::install(Machine::h200().failing("cuCtxSynchronize", 900));
        // SAFETY: the stream is never destroyed.
        drop(unsafe { Allocation::new("op", 8, current_stream_for("op", 0).unwrap()) }.unwrap());
        assert_eq!(recorder.allocations().len(), 1);
    }

    #[test]
    fn drops_do_not_panic_when_the_driver_fails() {
        let recorder = Recorder::install(Machine::h200());
        let stream = current_stream_for("op", 0).unwrap();
        // SAFETY: the stream is never destroyed.
        let allocations = [(); 2].map(|()| unsafe { Allocation::new("op", 8, stream) }.unwrap());
        let event = Event::new("op", 0).unwrap();
        recorder.fail("cuMemFree_v2", 700);
        recorder.fail("cuEventDestroy", 700);
        let [first, second] = allocations;
        drop(first);
        recorder.fail("cuCtxGetCurrent", 700);
        drop((second, event));
    }

    #[test]
    fn an_event_orders_two_streams() {
        let recorder = Recorder::install(Machine::with_devices(2));
        let [first, second] = [0, 1].map(|device| current_stream_for("op", device).unwrap());
        let event = Event::new("op", 0).unwrap();
        // SAFETY: the streams are never destroyed.
        unsafe {
            event.record("op", first).unwrap();
            event.wait("op", second).unwrap();
        }
        drop(event);
        let calls = recorder.calls();
        let found = |name| calls.iter().position(|call| *call == name).unwrap();
        assert!(found("cuEventRecord") < found("cuStreamWaitEvent"));
        assert!(found("cuStreamWaitEvent") < found("cuEventDestroy"));
    }
}
