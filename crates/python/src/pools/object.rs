//! `ObjectPool`: Python objects, made by a factory, handed out and taken back.
//!
//! The pool's lock is taken only by threads that are attached to the interpreter, and nothing of
//! Python runs under it. So a collector, which traverses while no other attached thread runs, never
//! meets a pool half changed, and a finaliser may call the pool that it is collected for.

use super::lease::Lease;
use super::records::{Acquisition, PoolStatistics};
use super::ticket::{Queue, Ticket};
use super::wait::{self, Waker, closed, is_ordinary, settle, timed_out};
use crate::argument::{choice, count, milliseconds, timeout};
use crate::errors::{Closed, InvalidArgument};
use crate::site;
use moirai_core::os::now_milliseconds;
use moirai_core::pools::{
    Effects, Found, Hold, Kind, Loss, NotHeld, Options, Permit, Pool, Refused, Turn, Waited,
};
use moirai_core::sync::{AtomicU64, Ordering};
use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyType, PyWeakrefReference};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Python objects as items; their tags are weak references that tell when they are collected.
pub(super) enum Objects {}

impl Kind for Objects {
    type Item = Py<PyAny>;
    type Tag = Py<PyWeakrefReference>;
    type Waker = Waker;
    type Note = Note;
}

/// Where and when a turn began.
pub(super) struct Note {
    pub site: Option<String>,
    pub since: Instant,
}

impl Note {
    pub(super) fn of_caller(py: Python<'_>) -> Box<Self> {
        Box::new(Note {
            site: site::current(py),
            since: Instant::now(),
        })
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Overflow {
    Block,
    Raise,
    Create,
}

/// Told when an item is collected while it is out.
#[pyclass(frozen, module = "moirai.pools")]
struct Died {
    pool: Weak<Pool<Objects>>,
    key: usize,
    /// Number of the first turn; written before the item can die. `Relaxed` suffices, since the
    /// item is handed to others through a lock.
    birth: AtomicU64,
}

#[pymethods]
impl Died {
    fn __call__(&self, py: Python<'_>, _reference: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(pool) = self.pool.upgrade() else {
            return Ok(());
        };
        let birth = Turn {
            slot: 0,
            number: self.birth.load(Ordering::Relaxed),
        };
        match pool.died(self.key, birth) {
            Some(effects) => settle(py, &pool, effects, |_| Ok(())),
            None => Ok(()),
        }
    }
}

/// A bounded pool of objects.
#[pyclass(frozen, subclass, weakref, module = "moirai.pools")]
pub struct ObjectPool {
    pool: Arc<Pool<Objects>>,
    factory: Py<PyAny>,
    reset: Option<Py<PyAny>>,
    destroy: Option<Py<PyAny>>,
    validate: Option<Py<PyAny>>,
    overflow: Overflow,
    track_sites: bool,
    /// Neither looked at, nor aged, nor tracked: an idle object is handed out as it is.
    plain: bool,
}

/// Permits of a pool whose maker did not say how many: enough for most, and a bound.
const MAX_SIZE: usize = 64;

fn share<'a>(py: Python<'a>) -> impl Fn(&Py<PyAny>) -> Py<PyAny> + Copy + 'a {
    move |item| item.clone_ref(py)
}

fn key(item: &Py<PyAny>) -> usize {
    item.as_ptr() as usize
}

fn callable(name: &str, value: &Py<PyAny>, py: Python<'_>) -> PyResult<()> {
    if value.bind(py).is_callable() {
        return Ok(());
    }
    let kind = value.bind(py).get_type().name()?;
    Err(PyTypeError::new_err(format!(
        "{name}: must be callable, got {kind}"
    )))
}

