//! Handles of one side of a channel, counted.

use super::awaitable::Pending;
use super::operation::{Single, Work};
use super::waker::wake_all;
use super::{Channel, Held, items_of, most};
use crate::argument::timeout;
use crate::errors::Closed;
use moirai_core::channel::Side;
use moirai_core::sync::{AtomicBool, Ordering};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// One handle: closed once, by whoever is first.
struct Handle {
    channel: Py<Channel>,
    side: Side,
    /// `AcqRel`: only the one who closes it counts it out.
    closed: AtomicBool,
}

impl Handle {
    fn new(channel: &Bound<'_, Channel>, side: Side, what: &str) -> PyResult<Self> {
        if !channel.get().line.open_handle(side) {
            let every = match side {
                Side::Senders => "sender",
                Side::Receivers => "receiver",
            };
            return Err(Closed::new_err(format!(
                "{what}: this channel is closed, or every {every} of it is"
            )));
        }
        Ok(Handle {
            channel: channel.clone().unbind(),
            side,
            closed: AtomicBool::new(false),
        })
    }

    #[inline]
    fn open(&self, method: &str) -> PyResult<&Channel> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Closed::new_err(format!("{method}: this handle is closed")));
        }
        Ok(self.channel.get())
    }

    #[inline]
    fn if_open(&self) -> Option<&Channel> {
        (!self.closed.load(Ordering::Acquire)).then(|| self.channel.get())
    }

    fn held(&self, py: Python<'_>, method: &str) -> PyResult<Held> {
        self.open(method)?;
        Ok(Held(self.channel.clone_ref(py)))
    }

    fn close(&self, py: Python<'_>) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let (woken, lost) = self.channel.get().line.close_handle(self.side);
        wake_all(py, woken);
        drop(lost);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::Acquire) {
            Python::try_attach(|py| self.close(py));
        }
    }
}

/// A handle that sends.
#[pyclass(frozen, weakref, generic, module = "moirai.channels")]
pub struct Sender(Handle);

/// A handle that receives.
#[pyclass(frozen, subclass, weakref, generic, module = "moirai.channels")]
pub struct Receiver(Handle);

impl Sender {
    #[inline]
    pub(super) fn if_open(&self) -> Option<&Channel> {
        self.0.if_open()
    }

    pub(super) fn new(channel: &Bound<'_, Channel>) -> PyResult<Self> {
        Ok(Sender(Handle::new(channel, Side::Senders, "sender")?))
    }

    pub(super) fn open(&self, method: &str) -> PyResult<Held> {
        Python::attach(|py| self.0.held(py, method))
    }
}

impl Receiver {
    #[inline]
    pub(super) fn if_open(&self) -> Option<&Channel> {
        self.0.if_open()
    }

    pub(super) fn new(channel: &Bound<'_, Channel>) -> PyResult<Self> {
        Ok(Receiver(Handle::new(channel, Side::Receivers, "receiver")?))
    }

    pub(super) fn open(&self, method: &str) -> PyResult<Held> {
        Python::attach(|py| self.0.held(py, method))
    }
}

#[pymethods]
impl Sender {
    #[new]
    fn py_new(channel: &Bound<'_, Channel>) -> PyResult<Self> {
        Self::new(channel)
    }

    /// Wait until there is room for a message, which stays if nobody else sends.
    #[pyo3(signature = (timeout_seconds=None))]
    fn wait_for_room(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<()> {
        let channel = self.0.open("wait_for_room")?;
        channel
            .do_blocking(py, Work::Room, timeout_seconds)
            .map(drop)
    }

    /// Put a message in, waiting while the channel is full.
    #[pyo3(signature = (item, timeout_seconds=None))]
    fn send(&self, py: Python<'_>, item: Py<PyAny>, timeout_seconds: Option<f64>) -> PyResult<()> {
        self.0.open("send")?.send(py, item, timeout_seconds)
    }

    /// Put a message in if there is room; whether it was.
    fn try_send(&self, py: Python<'_>, item: Py<PyAny>) -> PyResult<bool> {
        self.0.open("try_send")?.try_send(py, item)
    }

    /// Put messages in, in order, waiting until all are; returns how many.
    #[pyo3(signature = (items, timeout_seconds=None))]
    fn send_many(
        &self,
        py: Python<'_>,
        items: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        let work = Work::SendMany(items_of(items)?);
        let channel = self.0.open("send_many")?;
        channel.do_blocking(py, work, timeout_seconds)
    }

    /// As `send`, but wait without blocking the event loop.
    #[pyo3(signature = (item, timeout_seconds=None))]
    fn send_async(
        &self,
        py: Python<'_>,
        item: Py<PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let operation = Single::new(self.0.held(py, "send")?, Work::Send(Some(item)));
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// As `send_many`, but wait without blocking the event loop.
    #[pyo3(signature = (items, timeout_seconds=None))]
    fn send_many_async(
        &self,
        py: Python<'_>,
        items: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let work = Work::SendMany(items_of(items)?);
        let operation = Single::new(self.0.held(py, "send_many")?, work);
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// Count this handle out; the last one ends the senders' side.
    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }

    /// Whether this handle was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.get().0.open("__enter__")?;
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.0.close(py);
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0.channel)
    }
}

#[pymethods]
impl Receiver {
    #[new]
    fn py_new(channel: &Bound<'_, Channel>) -> PyResult<Self> {
        Self::new(channel)
    }

    /// Take the oldest message, waiting while there is none.
    #[pyo3(signature = (timeout_seconds=None))]
    fn receive(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        self.0.open("receive")?.receive(py, timeout_seconds)
    }

    /// Take the oldest message if there is one, else return `default`.
    #[pyo3(signature = (default=None))]
    fn try_receive(&self, py: Python<'_>, default: Option<Py<PyAny>>) -> PyResult<Py<PyAny>> {
        self.0.open("try_receive")?.try_receive(py, default)
    }

    /// Take what is there, at least one, waiting while there is none.
    #[pyo3(signature = (max_count=None, timeout_seconds=None))]
    fn receive_many(
        &self,
        py: Python<'_>,
        max_count: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        let channel = self.0.open("receive_many")?;
        let work = Work::ReceiveMany(most(max_count)?);
        channel.do_blocking(py, work, timeout_seconds)
    }

    /// As `receive`, but wait without blocking the event loop.
    #[pyo3(signature = (timeout_seconds=None))]
    fn receive_async(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Pending> {
        let operation = Single::new(self.0.held(py, "receive")?, Work::Receive);
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// As `receive_many`, but wait without blocking the event loop.
    #[pyo3(signature = (max_count=None, timeout_seconds=None))]
    fn receive_many_async(
        &self,
        py: Python<'_>,
        max_count: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Pending> {
        let work = Work::ReceiveMany(most(max_count)?);
        let operation = Single::new(self.0.held(py, "receive_many")?, work);
        let limit = timeout("timeout_seconds", timeout_seconds)?;
        Ok(Pending::new(operation, limit, false))
    }

    /// Count this handle out; the last one ends the receivers' side.
    fn close(&self, py: Python<'_>) {
        self.0.close(py);
    }

    /// Whether this handle was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.get().0.open("__enter__")?;
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.0.close(py);
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        match self.0.open("receive") {
            Ok(channel) => channel.next(py),
            Err(_) => Ok(None),
        }
    }

    fn __aiter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __anext__(&self, py: Python<'_>) -> PyResult<Pending> {
        let held = Held(self.0.channel.clone_ref(py));
        self.0.open("receive")?;
        Ok(Pending::new(Single::new(held, Work::Next), None, true))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0.channel)
    }
}
