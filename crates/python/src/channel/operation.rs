//! What somebody wants of a channel: one try of it, and what it says when it cannot be.
//!
//! Waiting, in a thread or a task, is the same for all of them: join the lines, try, sleep, try.

use super::waker::{Line, Waker, wake};
use crate::errors::{Closed, Disconnected, Timeout};
use moirai_core::channel::{Ended, Missed, Refused, Side, Store};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;
use std::time::Duration;
use std::vec::IntoIter;

/// What is wanted.
pub(super) enum Work {
    /// One message.
    Receive,
    /// One message, for `async for`: the end is no error.
    Next,
    /// What is there, so many at most.
    ReceiveMany(usize),
    /// That there is room, which nobody else may take.
    Room,
    /// Put this in.
    Send(Option<Py<PyAny>>),
    /// Put all of these in, in order.
    SendMany(Batch),
}

/// Messages on their way in.
pub(super) struct Batch {
    rest: IntoIter<Py<PyAny>>,
    refused: Option<Py<PyAny>>,
    total: usize,
}

impl Batch {
    pub(super) fn new(items: Vec<Py<PyAny>>) -> Self {
        Batch {
            total: items.len(),
            rest: items.into_iter(),
            refused: None,
        }
    }

    fn sent(&self) -> usize {
        self.total - self.rest.len() - usize::from(self.refused.is_some())
    }
}

impl Work {
    pub(super) fn side(&self) -> Side {
        match self {
            Work::Receive | Work::Next | Work::ReceiveMany(_) => Side::Receivers,
            Work::Room | Work::Send(_) | Work::SendMany(_) => Side::Senders,
        }
    }

    fn method(&self) -> &'static str {
        match self {
            Work::Receive | Work::Next => "receive",
            Work::ReceiveMany(_) => "receive_many",
            Work::Room => "wait_for_room",
            Work::Send(_) => "send",
            Work::SendMany(_) => "send_many",
        }
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self {
            Work::Send(Some(item)) => visit.call(item),
            Work::SendMany(batch) => {
                let rest = batch.rest.as_slice().iter();
                rest.chain(&batch.refused)
                    .try_for_each(|item| visit.call(item))
            }
            _ => Ok(()),
        }
    }

    /// Try without waiting. `Ok(None)`: not now.
    pub(super) fn attempt<S: Store<Py<PyAny>>>(
        &mut self,
        py: Python<'_>,
        line: &Line<S>,
    ) -> PyResult<Option<Py<PyAny>>> {
        match self {
            Work::Receive | Work::Next => match line.pop() {
                Ok((message, called)) => {
                    if called.is_some() {
                        wake(py, line, Side::Senders, called);
                    }
                    Ok(Some(message))
                }
                Err(Missed::Empty) => Ok(None),
                Err(Missed::Closed) => Err(self.ended(line)),
            },
            Work::ReceiveMany(most) => {
                let most = *most;
                match receive_many(py, line, most) {
                    Ok(found) => Ok(Some(PyList::new(py, found)?.into_any().unbind())),
                    Err(Missed::Empty) => Ok(None),
                    Err(Missed::Closed) => Err(self.ended(line)),
                }
            }
            Work::Room if line.ended(Side::Senders).is_some() => Err(self.ended(line)),
            Work::Room => {
                let room = line.store().count() < line.store().limit();
                Ok(room.then(|| py.None()))
            }
            Work::Send(slot) => {
                let Some(item) = slot.take() else {
                    return Ok(Some(py.None()));
                };
                match line.push(item) {
                    Ok(called) => {
                        if called.is_some() {
                            wake(py, line, Side::Receivers, called);
                        }
                        Ok(Some(py.None()))
                    }
                    Err(Refused::Full(item)) => {
                        *slot = Some(item);
                        Ok(None)
                    }
                    Err(Refused::Closed(item)) => {
                        *slot = Some(item);
                        Err(self.ended(line))
                    }
                }
            }
            Work::SendMany(batch) => loop {
                let Some(item) = batch.refused.take().or_else(|| batch.rest.next()) else {
                    return Ok(Some(batch.total.into_pyobject(py)?.into_any().unbind()));
                };
                match line.push(item) {
                    Ok(None) => {}
                    Ok(called) => wake(py, line, Side::Receivers, called),
                    Err(Refused::Full(item)) => {
                        batch.refused = Some(item);
                        return Ok(None);
                    }
                    Err(Refused::Closed(item)) => {
                        batch.refused = Some(item);
                        let error = self.ended(line);
                        return Err(self.told(py, error));
                    }
                }
            },
        }
    }

    /// An exception of `send_many` with how many were sent.
    pub(super) fn told(&self, py: Python<'_>, error: PyErr) -> PyErr {
        if let Work::SendMany(batch) = self {
            if let Err(other) = error.value(py).setattr("sent_count", batch.sent()) {
                other.write_unraisable(py, None);
            }
        }
        error
    }

    /// Why this can never be done.
    fn ended<S: Store<Py<PyAny>>>(&self, line: &Line<S>) -> PyErr {
        ended(line, self.side(), self.method())
    }

    /// Why this was not done in time, and what is left behind.
    pub(super) fn timed_out<S: Store<Py<PyAny>>>(
        &self,
        py: Python<'_>,
        line: &Line<S>,
        waited: Duration,
    ) -> PyErr {
        let census = line.census();
        let (method, seconds) = (self.method(), waited.as_secs_f64());
        let text = match self.side() {
            Side::Receivers => format!(
                "{method}: nothing came within {seconds} s, {} others wait; nothing was received",
                census.receivers_waiting
            ),
            Side::Senders => {
                let left = match self {
                    Work::SendMany(batch) => format!("{} of {} were", batch.sent(), batch.total),
                    _ => "nothing was".to_owned(),
                };
                format!(
                    "{method}: no room within {seconds} s: {} of at most {} messages are in the \
                     channel, {} others wait; {left} sent",
                    census.count, census.limit, census.senders_waiting
                )
            }
        };
        self.told(py, Timeout::new_err(text))
    }
}

