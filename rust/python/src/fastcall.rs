//! The entry points of the ops: METH_FASTCALL functions, so that a call makes no tuple and no keyword dictionary.

use crate::call::{MAX_ARGS, call};
use crate::eager::call_eagerly;
use pyo3::Borrowed;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyCFunction;
use qbits_core::backend::OPS;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Most ops that the table of entry points holds.
const MAX_OPS: usize = 48;

/// Calls op number `I` of the list, as it stands or from eager mode.
unsafe extern "C" fn entry<const I: usize, const EAGER: bool>(
    _module: *mut ffi::PyObject,
    args: *mut *mut ffi::PyObject,
    num_args: ffi::Py_ssize_t,
) -> *mut ffi::PyObject {
    // SAFETY: Python calls its functions with the interpreter attached.
    let py = unsafe { Python::assume_attached() };
    let run = || {
        let pointers = match num_args {
            0 => &[][..],
            // SAFETY: METH_FASTCALL passes an array of `num_args` arguments.
            _ => unsafe { std::slice::from_raw_parts(args, num_args as usize) },
        };
        let none = py.None().into_bound(py);
        let mut objects = [none.as_borrowed(); MAX_ARGS + 1]; // one too many is refused with its number
        for (object, pointer) in objects.iter_mut().zip(pointers) {
            // SAFETY: the interpreter holds the arguments for the time of the call.
            *object = unsafe { Borrowed::from_ptr(py, *pointer) };
        }
        let objects = &objects[..pointers.len().min(MAX_ARGS + 1)];
        let result = match EAGER {
            true => call_eagerly(py, &OPS[I], objects),
            false => call(py, &OPS[I], objects, false).and_then(|answer| answer.into_object(py)),
        };
        match result {
            Ok(result) => result.into_ptr(),
            Err(error) => {
                error.restore(py);
                std::ptr::null_mut()
            }
        }
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let name = OPS.get(I).map_or("?", |op| (op.compiled)().spec.name);
        let error =
            PyRuntimeError::new_err(format!("qbits::{name}: a bug in qbits: an invariant was broken"));
        error.restore(py);
        std::ptr::null_mut()
    })
}

macro_rules! entries {
    ($eager:literal) => {
        entries![$eager: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
            32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47]
    };
    ($eager:literal: $($i:literal)+) => { [$(entry::<$i, $eager>),+] };
}

type Entry =
    unsafe extern "C" fn(*mut ffi::PyObject, *mut *mut ffi::PyObject, ffi::Py_ssize_t) -> *mut ffi::PyObject;

static ENTRIES: [Entry; MAX_OPS] = entries![false];
static EAGER_ENTRIES: [Entry; MAX_OPS] = entries![true];

/// Adds two functions per op to the module: the op itself, and its call from eager mode.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    assert!(OPS.len() <= MAX_OPS, "the tables of entry points must hold every op");
    for (op, (entry, eager)) in OPS.iter().zip(ENTRIES.into_iter().zip(EAGER_ENTRIES)) {
        let name = (op.compiled)().spec.name;
        add(module, name, entry)?;
        add(module, &format!("eager_{name}"), eager)?;
    }
    Ok(())
}

fn add(module: &Bound<'_, PyModule>, name: &str, entry: Entry) -> PyResult<()> {
    // The interpreter keeps pointers to the definition for the life of the module, which is that of the process.
    let text: &'static std::ffi::CStr = Box::leak(CString::new(name)?.into_boxed_c_str());
    let definition = Box::leak(Box::new(ffi::PyMethodDef {
        ml_name: text.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFast: entry },
        ml_flags: ffi::METH_FASTCALL,
        ml_doc: std::ptr::null(),
    }));
    // SAFETY: a definition that lives for ever, a live module; the result is a new reference or an error.
    let function = unsafe {
        let function = ffi::PyCFunction_NewEx(definition, std::ptr::null_mut(), std::ptr::null_mut());
        Bound::from_owned_ptr_or_err(module.py(), function)?
    };
    module.add(name, function.cast_into::<PyCFunction>()?)
}
