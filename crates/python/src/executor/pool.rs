//! `BareExecutor`: queueing calls and running workers; which threads there are is Python's.

use super::call::{Arguments, Call};
use super::future::{self, Future};
use super::{RUNNING, Ran, Shared, Task, WORKER, add, current_worker, let_leave, run};
use crate::argument::count;
use crate::errors::{Closed, InvalidArgument};
use crate::lane;
use moirai_core::executor::{PRIORITY_COUNT, Priority, Queued, Rest, Scheduler, Worker};
use moirai_core::resource::priority::Lane;
use moirai_core::sync::{Mutex, Ordering};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};
use pyo3::{import_exception, intern};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

import_exception!(concurrent.futures.thread, BrokenThreadPool);

/// How long a worker keeps the interpreter while others may want it. Python code lets others in
/// by itself; functions written in C do not.
const KEEP: Duration = Duration::from_millis(1);
/// What a thread takes from queueing a task to waiting for it.
const SUBMITTER_LEAVES_NANOSECONDS: u64 = 1_500;
/// Tasks between two looks at the clock.
const CLOCK_TURNS: u32 = 32;

/// The mechanism of an executor; the threads are started and joined by its Python class.
#[pyclass(frozen, subclass, module = "moirai.executor")]
pub struct BareExecutor {
    /// Another one in a forked child. Locked for a moment.
    shared: Mutex<Arc<Shared>>,
    kind: Py<PyType>,
    node_of_worker: Vec<usize>,
    order: Vec<Vec<usize>>,
    /// What the nodes are called.
    node_ids: Vec<usize>,
}

/// What a worker's thread has of an executor: not the object, which may go before it.
#[pyclass(frozen, module = "moirai.executor")]
pub struct WorkerHandle {
    shared: Arc<Shared>,
    /// The start that it is for.
    start: u64,
}

/// What `submit` takes besides the function's own arguments.
struct Options {
    priority: Priority,
    node: Option<usize>,
}

const PRIORITIES: [Priority; PRIORITY_COUNT] = [
    Priority::Realtime,
    Priority::High,
    Priority::Normal,
    Priority::Background,
];

impl BareExecutor {
    #[inline]
    fn shared(&self) -> Arc<Shared> {
        let shared = self.shared.lock();
        Arc::clone(&shared.unwrap_or_else(|poison| poison.into_inner()))
    }

    fn new_shared(&self, outsiders_help: bool) -> Arc<Shared> {
        let scheduler = Scheduler::new(&self.node_of_worker, &self.order);
        Arc::new(Shared::new(scheduler, outsiders_help))
    }

