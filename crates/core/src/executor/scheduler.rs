//! The queues, the workers that there may be, and who may work now.

use super::idle::{Idle, Sleeper};
use super::lanes::{Lanes, PRIORITY_COUNT, Priority};
use super::worker::{Member, Worker};
use crate::os::now_milliseconds;
use crate::os::numa::current_cpu;
use crate::sync::{AtomicBool, AtomicUsize, Lock, Ordering, fence};
use std::sync::Arc;

/// From how many dead entries on a sweep is worth it.
const SWEEP_COUNT: usize = 1024;

/// Queues and workers of one executor. Any thread may call any method at any time.
///
/// A forked child has none of the workers: it makes a scheduler of its own, and touches no queue of
/// this one but to drop it.
pub struct Scheduler<T: 'static> {
    pub(super) nodes: Vec<Lanes<T>>,
    pub(super) members: Vec<Member<T>>,
    pub(super) idle: Idle,
    /// Workers that are not started yet.
    unstarted: Lock<Vec<usize>>,
    /// Its length, so that nobody locks it once all are started. A hint, so `Relaxed` suffices.
    unstarted_count: AtomicUsize,
    /// By number of the CPU, so that a thread that is no worker has a node too; empty: the first one.
    node_of_cpu: Box<[u16]>,
    /// How many more may run a task now, in two's complement: negative while more run than are
    /// allowed since [`Scheduler::allow`]. `SeqCst`, as whoever gives a seat back looks for work
    /// then, and whoever finds work looks for a seat. `seats == allowed - running`.
    seats: AtomicUsize,
    /// How many may run at once. Only the difference of two values counts, so `Relaxed` suffices.
    allowed: AtomicUsize,
    /// `SeqCst`: a task is queued before or seen to be too late; see `push`.
    closed: AtomicBool,
    /// Queued tasks that are over, by estimate, and from how many on they are swept out.
    over: AtomicUsize,
    sweep_at: AtomicUsize,
}

/// What follows from queueing a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a worker that is to be started counts as one who looks for work"]
pub enum Queued {
    /// Nothing.
    Done,
    /// The caller is to start this worker, or to say that it cannot.
    Start(usize),
    /// The scheduler was closed, and perhaps no worker is left: the caller is to withdraw the task.
    TooLate,
}

/// What a worker has done, and how it came by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Tasks that it began to run.
    pub executed: u64,
    /// Tasks taken from a lane.
    pub from_lanes: u64,
    /// Tasks taken from its own deque.
    pub from_own: u64,
    /// Steals from a worker of its node, a task each.
    pub stolen_same_node: u64,
    /// Steals from a worker of another node; what comes along is counted when it is taken.
    pub stolen_cross_node: u64,
    /// Looks at all the other workers' deques that found nothing.
    pub failed_steals: u64,
    /// Times it went to sleep.
    pub parks: u64,
    /// Times it was woken.
    pub wakes: u64,
}

