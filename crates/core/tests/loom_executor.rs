//! Models of the executor's lock-free parts: every interleaving is tried. Run by `make loom`.
#![cfg(loom)]

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use moirai_core::executor::idle::{Idle, Outlook, Sleeper};
use moirai_core::executor::task::{Cancel, Task};

/// As the core's, which sleeps in the kernel.
#[derive(Default)]
struct Parker {
    called: Mutex<bool>,
    condition: Condvar,
}

impl Parker {
    fn park(&self) {
        let mut called = self.called.lock().unwrap();
        while !*called {
            called = self.condition.wait(called).unwrap();
        }
        *called = false;
    }

    /// As `park`, but the time is over at once: a model tries what comes before that, and after.
    fn is_called_in_time(&self) -> bool {
        std::mem::take(&mut *self.called.lock().unwrap())
    }

    fn call(&self) {
        *self.called.lock().unwrap() = true;
        self.condition.notify_one();
    }
}

/// Whoever sleeps.
fn last(sleepers: &[Sleeper]) -> Option<usize> {
    Some(sleepers.len() - 1)
}

/// A queue and workers that take from it as an executor's do; the queue itself is not modelled.
struct Pool {
    queue: Mutex<Vec<usize>>,
    /// As a deque tells without a lock.
    count: AtomicUsize,
    idle: Idle,
    parkers: Vec<Parker>,
    closed: AtomicBool,
    taken: AtomicUsize,
}

impl Pool {
    fn new(workers: usize) -> Arc<Self> {
        let idle = Idle::new();
        for _ in 0..workers {
            idle.search();
        }
        Arc::new(Pool {
            queue: Mutex::new(Vec::new()),
            count: AtomicUsize::new(0),
            idle,
            parkers: (0..workers).map(|_| Parker::default()).collect(),
            closed: AtomicBool::new(false),
            taken: AtomicUsize::new(0),
        })
    }

    fn has_work(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    fn outlook(&self) -> Outlook {
        match self.has_work() {
            true => Outlook::Work,
            false => Outlook::Nothing,
        }
    }

    fn is_done(&self) -> bool {
        let closed = self.closed.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        closed && !self.has_work()
    }

    fn put(&self, task: usize) {
        let mut queue = self.queue.lock().unwrap();
        queue.push(task);
        self.count.store(queue.len(), Ordering::SeqCst);
    }

    /// False: too late, and nobody may come for it.
    fn push(&self, task: usize) -> bool {
        self.put(task);
        if let Some(who) = self.idle.seek(last) {
            self.parkers[who].call();
        }
        !self.closed.load(Ordering::SeqCst)
    }

    fn take(&self) -> Option<usize> {
        let mut queue = self.queue.lock().unwrap();
        let task = queue.pop()?;
        self.count.store(queue.len(), Ordering::SeqCst);
        Some(task)
    }

    /// A busy worker takes a task, and moves the rest to its own queue: for a moment it is in none.
    fn take_some(&self) {
        let moved = {
            let mut queue = self.queue.lock().unwrap();
            self.count.store(0, Ordering::SeqCst);
            std::mem::take(&mut *queue)
        };
        let mut queue = self.queue.lock().unwrap();
        queue.extend(moved.iter().skip(1));
        self.count.store(queue.len(), Ordering::SeqCst);
        drop(queue);
        if let Some(who) = self.idle.seek(last) {
            self.parkers[who].call();
        }
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        for who in self.idle.wake_all() {
            self.parkers[who].call();
        }
    }

    fn found(&self) {
        if let Some(who) = self.idle.found(|| self.has_work(), last) {
            self.parkers[who].call();
        }
    }

    /// As `work`, for one task.
    fn work_once(&self, who: usize) {
        while self.take().is_none() {
            if self.idle.sleep(who, || self.outlook()) != Outlook::Work {
                self.parkers[who].park();
            }
        }
        self.found();
    }

    /// A worker's life: it counts as one that looks for work.
    fn work(&self, who: usize) {
        let mut searching = true;
        loop {
            while self.take().is_some() {
                self.taken.fetch_add(1, Ordering::Relaxed);
                if std::mem::take(&mut searching) {
                    self.found();
                }
            }
            if !std::mem::replace(&mut searching, true) {
                self.idle.search();
            }
            let outlook = || match self.is_done() {
                true => Outlook::Work,
                false => self.outlook(),
            };
            if self.idle.sleep(who, outlook) != Outlook::Work {
                self.parkers[who].park();
            }
            if !self.has_work() && self.is_done() {
                return self.found();
            }
        }
    }
}

/// Whatever is queued wakes somebody: without a lost wake-up every worker comes to its end.
#[test]
fn a_queued_task_is_never_slept_through() {
    loom::model(|| {
        let pool = Pool::new(1);
        let worker = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.work(0))
        };
        assert!(pool.push(1));
        pool.close();
        worker.join().unwrap();
        assert_eq!(pool.taken.load(Ordering::Relaxed), 1);
        assert_eq!(pool.idle.counts(), (0, 0));
    });
}

