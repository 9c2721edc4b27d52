//! Bytes of another process's shared memory, as a Python object that exports the buffer protocol.
#![allow(unsafe_code)]

use super::super::pools::view::{self, Items};
use moirai_core::channel::shared::reference::Received;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;

/// Bytes that were received by reference; the block is held until the last view is gone.
#[pyclass(frozen, weakref, module = "moirai.channels")]
pub struct LentBlock(Received);

// SAFETY: the address lies in a mapping that the hold keeps.
unsafe impl Send for LentBlock {}
// SAFETY: `&LentBlock` gives no access to the contents but through the buffer protocol.
unsafe impl Sync for LentBlock {}

impl LentBlock {
    pub(super) fn new(received: Received) -> Self {
        LentBlock(received)
    }

    /// What was received.
    pub(super) fn received(&self) -> &Received {
        &self.0
    }
}

#[pymethods]
impl LentBlock {
    fn __len__(&self) -> usize {
        self.0.length
    }

    /// Whether the sender gave the memory away.
    #[getter]
    fn is_given(&self) -> bool {
        self.0.is_given
    }

    /// # Safety
    /// Called by the interpreter with a valid view and the flags of the buffer protocol.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("the view is null"));
        }
        let received = &slf.get().0;
        let items = Items {
            address: received.address,
            size: received.length,
            item_bytes: 1,
            format: c"B",
        };
        // SAFETY: the view is valid, and `__releasebuffer__` frees what is filled in.
        unsafe { view::fill(view, slf.clone().into_any(), items, flags) };
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled, once.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: as the interpreter promises.
        unsafe { view::free(view) };
    }
}
