//! Waiting in a thread, with the interpreter released. Ctrl-C ends the main thread's wait.

use super::operation::Operation;
use super::waker::Waker;
use moirai_core::os::is_first_thread;
use moirai_core::sync::parker::{Parked, Parker};
use pyo3::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the first thread sleeps before it looks for a signal that came just before it slept.
/// Only Python's main thread handles signals; the others sleep undisturbed.
const NAP: Duration = Duration::from_millis(500);

/// Do the operation, waiting if it must.
pub(super) fn block(
    py: Python<'_>,
    operation: &mut impl Operation,
    timeout: Option<Duration>,
) -> PyResult<Py<PyAny>> {
    if let Some(done) = operation.attempt(py)? {
        return Ok(done);
    }
    if timeout.is_some_and(|timeout| timeout.is_zero()) {
        return Err(operation.timed_out(py, Duration::ZERO));
    }
    let outcome = sleep(py, operation, timeout);
    operation.leave(py);
    match outcome? {
        Some(done) => Ok(done),
        None => Err(operation.timed_out(py, timeout.unwrap_or_default())),
    }
}

/// `None`: not in time.
fn sleep(
    py: Python<'_>,
    operation: &mut impl Operation,
    timeout: Option<Duration>,
) -> PyResult<Option<Py<PyAny>>> {
    let parker = Arc::new(Parker::default());
    let longest = is_first_thread().then_some(NAP);
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        operation.join(&|| Waker::Thread(Arc::clone(&parker)));
        if let Some(done) = operation.attempt(py)? {
            return Ok(Some(done));
        }
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                // What came in the last moment is taken; else the call goes to the next in line.
                return operation.attempt(py);
            }
            let nap = match (left, longest) {
                (Some(left), Some(longest)) => Some(left.min(longest)),
                (left, longest) => left.or(longest),
            };
            if py.detach(|| parker.park(nap)) == Parked::Called {
                break;
            }
            py.check_signals()
                .map_err(|signal| operation.told(py, signal))?;
        }
        parker.rearm();
        if let Some(done) = operation.attempt(py)? {
            operation.used();
            return Ok(Some(done));
        }
    }
}
