//! The buffer protocol's side of a view: one dimension of items, writable.
#![allow(unsafe_code)]

use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{NonNull, null_mut};

/// What a view's shape and strides point to.
type Layout = [ffi::Py_ssize_t; 2];

/// Items of one format, one after the other.
pub(crate) struct Items<'a> {
    pub address: NonNull<u8>,
    pub size: usize,
    pub item_bytes: usize,
    /// As in the `struct` module; must outlive the owner.
    pub format: &'a CStr,
}

/// Fill a view of `items`, which live as long as `owner` and the view.
///
/// # Safety
/// `view` is valid, and [`free`] is called with it once it ends.
pub(crate) unsafe fn fill(
    view: *mut ffi::Py_buffer,
    owner: Bound<'_, PyAny>,
    items: Items<'_>,
    flags: c_int,
) {
    let count = (items.size / items.item_bytes) as ffi::Py_ssize_t;
    let item_bytes = items.item_bytes as ffi::Py_ssize_t;
    let layout: *mut Layout = Box::into_raw(Box::new([count, item_bytes]));
    let first = layout.cast::<ffi::Py_ssize_t>();
    let asks = |flag: c_int| flags & flag == flag;
    let or_null = |wanted: bool, pointer: *mut ffi::Py_ssize_t| {
        if wanted { pointer } else { null_mut() }
    };
    // SAFETY: the caller gives a valid view, and nobody else has it yet.
    let view = unsafe { &mut *view };
    view.buf = items.address.as_ptr().cast::<c_void>();
    view.len = items.size as ffi::Py_ssize_t;
    view.readonly = 0;
    view.itemsize = item_bytes;
    view.format = if asks(ffi::PyBUF_FORMAT) {
        items.format.as_ptr().cast_mut()
    } else {
        null_mut()
    };
    view.ndim = 1;
    view.shape = or_null(asks(ffi::PyBUF_ND), first);
    view.strides = or_null(asks(ffi::PyBUF_STRIDES), first.wrapping_add(1));
    view.suboffsets = null_mut();
    view.internal = layout.cast();
    view.obj = owner.into_ptr();
}

/// Free what [`fill`] allocated.
///
/// # Safety
/// `view` was filled by [`fill`], and this is its end.
pub(crate) unsafe fn free(view: *mut ffi::Py_buffer) {
    // SAFETY: the caller's promise.
    let layout = unsafe { (*view).internal }.cast::<Layout>();
    // SAFETY: leaked by `fill`, and nobody has the view any more.
    drop(unsafe { Box::from_raw(layout) });
}
