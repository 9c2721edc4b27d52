//! What lies where in a segment, and how a process that attaches finds out that it agrees.
//!
//! Everything follows from one number, the capacity, so a header can be checked field by field.
//! `docs/shared_channels.md` has the same byte by byte.

use super::blocks::{MAX_UNITS, UNIT_BYTES};
use super::gate::Gate;
use super::ring::Positions;
use super::word::{GRANULE_BYTES, SLOT_COUNT};
use crate::error::{Error, Result};
use crate::os::PAGE_BYTES;
use crate::resource::shared_memory::build::{self, Build};
use crate::sync::{AtomicU32, AtomicU64};
use std::mem::{offset_of, size_of};

/// The first bytes of every segment.
pub const MAGIC: [u8; 8] = *b"MOIRAISC";
/// Changes when a field moves or changes its meaning.
pub const LAYOUT_VERSION: u32 = 2;

const CONTROL_OFFSET: usize = 256;
const SLOTS_OFFSET: usize = PAGE_BYTES;
const WORDS_OFFSET: usize = SLOTS_OFFSET + SLOT_COUNT * size_of::<Slot>();
/// Small messages walk through the ring, so it shall stay in the second-level cache.
const MIN_RING_BYTES: usize = 64 * 1024;
const MAX_RING_BYTES: usize = 512 * 1024;
/// Longer messages go into a block.
const MAX_INLINE_BYTES: usize = 64 * 1024;
/// Room for the header of an array or an object beside the bytes that a caller asked for.
const OVERHEAD_BYTES: usize = 4096;

/// The part of a segment that never changes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`LAYOUT_VERSION`].
    pub layout_version: u32,
    /// Bytes of this struct.
    pub header_bytes: u32,
    /// A hash of the sizes and places of everything, and of the byte order.
    pub abi_hash: u64,
    /// Bytes of the whole segment.
    pub segment_bytes: u64,
    /// What the creator asked for.
    pub capacity_bytes: u64,
    /// Where the words of the ring begin, and how many there are.
    pub words_offset: u64,
    /// A power of two.
    pub word_count: u64,
    /// Where the words of the units begin, and how many there are.
    pub units_offset: u64,
    /// Units of blocks.
    pub unit_count: u64,
    /// Where the bytes of the ring begin.
    pub ring_offset: u64,
    /// Where the bytes of the blocks begin.
    pub blocks_offset: u64,
    /// Longest message that lies in the ring itself.
    pub inline_bytes: u64,
    /// A random number, for the names of doorbells.
    pub id: u64,
}

/// The roles of one attachment.
#[repr(C)]
pub struct Slot {
    /// 1 while an attachment has it.
    pub used: AtomicU32,
    /// The process, as it numbers itself.
    pub process: AtomicU32,
    /// Senders that are open.
    pub senders: AtomicU32,
    /// Receivers that are open.
    pub receivers: AtomicU32,
    /// Which gates its event loops wait at: 1 for messages, 2 for room.
    pub armed: AtomicU32,
    _unused: AtomicU32,
    /// The number in the name of its doorbell.
    pub doorbell: AtomicU64,
    _spare: [AtomicU64; 4],
}

/// What every attachment reads and few write.
#[repr(C, align(128))]
pub struct Roles {
    /// Senders that are open, in all attachments.
    pub senders: AtomicU32,
    /// Receivers that are open.
    pub receivers: AtomicU32,
    /// 0, or how the last sender went: 1 closed, 2 died.
    pub senders_gone: AtomicU32,
    /// The same of receivers.
    pub receivers_gone: AtomicU32,
    /// Whether there ever was a sender, and the process of the one that went last.
    pub sender_ever: AtomicU32,
    /// Of the sender that went last.
    pub sender_process: AtomicU32,
    /// Whether there ever was a receiver.
    pub receiver_ever: AtomicU32,
    /// Of the receiver that went last.
    pub receiver_process: AtomicU32,
    /// Attachments that were found dead.
    pub deaths: AtomicU32,
    /// Counts the turns of blocks.
    pub turns: AtomicU32,
}

