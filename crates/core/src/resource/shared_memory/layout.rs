//! What lies where in a segment of blocks, and how a process that attaches finds out that it agrees.
//!
//! Everything follows from the capacity; `docs/shared_channels.md` has the same byte by byte.

use super::build::{self, Build};
use super::holders::{Entry, MAX_PAGES, Marks, PARCEL_COUNT, SLOT_COUNT};
use crate::error::{Error, Result};
use crate::os::{HUGE_PAGE_BYTES, PAGE_BYTES};
use std::mem::{offset_of, size_of};

/// The first bytes of every segment.
pub const MAGIC: [u8; 8] = *b"MOIRAIMR";
/// Changes when a field moves or changes its meaning.
pub const LAYOUT_VERSION: u32 = 1;
/// What memory is taken from the kernel and given back in.
pub const CHUNK_BYTES: usize = HUGE_PAGE_BYTES;
/// Pages of a chunk.
pub const CHUNK_PAGES: usize = CHUNK_BYTES / PAGE_BYTES;
/// The most that one segment may hold.
pub const MAX_CAPACITY: usize = MAX_PAGES * PAGE_BYTES / 2;

/// Where [`Marks`] are.
pub const MARKS_OFFSET: usize = 256;
/// Where the flags of the slots are: 4 bytes each, 1 while a process has the slot.
pub const SLOTS_OFFSET: usize = 512;
/// Where the parcels are: 8 bytes each.
pub const PARCELS_OFFSET: usize = PAGE_BYTES;
/// Where the entries of the pages are.
pub const ENTRIES_OFFSET: usize = PARCELS_OFFSET + PARCEL_COUNT * 8;

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
    /// What blocks may take together: a multiple of [`CHUNK_BYTES`].
    pub capacity_bytes: u64,
    /// Where the blocks begin.
    pub data_offset: u64,
    /// A random number that no other segment has.
    pub id: u64,
}

impl Header {
    /// The header of a segment for at least `capacity` bytes of blocks.
    pub fn new(capacity: usize, id: u64) -> Result<Self> {
        if !(1..=MAX_CAPACITY).contains(&capacity) {
            return Err(Error::invalid(
                "capacity_bytes",
                format!("must be from 1 to {MAX_CAPACITY}, got {capacity}"),
            ));
        }
        let capacity = capacity.next_multiple_of(CHUNK_BYTES);
        let pages = capacity / PAGE_BYTES;
        let data = (ENTRIES_OFFSET + pages * size_of::<Entry>()).next_multiple_of(CHUNK_BYTES);
        Ok(Header {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            header_bytes: size_of::<Header>() as u32,
            abi_hash: abi_hash(),
            segment_bytes: (data + capacity) as u64,
            capacity_bytes: capacity as u64,
            data_offset: data as u64,
            id,
        })
    }

    /// Pages of blocks.
    pub fn page_count(&self) -> usize {
        self.capacity_bytes as usize / PAGE_BYTES
    }

    /// Bytes of everything before the blocks.
    pub fn table_bytes(&self) -> usize {
        let end = ENTRIES_OFFSET + self.page_count() * size_of::<Entry>();
        end.next_multiple_of(PAGE_BYTES)
    }

    /// Whether this is the header of a segment that this build can use, in a file of `file_bytes`.
    pub fn check(&self, file_bytes: u64) -> Result<()> {
        let build = Build {
            what: "shared memory",
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            abi_hash: abi_hash(),
        };
        build.expect(self.magic, self.layout_version, self.abi_hash)?;
        let capacity = usize::try_from(self.capacity_bytes).unwrap_or(usize::MAX);
        if Header::new(capacity, self.id).ok() != Some(*self) {
            return Err(Error::corrupted(format!(
                "shared memory: its sizes do not follow from its capacity of {} bytes",
                self.capacity_bytes
            )));
        }
        if file_bytes != self.segment_bytes {
            return Err(Error::corrupted(format!(
                "shared memory: must be {} bytes long, found {file_bytes}",
                self.segment_bytes
            )));
        }
        Ok(())
    }
}

fn abi_hash() -> u64 {
    let facts = [
        u64::from(u32::from_ne_bytes([1, 2, 3, 4])) as usize,
        size_of::<Header>(),
        offset_of!(Header, data_offset),
        size_of::<Marks>(),
        size_of::<Entry>(),
        MARKS_OFFSET,
        SLOTS_OFFSET,
        SLOT_COUNT,
        PARCELS_OFFSET,
        PARCEL_COUNT,
        ENTRIES_OFFSET,
        CHUNK_BYTES,
        PAGE_BYTES,
    ];
    build::abi_hash(&facts)
}

const _: () = assert!(size_of::<Header>() <= MARKS_OFFSET);
const _: () = assert!(MARKS_OFFSET + size_of::<Marks>() <= SLOTS_OFFSET);
const _: () = assert!(SLOTS_OFFSET + SLOT_COUNT * 4 <= PARCELS_OFFSET);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capacity_makes_a_header_that_passes() {
        for capacity in [1, 4096, 2 << 20, 100_000_001, 1 << 34, MAX_CAPACITY] {
            let header = Header::new(capacity, 7).unwrap();
            header.check(header.segment_bytes).unwrap();
            assert!(header.capacity_bytes as usize >= capacity);
            assert!(header.table_bytes() <= header.data_offset as usize);
        }
        assert!(Header::new(0, 7).is_err());
        assert!(Header::new(MAX_CAPACITY + 1, 7).is_err());
    }

    /// What `docs/shared_channels.md` says. Another number is another layout version.
    #[test]
    fn everything_lies_where_the_page_says() {
        let header = [
            offset_of!(Header, abi_hash),
            offset_of!(Header, segment_bytes),
            offset_of!(Header, data_offset),
            offset_of!(Header, id),
            size_of::<Header>(),
            size_of::<Entry>(),
            ENTRIES_OFFSET,
        ];
        assert_eq!(header, [16, 24, 40, 48, 56, 16, 12288]);
    }

    #[test]
    fn what_differs_is_named() {
        let good = Header::new(1 << 20, 7).unwrap();
        let bytes = good.segment_bytes;
        let cases: [(Header, u64, &str); 5] = [
            (
                Header {
                    magic: *b"MOIRAIXX",
                    ..good
                },
                bytes,
                "MOIRAIXX",
            ),
            (
                Header {
                    layout_version: 2,
                    ..good
                },
                bytes,
                "layout version 2",
            ),
            (
                Header {
                    abi_hash: 0xabc,
                    ..good
                },
                bytes,
                "0000000000000abc",
            ),
            (
                Header {
                    data_offset: 1,
                    ..good
                },
                bytes,
                "do not follow",
            ),
            (good, bytes - 4096, "bytes long"),
        ];
        for (header, bytes, words) in cases {
            let said = header.check(bytes).unwrap_err().to_string();
            assert!(said.contains(words), "{said}");
        }
    }
}
