//! One call of an op: borrow, check, allocate what is missing, run, answer with the outputs.

use crate::buffer::Buffer;
use crate::dependent;
use crate::exception::raise;
use crate::lend::{Framework, Lender, Loans};
use pyo3::Borrowed;
use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyString, PyTuple};
use qbits_core::backend::{Backend, Cpu, Cuda, Op};
use qbits_core::cuda::{self, Memory};
use qbits_core::dlpack::{DlDataType, DlManagedTensorVersioned, DlTensor, ExchangeApi};
use qbits_core::spec::{Arg, Compiled, Role, Symbols, Value};
use qbits_core::tensor::DTYPES;
use qbits_core::{Device, Dtype, Error, ErrorKind, Tensor};
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Most arguments that an op may have, scratch included.
pub const MAX_ARGS: usize = 12;
/// Below this many elements a CPU op is not worth asking for more threads.
const INLINE_ELEMENTS: i64 = 1 << 16;

/// Dtype objects seen, kept alive so that an address means one object for ever.
static DTYPE_OBJECTS: [OnceLock<(usize, Dtype, Py<PyAny>)>; 16] = [const { OnceLock::new() }; 16];

/// Names of types that were given where they cannot be, kept for ever: there are few.
static TYPE_NAMES: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

static NUM_THREADS_SOURCE: pyo3::sync::PyOnceLock<Py<PyAny>> = pyo3::sync::PyOnceLock::new();

/// Sets the callable that says how many threads a CPU op may use, once for the process.
#[pyfunction]
fn set_num_threads_source(source: Bound<'_, PyAny>) {
    NUM_THREADS_SOURCE.get_or_init(source.py(), || source.unbind());
}

/// Adds the functions of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(set_num_threads_source, module)?)
}

