//! A block that this process has, as a Python object that exports the buffer protocol.
#![allow(unsafe_code)]

use super::super::pools::view::{self, Items};
use crate::errors::InvalidArgument;
use moirai_core::channel::shared::attachment::Attachment;
use moirai_core::channel::shared::block::Block;
use moirai_core::sync::Lock;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::c_int;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a message in shared memory; the block is borrowed until the last view is gone.
#[pyclass(frozen, weakref, module = "moirai.channels")]
pub struct SharedBlock {
    /// `None` once it was sent.
    block: Lock<Option<Block>>,
    /// Keeps the mapping.
    _attachment: Arc<Attachment>,
    address: NonNull<u8>,
    size: usize,
    /// Bytes of the whole message.
    length: usize,
}

// SAFETY: the address lies in a mapping that the attachment keeps.
unsafe impl Send for SharedBlock {}
// SAFETY: `&SharedBlock` gives no access to the contents but through the buffer protocol.
unsafe impl Sync for SharedBlock {}

impl SharedBlock {
    /// A part of a block that holds a message of `length` bytes.
    pub(super) fn new(
        block: Block,
        attachment: &Arc<Attachment>,
        part: Range<usize>,
        length: usize,
    ) -> Self {
        debug_assert!(part.end <= length);
        // SAFETY: the part lies in the block.
        let address = unsafe { block.address().add(part.start) };
        SharedBlock {
            block: Lock::new(Some(block)),
            _attachment: Arc::clone(attachment),
            address,
            size: part.len(),
            length,
        }
    }

    /// Take the block to send it, and how long the message is.
    pub(super) fn take(&self) -> PyResult<(Block, usize)> {
        let block = self.block.lock().take();
        let block = block.ok_or_else(|| {
            InvalidArgument::new_err("slot: must be reserved, got one that was sent or given back")
        })?;
        Ok((block, self.length))
    }

    /// Where the bytes are.
    pub(super) fn address(&self) -> NonNull<u8> {
        self.address
    }
}

#[pymethods]
impl SharedBlock {
    fn __len__(&self) -> usize {
        self.size
    }

    /// Give a reserved block back without sending it; nothing happens if it was sent.
    pub(super) fn discard(&self) {
        let block = self.block.lock().take();
        drop(block);
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
        let this = slf.get();
        if this.block.lock().is_none() {
            return Err(PyBufferError::new_err(
                "the block was sent or given back; its memory is somebody else's",
            ));
        }
        let items = Items {
            address: this.address,
            size: this.size,
            item_bytes: 1,
            format: c"B",
        };
        // SAFETY: the view is valid, and `__releasebuffer__` frees what is filled in.
        unsafe { view::fill(view, slf.into_any(), items, flags) };
        Ok(())
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled, once.
    unsafe fn __releasebuffer__(&self, view: *mut ffi::Py_buffer) {
        // SAFETY: as the interpreter promises.
        unsafe { view::free(view) };
    }
}
