//! Arenas for transactions: each has a limit, ends at once, and may have transactions inside.
//!
//! Transactions share chunks that none of them uses. What one uses is charged to it, to the ones it
//! lies in and to the whole; it counts as used until its chunk is empty, so that a limit bounds what
//! is held. Ending one gives back its current chunk and closes the account, whatever was allocated;
//! a chunk that views still show stays theirs, and comes back when the last of them dies.

use super::arena::{Arena, Growth, Store, chunk_bytes};
use super::fork::{self, ForkLocks};
use super::{Block, DEFAULT_ALIGNMENT, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::os;
use crate::sync::{AtomicU8, AtomicU64, AtomicUsize, Lock, Ordering, Ordering::Relaxed};
use crate::sync::{Quota, QuotaRefusal};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;

/// Requests and frees that one recording has room for.
const MOST_EVENTS: usize = 1 << 16;

/// What transactions have in common.
pub struct TransactionStore {
    store: Arc<Store>,
    /// What is used by transactions that have not ended.
    total: Arc<Quota>,
    /// One transaction of this many is recorded; 0: none.
    record_every: u64,
    recorder: Lock<Recorder>,
    created: AtomicU64,
    commits: AtomicU64,
    rollbacks: AtomicU64,
    /// Blocks that views kept alive when their transaction ended.
    outliving: AtomicU64,
}

/// What happened to all transactions of a store. `created == active + commits + rollbacks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransactionCounts {
    /// Transactions begun.
    pub created: u64,
    /// Transactions committed.
    pub commits: u64,
    /// Transactions rolled back.
    pub rollbacks: u64,
    /// Blocks that views kept alive when their transaction ended, in all.
    pub outliving: u64,
    /// Bytes used by transactions that have not ended.
    pub current_bytes: u64,
    /// Most bytes used at once by transactions that had not ended.
    pub peak_bytes: u64,
    /// Bytes of chunks in use: by transactions, or by views of ended ones.
    pub held_bytes: u64,
    /// Bytes of chunks kept for the next transaction.
    pub idle_bytes: u64,
}

impl TransactionStore {
    /// Draw chunks from `upstream`, and keep at most `keep_bytes` of unused ones.
    pub fn new(
        upstream: Arc<dyn Resource>,
        keep_bytes: usize,
        record_every: u64,
    ) -> Result<Arc<Self>> {
        let store = fork::shared(TransactionStore {
            store: Store::new(upstream, keep_bytes)?,
            total: Arc::new(Quota::new(usize::MAX, None)),
            record_every,
            recorder: Lock::default(),
            created: AtomicU64::new(0),
            commits: AtomicU64::new(0),
            rollbacks: AtomicU64::new(0),
            outliving: AtomicU64::new(0),
        });
        Ok(store)
    }

    /// What happened so far.
    pub fn counts(&self) -> TransactionCounts {
        let idle_bytes = self.store.idle_bytes();
        TransactionCounts {
            created: self.created.load(Relaxed),
            commits: self.commits.load(Relaxed),
            rollbacks: self.rollbacks.load(Relaxed),
            outliving: self.outliving.load(Relaxed),
            current_bytes: self.total.used() as u64,
            peak_bytes: self.total.peak() as u64,
            held_bytes: self.store.drawn_bytes().saturating_sub(idle_bytes) as u64,
            idle_bytes: idle_bytes as u64,
        }
    }

    /// Give unused chunks back to upstream, and let it keep `target_bytes`.
    pub fn trim(&self, target_bytes: usize) -> usize {
        self.store.trim(target_bytes)
    }

    /// The last finished recording, served by malloc as well; `None` while there is none.
    pub fn compare_with_malloc(&self) -> Option<Comparison> {
        let recording = self.recorder.lock().finished.clone()?;
        Some(recording.compare())
    }
}

impl ForkLocks for TransactionStore {
    fn lock_all(&self) {
        self.recorder.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.recorder.release() };
    }
}

// ---- recordings ----

#[derive(Clone, Copy, Debug)]
enum Event {
    Allocate(usize),
    /// The block of the allocation with this number came back.
    Free(u32),
}

/// What one transaction asked for, in order.
#[derive(Clone, Debug, Default)]
struct Recording {
    events: Arc<Vec<Event>>,
    held_bytes: usize,
}

/// Records one transaction at a time.
#[derive(Default)]
struct Recorder {
    busy: bool,
    events: Vec<Event>,
    /// The number of each live block's allocation, by address.
    live: HashMap<usize, u32>,
    allocation_count: u32,
    finished: Option<Recording>,
}

impl Recorder {
    fn start(&mut self) -> bool {
        !std::mem::replace(&mut self.busy, true)
    }

    fn note(&mut self, event: Event) {
        if self.events.len() < MOST_EVENTS {
            self.events.push(event);
        }
    }

    fn allocated(&mut self, address: usize, size: usize) {
        self.note(Event::Allocate(size));
        self.live.insert(address, self.allocation_count);
        self.allocation_count += 1;
    }

