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
        // Usually the newest; other threads and tasks may have entered since, and their tokens only
        // serve them. An entry leaves the list when it has served.
        let mut foreign: Vec<Entry> = Vec::new();
        let untried = |foreign: &[Entry]| {
            let entries = self.0.lock();
            let mut newest_first = entries.iter().rev();
            newest_first
                .find(|entry| !foreign.iter().any(|other| is_same(other, entry)))
                .map(|(first, second)| {
                    let second = second.as_ref().map(|second| copy(py, second));
                    (copy(py, first), second)
                })
        };
        while let Some(entry) = untried(&foreign) {
            let (first, second) = &entry;
            let second_is_back = second.as_ref().is_none_or(|second| reset(py, second));
            if second_is_back && reset(py, first) {
                let mut entries = self.0.lock();
                let place = entries.iter().rposition(|other| is_same(other, &entry));
                let served = place.map(|place| entries.remove(place));
                drop(entries);
                drop(served);
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

/// Whether two entries are one: a token is an object of its own.
fn is_same((one, _): &Entry, (other, _): &Entry) -> bool {
    one.1.is(&other.1)
}

fn copy(py: Python<'_>, (variable, token): &Token) -> Token {
    (variable, token.clone_ref(py))
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
