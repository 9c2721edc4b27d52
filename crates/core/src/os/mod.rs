//! The only place that talks to the operating system: pages, clocks, limits, fork.
//!
//! Linux today; another system is another file behind the same functions.

pub mod event;
pub mod locked;
pub mod numa;
pub mod process;
pub mod shared;

use crate::sync::AtomicU32;
use std::ptr::NonNull;
use std::time::Duration;

/// Size of a page. Fixed at 4 KiB: on kernels with larger pages every range handed to the
/// functions below is still a multiple of [`UNIT_BYTES`], and [`supported`] says no if that is
/// not enough.
pub const PAGE_BYTES: usize = 4096;
/// Granule of reservations and slab runs.
pub const UNIT_BYTES: usize = 64 * 1024;
/// Size of a transparent huge page on x86-64 and on arm64 with 4 KiB pages.
pub const HUGE_PAGE_BYTES: usize = 2 * 1024 * 1024;

/// Alignment of what malloc gives unasked.
pub const MALLOC_ALIGNMENT: usize = 16;

/// Whether this kernel's page size is the one the code is built for.
pub fn supported() -> bool {
    // SAFETY: `sysconf` reads a constant of the system and has no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    page == PAGE_BYTES as libc::c_long
}

/// Reserve `bytes` of address space without any memory behind it; aligned to a huge page.
///
/// The range is `PROT_NONE`, so neither `mlockall(MCL_FUTURE)` populates nor overcommit charges it;
/// [`commit`] charges, and so is refused what the kernel would refuse libc.
pub fn reserve(bytes: usize) -> Option<NonNull<u8>> {
    let padded = bytes.checked_add(HUGE_PAGE_BYTES)?;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing of ours.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            padded,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return None;
    }
    let start = raw as usize;
    let aligned = start.next_multiple_of(HUGE_PAGE_BYTES);
    let front = aligned - start;
    let back = padded - front - bytes;
    if front > 0 {
        // SAFETY: the range is the unused front of the mapping made above.
        unsafe { libc::munmap(raw, front) };
    }
    if back > 0 {
        // SAFETY: the range is the unused tail of the mapping made above.
        unsafe { libc::munmap((aligned + bytes) as *mut libc::c_void, back) };
    }
    NonNull::new(aligned as *mut u8)
}

