//! What a worker's thread does: run what there is, then rest.

use super::future::Outcome;
use super::queueing::{BROKEN, BrokenThreadPool};
use super::{Ran, Shared, TaskHandle, WORKER, future_of, let_leave, run};
use moirai_core::executor::{Rest, Worker};
use moirai_core::sync::Ordering;
use pyo3::prelude::*;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a worker keeps the interpreter while others may want it. Python code lets others in
/// by itself; functions written in C do not.
const KEEP: Duration = Duration::from_millis(1);
/// What a thread takes from queueing a task to waiting for it.
const SUBMITTER_LEAVES_NANOSECONDS: u64 = 1_500;
/// Tasks between two looks at the clock.
const CLOCK_TURNS: u32 = 32;

/// What a worker's thread has of an executor: not the object, which may go before it.
#[pyclass(frozen, module = "moirai.executor")]
pub struct WorkerHandle {
    pub(super) shared: Arc<Shared>,
    /// The start that it is for.
    pub(super) start: u64,
}

#[pymethods]
impl WorkerHandle {
    /// Take no more calls; as `BareExecutor.close`.
    fn close(&self) {
        self.shared.close();
    }

    /// Be the worker `who` until the executor is closed and nothing is queued.
    fn work(&self, py: Python<'_>, who: usize) -> PyResult<()> {
        let shared = &self.shared;
        let Some(worker) = shared.scheduler.enter(who, self.start) else {
            return Ok(());
        };
        let worker = Rc::new(worker);
        WORKER.set(Some(Rc::clone(&worker)));
        let done = work(py, shared, &worker);
        WORKER.set(None);
        done
    }

    /// A worker cannot be set up: whatever is queued fails, and nothing more is taken.
    fn give_up(&self, py: Python<'_>) {
        let shared = &self.shared;
        shared.broken.store(true, Ordering::Release);
        shared.close();
        for task in shared.scheduler.take_all() {
            if let Some(future) = future_of(py, shared, &task) {
                let failure = BrokenThreadPool::new_err(BROKEN).into_value(py);
                let outcome = Outcome::Failure(failure.into_any());
                let slf = future.bind(py);
                future.get().finish(slf, outcome, &[&shared.tally.failed]);
            }
        }
    }
}

fn work(py: Python<'_>, shared: &Arc<Shared>, worker: &Worker<TaskHandle>) -> PyResult<()> {
    loop {
        if worker.take_seat() {
            run_all(py, shared, worker);
            worker.leave_seat();
        }
        if shared.is_inherited() {
            return Ok(());
        }
        let (who, mut look_nanoseconds) = (worker.index(), worker.begin_rest());
        let rest = py.detach(|| {
            let rest = shared.scheduler.rest(who, &mut look_nanoseconds);
            let_leave(SUBMITTER_LEAVES_NANOSECONDS);
            rest
        });
        worker.end_rest(rest, look_nanoseconds);
        if rest == Rest::Closed {
            return Ok(());
        }
    }
}

/// Run what there is, letting others have the interpreter by clock.
fn run_all(py: Python<'_>, shared: &Arc<Shared>, worker: &Worker<TaskHandle>) {
    let mut since = Instant::now();
    let mut turn = 0;
    while let Some(task) = worker.take() {
        if matches!(run(py, shared, &task, Some(worker.index())), Ran::Late) {
            shared.scheduler.buried();
        }
        drop(task);
        if shared.is_inherited() || shared.scheduler.is_crowded() {
            return;
        }
        turn += 1;
        if turn % CLOCK_TURNS == 0 && since.elapsed() > KEEP {
            py.detach(|| {});
            since = Instant::now();
        }
    }
}