/// What is wrong with an object that is none of those out. An inherited one is nobody's business.
fn not_held(item: &Bound<'_, PyAny>, reason: NotHeld) -> PyResult<()> {
    let kind = item.get_type().name()?;
    let what = match reason {
        NotHeld::Inherited => return Ok(()),
        NotHeld::Foreign => format!("must come from this pool, got a {kind} that it does not have"),
        NotHeld::Returned => format!("must be in use, got a {kind} that was released before"),
        NotHeld::Leased => format!(
            "must have been acquired, got a {kind} that a lease holds; leave the lease's block, or \
             call its release()"
        ),
    };
    Err(InvalidArgument::new_err(format!("item: {what}")))
}

impl ObjectPool {
    /// Call one of the functions with an object; report what goes wrong, unless it is a request to
    /// stop.
    fn call(&self, py: Python<'_>, stage: &str, function: &Py<PyAny>, item: &Py<PyAny>) -> Called {
        match function.call1(py, (item,)) {
            Ok(answer) => Called::Returned(answer),
            Err(error) => self.failed(py, stage, error),
        }
    }

    fn failed(&self, py: Python<'_>, stage: &str, error: PyErr) -> Called {
        if !is_ordinary(py, &error) {
            return Called::Stopped(error);
        }
        if let Err(error) = log(py, stage, error) {
            error.write_unraisable(py, None);
        }
        Called::Failed
    }

    /// Destroy an object that left the pool; whatever happens, it is gone.
    fn destroy(&self, py: Python<'_>, item: Py<PyAny>) -> PyResult<()> {
        let Some(destroy) = &self.destroy else {
            return Ok(());
        };
        match self.call(py, "destroy", destroy, &item) {
            Called::Returned(_) => Ok(()),
            Called::Failed => {
                self.pool.note_destroy_failure();
                Ok(())
            }
            Called::Stopped(error) => {
                self.pool.note_destroy_failure();
                Err(error)
            }
        }
    }

    #[inline]
    fn settle(&self, py: Python<'_>, effects: Effects<Objects>) -> PyResult<()> {
        if effects.is_none() {
            return Ok(());
        }
        settle(py, &self.pool, effects, |item| self.destroy(py, item))
    }

    fn expire(&self, py: Python<'_>) -> PyResult<()> {
        if self.pool.options().idle_milliseconds.is_none() {
            return Ok(());
        }
        let mut outcome = Ok(());
        while let Some(effects) = self.pool.take_expired(now_milliseconds()) {
            outcome = outcome.and(self.settle(py, effects));
        }
        outcome
    }

    /// Begin a turn: hand out an idle object, make one, or wait.
    #[inline]
    pub(super) fn begin(
        &self,
        py: Python<'_>,
        hold: Hold,
        seconds: Option<f64>,
    ) -> PyResult<(Turn, Py<PyAny>)> {
        if self.plain
            && seconds.is_none()
            && let Ok(found) = self.pool.acquire(hold, share(py))
        {
            return match found {
                Found::Item { turn, item } => Ok((turn, item)),
                Found::Permit(permit) => self.make(py, permit, hold),
            };
        }
        self.begin_slow(py, hold, seconds)
    }

    #[cold]
    fn begin_slow(
        &self,
        py: Python<'_>,
        hold: Hold,
        seconds: Option<f64>,
    ) -> PyResult<(Turn, Py<PyAny>)> {
        let timeout = timeout("timeout_seconds", seconds)?;
        self.expire(py)?;
        let found = match self.pool.acquire(self.first(hold), share(py)) {
            Ok(found) => found,
            Err(Refused::Closed) => return Err(closed("acquire")),
            Err(Refused::Exhausted) => self.wait(py, hold, timeout)?,
        };
        self.complete(py, found, hold)
    }

    /// What to do with an idle object first: look at it, if it is to be looked at.
    fn first(&self, hold: Hold) -> Hold {
        if self.validate.is_some() {
            Hold::Check
        } else {
            hold
        }
    }

    fn wait(
        &self,
        py: Python<'_>,
        hold: Hold,
        timeout: Option<Duration>,
    ) -> PyResult<Found<Objects>> {
        if self.overflow == Overflow::Raise || timeout.is_some_and(|it| it.is_zero()) {
            return Err(timed_out("acquire", None, self.pool.note_timeout()));
        }
        let destroy = |item| self.destroy(py, item);
        wait::wait(
            py,
            &self.pool,
            self.first(hold),
            share(py),
            timeout,
            destroy,
        )
    }

