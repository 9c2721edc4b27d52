//! How a call becomes a queued task: room for it, its future, its place, and a thread if need be.

use super::admission::{Admitted, admit};
use super::call::{Arguments, Call, Request};
use super::future::Future;
use super::limits::{self, TimerHandle};
use super::pool::{BareExecutor, Options};
use super::worker::WorkerHandle;
use super::{RUNNING, Ran, Shared, Task, TaskHandle, current_worker, perform};
use crate::attached::add;
use crate::errors::Closed;
use moirai_core::executor::{Priority, Queued};
use moirai_core::os::{is_first_thread, now_nanoseconds};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::{import_exception, intern};
use std::sync::Arc;

import_exception!(concurrent.futures.thread, BrokenThreadPool);

impl BareExecutor {
    /// A queued task's future.
    pub(super) fn queue(
        &self,
        slf: &Bound<'_, Self>,
        shared: &Arc<Shared>,
        request: Request,
        options: &Options,
    ) -> PyResult<Py<Future>> {
        let py = slf.py();
        if shared.scheduler.is_closed() {
            return Err(refusal(shared));
        }
        let deadline = options.terms.deadline_nanoseconds;
        if admit(py, shared, 1, false, deadline)? == Admitted::Here {
            return self.call_here(slf, shared, request, options);
        }
        let prepared = self.prepare(slf, shared, request, options);
        let (task, future) = prepared.inspect_err(|_| shared.give_room(1))?;
        add(py, &shared.tally.submitted, 1);
        let queued = place(shared, options, task);
        match queued {
            Queued::Done => {}
            Queued::Start(who) => start(slf, shared, who, Some(&future))?,
            Queued::TooLate => {
                if withdraw(py, shared, future.get()) {
                    return Err(refusal(shared));
                }
            }
        }
        Ok(future)
    }

    /// A call and its future, not for anybody to take yet.
    #[inline]
    fn make(
        &self,
        py: Python<'_>,
        shared: &Arc<Shared>,
        request: Request,
    ) -> PyResult<(TaskHandle, Py<Future>, Call)> {
        let (task, same) = TaskHandle::pair(Task::empty());
        let future = self.futures.make(py, same, Arc::clone(shared))?;
        let asked = shared.latencies.as_ref().map_or(0, |_| now_nanoseconds());
        let call = Call::new(request, future.clone_ref(py), asked);
        Ok((task, future, call))
    }

    /// A task that is ready to be queued.
    #[inline]
    fn prepare(
        &self,
        slf: &Bound<'_, Self>,
        shared: &Arc<Shared>,
        request: Request,
        options: &Options,
    ) -> PyResult<(TaskHandle, Py<Future>)> {
        let (task, future, call) = self.make(slf.py(), shared, request)?;
        let refused = task.fill(call);
        debug_assert!(refused.is_ok());
        if let Err(error) = set_limits(slf, shared, &future, options) {
            drop(task.claim());
            return Err(error);
        }
        Ok((task, future))
    }

    /// Make a call in this thread, for want of room to queue it.
    fn call_here(
        &self,
        slf: &Bound<'_, Self>,
        shared: &Arc<Shared>,
        request: Request,
        options: &Options,
    ) -> PyResult<Py<Future>> {
        let py = slf.py();
        let (_, future, call) = self.make(py, shared, request)?;
        set_limits(slf, shared, &future, options)?;
        add(py, &shared.tally.submitted, 1);
        add(py, &shared.tally.ran_by_submitter, 1);
        // Who is at a task has a seat already.
        let inside = std::ptr::eq(RUNNING.get().0, &raw const **shared);
        let has_seat = !inside && shared.scheduler.take_seat();
        let ran = perform(py, shared, call, None);
        if has_seat {
            shared.scheduler.give_seat();
        }
        match ran {
            Ran::Interrupted(stop) if is_first_thread() => Err(stop),
            _ => Ok(future),
        }
    }

    /// Queue many tasks. All of them, or none if the executor is closed; if `whole`, or if whoever
    /// finds no room is refused, there is room for all of them at once.
    pub(super) fn queue_many(
        &self,
        slf: &Bound<'_, Self>,
        calls: impl ExactSizeIterator<Item = (Py<PyAny>, Arguments)>,
        whole: bool,
        options: &Options,
    ) -> PyResult<Vec<Py<Future>>> {
        let (py, shared) = (slf.py(), self.shared());
        if shared.scheduler.is_closed() {
            return Err(refusal(&shared));
        }
        let mut futures = Vec::with_capacity(calls.len());
        let queued = self.queue_each(slf, &shared, calls, whole, options, &mut futures);
        if let Err(error) = queued {
            for future in futures.iter().rev() {
                withdraw(py, &shared, future.get());
            }
            return Err(error);
        }
        Ok(futures)
    }