/// Make reserved pages readable and writable. False when the kernel refuses (out of memory).
///
/// # Safety
/// The range is page-aligned and lies in a live reservation of the caller.
pub unsafe fn commit(address: NonNull<u8>, bytes: usize) -> bool {
    // SAFETY: the caller owns the range; changing its protection loses no data.
    let status = unsafe {
        libc::mprotect(
            address.as_ptr().cast(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    };
    status == 0
}

/// Give the memory behind the pages back to the kernel; they read as zero afterwards.
///
/// Returns false if the kernel refuses (locked pages); then the contents are unchanged or zero.
///
/// # Safety
/// The range is page-aligned, private anonymous memory of the caller, and its contents are dead.
pub unsafe fn decommit(address: NonNull<u8>, bytes: usize) -> bool {
    // SAFETY: the caller says that nobody needs the contents.
    let status = unsafe { libc::madvise(address.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
    status == 0
}

/// Of `samples` pages spread over the range, how many are in memory; `samples` if it cannot be told.
///
/// # Safety
/// The range is page-aligned, lies in a live mapping of the caller, and has at least one page.
pub unsafe fn resident_samples(address: NonNull<u8>, bytes: usize, samples: usize) -> usize {
    let pages = bytes / PAGE_BYTES;
    let count = |sample: usize| {
        let page = (2 * sample + 1) * pages / (2 * samples);
        let mut resident = 0u8;
        // SAFETY: `sample < samples`, so the page lies in the range.
        let start = unsafe { address.add(page * PAGE_BYTES) };
        // SAFETY: one page is asked for, and there is one byte for the answer.
        let status = unsafe { libc::mincore(start.as_ptr().cast(), PAGE_BYTES, &mut resident) };
        usize::from(status != 0 || resident & 1 != 0)
    };
    (0..samples).map(count).sum()
}

/// What to ask of transparent huge pages for a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Ask for them where blocks are large.
    Auto,
    /// Ask for them everywhere.
    Always,
    /// Refuse them, even where the system gives them unasked.
    Never,
}

/// Advise the kernel on huge pages for a range of a reservation.
///
/// # Safety
/// The range lies in a live reservation of the caller.
pub unsafe fn advise_huge(address: NonNull<u8>, bytes: usize, huge: bool) {
    let advice = if huge {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    // SAFETY: the advice changes how faults are served, not what memory holds. A kernel built
    // without huge pages answers EINVAL, which changes nothing.
    unsafe { libc::madvise(address.as_ptr().cast(), bytes, advice) };
}

/// Give address space back.
///
/// # Safety
/// The range is a whole reservation of the caller, and nothing points into it any more.
pub unsafe fn release(address: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller owns the range and gives it up.
    let status = unsafe { libc::munmap(address.as_ptr().cast(), bytes) };
    debug_assert_eq!(status, 0);
}

/// Fresh zeroed pages for the core's own tables, or `None`. Memory is used as they are touched.
pub fn map_zeroed(bytes: usize) -> Option<NonNull<u8>> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing of ours.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        None
    } else {
        NonNull::new(raw.cast())
    }
}

/// The soft limit on the process's address space, if there is one.
pub fn address_space_limit() -> Option<usize> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the answer.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    (status == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur as usize)
}

/// Nanoseconds of the monotonic clock; never goes back.
pub fn now_nanoseconds() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the answer, and the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Milliseconds since an arbitrary point; coarse (some milliseconds), never goes back.
pub fn now_milliseconds() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the answer, and the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Resident set of this process in bytes, or 0 where `/proc` is not mounted.
pub fn resident_bytes() -> usize {
    std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<usize>().ok())
        .map_or(0, |pages| pages * PAGE_BYTES)
}

/// Call the three functions around every `fork` of this process, for good.
pub fn at_fork(prepare: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) {
    // SAFETY: the functions are `extern "C"` items of this library, which is never unloaded.
    let status = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    assert_eq!(status, 0, "pthread_atfork has no memory left at start-up");
}

/// Run `body` on a new thread that no signal is delivered to. False if none can be started.
pub fn spawn_quiet(name: &str, body: impl FnOnce() + Send + 'static) -> bool {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut old = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is a valid place for a signal set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: `all` was filled above, `old` is a valid place for the answer.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr()) };
    let started = std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .is_ok();
    // SAFETY: `old` was filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), std::ptr::null_mut()) };
    started
}

/// How much of its stack this thread has left, as a share of the whole; 0 if that cannot be told.
pub fn stack_left() -> f64 {
    use std::cell::Cell;
    thread_local! {
        /// The lowest address and the size.
        static STACK: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
    }
    let (lowest, size) = STACK.get().unwrap_or_else(|| {
        let found = stack_bounds().unwrap_or((0, 0));
        STACK.set(Some(found));
        found
    });
    let here = (&raw const size).addr();
    if size == 0 {
        return 0.0;
    }
    (here.saturating_sub(lowest) as f64 / size as f64).min(1.0)
}

fn stack_bounds() -> Option<(usize, usize)> {
    let mut attributes = std::mem::MaybeUninit::uninit();
    // SAFETY: no preconditions.
    let this = unsafe { libc::pthread_self() };
    // SAFETY: this thread, and a valid place for the answer.
    if unsafe { libc::pthread_getattr_np(this, attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let (mut lowest, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: filled above; both answers have valid places.
    let found =
        unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &mut lowest, &mut size) } == 0;
    // SAFETY: filled above, and not used any more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    found.then_some((lowest.addr(), size))
}

/// Whether this is the thread that the process began with; the kernel gives it most signals.
pub fn is_first_thread() -> bool {
    // SAFETY: no preconditions.
    let thread = unsafe { libc::gettid() };
    // SAFETY: no preconditions.
    let process = unsafe { libc::getpid() };
    thread == process
}

/// Why a wait on a word ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitEnd {
    /// It was woken, or the word was another already, or for no reason: look at the word.
    Woken,
    /// The time has passed.
    TimedOut,
    /// A signal handler ran on this thread.
    Interrupted,
}

