//! How futures are made: by the `__new__` of their class, without what a call of the class adds to it.

#![allow(unsafe_code)] // the function in a class's slot

use super::future::{Future, announce};
use super::{Shared, TaskHandle};
use pyo3::PyTypeInfo;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};
use std::ffi::c_void;
use std::sync::Arc;

/// The `__new__` of a class of futures, which makes all of their state.
pub(super) struct Maker {
    kind: Py<PyType>,
    new: ffi::newfunc,
    nothing: Py<PyTuple>,
}

impl Maker {
    /// None: it is no such class.
    pub(super) fn of(kind: Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let py = kind.py();
        if !kind.is_subclass(&Future::type_object(py))? {
            return Ok(None);
        }
        // SAFETY: it is a class.
        let slot = unsafe { ffi::PyType_GetSlot(kind.as_type_ptr(), ffi::Py_tp_new) };
        if slot.is_null() {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: what is in this slot is such a function.
        let new = unsafe { std::mem::transmute::<*mut c_void, ffi::newfunc>(slot) };
        Ok(Some(Maker {
            kind: kind.unbind(),
            new,
            nothing: PyTuple::empty(py).unbind(),
        }))
    }

    /// A future for an empty task.
    #[inline]
    pub(super) fn make(
        &self,
        py: Python<'_>,
        task: TaskHandle,
        shared: Arc<Shared>,
    ) -> PyResult<Py<Future>> {
        announce(Some((task, shared)));
        let kind = self.kind.as_ptr().cast();
        // SAFETY: the function of this class, with no arguments.
        let future = unsafe { (self.new)(kind, self.nothing.as_ptr(), std::ptr::null_mut()) };
        // SAFETY: the answer is a new reference, or null with an exception set.
        let future = unsafe { Bound::from_owned_ptr_or_err(py, future) };
        if future.is_err() {
            announce(None);
        }
        Ok(future?.cast_into::<Future>()?.unbind())
    }
}
