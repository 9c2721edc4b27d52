//! A scheduler with all its workers in one thread, step by step: what a simulation asks who takes what.
//!
//! The decisions are those of [`Scheduler`] and [`Worker`] themselves; only the threads are missing, and
//! with them the clock by which lanes age, the looks before a sleep, the seats of threads that wait, and
//! what a thread that waits takes from the worker that it waits for.

use super::idle::Outlook;
use super::lanes::Priority;
use super::scheduler::{Counts, Queued, Scheduler};
use super::worker::{Rest, Worker};
use std::sync::Arc;

/// The workers are started as tasks are queued, as in an executor.
pub struct Rehearsal<T: 'static> {
    scheduler: Arc<Scheduler<T>>,
    workers: Vec<Option<Worker<T>>>,
    asleep: Vec<bool>,
}

/// What became of a worker that found nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rested {
    /// `Work`: it is to look again; `Later`: it sleeps for [`PATIENCE`](super::PATIENCE) at most;
    /// `Nothing`: it sleeps until it is woken.
    pub outlook: Outlook,
    /// The workers that were woken then.
    pub roused: Vec<usize>,
}

/// What a worker took.
pub struct Taken<T> {
    /// The task, if it found one.
    pub task: Option<T>,
    /// How many tasks came along into its deque: those of the same deque that were older.
    pub brought: usize,
    /// The workers that were woken then.
    pub roused: Vec<usize>,
}

impl<T: 'static> Rehearsal<T> {
    /// As [`Scheduler::new`].
    pub fn new(node_of_worker: &[usize], order: &[Vec<usize>]) -> Self {
        Rehearsal {
            scheduler: Scheduler::by_clock(node_of_worker, order, Box::default(), || 0),
            workers: node_of_worker.iter().map(|_| None).collect(),
            asleep: vec![false; node_of_worker.len()],
        }
    }

    /// Queue a task from outside at a node; the workers that were started or woken for it.
    pub fn queue(&mut self, node: usize, task: T) -> Vec<usize> {
        let queued = self.scheduler.push(node, Priority::Normal, task);
        self.roused(queued)
    }

    /// A worker that was started queues a task; the workers that were started or woken for it.
    pub fn push(&mut self, who: usize, task: T) -> Option<Vec<usize>> {
        let queued = self.workers.get(who)?.as_ref()?.push(task);
        Some(self.roused(queued))
    }

    /// What a worker that was started takes next.
    pub fn take(&mut self, who: usize) -> Option<Taken<T>> {
        let depth = || self.scheduler.members[who].stealer.len();
        let worker = self.workers.get(who)?.as_ref()?;
        let before = depth();
        let task = worker.take();
        // Its own task leaves one less.
        let brought = depth().saturating_sub(before);
        Some(Taken {
            task,
            brought,
            roused: self.roused(Queued::Done),
        })
    }

    /// A worker that was started found nothing. One that sleeps already sleeps on.
    pub fn rest(&mut self, who: usize) -> Option<Rested> {
        self.workers.get(who)?.as_ref()?.begin_rest();
        let scheduler = &self.scheduler;
        if self.asleep[who] {
            let (outlook, roused) = (Outlook::Nothing, Vec::new());
            return Some(Rested { outlook, roused });
        }
        let outlook = scheduler.sleep(who, || scheduler.outlook(who));
        self.asleep[who] = outlook != Outlook::Work;
        let roused = self.roused(Queued::Done);
        Some(Rested { outlook, roused })
    }

    /// A worker has slept for as long as it would wait; whether it is awake now, and to take what it
    /// has left to others.
    pub fn stop_waiting(&mut self, who: usize) -> Option<bool> {
        let worker = self.workers.get(who)?.as_ref()?;
        let is_late = self.asleep[who] && self.scheduler.idle.stop_waiting(who);
        if is_late {
            self.asleep[who] = false;
            worker.end_rest(Rest::Late, worker.begin_rest());
        }
        Some(is_late)
    }

    /// What each worker has done.
    pub fn counts(&self) -> Vec<Counts> {
        self.scheduler.counts()
    }

    /// How many tasks are in each worker's deque.
    pub fn deque_counts(&self) -> Vec<usize> {
        self.scheduler.deque_counts()
    }

    fn roused(&mut self, queued: Queued) -> Vec<usize> {
        let mut roused = Vec::new();
        if let Queued::Start(who) = queued {
            let start = self.scheduler.next_start(who);
            self.workers[who] = self.scheduler.enter(who, start);
            roused.push(who);
        }
        for (who, asleep) in self.asleep.iter_mut().enumerate() {
            let parker = &self.scheduler.members[who].parker;
            if *asleep && parker.is_called() {
                parker.rearm();
                *asleep = false;
                roused.push(who);
            }
        }
        roused
    }
}
