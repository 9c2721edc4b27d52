//! Counted references to tasks, whose memory is kept for the next ones.
//!
//! A task's memory comes from a stock of the thread that makes it, and goes to that of the thread
//! that drops the last reference. Stocks trade by the pack, through a place that all threads share:
//! who queues has none, and who runs has too many. What does not fit there goes back to the heap.

use super::task::Task;
use crate::resource::fork;
use crate::sync::{AtomicUsize, Lock, Ordering, fence};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

/// What the memory of any task fits in, its count included.
const BLOCK: Layout = match Layout::from_size_align(96, 8) {
    Ok(layout) => layout,
    Err(_) => unreachable!(),
};
/// Blocks that stocks trade at once. A stock has up to twice as many.
const PACK: usize = 64;
/// Packs in the shared place, at most: about 800 KiB.
const MOST_PACKS: usize = 128;

struct Slot<C> {
    /// How many handles there are. As in `Arc`: `Relaxed` to add, `Release` to take away, and
    /// `Acquire` before the last one drops the task.
    count: AtomicUsize,
    task: Task<C>,
}

/// One of the references to a task. The last one that is dropped drops the task.
pub struct Handle<C>(NonNull<Slot<C>>);

// SAFETY: as of `Arc`: the task is shared, and dropped by any of the threads that have a handle.
unsafe impl<C: Send> Send for Handle<C> {}
// SAFETY: as above; `Task<C>` is `Sync` for such a `C`.
unsafe impl<C: Send> Sync for Handle<C> {}

impl<C> Handle<C> {
    /// The first reference to a task.
    #[inline]
    pub fn new(task: Task<C>) -> Self {
        Handle(Self::place(task, 1))
    }

    /// The first two references to a task: for a queue, and for who waits for it.
    #[inline]
    pub fn pair(task: Task<C>) -> (Self, Self) {
        let slot = Self::place(task, 2);
        (Handle(slot), Handle(slot))
    }

    #[inline]
    fn place(task: Task<C>, count: usize) -> NonNull<Slot<C>> {
        const { assert!(size_of::<Slot<C>>() <= BLOCK.size() && align_of::<Slot<C>>() <= BLOCK.align()) };
        let slot = take_block().cast();
        let count = AtomicUsize::new(count);
        // SAFETY: a block is as large and aligned as a slot, and nobody else's.
        unsafe { slot.write(Slot { count, task }) };
        slot
    }

    /// Whether two are references to the same task.
    #[inline]
    pub fn is(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    #[inline]
    fn slot(&self) -> &Slot<C> {
        // SAFETY: it lives as long as a handle does.
        unsafe { self.0.as_ref() }
    }
}

impl<C> Clone for Handle<C> {
    #[inline]
    fn clone(&self) -> Self {
        let before = self.slot().count.fetch_add(1, Ordering::Relaxed);
        debug_assert!(before > 0 && before < usize::MAX / 2);
        Handle(self.0)
    }
}

impl<C> Deref for Handle<C> {
    type Target = Task<C>;

    #[inline]
    fn deref(&self) -> &Task<C> {
        &self.slot().task
    }
}

impl<C> Drop for Handle<C> {
    #[inline]
    fn drop(&mut self) {
        if self.slot().count.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        // SAFETY: this was the last handle, so nobody else refers to the slot any more.
        unsafe { self.0.drop_in_place() };
        keep_block(self.0.cast());
    }
}

/// A block that nobody uses.
struct Block(NonNull<u8>);

// SAFETY: memory by itself belongs to no thread.
unsafe impl Send for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and nobody uses it.
        unsafe { dealloc(self.0.as_ptr(), BLOCK) };
    }
}

/// What a thread keeps; given to the others when it ends.
struct Stock(Vec<Block>);

thread_local! {
    static STOCK: RefCell<Stock> = const { RefCell::new(Stock(Vec::new())) };
}

type Packs = Lock<Vec<Vec<Block>>>;

/// What threads have given away.
fn shared() -> &'static Arc<Packs> {
    static SHARED: OnceLock<Arc<Packs>> = OnceLock::new();
    SHARED.get_or_init(|| fork::shared(Lock::new(Vec::new())))
}