    fn freed(&mut self, address: usize) {
        if let Some(number) = self.live.remove(&address) {
            self.note(Event::Free(number));
        }
    }

    /// Keep the recording, unless it is empty or had no room for all.
    fn finish(&mut self, held_bytes: usize) -> Recorder {
        let whole = !self.events.is_empty() && self.events.len() < MOST_EVENTS;
        let mut done = std::mem::take(self);
        let finished = whole.then(|| Recording {
            events: Arc::new(std::mem::take(&mut done.events)),
            held_bytes,
        });
        self.finished = finished.or(done.finished.take());
        done
    }
}

/// What the same requests took from an arena and from malloc, at the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Requests and frees that were replayed.
    pub event_count: usize,
    /// Bytes asked for.
    pub asked_bytes: usize,
    /// Bytes of chunks that the transaction held.
    pub held_bytes: usize,
    /// Usable bytes of the blocks that malloc gave; its own records come on top.
    pub malloc_bytes: usize,
}

impl Recording {
    /// Serve the requests by malloc, really, and measure what it hands out.
    fn compare(&self) -> Comparison {
        let mut blocks: Vec<Option<(NonNull<u8>, usize)>> = Vec::new();
        let mut comparison = Comparison {
            event_count: self.events.len(),
            held_bytes: self.held_bytes,
            ..Comparison::default()
        };
        let (mut asked, mut usable) = (0, 0);
        let free = |block: Option<(NonNull<u8>, usize)>| {
            let (address, size) = block?;
            // SAFETY: allocated below, and freed once.
            let usable = unsafe { os::libc_block_bytes(address) };
            // SAFETY: as above.
            unsafe { os::libc_deallocate(address) };
            Some((size, usable))
        };
        for event in self.events.iter() {
            match *event {
                Event::Allocate(size) => {
                    let block = os::libc_allocate(size, os::MALLOC_ALIGNMENT);
                    if let Some(address) = block {
                        asked += size;
                        // SAFETY: just allocated.
                        usable += unsafe { os::libc_block_bytes(address) };
                    }
                    blocks.push(block.map(|address| (address, size)));
                    comparison.asked_bytes = comparison.asked_bytes.max(asked);
                    comparison.malloc_bytes = comparison.malloc_bytes.max(usable);
                }
                Event::Free(number) => {
                    if let Some((size, bytes)) = free(blocks[number as usize].take()) {
                        asked -= size;
                        usable -= bytes;
                    }
                }
            }
        }
        for block in blocks {
            free(block);
        }
        comparison
    }
}

// ---- a transaction ----

const ACTIVE: u8 = 0;
const COMMITTED: u8 = 1;
const ROLLED_BACK: u8 = 2;

/// What a transaction is begun with.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Bytes of the first chunk.
    pub first_bytes: usize,
    /// Most bytes it may use, those of transactions inside it included.
    pub limit_bytes: usize,
}

/// The memory of one transaction.
pub struct TransactionArena {
    store: Arc<TransactionStore>,
    arena: Arc<Arena>,
    quota: Arc<Quota>,
    /// What errors call it.
    label: String,
    parent: Option<Arc<TransactionArena>>,
    recorded: bool,
    /// How it stands; whoever changes it from `ACTIVE` ends it. `AcqRel`: ends once.
    status: AtomicU8,
    /// Most bytes it would have used had nothing been refused. A report: `Relaxed` suffices.
    wanted_bytes: AtomicUsize,
}

impl TransactionArena {
    /// Begin a transaction, inside `parent` if there is one.
    pub fn begin(
        store: &Arc<TransactionStore>,
        terms: Terms,
        label: String,
        parent: Option<Arc<TransactionArena>>,
    ) -> Result<Arc<Self>> {
        let growth = Growth::From(chunk_bytes(terms.first_bytes)?);
        let above = match &parent {
            Some(parent) if !parent.is_active() => return Err(parent.ended()),
            Some(parent) => &parent.quota,
            None => &store.total,
        };
        let quota = Arc::new(Quota::new(terms.limit_bytes, Some(Arc::clone(above))));
        let number = store.created.fetch_add(1, Relaxed);
        let chosen = store.record_every > 0 && number % store.record_every == 0;
        Ok(Arc::new(TransactionArena {
            arena: Arena::new(Arc::clone(&store.store), growth, Some(Arc::clone(&quota))),
            recorded: chosen && store.recorder.lock().start(),
            store: Arc::clone(store),
            quota,
            label,
            parent,
            status: AtomicU8::new(ACTIVE),
            wanted_bytes: AtomicUsize::new(0),
        }))
    }

    /// Whether it has not ended.
    pub fn is_active(&self) -> bool {
        self.status.load(Ordering::Acquire) == ACTIVE
    }

    /// Bytes it uses, those of transactions inside it included.
    pub fn used_bytes(&self) -> usize {
        self.quota.used()
    }