    /// What was found becomes an object in use.
    fn complete(
        &self,
        py: Python<'_>,
        found: Found<Objects>,
        hold: Hold,
    ) -> PyResult<(Turn, Py<PyAny>)> {
        let (turn, item) = match found {
            Found::Permit(permit) => self.make(py, permit, hold)?,
            Found::Item { turn, item } => match &self.validate {
                Some(validate) => self.look(py, validate, turn, item, hold)?,
                None => (turn, item),
            },
        };
        if self.track_sites {
            self.pool.note(turn, Note::of_caller(py));
        }
        Ok((turn, item))
    }

    /// Hand out an object if it is fit, else destroy it and make another.
    fn look(
        &self,
        py: Python<'_>,
        validate: &Py<PyAny>,
        turn: Turn,
        item: Py<PyAny>,
        hold: Hold,
    ) -> PyResult<(Turn, Py<PyAny>)> {
        let mut called = self.call(py, "validate", validate, &item);
        let mut fit = false;
        if let Called::Returned(answer) = &called {
            match answer.is_truthy(py) {
                Ok(answer) => fit = answer,
                Err(error) => called = self.failed(py, "validate", error),
            }
        }
        if fit {
            return match self.pool.confirm(turn, hold) {
                Ok(_) => Ok((turn, item)),
                Err(_) => Err(closed("acquire")),
            };
        }
        let Ok((effects, permit)) = self.pool.reject(turn) else {
            return Err(closed("acquire"));
        };
        let settled = self.settle(py, effects);
        let stop = match called {
            Called::Stopped(error) => Some(error),
            Called::Returned(_) | Called::Failed => settled.err(),
        };
        if let Some(error) = stop {
            let effects = self.pool.forgo(permit, false);
            self.settle(py, effects)?;
            return Err(error);
        }
        drop(item);
        self.make(py, permit, hold)
    }

    /// Make an object and begin its first turn.
    fn make(&self, py: Python<'_>, permit: Permit, hold: Hold) -> PyResult<(Turn, Py<PyAny>)> {
        let (permit, made) = self.call_factory(py, permit)?;
        let Made { item, died, tag } = made;
        let kept = tag.is_none();
        match self.pool.adopt(
            permit,
            item.clone_ref(py),
            key(&item),
            kept,
            hold,
            share(py),
        ) {
            Ok((turn, item)) => {
                self.tag(turn, died, tag);
                Ok((turn, item))
            }
            Err((_, permit)) => Err(self.known(py, permit, &item)),
        }
    }

    /// Make an object and put it to rest.
    fn stock(&self, py: Python<'_>, permit: Permit) -> PyResult<()> {
        let (permit, made) = self.call_factory(py, permit)?;
        let Made { item, died, tag } = made;
        let kept = tag.is_none();
        match self
            .pool
            .stock(permit, item.clone_ref(py), key(&item), kept)
        {
            Ok(turn) => {
                self.tag(turn, died, tag);
                match self.pool.restore(turn, None, now_milliseconds()) {
                    Ok(effects) => self.settle(py, effects),
                    Err(_) => Ok(()),
                }
            }
            Err((_, permit)) => Err(self.known(py, permit, &item)),
        }
    }

    fn call_factory(&self, py: Python<'_>, permit: Permit) -> PyResult<(Permit, Made)> {
        let made = self.factory.call0(py).and_then(|item| self.watch(py, item));
        match made {
            Ok(made) => Ok((permit, made)),
            Err(error) => {
                let effects = self.pool.forgo(permit, true);
                self.settle(py, effects)?;
                Err(error)
            }
        }
    }