/// How many threads a CPU op may use.
pub fn num_threads(py: Python<'_>) -> PyResult<usize> {
    match NUM_THREADS_SOURCE.get(py) {
        Some(source) => source.bind(py).call0()?.extract(),
        None => Ok(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// What a call came to.
#[derive(Default)]
pub struct Answer<'py> {
    /// Torch computes the result faster by other ops; all that was given is checked, nothing was done.
    pub is_declined: bool,
    /// An output has elements.
    pub has_elements: bool,
    outputs: Vec<Bound<'py, PyAny>>,
}

impl<'py> Answer<'py> {
    /// One output, a tuple of several, or NotImplemented.
    pub fn into_object(mut self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        match self.outputs.len() {
            _ if self.is_declined => Ok(py.NotImplemented().into_bound(py)),
            1 => Ok(self.outputs.remove(0)),
            _ => Ok(PyTuple::new(py, self.outputs)?.into_any()),
        }
    }
}

/// Calls `op` with all its arguments but the scratch, in the order of the declaration. Outputs may be None. Only an eager
/// call may read weights before earlier work has ended.
pub fn call<'a, 'py>(
    py: Python<'py>,
    op: &'static Op,
    args: &[Borrowed<'a, 'py, PyAny>],
    is_eager: bool,
) -> PyResult<Answer<'py>> {
    with_values(py, op, args, |values, symbols, loans| {
        let compiled = (op.compiled)();
        let mut results = Results::default();
        let is_given = |value: &Value| !matches!(value, Value::Absent);
        let mut given = 0u32;
        for i in compiled.written() {
            match is_given(&values[i]) {
                true => given |= 1 << i,
                false => {
                    let wanted = compiled.output(i, values, symbols).map_err(|error| raise(py, error))?;
                    values[i] = Value::Tensor(wanted);
                }
            }
        }
        if let Some(declines) = op.declines
            && loans.are_torch()
            && compiled.written().all(|i| matches!(values[i], Value::Tensor(_)))
        {
            let backend = backend(py, compiled.spec.name, symbols, loans)?;
            if declines(values, &backend).map_err(|error| raise(py, error))? {
                let mut given = compiled.written().filter(|i| given & (1 << i) != 0);
                let checked = given.try_for_each(|i| compiled.check_output(i, values, symbols));
                checked.map_err(|error| raise(py, error))?;
                return Ok(Answer { is_declined: true, ..Answer::default() });
            }
        }
        for i in compiled.written() {
            match &mut values[i] {
                _ if given & (1 << i) != 0 => results.given(args[i]),
                Value::Tensor(wanted) => *wanted = results.allocate(py, compiled, i, wanted, loans)?,
                other => unreachable!("a planned output, got {other:?}"),
            }
        }
        compiled.check_outputs(values, symbols).map_err(|error| raise(py, error))?;
        let weights_are_ready = is_eager && dependent::is_ready(py, op, values)?;
        run(py, op, values, symbols, loans, weights_are_ready)?;
        let has_elements = compiled.outputs().any(|i| matches!(values[i], Value::Tensor(t) if !t.is_empty()));
        Ok(Answer { is_declined: false, has_elements, outputs: results.finish(py, loans)? })
    })
}

/// The backend that a question is put to.
fn backend(py: Python<'_>, op: &'static str, symbols: &Symbols, loans: &mut Loans) -> PyResult<Backend> {
    Ok(match symbols.device.map_or(Device::Cpu, |(device, _)| device) {
        Device::Cpu => Backend::Cpu(Cpu { num_threads: 1 }),
        Device::Cuda(ordinal) => {
            Backend::Cuda(Cuda { stream: loans.stream(py, op, ordinal)?, weights_are_ready: false })
        }
    })
}

/// Borrows and checks the arguments, then hands them on: values, bound symbols, objects, loans.
fn with_values<'a, 'py, R>(
    py: Python<'py>,
    op: &'static Op,
    args: &[Borrowed<'a, 'py, PyAny>],
    then: impl FnOnce(&mut [Value], &Symbols, &mut Loans) -> PyResult<R>,
) -> PyResult<R> {
    let compiled = (op.compiled)();
    let spec = compiled.spec;
    let num_expected = spec.args.iter().filter(|arg| !matches!(arg.role, Role::Scratch(_))).count();
    if args.len() != num_expected {
        let (name, got) = (spec.name, args.len());
        let message =
            format!("qbits::{name}: the call must have {num_expected} positional arguments, got {got}");
        return Err(raise(py, Error::new(ErrorKind::Type, message)));
    }

    let mut loans = Loans::default();
    let mut values = [Value::Absent; MAX_ARGS];
    let values = &mut values[..spec.args.len()];
    for (i, item) in args.iter().enumerate() {
        values[i] = convert(spec.name, &spec.args[i], item, &mut loans)?;
    }
    let symbols = compiled.check_inputs(values).map_err(|error| raise(py, error))?;
    then(values, &symbols, &mut loans)
}

/// An object as a value. What it cannot be stays `Other`, and the checks name it.
fn convert<'a>(
    op: &'static str,
    arg: &Arg,
    object: &'a Bound<'_, PyAny>,
    loans: &mut Loans,
) -> PyResult<Value<'a>> {
    if object.is_none() {
        return Ok(Value::Absent);
    }
    let value = match arg.role {
        Role::Int | Role::OneOf(_) => integer(object),
        Role::Float => float(object),
        Role::OneOfStr(_) => {
            object.cast::<PyString>().ok().map(|word| word.to_str()).transpose()?.map(Value::Str)
        }
        Role::OneOfDtype(_) => to_dtype(object)?.map(Value::Dtype),
        _ => loans.borrow(op, arg.name, object)?.map(Value::Tensor),
    };
    Ok(value.unwrap_or_else(|| Value::Other(type_name(object))))
}

#[cold]
fn type_name(object: &Bound<'_, PyAny>) -> &'static str {
    let Ok(name) = object.get_type().name().map(|name| name.to_string()) else { return "an object" };
    let mut names = TYPE_NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.iter().find(|known| **known == name) {
        return known;
    }
    let name: &'static str = Box::leak(name.into_boxed_str());
    names.push(name);
    name
}

fn integer<'a>(object: &Bound<'_, PyAny>) -> Option<Value<'a>> {
    let is_number = object.is_instance_of::<PyInt>() && !object.is_instance_of::<PyBool>();
    is_number.then(|| object.extract().ok()).flatten().map(Value::Int)
}

/// A float or an int; an int that no float holds is infinite.
fn float<'a>(object: &Bound<'_, PyAny>) -> Option<Value<'a>> {
    let is_number = object.is_instance_of::<PyFloat>()
        || object.is_instance_of::<PyInt>() && !object.is_instance_of::<PyBool>();
    is_number.then(|| Value::Float(object.extract().unwrap_or(f64::INFINITY)))
}

