//! The sending end.
#![allow(unsafe_code)]

use super::array::{ReservedArray, Types};
use super::block::SharedBlock;
use super::bytes::{Exported, Source};
use super::handle::SharedChannel;
use super::reference;
use super::wait::{Patience, timed_out, until, wait};
use crate::argument::timeout;
use crate::errors::{InvalidArgument, to_py};
use crate::numpy::array::{self, Shape, too_large};
use crate::resource::DETACH_BYTES;
use moirai_core::channel::shared::attachment::Role;
use moirai_core::channel::shared::block::Block;
use moirai_core::channel::shared::endpoint::{Endpoint, Needed};
use moirai_core::channel::shared::message::{BYTES, LENT_ARRAY, LENT_OBJECT, OBJECT, PICKLE, Plan};
use moirai_core::channel::shared::reference::{Part, parcels};
use pyo3::prelude::*;
use std::sync::Arc;

const NO_ROOM: &str = "the channel had no room for the message";
const NOT_SENT: &str = "nothing was sent";

/// The sending end of a channel, open until it is closed.
#[pyclass(frozen, subclass, weakref, module = "moirai.channels")]
pub struct SharedSender {
    endpoint: Arc<Endpoint>,
    types: Types,
}

/// The total length of a message of such parts.
fn plan(lengths: &[usize]) -> PyResult<Plan> {
    Plan::new(lengths)
        .ok_or_else(|| InvalidArgument::new_err("message: is longer than anything can be"))
}

fn reserve_block(
    py: Python<'_>,
    endpoint: &Endpoint,
    length: usize,
    patience: &mut Patience,
) -> PyResult<Option<Block>> {
    let attempt = || endpoint.try_reserve(length).map_err(to_py);
    let needed = length.max(endpoint.inline_bytes() + 1);
    until(py, endpoint, needed, patience, attempt)
}

fn no_room(patience: &Patience) -> PyErr {
    timed_out(patience, NO_ROOM, NOT_SENT)
}

/// Send a block; if that fails it is given back. False if the time was not enough.
fn try_commit(
    py: Python<'_>,
    endpoint: &Endpoint,
    kind: u8,
    block: Block,
    length: usize,
    patience: &mut Patience,
) -> PyResult<bool> {
    let mut waiting = Some(block);
    let attempt = || {
        let Some(block) = waiting.take() else {
            return Ok(None);
        };
        waiting = endpoint.try_commit(kind, block, length).map_err(to_py)?;
        Ok(waiting.is_none().then_some(()))
    };
    Ok(until(py, endpoint, 0, patience, attempt)?.is_some())
}

/// As [`try_commit`]; Timeout if the time was not enough.
pub(super) fn commit(
    py: Python<'_>,
    endpoint: &Endpoint,
    kind: u8,
    block: Block,
    length: usize,
    patience: &mut Patience,
) -> PyResult<()> {
    try_commit(py, endpoint, kind, block, length, patience)?
        .then_some(())
        .ok_or_else(|| no_room(patience))
}

/// An exception that ends a call half way, with how many messages were sent.
fn told(py: Python<'_>, error: PyErr, sent_count: usize) -> PyErr {
    if let Err(other) = error.value(py).setattr("sent_count", sent_count) {
        other.write_unraisable(py, None);
    }
    error
}

impl SharedSender {
    /// Send bytes, in the ring or in a block; false if the time was not enough.
    #[inline]
    fn send_slice(
        &self,
        py: Python<'_>,
        kind: u8,
        bytes: &[u8],
        patience: &mut Patience,
    ) -> PyResult<bool> {
        if bytes.len() <= self.endpoint.inline_bytes() {
            let attempt = || {
                let sent = self.endpoint.try_send_bytes(kind, bytes).map_err(to_py)?;
                Ok(sent.then_some(()))
            };
            return Ok(until(py, &self.endpoint, bytes.len(), patience, attempt)?.is_some());
        }
        let Some(mut block) = reserve_block(py, &self.endpoint, bytes.len(), patience)? else {
            return Ok(false);
        };
        py.detach(|| block.write(0, bytes));
        try_commit(py, &self.endpoint, kind, block, bytes.len(), patience)
    }

    fn send_parts(
        &self,
        py: Python<'_>,
        kind: u8,
        parts: &[Part],
        give: bool,
        rest: &[u8],
        patience: &mut Patience,
    ) -> PyResult<()> {
        let attempt = || {
            let sent = self.endpoint.try_send_references(kind, parts, give, rest);
            Ok(sent.map_err(to_py)?.then_some(()))
        };
        if attempt()?.is_some() {
            return Ok(());
        }
        let needed = Needed {
            bytes: Endpoint::reference_bytes(parts.len(), rest.len()),
            parcels: &parcels(parts),
        };
        wait(py, &self.endpoint, needed, patience, attempt)?.ok_or_else(|| no_room(patience))
    }

