//! Context variables that were set in contexts which may be left in any order.

use moirai_core::sync::Lock;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use std::sync::Arc;

/// A context variable, and the token that sets it back.
type Token = (&'static Py<PyAny>, Py<PyAny>);

/// The tokens of each context that is inside, the newest last.
#[derive(Default)]
pub(super) struct Entered(Lock<Vec<Arc<[Token]>>>);

impl Entered {
    /// Set the variables in the current context until it leaves.
    pub(super) fn set(
        &self,
        py: Python<'_>,
        values: &[(&'static Py<PyAny>, &Py<PyAny>)],
    ) -> PyResult<()> {
        let mut tokens: Vec<Token> = Vec::with_capacity(values.len());
        for (variable, value) in values {
            // SAFETY: a context variable and a live object.
            let token = unsafe { ffi::PyContextVar_Set(variable.as_ptr(), value.as_ptr()) };
            // SAFETY: a new reference, or null with an exception set.
            match unsafe { Bound::from_owned_ptr_or_err(py, token) } {
                Ok(token) => tokens.push((variable, token.unbind())),
                Err(error) => {
                    // Set in this context a moment ago, so each can be set back.
                    for token in tokens.iter().rev() {
                        reset(py, token);
                    }
                    return Err(error);
                }
            }
        }
        self.0.lock().push(tokens.into());
        Ok(())
    }

    /// Set back what the current context set last; `name` is what an error calls the scope.
    pub(super) fn leave(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        // Usually the newest; other threads and tasks may have entered since, and their tokens only
        // serve them. An entry leaves the list when it has served.
        let mut foreign: Vec<Arc<[Token]>> = Vec::new();
        let untried = |foreign: &[Arc<[Token]>]| {
            let entries = self.0.lock();
            let mut newest_first = entries.iter().rev();
            newest_first
                .find(|entry| !foreign.iter().any(|other| Arc::ptr_eq(other, entry)))
                .cloned()
        };
        while let Some(tokens) = untried(&foreign) {
            if tokens.iter().rev().all(|token| reset(py, token)) {
                let mut entries = self.0.lock();
                let place = entries
                    .iter()
                    .rposition(|other| Arc::ptr_eq(other, &tokens));
                let served = place.map(|place| entries.remove(place));
                drop(entries);
                drop(served);
                return Ok(());
            }
            foreign.push(tokens);
        }
        Err(PyRuntimeError::new_err(if foreign.is_empty() {
            format!("{name}: left more often than entered")
        } else {
            format!("{name}: must be left in the context (thread, task) in which it was entered")
        }))
    }
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
