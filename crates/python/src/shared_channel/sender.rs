//! The sending end.

use super::block::SharedBlock;
use super::bytes::{Exported, Source};
use super::handle::SharedChannel;
use super::wait::{Patience, timed_out, until};
use crate::argument::timeout;
use crate::errors::{InvalidArgument, to_py};
use crate::resource::DETACH_BYTES;
use moirai_core::channel::shared::attachment::Role;
use moirai_core::channel::shared::endpoint::{Block, Endpoint};
use moirai_core::channel::shared::message::{ARRAY, BYTES, OBJECT, Plan};
use pyo3::prelude::*;
use std::sync::Arc;

const NO_ROOM: &str = "the channel had no room for the message";
const NOT_SENT: &str = "nothing was sent";

/// The sending end of a channel, open until it is closed.
#[pyclass(frozen, subclass, weakref, module = "moirai.channels")]
pub struct SharedSender(Arc<Endpoint>);

/// The total length of a message of such parts.
fn plan(lengths: &[usize]) -> PyResult<Plan> {
    Plan::new(lengths)
        .ok_or_else(|| InvalidArgument::new_err("message: is longer than anything can be"))
}

impl SharedSender {
    fn reserve_block(
        &self,
        py: Python<'_>,
        length: usize,
        patience: &mut Patience,
    ) -> PyResult<Block> {
        let attempt = || self.0.try_reserve(length).map_err(to_py);
        until(
            py,
            &self.0,
            length.max(self.0.inline_bytes() + 1),
            patience,
            attempt,
        )?
        .ok_or_else(|| timed_out(patience, NO_ROOM, NOT_SENT))
    }

    /// Send a block; gives it back with the error if that fails.
    fn commit(
        &self,
        py: Python<'_>,
        kind: u8,
        block: Block,
        length: usize,
        patience: &mut Patience,
    ) -> Result<(), (Option<Block>, PyErr)> {
        let mut waiting = Some(block);
        let attempt = || match waiting.take() {
            Some(block) => {
                waiting = self.0.try_commit(kind, block, length).map_err(to_py)?;
                Ok(waiting.is_none().then_some(()))
            }
            None => Ok(None),
        };
        match until(py, &self.0, 32, patience, attempt) {
            Ok(Some(())) => Ok(()),
            Ok(None) => Err((waiting, timed_out(patience, NO_ROOM, NOT_SENT))),
            Err(error) => Err((waiting, error)),
        }
    }

    /// Send bytes, in the ring or in a block; false if the time was not enough.
    #[inline]
    fn send_slice(&self, py: Python<'_>, bytes: &[u8], patience: &mut Patience) -> PyResult<bool> {
        if bytes.len() <= self.0.inline_bytes() {
            let attempt = || {
                let sent = self.0.try_send_bytes(BYTES, bytes).map_err(to_py)?;
                Ok(sent.then_some(()))
            };
            return Ok(until(py, &self.0, bytes.len(), patience, attempt)?.is_some());
        }
        let mut block = self.reserve_block(py, bytes.len(), patience)?;
        py.detach(|| block.write(0, bytes));
        self.commit(py, BYTES, block, bytes.len(), patience)
            .map_err(|(_, error)| error)?;
        Ok(true)
    }
}

#[pymethods]
impl SharedSender {
    #[new]
    fn new(py: Python<'_>, channel: &Bound<'_, SharedChannel>) -> PyResult<Self> {
        let channel = channel.get().core();
        py.detach(|| channel.endpoint(Role::Sender))
            .map(SharedSender)
            .map_err(to_py)
    }