/// Who looks while tasks are on their way between queues, and sleeps, is woken when they are there.
#[test]
fn tasks_that_a_steal_brings_along_are_not_slept_through() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let pool = Pool::new(1);
        {
            let mut queue = pool.queue.lock().unwrap();
            queue.extend([1, 2]);
            pool.count.store(2, Ordering::SeqCst);
        }
        let worker = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.work_once(0))
        };
        pool.take_some();
        // Nobody else comes for the rest: this thread is at its task until the worker has had one.
        worker.join().unwrap();
    });
}

#[test]
fn two_workers_run_all_and_end() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let pool = Pool::new(2);
        let workers: Vec<_> = (0..2)
            .map(|who| {
                let pool = Arc::clone(&pool);
                thread::spawn(move || pool.work(who))
            })
            .collect();
        assert!(pool.push(1));
        assert!(pool.push(2));
        pool.close();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(pool.taken.load(Ordering::Relaxed), 2);
        assert_eq!(pool.idle.counts(), (0, 0));
    });
}

/// A task that is queued while the pool is closed is taken by a worker, or its submitter is told.
#[test]
fn a_task_is_run_or_known_to_be_too_late() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let pool = Pool::new(1);
        let worker = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.work(0))
        };
        let closer = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.close())
        };
        let queued = pool.push(1);
        closer.join().unwrap();
        worker.join().unwrap();
        let taken = pool.taken.load(Ordering::Relaxed);
        assert!(taken == 1 || !queued, "queued in time and left behind");
    });
}

/// Workers of another node than the tasks, which they leave to others for a while.
impl Pool {
    /// As `push`; nobody is woken while somebody waits.
    fn push_far(&self, task: usize) {
        self.put(task);
        self.seek_far();
    }

    fn seek_far(&self) {
        if let Some(who) = self.idle.seek(Self::unless_one_waits) {
            self.parkers[who].call();
        }
    }

    fn unless_one_waits(sleepers: &[Sleeper]) -> Option<usize> {
        let waits = sleepers.iter().any(|sleeper| sleeper.waits);
        (!waits).then(|| sleepers.len() - 1)
    }

    fn far_outlook(&self) -> Outlook {
        match (self.is_done(), self.has_work()) {
            (true, _) => Outlook::Work,
            (false, true) if self.closed.load(Ordering::SeqCst) => Outlook::Work,
            (false, true) => Outlook::Later,
            (false, false) => Outlook::Nothing,
        }
    }

    /// As `work`, for a worker that takes a task only when it has waited, or all is closed.
    fn work_from_afar(&self, who: usize) {
        loop {
            let is_late = match self.idle.sleep(who, || self.far_outlook()) {
                Outlook::Work => false,
                Outlook::Nothing => {
                    self.parkers[who].park();
                    false
                }
                Outlook::Later => {
                    self.seek_far();
                    // Called, or about to be: that call is not to be left over.
                    let called = self.parkers[who].is_called_in_time();
                    let is_late = !called && self.idle.stop_waiting(who);
                    if !called && !is_late {
                        self.parkers[who].park();
                    }
                    is_late
                }
            };
            if is_late || self.closed.load(Ordering::SeqCst) {
                if self.take().is_some() {
                    self.taken.fetch_add(1, Ordering::Relaxed);
                    let found = self.idle.found(|| self.has_work(), Self::unless_one_waits);
                    if let Some(who) = found {
                        self.parkers[who].call();
                    }
                    self.idle.search();
                }
            }
            if self.is_done() {
                self.idle.found(|| false, last);
                return;
            }
        }
    }
}

