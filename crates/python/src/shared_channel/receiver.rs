//! The receiving end.
#![allow(unsafe_code)]

use super::array::{ReceivedView, Types};
use super::block::SharedBlock;
use super::bytes::{Exported, new_bytearray, new_bytes};
use super::handle::SharedChannel;
use super::lent::LentBlock;
use super::reference;
use super::wait::{Patience, timed_out, until};
use crate::argument::{count, timeout};
use crate::errors::{Corrupted, InvalidArgument, to_py};
use moirai_core::channel::shared::attachment::Role;
use moirai_core::channel::shared::endpoint::{Endpoint, Offer};
use moirai_core::channel::shared::message::{
    ARRAY, BYTES, LENT_ARRAY, LENT_OBJECT, OBJECT, PICKLE, Plan,
};
use moirai_core::channel::shared::reference::Received;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyList, PyMemoryView};
use std::ptr::NonNull;
use std::sync::Arc;

const NONE_CAME: &str = "no message came";
const NOT_RECEIVED: &str = "nothing was received";

/// The receiving end of a channel, open until it is closed.
#[pyclass(frozen, subclass, weakref, module = "moirai.channels")]
pub struct SharedReceiver {
    endpoint: Arc<Endpoint>,
    types: Types,
}

/// A message as Python gets it: what it is, the object or what has its bytes, where its parts lie.
type Parts<'py> = (u8, Bound<'py, PyAny>, Vec<(usize, usize)>);

fn not_bytes(offer: Offer, method: &str) -> PyErr {
    let kind = if offer.kind == ARRAY || offer.kind == LENT_ARRAY {
        "an array"
    } else {
        "an object"
    };
    InvalidArgument::new_err(format!(
        "{method}: the next message must be bytes, got {kind}, which stays in the channel; use \
         receive()"
    ))
}

