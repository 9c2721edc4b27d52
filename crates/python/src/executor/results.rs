//! `Results`: what a task of `map` gave, one after the other, which keeps nothing that it has handed out.

use moirai_core::sync::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::sync::MutexGuard;
use std::vec::IntoIter;

/// An iterator that takes what is in a list out of it, and keeps nothing that it has given.
#[pyclass(frozen, module = "moirai.executor")]
pub struct Results {
    /// Locked for moments, in which no Python code runs.
    left: Mutex<IntoIter<Py<PyAny>>>,
}

impl Results {
    #[inline]
    fn left(&self) -> MutexGuard<'_, IntoIter<Py<PyAny>>> {
        self.left
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

#[pymethods]
impl Results {
    #[new]
    fn new(list: &Bound<'_, PyList>) -> PyResult<Self> {
        let items: Vec<_> = list.iter().map(Bound::unbind).collect();
        list.del_slice(0, items.len())?;
        Ok(Results {
            left: Mutex::new(items.into_iter()),
        })
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self) -> Option<Py<PyAny>> {
        self.left().next()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(left) = self.left.try_lock() {
            for item in left.as_slice() {
                visit.call(item)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let left = std::mem::take(&mut *self.left());
        drop(left);
    }
}