    /// Send an object of which some buffers lie in shared memory; false, and nothing sent, if none
    /// does, or what else there is does not fit the ring.
    fn send_with_references(
        &self,
        py: Python<'_>,
        buffers: &[Bound<'_, PyAny>],
        bytes: &[Exported],
        lengths: &[usize],
        give: bool,
        patience: &mut Patience,
    ) -> PyResult<bool> {
        let mut lengths = lengths.to_vec();
        let mut parts = Vec::new();
        for (index, buffer) in buffers.iter().enumerate() {
            let shown = bytes[index + 1].bytes();
            let found = reference::part(buffer, shown.as_ptr(), shown.len(), index + 1)?;
            if let Some(part) = found {
                lengths[index + 1] = 0;
                parts.push(part);
            }
        }
        let plan = plan(&lengths)?;
        let needed = Endpoint::reference_bytes(parts.len(), plan.length());
        let is_too_much =
            parts.len() > Endpoint::MAX_REFERENCES || needed > self.endpoint.inline_bytes();
        if parts.is_empty() || is_too_much {
            return Ok(false);
        }
        let mut rest = vec![0; plan.length()];
        let table = plan.table();
        rest[..table.len()].copy_from_slice(&table);
        for (place, bytes) in plan.parts().iter().zip(bytes) {
            rest[place.clone()].copy_from_slice(&bytes.bytes()[..place.len()]);
        }
        self.send_parts(py, LENT_OBJECT, &parts, give, &rest, patience)?;
        Ok(true)
    }
}

#[pymethods]
impl SharedSender {
    #[new]
    fn new(py: Python<'_>, channel: &Bound<'_, SharedChannel>) -> PyResult<Self> {
        let channel = channel.get().core();
        py.detach(|| channel.endpoint(Role::Sender))
            .map(|endpoint| SharedSender {
                endpoint,
                types: Types::default(),
            })
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
        if self.send_slice(py, BYTES, source.bytes(), &mut patience)? {
            return Ok(());
        }
        Err(no_room(&patience))
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
        let messages = messages.try_iter()?;
        let mut count = 0;
        let send_all = || {
            for message in messages {
                let message = message?;
                let source = Source::new(&message)?;
                if !self.send_slice(py, BYTES, source.bytes(), &mut patience)? {
                    let left = format!("{count} messages were sent");
                    return Err(timed_out(&patience, NO_ROOM, &left));
                }
                count += 1;
            }
            Ok(())
        };
        let outcome = send_all();
        outcome
            .map(|()| count)
            .map_err(|error| told(py, error, count))
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
        if item_bytes == 0 || item_bytes > self.endpoint.inline_bytes() {
            return Err(InvalidArgument::new_err(format!(
                "array: its items must have from 1 to {} bytes, got {item_bytes}",
                self.endpoint.inline_bytes()
            )));
        }
        let records: Vec<&[u8]> = source.bytes().chunks_exact(item_bytes).collect();
        let mut count = 0;
        while count < records.len() {
            let attempt = || {
                let before = count;
                while count < records.len()
                    && self
                        .endpoint
                        .try_send_bytes(BYTES, records[count])
                        .map_err(to_py)?
                {
                    count += 1;
                }
                Ok((count > before).then_some(()))
            };
            let outcome = until(py, &self.endpoint, item_bytes, &mut patience, attempt);
            if outcome.map_err(|error| told(py, error, count))?.is_none() {
                let left = format!("{count} of {} records were sent", records.len());
                return Err(told(py, timed_out(&patience, NO_ROOM, &left), count));
            }
        }
        Ok(count)
    }

    /// Send an array by reference; false if it does not lie in shared memory.
    fn _send_array(
        &self,
        py: Python<'_>,
        array: &Bound<'_, PyAny>,
        give: bool,
        timeout_seconds: Option<f64>,
    ) -> PyResult<bool> {
        let mut patience = Patience::new("send", timeout("timeout_seconds", timeout_seconds)?);
        let Some((part, header)) = reference::array_part(&self.types, array)? else {
            return Ok(false);
        };
        if Endpoint::reference_bytes(1, header.len()) > self.endpoint.inline_bytes() {
            return Ok(false);
        }
        self.send_parts(py, LENT_ARRAY, &[part], give, &header, &mut patience)?;
        Ok(true)
    }