#[inline]
fn take_block() -> NonNull<u8> {
    // Gone while the thread ends.
    let kept = STOCK.try_with(|stock| stock.borrow_mut().take());
    match kept {
        Ok(Some(block)) => block,
        _ => new_block(),
    }
}

#[cold]
fn new_block() -> NonNull<u8> {
    // SAFETY: the layout is not empty.
    let block = unsafe { alloc(BLOCK) };
    NonNull::new(block).unwrap_or_else(|| handle_alloc_error(BLOCK))
}

#[inline]
fn keep_block(block: NonNull<u8>) {
    let mut block = Some(Block(block));
    let _gone = STOCK.try_with(|stock| {
        if let Some(block) = block.take() {
            stock.borrow_mut().keep(block);
        }
    });
    // What could not be kept is dropped.
}

impl Stock {
    #[inline]
    fn take(&mut self) -> Option<NonNull<u8>> {
        if self.0.is_empty() {
            self.fetch();
        }
        let block = self.0.pop()?;
        let memory = block.0;
        std::mem::forget(block);
        Some(memory)
    }

    #[inline]
    fn keep(&mut self, block: Block) {
        if self.0.len() == 2 * PACK {
            self.give(PACK);
        }
        self.0.push(block);
    }

    #[cold]
    fn fetch(&mut self) {
        if let Some(pack) = shared().lock().pop() {
            self.0.extend(pack);
        }
    }

    #[cold]
    fn give(&mut self, count: usize) {
        let pack = self.0.split_off(self.0.len() - count);
        let mut packs = shared().lock();
        if packs.len() < MOST_PACKS {
            packs.push(pack);
            return;
        }
        drop(packs);
        drop(pack);
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            self.give(self.0.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, MutexGuard};

    /// One test at a time: all threads share the place for packs.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    struct Dropped(Arc<AtomicUsize>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_last_of_several_threads_drops_the_task_once() {
        let _alone = alone();
        let count = Arc::new(AtomicUsize::new(0));
        let handles: Vec<_> = (0..1000)
            .map(|_| Handle::new(Task::new(Dropped(Arc::clone(&count)))))
            .collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let handles = handles.clone();
                scope.spawn(move || drop(handles));
            }
            drop(handles);
        });
        assert_eq!(count.load(Ordering::SeqCst), 1000);
    }

    #[test]
    fn a_pair_is_two_references_to_one_task() {
        let _alone = alone();
        let count = Arc::new(AtomicUsize::new(0));
        let (one, other) = Handle::pair(Task::new(Dropped(Arc::clone(&count))));
        assert!(one.is(&other));
        drop(one);
        assert_eq!(count.load(Ordering::SeqCst), 0);
        drop(other);
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn memory_of_a_task_that_is_gone_is_the_next_ones() {
        let _alone = alone();
        // In a thread of its own, whose stock is empty at first.
        std::thread::spawn(|| {
            let first = Handle::new(Task::new(1));
            let place = first.0;
            drop(first);
            let next = Handle::new(Task::new(2));
            assert_eq!(next.0, place);
            assert_eq!(next.claim(), Some(2));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_one_thread_drops_another_uses() {
        let _alone = alone();
        let place = |handle: &Handle<usize>| handle.0.as_ptr() as usize;
        let make = || -> Vec<_> {
            (0..10 * PACK)
                .map(|it| Handle::new(Task::new(it)))
                .collect()
        };
        std::thread::spawn(move || {
            let made = make();
            let before: Vec<_> = made.iter().map(place).collect();
            std::thread::spawn(move || drop(made)).join().unwrap();
            assert!(make().iter().map(place).any(|it| before.contains(&it)));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_stock_stays_small_and_the_shared_place_too() {
        let _alone = alone();
        let many = 4 * PACK * MOST_PACKS;
        let made: Vec<_> = (0..many).map(|it| Handle::new(Task::new(it))).collect();
        drop(made);
        STOCK.with(|stock| assert!(stock.borrow().0.len() <= 2 * PACK));
        assert!(shared().lock().len() <= MOST_PACKS);
    }
}
