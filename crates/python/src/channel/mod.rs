//! `Channel` and its handles: the core's channel with Python objects as messages.
//!
//! Messages are moved only by threads that are attached to the interpreter, and no try of an
//! operation lets go of it half way. So a collector, which traverses while no other attached thread
//! runs, never meets a message half moved.

#![allow(unsafe_code)] // to visit messages in place, and for a slot that PyO3 does not know

pub(crate) mod awaitable;
pub(crate) mod ends;
pub(crate) mod fast;
mod operation;
pub(crate) mod queue;
mod select;
mod wait;
pub(crate) mod waker;

use crate::argument::{count, timeout};
use awaitable::Pending;
pub(crate) use ends::{Receiver, Sender};
use moirai_core::channel::{Missed, Refused, Side, Store};
use operation::{Batch, Single, Work, ended};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};
use select::Select;
use std::sync::Arc;
use wait::block;
use waker::{Line, wake, wake_all};

type Ring = moirai_core::channel::Ring<Py<PyAny>>;

/// Messages from any thread or task to any other.
#[pyclass(frozen, subclass, weakref, generic, module = "moirai.channels")]
pub struct Channel {
    /// Nothing but this object refers to it for longer than a fork takes.
    line: Arc<Line<Ring>>,
}

/// A channel that is kept alive.
struct Held(Py<Channel>);

impl Held {
    fn of(channel: &Bound<'_, Channel>) -> Self {
        Held(channel.clone().unbind())
    }
}

/// Messages to be sent together.
fn items_of(items: &Bound<'_, PyAny>) -> PyResult<Batch> {
    let found: Vec<Py<PyAny>> = if let Ok(list) = items.cast::<PyList>() {
        list.iter().map(Bound::unbind).collect()
    } else if let Ok(tuple) = items.cast::<PyTuple>() {
        tuple.iter().map(Bound::unbind).collect()
    } else {
        let each = items.try_iter()?.map(|item| item.map(Bound::unbind));
        each.collect::<PyResult<_>>()?
    };
    Ok(Batch::new(found))
}

/// How many messages to take together.
fn most(max_count: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
    max_count.map_or(Ok(usize::MAX), |it| count("max_count", it, 1..=1 << 62))
}

impl Channel {
    #[inline(always)]
    fn send(&self, py: Python<'_>, item: Py<PyAny>, seconds: Option<f64>) -> PyResult<()> {
        if seconds.is_some() {
            timeout("timeout_seconds", seconds)?;
        }
        let item = match self.line.push(item) {
            Ok(None) => return Ok(()),
            Ok(called) => {
                wake(py, &self.line, Side::Receivers, called);
                return Ok(());
            }
            Err(Refused::Full(item) | Refused::Closed(item)) => item,
        };
        self.do_blocking(py, Work::Send(Some(item)), seconds)
            .map(drop)
    }

    #[inline]
    fn try_send(&self, py: Python<'_>, item: Py<PyAny>) -> PyResult<bool> {
        match self.line.push(item) {
            Ok(None) => Ok(true),
            Ok(called) => {
                wake(py, &self.line, Side::Receivers, called);
                Ok(true)
            }
            Err(Refused::Full(_)) => Ok(false),
            Err(Refused::Closed(_)) => Err(ended(&self.line, Side::Senders, "try_send")),
        }
    }

