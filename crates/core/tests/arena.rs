//! Arenas and transactions against a plain model: what a view shows is never handed out twice.

#![cfg(not(loom))]

use moirai_core::error::{Error, Result};
use moirai_core::resource::adaptor::Adaptor;
use moirai_core::resource::arena::{ArenaResource, Savepoint, ThreadLocalArena, allocate_batch};
use moirai_core::resource::large_object::LargeObjectResource;
use moirai_core::resource::limit::LimitAdaptor;
use moirai_core::resource::system::SystemResource;
use moirai_core::resource::transaction::{Terms, TransactionArena, TransactionStore};
use moirai_core::resource::{Block, HealthReport, Ownership, Request, Resource};
use proptest::prelude::*;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

const CHUNK: usize = 8192;

fn large() -> Arc<dyn Resource> {
    Arc::new(LargeObjectResource::new(Default::default()).unwrap())
}

fn arena() -> ArenaResource {
    ArenaResource::new(large(), CHUNK).unwrap()
}

fn bytes(size: usize) -> Request {
    Request::bytes(size).unwrap()
}

fn healthy(resource: &dyn Resource) -> HealthReport {
    let mut report = HealthReport::default();
    resource.check(&mut report);
    assert_eq!(report.findings, Vec::<String>::new());
    let counts = resource.statistics();
    assert_eq!(counts.hits + counts.misses, counts.total_count);
    assert!(counts.peak_bytes >= counts.current_bytes);
    assert!(counts.cached_bytes <= counts.resident_bytes);
    report
}

fn count_of(report: &HealthReport, name: &str) -> u64 {
    let found = report.counts.iter().find(|(key, _)| key == name);
    found.unwrap_or_else(|| panic!("{name} is reported")).1
}

/// A live block with a byte of its own in it.
struct Held {
    block: Block,
    size: usize,
    mark: u8,
    since: u64,
    retired: bool,
}

// SAFETY: a block is plain memory, and whoever holds this is its only user.
unsafe impl Send for Held {}

impl Held {
    fn new(resource: &dyn Resource, size: usize, mark: u8) -> Result<Self> {
        let block = resource.allocate(bytes(size))?;
        let held = Held {
            block,
            size,
            mark,
            since: 0,
            retired: false,
        };
        // SAFETY: a live block of at least `size` bytes.
        unsafe { block.address.write_bytes(mark, size) };
        Ok(held)
    }

    fn intact(&self) -> bool {
        let start = self.block.address.as_ptr();
        // SAFETY: a live block whose first `size` bytes were written.
        let content = unsafe { std::slice::from_raw_parts(start, self.size) };
        content.iter().all(|byte| *byte == self.mark)
    }

    fn free(self, resource: &dyn Resource) {
        assert!(self.intact(), "a block was overwritten");
        // SAFETY: a live block.
        let freed = unsafe { resource.deallocate(self.block.address) };
        assert_eq!(freed, self.block.size);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(usize),
    Save,
    Rollback { which: usize, retire: bool },
    Forget(usize),
    Reset { retire: bool },
    Trim,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![8 => 1usize..300, 3 => 300usize..5000, 1 => 5000usize..20_000];
    prop_oneof![
        10 => size.prop_map(Step::Allocate),
        8 => any::<usize>().prop_map(Step::Free),
        3 => Just(Step::Save),
        3 => (any::<usize>(), any::<bool>())
            .prop_map(|(which, retire)| Step::Rollback { which, retire }),
        1 => any::<usize>().prop_map(Step::Forget),
        1 => any::<bool>().prop_map(|retire| Step::Reset { retire }),
        1 => Just(Step::Trim),
    ]
}

/// What the arena must answer, from a list of blocks.
#[derive(Default)]
struct Model {
    held: Vec<Held>,
    savepoints: Vec<(Savepoint, u64)>,
    time: u64,
}

impl Model {
    fn live_since(&self, time: u64) -> u64 {
        let since = self.held.iter().filter(|held| held.since >= time);
        since.filter(|held| !held.retired).count() as u64
    }

    fn retire_since(&mut self, time: u64) {
        for held in &mut self.held {
            held.retired |= held.since >= time;
        }
    }

    fn check_refusal(outcome: &Result<u64>, live: u64) {
        let Err(Error::InvalidArgument { argument, message }) = outcome else {
            panic!("live blocks are in the way, got {outcome:?}");
        };
        assert_eq!(*argument, "retire");
        assert!(message.contains(&format!("{live} block")), "{message}");
    }