/// A task that is left to others is taken in the end, and a call that meets the end of a wait counts
/// once.
#[test]
fn a_task_that_is_left_to_others_is_taken_after_a_while() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let pool = Pool::new(1);
        let worker = {
            let pool = Arc::clone(&pool);
            thread::spawn(move || pool.work_from_afar(0))
        };
        pool.push_far(1);
        // Without the end of its wait it would sleep for ever: nobody else comes for the task.
        while pool.has_work() {
            thread::yield_now();
        }
        pool.close();
        worker.join().unwrap();
        assert_eq!(pool.taken.load(Ordering::Relaxed), 1);
        assert_eq!(pool.idle.counts(), (0, 0));
    });
}

#[test]
fn while_one_waits_the_others_sleep_and_nothing_is_left_behind() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let pool = Pool::new(2);
        let workers: Vec<_> = (0..2)
            .map(|who| {
                let pool = Arc::clone(&pool);
                thread::spawn(move || pool.work_from_afar(who))
            })
            .collect();
        pool.push_far(1);
        pool.push_far(2);
        while pool.has_work() {
            thread::yield_now();
        }
        pool.close();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(pool.taken.load(Ordering::Relaxed), 2);
        assert_eq!(pool.idle.counts(), (0, 0));
    });
}

#[test]
fn a_task_has_one_taker_or_is_cancelled() {
    loom::model(|| {
        let task = Arc::new(Task::new(7));
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let task = Arc::clone(&task);
                thread::spawn(move || task.claim())
            })
            .collect();
        let cancelled = matches!(task.cancel(false), Cancel::Done(Some(7), _));
        let taken = takers.into_iter().filter_map(|it| it.join().unwrap());
        assert_eq!(taken.count() + usize::from(cancelled), 1);
    });
}

/// Who asks to be told of the end is told, or finds that it is over; with the outcome there.
#[test]
fn the_end_of_a_task_is_never_missed() {
    loom::model(|| {
        let task = Arc::new(Task::new(()));
        let outcome = Arc::new(AtomicUsize::new(0));
        let told = Arc::new(Mutex::new((false, false)));
        task.claim().unwrap();
        let runner = {
            let (task, outcome) = (Arc::clone(&task), Arc::clone(&outcome));
            let told = Arc::clone(&told);
            thread::spawn(move || {
                outcome.store(5, Ordering::Relaxed);
                if task.finish(false).expect("nobody locks it").watched {
                    let mut told = told.lock().unwrap();
                    assert!(told.0, "who watches has left word");
                    told.1 = true;
                }
            })
        };
        {
            let mut word = told.lock().unwrap();
            if task.watch() {
                word.0 = true;
            } else {
                assert_eq!(outcome.load(Ordering::Relaxed), 5);
            }
        }
        runner.join().unwrap();
        let word = told.lock().unwrap();
        assert_eq!(word.0, word.1);
    });
}

/// After `lock_end` found a task not over, it does not end without the lock.
#[test]
fn a_locked_task_ends_under_its_lock_only() {
    loom::model(|| {
        let task = Arc::new(Task::new(()));
        let lock = Arc::new(Mutex::new(()));
        task.claim().unwrap();
        let runner = {
            let (task, lock) = (Arc::clone(&task), Arc::clone(&lock));
            thread::spawn(move || {
                if task.finish(false).is_none() {
                    let _held = lock.lock().unwrap();
                    task.finish_locked(false);
                }
            })
        };
        if task.lock_end() {
            let _held = lock.lock().unwrap();
            let before = task.is_over();
            thread::yield_now();
            assert_eq!(task.is_over(), before);
        } else {
            assert!(task.is_over());
        }
        runner.join().unwrap();
        assert!(task.is_over());
    });
}