/// The part of a segment that changes, but for the slots, the words and the bytes.
#[repr(C)]
pub struct Control {
    /// Who is here.
    pub roles: Roles,
    /// Where receivers wait for messages.
    pub messages: Gate,
    /// Where senders wait for room.
    pub room: Gate,
    /// The ends of the ring.
    pub positions: Positions,
}

impl Header {
    /// The header of a segment for `capacity` bytes of large messages.
    pub fn new(capacity: usize, id: u64) -> Result<Self> {
        let most = (MAX_UNITS - 1) * UNIT_BYTES;
        if !(1..=most).contains(&capacity) {
            return Err(Error::invalid(
                "capacity_bytes",
                format!("must be from 1 to {most}, got {capacity}"),
            ));
        }
        let ring_bytes = (capacity / 2)
            .next_power_of_two()
            .clamp(MIN_RING_BYTES, MAX_RING_BYTES);
        let word_count = ring_bytes / GRANULE_BYTES;
        let unit_count = (capacity + OVERHEAD_BYTES).div_ceil(UNIT_BYTES);
        let units_offset = WORDS_OFFSET + word_count * size_of::<AtomicU64>();
        let units_end = units_offset + unit_count * size_of::<AtomicU64>();
        let ring_offset = units_end.next_multiple_of(PAGE_BYTES);
        let blocks_offset = (ring_offset + ring_bytes).next_multiple_of(UNIT_BYTES);
        Ok(Header {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            header_bytes: size_of::<Header>() as u32,
            abi_hash: abi_hash(),
            segment_bytes: (blocks_offset + unit_count * UNIT_BYTES) as u64,
            capacity_bytes: capacity as u64,
            words_offset: WORDS_OFFSET as u64,
            word_count: word_count as u64,
            units_offset: units_offset as u64,
            unit_count: unit_count as u64,
            ring_offset: ring_offset as u64,
            blocks_offset: blocks_offset as u64,
            inline_bytes: MAX_INLINE_BYTES.min(ring_bytes / 4) as u64,
            id,
        })
    }

    /// Whether this is the header of a segment that this build can use, in a file of `file_bytes`.
    pub fn check(&self, file_bytes: u64) -> Result<()> {
        let build = Build {
            what: "segment",
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            abi_hash: abi_hash(),
        };
        build.expect(self.magic, self.layout_version, self.abi_hash)?;
        if self.segment_bytes != file_bytes {
            return Err(Error::corrupted(format!(
                "segment: must be {} bytes long, as its header says, found {file_bytes}: it was \
                 truncated or extended",
                self.segment_bytes
            )));
        }
        let expected = usize::try_from(self.capacity_bytes)
            .ok()
            .and_then(|capacity| Header::new(capacity, self.id).ok());
        let Some(expected) = expected else {
            return Err(Error::corrupted(format!(
                "segment: capacity_bytes is {} in its header, which no creator writes",
                self.capacity_bytes
            )));
        };
        let fields = |header: &Header| {
            [
                ("header_bytes", u64::from(header.header_bytes)),
                ("segment_bytes", header.segment_bytes),
                ("words_offset", header.words_offset),
                ("word_count", header.word_count),
                ("units_offset", header.units_offset),
                ("unit_count", header.unit_count),
                ("ring_offset", header.ring_offset),
                ("blocks_offset", header.blocks_offset),
                ("inline_bytes", header.inline_bytes),
            ]
        };
        let differs = fields(self)
            .into_iter()
            .zip(fields(&expected))
            .find(|(found, expected)| found != expected);
        match differs {
            None => Ok(()),
            Some(((name, found), (_, expected))) => Err(Error::corrupted(format!(
                "segment: {name} must be {expected} for {} bytes of capacity, found {found} in its \
                 header",
                self.capacity_bytes
            ))),
        }
    }

    /// Where [`Control`] begins.
    pub const fn control_offset() -> usize {
        CONTROL_OFFSET
    }

    /// Where the slots begin.
    pub const fn slots_offset() -> usize {
        SLOTS_OFFSET
    }
}