/// Sleep while `word` is `expected`, until woken; `None` waits for ever. Within this process only.
pub fn wait_on(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> WaitEnd {
    let limit = timeout.map(|timeout| libc::timespec {
        tv_sec: timeout.as_secs().min(i32::MAX as u64) as libc::time_t,
        tv_nsec: timeout.subsec_nanos() as libc::c_long,
    });
    let limit = limit
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref::<libc::timespec>);
    // SAFETY: the word and the limit outlive the call, which reads both and writes neither.
    let status = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            limit,
        )
    };
    if status == 0 {
        return WaitEnd::Woken;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::ETIMEDOUT) => WaitEnd::TimedOut,
        Some(libc::EINTR) => WaitEnd::Interrupted,
        _ => WaitEnd::Woken,
    }
}

/// Wake one thread that sleeps in [`wait_on`] on `word`.
pub fn wake_one(word: &AtomicU32) {
    // SAFETY: the kernel only compares the address with those slept on.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
}

/// libc's aligned allocation, or `None`. `alignment` is a power of two of at least 8.
pub fn libc_allocate(size: usize, alignment: usize) -> Option<NonNull<u8>> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: `raw` is a valid place for the answer; the alignment is as POSIX wants it.
    let status = unsafe { libc::posix_memalign(&mut raw, alignment, size) };
    if status == 0 {
        NonNull::new(raw.cast())
    } else {
        None
    }
}

/// Give back a block of [`libc_allocate`].
///
/// # Safety
/// `address` came from [`libc_allocate`] and was not given back.
pub unsafe fn libc_deallocate(address: NonNull<u8>) {
    // SAFETY: the caller's promise.
    unsafe { libc::free(address.as_ptr().cast()) };
}

/// Size of a block of [`libc_allocate`] as libc rounded it.
///
/// # Safety
/// `address` came from [`libc_allocate`] and was not given back.
pub unsafe fn libc_block_bytes(address: NonNull<u8>) -> usize {
    // SAFETY: the caller's promise.
    unsafe { libc::malloc_usable_size(address.as_ptr().cast()) }
}

/// Have glibc keep up to `bytes` free at the top of its heap, and serve blocks of up to half of that
/// from the heap. False with another libc.
pub fn libc_keep(bytes: usize) -> bool {
    #[cfg(target_env = "gnu")]
    {
        /// The most that glibc takes for M_MMAP_THRESHOLD on 64-bit systems.
        const MOST_FROM_HEAP: usize = 32 * 1024 * 1024;
        /// Asked for beyond what is needed when the heap grows, and left when it is trimmed.
        const PAD: usize = 1024 * 1024;
        let bytes = bytes.min(i32::MAX as usize);
        [
            (libc::M_MMAP_THRESHOLD, (bytes / 2).min(MOST_FROM_HEAP)),
            (libc::M_TRIM_THRESHOLD, bytes),
            (libc::M_TOP_PAD, PAD.min(bytes)),
        ]
        .into_iter()
        .all(|(parameter, value)| {
            // SAFETY: `mallopt` takes its locks itself, and the parameters are plain sizes.
            unsafe { libc::mallopt(parameter, value as libc::c_int) == 1 }
        })
    }
    #[cfg(not(target_env = "gnu"))]
    {
        let _ = bytes;
        false
    }
}

/// Where the process's heap ends now.
pub fn libc_heap_end() -> usize {
    // SAFETY: an increment of 0 moves nothing.
    unsafe { libc::sbrk(0) as usize }
}

/// CPU time of the whole process in milliseconds.
pub fn cpu_milliseconds() -> u64 {
    clock_milliseconds(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// CPU time of the calling thread in milliseconds.
pub fn thread_cpu_milliseconds() -> u64 {
    clock_milliseconds(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_milliseconds(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the answer, and the clock exists on every Linux.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

/// Ask libc to give free memory back to the kernel.
pub fn libc_trim() {
    // SAFETY: no preconditions.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}
