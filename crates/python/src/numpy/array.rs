//! A block as an array: its dtype and shape, checked, and the array that keeps the block's owner.

use super::abi;
use crate::errors::{InvalidArgument, OutOfMemory};
use pyo3::exceptions::PyTypeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyTuple};
use std::ffi::c_int;
use std::ptr::{NonNull, null, null_mut};

/// Aligned, writeable, C-contiguous if the strides are left out.
const FLAGS: c_int = 0x0100 | 0x0400;
/// NumPy 2's limit; older ones refuse more than 32 themselves.
const MAX_DIMENSIONS: usize = 64;

/// A dtype whose items a block can hold.
pub(crate) struct Items<'py> {
    descr: Bound<'py, PyAny>,
    /// Bytes of an item; > 0.
    pub item_bytes: usize,
}

impl<'py> Items<'py> {
    /// The dtype itself.
    pub(crate) fn descr(&self) -> &Bound<'py, PyAny> {
        &self.descr
    }
}

/// The dtype that `dtype` names; float64 for `None`, as NumPy has it.
pub(crate) fn items<'py>(
    py: Python<'py>,
    dtype: Option<&Bound<'py, PyAny>>,
) -> PyResult<Items<'py>> {
    let numpy = abi::numpy(py)?;
    let none = py.None();
    let dtype = dtype.map_or(none.as_ptr(), |dtype| dtype.as_ptr());
    let mut descr = null_mut();
    // SAFETY: a live object, and a place for a new reference.
    let converted = unsafe { (numpy.descr_converter)(dtype, &mut descr) };
    if converted == 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: on success a new reference was stored.
    let descr = unsafe { Bound::from_owned_ptr_or_err(py, descr) }?;
    // SAFETY: the converter gives dtypes.
    let (item_bytes, has_object) = match unsafe { numpy.descr_layout.read(descr.as_ptr()) } {
        Some(read) => read,
        None => (
            descr.getattr("itemsize")?.extract()?,
            descr.getattr("hasobject")?.extract()?,
        ),
    };
    if item_bytes == 0 {
        return Err(InvalidArgument::new_err(format!(
            "dtype: must say how large its items are, got {}",
            descr.repr()?
        )));
    }
    if has_object {
        return Err(InvalidArgument::new_err(format!(
            "dtype: must hold plain values, got {descr}: a block holds no references"
        )));
    }
    Ok(Items { descr, item_bytes })
}

/// The lengths of an array's dimensions.
pub(crate) struct Shape {
    lengths: [ffi::Py_ssize_t; MAX_DIMENSIONS],
    count: usize,
}

impl Shape {
    /// The shape that an int or a sequence of ints names.
    pub(crate) fn of(shape: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut found = Shape {
            lengths: [0; MAX_DIMENSIONS],
            count: 0,
        };
        if let Ok(lengths) = shape.cast::<PyTuple>() {
            for length in lengths.iter_borrowed() {
                found.push(&length, shape)?;
            }
        } else if shape.is_instance_of::<PyInt>() || shape.hasattr("__index__")? {
            found.push(shape, shape)?;
        } else {
            let lengths = shape.try_iter().map_err(|_| wrong_type(shape))?;
            for length in lengths {
                found.push(&length?, shape)?;
            }
        }
        Ok(found)
    }

    /// These lengths.
    pub(crate) fn from_lengths(given: &[i64]) -> Option<Self> {
        let mut lengths = [0; MAX_DIMENSIONS];
        let place = lengths.get_mut(..given.len())?;
        for (length, given) in place.iter_mut().zip(given) {
            *length = ffi::Py_ssize_t::try_from(*given)
                .ok()
                .filter(|it| *it >= 0)?;
        }
        let count = given.len();
        Some(Shape { lengths, count })
    }

    /// The lengths.
    pub(crate) fn lengths(&self) -> &[ffi::Py_ssize_t] {
        &self.lengths[..self.count]
    }

