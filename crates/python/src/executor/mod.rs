//! The core's scheduler with calls of Python functions as tasks.
//!
//! Tasks are taken and run by threads that are attached to the interpreter; a worker detaches only
//! to rest. So it takes a task when it can run it at once, and until then whoever waits for the
//! task may take it. One attachment runs as many tasks as there are, but lets others in by clock.

mod admission;
mod call;
pub(crate) mod future;
pub(crate) mod limits;
mod maker;
pub(crate) mod pool;
mod queueing;
pub(crate) mod rehearsal;
pub(crate) mod results;
mod wait;
pub(crate) mod worker;

use admission::Bound as Admission;
use call::Call;
use future::{CancelledError, Future, Outcome};
use moirai_core::executor::handle::Handle;
use moirai_core::executor::latency::Histogram;
use moirai_core::executor::timer::Timer;
use moirai_core::executor::{Scheduler, Worker, task};
use moirai_core::os::now_nanoseconds;
use moirai_core::sync::{AtomicBool, AtomicU64, Ordering, spin};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

type Task = task::Task<Call>;
/// What queues and futures have of a task.
type TaskHandle = Handle<Call>;
type Queue = Scheduler<TaskHandle>;

/// What an executor, its workers and its futures share.
pub(crate) struct Shared {
    scheduler: Arc<Queue>,
    /// Whether a thread that is no worker may run the task that it waits for.
    outsiders_help: bool,
    /// Whether a worker could not be set up, so that nothing is run any more.
    broken: AtomicBool,
    /// Whether this process is a child of the one whose workers these are.
    inherited: AtomicBool,
    /// How many tasks may wait to begin, if that is limited.
    bound: Option<Admission>,
    /// Futures of tasks with a time limit, from their queueing to their end.
    timer: Timer<Py<Future>>,
    /// Of each worker, and last of all other threads, if that is measured.
    latencies: Option<Vec<Latency>>,
    tally: Tally,
}

/// Read by reports only.
#[derive(Default)]
struct Tally {
    submitted: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    /// Of those that ended, the ones that a waiting thread ran.
    helped: AtomicU64,
    /// Of those that failed, the ones that took too long.
    timed_out: AtomicU64,
    /// Of those that ended, the ones that their submitter ran for want of room.
    ran_by_submitter: AtomicU64,
    /// Tasks that were not queued for want of room.
    refused: AtomicU64,
}

/// How long the tasks of one worker waited for their start, and took then.
#[derive(Default)]
struct Latency {
    waits: Histogram,
    runs: Histogram,
}

impl Shared {
    fn new(
        scheduler: Arc<Queue>,
        outsiders_help: bool,
        bound: Option<Admission>,
        measures_latency: bool,
    ) -> Self {
        let each = || (0..=scheduler.worker_count()).map(|_| Latency::default());
        let latencies = measures_latency.then(|| each().collect());
        Shared {
            scheduler,
            outsiders_help,
            broken: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            bound,
            timer: Timer::default(),
            latencies,
            tally: Tally::default(),
        }
    }

    fn is_inherited(&self) -> bool {
        self.inherited.load(Ordering::Relaxed)
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Take no more calls; what is queued is still run.
    fn close(&self) {
        self.scheduler.close();
        if let Some(bound) = &self.bound {
            bound.close();
        }
        self.timer.close();
    }

    /// Take a task, which does not wait any more.
    #[inline]
    fn claim(&self, task: &Task) -> Option<Call> {
        let call = task.claim();
        if call.is_some() {
            self.give_room(1);
        }
        call
    }

    /// So many tasks do not wait any more.
    #[inline]
    fn give_room(&self, count: usize) {
        if let Some(bound) = &self.bound {
            bound.give_back(count);
        }
    }

    /// A task ended that is still in some queue.
    fn died(&self) {
        self.scheduler.died(|task| !task.is_pending());
    }
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
    static WORKER: RefCell<Option<Rc<Worker<TaskHandle>>>> = const { RefCell::new(None) };
    /// Whose task this thread is running, if any, and how many it runs within each other.
    static RUNNING: Cell<(*const Shared, u32)> = const { Cell::new((std::ptr::null(), 0)) };
}

/// The worker that this thread is, if it is one of `shared`.
fn current_worker(shared: &Shared) -> Option<Rc<Worker<TaskHandle>>> {
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
    /// Nothing: its deadline has passed.
    Expired,
    Done,
    /// It is done, and the whole program is asked to stop.
    Interrupted(PyErr),
}

/// The future of a task that nobody has taken.
fn future_of(py: Python<'_>, shared: &Shared, task: &Task) -> Option<Py<Future>> {
    let call = shared.claim(task)?;
    let future = call.future().clone_ref(py);
    drop(call);
    Some(future)
}

/// Make the call of a task, unless somebody else does.
#[inline]
fn run(py: Python<'_>, shared: &Shared, task: &Task, worker: Option<usize>) -> Ran {
    let Some(call) = shared.claim(task) else {
        return Ran::Late;
    };
    if let Some(worker) = worker {
        task.run_by(worker);
        shared.scheduler.began(worker);
    }
    perform(py, shared, call, worker)
}

/// Make a call that nobody else has, unless its deadline has passed. Who is called back at its end is
/// a part of the task.
fn perform(py: Python<'_>, shared: &Shared, call: Call, worker: Option<usize>) -> Ran {
    running(shared, || {
        let latencies = shared.latencies.as_deref();
        let latency =
            latencies.map(|all| (&all[worker.unwrap_or(all.len() - 1)], now_nanoseconds()));
        if let Some(limits) = call.future().get().limits()
            && !limits.begin(shared)
        {
            let future = call.into_future();
            let counts = [&shared.tally.failed, &shared.tally.timed_out];
            let slf = future.bind(py);
            slf.get().finish(slf, limits::not_begun(py), &counts);
            return Ran::Expired;
        }
        let outcome = call.make(py);
        if let Some((latency, started)) = latency {
            latency
                .waits
                .add(started.saturating_sub(call.asked_nanoseconds()));
            latency.runs.add(now_nanoseconds() - started);
        }
        let future = call.into_future();
        end(py, shared, future.bind(py), outcome)
    })
}

/// Store what came of a call, count it and tell; unless its time was over before.
fn end(
    py: Python<'_>,
    shared: &Shared,
    slf: &Bound<'_, Future>,
    outcome: PyResult<Py<PyAny>>,
) -> Ran {
    let future = slf.get();
    let mut ran = Ran::Done;
    let (outcome, count) = match outcome {
        Ok(value) => (Outcome::Value(value), &shared.tally.succeeded),
        Err(error) => {
            if error.is_instance_of::<PyKeyboardInterrupt>(py) {
                ran = Ran::Interrupted(error.clone_ref(py));
            }
            if future.task().is_asked_to_end() && error.is_instance_of::<CancelledError>(py) {
                (Outcome::Cancelled, &shared.tally.cancelled)
            } else {
                let error = error.into_value(py).into_any();
                (Outcome::Failure(error), &shared.tally.failed)
            }
        }
    };
    match limits::overdue(py, future) {
        None => future.finish(slf, outcome, &[count]),
        Some(late) => {
            drop(outcome);
            let counts = [&shared.tally.failed, &shared.tally.timed_out];
            future.finish(slf, late, &counts)
        }
    };
    ran
}
