//! The bytes of any object that exports its buffer, and the making of `bytes`.
#![allow(unsafe_code)]

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};
use std::mem::MaybeUninit;

/// A contiguous buffer of another object, for as long as this lives.
pub(super) struct Exported(Box<ffi::Py_buffer>);

// SAFETY: the buffer stays where it is until it is released, which needs the interpreter; a thread
// that only reads the bytes needs nothing.
unsafe impl Send for Exported {}
// SAFETY: as above.
unsafe impl Sync for Exported {}

impl Exported {
    /// The bytes of `object`, to be read, or to be written.
    pub(super) fn new(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let mut view = Box::new(MaybeUninit::<ffi::Py_buffer>::uninit());
        let flags = if writable {
            ffi::PyBUF_WRITABLE
        } else {
            ffi::PyBUF_SIMPLE
        };
        // SAFETY: the object is alive, and the place is one for a view.
        let status = unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), flags) };
        if status == -1 {
            return Err(PyErr::take(object.py())
                .unwrap_or_else(|| PyBufferError::new_err("the object has no bytes")));
        }
        // SAFETY: filled by the call above; a box of the same layout.
        Ok(Exported(unsafe {
            Box::from_raw(Box::into_raw(view).cast::<ffi::Py_buffer>())
        }))
    }

    /// The bytes. Other threads may change them meanwhile: what is copied then is any mixture.
    pub(super) fn bytes(&self) -> &[u8] {
        if self.0.len == 0 {
            return &[];
        }
        // SAFETY: a simple buffer is contiguous, and lives until it is released.
        unsafe { std::slice::from_raw_parts(self.0.buf.cast(), self.0.len as usize) }
    }

    /// The bytes of a writable buffer.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        if self.0.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `bytes`; it was asked to be writable.
        unsafe { std::slice::from_raw_parts_mut(self.0.buf.cast(), self.0.len as usize) }
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        Python::attach(|_| {
            // SAFETY: filled by `PyObject_GetBuffer`, and released once.
            unsafe { ffi::PyBuffer_Release(&mut *self.0) };
        });
    }
}

/// What a caller sends: `bytes` without ado, anything else by its buffer.
pub(super) enum Source<'a, 'py> {
    Bytes(&'a Bound<'py, PyBytes>),
    Exported(Exported),
}

impl<'a, 'py> Source<'a, 'py> {
    #[inline]
    pub(super) fn new(object: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        match object.cast_exact::<PyBytes>() {
            Ok(bytes) => Ok(Source::Bytes(bytes)),
            Err(_) => Exported::new(object, false).map(Source::Exported),
        }
    }

    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Source::Bytes(bytes) => bytes.as_bytes(),
            Source::Exported(exported) => exported.bytes(),
        }
    }
}

/// New `bytes` whose contents `fill` writes; `None` if it does not.
#[inline]
pub(super) fn new_bytes<'py>(
    py: Python<'py>,
    length: usize,
    fill: impl FnOnce(&mut [u8]) -> PyResult<bool>,
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    // SAFETY: a null pointer asks for bytes that are not set.
    let raw = unsafe { ffi::PyBytes_FromStringAndSize(std::ptr::null(), length as isize) };
    // SAFETY: a new reference, or null with an exception set.
    let made = unsafe { Bound::from_owned_ptr_or_err(py, raw) }?;
    // SAFETY: an object of that type.
    let address = unsafe { ffi::PyBytes_AsString(raw) };
    // Nobody shares the object of no bytes or of one, which is never written to.
    if length < 2 {
        let mut few = [0; 1];
        let filled = fill(&mut few[..length])?;
        return Ok(filled.then(|| PyBytes::new(py, &few[..length])));
    }
    // SAFETY: nobody else has the object; `fill` only writes to the bytes, and writes all of them.
    let place = unsafe { std::slice::from_raw_parts_mut(address.cast(), length) };
    // SAFETY: made above, of that type.
    Ok(fill(place)?.then(|| unsafe { made.cast_into_unchecked() }))
}

/// A new `bytearray` whose contents `fill` writes; `None` if it does not.
pub(super) fn new_bytearray<'py>(
    py: Python<'py>,
    length: usize,
    fill: impl FnOnce(&mut [u8]) -> PyResult<bool>,
) -> PyResult<Option<Bound<'py, PyByteArray>>> {
    // SAFETY: a null pointer asks for bytes that are not set.
    let raw = unsafe { ffi::PyByteArray_FromStringAndSize(std::ptr::null(), length as isize) };
    // SAFETY: a new reference, or null with an exception set.
    let made = unsafe { Bound::from_owned_ptr_or_err(py, raw) }?;
    // SAFETY: an object of that type.
    let address = unsafe { ffi::PyByteArray_AsString(raw) };
    // SAFETY: nobody else has the object; `fill` only writes to the bytes, and writes all of them.
    let place = unsafe { std::slice::from_raw_parts_mut(address.cast(), length) };
    // SAFETY: made above, of that type.
    Ok(fill(place)?.then(|| unsafe { made.cast_into_unchecked() }))
}
