//! Messages by reference: the bytes lie in shared memory of their own, the record says where.
//!
//! A record begins with how many references there are (8 bytes) and then has them; what is left is
//! the caller's. The order is what makes a kill at any instruction harmless: a sender makes its
//! parcels first, and only a published record names them; a receiver takes the record, holds each
//! block, and then takes its parcel out. Whoever clears up after a receiver takes out the parcels of
//! what it had taken; whoever clears up after a sender, those it had made.

use super::endpoint::{Endpoint, Offer};
use super::message::{LENT_ARRAY, LENT_OBJECT};
use super::ring::Record;
use super::segment::Segment;
use crate::error::{Error, Result};
use crate::os::locked::process_id;
use crate::resource::shared_memory::guests::{self, Address};
use crate::resource::shared_memory::holders::{PARCEL_COUNT, Parcel};
use crate::resource::shared_memory::holding::{Hold, Holding};
use crate::resource::shared_memory::{Place, sent};
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of one reference.
const BYTES: usize = 48;
const COUNT_BYTES: usize = 8;

/// Where a part of a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The segment.
    pub address: Address,
    /// The block.
    pub parcel: Parcel,
    /// Which part of the message it is.
    part: u32,
    /// How far into the block the bytes begin, and how many there are.
    offset: u64,
    length: u64,
}

impl Reference {
    fn to_bytes(self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let words = [
            self.address.id,
            u64::from(self.address.process) | (self.address.descriptor as u64) << 32,
            self.parcel.word,
            u64::from(self.parcel.index) | u64::from(self.part) << 32,
            self.offset,
            self.length,
        ];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let mut words = [0u64; BYTES / 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        let [id, process, word, index, offset, length] = words;
        Reference {
            address: Address {
                id,
                process: process as u32,
                descriptor: (process >> 32) as i32,
            },
            parcel: Parcel {
                index: index as u32,
                word,
            },
            part: (index >> 32) as u32,
            offset,
            length,
        }
    }
}

/// The references of a message of this kind, and the rest of it.
fn split(kind: u8, content: &[u8]) -> Option<(Vec<Reference>, &[u8])> {
    if kind != LENT_ARRAY && kind != LENT_OBJECT {
        return None;
    }
    let (count, rest) = content.split_at_checked(COUNT_BYTES)?;
    let count = usize::try_from(u64::from_le_bytes(count.try_into().ok()?)).ok()?;
    let (references, rest) = rest.split_at_checked(count.checked_mul(BYTES)?)?;
    let references = references.chunks_exact(BYTES);
    Some((references.map(Reference::from_bytes).collect(), rest))
}

/// The references of a record that nobody writes any more. If it may be received meanwhile, look
/// afterwards whether it was: then they mean nothing.
pub(super) fn in_record(segment: &Segment, record: Record) -> Vec<Reference> {
    let mut content = vec![0u8; record.word.length()];
    let at = segment.record_bytes(segment.ring().index_of(record));
    // SAFETY: the record lies within the ring, as was found when it was met.
    unsafe { at.as_ptr().copy_to(content.as_mut_ptr(), content.len()) };
    split(record.word.kind(), &content).map_or_else(Vec::new, |(references, _)| references)
}

/// A part of a message that is sent by reference.
pub struct Part {
    /// The block.
    pub place: Place,
    /// Which part of the message it is.
    pub part: usize,
    /// How far into the block the bytes begin.
    pub offset: usize,
    /// How many there are.
    pub length: usize,
}

/// A parcel that is taken back unless it was sent.
struct Lent<'a> {
    holding: &'a Arc<Holding>,
    parcel: Parcel,
    is_sent: bool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if !self.is_sent {
            self.holding.segment().holders().take(self.parcel);
        }
    }
}

/// A part that was received: a hold of its block, and where in it the bytes are.
pub struct Received {
    /// Dropped when nobody looks at the bytes any more.
    pub hold: Hold,
    /// Which part of the message it is.
    pub part: usize,
    /// The first byte.
    pub address: NonNull<u8>,
    /// How many bytes lie before it in the block.
    pub offset: usize,
    /// How many bytes there are from there on.
    pub length: usize,
    /// How many bytes lie from there to the end of the block.
    pub room: usize,
    /// Whether the sender gave the block away.
    pub is_given: bool,
}

/// How many references the parts of a message make to each resource.
pub fn parcels(parts: &[Part]) -> Vec<(Arc<Holding>, usize)> {
    let mut found: Vec<(Arc<Holding>, usize)> = Vec::new();
    for part in parts {
        let holding = &part.place.holding;
        match found.iter_mut().find(|(it, _)| Arc::ptr_eq(it, holding)) {
            Some((_, count)) => *count += 1,
            None => found.push((Arc::clone(holding), 1)),
        }
    }
    found
}

impl Endpoint {
    /// Most references of one message: as many as can be on their way from one resource.
    pub const MAX_REFERENCES: usize = PARCEL_COUNT;

