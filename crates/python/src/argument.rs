//! Numbers as they arrive: checked by name, so that the message says which one is wrong.

use crate::errors::{InvalidArgument, OutOfMemory, WrongType};
use moirai_core::resource::MAX_ALIGNMENT;
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt};
use std::ops::RangeInclusive;
use std::time::Duration;

/// An `int` that is a size, which nearly every one is.
#[inline]
fn plain(value: &Bound<'_, PyAny>) -> Option<usize> {
    value.cast_exact::<PyInt>().ok()?.extract().ok()
}

/// A count of bytes from any Python integer (or object with `__index__`).
pub(crate) fn bytes(name: &str, value: &Bound<'_, PyAny>) -> PyResult<usize> {
    if let Some(size) = plain(value) {
        return Ok(size);
    }
    let index = integer(name, value)?;
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
        return Err(WrongType::new_err(format!(
            "{name}: must be an iterable of int, got {kind}"
        )));
    };
    let read = |(index, value): (usize, PyResult<Bound<'_, PyAny>>)| {
        let value = value?;
        match plain(&value) {
            Some(count) => Ok(count),
            None => bytes(&format!("{name}[{index}]"), &value),
        }
    };
    values.enumerate().map(read).collect()
}

/// A count within a range from any Python integer (or object with `__index__`).
pub(crate) fn count(
    name: &str,
    value: &Bound<'_, PyAny>,
    range: RangeInclusive<usize>,
) -> PyResult<usize> {
    let index = integer(name, value)?;
    let found = index.extract().ok().filter(|count| range.contains(count));
    found.ok_or_else(|| {
        let (low, high) = range.into_inner();
        InvalidArgument::new_err(format!("{name}: must be from {low} to {high}, got {index}"))
    })
}

fn integer<'py>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyInt>> {
    let index = value.call_method0("__index__").ok();
    let Some(index) = index.filter(|_| !value.is_instance_of::<PyBool>()) else {
        let kind = value.get_type().name()?;
        return Err(WrongType::new_err(format!(
            "{name}: must be an int, got {kind}"
        )));
    };
    index.cast_into::<PyInt>().map_err(PyErr::from)
}

/// A real number, whatever its range; infinity for an int that is too large for one, or its opposite.
pub(crate) fn number(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().or_else(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            let sign = if value.lt(0)? { -1.0 } else { 1.0 };
            return Ok(sign * f64::INFINITY);
        }
        if !error.is_instance_of::<PyTypeError>(value.py()) {
            return Err(error);
        }
        let kind = value.get_type().name()?;
        Err(WrongType::new_err(format!(
            "{name}: must be a number, got {kind}"
        )))
    })
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

/// Seconds to wait at most; `None` is for ever.
pub(crate) fn timeout(name: &str, seconds: Option<f64>) -> PyResult<Option<Duration>> {
    match seconds {
        None => Ok(None),
        Some(seconds) if (0.0..=1e9).contains(&seconds) => {
            Ok(Some(Duration::from_secs_f64(seconds)))
        }
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
