//! `BareExecutor`: queueing calls and running workers; which threads there are is Python's.

use super::admission::{Bound as Admission, WHEN_FULL, WhenFull};
use super::call::{Arguments, Request, current_context, within};
use super::future::{Future, Outcome};
use super::limits::Terms;
use super::maker::Maker;
use super::{Shared, future_of};
use crate::argument::{choice, count, number, timeout};
use crate::errors::InvalidArgument;
use crate::lane;
use crate::numpy::scope::Use;
use moirai_core::executor::latency::BUCKET_COUNT;
use moirai_core::executor::{Counts, PRIORITY_COUNT, Priority, Scheduler};
use moirai_core::resource::priority::Lane;
use moirai_core::sync::{Mutex, Ordering};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple, PyType};
use std::sync::Arc;

/// Tasks that may wait, at most, where that is limited.
const MOST_PENDING: usize = 1 << 40;

/// The mechanism of an executor; the threads are started and joined by its Python class.
#[pyclass(frozen, subclass, module = "moirai.executor")]
pub struct BareExecutor {
    /// Another one in a forked child. Locked for a moment.
    shared: Mutex<Arc<Shared>>,
    pub(super) futures: Maker,
    node_of_worker: Vec<usize>,
    order: Vec<Vec<usize>>,
    node_of_cpu: Vec<u16>,
    /// What the nodes are called.
    node_ids: Vec<usize>,
    bound: Option<(usize, WhenFull)>,
    /// What tasks draw from.
    memory: Option<Py<Use>>,
    measures_latency: bool,
    /// Called with each function, gives what is called in its place.
    wrap: Option<Py<PyAny>>,
}

/// What `submit` takes besides the function's own arguments.
#[derive(Default)]
pub(super) struct Options {
    pub(super) priority: Priority,
    /// Where requests for memory go, if that was asked for.
    pub(super) lane: Option<Lane>,
    pub(super) node: Option<usize>,
    pub(super) terms: Terms,
}

/// The same as Python gives it.
#[derive(Default)]
struct Given<'a, 'py> {
    priority: Option<&'a Bound<'py, PyAny>>,
    node: Option<&'a Bound<'py, PyAny>>,
    timeout_seconds: Option<&'a Bound<'py, PyAny>>,
    deadline: Option<&'a Bound<'py, PyAny>>,
}

const PRIORITIES: [Priority; PRIORITY_COUNT] = [
    Priority::Realtime,
    Priority::High,
    Priority::Normal,
    Priority::Background,
];

impl BareExecutor {
    #[inline]
    pub(super) fn shared(&self) -> Arc<Shared> {
        let shared = self.shared.lock();
        Arc::clone(&shared.unwrap_or_else(|poison| poison.into_inner()))
    }

    fn new_shared(&self, outsiders_help: bool) -> Arc<Shared> {
        let node_of_cpu = self.node_of_cpu.as_slice().into();
        let scheduler = Scheduler::new(&self.node_of_worker, &self.order, node_of_cpu);
        let bound = self.bound.map(|(limit, how)| Admission::new(limit, how));
        let measures = self.measures_latency;
        Arc::new(Shared::new(scheduler, outsiders_help, bound, measures))
    }

    /// A copy of the context of this moment, for tasks.
    pub(super) fn context(&self, py: Python<'_>, lane: Option<Lane>) -> PyResult<Py<PyAny>> {
        let context = current_context(py)?;
        if let Some(memory) = &self.memory {
            within(py, &context, || Use::settle(memory.bind(py), lane))?;
        }
        Ok(context)
    }

    /// What is called for a function.
    fn wrapped(&self, function: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        match &self.wrap {
            None => Ok(function.clone().unbind()),
            Some(wrap) => wrap.call1(function.py(), (function,)),
        }
    }

