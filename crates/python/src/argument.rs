//! Numbers as they arrive: checked by name, so that the message says which one is wrong.

use crate::errors::{InvalidArgument, OutOfMemory};
use moirai_core::resource::MAX_ALIGNMENT;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt};

/// The value of an int that is a count; `None` if it is anything else, which needs a closer look.
#[inline]
fn plain_count(value: &Bound<'_, PyAny>) -> Option<usize> {
    let int = value.is_exact_instance_of::<PyInt>();
    int.then(|| value.extract().ok()).flatten()
}

/// A count of bytes from any Python integer (or object with `__index__`).
pub(crate) fn bytes(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    if let Some(count) = plain_count(value) {
        return Ok(count);
    }
    let index = value.call_method0("__index__").ok();
    let Some(index) = index.filter(|_| !value.is_instance_of::<PyBool>()) else {
        let kind = value.get_type().name()?;
        return Err(PyTypeError::new_err(format!(
            "{name}: must be an int, got {kind}"
        )));
    };
    let index = index.cast_into::<PyInt>().map_err(PyErr::from)?;
    if index.lt(0)? {
        return Err(InvalidArgument::new_err(format!(
            "{name}: must be at least 0, got {index}"
        )));
    }
    index.extract().map_err(|_| {
        OutOfMemory::new_err(format!(
            "{name}: cannot allocate {index} bytes: no machine has them"
        ))
    })
}

/// Counts of bytes from an iterable of integers; an error names the place: `sizes[2]`.
pub(crate) fn byte_counts(name: &str, values: &Bound<'_, PyAny>) -> PyResult<Vec<usize>> {
    let Ok(values) = values.try_iter() else {
        let kind = values.get_type().name()?;
        return Err(PyTypeError::new_err(format!(
            "{name}: must be an iterable of int, got {kind}"
        )));
    };
    let read = |(index, value): (usize, PyResult<Bound<'_, PyAny>>)| {
        let value = value?;
        match plain_count(&value) {
            Some(count) => Ok(count),
            None => bytes(&format!("{name}[{index}]"), &value),
        }
    };
    values.enumerate().map(read).collect()
}

/// One of a few words.
pub(crate) fn choice<T: Copy>(name: &str, value: &str, choices: &[(&str, T)]) -> PyResult<T> {
    let found = choices
        .iter()
        .find(|(word, _)| *word == value)
        .map(|(_, choice)| *choice);
    found.ok_or_else(|| {
        let words: Vec<_> = choices
            .iter()
            .map(|(word, _)| format!("{word:?}"))
            .collect();
        InvalidArgument::new_err(format!(
            "{name}: must be {}, got {value:?}",
            words.join(" or ")
        ))
    })
}

/// Seconds as milliseconds; `None` passes.
pub(crate) fn milliseconds(name: &str, seconds: Option<f64>) -> PyResult<Option<u64>> {
    match seconds {
        None => Ok(None),
        Some(seconds) if (0.0..=1e9).contains(&seconds) => Ok(Some((seconds * 1e3) as u64)),
        Some(seconds) => Err(InvalidArgument::new_err(format!(
            "{name}: must be None or a number from 0 to 1e9, got {seconds}"
        ))),
    }
}

/// An alignment in bytes, as an argument with a default.
pub(crate) struct Alignment(pub usize);

impl<'a, 'py> FromPyObject<'a, 'py> for Alignment {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let bytes = bytes("alignment_bytes", &value.to_owned()).map_err(|error| {
            if error.is_instance_of::<pyo3::exceptions::PyMemoryError>(value.py()) {
                InvalidArgument::new_err(format!(
                    "alignment_bytes: must be a power of two from 1 to {MAX_ALIGNMENT}, got {}",
                    &*value
                ))
            } else {
                error
            }
        })?;
        Ok(Alignment(bytes))
    }
}
