//! The core's scheduler with calls of Python functions as tasks.
//!
//! Tasks are taken and run by threads that are attached to the interpreter; a worker detaches only
//! to rest. So it takes a task when it can run it at once, and until then whoever waits for the
//! task may take it. One attachment runs as many tasks as there are, but lets others in by clock.

mod call;
pub(crate) mod future;
pub(crate) mod pool;
mod wait;

use call::Call;
use moirai_core::executor::{Scheduler, Worker, task};
use moirai_core::os::now_nanoseconds;
use moirai_core::sync::{AtomicBool, AtomicU64, Ordering, spin};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

type Task = task::Task<Call>;
type Queue = Scheduler<Arc<Task>>;

/// What an executor, its workers and its futures share.
pub(crate) struct Shared {
    scheduler: Arc<Queue>,
    /// Whether a thread that is no worker may run the task that it waits for.
    outsiders_help: bool,
    /// Whether a worker could not be set up, so that nothing is run any more.
    broken: AtomicBool,
    /// Whether this process is a child of the one whose workers these are.
    inherited: AtomicBool,
    tally: Tally,
}

/// Read by reports only, so `Relaxed` suffices.
#[derive(Default)]
struct Tally {
    submitted: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    /// Of those that ended, the ones that a waiting thread ran.
    helped: AtomicU64,
}

impl Shared {
    fn new(scheduler: Arc<Queue>, outsiders_help: bool) -> Self {
        Shared {
            scheduler,
            outsiders_help,
            broken: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            tally: Tally::default(),
        }
    }

    fn is_inherited(&self) -> bool {
        self.inherited.load(Ordering::Relaxed)
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// A task ended that is still in some queue.
    fn died(&self) {
        self.scheduler.died(|task| !task.is_pending());
    }
}

fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// Let a thread that is about to leave the interpreter leave it, before one asks for it: who asks
/// while another has it sleeps, which takes ten times as long as this.
fn let_leave(nanoseconds: u64) {
    let until = now_nanoseconds() + nanoseconds;
    while now_nanoseconds() < until {
        spin(0);
    }
}

thread_local! {
    /// The worker that this thread is.
    static WORKER: RefCell<Option<Rc<Worker<Arc<Task>>>>> = const { RefCell::new(None) };
    /// Whose task this thread is running, if any, and how many it runs within each other.
    static RUNNING: Cell<(*const Shared, u32)> = const { Cell::new((std::ptr::null(), 0)) };
}

/// The worker that this thread is, if it is one of `shared`.
fn current_worker(shared: &Shared) -> Option<Rc<Worker<Arc<Task>>>> {
    WORKER.with_borrow(|worker| {
        let worker = worker.as_ref()?;
        std::ptr::eq(&**worker.scheduler(), &*shared.scheduler).then(|| Rc::clone(worker))
    })
}

/// Run `body` as a part of running a task of `shared`.
fn running<R>(shared: &Shared, body: impl FnOnce() -> R) -> R {
    struct Restore((*const Shared, u32));
    impl Drop for Restore {
        fn drop(&mut self) {
            RUNNING.set(self.0);
        }
    }
    let before = RUNNING.get();
    let _restore = Restore(before);
    RUNNING.set((shared, before.1 + 1));
    body()
}

/// What came of running a task.
enum Ran {
    /// Nothing: somebody else has it, or it is over.
    Late,
    Done,
    /// It is done, and the whole program is asked to stop.
    Interrupted(PyErr),
}

/// Make the call of a task, unless somebody else does.
fn run(py: Python<'_>, shared: &Shared, task: &Task, worker: Option<usize>) -> Ran {
    let Some(call) = task.claim() else {
        return Ran::Late;
    };
    if let Some(worker) = worker {
        task.run_by(worker);
    }
    let outcome = running(shared, || call.make(py));
    let mut ran = Ran::Done;
    match &outcome {
        Ok(_) => add(&shared.tally.succeeded),
        Err(error) => {
            add(&shared.tally.failed);
            if error.is_instance_of::<PyKeyboardInterrupt>(py) {
                ran = Ran::Interrupted(error.clone_ref(py));
            }
        }
    }
    let future = call.into_future();
    future.get().finish(future.bind(py), outcome);
    ran
}