/// Why a side of a channel that was found closed can do no more.
pub(super) fn ended<S: Store<Py<PyAny>>>(line: &Line<S>, side: Side, method: &str) -> PyErr {
    match (side, line.ended(side)) {
        (Side::Senders, Some(Ended::Side(Side::Receivers))) => {
            Disconnected::new_err(format!("{method}: every receiver is closed"))
        }
        (Side::Receivers, Some(Ended::Side(Side::Senders))) => Disconnected::new_err(format!(
            "{method}: every sender is closed, and what was sent has been received"
        )),
        (Side::Senders, Some(Ended::Side(_))) => {
            Closed::new_err(format!("{method}: every sender of this channel is closed"))
        }
        (Side::Receivers, Some(Ended::Side(_))) => Closed::new_err(format!(
            "{method}: every receiver of this channel is closed"
        )),
        (Side::Senders, _) => Closed::new_err(format!("{method}: this channel is closed")),
        (Side::Receivers, _) => Closed::new_err(format!(
            "{method}: this channel is closed, and what was sent has been received"
        )),
    }
}

/// What is there, `most` at most; at least one.
fn receive_many<S: Store<Py<PyAny>>>(
    py: Python<'_>,
    line: &Line<S>,
    most: usize,
) -> Result<Vec<Py<PyAny>>, Missed> {
    let mut found = Vec::new();
    while found.len() < most {
        match line.pop() {
            Ok((message, called)) => {
                found.push(message);
                if called.is_some() {
                    wake(py, line, Side::Senders, called);
                }
            }
            Err(missed) if found.is_empty() => return Err(missed),
            Err(_) => break,
        }
    }
    Ok(found)
}

/// Something that can be tried, and waited for.
pub(super) trait Operation {
    /// Try without waiting. `Ok(None)`: not now.
    fn attempt(&mut self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>>;
    /// Join the lines, or join again. Then try once more before sleeping.
    fn join(&mut self, waker: &dyn Fn() -> Waker);
    /// It was done by a try that followed a call, so the call was used.
    fn used(&mut self) {}
    /// Leave the lines; a call that was not used goes to the next in line.
    fn leave(&mut self, py: Python<'_>);
    /// Why it was not done in time.
    fn timed_out(&self, py: Python<'_>, waited: Duration) -> PyErr;
    /// An exception from outside, with what is left behind.
    fn told(&self, py: Python<'_>, error: PyErr) -> PyErr;
    /// Show the collector what is referred to.
    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError>;
}

/// A channel that is borrowed, or kept alive.
pub(super) trait Place {
    type Store: Store<Py<PyAny>>;
    fn line(&self) -> &Line<Self::Store>;
    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError>;
}

impl<S: Store<Py<PyAny>>> Place for &Line<S> {
    type Store = S;

    fn line(&self) -> &Line<S> {
        self
    }

    fn visit(&self, _: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        Ok(())
    }
}

/// Work at one channel.
pub(super) struct Single<P: Place> {
    place: P,
    work: Work,
    ticket: Option<u64>,
}

impl<P: Place> Single<P> {
    pub(super) fn new(place: P, work: Work) -> Self {
        Single {
            place,
            work,
            ticket: None,
        }
    }
}

impl<P: Place> Operation for Single<P> {
    fn attempt(&mut self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.work.attempt(py, self.place.line())
    }

    fn used(&mut self) {
        // Who only looked for room has left it there: the next in line is to try as well.
        if !matches!(self.work, Work::Room) {
            self.ticket = None;
        }
    }

    fn join(&mut self, waker: &dyn Fn() -> Waker) {
        let side = self.work.side();
        self.ticket = Some(self.place.line().join(side, self.ticket, waker()));
    }

    fn leave(&mut self, py: Python<'_>) {
        if let Some(ticket) = self.ticket.take() {
            let side = self.work.side();
            let next = self.place.line().leave(side, ticket);
            wake(py, self.place.line(), side, next);
        }
    }

    fn timed_out(&self, py: Python<'_>, waited: Duration) -> PyErr {
        self.work.timed_out(py, self.place.line(), waited)
    }

    fn told(&self, py: Python<'_>, error: PyErr) -> PyErr {
        self.work.told(py, error)
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.place.visit(visit)?;
        self.work.visit(visit)
    }
}