impl SharedReceiver {
    #[inline]
    fn take_bytes<'py>(
        &self,
        py: Python<'py>,
        method: &str,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        loop {
            let Some(offer) = self.endpoint.peek().map_err(to_py)? else {
                return Ok(None);
            };
            if offer.kind != BYTES {
                return Err(not_bytes(offer, method));
            }
            if let Some(found) = self.take_plain(py, offer)? {
                return Ok(Some(found));
            }
        }
    }

    /// Take a message as it is; `None` if another was quicker.
    #[inline]
    fn take_plain<'py>(
        &self,
        py: Python<'py>,
        offer: Offer,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        if offer.is_block {
            return self.take_block_bytes(py, offer);
        }
        new_bytes(py, offer.length, |place| {
            self.endpoint.accept_into(offer, place).map_err(to_py)
        })
    }

    fn take_block_bytes<'py>(
        &self,
        py: Python<'py>,
        offer: Offer,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        if offer.length > self.endpoint.max_bytes() {
            // Found to be false, and said so, before so much is allocated.
            return self
                .endpoint
                .accept_block(offer)
                .map(|_| None)
                .map_err(to_py);
        }
        new_bytes(py, offer.length, |place| {
            py.detach(|| {
                let block = self.endpoint.accept_block(offer)?;
                let taken = block.filter(|block| block.length() == place.len());
                if let Some(block) = &taken {
                    block.read(0, place);
                }
                Ok(taken.is_some())
            })
            .map_err(to_py)
        })
    }

    /// Take the next message: the object that has its bytes, where they are, and its parts. A block
    /// stays borrowed; what lies in the ring is copied out of it.
    fn take_parts<'py>(&self, py: Python<'py>, offer: Offer) -> PyResult<Option<Taken<'py>>> {
        if offer.is_block {
            let Some(block) = self.endpoint.accept_block(offer).map_err(to_py)? else {
                return Ok(None);
            };
            let length = block.length();
            let parts = parts_of(offer.kind, length, |offset, place| {
                block.read(offset, place)
            })?;
            let whole = SharedBlock::new(block, self.endpoint.attachment(), 0..length, length);
            let (address, owner) = (whole.address(), Bound::new(py, whole)?.into_any());
            return Ok(Some(Taken {
                owner,
                address,
                parts,
            }));
        }
        let copy = new_bytearray(py, offer.length, |place| {
            self.endpoint.accept_into(offer, place).map_err(to_py)
        })?;
        let Some(copy) = copy else { return Ok(None) };
        // A view, so that the bytes stay where they are.
        let owner = PyMemoryView::from(copy.as_any())?.into_any();
        let exported = Exported::new(&owner, false)?;
        let parts = parts_of(offer.kind, offer.length, |offset, place| {
            place.copy_from_slice(&exported.bytes()[offset..offset + place.len()]);
        })?;
        let address = NonNull::from(exported.bytes()).cast();
        Ok(Some(Taken {
            owner,
            address,
            parts,
        }))
    }

    fn array<'py>(&self, py: Python<'py>, taken: Taken<'py>) -> PyResult<Bound<'py, PyAny>> {
        let Taken {
            owner,
            address,
            parts,
        } = taken;
        let [(start, end), (first, last)] = parts[..] else {
            return Err(Corrupted::new_err(format!(
                "segment: an array must have 2 parts, found {}",
                parts.len()
            )));
        };
        let mut header = vec![0; end - start];
        // SAFETY: parts lie in the message, as was found when they were read.
        let from = unsafe { address.add(start) };
        // SAFETY: as above.
        unsafe { from.as_ptr().copy_to(header.as_mut_ptr(), header.len()) };
        // SAFETY: as above.
        let items = unsafe { address.add(first) };
        let _ = py;
        // SAFETY: the owner keeps the bytes, and this receiver alone has the message.
        unsafe { self.types.array(&header, items, last - first, owner) }
    }

    /// Take a message whose bytes lie in shared memory of their own; `None` to look again.
    fn take_lent<'py>(
        &self,
        py: Python<'py>,
        offer: Offer,
        writable: bool,
    ) -> PyResult<Option<Parts<'py>>> {
        let accept = || self.endpoint.accept_references(offer).map(Sendable);
        let accepted = if self.endpoint.is_acquainted(offer) {
            accept()
        } else {
            py.detach(|| self.endpoint.acquaint(offer).and_then(|()| accept()))
        };
        let Some((received, rest)) = accepted.map_err(to_py)?.0 else {
            return Ok(None);
        };
        if offer.kind == LENT_ARRAY {
            let mut received = received.into_iter();
            let (Some(first), None) = (received.next(), received.next()) else {
                return Err(Corrupted::new_err("segment: an array must be one block"));
            };
            let array = reference::received_array(py, &self.types, first, &rest, writable)?;
            return Ok(Some((ARRAY, array, Vec::new())));
        }
        let parts = parts_of(offer.kind, rest.len(), |offset, place| {
            place.copy_from_slice(&rest[offset..offset + place.len()]);
        })?;
        let blocks = received
            .into_iter()
            .map(|received| Ok((received.part, Bound::new(py, LentBlock::new(received))?)))
            .collect::<PyResult<Vec<_>>>()?;
        let item = (PyByteArray::new(py, &rest), blocks).into_pyobject(py)?;
        Ok(Some((LENT_OBJECT, item.into_any(), parts)))
    }

    /// Take the next message as what it is.
    fn take_any<'py>(&self, py: Python<'py>, writable: bool) -> PyResult<Option<Parts<'py>>> {
        loop {
            let Some(offer) = self.endpoint.peek().map_err(to_py)? else {
                return Ok(None);
            };
            if offer.kind == BYTES || offer.kind == PICKLE {
                if let Some(bytes) = self.take_plain(py, offer)? {
                    return Ok(Some((offer.kind, bytes.into_any(), Vec::new())));
                }
                continue;
            }
            if offer.kind == LENT_ARRAY || offer.kind == LENT_OBJECT {
                if let Some(found) = self.take_lent(py, offer, writable)? {
                    return Ok(Some(found));
                }
                continue;
            }
            let Some(taken) = self.take_parts(py, offer)? else {
                continue;
            };
            if offer.kind == OBJECT {
                return Ok(Some((OBJECT, taken.owner, taken.parts)));
            }
            return Ok(Some((ARRAY, self.array(py, taken)?, Vec::new())));
        }
    }

    /// Take the next message as an array.
    fn take_view<'py>(&self, py: Python<'py>) -> PyResult<Option<ReceivedView>> {
        loop {
            let Some(offer) = self.endpoint.peek().map_err(to_py)? else {
                return Ok(None);
            };
            if [OBJECT, PICKLE, LENT_OBJECT].contains(&offer.kind) {
                return Err(not_bytes(offer, "receive_view"));
            }
            if offer.kind == LENT_ARRAY {
                if let Some((_, array, _)) = self.take_lent(py, offer, false)? {
                    return Ok(Some(ReceivedView::new(array)));
                }
                continue;
            }
            let Some(taken) = self.take_parts(py, offer)? else {
                continue;
            };
            if offer.kind == ARRAY {
                return self
                    .array(py, taken)
                    .map(|array| Some(ReceivedView::new(array)));
            }
            let mut header = vec![1];
            header.extend((offer.length as i64).to_le_bytes());
            header.extend(b"'|u1'");
            // SAFETY: the owner keeps the bytes, and this receiver alone has the message.
            let array = unsafe {
                self.types
                    .array(&header, taken.address, offer.length, taken.owner)
            };
            return array.map(|array| Some(ReceivedView::new(array)));
        }
    }
}

