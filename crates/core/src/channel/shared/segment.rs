//! A segment: the file, its mapping, and typed views of what lies in it.

use super::blocks::{Blocks, Run, UNIT_BYTES};
use super::layout::{Control, Header, MAGIC, Slot};
use super::ring::Ring;
use super::word::{GRANULE_BYTES, SLOT_COUNT};
use crate::error::{Error, Result};
use crate::os::{self, shared};
use crate::sync::AtomicU64;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Where named segments lie.
const FOLDER: &str = "/dev/shm";
const PREFIX: &str = "moirai.";
const MAX_NAME: usize = 200;
/// The byte of the file that is locked while somebody comes, goes or is found dead. The bytes below
/// belong to the slots.
pub const ROSTER: u64 = SLOT_COUNT as u64;

/// A mapped segment. What is in it changes under atomics, but for the bytes of messages.
pub struct Segment {
    base: NonNull<u8>,
    header: Header,
    /// Without locks of its own, so that it can be given to other processes.
    file: OwnedFd,
    path: Option<PathBuf>,
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

/// The path of a named segment.
fn path_of(name: &str) -> Result<PathBuf> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_plain) {
        return Err(Error::invalid(
            "name",
            format!(
                "must be 1 to {MAX_NAME} letters, digits, dots, dashes or underscores, got {name:?}"
            ),
        ));
    }
    Ok(Path::new(FOLDER).join(format!("{PREFIX}{name}")))
}

fn no_room(bytes: u64, error: &io::Error) -> Error {
    Error::out_of_memory(
        bytes as usize,
        format!("shared memory for the channel is not there: {error}"),
    )
}

fn broken(doing: &str, error: &io::Error) -> Error {
    Error::unsupported(format!("{doing}: {error}"))
}

impl Segment {
    /// A new segment that has no name yet.
    pub fn create(name: Option<&str>, capacity: usize) -> Result<Self> {
        let path = name.map(path_of).transpose()?;
        let id = shared::random().map_err(|error| broken("getrandom", &error))?;
        let header = Header::new(capacity, id)?;
        let bytes = header.segment_bytes as usize;
        let file = match &path {
            None => shared::sealed_memory(bytes),
            Some(_) => shared::unnamed_file(Path::new(FOLDER), bytes),
        };
        let file = file.map_err(|error| no_room(header.segment_bytes, &error))?;
        let segment = Self::map(file, header, path)?;
        // SAFETY: the mapping has room for a header at its start, and nobody else has it yet.
        unsafe { segment.base.cast::<Header>().write(header) };
        Ok(segment)
    }