    fn options(
        &self,
        priority: Option<&Bound<'_, PyAny>>,
        node: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Options> {
        let priority = match priority {
            None => Priority::Normal,
            Some(value) => match lane::from_priority("priority", value)? {
                Lane::Realtime => PRIORITIES[0],
                Lane::High => PRIORITIES[1],
                Lane::Normal => PRIORITIES[2],
                Lane::Background => PRIORITIES[3],
            },
        };
        let place = |node| {
            let id = count("node", node, 0..=usize::MAX >> 1)?;
            let place = self.node_ids.iter().position(|other| *other == id);
            place.ok_or_else(|| {
                InvalidArgument::new_err(format!(
                    "node: must be one that has workers, of {:?}, got {id}",
                    self.node_ids
                ))
            })
        };
        let node = node.map(place).transpose()?;
        Ok(Options { priority, node })
    }

    /// A queued task's future.
    fn queue(
        &self,
        slf: &Bound<'_, Self>,
        shared: &Arc<Shared>,
        function: &Bound<'_, PyAny>,
        arguments: Arguments,
        options: &Options,
    ) -> PyResult<Py<Future>> {
        let py = slf.py();
        if shared.scheduler.is_closed() {
            return Err(refusal(shared));
        }
        let (task, future) = self.prepare(py, shared, function, arguments)?;
        let queued = place(shared, options, task);
        match queued {
            Queued::Done => {}
            Queued::Start(who) => start(slf, shared, who, Some(&future))?,
            Queued::TooLate => {
                if withdraw(shared, future.get().task()) {
                    return Err(refusal(shared));
                }
            }
        }
        Ok(future)
    }

    fn prepare(
        &self,
        py: Python<'_>,
        shared: &Arc<Shared>,
        function: &Bound<'_, PyAny>,
        arguments: Arguments,
    ) -> PyResult<(Arc<Task>, Py<Future>)> {
        let task = Arc::new(Task::empty());
        let future = future::make(self.kind.bind(py), Arc::clone(&task), Arc::clone(shared))?;
        let call = Call::new(function, arguments, &future)?;
        let refused = task.fill(call);
        debug_assert!(refused.is_ok());
        add(&shared.tally.submitted);
        Ok((task, future))
    }

    /// Queue many tasks; all of them, or none if the executor is closed.
    fn queue_many(
        &self,
        slf: &Bound<'_, Self>,
        function: &Bound<'_, PyAny>,
        arguments: impl ExactSizeIterator<Item = Arguments>,
        options: &Options,
    ) -> PyResult<Vec<Py<Future>>> {
        let py = slf.py();
        let shared = self.shared();
        if shared.scheduler.is_closed() {
            return Err(refusal(&shared));
        }
        let mut tasks = Vec::with_capacity(arguments.len());
        let mut futures = Vec::with_capacity(arguments.len());
        for each in arguments {
            let (task, future) = self.prepare(py, &shared, function, each)?;
            tasks.push(task);
            futures.push(future);
        }
        let node = options.node.unwrap_or_else(|| here(&shared));
        let mut queued = shared.scheduler.push_many(node, options.priority, tasks);
        if queued == Queued::TooLate {
            let withdrawn = futures
                .iter()
                .filter(|it| withdraw(&shared, it.get().task()));
            if withdrawn.count() == futures.len() {
                return Err(refusal(&shared));
            }
            return Ok(futures);
        }
        while let Queued::Start(who) = queued {
            start(slf, &shared, who, None)?;
            queued = shared.scheduler.start();
        }
        Ok(futures)
    }
}

/// The node that tasks of this thread go to unless told.
fn here(shared: &Shared) -> usize {
    current_worker(shared).map_or(0, |worker| worker.node())
}

fn place(shared: &Shared, options: &Options, task: Arc<Task>) -> Queued {
    let scheduler = &shared.scheduler;
    let inside = std::ptr::eq(RUNNING.get().0, shared);
    if !inside && scheduler.worker_count() == 1 {
        return scheduler.push(0, options.priority, task);
    }
    let worker = if inside { current_worker(shared) } else { None };
    match (worker, options.node, options.priority) {
        // With one worker, tasks are run in the order in which they are queued.
        (Some(worker), None, Priority::Normal) if scheduler.worker_count() > 1 => worker.push(task),
        (worker, node, priority) => {
            let node = node.unwrap_or_else(|| worker.map_or(0, |worker| worker.node()));
            scheduler.push(node, priority, task)
        }
    }
}

/// Take a task back that was queued too late; false if somebody has begun it.
fn withdraw(shared: &Shared, task: &Task) -> bool {
    use moirai_core::executor::task::Cancel;
    // Nobody has seen its future yet, so nobody is to be told.
    match task.cancel(true) {
        Cancel::Done(call, _) => {
            add(&shared.tally.cancelled);
            shared.died();
            drop(call);
            true
        }
        _ => false,
    }
}

fn refusal(shared: &Shared) -> PyErr {
    if shared.is_broken() {
        return BrokenThreadPool::new_err(BROKEN);
    }
    Closed::new_err("cannot schedule new futures after shutdown")
}

const BROKEN: &str = "A thread initializer failed, the thread pool is not usable anymore";

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
        withdraw(shared, future.get().task());
    }
    Err(error)
}

/// What is in an iterable.
fn items_of(items: &Bound<'_, PyAny>) -> PyResult<Vec<Py<PyAny>>> {
    items
        .try_iter()?
        .map(|item| item.map(Bound::unbind))
        .collect()
}

#[pymethods]
impl BareExecutor {
    #[new]
    #[pyo3(signature = (kind, *, node_of_worker, order, node_ids, outsiders_help))]
    fn new(
        kind: Bound<'_, PyType>,
        node_of_worker: Vec<usize>,
        order: Vec<Vec<usize>>,
        node_ids: Vec<usize>,
        outsiders_help: bool,
    ) -> PyResult<Self> {
        if !future::is_kind(&kind)? || node_of_worker.is_empty() {
            return Err(InvalidArgument::new_err(
                "kind: must be a class of futures, and there must be a worker",
            ));
        }
        let nodes = node_ids.len();
        if order.len() != nodes
            || order
                .iter()
                .flatten()
                .chain(&node_of_worker)
                .any(|node| *node >= nodes)
        {
            return Err(InvalidArgument::new_err(
                "order: must name the nodes there are",
            ));
        }
        let scheduler = Scheduler::new(&node_of_worker, &order);
        Ok(BareExecutor {
            shared: Mutex::new(Arc::new(Shared::new(scheduler, outsiders_help))),
            kind: kind.unbind(),
            node_of_worker,
            order,
            node_ids,
        })
    }

