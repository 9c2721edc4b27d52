//! The first of several operations that can be done.

use super::operation::{Operation, Place, Single, Work};
use super::{Channel, Held, Receiver, Sender};
use crate::channel::waker::Waker;
use crate::errors::{Closed, Disconnected, InvalidArgument, Timeout};
use moirai_core::sync::{AtomicUsize, Ordering};
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::time::Duration;

/// Where the next `select` begins to look, so that no operation comes always first. Only a number
/// to differ, so `Relaxed` suffices.
static TURN: AtomicUsize = AtomicUsize::new(0);

/// Several operations, of which one is to be done.
pub(super) struct Select(Vec<Single<Held>>);

/// A channel or receiver is one to receive from; a tuple says what to send where.
fn case(index: usize, asked: &Bound<'_, PyAny>) -> PyResult<Single<Held>> {
    if let Ok(channel) = asked.cast::<Channel>() {
        return Ok(Single::new(Held::of(channel), Work::Receive));
    }
    if let Ok(receiver) = asked.cast::<Receiver>() {
        return Ok(Single::new(receiver.get().open("select")?, Work::Receive));
    }
    if let Ok(pair) = asked.cast::<PyTuple>()
        && let Ok((place, item)) = pair.extract::<(Bound<'_, PyAny>, Py<PyAny>)>()
    {
        if let Ok(channel) = place.cast::<Channel>() {
            return Ok(Single::new(Held::of(channel), Work::Send(Some(item))));
        }
        if let Ok(sender) = place.cast::<Sender>() {
            let channel = sender.get().open("select")?;
            return Ok(Single::new(channel, Work::Send(Some(item))));
        }
    }
    Err(PyTypeError::new_err(format!(
        "operations[{index}]: must be a Channel, a Receiver, or a tuple of a Channel or Sender and \
         an item to send, got {}",
        asked.get_type().name()?
    )))
}

impl Select {
    pub(super) fn new(operations: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mut cases = Vec::new();
        for (index, asked) in operations.try_iter()?.enumerate() {
            cases.push(case(index, &asked?)?);
        }
        if cases.is_empty() {
            return Err(InvalidArgument::new_err(
                "operations: must be at least one, got none",
            ));
        }
        Ok(Select(cases))
    }
}

impl Operation for Select {
    fn attempt(&mut self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let count = self.0.len();
        let first = TURN.fetch_add(1, Ordering::Relaxed);
        let mut over = Vec::new();
        for step in 0..count {
            let index = first.wrapping_add(step) % count;
            match self.0[index].attempt(py) {
                Ok(Some(item)) => {
                    let done = (index, item).into_pyobject(py)?;
                    return Ok(Some(done.into_any().unbind()));
                }
                Ok(None) => {}
                Err(error)
                    if error.is_instance_of::<Closed>(py)
                        || error.is_instance_of::<Disconnected>(py) =>
                {
                    over.push((index, error));
                }
                Err(error) => return Err(error),
            }
        }
        if over.len() < count {
            return Ok(None);
        }
        over.sort_by_key(|(index, _)| *index);
        Err(over.swap_remove(0).1)
    }

    fn join(&mut self, waker: &dyn Fn() -> Waker) {
        for case in &mut self.0 {
            case.join(waker);
        }
    }

    fn leave(&mut self, py: Python<'_>) {
        for case in &mut self.0 {
            case.leave(py);
        }
    }

    fn timed_out(&self, _: Python<'_>, waited: Duration) -> PyErr {
        Timeout::new_err(format!(
            "select: none of {} operations could be done within {} s; nothing was sent or received",
            self.0.len(),
            waited.as_secs_f64()
        ))
    }

    fn told(&self, _: Python<'_>, error: PyErr) -> PyErr {
        error
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.iter().try_for_each(|case| case.visit(visit))
    }
}

impl Place for Held {
    type Store = super::Ring;

    fn line(&self) -> &super::Line<super::Ring> {
        &self.0.get().line
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