    /// A weak reference that tells when the object is collected, if it can have one.
    fn watch(&self, py: Python<'_>, item: Py<PyAny>) -> PyResult<Made> {
        let died = Bound::new(
            py,
            Died {
                pool: Arc::downgrade(&self.pool),
                key: key(&item),
                birth: AtomicU64::new(0),
            },
        )?;
        match PyWeakrefReference::new_with(item.bind(py), &died) {
            Ok(tag) => Ok(Made {
                item,
                died: died.unbind(),
                tag: Some(tag.unbind()),
            }),
            Err(error) if error.is_instance_of::<PyTypeError>(py) => Ok(Made {
                item,
                died: died.unbind(),
                tag: None,
            }),
            Err(error) => Err(error),
        }
    }

    fn tag(&self, turn: Turn, died: Py<Died>, tag: Option<Py<PyWeakrefReference>>) {
        died.get().birth.store(turn.number, Ordering::Relaxed);
        if let Some(tag) = tag {
            drop(self.pool.tag(turn, tag));
        }
    }

    /// The factory made what is here already.
    fn known(&self, py: Python<'_>, permit: Permit, item: &Py<PyAny>) -> PyErr {
        let effects = self.pool.forgo(permit, true);
        if let Err(error) = self.settle(py, effects) {
            return error;
        }
        match item.bind(py).get_type().name() {
            Ok(kind) => InvalidArgument::new_err(format!(
                "factory: must make a new object at each call, got a {kind} that is in the pool"
            )),
            Err(error) => error,
        }
    }

    /// End the turn of a lease.
    #[inline]
    pub(super) fn end(&self, py: Python<'_>, turn: Turn) -> PyResult<()> {
        let outcome = self.end_turn(py, turn);
        outcome.and(self.expire(py))
    }

    #[inline]
    fn end_turn(&self, py: Python<'_>, turn: Turn) -> PyResult<()> {
        if let Some(reset) = &self.reset {
            let Ok(item) = self.pool.peek(turn, share(py)) else {
                return Ok(());
            };
            return match self.pool.withdraw(turn) {
                Ok(turn) => self.make_ready(py, reset, turn, item),
                Err(_) => Ok(()),
            };
        }
        match self.pool.release(turn, None, now_milliseconds()) {
            Ok(effects) => self.settle(py, effects),
            Err(_) => Ok(()),
        }
    }

    /// Reset an object that was withdrawn, and let it rest; or destroy it if that fails.
    fn make_ready(
        &self,
        py: Python<'_>,
        reset: &Py<PyAny>,
        turn: Turn,
        item: Py<PyAny>,
    ) -> PyResult<()> {
        let stop = match self.call(py, "reset", reset, &item) {
            Called::Returned(_) => {
                return match self.pool.restore(turn, Some(item), now_milliseconds()) {
                    Ok(effects) => self.settle(py, effects),
                    Err(_) => Ok(()),
                };
            }
            Called::Failed => Ok(()),
            Called::Stopped(error) => Err(error),
        };
        if let Ok(effects) = self.pool.discard(turn, Loss::ResetFailed) {
            self.settle(py, effects.with_destroy(item))?;
        }
        stop
    }

    /// The object of a lease.
    pub(super) fn peek(&self, py: Python<'_>, turn: Turn) -> Option<Py<PyAny>> {
        self.pool.peek(turn, share(py)).ok()
    }

    /// End a turn without the object coming back; a lease's object is returned.
    pub(super) fn lose(
        &self,
        py: Python<'_>,
        turn: Turn,
        loss: Loss,
    ) -> PyResult<Option<Py<PyAny>>> {
        let Ok(effects) = self.pool.discard(turn, loss) else {
            return Ok(None);
        };
        let (effects, item) = effects.without_spare();
        self.settle(py, effects)?;
        Ok(item)
    }
}

/// Tell the logger `moirai.pools` that an object is given up because a function raised.
fn log(py: Python<'_>, stage: &str, error: PyErr) -> PyResult<()> {
    let logger = py
        .import("logging")?
        .call_method1("getLogger", ("moirai.pools",))?;
    let options = PyDict::new(py);
    options.set_item("exc_info", error.into_value(py))?;
    let message = "%s raised; the object is given up";
    logger.call_method("warning", (message, stage), Some(&options))?;
    Ok(())
}

