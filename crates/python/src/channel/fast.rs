//! `send(item)` and `receive()` of channels and their handles as the interpreter calls them.
//!
//! What PyO3 makes of a method reads arguments by their names and counts attachments before it does
//! anything, which is a third of what a message costs. Here the call with nothing but the message
//! (or nothing) is tried at once; every other call, and every message that does not go through, is
//! the method's that PyO3 made.

use super::waker::wake;
use super::{Channel, Receiver, Sender};
use moirai_core::channel::{Refused, Side};
use pyo3::PyClass;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pyclass::boolean_struct::True;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyString;
use std::ffi::CStr;

/// A method that PyO3 made.
type Method = PyOnceLock<Py<PyAny>>;

/// What sends.
trait Sends: PyClass<Frozen = True> + Sync {
    fn method() -> &'static Method;
    /// The channel, if the handle is open.
    fn channel(&self) -> Option<&Channel>;
}

/// What receives.
trait Receives: PyClass<Frozen = True> + Sync {
    fn method() -> &'static Method;
    /// The channel, if the handle is open.
    fn channel(&self) -> Option<&Channel>;
}

impl Sends for Channel {
    fn method() -> &'static Method {
        static METHOD: Method = Method::new();
        &METHOD
    }

    #[inline]
    fn channel(&self) -> Option<&Channel> {
        Some(self)
    }
}

impl Receives for Channel {
    fn method() -> &'static Method {
        static METHOD: Method = Method::new();
        &METHOD
    }

    #[inline]
    fn channel(&self) -> Option<&Channel> {
        Some(self)
    }
}

impl Sends for Sender {
    fn method() -> &'static Method {
        static METHOD: Method = Method::new();
        &METHOD
    }

    #[inline]
    fn channel(&self) -> Option<&Channel> {
        self.if_open()
    }
}

impl Receives for Receiver {
    fn method() -> &'static Method {
        static METHOD: Method = Method::new();
        &METHOD
    }

    #[inline]
    fn channel(&self) -> Option<&Channel> {
        self.if_open()
    }
}

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
    install_send::<Channel>(py)?;
    install_send::<Sender>(py)?;
    install_receive::<Channel>(py)?;
    install_receive::<Receiver>(py)
}

fn install_send<S: Sends>(py: Python<'_>) -> PyResult<()> {
    let doc = c"send($self, item, timeout_seconds=None)\n--\n\n\
                Put a message in, waiting while the channel is full.";
    replace::<S>(py, S::method(), c"send", send::<S>, doc)
}

fn install_receive<R: Receives>(py: Python<'_>) -> PyResult<()> {
    let doc = c"receive($self, timeout_seconds=None)\n--\n\n\
                Take the oldest message, waiting while there is none.";
    replace::<R>(py, R::method(), c"receive", receive::<R>, doc)
}

fn replace<C: PyClass>(
    py: Python<'_>,
    made: &Method,
    name: &'static CStr,
    function: Function,
    doc: &'static CStr,
) -> PyResult<()> {
    let class = py.get_type::<C>();
    let key = PyString::intern(py, &name.to_string_lossy());
    if made.set(py, class.getattr(&key)?.unbind()).is_err() {
        return Ok(());
    }
    let definition = definition(name, function, doc);
    // SAFETY: the class is one, and the definition lives as long as the process.
    let descriptor = unsafe { ffi::PyDescr_NewMethod(class.as_type_ptr(), definition) };
    // SAFETY: a new reference, or null with an exception set.
    let descriptor = unsafe { Bound::from_owned_ptr_or_err(py, descriptor) }?;
    class.setattr(key, descriptor)
}

/// # Safety
/// Called by the interpreter as the method of an `S`.
unsafe extern "C" fn send<S: Sends>(
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls, so this thread is attached.
    let py = unsafe { Python::assume_attached() };
    if count == 1 && names.is_null() {
        // SAFETY: the object is borrowed from the caller.
        let object = unsafe { Borrowed::from_ptr(py, this) };
        // SAFETY: the method's descriptor has checked the class.
        let object = unsafe { object.cast_unchecked::<S>() };
        if let Some(channel) = object.get().channel() {
            // SAFETY: there is one argument.
            let item = unsafe { *arguments };
            // SAFETY: it is borrowed from the caller.
            let item = unsafe { Borrowed::from_ptr(py, item) }.to_owned().unbind();
            match channel.line.push(item) {
                Ok(None) => return py.None().into_ptr(),
                Ok(called) => {
                    Python::attach(|py| wake(py, &channel.line, Side::Receivers, called));
                    return py.None().into_ptr();
                }
                // Bound, it is dropped as by an attached thread.
                Err(Refused::Full(item) | Refused::Closed(item)) => drop(item.into_bound(py)),
            }
        }
    }
    // SAFETY: what the interpreter gave.
    unsafe { call(py, S::method(), this, arguments, count, names) }
}

/// # Safety
/// Called by the interpreter as the method of an `R`.
unsafe extern "C" fn receive<R: Receives>(
    this: *mut ffi::PyObject,
    arguments: *const *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
    names: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the interpreter calls, so this thread is attached.
    let py = unsafe { Python::assume_attached() };
    if count == 0 && names.is_null() {
        // SAFETY: the object is borrowed from the caller.
        let object = unsafe { Borrowed::from_ptr(py, this) };
        // SAFETY: the method's descriptor has checked the class.
        let object = unsafe { object.cast_unchecked::<R>() };
        let popped = object.get().channel().map(|it| (it, it.line.pop()));
        if let Some((channel, Ok((message, called)))) = popped {
            if called.is_some() {
                Python::attach(|py| wake(py, &channel.line, Side::Senders, called));
            }
            return message.into_ptr();
        }
    }
    // SAFETY: what the interpreter gave.
    unsafe { call(py, R::method(), this, arguments, count, names) }
}

/// Call the method that PyO3 made.
///
/// # Safety
/// The arguments are those of a call by the interpreter.
#[cold]
unsafe fn call(
    py: Python<'_>,
    method: &Method,
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
    let given = (count + named) as usize;
    let mut few = [std::ptr::null_mut(); 4];
    let mut many = Vec::new();
    let all = if given < few.len() {
        &mut few[..=given]
    } else {
        many.resize(given + 1, std::ptr::null_mut());
        &mut many[..]
    };
    all[0] = this;
    for (index, place) in all[1..].iter_mut().enumerate() {
        // SAFETY: so many arguments are there.
        let argument = unsafe { arguments.add(index) };
        // SAFETY: as above.
        *place = unsafe { *argument };
    }
    let Some(method) = method.get(py) else {
        // Never: it is set before this function is put in its place.
        PyRuntimeError::new_err("this class is not made yet").restore(py);
        return std::ptr::null_mut();
    };
    // SAFETY: borrowed from the caller, as is the method, which is never dropped.
    unsafe { ffi::PyObject_Vectorcall(method.as_ptr(), all.as_ptr(), count as usize + 1, names) }
}
