//! What processes share: files in memory, locks that end with their process, words to sleep on.

use super::WaitEnd;
use crate::sync::AtomicU32;
use std::ffi::CString;
use std::fs::{File, Metadata};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

fn answer(status: libc::c_int) -> io::Result<libc::c_int> {
    if status == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(status)
    }
}

fn text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// A file without a name that lives in memory, with `bytes` of it there; its size is sealed.
pub fn sealed_memory(bytes: usize) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends in a zero.
    let raw = answer(unsafe { libc::memfd_create(c"moirai-channel".as_ptr(), flags) })?;
    // SAFETY: just opened, and nobody else has it.
    let file = unsafe { OwnedFd::from_raw_fd(raw) };
    fill(&file, bytes)?;
    // SAFETY: the command takes an integer.
    answer(unsafe { libc::fcntl(raw, libc::F_ADD_SEALS, SIZE_SEALS) })?;
    Ok(file)
}

/// A file without a name that lives in memory, `bytes` long with nothing in it; see [`back`]. Its
/// size is sealed.
pub fn sparse_memory(bytes: usize) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends in a zero.
    let raw = answer(unsafe { libc::memfd_create(c"moirai-memory".as_ptr(), flags) })?;
    // SAFETY: just opened, and nobody else has it.
    let file = unsafe { OwnedFd::from_raw_fd(raw) };
    let length = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
    // SAFETY: the descriptor is open.
    answer(unsafe { libc::ftruncate(raw, length) })?;
    // SAFETY: as above.
    answer(unsafe { libc::fchmod(raw, 0o600) })?;
    // SAFETY: the command takes an integer.
    answer(unsafe { libc::fcntl(raw, libc::F_ADD_SEALS, SIZE_SEALS) })?;
    Ok(file)
}

const SIZE_SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Whether nobody can change the size of the file.
pub fn has_sealed_size(file: &OwnedFd) -> bool {
    // SAFETY: the command takes nothing.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals != -1 && seals & libc::F_SEAL_SHRINK != 0
}

/// Have memory behind a range of a sparse file, or fail: nothing is missing when it is touched.
pub fn back(file: &OwnedFd, offset: usize, bytes: usize) -> io::Result<()> {
    change_backing(file, libc::FALLOC_FL_KEEP_SIZE, offset, bytes)
}

/// Give the memory behind a range back; it reads as zero afterwards.
pub fn unback(file: &OwnedFd, offset: usize, bytes: usize) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    change_backing(file, mode, offset, bytes)
}

fn change_backing(
    file: &OwnedFd,
    mode: libc::c_int,
    offset: usize,
    bytes: usize,
) -> io::Result<()> {
    let (offset, bytes) = (offset as libc::off_t, bytes as libc::off_t);
    loop {
        // SAFETY: the descriptor is open.
        match answer(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            done => return done.map(drop),
        }
    }
}