    fn options(&self, given: Given<'_, '_>) -> PyResult<Options> {
        let lane = given
            .priority
            .map(|value| lane::from_priority("priority", value))
            .transpose()?;
        let priority = match lane.unwrap_or(Lane::Normal) {
            Lane::Realtime => PRIORITIES[0],
            Lane::High => PRIORITIES[1],
            Lane::Normal => PRIORITIES[2],
            Lane::Background => PRIORITIES[3],
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
        let node = given.node.map(place).transpose()?;
        let seconds = |name, given: Option<&Bound<'_, PyAny>>| {
            given.map(|value| number(name, value)).transpose()
        };
        let deadline = seconds("deadline", given.deadline)?;
        let terms = Terms {
            timeout: timeout(
                "timeout_seconds",
                seconds("timeout_seconds", given.timeout_seconds)?,
            )?,
            deadline_nanoseconds: deadline.map(moment).transpose()?,
        };
        Ok(Options {
            priority,
            lane,
            node,
            terms,
        })
    }
}

/// A moment of `time.monotonic()` in nanoseconds.
pub(super) fn moment(seconds: f64) -> PyResult<u64> {
    if seconds.is_nan() {
        return Err(InvalidArgument::new_err(
            "deadline: must be a moment of time.monotonic(), got nan",
        ));
    }
    // A cast keeps within the bounds of the integer.
    Ok((seconds * 1e9) as u64)
}

/// Counts by powers of two.
type Buckets = [u64; BUCKET_COUNT];