/// A message that was taken.
struct Taken<'py> {
    owner: Bound<'py, PyAny>,
    address: NonNull<u8>,
    parts: Vec<(usize, usize)>,
}

/// What was received, on its way out of `detach`.
struct Sendable(Option<(Vec<Received>, Vec<u8>)>);

// SAFETY: the addresses lie in mappings that the holds keep.
unsafe impl Send for Sendable {}

fn parts_of(
    kind: u8,
    length: usize,
    read: impl Fn(usize, &mut [u8]),
) -> PyResult<Vec<(usize, usize)>> {
    if kind == BYTES {
        return Ok(vec![(0, length)]);
    }
    let plan = Plan::read(length, read).map_err(to_py)?;
    let ends = plan.parts().iter().map(|part| (part.start, part.end));
    Ok(ends.collect())
}

#[pymethods]
impl SharedReceiver {
    #[new]
    fn new(py: Python<'_>, channel: &Bound<'_, SharedChannel>) -> PyResult<Self> {
        let channel = channel.get().core();
        py.detach(|| channel.endpoint(Role::Receiver))
            .map(|endpoint| SharedReceiver {
                endpoint,
                types: Types::default(),
            })
            .map_err(to_py)
    }

    /// Receive a message that was sent as bytes.
    #[pyo3(signature = (timeout_seconds=None))]
    fn receive_bytes<'py>(
        &self,
        py: Python<'py>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let mut patience = Patience::new("receive_bytes", timeout);
        let attempt = || self.take_bytes(py, "receive_bytes");
        until(py, &self.endpoint, 0, &mut patience, attempt)?
            .ok_or_else(|| timed_out(&patience, NONE_CAME, NOT_RECEIVED))
    }

    /// Wait for a message, then receive up to `max_count` that are there.
    #[pyo3(signature = (max_count, timeout_seconds=None))]
    fn receive_many<'py>(
        &self,
        py: Python<'py>,
        max_count: &Bound<'py, PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let max_count = count("max_count", max_count, 1..=isize::MAX as usize)?;
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let mut patience = Patience::new("receive_many", timeout);
        let attempt = || self.take_bytes(py, "receive_many");
        let first = until(py, &self.endpoint, 0, &mut patience, attempt)?
            .ok_or_else(|| timed_out(&patience, NONE_CAME, NOT_RECEIVED))?;
        let found = PyList::new(py, [first])?;
        while found.len() < max_count {
            // What ends the channel, or is no bytes, is for the next call: this one has something.
            match self.take_bytes(py, "receive_many") {
                Ok(Some(message)) => found.append(message)?,
                Ok(None) | Err(_) => break,
            }
        }
        Ok(found)
    }

    /// Wait for a record of `item_bytes`, then receive as many as are there and fit.
    fn _receive_records(
        &self,
        py: Python<'_>,
        place: &Bound<'_, PyAny>,
        item_bytes: usize,
        timeout_seconds: Option<f64>,
    ) -> PyResult<usize> {
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let mut patience = Patience::new("receive_batch", timeout);
        let mut place = Exported::new(place, true)?;
        let mut places = place
            .bytes_mut()
            .chunks_exact_mut(item_bytes.max(1))
            .peekable();
        let mut received = 0;
        let attempt = || {
            while let Some(place) = places.peek_mut() {
                let offer = match self.endpoint.peek() {
                    Ok(Some(offer)) => offer,
                    Err(error) if received == 0 => return Err(to_py(error)),
                    _ => break,
                };
                if offer.kind != BYTES || offer.is_block || offer.length != item_bytes {
                    if received > 0 {
                        break;
                    }
                    return Err(InvalidArgument::new_err(format!(
                        "dtype: its items must be as long as the next message, which has {} bytes \
                         and stays in the channel, got items of {item_bytes}",
                        offer.length
                    )));
                }
                if self.endpoint.accept_into(offer, place).map_err(to_py)? {
                    received += 1;
                    places.next();
                }
            }
            Ok((received > 0).then_some(received))
        };
        until(py, &self.endpoint, 0, &mut patience, attempt)?
            .ok_or_else(|| timed_out(&patience, NONE_CAME, NOT_RECEIVED))
    }

    /// Receive any message: its kind, it, where its parts lie.
    #[pyo3(signature = (timeout_seconds, *, writable=false))]
    fn _receive_any<'py>(
        &self,
        py: Python<'py>,
        timeout_seconds: Option<f64>,
        writable: bool,
    ) -> PyResult<Parts<'py>> {
        let mut patience = Patience::new("receive", timeout("timeout_seconds", timeout_seconds)?);
        until(py, &self.endpoint, 0, &mut patience, || {
            self.take_any(py, writable)
        })?
        .ok_or_else(|| timed_out(&patience, NONE_CAME, NOT_RECEIVED))
    }

    /// Receive an array without a copy: `with receiver.receive_view() as array:`.
    #[pyo3(signature = (timeout_seconds=None))]
    fn receive_view(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<ReceivedView> {
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        let mut patience = Patience::new("receive_view", timeout);
        until(py, &self.endpoint, 0, &mut patience, || self.take_view(py))?
            .ok_or_else(|| timed_out(&patience, NONE_CAME, NOT_RECEIVED))
    }

    /// Wait until there is a message, without taking it; whether there is one.
    fn _wait(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<bool> {
        let mut patience = Patience::new("poll", timeout("timeout_seconds", timeout_seconds)?);
        let attempt = || self.endpoint.peek().map_err(to_py);
        Ok(until(py, &self.endpoint, 0, &mut patience, attempt)?.is_some())
    }

    /// Ask for the doorbell to ring when there is a message. Try once more afterwards.
    fn _arm(&self) -> PyResult<()> {
        self.endpoint
            .attachment()
            .arm(Role::Receiver)
            .map_err(to_py)
    }

    /// Whether it was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.endpoint.is_closed()
    }

    /// Close it. After the last receiver's close, senders are told.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.endpoint.close());
    }
}
