//! Memory that is there before it is needed: prefaulted, and locked against being taken away.

use super::PAGE_BYTES;
use std::io;
use std::ptr::NonNull;

/// Have every page of a range in memory, writable, and keep it there until it is released.
///
/// A forked child inherits the contents, not the lock.
///
/// # Safety
/// The range is page-aligned and lies in committed memory of the caller.
pub unsafe fn lock(address: NonNull<u8>, bytes: usize) -> io::Result<()> {
    // SAFETY: locking changes where pages are, not what they hold.
    let status = unsafe { libc::mlock2(address.as_ptr().cast(), bytes, 0) };
    if status == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Have every page of a fresh range in memory, writable; the kernel may take it away later.
///
/// # Safety
/// The range is page-aligned, lies in committed memory of the caller, and nothing is in it yet.
pub unsafe fn prefault(address: NonNull<u8>, bytes: usize) {
    for offset in (0..bytes).step_by(PAGE_BYTES) {
        // SAFETY: `offset < bytes`, so the byte lies in the range.
        let page = unsafe { address.add(offset) };
        // Volatile, because a zero written to a page of zeros could be left out.
        // SAFETY: as above, and nobody else uses the range.
        unsafe { page.write_volatile(0) };
    }
}

/// Bytes that this process may lock; `None`: any number. Privileged processes may exceed it.
pub fn lock_limit() -> Option<usize> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the answer.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    (status == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur as usize)
}

/// Page faults that the calling thread took without reading from a disk, so far.
pub fn thread_minor_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: `usage` is a valid place for the answer.
    let status = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
    if status != 0 {
        return 0;
    }
    // SAFETY: filled by the call above.
    unsafe { usage.assume_init() }.ru_minflt as u64
}

/// Number of this process; a forked child has another.
pub fn process_id() -> u32 {
    std::process::id()
}