/// What each worker has done, and how much is in its deque.
pub(super) fn counts_by_worker<'py>(
    py: Python<'py>,
    counts: &[Counts],
    nodes: &[usize],
    depths: &[usize],
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let mut workers = Vec::new();
    for ((counts, node), depth) in counts.iter().zip(nodes).zip(depths) {
        let each = PyDict::new(py);
        each.set_item("queued", depth)?;
        each.set_item("node", node)?;
        each.set_item("executed", counts.executed)?;
        each.set_item("from_lanes", counts.from_lanes)?;
        each.set_item("from_own", counts.from_own)?;
        each.set_item("stolen_same_node", counts.stolen_same_node)?;
        each.set_item("stolen_cross_node", counts.stolen_cross_node)?;
        each.set_item("failed_steals", counts.failed_steals)?;
        each.set_item("parks", counts.parks)?;
        each.set_item("wakes", counts.wakes)?;
        workers.push(each);
    }
    Ok(workers)
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
    #[pyo3(signature = (
        kind, *, node_of_worker, order, node_of_cpu, node_ids, outsiders_help, max_pending, when_full, memory, wrap,
        measure_latency
    ))]
    #[allow(clippy::too_many_arguments)] // keywords of a Python class
    fn new(
        kind: Bound<'_, PyType>,
        node_of_worker: Vec<usize>,
        order: Vec<Vec<usize>>,
        node_of_cpu: Vec<u16>,
        node_ids: Vec<usize>,
        outsiders_help: bool,
        max_pending: Option<&Bound<'_, PyAny>>,
        when_full: &str,
        memory: Option<Py<Use>>,
        wrap: Option<Py<PyAny>>,
        measure_latency: bool,
    ) -> PyResult<Self> {
        let when_full = choice("when_full", when_full, &WHEN_FULL)?;
        let limit = max_pending.map(|it| count("max_pending", it, 1..=MOST_PENDING));
        let bound = limit.transpose()?.map(|limit| (limit, when_full));
        if bound.is_some_and(|(_, how)| how == WhenFull::CallerRuns) && !outsiders_help {
            return Err(InvalidArgument::new_err(
                "when_full: must be \"block\" or \"raise\" with an initializer, as only workers \
                 run tasks then, got \"caller_runs\"",
            ));
        }
        let futures = Maker::of(kind)?.filter(|_| !node_of_worker.is_empty());
        let Some(futures) = futures else {
            return Err(InvalidArgument::new_err(
                "kind: must be a class of futures, and there must be a worker",
            ));
        };
        let nodes = node_ids.len();
        let cpus = node_of_cpu.iter().map(|node| usize::from(*node));
        let mut named = node_of_worker.iter().chain(order.iter().flatten()).copied();
        if order.len() != nodes || named.any(|node| node >= nodes) || cpus.max() >= Some(nodes) {
            return Err(InvalidArgument::new_err(
                "order: must name the nodes there are",
            ));
        }
        let scheduler = Scheduler::new(&node_of_worker, &order, node_of_cpu.as_slice().into());
        let admission = bound.map(|(limit, how)| Admission::new(limit, how));
        let shared = Shared::new(scheduler, outsiders_help, admission, measure_latency);
        Ok(BareExecutor {
            shared: Mutex::new(Arc::new(shared)),
            futures,
            node_of_worker,
            order,
            node_of_cpu,
            node_ids,
            bound,
            memory,
            measures_latency: measure_latency,
            wrap,
        })
    }

    /// Queue a call of a function; its future.
    #[pyo3(
        signature = (*arguments, **keywords),
        text_signature = "($self, function, /, *arguments, **keywords)"
    )]
    fn submit(
        slf: &Bound<'_, Self>,
        arguments: Bound<'_, PyTuple>,
        keywords: Option<Bound<'_, PyDict>>,
    ) -> PyResult<Py<Future>> {
        let this = slf.get();
        let py = slf.py();
        // The tuple is kept as it came: one without the function would be a copy.
        let Some(function) = arguments.iter_borrowed().next() else {
            return Err(PyTypeError::new_err(
                "submit() missing 1 required positional argument: 'function'",
            ));
        };
        let function = this.wrapped(&function)?;
        let mut options = Options::default();
        let mut rest = None;
        if let Some(keywords) = keywords {
            let take = |name| -> PyResult<Option<Bound<'_, PyAny>>> {
                let found = keywords.get_item(name)?;
                if found.is_some() {
                    keywords.del_item(name)?;
                }
                Ok(found.filter(|found| !found.is_none()))
            };
            options = this.options(Given {
                priority: take(intern!(py, "priority"))?.as_ref(),
                node: take(intern!(py, "node"))?.as_ref(),
                timeout_seconds: take(intern!(py, "timeout_seconds"))?.as_ref(),
                deadline: take(intern!(py, "deadline"))?.as_ref(),
            })?;
            if !keywords.is_empty() {
                rest = Some(keywords.unbind());
            }
        }
        let request = Request {
            function,
            arguments: Arguments::Once(arguments.unbind(), rest),
            context: this.context(py, options.lane)?,
        };
        this.queue(slf, &this.shared(), request, &options)
    }

    /// Queue a call of a function for each of some arguments; their futures, in order.
    #[pyo3(signature = (
        function, items, /, *, star, priority = None, node = None, timeout_seconds = None,
        deadline = None
    ))]
    #[allow(clippy::too_many_arguments)] // keywords of a Python function
    fn queue_calls(
        slf: &Bound<'_, Self>,
        function: &Bound<'_, PyAny>,
        items: &Bound<'_, PyAny>,
        star: bool,
        priority: Option<&Bound<'_, PyAny>>,
        node: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<&Bound<'_, PyAny>>,
        deadline: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Py<Future>>> {
        let this = slf.get();
        let py = slf.py();
        let options = this.options(Given {
            priority,
            node,
            timeout_seconds,
            deadline,
        })?;
        let wrapped = this.wrapped(function)?;
        let calls = items_of(items)?.into_iter().map(|item| {
            let arguments = if star {
                Arguments::OnceOfMany(item)
            } else {
                Arguments::OneOfMany(item)
            };
            (wrapped.clone_ref(py), arguments)
        });
        this.queue_many(slf, calls, false, &options)
    }

    /// Queue calls, each a tuple of a function and its arguments, all at once or none; their
    /// futures, in order.
    #[pyo3(signature = (
        calls, /, *, priority = None, node = None, timeout_seconds = None, deadline = None
    ))]
    fn queue_group(
        slf: &Bound<'_, Self>,
        calls: &Bound<'_, PyAny>,
        priority: Option<&Bound<'_, PyAny>>,
        node: Option<&Bound<'_, PyAny>>,
        timeout_seconds: Option<&Bound<'_, PyAny>>,
        deadline: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Py<Future>>> {
        let this = slf.get();
        let options = this.options(Given {
            priority,
            node,
            timeout_seconds,
            deadline,
        })?;
        let mut found = Vec::new();
        for call in calls.try_iter()? {
            let call = call?;
            let tuple = call.cast::<PyTuple>().ok();
            let function = tuple.and_then(|tuple| tuple.get_item(0).ok());
            let (Some(tuple), Some(function)) = (tuple, function.filter(|it| it.is_callable()))
            else {
                return Err(InvalidArgument::new_err(format!(
                    "calls: must be tuples of a function and its arguments, got {}",
                    call.repr()?
                )));
            };
            let arguments = tuple.get_slice(1, tuple.len()).into_any().unbind();
            found.push((this.wrapped(&function)?, Arguments::OnceOfMany(arguments)));
        }
        this.queue_many(slf, found.into_iter(), true, &options)
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
        let options = this.options(Given {
            priority,
            node,
            ..Given::default()
        })?;
        let (py, wrapped) = (slf.py(), this.wrapped(function)?);
        let mut items = items_of(items)?.into_iter();
        let size = size.max(1);
        let mut chunks = Vec::with_capacity(items.len() / size + 1);
        while items.len() > 0 {
            let chunk = items.by_ref().take(size).collect();
            let arguments = if star {
                Arguments::EachStar(chunk)
            } else {
                Arguments::Each(chunk)
            };
            chunks.push((wrapped.clone_ref(py), arguments));
        }
        this.queue_many(slf, chunks.into_iter(), false, &options)
    }

    /// Take no more calls; workers end when nothing is queued.
    fn close(&self) {
        self.shared().close();
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
        let shared = self.shared();
        for task in shared.scheduler.take_all() {
            if let Some(future) = future_of(py, &shared, &task) {
                let slf = future.bind(py);
                let counts = [&shared.tally.cancelled];
                future.get().finish(slf, Outcome::Cancelled, &counts);
            }
        }
    }

    /// In a forked child: workers and queues of its own, and none of the parent's tasks.
    fn renew(&self) {
        let old = self.shared();
        old.inherited.store(true, Ordering::Relaxed);
        let new = self.new_shared(old.outsiders_help);
        if old.scheduler.is_closed() {
            new.close();
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

    /// How long tasks waited for their start and took then, in nanoseconds by powers of two: for
    /// each worker, and last for all other threads; None where that is not measured.
    fn latencies(&self) -> Option<Vec<(Buckets, Buckets)>> {
        let shared = self.shared();
        let each = shared.latencies.as_ref()?.iter();
        Some(
            each.map(|it| (it.waits.counts(), it.runs.counts()))
                .collect(),
        )
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
            ("timed_out", &tally.timed_out),
            ("ran_by_submitter", &tally.ran_by_submitter),
            ("refused", &tally.refused),
        ];
        for (name, count) in read {
            whole.set_item(name, count.load(Ordering::Relaxed))?;
        }
        whole.set_item("workers_started", shared.scheduler.started_count())?;
        whole.set_item("queued", shared.scheduler.queued_count())?;
        whole.set_item("queued_by_node", shared.scheduler.lane_counts())?;
        let depths = shared.scheduler.deque_counts();
        let counts = shared.scheduler.counts();
        let workers = counts_by_worker(py, &counts, &self.node_of_worker, &depths)?;
        Ok((whole, workers))
    }
}

impl Drop for BareExecutor {
    /// What is queued is still run; the workers end then.
    fn drop(&mut self) {
        self.shared().close();
    }
}