/// The dtype that `object` names: a word, or an object whose text ends in one, as `torch.float32` does.
pub fn to_dtype(object: &Bound<'_, PyAny>) -> PyResult<Option<Dtype>> {
    let address = object.as_ptr() as usize;
    for seen in &DTYPE_OBJECTS {
        match seen.get() {
            Some((known, dtype, _)) if *known == address => return Ok(Some(*dtype)),
            Some(_) => {}
            None => break,
        }
    }
    let text = object.str()?.to_string();
    let word = text.strip_prefix("torch.").unwrap_or(&text);
    let found = DTYPES.iter().copied().find(|dtype| dtype.name() == word);
    if let Some(dtype) = found
        && !object.is_instance_of::<PyString>()
    {
        let entry = (address, dtype, object.clone().unbind());
        // With no slot left the text is read at every call.
        let _ =
            DTYPE_OBJECTS.iter().try_fold(entry, |entry, slot| slot.set(entry).map_or_else(Ok, |()| Err(())));
    }
    Ok(found)
}

fn run(
    py: Python<'_>,
    op: &Op,
    values: &[Value],
    symbols: &Symbols,
    loans: &mut Loans,
    weights_are_ready: bool,
) -> PyResult<()> {
    let name = (op.compiled)().spec.name;
    let result = match symbols.device.map_or(Device::Cpu, |(device, _)| device) {
        Device::Cpu => {
            let is_large =
                values.iter().any(|value| matches!(value, Value::Tensor(t) if t.len() > INLINE_ELEMENTS));
            // SAFETY: `check_inputs` and `check_outputs` accepted the values, whose memory the loans and results hold.
            let run = |num_threads| unsafe { (op.run)(values, &Backend::Cpu(Cpu { num_threads })) };
            if is_large {
                let num_threads = num_threads(py)?;
                py.detach(|| run(num_threads))
            } else {
                run(1) // microseconds: not worth letting go of the interpreter
            }
        }
        Device::Cuda(ordinal) => {
            let stream = loans.stream(py, name, ordinal)?;
            if cuda::full_check() {
                check_memory(op, values, stream).map_err(|error| raise(py, error))?;
            }
            let backend = &Backend::Cuda(Cuda { stream, weights_are_ready });
            // SAFETY: as above; the stream is the one on which the lenders order the use of their memory.
            let result = py.detach(|| unsafe { (op.run)(values, backend) });
            if result.is_ok() && loans.must_synchronize {
                // SAFETY: the stream of the call, live for its time.
                unsafe { cuda::synchronize(name, stream) }.map_err(|error| raise(py, error))?;
            }
            result
        }
    };
    result.map_err(|error| raise(py, error))
}

/// The driver's opinion on every pointer, with `QBITS_CHECK=full`.
fn check_memory(op: &Op, values: &[Value], stream: cuda::Stream) -> qbits_core::Result<()> {
    let spec = (op.compiled)().spec;
    let memory: Vec<_> = (spec.args.iter().zip(values))
        .filter_map(|(arg, value)| match value {
            Value::Tensor(tensor) if !tensor.is_empty() => {
                Some(Memory { name: arg.name, data: tensor.data, num_bytes: tensor.num_bytes() })
            }
            _ => None,
        })
        .collect();
    cuda::check_memory(spec.name, &memory, stream)
}

/// The outputs of a call, given or allocated, and its scratch.
#[derive(Default)]
struct Results<'py> {
    objects: Vec<Bound<'py, PyAny>>,
    buffers: Vec<Bound<'py, Buffer>>,
    scratch: Vec<Bound<'py, PyAny>>,
}

impl<'py> Results<'py> {
    fn given(&mut self, object: Borrowed<'_, 'py, PyAny>) {
        self.objects.push(object.to_owned());
    }

