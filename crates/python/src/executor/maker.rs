//! How futures are made: by the `__new__` of their class, without what a call of the class adds to it.
//!
//! The garbage collector knows of a future once it refers to something that may refer back to it:
//! most never do, and there may be a million of them. Without an interpreter lock it knows of all.

#![allow(unsafe_code)] // the function in a class's slot, and the collector

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
        let future = future?;
        forget(&future);
        Ok(future.cast_into::<Future>()?.unbind())
    }
}

/// Have the collector pass a new future by.
#[inline]
fn forget(future: &Bound<'_, PyAny>) {
    if cfg!(Py_GIL_DISABLED) {
        return;
    }
    // SAFETY: an object of a class that the collector knows, which its allocation has told it of.
    unsafe { ffi::PyObject_GC_UnTrack(future.as_ptr().cast()) };
}

/// Before a future refers to an object: the collector is to look after both, if it would after the
/// other.
#[inline]
pub(super) fn refers(future: &Bound<'_, Future>, to: &Bound<'_, PyAny>) {
    // SAFETY: an object.
    if unsafe { ffi::PyObject_IS_GC(to.as_ptr()) } != 0 {
        remember(future);
    }
}

/// Have the collector look after a future.
pub(super) fn remember(future: &Bound<'_, Future>) {
    // SAFETY: an object.
    if unsafe { ffi::PyObject_GC_IsTracked(future.as_ptr()) } == 0 {
        // SAFETY: of a class that the collector knows, all of it is made, and it is not tracked: we
        // are attached, so with an interpreter lock nobody else does the same; without, all are
        // tracked from the beginning.
        unsafe { ffi::PyObject_GC_Track(future.as_ptr().cast()) };
    }
}

/// What `object` does to set an attribute, or to delete it.
pub(super) fn set_attribute(
    future: &Bound<'_, Future>,
    name: &Bound<'_, PyAny>,
    value: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    remember(future);
    let value = value.map_or(std::ptr::null_mut(), Bound::as_ptr);
    // SAFETY: objects that are alive; null deletes.
    let failed =
        unsafe { ffi::PyObject_GenericSetAttr(future.as_ptr(), name.as_ptr(), value) } != 0;
    if failed {
        return Err(PyErr::fetch(future.py()));
    }
    Ok(())
}
