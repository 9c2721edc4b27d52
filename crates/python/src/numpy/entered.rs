//! Context variables that were set in contexts which may be left in any order.

use moirai_core::sync::Lock;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::sync::Arc;

/// A context variable, and the token that sets it back.
type Token = (&'static Py<PyAny>, Py<PyAny>);

/// What one context set: a variable, and perhaps a second one after it.
struct Entry {
    first: Token,
    second: Option<Token>,
}

/// What each context that is inside has set, the newest last.
#[derive(Default)]
pub(super) struct Entered(Lock<Vec<Arc<Entry>>>);

/// A context variable, and a value for it.
pub(super) type Setting<'a> = (&'static Py<PyAny>, &'a Py<PyAny>);

impl Entered {
    /// Set one variable or two in the current context until it leaves.
    pub(super) fn set(
        &self,
        py: Python<'_>,
        first: Setting<'_>,
        second: Option<Setting<'_>>,
    ) -> PyResult<()> {
        let first = set(py, first)?;
        let second = match second.map(|second| set(py, second)).transpose() {
            Ok(second) => second,
            Err(error) => {
                reset(py, &first);
                return Err(error);
            }
        };
        self.0.lock().push(Arc::new(Entry { first, second }));
        Ok(())
    }

    /// Set back what the current context set last; `name` is what an error calls the scope.
    pub(super) fn leave(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        // Usually the newest; other threads and tasks may have entered since, and what they set only
        // they can set back. An entry leaves the list when it has served.
        let mut foreign: Vec<Arc<Entry>> = Vec::new();
        let tried = |foreign: &[Arc<Entry>], entry: &Arc<Entry>| {
            foreign.iter().any(|other| Arc::ptr_eq(other, entry))
        };
        let untried = |foreign: &[Arc<Entry>]| {
            let entries = self.0.lock();
            let mut newest_first = entries.iter().rev();
            newest_first
                .find(|entry| !tried(foreign, entry))
                .map(Arc::clone)
        };
        while let Some(entry) = untried(&foreign) {
            let second = entry.second.as_ref();
            if second.is_none_or(|second| reset(py, second)) && reset(py, &entry.first) {
                // What the entry holds goes after the lock does.
                self.0.lock().retain(|other| !Arc::ptr_eq(other, &entry));
                return Ok(());
            }
            foreign.push(entry);
        }
        Err(PyRuntimeError::new_err(if foreign.is_empty() {
            format!("{name}: left more often than entered")
        } else {
            format!("{name}: must be left in the context (thread, task) in which it was entered")
        }))
    }
}

/// Set a variable in the current context.
fn set(py: Python<'_>, (variable, value): Setting<'_>) -> PyResult<Token> {
    // SAFETY: a context variable and a live object.
    let token = unsafe { ffi::PyContextVar_Set(variable.as_ptr(), value.as_ptr()) };
    // SAFETY: a new reference, or null with an exception set.
    let token = unsafe { Bound::from_owned_ptr_or_err(py, token) }?;
    Ok((variable, token.unbind()))
}

/// Set a variable back; false if its token is of another context, which is then unchanged.
fn reset(py: Python<'_>, (variable, token): &Token) -> bool {
    // SAFETY: a variable and a token of it.
    let done = unsafe { ffi::PyContextVar_Reset(variable.as_ptr(), token.as_ptr()) } == 0;
    if !done {
        drop(PyErr::take(py));
    }
    done
}
