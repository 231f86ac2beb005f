//! Intake: Python objects as borrowed tensors, by DLPack's C exchange API where their type offers it, else by
//! `__dlpack__` capsules.

use crate::exception::raise;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyTuple};
use qbits_core::cuda::{self, Stream};
use qbits_core::dlpack::{DEVICE_CUDA, DlTensor, ExchangeApi, Owned, Refusal};
use qbits_core::{Dtype, Error, ErrorKind, Tensor};
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

/// How objects of a type lend their memory.
#[derive(Clone, Copy, Debug)]
pub enum Lender {
    /// Through the C exchange API.
    Exchange(&'static ExchangeApi, Framework),
    /// Through `__dlpack__`.
    Capsule(Framework),
    /// A subclass of torch.Tensor that has its own dispatch (fake, functional, distributed tensors).
    Subclass,
    /// It has no tensors.
    None,
}

/// Whose capsules they are: decides the stream, and whether results may be written into them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framework {
    /// Has a current stream of its own.
    Torch,
    /// Has a current stream of its own.
    Cupy,
    /// Immutable; reuses memory on streams that nobody else sees.
    Jax,
    /// NumPy and everything else.
    Other,
}

/// Types seen, kept alive so that an address means one type for ever.
static TYPES: [OnceLock<(usize, Lender, Py<PyAny>)>; 32] = [const { OnceLock::new() }; 32];

/// How `object` lends its memory.
#[inline]
pub fn lender(object: &Bound<'_, PyAny>) -> PyResult<Lender> {
    // SAFETY: Py_TYPE of a live object is a live type.
    let address = unsafe { ffi::Py_TYPE(object.as_ptr()) } as usize;
    for seen in &TYPES {
        match seen.get() {
            Some((known, lender, _)) if *known == address => return Ok(*lender),
            Some(_) => {}
            None => break,
        }
    }
    remember(address, object.get_type().into_any())
}

#[cold]
fn remember(address: usize, class: Bound<'_, PyAny>) -> PyResult<Lender> {
    let lender = classify(&class)?;
    if !matches!(lender, Lender::None) {
        let entry = (address, lender, class.unbind());
        // With no slot left the type is classified at every call.
        let _ = TYPES.iter().try_fold(entry, |entry, slot| slot.set(entry).map_or_else(Ok, |()| Err(())));
    }
    Ok(lender)
}

fn classify(class: &Bound<'_, PyAny>) -> PyResult<Lender> {
    if !class.hasattr("__dlpack__")? {
        return Ok(Lender::None);
    }
    let module = class.getattr("__module__")?.to_string();
    let top = module.split('.').next().unwrap_or_default();
    let is_torch = class.hasattr("__torch_dispatch__")?;
    if is_torch && !has_plain_dispatch(class)? {
        return Ok(Lender::Subclass);
    }
    let framework = match top {
        _ if is_torch => Framework::Torch,
        "cupy" => Framework::Cupy,
        "jax" | "jaxlib" => Framework::Jax,
        _ => Framework::Other,
    };
    let forced = std::env::var("QBITS_DLPACK").is_ok_and(|value| value == "capsule");
    if !forced && let Ok(capsule) = class.getattr("__dlpack_c_exchange_api__") {
        let capsule = capsule.cast_into::<PyCapsule>().map_err(PyErr::from)?;
        let table = capsule.pointer_checked(Some(c"dlpack_exchange_api"))?;
        // SAFETY: DLPack demands that the tables behind this capsule live as long as the process.
        if let Some(api) = unsafe { ExchangeApi::find(table.as_ptr().cast()) } {
            return Ok(Lender::Exchange(api, framework));
        }
    }
    Ok(Lender::Capsule(framework))
}

/// The class keeps torch.Tensor's dispatch: then its memory is its own.
fn has_plain_dispatch(class: &Bound<'_, PyAny>) -> PyResult<bool> {
    let plain = class.py().import("torch")?.getattr("_C")?.getattr("_disabled_torch_dispatch_impl")?;
    Ok(class.getattr("__torch_dispatch__")?.is(&plain))
}

/// What an argument must be for `qbits::{op}`, as an exception.
pub fn refuse(py: Python<'_>, op: &str, arg: &str, refusal: &Refusal) -> PyErr {
    let message = format!("qbits::{op}: {arg} must {}, got {}", refusal.rule, refusal.got);
    raise(py, Error::new(refusal.kind, message))
}

/// What the tensors of one call hold on to until it has run.
#[derive(Default)]
pub struct Loans {
    owned: Vec<Owned>,
    /// The first tensor's lender: it allocates the results and names the stream.
    pub first: Option<Lender>,
    stream: Option<Stream>,
    /// Memory was borrowed from a framework whose streams nobody sees, so the call must end before the loan does.
    pub must_synchronize: bool,
}

