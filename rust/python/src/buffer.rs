//! Results for callers whose framework has no exchange API: memory of our own, lent through `__dlpack__`.

use crate::exception::raise;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qbits_core::cuda::{Allocation, Event, Stream};
use qbits_core::dlpack::{
    DlDevice, DlManagedTensor, DlManagedTensorVersioned, DlTensor, DlVersion, MAJOR_VERSION,
};
use qbits_core::{Error, Result, Tensor};
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// Alignment of host memory: a cache line, and the widest vector.
const HOST_ALIGNMENT: usize = 64;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; HOST_ALIGNMENT]);

enum Storage {
    Host(#[allow(dead_code)] Vec<Line>), // held, never read: the tensor points into it
    Device { ready: Event, stream: Stream, _memory: Allocation },
}

struct Inner {
    tensor: Tensor,
    shape: Vec<i64>,
    storage: Storage,
}

// SAFETY: the memory is written before the buffer is handed out and only lent afterwards; events and allocations of
// the driver may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as for Send; no method changes the struct.
unsafe impl Sync for Inner {}

/// A result in memory of qbits. Any framework takes it over without a copy: `numpy.from_dlpack(buffer)`.
#[pyclass(frozen, module = "qbits")]
pub struct Buffer(Arc<Inner>);

impl Buffer {
    /// Uninitialized memory for `wanted`, and the tensor in it.
    pub fn new(op: &'static str, wanted: &Tensor, stream: Option<Stream>) -> Result<(Self, Tensor)> {
        let num_bytes = wanted.num_bytes();
        let mut tensor = *wanted;
        let storage = match stream {
            None => {
                let mut lines = vec![Line([0; HOST_ALIGNMENT]); num_bytes.div_ceil(HOST_ALIGNMENT)];
                tensor.data = lines.as_mut_ptr().cast();
                Storage::Host(lines)
            }
            Some(stream) => {
                let ready = Event::new(op, stream.device)?;
                // SAFETY: the stream is the caller's current one, which lives for the call.
                let memory = unsafe { Allocation::new(op, num_bytes.max(1), stream) }?;
                tensor.data = memory.data();
                Storage::Device { ready, stream, _memory: memory }
            }
        };
        let inner = Inner { tensor, shape: wanted.shape().to_vec(), storage };
        Ok((Self(Arc::new(inner)), tensor))
    }

    /// Consumers wait for the work that is enqueued now. With `is_done` there is none left.
    pub fn mark_ready(&self, is_done: bool) -> Result<()> {
        match &self.0.storage {
            // SAFETY: the stream is the one of the call that made this buffer, which has not returned yet.
            Storage::Device { ready, stream, .. } if !is_done => unsafe { ready.record("buffer", *stream) },
            _ => Ok(()),
        }
    }

    fn wait(&self, consumer: Option<usize>) -> Result<()> {
        match &self.0.storage {
            Storage::Host(_) => Ok(()),
            Storage::Device { ready, stream, .. } => match consumer {
                Some(usize::MAX) => Ok(()), // -1: the consumer orders its work itself
                handle => {
                    let handle = handle.unwrap_or(1) as *mut c_void; // DLPack: none means the legacy default stream
                    // SAFETY: DLPack demands that the consumer's stream is live and of the buffer's device.
                    unsafe { ready.wait("buffer", Stream { handle, device: stream.device }) }
                }
            },
        }
    }

    fn dl_tensor(&self) -> DlTensor {
        let tensor = &self.0.tensor;
        DlTensor {
            data: tensor.data.cast(),
            device: tensor.device.into(),
            ndim: self.0.shape.len() as i32,
            dtype: tensor.dtype.into(),
            shape: self.0.shape.as_ptr().cast_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        }
    }
}

/// A managed tensor of either form that holds a share of the buffer.
#[repr(C)]
struct Export<M> {
    managed: M, // first: the consumer's pointer is a pointer to this struct
    _share: Arc<Inner>,
}

unsafe extern "C" fn delete<M>(managed: *mut M) {
    // SAFETY: `managed` is the first field of an Export that `__dlpack__` boxed, and a deleter runs once.
    drop(unsafe { Box::from_raw(managed.cast::<Export<M>>()) });
}

/// Frees the export of a capsule that nobody took over: its name is still the fresh one.
unsafe extern "C" fn drop_capsule<M>(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this once with a live capsule; only a fresh name says that the pointer is still ours.
    unsafe {
        let name = ffi::PyCapsule_GetName(capsule);
        if !name.is_null() && !CStr::from_ptr(name).to_bytes().starts_with(b"used_") {
            let managed = ffi::PyCapsule_GetPointer(capsule, name);
            if !managed.is_null() {
                delete(managed.cast::<M>());
            }
        }
    }
}

fn capsule<M>(py: Python<'_>, export: Export<M>, name: &'static CStr) -> PyResult<Py<PyAny>> {
    let pointer = Box::into_raw(Box::new(export));
    // SAFETY: a live pointer, a static name, and a destructor for exactly this type.
    unsafe {
        let capsule = ffi::PyCapsule_New(pointer.cast(), name.as_ptr(), Some(drop_capsule::<M>));
        Bound::from_owned_ptr_or_err(py, capsule)
            .map(Bound::unbind)
            .inspect_err(|_| drop(Box::from_raw(pointer)))
    }
}

#[pymethods]
impl Buffer {
    /// The memory as a DLPack capsule; `stream` then waits until it is written.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<isize>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let device = DlDevice::from(self.0.tensor.device);
        let is_elsewhere = dl_device.is_some_and(|wanted| wanted != (device.device_type, device.device_id));
        if is_elsewhere || copy == Some(true) {
            return Err(pyo3::exceptions::PyBufferError::new_err(
                "qbits::buffer: __dlpack__ must be asked for a view on the buffer's own device, got a copy or another",
            ));
        }
        self.wait(stream.map(|stream| stream as usize)).map_err(|error: Error| raise(py, error))?;
        let share = Arc::clone(&self.0);
        if max_version.is_some_and(|(major, _)| major >= MAJOR_VERSION) {
            let managed = DlManagedTensorVersioned {
                version: DlVersion { major: MAJOR_VERSION, minor: 1 },
                manager_ctx: std::ptr::null_mut(),
                deleter: Some(delete::<DlManagedTensorVersioned>),
                flags: 0,
                dl_tensor: self.dl_tensor(),
            };
            return capsule(py, Export { managed, _share: share }, c"dltensor_versioned");
        }
        let managed = DlManagedTensor {
            dl_tensor: self.dl_tensor(),
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(delete::<DlManagedTensor>),
        };
        capsule(py, Export { managed, _share: share }, c"dltensor")
    }

    /// DLPack's device type and ordinal.
    fn __dlpack_device__(&self) -> (i32, i32) {
        let device = DlDevice::from(self.0.tensor.device);
        (device.device_type, device.device_id)
    }

    /// Sizes of the dimensions.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.0.shape)
    }

    /// Name of the element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.tensor.dtype.name()
    }

    fn __repr__(&self) -> String {
        format!(
            "Buffer(shape={:?}, dtype={}, device={})",
            self.0.shape, self.0.tensor.dtype, self.0.tensor.device
        )
    }
}