/// FNV-1a over everything that two builds could disagree about without noticing.
pub fn abi_hash() -> u64 {
    let facts = [
        usize::from_ne_bytes(1u64.to_le_bytes()),
        size_of::<usize>(),
        size_of::<Header>(),
        size_of::<Slot>(),
        size_of::<Roles>(),
        size_of::<Gate>(),
        size_of::<Positions>(),
        offset_of!(Slot, doorbell),
        offset_of!(Control, messages),
        offset_of!(Control, room),
        offset_of!(Control, positions),
        CONTROL_OFFSET,
        SLOTS_OFFSET,
        SLOT_COUNT,
        GRANULE_BYTES,
        UNIT_BYTES,
    ];
    build::abi_hash(&facts)
}

const _: () = assert!(size_of::<Header>() <= CONTROL_OFFSET);
const _: () = assert!(CONTROL_OFFSET + size_of::<Control>() <= SLOTS_OFFSET);
const _: () = assert!(size_of::<Slot>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capacity_makes_a_header_that_passes() {
        for capacity in [1, 100, 65_536, 1 << 20, 100_000_001, 1 << 34] {
            let header = Header::new(capacity, 7).unwrap();
            header.check(header.segment_bytes).unwrap();
            let room = header.unit_count as usize * UNIT_BYTES;
            assert!(room >= capacity + OVERHEAD_BYTES);
            assert!(header.inline_bytes * 2 <= header.word_count * GRANULE_BYTES as u64);
        }
        assert!(Header::new(0, 7).is_err());
        assert!(Header::new(usize::MAX, 7).is_err());
    }

    /// What `docs/shared_channels.md` says. Another number is another layout version.
    #[test]
    fn everything_lies_where_the_page_says() {
        let header = [
            offset_of!(Header, layout_version),
            offset_of!(Header, abi_hash),
            offset_of!(Header, capacity_bytes),
            offset_of!(Header, units_offset),
            offset_of!(Header, ring_offset),
            offset_of!(Header, id),
            size_of::<Header>(),
        ];
        assert_eq!(header, [8, 16, 32, 56, 72, 96, 104]);
        let control = [
            offset_of!(Control, messages),
            offset_of!(Control, room),
            offset_of!(Control, positions),
            size_of::<Control>(),
        ];
        assert_eq!(control, [128, 256, 384, 768]);
        assert_eq!((offset_of!(Slot, doorbell), size_of::<Slot>()), (24, 64));
        assert_eq!(
            (CONTROL_OFFSET, SLOTS_OFFSET, WORDS_OFFSET),
            (256, 4096, 12288)
        );
        assert_eq!(LAYOUT_VERSION, 2);
    }

    #[test]
    fn what_differs_is_named() {
        let good = Header::new(1 << 20, 7).unwrap();
        let said = |header: Header, bytes: u64| header.check(bytes).unwrap_err();
        let bytes = good.segment_bytes;
        let cases = [
            (
                said(
                    Header {
                        magic: *b"MOIRAIXX",
                        ..good
                    },
                    bytes,
                ),
                "MOIRAIXX",
            ),
            (
                said(
                    Header {
                        layout_version: 3,
                        ..good
                    },
                    bytes,
                ),
                "layout version 3",
            ),
            (
                said(
                    Header {
                        abi_hash: 0xabc,
                        ..good
                    },
                    bytes,
                ),
                "0000000000000abc",
            ),
            (said(good, bytes - 4096), "truncated"),
            (
                said(
                    Header {
                        ring_offset: 1,
                        ..good
                    },
                    bytes,
                ),
                "ring_offset must be",
            ),
            (
                said(
                    Header {
                        capacity_bytes: 0,
                        ..good
                    },
                    bytes,
                ),
                "capacity_bytes is 0",
            ),
            (
                said(
                    Header {
                        header_bytes: 8,
                        ..good
                    },
                    bytes,
                ),
                "header_bytes must be",
            ),
        ];
        for (error, words) in cases {
            assert!(error.to_string().contains(words), "{error}");
        }
        let unsupported = said(
            Header {
                layout_version: 3,
                ..good
            },
            bytes,
        );
        assert!(matches!(unsupported, Error::Unsupported { .. }));
    }
}