/// How a call of one of the four functions ended.
enum Called {
    Returned(Py<PyAny>),
    /// Reported already.
    Failed,
    Stopped(PyErr),
}

/// A new object, and what will tell of its end.
struct Made {
    item: Py<PyAny>,
    died: Py<Died>,
    tag: Option<Py<PyWeakrefReference>>,
}

#[pymethods]
impl ObjectPool {
    #[new]
    #[pyo3(
        signature = (
            factory, reset=None, destroy=None, validate=None, min_size=None, max_size=None,
            overflow="block", idle_seconds=None, *, track_sites=false
        ),
        text_signature = "(factory, reset=None, destroy=None, validate=None, min_size=0, \
                          max_size=64, overflow='block', idle_seconds=None, *, track_sites=False)"
    )]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        factory: Py<PyAny>,
        reset: Option<Py<PyAny>>,
        destroy: Option<Py<PyAny>>,
        validate: Option<Py<PyAny>>,
        min_size: Option<&Bound<'_, PyAny>>,
        max_size: Option<&Bound<'_, PyAny>>,
        overflow: &str,
        idle_seconds: Option<f64>,
        track_sites: bool,
    ) -> PyResult<Self> {
        callable("factory", &factory, py)?;
        for (name, function) in [
            ("reset", &reset),
            ("destroy", &destroy),
            ("validate", &validate),
        ] {
            function
                .as_ref()
                .map_or(Ok(()), |it| callable(name, it, py))?;
        }
        let largest = u32::MAX as usize;
        let max_count = max_size.map_or(Ok(MAX_SIZE), |it| count("max_size", it, 1..=largest))?;
        let min_count = min_size.map_or(Ok(0), |it| count("min_size", it, 0..=max_count))?;
        let overflow = choice(
            "overflow",
            overflow,
            &[
                ("block", Overflow::Block),
                ("raise", Overflow::Raise),
                ("create", Overflow::Create),
            ],
        )?;
        let idle_milliseconds = milliseconds("idle_seconds", idle_seconds)?;
        let pool = ObjectPool {
            plain: validate.is_none() && idle_milliseconds.is_none() && !track_sites,
            pool: Pool::new(Options {
                min_count,
                max_count,
                surplus: overflow == Overflow::Create,
                idle_milliseconds,
            }),
            factory,
            reset,
            destroy,
            validate,
            overflow,
            track_sites,
        };
        if let Err(error) = pool.fill(py, min_count) {
            // Nobody gets the pool, so nobody else can destroy what was made.
            pool.close(py)?;
            return Err(error);
        }
        Ok(pool)
    }

    /// For annotations: ObjectPool[Connection].
    #[classmethod]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        item: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        generic_alias(class, item)
    }

    /// An object of one's own until `release`.
    #[pyo3(signature = (timeout_seconds=None))]
    fn acquire(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        let (_, item) = self.begin(py, Hold::Give, timeout_seconds)?;
        Ok(item)
    }

    /// Give back what `acquire` gave.
    fn release(&self, py: Python<'_>, item: &Bound<'_, PyAny>) -> PyResult<()> {
        let key = item.as_ptr() as usize;
        let outcome = match &self.reset {
            None => {
                let owned = || item.clone().unbind();
                match self.pool.release_key(key, owned, now_milliseconds()) {
                    Ok(effects) => self.settle(py, effects),
                    Err(reason) => not_held(item, reason),
                }
            }
            Some(reset) => match self.pool.withdraw_key(key) {
                Ok(turn) => self.make_ready(py, reset, turn, item.clone().unbind()),
                Err(reason) => not_held(item, reason),
            },
        };
        outcome.and(self.expire(py))
    }

    /// A context manager that acquires on entry and releases on exit.
    #[pyo3(signature = (timeout_seconds=None))]
    fn lease(slf: &Bound<'_, Self>, timeout_seconds: Option<f64>) -> PyResult<Lease> {
        if timeout_seconds.is_some() {
            timeout("timeout_seconds", timeout_seconds)?;
        }
        Ok(Lease::new(slf.clone().unbind(), timeout_seconds))
    }

    /// (object, None), or (None, Ticket) with `wake` to be called once something was granted.
    #[pyo3(signature = (wake, timeout_seconds))]
    #[allow(clippy::type_complexity)]
    fn _acquire_or_queue(
        slf: &Bound<'_, Self>,
        wake: Py<PyAny>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<(Option<Py<PyAny>>, Option<Ticket>)> {
        let (py, this) = (slf.py(), slf.get());
        let timeout = timeout("timeout_seconds", timeout_seconds)?;
        this.expire(py)?;
        let hold = this.first(Hold::Give);
        let at_once = this.overflow == Overflow::Raise || timeout.is_some_and(|it| it.is_zero());
        let waited = if at_once {
            let found = this.pool.acquire(hold, share(py));
            found.map(|found| Waited::Found(found, Waker::Call(wake)))
        } else {
            this.pool.wait(hold, share(py), Waker::Call(wake))
        };
        match waited {
            Ok(Waited::Found(found, _)) => {
                let (_, item) = this.complete(py, found, Hold::Give)?;
                Ok((Some(item), None))
            }
            Ok(Waited::Queued(ticket)) => {
                let pool = slf.clone().unbind();
                Ok((None, Some(Ticket::new(ticket, Box::new(pool)))))
            }
            Err(Refused::Exhausted) => Err(timed_out("acquire", None, this.pool.note_timeout())),
            Err(Refused::Closed) => Err(closed("acquire")),
        }
    }

    /// Make objects until `count` are idle, as far as `max_size` allows; returns how many.
    fn prefill(&self, py: Python<'_>, count: &Bound<'_, PyAny>) -> PyResult<usize> {
        let max_count = self.pool.options().max_count;
        self.fill(py, crate::argument::count("count", count, 0..=max_count)?)
    }

    /// Destroy every idle object; returns how many.
    fn clear(&self, py: Python<'_>) -> PyResult<usize> {
        self.trim_to(py, 0, u64::MAX)
    }

    /// Destroy what was idle for at least `idle_seconds`, down to `min_size`; returns how many.
    #[pyo3(signature = (idle_seconds=None))]
    fn trim(&self, py: Python<'_>, idle_seconds: Option<f64>) -> PyResult<usize> {
        let asked = milliseconds("idle_seconds", idle_seconds)?;
        let options = self.pool.options();
        let age = asked.or(options.idle_milliseconds).unwrap_or(0);
        match now_milliseconds().checked_sub(age) {
            Some(limit) => self.trim_to(py, options.min_count, limit),
            None => Ok(0),
        }
    }

    /// Destroy what is idle, wake those who wait, hand nothing out any more.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let woken = wait::wake_all(py, self.pool.close());
        self.trim_to(py, 0, u64::MAX)?;
        woken
    }

    /// Whether the pool was closed.
    #[getter]
    fn closed(&self) -> bool {
        self.pool.is_closed()
    }

    /// As `acquire`, but wait without blocking the event loop.
    #[pyo3(signature = (timeout_seconds=None))]
    fn acquire_async<'py>(
        slf: &Bound<'py, Self>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let waiting = slf.py().import("moirai._waiting")?;
        let queue = slf.getattr("_acquire_or_queue")?;
        waiting.call_method1("acquire_async", (queue, timeout_seconds))
    }

    /// As `lease`, for `async with`.
    #[pyo3(signature = (timeout_seconds=None))]
    fn lease_async<'py>(
        slf: &Bound<'py, Self>,
        timeout_seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let waiting = slf.py().import("moirai._waiting")?;
        waiting.call_method1("AsyncLease", (slf, timeout_seconds))
    }

    /// What happened so far.
    fn statistics(&self) -> PoolStatistics {
        PoolStatistics(self.pool.statistics())
    }

    /// Every object that is out, the longest held first.
    fn leaks(&self, py: Python<'_>) -> PyResult<Vec<Acquisition>> {
        let found = self.pool.outstanding(|item, tag, note| {
            (
                item.map(|item| item.clone_ref(py)),
                tag.map(|tag| tag.clone_ref(py)),
                note.map(|note| (note.site.clone(), note.since)),
            )
        });
        let mut outstanding = Vec::new();
        for (item, tag, note) in found {
            let item = match (item, tag) {
                (Some(item), _) => item,
                (None, Some(tag)) => tag.bind(py).call0()?.unbind(),
                (None, None) => continue,
            };
            let kind = item.bind(py).get_type().name()?.extract()?;
            let (site, since) = note.unzip();
            outstanding.push(Acquisition {
                kind,
                site: site.flatten(),
                held_seconds: since.map(|since| since.elapsed().as_secs_f64()),
            });
        }
        Ok(outstanding)
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        if slf.get().closed() {
            return Err(Closed::new_err("this pool is closed"));
        }
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _exception: &Bound<'_, pyo3::types::PyTuple>,
    ) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let pool = &slf.get().pool;
        let now = pool.statistics();
        Ok(format!(
            "{}(in_use={}, idle={}, max_size={}{})",
            slf.get_type().name()?,
            now.in_use,
            now.idle,
            pool.options().max_count,
            if pool.is_closed() { ", closed" } else { "" }
        ))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.factory)?;
        visit.call(&self.reset)?;
        visit.call(&self.destroy)?;
        visit.call(&self.validate)?;
        self.pool.visit(
            |item| visit.call(item),
            |tag| visit.call(tag),
            |waker| match waker {
                Waker::Call(function) => visit.call(function),
                Waker::Thread(_) => Ok(()),
            },
        )
    }

    fn __clear__(&self) {
        self.pool.sever();
    }
}