    /// Whether the bytes of an object lie in shared memory, and would be sent by reference.
    #[staticmethod]
    fn _lends(buffer: &Bound<'_, PyAny>) -> PyResult<bool> {
        let exported = Exported::new(buffer, false)?;
        let shown = exported.bytes();
        Ok(reference::part(buffer, shown.as_ptr(), shown.len(), 0)?.is_some())
    }

    /// Send a pickle and its out-of-band buffers; those in shared memory by reference, if allowed.
    #[pyo3(signature = (pickle, buffers, timeout_seconds, *, give=false, references=true))]
    fn _send_object(
        &self,
        py: Python<'_>,
        pickle: &Bound<'_, PyAny>,
        buffers: Vec<Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
        give: bool,
        references: bool,
    ) -> PyResult<()> {
        let mut patience = Patience::new("send", timeout("timeout_seconds", timeout_seconds)?);
        if buffers.is_empty() {
            let source = Source::new(pickle)?;
            if self.send_slice(py, PICKLE, source.bytes(), &mut patience)? {
                return Ok(());
            }
            return Err(no_room(&patience));
        }
        let mut parts = vec![Exported::new(pickle, false)?];
        for buffer in &buffers {
            parts.push(Exported::new(buffer, false)?);
        }
        let lengths: Vec<usize> = parts.iter().map(|part| part.bytes().len()).collect();
        if references
            && self.send_with_references(py, &buffers, &parts, &lengths, give, &mut patience)?
        {
            return Ok(());
        }
        let plan = plan(&lengths)?;
        let table = plan.table();
        let pieces = || {
            let starts = plan.parts().iter().map(|part| part.start);
            let parts = starts.zip(parts.iter().map(Exported::bytes));
            std::iter::once((0, table.as_slice())).chain(parts)
        };
        if plan.length() <= self.endpoint.inline_bytes() {
            let attempt = || {
                let sent = self
                    .endpoint
                    .try_send_pieces(OBJECT, plan.length(), pieces())
                    .map_err(to_py)?;
                Ok(sent.then_some(()))
            };
            return until(py, &self.endpoint, plan.length(), &mut patience, attempt)?
                .ok_or_else(|| no_room(&patience));
        }
        let mut block = reserve_block(py, &self.endpoint, plan.length(), &mut patience)?
            .ok_or_else(|| no_room(&patience))?;
        py.detach(|| {
            for (offset, bytes) in pieces() {
                block.write(offset, bytes);
            }
        });
        commit(
            py,
            &self.endpoint,
            OBJECT,
            block,
            plan.length(),
            &mut patience,
        )
    }

    /// Make an array in shared memory, to be filled in a `with` block and sent at its end.
    #[pyo3(signature = (shape, dtype=None, timeout_seconds=None))]
    fn reserve(
        &self,
        py: Python<'_>,
        shape: &Bound<'_, PyAny>,
        dtype: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<ReservedArray> {
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let mut patience = Patience::new("reserve", timeout);
        let items = array::items(py, dtype)?;
        let lengths = Shape::of(shape)?;
        let bytes = lengths
            .bytes(items.item_bytes)
            .ok_or_else(|| too_large(shape))?;
        let header = self.types.header(&items, &lengths)?;
        let plan = plan(&[header.len(), bytes])?;
        let mut block = reserve_block(py, &self.endpoint, plan.length(), &mut patience)?
            .ok_or_else(|| no_room(&patience))?;
        block.write(0, &plan.table());
        block.write(plan.parts()[0].start, &header);
        let part = plan.parts()[1].clone();
        let block = SharedBlock::new(block, self.endpoint.attachment(), part, plan.length());
        let (address, block) = (block.address(), Bound::new(py, block)?);
        let owner = block.clone().into_any();
        // SAFETY: the block has as many bytes there, at the start of a cache line; it is this
        // sender's until it is sent, and stays mapped as long as the owner lives.
        let array = unsafe { array::over(items, &lengths, None, address, owner) }?;
        Ok(ReservedArray {
            endpoint: Arc::clone(&self.endpoint),
            block: block.unbind(),
            array: array.unbind(),
            timeout,
        })
    }

    /// Ask for the doorbell to ring when there is room. Try once more afterwards.
    fn _arm(&self) -> PyResult<()> {
        self.endpoint.attachment().arm(Role::Sender).map_err(to_py)
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.endpoint.is_closed()
    }

    /// Close it. Receivers get what was sent; after the last sender's close they are told.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.endpoint.close());
    }
}

// A copy of up to this many bytes is made without leaving the interpreter.
const _: () = assert!(64 * 1024 <= DETACH_BYTES);