    /// Send the bytes of an object.
    #[pyo3(signature = (data, timeout_seconds=None))]
    fn send_bytes(
        &self,
        py: Python<'_>,
        data: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<()> {
        let mut patience =
            Patience::new("send_bytes", timeout("timeout_seconds", timeout_seconds)?);
        let source = Source::new(data)?;
        if self.send_slice(py, source.bytes(), &mut patience)? {
            return Ok(());
        }
        Err(timed_out(&patience, NO_ROOM, NOT_SENT))
    }

    /// Send the bytes of each object; how many.
    #[pyo3(signature = (messages, timeout_seconds=None))]
    fn send_many(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<usize> {
        let mut patience = Patience::new("send_many", timeout("timeout_seconds", timeout_seconds)?);
        let mut count = 0;
        for message in messages.try_iter()? {
            let message = message?;
            let source = Source::new(&message)?;
            if !self.send_slice(py, source.bytes(), &mut patience)? {
                let left = format!("{count} messages were sent");
                return Err(timed_out(&patience, NO_ROOM, &left));
            }
            count += 1;
        }
        Ok(count)
    }

    /// Send each item of a contiguous buffer as a message of `item_bytes`; how many.
    fn _send_records(
        &self,
        py: Python<'_>,
        data: &Bound<'_, PyAny>,
        item_bytes: usize,
        timeout_seconds: Option<f64>,
    ) -> PyResult<usize> {
        let mut patience =
            Patience::new("send_batch", timeout("timeout_seconds", timeout_seconds)?);
        let source = Exported::new(data, false)?;
        if item_bytes == 0 || item_bytes > self.0.inline_bytes() {
            return Err(InvalidArgument::new_err(format!(
                "array: its items must have from 1 to {} bytes, got {item_bytes}",
                self.0.inline_bytes()
            )));
        }
        let records: Vec<&[u8]> = source.bytes().chunks_exact(item_bytes).collect();
        let mut count = 0;
        while count < records.len() {
            let attempt = || {
                let before = count;
                while count < records.len()
                    && self
                        .0
                        .try_send_bytes(BYTES, records[count])
                        .map_err(to_py)?
                {
                    count += 1;
                }
                Ok((count > before).then_some(()))
            };
            if until(py, &self.0, item_bytes, &mut patience, attempt)?.is_none() {
                let left = format!("{count} of {} records were sent", records.len());
                return Err(timed_out(&patience, NO_ROOM, &left));
            }
        }
        Ok(count)
    }

    /// Send a pickle and the buffers that it left out of band.
    fn _send_object(
        &self,
        py: Python<'_>,
        pickle: &Bound<'_, PyAny>,
        buffers: Vec<Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<()> {
        let mut patience = Patience::new("send", timeout("timeout_seconds", timeout_seconds)?);
        let mut parts = vec![Exported::new(pickle, false)?];
        for buffer in &buffers {
            parts.push(Exported::new(buffer, false)?);
        }
        let lengths: Vec<usize> = parts.iter().map(|part| part.bytes().len()).collect();
        let plan = plan(&lengths)?;
        let table = plan.table();
        let pieces = || {
            let starts = plan.parts().iter().map(|part| part.start);
            let parts = starts.zip(parts.iter().map(Exported::bytes));
            std::iter::once((0, table.as_slice())).chain(parts)
        };
        if plan.length() <= self.0.inline_bytes() {
            let attempt = || {
                let sent = self
                    .0
                    .try_send_pieces(OBJECT, plan.length(), pieces())
                    .map_err(to_py)?;
                Ok(sent.then_some(()))
            };
            return until(py, &self.0, plan.length(), &mut patience, attempt)?
                .ok_or_else(|| timed_out(&patience, NO_ROOM, NOT_SENT));
        }
        let mut block = self.reserve_block(py, plan.length(), &mut patience)?;
        py.detach(|| {
            for (offset, bytes) in pieces() {
                block.write(offset, bytes);
            }
        });
        self.commit(py, OBJECT, block, plan.length(), &mut patience)
            .map_err(|(_, error)| error)
    }

    /// A block for an array of `item_bytes` in all, with its header written; the view is the items.
    fn _reserve(
        &self,
        py: Python<'_>,
        header: &[u8],
        item_bytes: usize,
        timeout_seconds: Option<f64>,
    ) -> PyResult<SharedBlock> {
        let mut patience = Patience::new("reserve", timeout("timeout_seconds", timeout_seconds)?);
        let plan = plan(&[header.len(), item_bytes])?;
        let mut block = self.reserve_block(py, plan.length(), &mut patience)?;
        block.write(0, &plan.table());
        block.write(plan.parts()[0].start, header);
        let items = plan.parts()[1].clone();
        Ok(SharedBlock::new(
            block,
            self.0.attachment(),
            items,
            plan.length(),
        ))
    }

    /// Send what `_reserve` gave.
    fn _commit(
        &self,
        py: Python<'_>,
        slot: &Bound<'_, SharedBlock>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<()> {
        let mut patience = Patience::new("reserve", timeout("timeout_seconds", timeout_seconds)?);
        let (block, length) = slot.get().take()?;
        self.commit(py, ARRAY, block, length, &mut patience)
            .map_err(|(block, error)| {
                if let Some(block) = block {
                    slot.get().restore(block);
                }
                error
            })
    }

    /// Ask for the doorbell to ring when there is room. Try once more afterwards.
    fn _arm(&self) -> PyResult<()> {
        self.0.attachment().arm(Role::Sender).map_err(to_py)
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Close it. Receivers get what was sent; after the last sender's close they are told.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

// A copy of up to this many bytes is made without leaving the interpreter.
const _: () = assert!(64 * 1024 <= DETACH_BYTES);
