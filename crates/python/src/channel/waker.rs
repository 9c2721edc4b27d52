//! How one who waits at a channel is woken: a parked thread, or a task through its loop's bell.

use crate::errors::to_py;
use moirai_core::channel::{Channel, Doorbell, Side, Store};
use moirai_core::sync::parker::Parker;
use pyo3::prelude::*;
use std::sync::Arc;

/// A channel of Python objects over a store.
pub(super) type Line<S> = Channel<Py<PyAny>, Waker, S>;

/// Wakes one who waits. Dropped with no lock held.
pub(super) enum Waker {
    /// A thread that is parked.
    Thread(Arc<Parker>),
    /// A task: its loop's bell, and its number there.
    Task(Arc<LoopBell>, u64),
}

/// A bell, and whether anybody still answers it.
pub(super) struct LoopBell {
    bell: Doorbell,
    /// Called without arguments: whether the loop is closed.
    is_closed: Py<PyAny>,
}

impl Waker {
    /// False if nobody is there to be woken.
    fn wake(&self, py: Python<'_>) -> bool {
        match self {
            Waker::Thread(parker) => {
                parker.call();
                true
            }
            Waker::Task(bell, who) => {
                let closed = bell.is_closed.call0(py);
                let closed = closed.and_then(|closed| closed.is_truthy(py));
                let closed = closed.unwrap_or_else(|error| {
                    error.write_unraisable(py, None);
                    false
                });
                if !closed {
                    bell.bell.ring(*who);
                }
                !closed
            }
        }
    }
}

/// Wake the one who was called, or, if a closed loop was, the next in line.
#[cold]
pub(super) fn wake<S: Store<Py<PyAny>>>(
    py: Python<'_>,
    line: &Line<S>,
    side: Side,
    called: Option<Waker>,
) {
    let mut next = called;
    while let Some(waker) = next {
        if waker.wake(py) {
            return;
        }
        next = line.call(side);
    }
}

/// Everybody learns that something ended.
pub(super) fn wake_all(py: Python<'_>, wakers: Vec<Waker>) {
    for waker in wakers {
        waker.wake(py);
    }
}

/// The bell of one event loop.
#[pyclass(frozen, module = "moirai.channels")]
pub struct LoopDoorbell(pub(super) Arc<LoopBell>);

#[pymethods]
impl LoopDoorbell {
    #[new]
    fn new(is_closed: Py<PyAny>) -> PyResult<Self> {
        let bell = Doorbell::new().map_err(to_py)?;
        Ok(LoopDoorbell(Arc::new(LoopBell { bell, is_closed })))
    }

    /// The descriptor that is readable after a ring.
    fn fileno(&self) -> i32 {
        self.0.bell.descriptor()
    }

    /// The numbers that were rung for since the last call.
    fn answer(&self) -> Vec<u64> {
        self.0.bell.answer()
    }
}