    /// Send a message whose `parts` lie in shared memory; false if there is no room for it now.
    pub fn try_send_references(
        &self,
        kind: u8,
        parts: &[Part],
        given: bool,
        rest: &[u8],
    ) -> Result<bool> {
        let mut content = Vec::with_capacity(COUNT_BYTES + parts.len() * BYTES + rest.len());
        content.extend((parts.len() as u64).to_le_bytes());
        let mut lent = Vec::with_capacity(parts.len());
        for part in parts {
            let holding = &part.place.holding;
            let Some(parcel) = holding.lend(part.place.page, given)? else {
                return Ok(false);
            };
            lent.push(Lent {
                holding,
                parcel,
                is_sent: false,
            });
            let reference = Reference {
                address: Address {
                    id: holding.id(),
                    process: process_id(),
                    descriptor: holding.descriptor(),
                },
                parcel,
                part: part.part as u32,
                offset: part.offset as u64,
                length: part.length as u64,
            };
            content.extend(reference.to_bytes());
        }
        content.extend(rest);
        if !self.try_send_bytes(kind, &content)? {
            return Ok(false);
        }
        for lent in &mut lent {
            lent.is_sent = true;
            let carrier = Arc::clone(self.attachment());
            sent::note(lent.holding, lent.parcel, carrier);
        }
        Ok(true)
    }

    /// How many bytes a message of so many references has.
    pub fn reference_bytes(count: usize, rest: usize) -> usize {
        COUNT_BYTES + count * BYTES + rest
    }

    /// Receive a message by reference: its parts, and what the sender wrote after them. `None` if
    /// another was quicker, or the sender took the memory with it; look again then.
    pub fn accept_references(&self, offer: Offer) -> Result<Option<(Vec<Received>, Vec<u8>)>> {
        let accepted = self.accept(offer, |at| {
            let mut content = vec![0u8; offer.length];
            // SAFETY: the record has so many bytes, and this process has taken it.
            unsafe { at.as_ptr().copy_to(content.as_mut_ptr(), content.len()) };
            let (references, rest) = split(offer.kind, &content).ok_or_else(|| {
                Error::corrupted("segment: a message by reference has none: it was overwritten")
            })?;
            let received = self.receive_all(&references)?;
            Ok(received.map(|received| (received, rest.to_vec())))
        })?;
        accepted.unwrap_or(Ok(None))
    }

    /// Whether a message by reference can be received without attaching to a segment first.
    pub fn is_acquainted(&self, offer: Offer) -> bool {
        let is_known = |reference: &Reference| {
            let holding = self.attachment().kept(reference.address.id);
            holding.is_some_and(|holding| holding.is_seated())
        };
        self.references_of(offer).iter().all(is_known)
    }

    /// Attach to the segments of a message by reference. Before it is taken, so that it stays in the
    /// channel if that fails.
    pub fn acquaint(&self, offer: Offer) -> Result<()> {
        for reference in self.references_of(offer) {
            if let Some(holding) = self.attach(&reference)? {
                holding.be_seated()?;
            }
        }
        Ok(())
    }

    /// The references of a message that was not taken yet; none if another has taken it.
    fn references_of(&self, offer: Offer) -> Vec<Reference> {
        let found = in_record(self.attachment().segment(), offer.record);
        if self.is_there(offer) {
            found
        } else {
            Vec::new()
        }
    }

    /// The segment that a reference is to; `None` if it ended with its maker.
    fn attach(&self, reference: &Reference) -> Result<Option<Arc<Holding>>> {
        if let Some(holding) = self.attachment().kept(reference.address.id) {
            return Ok(Some(holding));
        }
        let holding = guests::attach(reference.address)?;
        if let Some(holding) = &holding {
            self.attachment().keep(holding);
        }
        Ok(holding)
    }

    fn receive_all(&self, references: &[Reference]) -> Result<Option<Vec<Received>>> {
        let mut received = Vec::with_capacity(references.len());
        let mut is_whole = true;
        for reference in references {
            let Some(holding) = self.attach(reference)? else {
                is_whole = false;
                continue;
            };
            let Some(hold) = Hold::accept(&holding, reference.parcel)? else {
                is_whole = false;
                continue;
            };
            received.push(receive(reference, hold)?);
        }
        Ok(is_whole.then_some(received))
    }
}

fn receive(reference: &Reference, hold: Hold) -> Result<Received> {
    let broken = || {
        Error::corrupted(
            "shared memory: a message names bytes outside of its block: a process has \
             overwritten it",
        )
    };
    let (start, size) = hold.place().ok_or_else(broken)?;
    let offset = usize::try_from(reference.offset).map_err(|_| broken())?;
    let length = usize::try_from(reference.length).map_err(|_| broken())?;
    let room = size.checked_sub(offset).ok_or_else(broken)?;
    if length > room {
        return Err(broken());
    }
    Ok(Received {
        hold,
        part: reference.part as usize,
        // SAFETY: `offset <= size`, within the block.
        address: unsafe { start.add(offset) },
        offset,
        length,
        room,
        is_given: reference.parcel.is_given(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_read_as_it_was_written() {
        let reference = Reference {
            address: Address {
                id: u64::MAX - 1,
                process: 70_000,
                descriptor: 12,
            },
            parcel: Parcel {
                index: 9,
                word: 1 << 63,
            },
            part: 3,
            offset: 4096,
            length: 1 << 40,
        };
        let mut content = 1u64.to_le_bytes().to_vec();
        content.extend(reference.to_bytes());
        content.extend(b"rest");
        let (found, rest) = split(LENT_ARRAY, &content).unwrap();
        assert_eq!((found, rest), (vec![reference], &b"rest"[..]));
        assert_eq!(split(0, &content), None);
        assert_eq!(split(LENT_ARRAY, &content[..40]), None);
        assert_eq!(split(LENT_ARRAY, &[255; 64]), None);
    }
}