    fn take(&mut self, arena: &ArenaResource, step: Step) {
        self.time += 1;
        match step {
            Step::Allocate(size) => {
                let mut held = Held::new(arena, size, (self.time % 251) as u8 + 1).unwrap();
                held.since = self.time;
                self.held.push(held);
            }
            Step::Free(which) if !self.held.is_empty() => {
                let which = which % self.held.len();
                self.held.swap_remove(which).free(arena);
            }
            Step::Save => self.savepoints.push((arena.savepoint(), self.time)),
            Step::Rollback { which, retire } if !self.savepoints.is_empty() => {
                let which = which % self.savepoints.len();
                let since = self.savepoints[which].1;
                let live = self.live_since(since);
                let outcome = arena.rollback(&self.savepoints[which].0, retire);
                if live > 0 && !retire {
                    Self::check_refusal(&outcome, live);
                    return;
                }
                assert_eq!(outcome, Ok(live));
                self.retire_since(since);
                for (ended, _) in self.savepoints.drain(which + 1..) {
                    let refused = arena.rollback(&ended, true);
                    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
                }
            }
            Step::Forget(which) if !self.savepoints.is_empty() => {
                let which = which % self.savepoints.len();
                self.savepoints.remove(which);
            }
            Step::Reset { retire } => {
                let live = self.live_since(0);
                let outcome = arena.reset(retire);
                if live > 0 && !retire {
                    Self::check_refusal(&outcome, live);
                    return;
                }
                assert_eq!(outcome, Ok(live));
                self.retire_since(0);
                self.savepoints.clear();
            }
            Step::Trim => {
                arena.trim(0);
            }
            _ => {}
        }
    }

