//! Every segment that this process is attached to, its own and others', by its number.

use super::holding::Holding;
use super::segment::Segment;
use crate::error::{Error, Result};
use crate::os::shared;
use crate::resource::fork;
use crate::sync::Lock;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Weak};

type Known = Lock<HashMap<u64, Weak<Holding>>>;

static KNOWN: LazyLock<Arc<Known>> = LazyLock::new(|| fork::shared(Known::default()));

/// Where a segment can be found: its number, and a process that has its file open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The segment's number.
    pub id: u64,
    /// A process that is attached.
    pub process: u32,
    /// The number of the file there.
    pub descriptor: i32,
}

/// Have the list's lock come after those of whoever calls this, in the order of a fork.
pub fn prepare() {
    LazyLock::force(&KNOWN);
}

/// Have a segment of this process found.
pub(super) fn add(holding: &Arc<Holding>) {
    let known = Arc::clone(&KNOWN);
    let mut known = known.lock();
    known.retain(|_, holding| holding.strong_count() > 0);
    known.insert(holding.id(), Arc::downgrade(holding));
}

/// A segment that this process is attached to already.
pub fn known(id: u64) -> Option<Arc<Holding>> {
    KNOWN.lock().get(&id).and_then(Weak::upgrade)
}

/// Attach to a segment; `None` if the process that would show it has ended.
pub fn attach(address: Address) -> Result<Option<Arc<Holding>>> {
    if let Some(holding) = known(address.id) {
        return Ok(Some(holding));
    }
    let file = match shared::open_of_process(address.process, address.descriptor) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(Error::unsupported(format!(
                "shared memory: opening the file of process {}: {error}; both processes must see \
                 each other in /proc",
                address.process
            )));
        }
    };
    // The number may be another file's by now.
    let segment = match Segment::adopt(file) {
        Err(Error::Corrupted { .. }) => return Ok(None),
        found => found?,
    };
    if segment.header().id != address.id {
        return Ok(None);
    }
    let holding = Holding::join(segment)?;
    let mut known = KNOWN.lock();
    // Another thread may have been quicker; one process has one slot.
    if let Some(first) = known.get(&address.id).and_then(Weak::upgrade) {
        drop(known);
        return Ok(Some(first));
    }
    known.insert(address.id, Arc::downgrade(&holding));
    drop(known);
    Ok(Some(holding))
}