    /// Two dimensions.
    pub(crate) fn rows(count: usize, length: usize) -> Self {
        let mut lengths = [0; MAX_DIMENSIONS];
        lengths[0] = count as ffi::Py_ssize_t;
        lengths[1] = length as ffi::Py_ssize_t;
        Shape { lengths, count: 2 }
    }

    fn push(&mut self, length: &Bound<'_, PyAny>, shape: &Bound<'_, PyAny>) -> PyResult<()> {
        if length.is_instance_of::<PyBool>() {
            return Err(wrong_type(shape));
        }
        let number: ffi::Py_ssize_t = length.extract().map_err(|error: PyErr| {
            if error.is_instance_of::<pyo3::exceptions::PyOverflowError>(shape.py()) {
                too_large(shape)
            } else {
                wrong_type(shape)
            }
        })?;
        if number < 0 {
            return Err(InvalidArgument::new_err(format!(
                "shape: must have no negative length, got {shape}"
            )));
        }
        if self.count == MAX_DIMENSIONS {
            return Err(InvalidArgument::new_err(format!(
                "shape: must have at most {MAX_DIMENSIONS} dimensions, got more"
            )));
        }
        self.lengths[self.count] = number;
        self.count += 1;
        Ok(())
    }

    /// Bytes of an array of this shape, `None` if that is no size.
    pub(crate) fn bytes(&self, item_bytes: usize) -> Option<usize> {
        let lengths = self.lengths[..self.count].iter();
        if lengths.clone().any(|length| *length == 0) {
            return Some(0);
        }
        lengths.copied().try_fold(item_bytes, |bytes, length| {
            let bytes = bytes.checked_mul(length as usize)?;
            (bytes <= ffi::Py_ssize_t::MAX as usize).then_some(bytes)
        })
    }
}

fn wrong_type(shape: &Bound<'_, PyAny>) -> PyErr {
    let kind = shape.get_type();
    PyTypeError::new_err(format!(
        "shape: must be an int or ints, got {shape} ({kind})"
    ))
}

pub(crate) fn too_large(shape: &Bound<'_, PyAny>) -> PyErr {
    OutOfMemory::new_err(format!(
        "shape: cannot allocate an array of shape {shape}: no machine has as many bytes"
    ))
}

/// An array of `items` over memory that `owner` keeps; `strides` are C order if left out.
///
/// # Safety
/// `address` is the first byte of as many as shape, items and strides span, aligned for any item,
/// which nobody else writes without telling, and which `owner` keeps valid.
pub(crate) unsafe fn over<'py>(
    items: Items<'py>,
    shape: &Shape,
    strides: Option<&[ffi::Py_ssize_t]>,
    address: NonNull<u8>,
    owner: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = owner.py();
    let numpy = abi::numpy(py)?;
    debug_assert!(strides.is_none_or(|strides| strides.len() == shape.count));
    // SAFETY: the type is `numpy.ndarray`, the dtype's reference is given away, lengths and strides
    // are as many as said, and the caller vouches for the memory.
    let array = unsafe {
        (numpy.new_from_descr)(
            numpy.ndarray.as_ptr().cast(),
            items.descr.into_ptr(),
            shape.count as c_int,
            shape.lengths.as_ptr(),
            strides.map_or(null(), <[_]>::as_ptr),
            address.as_ptr().cast(),
            FLAGS,
            null_mut(),
        )
    };
    // SAFETY: a new reference, or null with an exception set.
    let array = unsafe { Bound::from_owned_ptr_or_err(py, array) }.map_err(|error| {
        if error.is_instance_of::<pyo3::exceptions::PyValueError>(py) {
            InvalidArgument::new_err(format!("shape: NumPy refuses it: {}", error.value(py)))
        } else {
            error
        }
    })?;
    // SAFETY: a new array without a base; the owner's reference is given away.
    let status = unsafe { (numpy.set_base_object)(array.as_ptr(), owner.into_ptr()) };
    if status == 0 {
        Ok(array)
    } else {
        Err(PyErr::fetch(py))
    }
}
