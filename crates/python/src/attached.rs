//! State that only threads attached to the interpreter touch. With an interpreter lock that is one
//! thread at a time, so such state needs no lock of its own; without, it gets one.

#![allow(unsafe_code)] // what the interpreter's lock guards

use moirai_core::sync::{AtomicU64, Ordering};
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

#[cfg(Py_GIL_DISABLED)]
use moirai_core::sync::Mutex;
#[cfg(not(Py_GIL_DISABLED))]
use std::cell::RefCell;

/// A value for attached threads, for moments in which no Python code runs.
#[derive(Default)]
pub(crate) struct Attached<T> {
    #[cfg(Py_GIL_DISABLED)]
    value: Mutex<T>,
    #[cfg(not(Py_GIL_DISABLED))]
    value: RefCell<T>,
}

// SAFETY: the value is reached through `with` and `visit` only, whose callers are attached. With an
// interpreter lock no two threads are, and what one does the next one sees. Should the lock change
// hands within `with`, the next one finds the value borrowed: a panic, or nothing.
#[cfg(not(Py_GIL_DISABLED))]
unsafe impl<T: Send> Sync for Attached<T> {}

impl<T> Attached<T> {
    pub(crate) const fn new(value: T) -> Self {
        Attached {
            #[cfg(Py_GIL_DISABLED)]
            value: Mutex::new(value),
            #[cfg(not(Py_GIL_DISABLED))]
            value: RefCell::new(value),
        }
    }

    /// Do something with the value that runs no Python code: drop no object in it either.
    #[inline]
    pub(crate) fn with<R>(&self, _py: Python<'_>, body: impl FnOnce(&mut T) -> R) -> R {
        #[cfg(Py_GIL_DISABLED)]
        let mut value = self.value.lock().unwrap_or_else(|it| it.into_inner());
        #[cfg(not(Py_GIL_DISABLED))]
        let mut value = self.value.borrow_mut();
        body(&mut value)
    }

    /// The same for the garbage collector, which is attached too. None: somebody is at it.
    #[inline]
    pub(crate) fn visit<R>(&self, _by: &PyVisit<'_>, body: impl FnOnce(&T) -> R) -> Option<R> {
        #[cfg(Py_GIL_DISABLED)]
        let value = self.value.try_lock().ok()?;
        #[cfg(not(Py_GIL_DISABLED))]
        let value = self.value.try_borrow().ok()?;
        Some(body(&value))
    }
}

/// Add to a count that only attached threads add to.
#[inline]
pub(crate) fn add(_py: Python<'_>, count: &AtomicU64, more: u64) {
    #[cfg(Py_GIL_DISABLED)]
    count.fetch_add(more, Ordering::Relaxed);
    #[cfg(not(Py_GIL_DISABLED))]
    count.store(count.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}
