//! The handle of a channel.
#![allow(unsafe_code)]

use crate::argument::bytes;
use crate::errors::{InvalidArgument, to_py};
use moirai_core::channel::shared::Channel;
use moirai_core::channel::shared::attachment::Role;
use moirai_core::channel::shared::blocks::UNIT_BYTES;
use moirai_core::channel::shared::segment;
use moirai_core::os::shared;
use pyo3::prelude::*;
use std::os::fd::AsRawFd;

/// A channel between processes, in shared memory.
#[pyclass(frozen, subclass, weakref, module = "moirai.channels")]
pub struct SharedChannel(Channel);

impl SharedChannel {
    pub(super) fn core(&self) -> &Channel {
        &self.0
    }
}

#[pymethods]
impl SharedChannel {
    /// Exactly one of: a capacity, to create; a name, to open; a descriptor, to take over.
    #[new]
    #[pyo3(signature = (*, name=None, capacity_bytes=None, fd=None))]
    fn new(
        py: Python<'_>,
        name: Option<&str>,
        capacity_bytes: Option<&Bound<'_, PyAny>>,
        fd: Option<i32>,
    ) -> PyResult<Self> {
        let capacity = capacity_bytes
            .map(|it| bytes("capacity_bytes", it))
            .transpose()?;
        let made = match (name, capacity, fd) {
            (name, Some(capacity), None) => py.detach(|| Channel::create(name, capacity)),
            (Some(name), None, None) => py.detach(|| Channel::open(name)),
            (None, None, Some(fd)) => {
                // SAFETY: the caller was given the descriptor, and gives it up here.
                let file = unsafe { shared::adopt(fd) }
                    .map_err(|error| InvalidArgument::new_err(format!("fd: {error}")))?;
                py.detach(|| Channel::adopt(file))
            }
            _ => {
                return Err(InvalidArgument::new_err(
                    "name: use SharedChannel.create() or SharedChannel.open()",
                ));
            }
        };
        made.map(SharedChannel).map_err(to_py)
    }

    /// Its name; None if it has none.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.0.attachment().segment().name()
    }

    /// What it was created with.
    #[getter]
    fn capacity_bytes(&self) -> usize {
        self.0.attachment().segment().header().capacity_bytes as usize
    }

    /// Longer messages lie in a block rather than in the ring.
    #[getter]
    fn inline_bytes(&self) -> usize {
        self.0.attachment().segment().header().inline_bytes as usize
    }

    /// Bytes of blocks that are out: being written, on their way, or viewed.
    #[getter]
    fn used_block_bytes(&self) -> usize {
        self.0.attachment().segment().blocks().used_count() * UNIT_BYTES
    }

    /// Senders that are open, in all processes.
    #[getter]
    fn sender_count(&self) -> usize {
        self.0.attachment().role_count(Role::Sender)
    }

    /// Receivers that are open, in all processes.
    #[getter]
    fn receiver_count(&self) -> usize {
        self.0.attachment().role_count(Role::Receiver)
    }

    /// Whether this handle was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Close what was opened with this handle, and leave the channel.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    /// Look at once whether the others are alive.
    fn _probe(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.attachment().probe()).map_err(to_py)
    }

    /// The descriptor of the segment, for giving it to another process.
    fn _fileno(&self) -> i32 {
        self.0.attachment().segment().file().as_raw_fd()
    }

    /// The descriptor that is readable when event loops are to look again.
    fn _doorbell(&self, py: Python<'_>) -> PyResult<i32> {
        py.detach(|| self.0.attachment().doorbell_fd())
            .map_err(to_py)
    }

    /// Silence the doorbell.
    fn _drain_doorbell(&self) {
        self.0.attachment().drain_doorbell();
    }

    /// Take the names of segments away whose owners all died; how many.
    #[staticmethod]
    fn reap(py: Python<'_>) -> usize {
        py.detach(segment::reap_names)
    }
}