    /// Let others find it.
    pub fn publish(&self) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        shared::give_name(&self.file, path).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                let name = self.name().unwrap_or_default();
                Error::invalid(
                    "name",
                    format!("must be a name that no channel has, got {name:?}"),
                )
            } else {
                broken("naming the segment", &error)
            }
        })
    }

    /// The segment that has this name.
    pub fn open(name: &str) -> Result<Self> {
        let path = path_of(name)?;
        let file = shared::open_path(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Error::disconnected(format!("open: no channel has the name {name:?}"))
            }
            _ => broken("open", &error),
        })?;
        Self::adopt(file, Some(path))
    }

    /// The segment in this file.
    pub fn adopt(file: OwnedFd, path: Option<PathBuf>) -> Result<Self> {
        let (bytes, _, is_ours) = shared::about(&file).map_err(|error| broken("open", &error))?;
        if !is_ours {
            return Err(Error::unsupported(
                "open: the segment belongs to another user",
            ));
        }
        if (bytes as usize) < Header::slots_offset() {
            return Err(Error::corrupted(format!(
                "segment: must be at least {} bytes long, found {bytes}: it is none, or was \
                 truncated",
                Header::slots_offset()
            )));
        }
        let header = read_header(&file)?;
        header.check(bytes)?;
        Self::map(file, header, path)
    }

    fn map(file: OwnedFd, header: Header, path: Option<PathBuf>) -> Result<Self> {
        let base = shared::map_shared(&file, header.segment_bytes as usize)
            .map_err(|error| no_room(header.segment_bytes, &error))?;
        Ok(Segment {
            base,
            header,
            file,
            path,
        })
    }

    /// What lies where.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its file, which has no locks.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Its name, if it was created with one.
    pub fn name(&self) -> Option<&str> {
        self.path
            .as_ref()?
            .file_name()?
            .to_str()?
            .strip_prefix(PREFIX)
    }

    /// Whether it has no name, or still has it.
    pub fn is_named_still(&self) -> bool {
        self.path.is_none() || shared::about(&self.file).is_ok_and(|(_, names, _)| names > 0)
    }

    /// Take its name away. Under the roster's lock.
    pub fn unlink(&self) {
        if let Some(path) = &self.path
            && self.is_named_still()
        {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Have its pages at hand, in a forked child.
    pub fn populate(&self) {
        // SAFETY: the whole mapping.
        unsafe { shared::populate(self.base, self.header.segment_bytes as usize) };
    }

    /// Whether the file still is as long as it was; a named one can be truncated by its user.
    pub fn check_length(&self) -> Result<()> {
        if self.path.is_none() {
            return Ok(());
        }
        let (bytes, ..) = shared::about(&self.file).map_err(|error| broken("fstat", &error))?;
        self.header.check(bytes)
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        debug_assert!(offset < self.header.segment_bytes as usize);
        // SAFETY: within the mapping, by the header, which was checked.
        unsafe { self.base.add(offset) }.cast()
    }

    fn words(&self, offset: u64, count: u64) -> &[AtomicU64] {
        let first = self.at::<AtomicU64>(offset as usize);
        // SAFETY: the header was checked, so so many words lie there, aligned; words are only
        // accessed as atomics, and zeroed memory is valid ones.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), count as usize) }
    }

    /// What changes.
    #[inline]
    pub fn control(&self) -> &Control {
        // SAFETY: the mapping is longer; the struct consists of atomics, of which zeros are valid.
        unsafe { self.at::<Control>(Header::control_offset()).as_ref() }
    }

    /// The slots of attachments.
    #[inline]
    pub fn slots(&self) -> &[Slot] {
        let first = self.at::<Slot>(Header::slots_offset());
        // SAFETY: as in `control`; the header was checked to leave room for so many.
        unsafe { std::slice::from_raw_parts(first.as_ptr(), SLOT_COUNT) }
    }

    /// The ring of records.
    #[inline]
    pub fn ring(&self) -> Ring<'_> {
        let words = self.words(self.header.words_offset, self.header.word_count);
        Ring::new(&self.control().positions, words)
    }

    /// The pool of blocks.
    #[inline]
    pub fn blocks(&self) -> Blocks<'_> {
        let units = self.words(self.header.units_offset, self.header.unit_count);
        Blocks::new(units, &self.control().roles.turns)
    }

    /// Have memory behind a run, or fail.
    pub fn back(&self, run: Run) -> Result<()> {
        let bytes = run.count * UNIT_BYTES;
        shared::back(&self.file, self.unit_offset(run.start), bytes)
            .map_err(|error| no_room(bytes as u64, &error))
    }

    /// Give the memory behind a run back to the kernel; whether it went.
    pub fn unback(&self, run: Run) -> bool {
        let bytes = run.count * UNIT_BYTES;
        shared::unback(&self.file, self.unit_offset(run.start), bytes).is_ok()
    }

    /// Bytes of memory that the kernel has behind the segment.
    pub fn backed_bytes(&self) -> usize {
        shared::backed_bytes(&self.file).unwrap_or(0) as usize
    }

    /// Of these, bytes behind blocks that are free.
    pub fn idle_bytes(&self) -> usize {
        let others = self.header.segment_bytes as usize - self.blocks().free_count() * UNIT_BYTES;
        self.backed_bytes().saturating_sub(others)
    }

    /// Where the bytes of the record that begins at a granule lie.
    #[inline]
    pub fn record_bytes(&self, index: usize) -> NonNull<u8> {
        self.at(self.header.ring_offset as usize + index * GRANULE_BYTES)
    }

    /// How far a unit is from the start of the segment.
    #[inline]
    pub fn unit_offset(&self, index: usize) -> usize {
        self.header.blocks_offset as usize + index * UNIT_BYTES
    }

    /// Where the bytes of a unit lie.
    #[inline]
    pub fn unit_bytes(&self, index: usize) -> NonNull<u8> {
        self.at(self.unit_offset(index))
    }
}

fn read_header(file: &OwnedFd) -> Result<Header> {
    use std::os::unix::fs::FileExt;
    let failed = |error: io::Error| broken("reading the segment", &error);
    let file = std::fs::File::from(file.try_clone().map_err(failed)?);
    let mut bytes = [0u8; size_of::<Header>()];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    // SAFETY: as many bytes, and the struct consists of integers, for which all bytes are valid.
    Ok(unsafe { std::mem::transmute::<[u8; size_of::<Header>()], Header>(bytes) })
}

/// Take the names of segments away whose owners are all gone; how many.
pub fn reap_names() -> usize {
    let Ok(entries) = std::fs::read_dir(FOLDER) else {
        return 0;
    };
    entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(PREFIX.as_bytes())
        })
        .filter(|entry| reap_name(&entry.path()).unwrap_or(false))
        .count()
}

fn reap_name(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let file = shared::open_path(path)?;
    let mut magic = [0; 8];
    std::fs::File::from(file.try_clone()?).read_exact_at(&mut magic, 0)?;
    // Whoever comes or goes right now sees to it himself.
    if magic != MAGIC || !shared::try_lock(&file, ROSTER)? {
        return Ok(false);
    }
    let (_, names, is_ours) = shared::about(&file)?;
    if names == 0 || !is_ours || shared::is_locked_elsewhere(&file, 0, ROSTER)? {
        return Ok(false);
    }
    std::fs::remove_file(path)?;
    Ok(true)
}