impl Loans {
    /// The memory of `object`, or None if it is no tensor.
    pub fn borrow(
        &mut self,
        op: &'static str,
        arg: &str,
        object: &Bound<'_, PyAny>,
    ) -> PyResult<Option<Tensor>> {
        let py = object.py();
        let lender = lender(object)?;
        let tensor = match lender {
            Lender::None => return Ok(None),
            Lender::Subclass => {
                let got = object.get_type().name()?.to_string();
                let rule = "be a plain tensor";
                return Err(refuse(py, op, arg, &Refusal { kind: ErrorKind::Traced, rule, got }));
            }
            Lender::Exchange(api, _) => {
                let tensor = borrow_view(api, op, arg, object)?;
                refuse_lazy_negation(py, op, arg, object, &tensor)?;
                tensor
            }
            Lender::Capsule(framework) => self.take_capsule(framework, op, arg, object)?,
        };
        self.first.get_or_insert(lender);
        Ok(Some(tensor))
    }

    /// The results are torch's.
    pub fn are_torch(&self) -> bool {
        matches!(self.first, Some(Lender::Exchange(_, Framework::Torch) | Lender::Capsule(Framework::Torch)))
    }

    /// The stream of the caller's framework on `device`.
    pub fn stream(&mut self, py: Python<'_>, op: &'static str, device: i32) -> PyResult<Stream> {
        if let Some(stream) = self.stream {
            return Ok(stream);
        }
        let stream = match self.first {
            Some(Lender::Exchange(api, _)) => {
                let mut handle: *mut c_void = std::ptr::null_mut();
                let current = api.current_stream.ok_or_else(|| PyTypeError::new_err("no current stream"))?;
                // SAFETY: a function of a live exchange table, with a valid place for the result.
                if unsafe { current(DEVICE_CUDA, device, &mut handle) } != 0 {
                    return Err(PyErr::fetch(py));
                }
                Stream { handle, device }
            }
            Some(Lender::Capsule(framework)) => framework_stream(py, framework, op, device)?,
            _ => cuda::current_stream_for(op, device).map_err(|error| raise(py, error))?,
        };
        self.stream = Some(stream);
        Ok(stream)
    }

    fn take_capsule(
        &mut self,
        framework: Framework,
        op: &'static str,
        arg: &str,
        object: &Bound<'_, PyAny>,
    ) -> PyResult<Tensor> {
        let py = object.py();
        let object = detached(framework, object)?;
        let (device_type, ordinal): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        self.first.get_or_insert(Lender::Capsule(framework));
        let keywords = PyDict::new(py);
        if device_type == DEVICE_CUDA {
            let stream = self.stream(py, op, ordinal)?;
            keywords.set_item("stream", stream_number(&stream))?;
            self.must_synchronize |= framework != Framework::Torch && framework != Framework::Cupy;
        }
        let owned = export(&object, &keywords)?;
        // SAFETY: `export` returns a live managed tensor of the form that its variant names.
        let mut tensor = unsafe { owned.view() }.map_err(|refusal| refuse(py, op, arg, &refusal))?;
        tensor.is_read_only |= framework == Framework::Jax; // immutable by contract, whatever the flag says
        self.owned.push(owned);
        Ok(tensor)
    }
}

/// DLPack's number for a stream: 1 is the legacy default stream, which the driver calls 0.
fn stream_number(stream: &Stream) -> usize {
    match stream.handle as usize {
        0 => 1,
        handle => handle,
    }
}

/// torch lends no tensor that requires a gradient; its detached alias has the same memory.
fn detached<'py>(framework: Framework, object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    if framework == Framework::Torch && object.getattr("requires_grad")?.is_truthy()? {
        return object.call_method0("detach");
    }
    Ok(object.clone())
}

fn framework_stream(py: Python<'_>, framework: Framework, op: &'static str, device: i32) -> PyResult<Stream> {
    let handle: usize = match framework {
        Framework::Torch => {
            let cuda = py.import("torch")?.getattr("cuda")?;
            cuda.call_method1("current_stream", (device,))?.getattr("cuda_stream")?.extract()?
        }
        Framework::Cupy => {
            let cuda = py.import("cupy")?.getattr("cuda")?;
            cuda.call_method1("get_current_stream", (device,))?.getattr("ptr")?.extract()?
        }
        Framework::Jax | Framework::Other => {
            return cuda::current_stream_for(op, device).map_err(|error| raise(py, error));
        }
    };
    Ok(Stream { handle: handle as *mut c_void, device })
}