    fn queue_each(
        &self,
        slf: &Bound<'_, Self>,
        shared: &Arc<Shared>,
        calls: impl ExactSizeIterator<Item = (Py<PyAny>, Arguments)>,
        whole: bool,
        options: &Options,
        futures: &mut Vec<Py<Future>>,
    ) -> PyResult<()> {
        let py = slf.py();
        let deadline = options.terms.deadline_nanoseconds;
        let node = options.node.unwrap_or_else(|| here(shared));
        let context = self.context(py, options.lane)?;
        let mut calls = calls.map(|(function, arguments)| Request {
            function,
            arguments,
            context: context.clone_ref(py),
        });
        while calls.len() > 0 {
            let count = match admit(py, shared, calls.len(), whole, deadline)? {
                Admitted::Queue(count) => count,
                Admitted::Here => {
                    let next = if whole { calls.len() } else { 1 };
                    for request in calls.by_ref().take(next) {
                        let future = self.call_here(slf, shared, request, options)?;
                        futures.push(future);
                    }
                    continue;
                }
            };
            let mut tasks = Vec::with_capacity(count);
            for request in calls.by_ref().take(count) {
                match self.prepare(slf, shared, request, options) {
                    Ok((task, future)) => {
                        tasks.push(task);
                        futures.push(future);
                    }
                    Err(error) => {
                        add(py, &shared.tally.submitted, tasks.len() as u64);
                        // Those that are prepared give theirs back when they are withdrawn.
                        shared.give_room(count - tasks.len());
                        return Err(error);
                    }
                }
            }
            add(py, &shared.tally.submitted, tasks.len() as u64);
            let mut queued = shared.scheduler.push_many(node, options.priority, tasks);
            if queued == Queued::TooLate {
                let withdrawn = futures.iter().filter(|it| withdraw(py, shared, it.get()));
                if withdrawn.count() == futures.len() {
                    return Err(refusal(shared));
                }
                // Some were begun all the same; the rest of this is cancelled, and so is what
                // follows.
                queued = Queued::Done;
                if calls.len() > 0 {
                    return Err(refusal(shared));
                }
            }
            while let Queued::Start(who) = queued {
                start(slf, shared, who, None)?;
                queued = shared.scheduler.start();
            }
        }
        Ok(())
    }
}

/// Before a task is queued; nothing is left of it if its timer cannot be started.
#[inline]
fn set_limits(
    slf: &Bound<'_, BareExecutor>,
    shared: &Arc<Shared>,
    future: &Py<Future>,
    options: &Options,
) -> PyResult<()> {
    if options.terms.is_none() {
        return Ok(());
    }
    let py = slf.py();
    if let Some(start) = limits::limit(py, shared, future, options.terms) {
        start_timer(slf, shared, start, future)?;
    }
    if let Some(limits) = future.get().limits() {
        limits.count_deadline(shared);
    }
    Ok(())
}

/// Have the thread started that keeps time limits. If that fails, `future` leaves no trace there.
#[cold]
fn start_timer(
    slf: &Bound<'_, BareExecutor>,
    shared: &Arc<Shared>,
    start: u64,
    future: &Py<Future>,
) -> PyResult<()> {
    let handle = TimerHandle {
        shared: Arc::clone(shared),
        start,
    };
    let started = Py::new(slf.py(), handle)
        .and_then(|handle| slf.call_method1(intern!(slf.py(), "_start_timer"), (handle,)));
    let Err(error) = started else {
        return Ok(());
    };
    // A signal's exception may come after the thread was started.
    shared.timer.not_started(start);
    if let Some(limits) = future.get().limits() {
        limits.end(shared);
    }
    Err(error)
}

/// The node that tasks of this thread go to unless told.
fn here(shared: &Shared) -> usize {
    let worker = current_worker(shared);
    worker.map_or_else(|| shared.scheduler.node_here(), |worker| worker.node())
}

fn place(shared: &Shared, options: &Options, task: TaskHandle) -> Queued {
    let scheduler = &shared.scheduler;
    let inside = std::ptr::eq(RUNNING.get().0, shared);
    if !inside && scheduler.worker_count() == 1 {
        return scheduler.push(0, options.priority, task);
    }
    let worker = if inside { current_worker(shared) } else { None };
    match (worker, options.node, options.priority) {
        // With one worker, tasks are run in the order in which they are queued.
        (Some(worker), None, Priority::Normal) if scheduler.worker_count() > 1 => worker.push(task),
        (_, node, priority) => {
            let node = node.unwrap_or_else(|| here(shared));
            scheduler.push(node, priority, task)
        }
    }
}

/// Take a task back that was queued too late; false if somebody has begun it.
fn withdraw(py: Python<'_>, shared: &Shared, future: &Future) -> bool {
    use moirai_core::executor::task::Cancel;
    // Nobody has seen its future yet, so nobody is to be told.
    match future.task().cancel(true) {
        Cancel::Done(call, _) => {
            add(py, &shared.tally.cancelled, 1);
            shared.give_room(1);
            shared.died();
            if let Some(limits) = future.limits() {
                limits.end(shared);
            }
            drop(call);
            true
        }
        _ => false,
    }
}

pub(super) fn refusal(shared: &Shared) -> PyErr {
    if shared.is_broken() {
        return BrokenThreadPool::new_err(BROKEN);
    }
    Closed::new_err("cannot schedule new futures after shutdown")
}

pub(super) const BROKEN: &str =
    "A thread initializer failed, the thread pool is not usable anymore";

/// Have a thread started. What fails is told if no other worker is there, and `future` is withdrawn.
#[cold]
fn start(
    slf: &Bound<'_, BareExecutor>,
    shared: &Arc<Shared>,
    who: usize,
    future: Option<&Py<Future>>,
) -> PyResult<()> {
    let py = slf.py();
    let handle = WorkerHandle {
        shared: Arc::clone(shared),
        start: shared.scheduler.next_start(who),
    };
    let handle = Py::new(py, handle)?;
    let Err(error) = slf.call_method1(intern!(py, "_start_worker"), (handle, who)) else {
        return Ok(());
    };
    // A signal's exception may come after the thread was started.
    shared.scheduler.not_started(who);
    if shared.scheduler.started_count() > 0 && error.is_instance_of::<PyException>(py) {
        return Ok(());
    }
    if let Some(future) = future {
        withdraw(py, shared, future.get());
    }
    Err(error)
}
