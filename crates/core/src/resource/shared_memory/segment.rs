//! A segment of blocks: the file, its mapping, and typed views of what lies in it.

use super::holders::{Entry, Holders, Marks, PARCEL_COUNT, SLOT_COUNT};
use super::layout::{
    CHUNK_BYTES, ENTRIES_OFFSET, Header, MARKS_OFFSET, PARCELS_OFFSET, SLOTS_OFFSET,
};
use crate::error::{Error, Result};
use crate::os::{self, PAGE_BYTES, shared};
use crate::sync::{AtomicU32, AtomicU64};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

/// A mapped segment. Its tables change under atomics; its blocks are their holders'.
pub struct Segment {
    base: NonNull<u8>,
    header: Header,
    /// Without locks of its own, so that other processes may open it.
    file: OwnedFd,
}

// SAFETY: the mapping lives as long as this; all access is through atomics or raw bytes.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, and whatever points into it keeps the segment alive.
        unsafe { os::release(self.base, self.header.segment_bytes as usize) };
    }
}

fn no_room(bytes: usize, error: &io::Error) -> Error {
    Error::out_of_memory(bytes, format!("shared memory is not there: {error}"))
}

impl Segment {
    /// A new segment for at least `capacity` bytes of blocks, with its tables there.
    pub fn create(capacity: usize) -> Result<Self> {
        let id =
            shared::random().map_err(|error| Error::unsupported(format!("getrandom: {error}")))?;
        let header = Header::new(capacity, id)?;
        let failed = |error: io::Error| no_room(capacity, &error);
        let file = shared::sparse_memory(header.segment_bytes as usize).map_err(failed)?;
        shared::back(&file, 0, header.table_bytes()).map_err(failed)?;
        let segment = Self::map(file, header)?;
        // SAFETY: the mapping has room for a header at its start, and nobody else has it yet.
        unsafe { segment.base.cast::<Header>().write(header) };
        Ok(segment)
    }

    /// The segment in this file.
    pub fn adopt(file: OwnedFd) -> Result<Self> {
        use std::os::unix::fs::FileExt;
        let failed = |error: io::Error| Error::unsupported(format!("shared memory: {error}"));
        let (bytes, _, is_ours) = shared::about(&file).map_err(failed)?;
        if !is_ours {
            return Err(Error::unsupported(
                "shared memory: it belongs to another user",
            ));
        }
        if bytes < size_of::<Header>() as u64 || !shared::has_sealed_size(&file) {
            return Err(Error::corrupted(
                "shared memory: must be a sealed file with a header, found none",
            ));
        }
        let mut header = [0u8; size_of::<Header>()];
        std::fs::File::from(file.try_clone().map_err(failed)?)
            .read_exact_at(&mut header, 0)
            .map_err(failed)?;
        // SAFETY: as many bytes, and the struct consists of integers, for which all are valid.
        let header = unsafe { std::mem::transmute::<[u8; size_of::<Header>()], Header>(header) };
        header.check(bytes)?;
        Self::map(file, header)
    }

    fn map(file: OwnedFd, header: Header) -> Result<Self> {
        let bytes = header.segment_bytes as usize;
        let base = os::reserve(bytes)
            .ok_or_else(|| Error::out_of_memory(bytes, "the system has no more address space"))?;
        // SAFETY: the reservation made above.
        if let Err(error) = unsafe { shared::map_shared_at(&file, base, bytes) } {
            // SAFETY: the reservation made above, of which nobody knows.
            unsafe { os::release(base, bytes) };
            return Err(no_room(bytes, &error));
        }
        Ok(Segment { base, header, file })
    }

    /// What lies where.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its file, which has no locks.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        debug_assert!(offset < self.header.segment_bytes as usize);
        // SAFETY: within the mapping, by the header, which was made or checked here.
        unsafe { self.base.add(offset) }.cast()
    }

    fn slice<T>(&self, offset: usize, count: usize) -> &[T] {
        let first = self.at::<T>(offset);
        // SAFETY: the header leaves room for so many there, aligned; they consist of atomics, of
        // which zeroed memory is valid ones.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), count) }
    }

    /// Who holds what.
    pub fn holders(&self) -> Holders<'_> {
        let entries = self.slice::<Entry>(ENTRIES_OFFSET, self.header.page_count());
        let parcels = self.slice::<AtomicU64>(PARCELS_OFFSET, PARCEL_COUNT);
        // SAFETY: as in `slice`.
        let marks = unsafe { self.at::<Marks>(MARKS_OFFSET).as_ref() };
        Holders::new(entries, parcels, marks)
    }

    /// 1 for each slot that a process has.
    pub fn slots(&self) -> &[AtomicU32] {
        self.slice(SLOTS_OFFSET, SLOT_COUNT)
    }

    /// Where a page of blocks is.
    pub fn address_of(&self, page: usize) -> NonNull<u8> {
        self.at(self.header.data_offset as usize + page * PAGE_BYTES)
    }

    /// How far an address is into the blocks; `None` if it is elsewhere.
    pub fn offset_of(&self, address: NonNull<u8>) -> Option<usize> {
        let first = self.base.as_ptr() as usize + self.header.data_offset as usize;
        let offset = (address.as_ptr() as usize).checked_sub(first)?;
        (offset < self.header.capacity_bytes as usize).then_some(offset)
    }

    /// Have a chunk in memory and at hand, or say why not.
    pub fn back(&self, chunk: usize) -> io::Result<()> {
        let offset = self.header.data_offset as usize + chunk * CHUNK_BYTES;
        shared::back(&self.file, offset, CHUNK_BYTES)?;
        // SAFETY: the chunk lies in the mapping.
        unsafe { shared::populate(self.at(offset), CHUNK_BYTES) };
        Ok(())
    }

    /// Give a chunk back to the kernel.
    pub fn unback(&self, chunk: usize) -> bool {
        let offset = self.header.data_offset as usize + chunk * CHUNK_BYTES;
        shared::unback(&self.file, offset, CHUNK_BYTES).is_ok()
    }
}
