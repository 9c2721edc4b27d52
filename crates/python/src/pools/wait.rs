//! Waiting for a turn: how one who waits is woken, and what follows from a pool's effects.

use crate::errors::{Closed, Timeout};
use moirai_core::os::{is_first_thread, now_milliseconds};
use moirai_core::pools::{
    Aftermath, Census, Effects, Found, Hold, Kind, Parked, Parker, Pool, Refused, Waited,
};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Wakes one who waits.
pub(super) enum Waker {
    /// A thread that is parked.
    Thread(Arc<Parker>),
    /// Whoever gave this function, called without arguments in the thread that releases.
    Call(Py<PyAny>),
}

impl Waker {
    pub(super) fn wake(&self, py: Python<'_>) -> PyResult<()> {
        match self {
            Waker::Thread(parker) => parker.call(),
            Waker::Call(function) => drop(function.call0(py)?),
        }
        Ok(())
    }
}

/// Whether an error is one to go on after: not a request to stop, such as KeyboardInterrupt.
pub(super) fn is_ordinary(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<PyException>(py)
}

/// Do what has to be done with no lock held: wake, destroy, drop. Raises at most a request to stop,
/// after everything was done.
pub(super) fn settle<K: Kind<Waker = Waker>>(
    py: Python<'_>,
    pool: &Pool<K>,
    effects: Effects<K>,
    mut destroy: impl FnMut(K::Item) -> PyResult<()>,
) -> PyResult<()> {
    let mut outcome = Ok(());
    let mut next = Some(effects);
    while let Some(aftermath) = next.take().and_then(Effects::aftermath) {
        let Aftermath {
            wake,
            destroy: item,
            ..
        } = *aftermath;
        if let Some(wake) = wake
            && let Err(error) = wake.waker.wake(py)
        {
            // An event loop that was closed: the grant goes to the next one who waits.
            if !is_ordinary(py, &error) {
                outcome = Err(error);
            }
            next = Some(pool.cancel(wake.ticket, now_milliseconds()));
        }
        if let Some(item) = item {
            outcome = outcome.and(destroy(item));
        }
    }
    outcome
}

/// Everybody who waits learns that the pool is closed.
pub(super) fn wake_all(py: Python<'_>, wakers: Vec<Waker>) -> PyResult<()> {
    let mut outcome = Ok(());
    for waker in wakers {
        if let Err(error) = waker.wake(py)
            && !is_ordinary(py, &error)
        {
            outcome = Err(error);
        }
    }
    outcome
}

pub(super) fn closed(method: &str) -> PyErr {
    Closed::new_err(format!("{method}: this pool is closed"))
}

/// Why nothing was acquired, and what is left behind: nothing.
pub(super) fn timed_out(method: &str, waited: Option<Duration>, census: Census) -> PyErr {
    let Census {
        in_use,
        idle: _,
        waiting,
        max_count,
    } = census;
    let when = match waited {
        Some(waited) if !waited.is_zero() => {
            format!("nothing was released within {} s", waited.as_secs_f64())
        }
        _ => "nothing is free".to_owned(),
    };
    Timeout::new_err(format!(
        "{method}: {when}: {in_use} of at most {max_count} are in use, {waiting} others wait; \
         nothing was acquired"
    ))
}

/// How long the first thread sleeps before it looks for a signal that came just before it slept.
/// Only Python's main thread handles signals; the others sleep undisturbed.
const NAP: Duration = Duration::from_millis(500);

/// Wait for an item or leave to make one, with the interpreter released. Ctrl-C ends the wait.
pub(super) fn wait<K: Kind<Waker = Waker>>(
    py: Python<'_>,
    pool: &Pool<K>,
    hold: Hold,
    share: impl Fn(&K::Item) -> K::Item,
    timeout: Option<Duration>,
    destroy: impl FnMut(K::Item) -> PyResult<()>,
) -> PyResult<Found<K>> {
    const METHOD: &str = "acquire";
    let parker = Arc::new(Parker::default());
    let waker = Waker::Thread(Arc::clone(&parker));
    let refused = |_: Refused| closed(METHOD);
    let ticket = match pool.wait(hold, &share, waker).map_err(refused)? {
        Waited::Found(found, _) => return Ok(found),
        Waited::Queued(ticket) => ticket,
    };
    let longest = is_first_thread().then_some(NAP);
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            let late = pool.time_out(ticket, hold, &share).map_err(refused)?;
            return late.map_err(|census| timed_out(METHOD, timeout, census));
        }
        let nap = match (left, longest) {
            (Some(left), Some(longest)) => Some(left.min(longest)),
            (left, longest) => left.or(longest),
        };
        if py.detach(|| parker.park(nap)) == Parked::Called {
            let taken = pool.take(ticket, hold, &share).map_err(refused)?;
            return taken.ok_or_else(|| closed(METHOD));
        }
        if let Err(signal) = py.check_signals() {
            let effects = pool.cancel(ticket, now_milliseconds());
            settle(py, pool, effects, destroy)?;
            return Err(signal);
        }
    }
}