/// Calls `__dlpack__`, first for a versioned capsule, and takes ownership of what it holds.
fn export(object: &Bound<'_, PyAny>, keywords: &Bound<'_, PyDict>) -> PyResult<Owned> {
    let py = object.py();
    let none = PyTuple::empty(py);
    let versioned = keywords.copy()?;
    versioned.set_item("max_version", (1, 1))?;
    let method = object.getattr("__dlpack__")?;
    let capsule = match method.call(&none, Some(&versioned)) {
        Err(error) if error.is_instance_of::<PyTypeError>(py) => method.call(&none, Some(keywords))?,
        other => other?,
    };
    own(&capsule)
}

/// Takes the managed tensor out of a capsule: rename first, so that exactly one side calls the deleter.
fn own(capsule: &Bound<'_, PyAny>) -> PyResult<Owned> {
    if let Some(pointer) = take(capsule, c"dltensor_versioned", c"used_dltensor_versioned")? {
        return Ok(Owned::Versioned(pointer.cast()));
    }
    if let Some(pointer) = take(capsule, c"dltensor", c"used_dltensor")? {
        return Ok(Owned::Unversioned(pointer.cast()));
    }
    Err(PyBufferError::new_err("__dlpack__ must return a capsule with a tensor, got something else"))
}

fn take(
    capsule: &Bound<'_, PyAny>,
    name: &'static CStr,
    used: &'static CStr,
) -> PyResult<Option<NonNull<c_void>>> {
    let py = capsule.py();
    // SAFETY: the object and the static names are live; each call below is checked before the next depends on it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) == 0 {
            return Ok(None);
        }
        let pointer = ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr());
        if ffi::PyCapsule_SetName(capsule.as_ptr(), used.as_ptr()) != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(NonNull::new(pointer))
    }
}

fn borrow_view(
    api: &'static ExchangeApi,
    op: &'static str,
    arg: &str,
    object: &Bound<'_, PyAny>,
) -> PyResult<Tensor> {
    let py = object.py();
    let mut view = std::mem::MaybeUninit::<DlTensor>::uninit();
    let borrow = api.borrow.ok_or_else(|| PyTypeError::new_err("the exchange API lends no views"))?;
    // SAFETY: the table belongs to the type of this live object; the view is only read when the call succeeded.
    let tensor = unsafe {
        if borrow(object.as_ptr().cast(), view.as_mut_ptr()) != 0 {
            return Err(unlent(py, op, arg, object));
        }
        view.assume_init().view(0)
    };
    tensor.map_err(|refusal| refuse(py, op, arg, &refusal))
}

/// A negated view lends the memory of what it negates, and the exchange API does not say so. Asking takes 85 ns, because
/// torch lets go of the interpreter. Torch makes such views as imaginary parts of conjugates, whose strides are even: more
/// than one element is never contiguous, and is refused for that. So one element is asked about, and with
/// `QBITS_CHECK=full` any number.
fn refuse_lazy_negation(
    py: Python<'_>,
    op: &str,
    arg: &str,
    object: &Bound<'_, PyAny>,
    tensor: &Tensor,
) -> PyResult<()> {
    let is_float = matches!(tensor.dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16);
    if is_float && (tensor.len() == 1 || cuda::full_check()) && is_negated(object)? {
        let got = "a negated view; resolve_neg() makes it one".to_owned();
        return Err(refuse(py, op, arg, &Refusal { kind: ErrorKind::Dtype, rule: "be a plain tensor", got }));
    }
    Ok(())
}

/// `torch.Tensor.is_neg(object)`, by the cheapest way to call it.
fn is_negated(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static IS_NEG: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = object.py();
    let is_neg = IS_NEG.get_or_try_init(py, || {
        Ok::<_, PyErr>(py.import("torch")?.getattr("Tensor")?.getattr("is_neg")?.unbind())
    })?;
    // SAFETY: a live callable and a live argument, ended by null; the result is a new reference or an error.
    let answer = unsafe {
        let none = std::ptr::null_mut::<ffi::PyObject>();
        let answer = ffi::PyObject_CallFunctionObjArgs(is_neg.as_ptr(), object.as_ptr(), none);
        Bound::from_owned_ptr_or_err(py, answer)?
    };
    answer.is_truthy()
}

/// The exchange API refused: meta, sparse and batched tensors have no memory to lend.
#[cold]
fn unlent(py: Python<'_>, op: &str, arg: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let reason = PyErr::fetch(py).value(py).to_string();
    let device = object.getattr("device").map(|device| device.to_string()).unwrap_or_default();
    let first = reason.lines().next().unwrap_or_default();
    let got = format!("one on {device} ({first})");
    refuse(py, op, arg, &Refusal { kind: ErrorKind::Traced, rule: "be a dense tensor with memory", got })
}