/// Map a whole file over a reservation; its pages come as they are touched.
///
/// # Safety
/// `address` is the start of a reservation of `bytes` of the caller's.
pub unsafe fn map_shared_at(file: &OwnedFd, address: NonNull<u8>, bytes: usize) -> io::Result<()> {
    // SAFETY: the caller owns the range that is replaced.
    let raw = unsafe {
        libc::mmap(
            address.as_ptr().cast(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Open a descriptor of another process of this user, by its number there.
pub fn open_of_process(process: u32, descriptor: i32) -> io::Result<OwnedFd> {
    open_path(Path::new(&format!("/proc/{process}/fd/{descriptor}")))
}

/// A file of `bytes` in `folder` that has no name until [`give_name`]; only its user may open it.
pub fn unnamed_file(folder: &Path, bytes: usize) -> io::Result<OwnedFd> {
    let folder = text(folder)?;
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is a string that ends in a zero.
    let raw = answer(unsafe { libc::open(folder.as_ptr(), flags, 0o600) })?;
    // SAFETY: just opened, and nobody else has it.
    let file = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: the descriptor is open.
    answer(unsafe { libc::fchmod(raw, 0o600) })?;
    fill(&file, bytes)?;
    Ok(file)
}

/// Have the file be `bytes` long and all of them in memory, or fail: nothing is missing later.
fn fill(file: &OwnedFd, bytes: usize) -> io::Result<()> {
    let length = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
    // SAFETY: the descriptor is open.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    }
}

/// Give a file its name; fails if another has it.
pub fn give_name(file: &OwnedFd, path: &Path) -> io::Result<()> {
    let from = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let path = text(path)?;
    // SAFETY: both are strings that end in a zero.
    let status = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    answer(status).map(drop)
}

/// Open the same file once more: the locks of the new descriptor are its own.
pub fn open_again(file: &OwnedFd) -> io::Result<OwnedFd> {
    open_path(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
}

/// Open a file to read and write, and never through a symbolic link at the end of the path of a
/// file in memory that somebody else could have put there.
pub fn open_path(path: &Path) -> io::Result<OwnedFd> {
    let follow = if path.starts_with("/proc") {
        0
    } else {
        libc::O_NOFOLLOW
    };
    let path = text(path)?;
    let flags = libc::O_RDWR | libc::O_CLOEXEC | follow;
    // SAFETY: the path is a string that ends in a zero.
    let raw = answer(unsafe { libc::open(path.as_ptr(), flags) })?;
    // SAFETY: just opened, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Take over a descriptor that another process gave to this one.
///
/// # Safety
/// Nobody else closes it.
pub unsafe fn adopt(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the command takes an integer.
    answer(unsafe { libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: open, as the call above found, and the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// What is known of a file. Needs no further descriptor, as there may be none.
fn metadata(file: &OwnedFd) -> io::Result<Metadata> {
    // SAFETY: open, and not closed by this, as it is never dropped.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) });
    file.metadata()
}

/// Length in bytes, how many names it has, and whether it belongs to this user.
pub fn about(file: &OwnedFd) -> io::Result<(u64, u64, bool)> {
    use std::os::unix::fs::MetadataExt;
    let about = metadata(file)?;
    // SAFETY: no preconditions.
    let user = unsafe { libc::geteuid() };
    Ok((about.len(), about.nlink(), about.uid() == user))
}

/// Bytes of memory (or disk) that there are behind a file.
pub fn backed_bytes(file: &OwnedFd) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(metadata(file)?.blocks() * 512)
}

/// Map a whole file, with all its pages at hand.
pub fn map_shared(file: &OwnedFd, bytes: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            file.as_raw_fd(),
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(raw.cast()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// Have all pages of a shared mapping at hand again, which a forked child has not. On kernels that
/// cannot do it at once, they come as they are touched.
///
/// # Safety
/// The range is a mapping of the caller.
pub unsafe fn populate(address: NonNull<u8>, bytes: usize) {
    const POPULATE_WRITE: libc::c_int = 23; // MADV_POPULATE_WRITE, Linux 5.14
    // SAFETY: the advice changes which pages are mapped, not what they hold.
    unsafe { libc::madvise(address.as_ptr().cast(), bytes, POPULATE_WRITE) };
}

fn range(kind: libc::c_int, first: u64, count: u64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: first as libc::off_t,
        l_len: count as libc::off_t,
        l_pid: 0,
    }
}

/// Lock one byte for this open descriptor; whether it was free. The kernel unlocks it when the last
/// process that has the descriptor is gone.
pub fn try_lock(file: &OwnedFd, byte: u64) -> io::Result<bool> {
    set_lock(file, libc::F_OFD_SETLK, byte)
}

/// As [`try_lock`], but wait until the byte is free.
pub fn lock(file: &OwnedFd, byte: u64) -> io::Result<()> {
    loop {
        match set_lock(file, libc::F_OFD_SETLKW, byte) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            found => return found.map(drop),
        }
    }
}

fn set_lock(file: &OwnedFd, command: libc::c_int, byte: u64) -> io::Result<bool> {
    let lock = range(libc::F_WRLCK, byte, 1);
    // SAFETY: the command reads a lock.
    match answer(unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Unlock a byte of this open descriptor.
pub fn unlock(file: &OwnedFd, byte: u64) {
    let lock = range(libc::F_UNLCK, byte, 1);
    // SAFETY: the command reads a lock. Unlocking what is not locked changes nothing.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
}

/// Whether another open descriptor has a lock within these bytes.
pub fn is_locked_elsewhere(file: &OwnedFd, first: u64, count: u64) -> io::Result<bool> {
    locked_elsewhere(file, first, count).map(|found| found.is_some())
}

/// A byte of these that another open descriptor has locked; any one, not the first.
pub fn locked_elsewhere(file: &OwnedFd, first: u64, count: u64) -> io::Result<Option<u64>> {
    let mut lock = range(libc::F_WRLCK, first, count);
    // SAFETY: the command reads a lock and writes one.
    answer(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) })?;
    let is_locked = libc::c_int::from(lock.l_type) != libc::F_UNLCK;
    Ok(is_locked.then(|| (lock.l_start as u64).max(first)))
}

/// Sleep while `word` is `expected`, until woken by any process that shares it.
pub fn wait_on_shared(word: &AtomicU32, expected: u32, timeout: Duration) -> WaitEnd {
    let limit = libc::timespec {
        tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    };
    // SAFETY: the word and the limit outlive the call, which reads both and writes neither.
    let status = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            &raw const limit,
        )
    };
    if status == 0 {
        return WaitEnd::Woken;
    }
    match io::Error::last_os_error().raw_os_error() {
        Some(libc::ETIMEDOUT) => WaitEnd::TimedOut,
        Some(libc::EINTR) => WaitEnd::Interrupted,
        _ => WaitEnd::Woken,
    }
}

/// Wake at most `most` who sleep in [`wait_on_shared`] on `word`; how many did.
pub fn wake_shared(word: &AtomicU32, most: u32) -> usize {
    let most = most.min(i32::MAX as u32);
    // SAFETY: the kernel only compares the place with those slept on.
    let woken = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, most) };
    usize::try_from(woken).unwrap_or(0)
}

/// Random bytes of the kernel.
pub fn random() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: eight bytes may be written to.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count == bytes.len() as isize {
        Ok(u64::from_ne_bytes(bytes))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// How many processors the machine has; another process may run on one that this one may not.
pub fn processor_count() -> usize {
    // SAFETY: `sysconf` reads a number of the system and has no preconditions.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1)
}
