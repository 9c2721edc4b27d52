//! Context variables that were set in contexts which may be left in any order.

use moirai_core::sync::Lock;
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

/// A context variable, and the token that sets it back.
type Token = (&'static Py<PyAny>, Py<PyAny>);

/// What one context set: a variable, and perhaps a second one after it.
type Entry = (Token, Option<Token>);

/// What each context that is inside has set, the newest last.
#[derive(Default)]
pub(super) struct Entered(Lock<Vec<Entry>>);

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
        self.0.lock().push((first, second));
        Ok(())
    }

    /// Set back what the current context set last; `name` is what an error calls the scope.
    pub(super) fn leave(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        // Usually the newest; another thread or task may have entered since.
        let mut foreign = Vec::new();
        let mut left = false;
        while let Some(entry) = { self.0.lock().pop() } {
            let (first, second) = &entry;
            let second_is_back = second.as_ref().is_none_or(|second| reset(py, second));
            if second_is_back && reset(py, first) {
                left = true;
                break;
            }
            foreign.push(entry);
        }
        if left && foreign.is_empty() {
            return Ok(());
        }
        let entered_elsewhere = !foreign.is_empty();
        self.0.lock().extend(foreign.into_iter().rev());
        match (left, entered_elsewhere) {
            (true, _) => Ok(()),
            (false, true) => Err(PyRuntimeError::new_err(format!(
                "{name}: must be left in the context (thread, task) in which it was entered"
            ))),
            (false, false) => Err(PyRuntimeError::new_err(format!(
                "{name}: left more often than entered"
            ))),
        }
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
