//! What the kernel counts and limits for this process: faults, free heap, size of its data.

use crate::sync::AtomicU32;

/// Page faults of this process that needed no disk, since it started.
pub fn minor_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a valid place for the answer.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    // SAFETY: zeroed above, which is a valid value, and filled by the call.
    let usage = unsafe { usage.assume_init() };
    if status == 0 {
        usage.ru_minflt.max(0) as u64
    } else {
        0
    }
}

/// The soft and the hard limit on this process's private writable memory; `None` is no limit.
pub fn data_limits() -> (Option<u64>, Option<u64>) {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a valid place for the answer.
    unsafe { libc::getrlimit(libc::RLIMIT_DATA, &mut limit) };
    let finite = |value| (value != libc::RLIM_INFINITY).then_some(value);
    (finite(limit.rlim_cur), finite(limit.rlim_max))
}

/// The soft limit on this process's address space; `None` is no limit.
pub fn address_space_limit() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a valid place for the answer.
    unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    (limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Whether this process has children, ended ones that nobody has waited for included.
pub fn has_children() -> bool {
    let mut about = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: `about` is a valid place for the answer; with WNOWAIT the child stays to be waited for.
    let status = unsafe { libc::waitid(libc::P_ALL, 0, about.as_mut_ptr(), flags) };
    status == 0
}

/// Set the soft limit on private writable memory; `None` lifts it as far as the hard limit lets.
/// False when the kernel refuses.
pub fn set_soft_data_limit(soft: Option<u64>) -> bool {
    let hard = data_limits().1.unwrap_or(libc::RLIM_INFINITY);
    let limit = libc::rlimit {
        rlim_cur: soft.unwrap_or(libc::RLIM_INFINITY).min(hard),
        rlim_max: hard,
    };
    // SAFETY: the call reads `limit`.
    unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) == 0 }
}

/// Free bytes that libc's heap keeps, or `None` where it cannot tell. Takes the heap's locks.
pub fn retained_heap_bytes() -> Option<u64> {
    #[cfg(target_env = "gnu")]
    {
        // By name at run time: glibc before 2.33 has none.
        // SAFETY: the name is a string that ends in a zero.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"mallinfo2".as_ptr()) };
        if found.is_null() {
            return None;
        }
        // SAFETY: glibc's `mallinfo2` takes nothing and returns this structure.
        let function = unsafe {
            std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> libc::mallinfo2>(found)
        };
        Some(function().fordblks as u64)
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

/// Wake all threads of this process that sleep in [`super::wait_on`] on `word`.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the kernel only compares the address with those slept on.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            i32::MAX,
        )
    };
}

/// This process's number.
pub fn process_id() -> u32 {
    std::process::id()
}
