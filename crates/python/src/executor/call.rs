//! What a task is to do: call a Python function, once or for each of some arguments, in a context.

#![allow(unsafe_code)] // contexts, which PyO3 has no safe interface for

use super::future::Future;
use pyo3::exceptions::PyException;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};
use std::cell::Cell;

thread_local! {
    /// The call that this thread is at; null: none.
    static CURRENT: Cell<*const Call> = const { Cell::new(std::ptr::null()) };
}

/// How the arguments are given to the function.
pub(super) enum Arguments {
    /// All at once: what follows the first item of a tuple, and those with names.
    Once(Py<PyTuple>, Option<Py<PyDict>>),
    /// The same, a tuple, for one of many that were queued together.
    OnceOfMany(Py<PyAny>),
    /// The same where there is only one.
    OneOfMany(Py<PyAny>),
    /// One call for each, which is its only argument.
    Each(Vec<Py<PyAny>>),
    /// One call for each, which are its arguments.
    EachStar(Vec<Py<PyAny>>),
}

/// A call that is asked for.
pub(super) struct Request {
    pub(super) function: Py<PyAny>,
    pub(super) arguments: Arguments,
    /// Its own, or that of many, of which each enters a copy: a context is entered once at a time.
    pub(super) context: Py<PyAny>,
}

/// A call that is to be made, and the future that gets the outcome.
pub(super) struct Call {
    request: Request,
    future: Py<Future>,
    /// When it was asked for; 0 where latencies are not measured.
    asked_nanoseconds: u64,
}

/// A copy of the context of this moment.
pub(super) fn current_context(py: Python<'_>) -> PyResult<Py<PyAny>> {
    // SAFETY: attached.
    let context = unsafe { ffi::PyContext_CopyCurrent() };
    // SAFETY: the answer is a new reference, or null with an exception set.
    let context = unsafe { Bound::from_owned_ptr_or_err(py, context) };
    Ok(context?.unbind())
}

/// Run `body` in a context that nobody is in.
pub(super) fn within<R>(
    py: Python<'_>,
    context: &Py<PyAny>,
    body: impl FnOnce() -> PyResult<R>,
) -> PyResult<R> {
    // SAFETY: a context, which is alive.
    if unsafe { ffi::PyContext_Enter(context.as_ptr()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    let outcome = body();
    // SAFETY: entered above, in this thread; what was entered since was left again.
    if unsafe { ffi::PyContext_Exit(context.as_ptr()) } != 0 {
        return Err(PyErr::fetch(py));
    }
    outcome
}

impl Call {
    pub(super) fn new(request: Request, future: Py<Future>, asked_nanoseconds: u64) -> Self {
        Call {
            request,
            future,
            asked_nanoseconds,
        }
    }

    pub(super) fn asked_nanoseconds(&self) -> u64 {
        self.asked_nanoseconds
    }

    pub(super) fn into_future(self) -> Py<Future> {
        self.future
    }

    pub(super) fn future(&self) -> &Py<Future> {
        &self.future
    }

    /// Make it.
    pub(super) fn make(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let copy = match &self.request.arguments {
            Arguments::Once(..) => self.request.context.clone_ref(py),
            _ => {
                // SAFETY: a context, which is alive.
                let copy = unsafe { ffi::PyContext_Copy(self.request.context.as_ptr()) };
                // SAFETY: the answer is a new reference, or null with an exception set.
                unsafe { Bound::from_owned_ptr_or_err(py, copy) }?.unbind()
            }
        };
        within(py, &copy, || {
            let before = CURRENT.replace(self);
            let outcome = self.make_here(py);
            CURRENT.set(before);
            outcome
        })
    }

    fn make_here(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let function = self.request.function.bind(py);
        match &self.request.arguments {
            Arguments::Once(arguments, keywords) => {
                call_with_rest(function, arguments.bind(py), keywords.as_ref())
            }
            Arguments::OnceOfMany(arguments) => function
                .call1(arguments.bind(py).cast::<PyTuple>()?)
                .map(Bound::unbind),
            Arguments::OneOfMany(item) => function.call1((item,)).map(Bound::unbind),
            Arguments::Each(items) => each(py, items, |item| function.call1((item,))),
            Arguments::EachStar(items) => each(py, items, |item| {
                function.call1(item.bind(py).cast::<PyTuple>()?)
            }),
        }
    }
}

/// Call a function with what follows the first item of a tuple, and with keywords.
fn call_with_rest(
    function: &Bound<'_, PyAny>,
    arguments: &Bound<'_, PyTuple>,
    keywords: Option<&Py<PyDict>>,
) -> PyResult<Py<PyAny>> {
    let py = function.py();
    let rest = arguments.as_slice().get(1..).unwrap_or_default();
    // SAFETY: a callable, so many arguments, which the tuple keeps alive, and a dictionary or null.
    let outcome = unsafe {
        ffi::PyObject_VectorcallDict(
            function.as_ptr(),
            // A bound reference is its pointer.
            rest.as_ptr().cast(),
            rest.len(),
            keywords.map_or(std::ptr::null_mut(), Py::as_ptr),
        )
    };
    // SAFETY: the answer is a new reference, or null with an exception set.
    let outcome = unsafe { Bound::from_owned_ptr_or_err(py, outcome) };
    outcome.map(Bound::unbind)
}

/// Run `body` as if this thread were at no call.
pub(super) fn apart<R>(body: impl FnOnce() -> R) -> R {
    let before = CURRENT.replace(std::ptr::null());
    let outcome = body();
    CURRENT.set(before);
    outcome
}

/// The future of the call that this thread is at, if any.
pub(super) fn current_future(py: Python<'_>) -> Option<Py<Future>> {
    let call = CURRENT.get();
    // SAFETY: not null only within `Call::make` in this thread, which borrows the call until it has
    // put back what was there before.
    let call = unsafe { call.as_ref() }?;
    Some(call.future.clone_ref(py))
}

/// The results up to the first that fails, and why that one does: a list, and an exception or None.
fn each<'py>(
    py: Python<'py>,
    items: &[Py<PyAny>],
    call: impl Fn(&Py<PyAny>) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Py<PyAny>> {
    let mut results = Vec::with_capacity(items.len());
    let mut failure = py.None();
    for item in items {
        match call(item) {
            Ok(result) => results.push(result),
            Err(error) if error.is_instance_of::<PyException>(py) => {
                failure = error.into_value(py).into_any();
                break;
            }
            Err(stop) => return Err(stop),
        }
    }
    let results = PyList::new(py, results)?;
    Ok((results, failure).into_pyobject(py)?.into_any().unbind())
}
