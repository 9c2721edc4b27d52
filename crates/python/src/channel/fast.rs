//! `Channel.send(item)` and `Channel.receive()` as the interpreter calls them.
//!
//! What PyO3 makes of a method reads arguments by their names and counts attachments before it does
//! anything, which is a third of what a message costs. Here the call with nothing but the message
//! (or nothing) is tried at once; every other call, and every message that does not go through, is
//! the method's that PyO3 made.

use super::Channel;
use super::waker::wake;
use moirai_core::channel::{Refused, Side};
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;
use std::ffi::CStr;

/// The methods that PyO3 made.
static SEND: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
static RECEIVE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

type Function = unsafe extern "C" fn(
    *mut ffi::PyObject,
    *const *mut ffi::PyObject,
    ffi::Py_ssize_t,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// A method's definition, which lives as long as the process.
fn definition(
    name: &'static CStr,
    function: Function,
    doc: &'static CStr,
) -> *mut ffi::PyMethodDef {
    Box::leak(Box::new(ffi::PyMethodDef {
        ml_name: name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer {
            PyCFunctionFastWithKeywords: function,
        },
        ml_flags: ffi::METH_FASTCALL | ffi::METH_KEYWORDS,
        ml_doc: doc.as_ptr(),
    }))
}

/// Put these functions in the place of the methods.
pub(crate) fn install(py: Python<'_>) -> PyResult<()> {
    let class = py.get_type::<Channel>();
    let send_doc = c"send($self, item, timeout_seconds=None)\n--\n\n\
                     Put a message in, waiting while the channel is full.";
    let receive_doc = c"receive($self, timeout_seconds=None)\n--\n\n\
                        Take the oldest message, waiting while there is none.";
    for (made, name, function, doc) in [
        (&SEND, c"send", send as Function, send_doc),
        (&RECEIVE, c"receive", receive, receive_doc),
    ] {
        let key = PyString::intern(py, &name.to_string_lossy());
        let method = class.getattr(&key)?.unbind();
        if made.set(py, method).is_err() {
            return Ok(());
        }
        let definition = definition(name, function, doc);
        // SAFETY: the class is one, and the definition lives as long as the process.
        let descriptor = unsafe { ffi::PyDescr_NewMethod(class.as_type_ptr(), definition) };
        // SAFETY: a new reference, or null with an exception set.
        let descriptor = unsafe { Bound::from_owned_ptr_or_err(py, descriptor) }?;
        class.setattr(key, descriptor)?;
    }
    Ok(())
}

/// # Safety
/// Called by the interpreter as the method of a channel.
unsafe extern "C" fn send(
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls, so this thread is attached.
    let py = unsafe { Python::assume_attached() };
    if count == 1 && names.is_null() {
        // SAFETY: the object is borrowed from the caller.
        let channel = unsafe { Borrowed::from_ptr(py, this) };
        // SAFETY: the method's descriptor has checked the class.
        let channel = unsafe { channel.cast_unchecked::<Channel>() };
        // SAFETY: there is one argument.
        let item = unsafe { *arguments };
        // SAFETY: it is borrowed from the caller.
        let item = unsafe { Borrowed::from_ptr(py, item) }.to_owned().unbind();
        let line = &channel.get().line;
        match line.push(item) {
            Ok(None) => return py.None().into_ptr(),
            Ok(called) => {
                Python::attach(|py| wake(py, line, Side::Receivers, called));
                return py.None().into_ptr();
            }
            // Bound, it is dropped as by an attached thread.
            Err(Refused::Full(item) | Refused::Closed(item)) => drop(item.into_bound(py)),
        }
    }
    // SAFETY: what the interpreter gave.
    unsafe { call(py, &SEND, this, arguments, count, names) }
}

/// # Safety
/// Called by the interpreter as the method of a channel.
unsafe extern "C" fn receive(
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls, so this thread is attached.
    let py = unsafe { Python::assume_attached() };
    if count == 0 && names.is_null() {
        // SAFETY: the object is borrowed from the caller.
        let channel = unsafe { Borrowed::from_ptr(py, this) };
        // SAFETY: the method's descriptor has checked the class.
        let channel = unsafe { channel.cast_unchecked::<Channel>() };
        let line = &channel.get().line;
        if let Ok((message, called)) = line.pop() {
            if called.is_some() {
                Python::attach(|py| wake(py, line, Side::Senders, called));
            }
            return message.into_ptr();
        }
    }
    // SAFETY: what the interpreter gave.
    unsafe { call(py, &RECEIVE, this, arguments, count, names) }
}

/// Call the method that PyO3 made.
///
/// # Safety
/// The arguments are those of a call by the interpreter.
#[cold]
unsafe fn call(
    py: Python<'_>,
    method: &PyOnceLock<Py<PyAny>>,
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    let named = if names.is_null() {
        0
    } else {
        // SAFETY: the names are a tuple.
        unsafe { ffi::PyTuple_Size(names) }
    };
    let mut all = vec![this];
    for index in 0..(count + named) as usize {
        // SAFETY: so many arguments are there.
        all.push(unsafe { *arguments.add(index) });
    }
    let Some(method) = method.get(py) else {
        // Never: it is set before this function is put in its place.
        PyRuntimeError::new_err("this class is not made yet").restore(py);
        return std::ptr::null_mut();
    };
    // SAFETY: borrowed from the caller, as is the method, which is never dropped.
    unsafe { ffi::PyObject_Vectorcall(method.as_ptr(), all.as_ptr(), count as usize + 1, names) }
}
