//! Waiting for the other side with the interpreter released. Ctrl-C ends the wait.

use crate::errors::{Timeout, to_py};
use moirai_core::channel::shared::endpoint::{Endpoint, Needed, Waited};
use pyo3::prelude::*;
use std::time::{Duration, Instant};

/// How long to wait, and what to say if it was not long enough.
pub(super) struct Patience {
    pub method: &'static str,
    pub timeout: Option<Duration>,
    deadline: Option<Instant>,
}

impl Patience {
    pub(super) fn new(method: &'static str, timeout: Option<Duration>) -> Self {
        // Most calls do not wait: the clock is read by those that do.
        Patience {
            method,
            timeout,
            deadline: None,
        }
    }

    fn deadline(&mut self) -> Option<Instant> {
        if self.deadline.is_none() {
            let now = Instant::now();
            self.deadline = self.timeout.and_then(|timeout| now.checked_add(timeout));
        }
        self.deadline
    }

    fn is_over(&mut self) -> bool {
        match self.timeout {
            Some(timeout) if timeout.is_zero() => true,
            Some(_) => self
                .deadline()
                .is_some_and(|deadline| deadline <= Instant::now()),
            None => false,
        }
    }
}

/// Try until something is there; wait in between for a message, or for what is `needed` to send.
#[inline]
pub(super) fn until<'a, T>(
    py: Python<'_>,
    endpoint: &Endpoint,
    needed: impl Into<Needed<'a>>,
    patience: &mut Patience,
    mut attempt: impl FnMut() -> PyResult<Option<T>>,
) -> PyResult<Option<T>> {
    match attempt()? {
        Some(found) => Ok(Some(found)),
        None => wait(py, endpoint, needed.into(), patience, attempt),
    }
}

#[cold]
pub(super) fn wait<T>(
    py: Python<'_>,
    endpoint: &Endpoint,
    needed: Needed<'_>,
    patience: &mut Patience,
    mut attempt: impl FnMut() -> PyResult<Option<T>>,
) -> PyResult<Option<T>> {
    let mut again = false;
    loop {
        if patience.is_over() {
            return Ok(None);
        }
        let deadline = patience.deadline();
        let waited = py.detach(|| endpoint.wait(needed, deadline, again));
        match waited.map_err(to_py)? {
            Waited::Ready => again = false,
            Waited::TimedOut => {}
            Waited::Interrupted => {
                py.check_signals()?;
                again = true;
            }
        }
        if let Some(found) = attempt()? {
            return Ok(Some(found));
        }
    }
}

pub(super) fn timed_out(patience: &Patience, nothing: &str, left: &str) -> PyErr {
    let seconds = patience.timeout.unwrap_or_default().as_secs_f64();
    Timeout::new_err(format!(
        "{}: {nothing} within {seconds} s; {left}",
        patience.method
    ))
}