impl<T: 'static> Scheduler<T> {
    /// `node_of_worker[index]` is the node of a worker, and `order[node]` all nodes by distance from
    /// that one, itself first. `node_of_cpu[cpu]` is the node of whoever runs there; CPUs that are
    /// not in it are at the first. Nobody is started yet.
    pub fn new(
        node_of_worker: &[usize],
        order: &[Vec<usize>],
        node_of_cpu: Box<[u16]>,
    ) -> Arc<Self> {
        Self::by_clock(node_of_worker, order, node_of_cpu, now_milliseconds)
    }

    /// The same, with lanes that age by another clock, in milliseconds.
    pub(super) fn by_clock(
        node_of_worker: &[usize],
        order: &[Vec<usize>],
        node_of_cpu: Box<[u16]>,
        now: fn() -> u64,
    ) -> Arc<Self> {
        assert!(!node_of_worker.is_empty() && node_of_worker.iter().all(|it| *it < order.len()));
        assert!(node_of_cpu.iter().all(|it| usize::from(*it) < order.len()));
        let count = node_of_worker.len();
        let member = |node: &usize| Member::new(*node, &order[*node], node_of_worker);
        Arc::new(Scheduler {
            nodes: order.iter().map(|_| Lanes::new(now)).collect(),
            members: node_of_worker.iter().map(member).collect(),
            idle: Idle::new(),
            unstarted: Lock::new((0..count).rev().collect()),
            unstarted_count: AtomicUsize::new(count),
            node_of_cpu,
            seats: AtomicUsize::new(count),
            allowed: AtomicUsize::new(count),
            closed: AtomicBool::new(false),
            over: AtomicUsize::new(0),
            sweep_at: AtomicUsize::new(SWEEP_COUNT),
        })
    }

    /// How many workers there may be.
    pub fn worker_count(&self) -> usize {
        self.members.len()
    }

    /// The node of the CPU that this thread runs on; it may run on another a moment later.
    #[inline]
    pub fn node_here(&self) -> usize {
        if self.node_of_cpu.is_empty() {
            return 0;
        }
        let node = current_cpu().and_then(|cpu| self.node_of_cpu.get(cpu));
        node.map_or(0, |node| usize::from(*node))
    }

    /// Queue a task at a node. It may have been run by the time this returns.
    #[inline]
    pub fn push(&self, node: usize, priority: Priority, task: T) -> Queued {
        self.nodes[node].push(priority, task);
        self.queued(node)
    }

    /// Queue tasks at a node, in order, and wake whom they need.
    pub fn push_many(
        &self,
        node: usize,
        priority: Priority,
        tasks: impl IntoIterator<Item = T>,
    ) -> Queued {
        for task in tasks {
            self.nodes[node].push(priority, task);
        }
        self.queued(node)
    }

    #[inline]
    pub(super) fn queued(&self, node: usize) -> Queued {
        self.seek_at(node);
        // After the fence in `seek`: a worker that ends has seen the task, or this sees the end.
        if self.closed.load(Ordering::SeqCst) {
            return Queued::TooLate;
        }
        if self.unstarted_count.load(Ordering::Relaxed) > 0 {
            return self.start();
        }
        Queued::Done
    }

    /// Wake a sleeper for what is in a queue of a node now, if nobody looks for work.
    #[inline]
    pub(super) fn seek_at(&self, node: usize) {
        let choose = |sleepers: &[Sleeper]| self.choose(Some(node), sleepers);
        if let Some(who) = self.idle.seek(choose) {
            self.call(who);
        }
    }

    /// The same for what is in any queue.
    pub(super) fn seek(&self) {
        if let Some(who) = self.idle.seek(|sleepers| self.choose(None, sleepers)) {
            self.call(who);
        }
    }

    pub(super) fn call(&self, who: usize) {
        let member = &self.members[who];
        member.tally.add(&member.tally.wakes);
        member.parker.call();
    }

    /// A worker more, if more tasks wait than workers look for some.
    #[cold]
    pub fn start(&self) -> Queued {
        let (searching, sleeping) = self.idle.counts();
        let over = self.over.load(Ordering::Relaxed);
        if self.queued_count().saturating_sub(over) <= searching + sleeping {
            return Queued::Done;
        }
        let mut unstarted = self.unstarted.lock();
        let Some(who) = unstarted.pop() else {
            return Queued::Done;
        };
        self.unstarted_count
            .store(unstarted.len(), Ordering::Relaxed);
        self.idle.search();
        Queued::Start(who)
    }

    /// The number that the thread of a worker that is to be started enters with.
    pub fn next_start(&self, who: usize) -> u64 {
        self.members[who].next_start()
    }

    /// The start of a worker failed; if its thread has entered all the same, it stays. Otherwise it
    /// is not to enter any more.
    pub fn not_started(&self, who: usize) {
        if !self.members[who].take_back() {
            return;
        }
        let mut unstarted = self.unstarted.lock();
        unstarted.push(who);
        self.unstarted_count
            .store(unstarted.len(), Ordering::Relaxed);
        drop(unstarted);
        self.found();
    }

    /// The worker that was to be started, for its thread; `None`: that was taken back.
    pub fn enter(self: &Arc<Self>, who: usize, start: u64) -> Option<Worker<T>> {
        Worker::new(Arc::clone(self), who, start)
    }

    pub(super) fn found(&self) {
        let choose = |sleepers: &[Sleeper]| self.choose(None, sleepers);
        if let Some(who) = self.idle.found(|| self.has_work(), choose) {
            self.call(who);
        }
    }

    #[inline]
    pub(super) fn lanes(&self, node: usize) -> &Lanes<T> {
        &self.nodes[node]
    }

    /// Whether a task is queued anywhere and may be run.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.free_seats() > 0 && self.has_tasks()
    }

    fn has_tasks(&self) -> bool {
        !self.nodes.iter().all(Lanes::is_empty)
            || !self.members.iter().all(|member| member.stealer.is_empty())
    }

    /// How many tasks are queued, those that are over included.
    pub fn queued_count(&self) -> usize {
        let lanes: usize = self.nodes.iter().flat_map(Lanes::counts).sum();
        let deques = self.members.iter().map(|member| member.stealer.len());
        lanes + deques.sum::<usize>()
    }

    /// How many tasks are queued, those that are over included: by node, in its lanes.
    pub fn lane_counts(&self) -> Vec<[usize; PRIORITY_COUNT]> {
        self.nodes.iter().map(Lanes::counts).collect()
    }

    /// How many tasks are in each worker's deque, those that are over included.
    pub fn deque_counts(&self) -> Vec<usize> {
        self.members.iter().map(|it| it.stealer.len()).collect()
    }

    /// What each worker has done.
    pub fn counts(&self) -> Vec<Counts> {
        self.members.iter().map(|it| it.tally.read()).collect()
    }

    /// A worker begins to run a task; called in its thread.
    #[inline]
    pub fn began(&self, who: usize) {
        let tally = &self.members[who].tally;
        tally.step(&tally.executed);
    }

    /// How many workers were started.
    pub fn started_count(&self) -> usize {
        self.members.len() - self.unstarted_count.load(Ordering::Relaxed)
    }

    /// Leave to run tasks in this thread, until it is given back. False: as many as may run do.
    #[inline]
    pub fn take_seat(&self) -> bool {
        let mut free = self.seats.load(Ordering::SeqCst);
        while free as isize > 0 {
            let swap = self.seats.compare_exchange_weak(
                free,
                free - 1,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            match swap {
                Ok(_) => return true,
                Err(seen) => free = seen,
            }
        }
        false
    }

    /// Give back what [`Scheduler::take_seat`] gave, to a worker that sleeps for the want of it.
    pub fn give_seat(&self) {
        let free = self.leave_seat() as isize;
        if self.is_closed() {
            // One who slept for the want of a seat may have nothing left to wait for.
            self.wake_all();
        }
        // Whoever sleeps for the want of a seat saw none: the one who gave the first back woke it, or
        // one who wakes it.
        if free <= 0 {
            fence(Ordering::SeqCst);
            if self.has_tasks() {
                self.seek();
            }
        }
    }

    /// How many were free before, in two's complement.
    pub(super) fn leave_seat(&self) -> usize {
        let before = self.seats.fetch_add(1, Ordering::SeqCst);
        debug_assert!((before as isize) < self.members.len() as isize);
        before
    }

    #[inline]
    pub(super) fn free_seats(&self) -> isize {
        self.seats.load(Ordering::SeqCst) as isize
    }

    /// Let `count` tasks run at once from now on, at least one and at most one a worker. Those that
    /// run are not interrupted: their workers leave after the task they are at.
    pub fn allow(&self, count: usize) {
        let count = count.clamp(1, self.members.len());
        let before = self.allowed.swap(count, Ordering::Relaxed);
        self.seats
            .fetch_add(count.wrapping_sub(before), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for _ in before..count {
            if self.has_tasks() {
                self.seek();
            }
        }
    }

    /// How many may run at once.
    pub fn allowed_count(&self) -> usize {
        self.allowed.load(Ordering::Relaxed)
    }

    /// How many run tasks, or look for the next one.
    pub fn running_count(&self) -> usize {
        let running = self.allowed_count() as isize - self.free_seats();
        running.clamp(0, self.members.len() as isize) as usize
    }

    /// Whether more run than may: who has a seat is to leave it.
    #[inline]
    pub fn is_crowded(&self) -> bool {
        (self.seats.load(Ordering::Relaxed) as isize) < 0
    }

    /// The oldest task of the most urgent lane, for a thread that has a seat and is no worker.
    pub fn take_first(&self) -> Option<T> {
        let mut each = self.nodes.iter();
        if let Some(task) = each.find_map(Lanes::take_overdue) {
            return Some(task);
        }
        [
            Priority::Realtime,
            Priority::High,
            Priority::Normal,
            Priority::Background,
        ]
        .into_iter()
        .find_map(|priority| self.nodes.iter().find_map(|lanes| lanes.take(priority)))
    }

    /// A task ended while it was queued. Swept out are, sooner or later, those for which `is_over`.
    #[inline]
    pub fn died(&self, is_over: impl Fn(&T) -> bool) {
        let over = self.over.fetch_add(1, Ordering::Relaxed) + 1;
        if over > self.sweep_at.load(Ordering::Relaxed) {
            self.sweep(is_over);
        }
    }

    /// A task came out of a queue that was over already.
    #[inline]
    pub fn buried(&self) {
        let over = self.over.load(Ordering::Relaxed);
        self.over.store(over.saturating_sub(1), Ordering::Relaxed);
    }

    #[cold]
    fn sweep(&self, is_over: impl Fn(&T) -> bool) {
        // Nobody else begins one meanwhile.
        if self.sweep_at.swap(usize::MAX, Ordering::AcqRel) == usize::MAX {
            return;
        }
        // Each that is not over is queued again: not while those are the most.
        let most = self.queued_count() / 2;
        if self.over.load(Ordering::Relaxed) < most {
            self.sweep_at.store(most, Ordering::Release);
            return;
        }
        let swept: Vec<Vec<T>> = self.nodes.iter().map(|it| it.sweep(&is_over)).collect();
        self.over.store(0, Ordering::Relaxed);
        // What is left costs a look each time: the next sweep comes when as many are over again.
        let next = SWEEP_COUNT.max(self.queued_count());
        self.sweep_at.store(next, Ordering::Release);
        drop(swept);
    }

    /// Take no more tasks. Workers end when nothing is queued.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.wake_all();
    }

    /// Whether it is closed, and nothing is queued.
    pub(super) fn is_done(&self) -> bool {
        let closed = self.is_closed();
        // Pairs with the fence in `Idle::seek`: a task was queued before that, or whoever queued it
        // sees that this is closed.
        fence(Ordering::SeqCst);
        closed && !self.has_tasks()
    }

    pub(super) fn wake_all(&self) {
        for who in self.idle.wake_all() {
            self.call(who);
        }
    }

    /// Whether it was closed.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Everything that is queued in lanes and can be stolen from deques.
    pub fn take_all(&self) -> Vec<T> {
        let mut found = Vec::new();
        while let Some(task) = self.take_first() {
            found.push(task);
        }
        for member in &self.members {
            while let Some(task) = super::worker::steal(&member.stealer) {
                found.push(task);
            }
        }
        found
    }
}