    /// Queue a call of a function; its future.
    #[pyo3(signature = (function, /, *arguments, **keywords))]
    fn submit(
        slf: &Bound<'_, Self>,
        function: &Bound<'_, PyAny>,
        arguments: Bound<'_, PyTuple>,
        keywords: Option<Bound<'_, PyDict>>,
    ) -> PyResult<Py<Future>> {
        let this = slf.get();
        let py = slf.py();
        let mut options = Options {
            priority: Priority::Normal,
            node: None,
        };
        let mut rest = None;
        if let Some(keywords) = keywords {
            let take = |name| -> PyResult<Option<Bound<'_, PyAny>>> {
                let found = keywords.get_item(name)?;
                if found.is_some() {
                    keywords.del_item(name)?;
                }
                Ok(found.filter(|found| !found.is_none()))
            };
            let priority = take(intern!(py, "priority"))?;
            let node = take(intern!(py, "node"))?;
            options = this.options(priority.as_ref(), node.as_ref())?;
            if !keywords.is_empty() {
                rest = Some(keywords.unbind());
            }
        }
        let arguments = Arguments::Once(arguments.unbind(), rest);
        this.queue(slf, &this.shared(), function, arguments, &options)
    }

    /// Queue a call of a function for each of some arguments; their futures, in order.
    #[pyo3(signature = (function, items, /, *, star, priority = None, node = None))]
    fn queue_calls(
        slf: &Bound<'_, Self>,
        function: &Bound<'_, PyAny>,
        items: &Bound<'_, PyAny>,
        star: bool,
        priority: Option<&Bound<'_, PyAny>>,
        node: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Py<Future>>> {
        let this = slf.get();
        let py = slf.py();
        let options = this.options(priority, node)?;
        let items = items_of(items)?;
        let mut calls = Vec::with_capacity(items.len());
        for item in items {
            let arguments = if star {
                item.into_bound(py).cast_into::<PyTuple>()?
            } else {
                PyTuple::new(py, [item])?
            };
            calls.push(Arguments::Once(arguments.unbind(), None));
        }
        this.queue_many(slf, function, calls.into_iter(), &options)
    }

    /// Queue calls of a function, `size` of them to a task; the tasks' futures, in order. Each
    /// gives a list of results up to the first failure, and that or None.
    #[pyo3(signature = (function, items, size, /, *, star, priority = None, node = None))]
    #[allow(clippy::too_many_arguments)] // keywords of a Python function
    fn queue_chunks(
        slf: &Bound<'_, Self>,
        function: &Bound<'_, PyAny>,
        items: &Bound<'_, PyAny>,
        size: usize,
        star: bool,
        priority: Option<&Bound<'_, PyAny>>,
        node: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Py<Future>>> {
        let this = slf.get();
        let options = this.options(priority, node)?;
        let mut items = items_of(items)?;
        let mut chunks = Vec::with_capacity(items.len() / size.max(1) + 1);
        while !items.is_empty() {
            let rest = items.split_off(size.clamp(1, items.len()));
            let chunk = std::mem::replace(&mut items, rest);
            chunks.push(if star {
                Arguments::EachStar(chunk)
            } else {
                Arguments::Each(chunk)
            });
        }
        this.queue_many(slf, function, chunks.into_iter(), &options)
    }

    /// Take no more calls; workers end when nothing is queued.
    fn close(&self) {
        self.shared().scheduler.close();
    }

    /// Whether it was closed.
    #[getter]
    fn is_closed(&self) -> bool {
        self.shared().scheduler.is_closed()
    }

    /// Whether a worker could not be set up.
    #[getter]
    fn is_broken(&self) -> bool {
        self.shared().is_broken()
    }

    /// Cancel what is queued.
    fn cancel_queued(&self, py: Python<'_>) {
        for task in self.shared().scheduler.take_all() {
            if let Some(future) = future_of(py, &task) {
                add(&self.shared().tally.cancelled);
                future.get().finish_cancelled(future.bind(py));
            }
        }
    }

    /// In a forked child: workers and queues of its own, and none of the parent's tasks.
    fn renew(&self) {
        let old = self.shared();
        old.inherited.store(true, Ordering::Relaxed);
        let new = self.new_shared(old.outsiders_help);
        if old.scheduler.is_closed() {
            new.scheduler.close();
        }
        let mut shared = self
            .shared
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        // The parent's stays as it is, with whatever its other threads were about to do to it.
        std::mem::forget(std::mem::replace(&mut *shared, new));
    }

    /// Let so many tasks run at once from now on; from 1 to as many as there are workers.
    fn allow(&self, task_count: &Bound<'_, PyAny>) -> PyResult<()> {
        let allowed = count("task_count", task_count, 1..=self.node_of_worker.len())?;
        let shared = self.shared();
        task_count.py().detach(|| shared.scheduler.allow(allowed));
        Ok(())
    }

    /// How many tasks may run at once.
    #[getter]
    fn allowed_count(&self) -> usize {
        self.shared().scheduler.allowed_count()
    }

    /// How many workers run tasks, or look for the next one.
    #[getter]
    fn running_count(&self) -> usize {
        self.shared().scheduler.running_count()
    }

    /// What was done so far: counts for the executor, and for each worker.
    fn counts<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyDict>, Vec<Bound<'py, PyDict>>)> {
        let shared = self.shared();
        let tally = &shared.tally;
        let whole = PyDict::new(py);
        let read = [
            ("submitted", &tally.submitted),
            ("succeeded", &tally.succeeded),
            ("failed", &tally.failed),
            ("cancelled", &tally.cancelled),
            ("helped", &tally.helped),
        ];
        for (name, count) in read {
            whole.set_item(name, count.load(Ordering::Relaxed))?;
        }
        whole.set_item("workers_started", shared.scheduler.started_count())?;
        whole.set_item("queued", shared.scheduler.queued_count())?;
        let mut workers = Vec::new();
        for (counts, node) in shared.scheduler.counts().iter().zip(&self.node_of_worker) {
            let each = PyDict::new(py);
            each.set_item("node", node)?;
            each.set_item("from_lanes", counts.from_lanes)?;
            each.set_item("from_own", counts.from_own)?;
            each.set_item("stolen_same_node", counts.stolen_same_node)?;
            each.set_item("stolen_cross_node", counts.stolen_cross_node)?;
            each.set_item("failed_steals", counts.failed_steals)?;
            each.set_item("parks", counts.parks)?;
            each.set_item("wakes", counts.wakes)?;
            workers.push(each);
        }
        Ok((whole, workers))
    }
}