    fn holds(&self, arena: &ArenaResource) {
        let report = healthy(arena);
        let retired = self.held.iter().filter(|held| held.retired).count() as u64;
        assert_eq!(count_of(&report, "arena.retired_blocks"), retired);
        assert_eq!(
            count_of(&report, "arena.savepoints"),
            self.savepoints.len() as u64
        );
        let counts = arena.statistics();
        assert_eq!(counts.current_count, self.held.len() as u64);
        let block_bytes: usize = self.held.iter().map(|held| held.block.size).sum();
        assert_eq!(counts.current_bytes, block_bytes as u64);
        for held in &self.held {
            assert_eq!(arena.owns(held.block.address), Ownership::Yes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn an_arena_does_what_a_list_of_blocks_says(
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let arena = arena();
        let mut model = Model::default();
        for step in steps {
            model.take(&arena, step);
            model.holds(&arena);
        }
        for held in model.held.drain(..) {
            held.free(&arena);
        }
        model.holds(&arena);
        model.savepoints.clear();
        prop_assert_eq!(arena.reset(false), Ok(0));
        arena.trim(0);
        prop_assert_eq!(arena.statistics().cached_bytes, 0);
    }
}

#[test]
fn a_reset_keeps_its_chunks_warm() {
    let arena = arena();
    // Fifteen to a chunk, so that every chunk is used whole.
    let hold = |mark| -> Vec<Held> {
        let held = (0..105).map(|_| Held::new(&arena, 500, mark).unwrap());
        held.collect()
    };
    for held in hold(1) {
        held.free(&arena);
    }
    assert_eq!(arena.reset(false), Ok(0));
    let before = arena.statistics();
    let again = hold(2);
    let after = arena.statistics();
    assert_eq!(after.hits - before.hits, 105);
    assert_eq!(
        after.resident_bytes, before.resident_bytes,
        "no chunk was drawn"
    );
    assert!(again.iter().all(|held| held.block.reused));
    for held in again {
        held.free(&arena);
    }
}

#[test]
fn a_rollback_goes_back_to_the_very_place() {
    let arena = arena();
    let kept = Held::new(&arena, 100, 1).unwrap();
    let savepoint = arena.savepoint();
    let place = |arena: &ArenaResource| {
        let held = Held::new(arena, 3000, 2).unwrap();
        let address = held.block.address;
        let later: Vec<Held> = (0..20)
            .map(|_| Held::new(arena, 3000, 3).unwrap())
            .collect();
        for held in later.into_iter().chain([held]) {
            held.free(arena);
        }
        address
    };
    let first = place(&arena);
    assert_eq!(arena.rollback(&savepoint, false), Ok(0));
    assert_eq!(place(&arena), first);
    kept.free(&arena);
}

#[test]
fn retired_chunks_go_upstream_when_their_last_view_dies() {
    let upstream: Arc<dyn Resource> = Arc::new(SystemResource::new());
    let arena = ArenaResource::new(Arc::clone(&upstream), CHUNK).unwrap();
    let held: Vec<Held> = (0..40)
        .map(|_| Held::new(&arena, 1000, 7).unwrap())
        .collect();
    assert_eq!(arena.reset(true), Ok(40));
    let new = Held::new(&arena, 1000, 8).unwrap();
    let old: Vec<usize> = held
        .iter()
        .map(|held| held.block.address.as_ptr() as usize)
        .collect();
    assert!(!old.contains(&(new.block.address.as_ptr() as usize)));
    let chunks_before = upstream.statistics().current_count;
    assert!(chunks_before > 1);
    for held in held {
        held.free(&arena);
    }
    assert_eq!(
        upstream.statistics().current_count,
        1,
        "only the new chunk is left"
    );
    assert_eq!(
        arena
            .reset(false)
            .map_err(|error| error.to_string())
            .unwrap_err(),
        "retire: must be true while views keep blocks alive, got false: 1 block is alive"
    );
    new.free(&arena);
    healthy(&arena);
}

#[test]
fn a_wrong_free_is_counted_and_harmless() {
    let arena = arena();
    let held = Held::new(&arena, 200, 1).unwrap();
    let long = Held::new(&arena, 130 * 64, 2).unwrap();
    for block in [held.block, long.block] {
        for offset in [1, 63, 64, 128] {
            // SAFETY: inside a live block; not dereferenced by an arena, which refuses it.
            let inner = unsafe { block.address.add(offset) };
            assert_eq!(arena.owns(inner), Ownership::No);
            // SAFETY: refused.
            assert_eq!(unsafe { arena.deallocate(inner) }, 0);
        }
    }
    let local = 0u8;
    assert_eq!(arena.owns(NonNull::from(&local)), Ownership::No);
    assert_eq!(arena.owns(NonNull::dangling()), Ownership::No);
    // SAFETY: refused.
    let taken = unsafe { arena.take_back(NonNull::from(&local).cast()) };
    assert_eq!(taken, None);
    let address = held.block.address;
    held.free(&arena);
    // SAFETY: refused: it is free already.
    assert_eq!(unsafe { arena.deallocate(address) }, 0);
    assert_eq!(arena.statistics().invalid_frees, 9);
    long.free(&arena);
    healthy(&arena);
}

#[test]
fn a_savepoint_of_another_arena_is_refused_by_name() {
    let [arena, other] = [(); 2].map(|()| arena());
    let refused = arena.rollback(&other.savepoint(), true).unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("savepoint: must be one of this arena")
    );
}

#[test]
fn chunk_sizes_are_checked() {
    for wrong in [0, (512 << 20) + 1, usize::MAX] {
        let refused = ArenaResource::new(large(), wrong).err().unwrap();
        assert!(
            refused.to_string().contains(&format!("got {wrong}")),
            "{refused}"
        );
    }
    let largest = ArenaResource::new(large(), 512 << 20).unwrap();
    let held = Held::new(&largest, 1000, 1).unwrap();
    held.free(&largest);
}

#[test]
fn a_count_that_is_full_is_counted_and_goes_on() {
    let arena = ArenaResource::new(large(), 64 << 20).unwrap();
    let blocks: Vec<Block> = (0..70_000)
        .map(|_| arena.allocate(bytes(64)).unwrap())
        .collect();
    assert_eq!(arena.statistics().current_count, 70_000);
    for block in blocks {
        // SAFETY: a live block.
        unsafe { arena.deallocate(block.address) };
    }
    assert_eq!(arena.statistics().peak_count, 70_000);
    healthy(&arena);
}

#[test]
fn a_batch_is_one_block_of_many() {
    let arena: Arc<dyn Resource> = Arc::new(arena());
    let batch = allocate_batch(Arc::clone(&arena), 1000, 100, true).unwrap();
    assert_eq!((batch.stride, arena.statistics().current_count), (128, 1));
    drop(batch);
    assert_eq!(arena.statistics().current_count, 0);
    for (count, size) in [(usize::MAX, 64), (2, usize::MAX), (usize::MAX, usize::MAX)] {
        let refused = allocate_batch(Arc::clone(&arena), count, size, false).err();
        assert!(matches!(refused, Some(Error::OutOfMemory { .. })));
    }
}

// ---- upstream that fails ----

/// Grants a number of blocks, then refuses.
struct Failing {
    upstream: Arc<dyn Resource>,
    grants: AtomicUsize,
}

impl Failing {
    fn new(grants: usize) -> Arc<Self> {
        Arc::new(Failing {
            upstream: Arc::new(SystemResource::new()),
            grants: AtomicUsize::new(grants),
        })
    }
}

impl Adaptor for Failing {
    fn title(&self) -> &'static str {
        "Failing"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
        let granted = self
            .grants
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        granted.map_err(|_| Error::out_of_memory(request.size(), "the test says so"))?;
        self.upstream.allocate(request)
    }
}

#[test]
fn a_refusal_of_upstream_changes_nothing_wherever_it_comes() {
    let sizes = [100, 3000, 3000, 20_000, 5000, 64, 9000, 2000, 4000, 300];
    for grants in 0..12 {
        let upstream = Failing::new(grants);
        let arena = ArenaResource::new(upstream.clone(), CHUNK).unwrap();
        let savepoint = arena.savepoint();
        let mut held = Vec::new();
        for size in sizes {
            let before = arena.statistics();
            match Held::new(&arena, size, held.len() as u8) {
                Ok(block) => held.push(block),
                Err(error) => {
                    assert!(matches!(error, Error::OutOfMemory { .. }));
                    assert_eq!(arena.statistics(), before);
                }
            }
            healthy(&arena);
        }
        assert_eq!(arena.rollback(&savepoint, true), Ok(held.len() as u64));
        for block in held {
            block.free(&arena);
        }
        healthy(&arena);
        drop(savepoint);
        drop(arena);
        assert_eq!(
            upstream.statistics().current_count,
            0,
            "everything went back"
        );
    }
}

/// A limit that, before it refuses, has the program free blocks of the very arena that asks.
#[test]
fn upstream_may_free_blocks_of_the_arena_while_it_is_asked() {
    static ARENA: OnceLock<Weak<ArenaResource>> = OnceLock::new();
    static SPARE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
    let on_limit = || {
        let arena = ARENA.get().and_then(Weak::upgrade);
        for address in SPARE.lock().unwrap().drain(..) {
            let address = NonNull::new(address as *mut u8).unwrap();
            // SAFETY: live blocks that the test left for this.
            unsafe { arena.as_ref().unwrap().deallocate(address) };
        }
    };
    let limit = LimitAdaptor::new(large(), 4 * CHUNK, Box::new(on_limit));
    let arena = Arc::new(ArenaResource::new(Arc::new(limit), CHUNK).unwrap());
    ARENA.set(Arc::downgrade(&arena)).unwrap();
    for _ in 0..32 {
        let block = arena.allocate(bytes(1024)).unwrap();
        SPARE.lock().unwrap().push(block.address.as_ptr() as usize);
    }
    healthy(&*arena);
}

// ---- threads ----

#[test]
fn threads_cut_free_and_go_back_at_once() {
    let arena = Arc::new(ArenaResource::new(large(), 64 << 10).unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (1..4u8)
        .map(|mark| {
            let (arena, stop) = (Arc::clone(&arena), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut held: Vec<Held> = Vec::new();
                let mut turn = 0usize;
                while !stop.load(Ordering::Relaxed) || turn < 2000 {
                    turn += 1;
                    let size = [64, 200, 1500, 9000, 70_000][turn % 5];
                    held.push(Held::new(&*arena, size, mark).unwrap());
                    if held.len() > 20 {
                        held.swap_remove(turn % held.len()).free(&*arena);
                    }
                }
                for block in held {
                    block.free(&*arena);
                }
            })
        })
        .collect();
    let mut retired = 0;
    for turn in 0..3000 {
        let savepoint = arena.savepoint();
        match arena.rollback(&savepoint, turn % 3 == 0) {
            Ok(live) => retired += live,
            Err(error) => assert!(error.to_string().starts_with("retire: "), "{error}"),
        }
        if turn % 500 == 0 {
            healthy(&*arena);
            arena.trim(0);
            retired += arena.reset(true).unwrap();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap();
    }
    let report = healthy(&*arena);
    assert_eq!(count_of(&report, "arena.live_blocks"), 0);
    assert_eq!(arena.reset(false), Ok(0), "{retired} blocks were retired");
}

#[test]
fn every_thread_has_its_own_arena_and_gives_it_back() {
    let arenas = Arc::new(ThreadLocalArena::new(large(), CHUNK).unwrap());
    let (sender, receiver) = std::sync::mpsc::channel();
    for _ in 0..5 {
        let (arenas, sender) = (Arc::clone(&arenas), sender.clone());
        std::thread::spawn(move || {
            let savepoint = arenas.savepoint().unwrap();
            let held: Vec<Held> = (0..30)
                .map(|_| Held::new(&*arenas, 700, 9).unwrap())
                .collect();
            assert!(arenas.rollback(&savepoint, false).is_err());
            sender.send((savepoint, held)).map_err(|_| ()).unwrap();
        })
        .join()
        .unwrap();
    }
    assert_eq!(
        arenas.arena_count(),
        1,
        "one after the other, they shared one"
    );
    drop(sender);
    let mine = Held::new(&*arenas, 700, 1).unwrap();
    for (savepoint, held) in receiver {
        assert!(
            arenas.rollback(&savepoint, true).is_err(),
            "it ended with its thread"
        );
        for block in held {
            block.free(&*arenas);
        }
    }
    healthy(&*arenas);
    mine.free(&*arenas);
    assert_eq!(arenas.reset(false), Ok(0));
    assert_eq!(arenas.statistics().current_count, 0);
}

#[test]
fn a_thread_that_ends_allocates_still() {
    struct Late(Arc<ThreadLocalArena>, Arc<Mutex<Option<Held>>>);
    impl Drop for Late {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = Some(Held::new(&*self.0, 100, 5).unwrap());
        }
    }
    thread_local! {
        static LATE: std::cell::RefCell<Option<Late>> = const { std::cell::RefCell::new(None) };
    }
    let arenas = Arc::new(ThreadLocalArena::new(large(), CHUNK).unwrap());
    let left = Arc::new(Mutex::new(None));
    let late = Late(Arc::clone(&arenas), Arc::clone(&left));
    std::thread::spawn(move || {
        // Made first, so destroyed last, when the thread's arena is gone.
        LATE.with(|slot| *slot.borrow_mut() = Some(late));
        let held = Held::new(
            &*LATE.with(|slot| slot.borrow().as_ref().unwrap().0.clone()),
            10,
            1,
        );
        held.unwrap()
            .free(&*LATE.with(|slot| slot.borrow().as_ref().unwrap().0.clone()));
    })
    .join()
    .unwrap();
    left.lock().unwrap().take().unwrap().free(&*arenas);
    healthy(&*arenas);
}

// ---- transactions ----

fn begin(
    store: &Arc<TransactionStore>,
    limit_bytes: usize,
    parent: Option<&Arc<TransactionArena>>,
) -> Arc<TransactionArena> {
    let terms = Terms {
        first_bytes: 4096,
        limit_bytes,
    };
    TransactionArena::begin(store, terms, "transaction t".into(), parent.cloned()).unwrap()
}

fn store() -> Arc<TransactionStore> {
    TransactionStore::new(large(), 1 << 20, 1).unwrap()
}

#[test]
fn a_transaction_uses_its_limit_to_the_last_byte_and_no_more() {
    let store = store();
    let transaction = begin(&store, 65_536, None);
    let held: Vec<Held> = (0..64)
        .map(|_| Held::new(&*transaction, 1000, 1).unwrap())
        .collect();
    assert_eq!(transaction.used_bytes(), 65_536);
    let refused = Held::new(&*transaction, 1, 1).err().unwrap().to_string();
    assert_eq!(
        refused,
        "cannot allocate 1 bytes: transaction t uses 65536 bytes of a limit of 65536"
    );
    assert_eq!(transaction.wanted_bytes(), 65_600);
    for block in held {
        block.free(&*transaction);
    }
    assert_eq!(transaction.used_bytes(), 0, "every chunk is empty");
    healthy(&*transaction);
}

#[test]
fn a_child_hands_over_what_it_commits_and_takes_back_what_it_rolls_back() {
    let store = store();
    let parent = begin(&store, 1 << 20, None);
    let own = Held::new(&*parent, 1000, 1).unwrap();
    let child = begin(&store, 1 << 19, Some(&parent));
    let given = Held::new(&*child, 2000, 2).unwrap();
    assert_eq!(child.commit(), Ok(1));
    assert_eq!(parent.used_bytes(), 1024 + 2048);
    let other = begin(&store, 1 << 19, Some(&parent));
    let lost = Held::new(&*other, 4000, 3).unwrap();
    assert_eq!(parent.used_bytes(), 1024 + 2048 + 4032);
    assert_eq!(other.rollback(), Ok(1));
    assert_eq!(parent.used_bytes(), 1024 + 2048);
    assert!(own.intact() && given.intact() && lost.intact());
    lost.free(&*other);
    given.free(&*child);
    assert_eq!(parent.used_bytes(), 1024);
    own.free(&*parent);
    assert_eq!(parent.commit(), Ok(0));
    let counts = store.counts();
    assert_eq!(
        (counts.created, counts.commits, counts.rollbacks),
        (3, 2, 1)
    );
    assert_eq!((counts.current_bytes, counts.held_bytes), (0, 0));
    assert_eq!(counts.outliving, 2);
    assert_eq!(counts.peak_bytes, 1024 + 2048 + 4032);
}

#[test]
fn a_child_is_bounded_by_every_limit_above_it() {
    let store = store();
    let parent = begin(&store, 8192, None);
    let child = begin(&store, 1 << 20, Some(&parent));
    let held = Held::new(&*child, 8000, 1).unwrap();
    let refused = Held::new(&*child, 1000, 1).err().unwrap().to_string();
    assert!(refused.contains("of a limit of 8192"), "{refused}");
    assert_eq!((child.used_bytes(), parent.used_bytes()), (8000, 8000));
    held.free(&*child);
    assert_eq!((child.used_bytes(), parent.used_bytes()), (0, 0));
}

#[test]
fn an_ended_transaction_says_how_it_ended() {
    let store = store();
    let (kept, dropped) = (begin(&store, 1 << 20, None), begin(&store, 1 << 20, None));
    assert_eq!((kept.commit(), dropped.rollback()), (Ok(0), Ok(0)));
    let closed = |error: Option<Error>| match error {
        Some(Error::Closed { message }) => message,
        other => panic!("closed, got {other:?}"),
    };
    assert_eq!(
        closed(Held::new(&*kept, 10, 1).err()),
        "transaction t was committed"
    );
    assert_eq!(
        closed(dropped.rollback().err()),
        "transaction t was rolled back"
    );
    let terms = Terms {
        first_bytes: 4096,
        limit_bytes: 4096,
    };
    let inside = TransactionArena::begin(&store, terms, "inside".into(), Some(dropped));
    assert_eq!(closed(inside.err()), "transaction t was rolled back");
    assert_eq!(store.counts().created, 2);
}

#[test]
fn threads_allocate_while_their_transaction_ends() {
    let store = store();
    for turn in 0..200 {
        let parent = begin(&store, 1 << 20, None);
        let child = begin(&store, 1 << 20, Some(&parent));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let child = Arc::clone(&child);
                std::thread::spawn(move || {
                    let mut held = Vec::new();
                    while held.len() < 300 {
                        match Held::new(&*child, 200, 1) {
                            Ok(block) => held.push(block),
                            Err(Error::Closed { .. }) => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    for block in held {
                        block.free(&*child);
                    }
                })
            })
            .collect();
        if turn % 2 == 0 {
            child.rollback().unwrap();
        } else {
            child.commit().unwrap();
        }
        for worker in workers {
            worker.join().unwrap();
        }
        healthy(&*child);
        assert_eq!((child.used_bytes(), parent.used_bytes()), (0, 0));
        parent.rollback().unwrap();
    }
    let counts = store.counts();
    assert_eq!((counts.current_bytes, counts.held_bytes), (0, 0));
}

#[test]
fn a_recording_is_served_by_malloc_as_well() {
    let store = TransactionStore::new(large(), 1 << 20, 2).unwrap();
    assert_eq!(store.compare_with_malloc(), None);
    let recorded = begin(&store, 1 << 20, None);
    let ignored = begin(&store, 1 << 20, None);
    let held: Vec<Held> = (0..100)
        .map(|_| Held::new(&*recorded, 100, 1).unwrap())
        .collect();
    Held::new(&*ignored, 5000, 1).unwrap().free(&*ignored);
    for block in held {
        block.free(&*recorded);
    }
    recorded.commit().unwrap();
    let found = store.compare_with_malloc().unwrap();
    assert_eq!((found.event_count, found.asked_bytes), (200, 10_000));
    assert!(
        found.held_bytes >= 100 * 128 && found.held_bytes < 20_000,
        "{found:?}"
    );
    assert!(
        found.malloc_bytes >= 10_000 && found.malloc_bytes < 12_000,
        "{found:?}"
    );
}