    /// Most bytes it used, or would have used had nothing been refused.
    pub fn wanted_bytes(&self) -> usize {
        self.quota.peak().max(self.wanted_bytes.load(Relaxed))
    }

    /// Bytes of chunks it holds, those of transactions inside it not included.
    pub fn held_bytes(&self) -> usize {
        self.arena.statistics().resident_bytes as usize
    }

    /// End it; its memory lives as long as views show it, and counts for the parent until then.
    /// Returns the blocks that are alive.
    pub fn commit(&self) -> Result<u64> {
        let live = self.end(COMMITTED)?;
        if self.parent.is_none() {
            self.quota.close();
        }
        self.store.commits.fetch_add(1, Relaxed);
        Ok(live)
    }

    /// End it and what it used; blocks that views show stay theirs, and count for nobody.
    /// Returns the blocks that are alive.
    pub fn rollback(&self) -> Result<u64> {
        let live = self.end(ROLLED_BACK)?;
        self.quota.close();
        self.store.rollbacks.fetch_add(1, Relaxed);
        Ok(live)
    }

    fn end(&self, status: u8) -> Result<u64> {
        let changed =
            self.status
                .compare_exchange(ACTIVE, status, Ordering::AcqRel, Ordering::Acquire);
        if changed.is_err() {
            return Err(self.ended());
        }
        let live = self.arena.end();
        self.store.outliving.fetch_add(live, Relaxed);
        if self.recorded {
            let held_bytes = self.arena.peak_held_bytes();
            let done = self.store.recorder.lock().finish(held_bytes);
            drop(done);
        }
        Ok(live)
    }

    fn ended(&self) -> Error {
        let how = match self.status.load(Ordering::Acquire) {
            COMMITTED => "was committed",
            ROLLED_BACK => "was rolled back",
            _ => "is ending",
        };
        Error::closed(format!("{} {how}", self.label))
    }

    /// The error for a request that an account refuses.
    fn refusal(&self, request: Request, bytes: usize, refusal: QuotaRefusal) -> Error {
        let QuotaRefusal::Full {
            used,
            limit,
            levels_up,
        } = refusal
        else {
            let mut one = Some(self);
            while let Some(transaction) = one.filter(|transaction| transaction.is_active()) {
                one = transaction.parent.as_deref();
            }
            return one.unwrap_or(self).ended();
        };
        self.wanted_bytes
            .fetch_max(self.quota.used().saturating_add(bytes), Relaxed);
        let mut whose = self;
        for _ in 0..levels_up {
            whose = whose.parent.as_deref().unwrap_or(whose);
        }
        Error::out_of_memory(
            request.size(),
            format!("{} uses {used} bytes of a limit of {limit}", whose.label),
        )
    }

    #[cold]
    fn record_allocation(&self, block: Block, size: usize) {
        let address = block.address.as_ptr() as usize;
        let mut recorder = self.store.recorder.lock();
        if self.is_active() {
            recorder.allocated(address, size);
        }
    }

    #[cold]
    fn record_free(&self, address: NonNull<u8>) {
        let mut recorder = self.store.recorder.lock();
        if self.is_active() {
            recorder.freed(address.as_ptr() as usize);
        }
    }
}

impl Drop for TransactionArena {
    fn drop(&mut self) {
        if self.is_active() {
            // Nobody can end it any more, and nothing of it is alive.
            let _ = self.rollback();
        }
    }
}

// SAFETY: blocks are the arena's, handed through unchanged.
unsafe impl Resource for TransactionArena {
    fn name(&self) -> &'static str {
        "TransactionArena"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let bytes = request.size().next_multiple_of(DEFAULT_ALIGNMENT);
        self.quota
            .reserve(bytes)
            .map_err(|refusal| self.refusal(request, bytes, refusal))?;
        match self.arena.allocate(request) {
            Ok(block) => {
                if self.recorded {
                    self.record_allocation(block, request.size());
                }
                Ok(block)
            }
            Err(error) => {
                self.quota.release(bytes);
                let ended = matches!(error, Error::Closed { .. });
                Err(if ended { self.ended() } else { error })
            }
        }
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        if self.recorded {
            self.record_free(address);
        }
        self.arena.deallocate(address)
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        self.arena.block_bytes(address)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.arena.owns(address)
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        if self.recorded {
            self.record_free(address);
        }
        self.arena.take_back(address)
    }

    fn statistics(&self) -> Statistics {
        self.arena.statistics()
    }

    fn cached_bytes(&self) -> usize {
        self.arena.unused_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        if self.arena.unused_bytes() > target_bytes {
            self.arena.drop_unused();
        }
        self.store.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.arena.check(report);
        report.count("transaction.used_bytes", self.quota.used() as u64);
        report.count("transaction.limit_bytes", self.quota.limit() as u64);
        report.expect(self.quota.used() <= self.quota.limit(), || {
            format!(
                "{}: {} bytes are used of a limit of {}",
                self.label,
                self.quota.used(),
                self.quota.limit()
            )
        });
        self.store.store.upstream().check(report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(self.store.store.upstream())
    }
}