impl ObjectPool {
    fn fill(&self, py: Python<'_>, idle_count: usize) -> PyResult<usize> {
        let mut made = 0;
        loop {
            match self.pool.permit_to_stock(idle_count) {
                Ok(Some(permit)) => self.stock(py, permit)?,
                Ok(None) => return Ok(made),
                Err(_) => return Err(closed("prefill")),
            }
            made += 1;
        }
    }

    fn trim_to(&self, py: Python<'_>, min_count: usize, since: u64) -> PyResult<usize> {
        let mut outcome = Ok(());
        let mut destroyed = 0;
        while let Some(effects) = self.pool.take_rested(min_count, since) {
            outcome = outcome.and(self.settle(py, effects));
            destroyed += 1;
        }
        outcome.map(|()| destroyed)
    }
}

impl Queue for Py<ObjectPool> {
    fn take(&self, py: Python<'_>, ticket: u64) -> PyResult<Py<PyAny>> {
        let this = self.get();
        let taken = this.pool.take(ticket, this.first(Hold::Give), share(py));
        match taken {
            Ok(Some(found)) => this.complete(py, found, Hold::Give).map(|it| it.1),
            Ok(None) | Err(_) => Err(closed("acquire")),
        }
    }

    fn time_out(&self, py: Python<'_>, ticket: u64, waited: Duration) -> PyResult<Py<PyAny>> {
        let this = self.get();
        match this
            .pool
            .time_out(ticket, this.first(Hold::Give), share(py))
        {
            Ok(Ok(found)) => this.complete(py, found, Hold::Give).map(|it| it.1),
            Ok(Err(census)) => Err(timed_out("acquire", Some(waited), census)),
            Err(_) => Err(closed("acquire")),
        }
    }

    fn cancel(&self, py: Python<'_>, ticket: u64) -> PyResult<()> {
        let this = self.get();
        this.settle(py, this.pool.cancel(ticket, now_milliseconds()))
    }

    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(self)
    }
}

/// `class[item]`, for annotations.
pub(super) fn generic_alias<'py>(
    class: &Bound<'py, PyType>,
    item: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let alias = class.py().import("types")?.getattr("GenericAlias")?;
    alias.call1((class, item))
}
