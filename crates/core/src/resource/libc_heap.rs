//! libc's own heap, kept warm and given back by age: it serves what NumPy does not ask for, such as
//! the hash tables and work buffers of C extensions.
//!
//! Left alone, glibc unmaps large blocks when they are freed and trims the heap's top again and
//! again, so that the same pages fault in anew; with higher thresholds alone it would never give
//! them back. Here the thresholds are raised, and the background tick gives free memory back once the
//! heap has not grown for a while, then from time to time, and once the process is idle.

use super::background::{self, Ages};
use crate::os;
use crate::sync::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

/// A process that used less than this share of a processor over the decay time is idle.
const IDLE_SHARE: u64 = 20;
/// Decay times after which a heap that is in use, but does not grow, is given back once more: what
/// was in use the last time may be free by now.
const AGAIN_AFTER: u64 = 20;
const AGAIN_LEAST_MILLISECONDS: u64 = 4000;
/// Giving memory back takes at most this share of the time (libc's locks are held meanwhile).
const TRIM_SHARE: u64 = 100;

/// What the tick knows of the heap. Only the tick's thread writes, so `Relaxed` suffices.
struct LibcHeap {
    decay_milliseconds: u64,
    /// The heap's end when last looked at, and when it was last seen to move.
    end: AtomicU64,
    moved_milliseconds: AtomicU64,
    /// CPU time of the process at the start of the current idle period, and when that began.
    quiet_cpu: AtomicU64,
    quiet_since: AtomicU64,
    /// CPU time of the process, and the heap's end, when memory was last given back.
    trimmed_cpu: AtomicU64,
    trimmed_end: AtomicU64,
    trimmed_milliseconds: AtomicU64,
    /// Not before this time again.
    rest_until: AtomicU64,
}

static HEAP: OnceLock<Arc<LibcHeap>> = OnceLock::new();

/// Have glibc keep up to `keep_bytes` of freed memory at the top of its heap, serve blocks up to
/// half of that (32 MiB at most) from the heap, and give free memory back once the heap has not grown
/// for `decay_milliseconds`, or the process has been idle for as long.
///
/// For the life of the process: glibc cannot be told to go back. Returns false, and does nothing, with
/// another libc. A second call changes the thresholds only.
pub fn keep_warm(keep_bytes: usize, decay_milliseconds: u64) -> bool {
    if !os::libc_keep(keep_bytes) {
        return false;
    }
    HEAP.get_or_init(|| {
        let heap = Arc::new(LibcHeap {
            decay_milliseconds,
            end: AtomicU64::new(os::libc_heap_end() as u64),
            moved_milliseconds: AtomicU64::new(os::now_milliseconds()),
            quiet_cpu: AtomicU64::new(0),
            quiet_since: AtomicU64::new(0),
            trimmed_cpu: AtomicU64::new(0),
            trimmed_end: AtomicU64::new(0),
            trimmed_milliseconds: AtomicU64::new(0),
            rest_until: AtomicU64::new(0),
        });
        let ages: Weak<dyn Ages> = Arc::downgrade(&heap) as Weak<dyn Ages>;
        background::register(ages);
        heap
    });
    background::wake();
    true
}

impl LibcHeap {
    /// Whether the heap has stood still since it last grew, and was not given back since, or long ago.
    fn has_settled(&self, now: u64, cpu: u64) -> bool {
        let end = os::libc_heap_end() as u64;
        if self.end.swap(end, Ordering::Relaxed) != end {
            self.moved_milliseconds.store(now, Ordering::Relaxed);
        }
        let since_trim = now - self.trimmed_milliseconds.load(Ordering::Relaxed);
        let pause = (AGAIN_AFTER * self.decay_milliseconds).max(AGAIN_LEAST_MILLISECONDS);
        let again = since_trim >= pause && self.ran_since_trim(cpu);
        (end != self.trimmed_end.load(Ordering::Relaxed) || again)
            && now - self.moved_milliseconds.load(Ordering::Relaxed) >= self.decay_milliseconds
    }

    /// Whether the process hardly ran for the decay time, but did since memory was last given back.
    fn is_idle(&self, now: u64, cpu: u64) -> bool {
        let used = cpu.saturating_sub(self.quiet_cpu.load(Ordering::Relaxed));
        if used * IDLE_SHARE > self.decay_milliseconds {
            self.quiet_cpu.store(cpu, Ordering::Relaxed);
            self.quiet_since.store(now, Ordering::Relaxed);
        }
        now - self.quiet_since.load(Ordering::Relaxed) >= self.decay_milliseconds
            && self.ran_since_trim(cpu)
    }

    fn ran_since_trim(&self, cpu: u64) -> bool {
        let used = cpu.saturating_sub(self.trimmed_cpu.load(Ordering::Relaxed));
        used * IDLE_SHARE > self.decay_milliseconds
    }
}

impl Ages for LibcHeap {
    fn age(&self) {
        let (now, cpu) = (os::now_milliseconds(), os::cpu_milliseconds());
        if cpu < self.quiet_cpu.load(Ordering::Relaxed) {
            // A forked child: its CPU time began anew.
            self.quiet_cpu.store(0, Ordering::Relaxed);
            self.trimmed_cpu.store(0, Ordering::Relaxed);
        }
        let due = self.has_settled(now, cpu) | self.is_idle(now, cpu);
        if !due || now < self.rest_until.load(Ordering::Relaxed) {
            return;
        }
        let before = os::thread_cpu_milliseconds();
        os::libc_trim();
        let took = os::thread_cpu_milliseconds() - before;
        let end = os::libc_heap_end() as u64;
        self.end.store(end, Ordering::Relaxed);
        self.trimmed_end.store(end, Ordering::Relaxed);
        self.trimmed_milliseconds.store(now, Ordering::Relaxed);
        self.trimmed_cpu
            .store(os::cpu_milliseconds(), Ordering::Relaxed);
        self.rest_until
            .store(now + took * TRIM_SHARE, Ordering::Relaxed);
    }

    fn keeps(&self) -> bool {
        self.ran_since_trim(os::cpu_milliseconds())
    }
}