    fn allocate(
        &mut self,
        py: Python<'py>,
        compiled: &Compiled,
        index: usize,
        wanted: &Tensor,
        loans: &mut Loans,
    ) -> PyResult<Tensor> {
        let op = compiled.spec.name;
        let (object, tensor) = match loans.first {
            Some(Lender::Exchange(
                ExchangeApi { allocate: Some(allocate), to_object: Some(to_object), .. },
                _,
            )) => allocate_exchange(py, *allocate, *to_object, wanted)?,
            Some(Lender::Capsule(Framework::Torch)) => allocate_torch(py, op, wanted, loans)?,
            _ => {
                let stream = match wanted.device {
                    Device::Cpu => None,
                    Device::Cuda(ordinal) => Some(loans.stream(py, op, ordinal)?),
                };
                let (buffer, tensor) = Buffer::new(op, wanted, stream).map_err(|error| raise(py, error))?;
                let buffer = Bound::new(py, buffer)?;
                self.buffers.push(buffer.clone());
                (buffer.into_any(), tensor)
            }
        };
        match compiled.spec.args[index].role {
            Role::Scratch(_) => self.scratch.push(object),
            _ => self.objects.push(object),
        }
        Ok(tensor)
    }

    /// Marks buffers as ready after the work enqueued so far; the outputs.
    fn finish(self, py: Python<'py>, loans: &mut Loans) -> PyResult<Vec<Bound<'py, PyAny>>> {
        for buffer in &self.buffers {
            buffer.get().mark_ready(loans.must_synchronize).map_err(|error| raise(py, error))?;
        }
        Ok(self.objects)
    }
}

/// A tensor of a torch without the exchange API, or with the API switched off.
fn allocate_torch<'py>(
    py: Python<'py>,
    op: &'static str,
    wanted: &Tensor,
    loans: &mut Loans,
) -> PyResult<(Bound<'py, PyAny>, Tensor)> {
    let torch = py.import("torch")?;
    let keywords = PyDict::new(py);
    keywords.set_item("dtype", torch.getattr(wanted.dtype.name())?)?;
    keywords.set_item("device", wanted.device.to_string())?;
    let object = torch.getattr("empty")?.call((wanted.shape().to_vec(),), Some(&keywords))?;
    let tensor = loans.borrow(op, "output", &object)?;
    Ok((object, tensor.ok_or_else(|| PyMemoryError::new_err("torch.empty gave no tensor"))?))
}

type Allocate =
    unsafe extern "C" fn(*mut DlTensor, *mut *mut DlManagedTensorVersioned, *mut c_void, SetError) -> i32;
type SetError = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char);
type ToObject = unsafe extern "C" fn(*mut DlManagedTensorVersioned, *mut *mut c_void) -> i32;

/// Keeps the allocator's message for the exception.
unsafe extern "C" fn keep_message(context: *mut c_void, _kind: *const c_char, message: *const c_char) {
    if !context.is_null() && !message.is_null() {
        // SAFETY: `context` is the String of `allocate_exchange`, `message` a C string of the allocator.
        unsafe { *context.cast::<String>() = CStr::from_ptr(message).to_string_lossy().into_owned() };
    }
}

/// A tensor of the caller's own framework, from its own allocator, as an object and as memory.
fn allocate_exchange<'py>(
    py: Python<'py>,
    allocate: Allocate,
    to_object: ToObject,
    wanted: &Tensor,
) -> PyResult<(Bound<'py, PyAny>, Tensor)> {
    let mut shape = [0i64; qbits_core::tensor::MAX_RANK];
    shape[..wanted.shape().len()].copy_from_slice(wanted.shape());
    let mut prototype = DlTensor {
        data: std::ptr::null_mut(),
        device: wanted.device.into(),
        ndim: wanted.shape().len() as i32,
        dtype: DlDataType::from(wanted.dtype),
        shape: shape.as_mut_ptr(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let mut managed = std::ptr::null_mut();
    let mut object = std::ptr::null_mut();
    let mut message = String::new();
    // SAFETY: functions of a live exchange table; the prototype, its shape and the places for results outlive the
    // calls, and `to_object` takes over the managed tensor that `allocate` made.
    unsafe {
        let context = (&raw mut message).cast();
        if allocate(&mut prototype, &mut managed, context, keep_message) != 0 || managed.is_null() {
            return Err(PyErr::take(py).unwrap_or_else(|| PyMemoryError::new_err(message)));
        }
        let mut tensor = *wanted;
        tensor.data =
            (*managed).dl_tensor.data.cast::<u8>().wrapping_add((*managed).dl_tensor.byte_offset as usize);
        if to_object(managed, &mut object) != 0 {
            return Err(PyErr::fetch(py));
        }
        let object = Bound::from_owned_ptr_or_err(py, object.cast::<ffi::PyObject>())?;
        Ok((object, tensor))
    }
}