    #[inline(always)]
    fn receive(&self, py: Python<'_>, seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        if seconds.is_some() {
            timeout("timeout_seconds", seconds)?;
        }
        if let Ok((message, called)) = self.line.pop() {
            if called.is_some() {
                wake(py, &self.line, Side::Senders, called);
            }
            return Ok(message);
        }
        self.do_blocking(py, Work::Receive, seconds)
    }

    #[inline]
    fn try_receive(&self, py: Python<'_>, default: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        match self.line.pop() {
            Ok((message, called)) => {
                if called.is_some() {
                    wake(py, &self.line, Side::Senders, called);
                }
                Ok(message)
            }
            Err(Missed::Empty) => Ok(default.unwrap_or_else(|| py.None())),
            Err(Missed::Closed) => Err(ended(&self.line, Side::Receivers, "try_receive")),
        }
    }

    /// The next message; `None` at the end.
    fn next(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        match self.receive(py, None) {
            Ok(message) => Ok(Some(message)),
            Err(error)
                if error.is_instance_of::<crate::errors::Closed>(py)
                    || error.is_instance_of::<crate::errors::Disconnected>(py) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    #[cold]
    fn do_blocking(&self, py: Python<'_>, work: Work, seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        let limit = timeout("timeout_seconds", seconds)?;
        block(py, &mut Single::new(&*self.line, work), limit)
    }
}

#[pymethods]
impl Channel {
    #[new]
    fn new(capacity: &Bound<'_, PyAny>) -> PyResult<Self> {
        let capacity = count("capacity", capacity, 1..=Ring::MAX_CAPACITY)?;
        Ok(Channel {
            line: Line::shared(Ring::new(capacity)),
        })
    }

    /// Put a message in, waiting while the channel is full.
    #[pyo3(name = "send", signature = (item, timeout_seconds=None))]
    fn py_send(
        &self,
        py: Python<'_>,
        item: Py<PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<()> {
        self.send(py, item, timeout_seconds)
    }

    /// Put a message in if there is room; whether it was.
    #[pyo3(name = "try_send")]
    fn py_try_send(&self, py: Python<'_>, item: Py<PyAny>) -> PyResult<bool> {
        self.try_send(py, item)
    }

    /// Put messages in, in order, waiting until all are; returns how many.
    #[pyo3(signature = (items, timeout_seconds=None))]
    fn send_many(
        &self,
        py: Python<'_>,
        items: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        self.do_blocking(py, Work::SendMany(items_of(items)?), timeout_seconds)
    }

    /// Take the oldest message, waiting while there is none.
    #[pyo3(name = "receive", signature = (timeout_seconds=None))]
    fn py_receive(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        self.receive(py, timeout_seconds)
    }

    /// Take the oldest message if there is one, else return `default`.
    #[pyo3(name = "try_receive", signature = (default=None))]
    fn py_try_receive(&self, py: Python<'_>, default: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        self.try_receive(py, default)
    }

    /// Take what is there, at least one, waiting while there is none.
    #[pyo3(signature = (max_count=None, timeout_seconds=None))]
    fn receive_many(
        &self,
        py: Python<'_>,
        max_count: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        self.do_blocking(py, Work::ReceiveMany(most(max_count)?), timeout_seconds)
    }

    /// As `send`, but wait without blocking the event loop.
    #[pyo3(signature = (item, timeout_seconds=None))]
    fn send_async(
        slf: &Bound<'_, Self>,
        item: Py<PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let operation = Single::new(Held::of(slf), Work::Send(Some(item)));
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// As `send_many`, but wait without blocking the event loop.
    #[pyo3(signature = (items, timeout_seconds=None))]
    fn send_many_async(
        slf: &Bound<'_, Self>,
        items: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let operation = Single::new(Held::of(slf), Work::SendMany(items_of(items)?));
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// As `receive`, but wait without blocking the event loop.
    #[pyo3(signature = (timeout_seconds=None))]
    fn receive_async(slf: &Bound<'_, Self>, timeout_seconds: Option<f64>) -> PyResult<Pending> {
        let operation = Single::new(Held::of(slf), Work::Receive);
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// As `receive_many`, but wait without blocking the event loop.
    #[pyo3(signature = (max_count=None, timeout_seconds=None))]
    fn receive_many_async(
        slf: &Bound<'_, Self>,
        max_count: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let operation = Single::new(Held::of(slf), Work::ReceiveMany(most(max_count)?));
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// A handle that sends; when the last of them is closed, the senders' side ends.
    fn sender(slf: &Bound<'_, Self>) -> PyResult<Sender> {
        Sender::new(slf)
    }

    /// A handle that receives; when the last of them is closed, the receivers' side ends.
    fn receiver(slf: &Bound<'_, Self>) -> PyResult<Receiver> {
        Receiver::new(slf)
    }

    /// Take no message any more; what is in it can be received.
    fn close(&self, py: Python<'_>) {
        wake_all(py, self.line.close());
    }

    /// Whether it takes no message any more, for whatever reason.
    #[getter]
    fn closed(&self) -> bool {
        self.line.ended(Side::Senders).is_some()
    }

    /// Messages it holds before a sender waits.
    #[getter]
    fn capacity(&self) -> usize {
        self.line.store().limit()
    }

    fn __len__(&self) -> usize {
        self.line.store().count()
    }

    /// An empty channel is a channel.
    fn __bool__(&self) -> bool {
        true
    }

    /// What went through so far, and who waits now.
    fn statistics(&self) -> ChannelStatistics {
        let census = self.line.census();
        ChannelStatistics {
            capacity: census.limit,
            current_count: census.count,
            total_received: self.line.store().total_popped(),
            total_sent: self.line.store().total_pushed(),
            current_senders: census.senders,
            current_receivers: census.receivers,
            senders_waiting: census.senders_waiting,
            receivers_waiting: census.receivers_waiting,
        }
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.next(py)
    }

    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__(slf: &Bound<'_, Self>) -> Pending {
        Pending::new(Single::new(Held::of(slf), Work::Next), None, true)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let this = slf.get();
        Ok(format!(
            "{}({} of {} messages{})",
            slf.get_type().name()?,
            this.__len__(),
            this.capacity(),
            if this.closed() { ", closed" } else { "" }
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // SAFETY: a collector runs while no other thread is attached and running, and every push
        // and pop is done by an attached thread without calling into Python.
        unsafe { self.line.store().visit(|message| visit.call(message)) }
    }

    fn __clear__(&self) {
        while self.line.pop().is_ok() {}
    }
}

/// What went through a channel, and who waits.
#[pyclass(frozen, eq, get_all, module = "moirai.channels")]
#[derive(Clone, PartialEq)]
pub struct ChannelStatistics {
    /// Messages it holds before a sender waits.
    capacity: usize,
    /// Messages in it.
    current_count: usize,
    /// Messages put in since it was made.
    total_sent: usize,
    /// Messages taken out since it was made.
    total_received: usize,
    /// Open handles that send.
    current_senders: usize,
    /// Open handles that receive.
    current_receivers: usize,
    /// Threads and tasks that wait for room.
    senders_waiting: usize,
    /// Threads and tasks that wait for a message.
    receivers_waiting: usize,
}

#[pymethods]
impl ChannelStatistics {
    fn __repr__(&self) -> String {
        format!(
            "ChannelStatistics(capacity={}, current_count={}, total_sent={}, total_received={}, \
             current_senders={}, current_receivers={}, senders_waiting={}, receivers_waiting={})",
            self.capacity,
            self.current_count,
            self.total_sent,
            self.total_received,
            self.current_senders,
            self.current_receivers,
            self.senders_waiting,
            self.receivers_waiting
        )
    }
}

/// (index, item) of the first operation that can be done.
#[pyfunction]
#[pyo3(signature = (operations, timeout_seconds=None))]
pub fn select_channels(
    py: Python<'_>,
    operations: &Bound<'_, PyAny>,
    timeout_seconds: Option<f64>,
) -> PyResult<Py<PyAny>> {
    let limit = timeout("timeout_seconds", timeout_seconds)?;
    block(py, &mut Select::new(operations)?, limit)
}

/// As `select_channels`, but wait without blocking the event loop.
#[pyfunction]
#[pyo3(signature = (operations, timeout_seconds=None))]
pub fn select_channels_async(
    operations: &Bound<'_, PyAny>,
    timeout_seconds: Option<f64>,
) -> PyResult<Pending> {
    let limit = timeout("timeout_seconds", timeout_seconds)?;
    Ok(Pending::any(Select::new(operations)?, limit))
}