/// The future of a task that nobody has taken.
fn future_of(py: Python<'_>, task: &Task) -> Option<Py<Future>> {
    let call = task.claim()?;
    let future = call.future().clone_ref(py);
    drop(call);
    Some(future)
}

impl Drop for BareExecutor {
    /// What is queued is still run; the workers end then.
    fn drop(&mut self) {
        self.shared().scheduler.close();
    }
}

#[pymethods]
impl WorkerHandle {
    /// Take no more calls; as `BareExecutor.close`.
    fn close(&self) {
        self.shared.scheduler.close();
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
        shared.scheduler.close();
        for task in shared.scheduler.take_all() {
            if let Some(future) = future_of(py, &task) {
                add(&shared.tally.failed);
                let failure = BrokenThreadPool::new_err(BROKEN);
                future.get().finish(future.bind(py), Err(failure));
            }
        }
    }
}

fn work(py: Python<'_>, shared: &Arc<Shared>, worker: &Worker<Arc<Task>>) -> PyResult<()> {
    loop {
        if worker.take_seat() {
            run_all(py, shared, worker);
            worker.leave_seat();
        }
        if shared.is_inherited() {
            return Ok(());
        }
        let (who, mut looks) = (worker.index(), worker.begin_rest());
        let rest = py.detach(|| {
            let rest = shared.scheduler.rest(who, &mut looks);
            let_leave(SUBMITTER_LEAVES_NANOSECONDS);
            rest
        });
        worker.end_rest(rest, looks);
        if rest == Rest::Closed {
            return Ok(());
        }
    }
}

/// Run what there is, letting others have the interpreter by clock.
fn run_all(py: Python<'_>, shared: &Arc<Shared>, worker: &Worker<Arc<Task>>) {
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
