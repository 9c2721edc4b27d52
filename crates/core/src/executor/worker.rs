//! One worker: its deque, where it looks for tasks, and how it rests.

use super::idle::Outlook;
use super::lanes::Priority;
use super::patience::PATIENCE;
use super::scheduler::{Counts, Queued, Scheduler};
use crate::os::now_nanoseconds;
use crate::sync::parker::{Parked, Parker};
use crate::sync::{AtomicU64, Lock, Ordering, spin};
use crossbeam_deque::{Steal, Stealer, Worker as Deque};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

/// One look in so many goes to the own node's lanes before the own deque, so that a task that queues
/// its own successor does not keep others out.
const FAIR_TURNS: u32 = 61;
/// How long a worker looks for work before it sleeps, at least and at most. The most is what going to
/// sleep and being woken cost, so that looking in vain never costs more than twice what it may save.
const SHORTEST_LOOK_NANOSECONDS: u64 = 2_000;
const LONGEST_LOOK_NANOSECONDS: u64 = 50_000;
/// Tasks that one steal from another node brings besides the one that is run, at most.
const MOST_BROUGHT: usize = 32;
/// A sleep that a look of the longest kind might have spared, its end included.
const SHORT_SLEEP_NANOSECONDS: u64 = 100_000;

/// What others see of a worker.
pub(super) struct Member<T: 'static> {
    pub(super) node: usize,
    /// All nodes by distance from its own, itself first.
    pub(super) order: Vec<usize>,
    /// The workers of each of these nodes, itself too.
    neighbours: Vec<Vec<usize>>,
    /// Until its thread enters. The number changes when a start is taken back, so that a thread
    /// that comes too late finds that it is not wanted any more.
    entrance: Lock<(u64, Option<Deque<T>>)>,
    pub(super) stealer: Stealer<T>,
    pub(super) parker: Parker,
    pub(super) tally: Tally,
}

impl<T: 'static> Member<T> {
    pub(super) fn new(node: usize, order: &[usize], node_of_worker: &[usize]) -> Self {
        let deque = Deque::new_lifo();
        let of_node = |node: &usize| {
            let all = node_of_worker.iter().enumerate();
            all.filter(|(_, of)| *of == node)
                .map(|(who, _)| who)
                .collect()
        };
        Member {
            node,
            order: order.to_vec(),
            neighbours: order.iter().map(of_node).collect(),
            stealer: deque.stealer(),
            entrance: Lock::new((0, Some(deque))),
            parker: Parker::default(),
            tally: Tally::default(),
        }
    }
}

impl<T: 'static> Member<T> {
    /// The number of the next start.
    pub(super) fn next_start(&self) -> u64 {
        self.entrance.lock().0
    }

    /// Take a start back; false if the thread has entered.
    pub(super) fn take_back(&self) -> bool {
        let mut entrance = self.entrance.lock();
        entrance.0 += 1;
        entrance.1.is_some()
    }
}

/// [`Counts`] as they are counted; read by reports only, so `Relaxed` suffices. Apart from what
/// other workers write.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Tally {
    pub(super) executed: AtomicU64,
    from_lanes: AtomicU64,
    from_own: AtomicU64,
    stolen_same_node: AtomicU64,
    stolen_cross_node: AtomicU64,
    failed_steals: AtomicU64,
    pub(super) parks: AtomicU64,
    pub(super) wakes: AtomicU64,
}

impl Tally {
    #[inline]
    pub(super) fn add(&self, count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// As `add`, for a count that only its worker writes.
    #[inline]
    pub(super) fn step(&self, count: &AtomicU64) {
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Counts {
        Counts {
            executed: self.executed.load(Ordering::Relaxed),
            from_lanes: self.from_lanes.load(Ordering::Relaxed),
            from_own: self.from_own.load(Ordering::Relaxed),
            stolen_same_node: self.stolen_same_node.load(Ordering::Relaxed),
            stolen_cross_node: self.stolen_cross_node.load(Ordering::Relaxed),
            failed_steals: self.failed_steals.load(Ordering::Relaxed),
            parks: self.parks.load(Ordering::Relaxed),
            wakes: self.wakes.load(Ordering::Relaxed),
        }
    }
}

/// Why a rest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// There is something to look for.
    Work,
    /// There is something that it has left to another node's workers for long enough.
    Late,
    /// The scheduler is closed and nothing is queued: the worker is to end.
    Closed,
}

/// A worker, in its own thread. It begins as one that looks for work.
pub struct Worker<T: 'static> {
    scheduler: Arc<Scheduler<T>>,
    index: usize,
    deque: Deque<T>,
    turn: Cell<u32>,
    /// How long to look before sleeping: longer while sleeps are short.
    look_nanoseconds: Cell<u64>,
    searching: Cell<bool>,
    /// Whether it has left what is on other nodes to their workers for long enough.
    is_late: Cell<bool>,
}

impl<T: 'static> Worker<T> {
    pub(super) fn new(scheduler: Arc<Scheduler<T>>, index: usize, start: u64) -> Option<Self> {
        let deque = {
            let mut entrance = scheduler.members[index].entrance.lock();
            if entrance.0 != start {
                return None;
            }
            entrance.1.take()?
        };
        Some(Worker {
            deque,
            scheduler,
            index,
            turn: Cell::new(0),
            look_nanoseconds: Cell::new(SHORTEST_LOOK_NANOSECONDS),
            searching: Cell::new(true),
            is_late: Cell::new(false),
        })
    }

    /// The scheduler it works for.
    pub fn scheduler(&self) -> &Arc<Scheduler<T>> {
        &self.scheduler
    }

    /// Its place among the workers.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its node.
    pub fn node(&self) -> usize {
        self.member().node
    }

    #[inline]
    fn member(&self) -> &Member<T> {
        &self.scheduler.members[self.index]
    }

    /// Queue a task where this worker takes it first, last come first served.
    #[inline]
    pub fn push(&self, task: T) -> Queued {
        self.deque.push(task);
        self.scheduler.queued(self.node())
    }

    /// Take the task that was pushed last out of the deque, if it is the one that `is_it`.
    #[inline]
    pub fn take_back(&self, is_it: impl Fn(&T) -> bool) -> Option<T> {
        let task = self.deque.pop()?;
        if is_it(&task) {
            return Some(task);
        }
        self.deque.push(task);
        // Whoever looked while it was nowhere to be seen may sleep now.
        if self.deque.len() == 1 {
            self.scheduler.seek_at(self.node());
        }
        None
    }

    /// The next task, for a worker that has a seat.
    #[inline]
    pub fn take(&self) -> Option<T> {
        let task = self.look();
        self.is_late.set(false);
        if task.is_some() && self.searching.replace(false) {
            self.scheduler.found();
        }
        task
    }

    fn look(&self) -> Option<T> {
        let member = self.member();
        let tally = &member.tally;
        let turn = self.turn.get().wrapping_add(1);
        self.turn.set(turn);
        let lanes = || member.order.iter().map(|node| self.scheduler.lanes(*node));
        let take = |priority| lanes().find_map(|lanes| lanes.take(priority));
        let urgent = lanes()
            .find_map(|lanes| lanes.take_overdue())
            .or_else(|| take(Priority::Realtime))
            .or_else(|| take(Priority::High))
            .or_else(|| {
                if turn % FAIR_TURNS == 0 {
                    self.scheduler.lanes(member.node).take(Priority::Normal)
                } else {
                    None
                }
            });
        if urgent.is_some() {
            tally.step(&tally.from_lanes);
            return urgent;
        }
        if let Some(task) = self.deque.pop() {
            tally.step(&tally.from_own);
            return Some(task);
        }
        // Node by node: what waits on the own one is nearer than any other node's lane.
        for (distance, node) in member.order.iter().enumerate() {
            if let Some(task) = self.scheduler.lanes(*node).take(Priority::Normal) {
                tally.step(&tally.from_lanes);
                return Some(task);
            }
            let stolen = match distance {
                0 => self.steal_at_home(),
                _ if self.leaves(*node) => None,
                _ => self.steal_from_afar(distance),
            };
            if stolen.is_some() {
                return stolen;
            }
        }
        if self.scheduler.members.len() > 1 {
            tally.step(&tally.failed_steals);
        }
        let last = take(Priority::Background);
        if last.is_some() {
            tally.step(&tally.from_lanes);
        }
        last
    }

    /// Whether it leaves what is queued at another node to the workers there.
    fn leaves(&self, node: usize) -> bool {
        !self.is_late.get() && self.scheduler.is_left(node) && !self.scheduler.has_lane_tasks()
    }

    /// The workers of a node, by its place in the order. Where they begin changes each time.
    fn neighbours(&self, distance: usize) -> impl Iterator<Item = usize> {
        let node = &self.member().neighbours[distance];
        let first = self.turn.get() as usize;
        (0..node.len()).map(move |step| node[(step + first) % node.len()])
    }

    /// The oldest task of another worker of the own node.
    fn steal_at_home(&self) -> Option<T> {
        let others = self.neighbours(0).filter(|who| *who != self.index);
        let task = others
            .map(|who| &self.scheduler.members[who].stealer)
            .find_map(steal)?;
        let tally = &self.member().tally;
        tally.step(&tally.stolen_same_node);
        Some(task)
    }

    /// The older half of what each worker of another node has, first of the one with most: one task
    /// to run, the rest in the own deque, where the neighbours find it.
    fn steal_from_afar(&self, distance: usize) -> Option<T> {
        let stealer = |who: usize| &self.scheduler.members[who].stealer;
        let (task, victim) = loop {
            let (count, from) = self
                .neighbours(distance)
                .map(|who| (stealer(who).len(), who))
                .max_by_key(|(count, _)| *count)?;
            if count == 0 {
                return None;
            }
            match stealer(from).steal_batch_with_limit_and_pop(&self.deque, MOST_BROUGHT) {
                Steal::Success(task) => break (task, from),
                Steal::Empty | Steal::Retry => std::hint::spin_loop(),
            }
        };
        for who in self.member().neighbours[distance].iter().copied() {
            let room = MOST_BROUGHT.saturating_sub(self.deque.len());
            // The last one of a deque stays where it is; what another thief is quicker at, too.
            if who != victim && room > 0 && stealer(who).len() > 1 {
                let _ = stealer(who).steal_batch_with_limit(&self.deque, room);
            }
        }
        let tally = &self.member().tally;
        tally.step(&tally.stolen_cross_node);
        // For a moment the rest was nowhere to be seen, and whoever looked may sleep now. One who
        // counts as looking wakes the next by that.
        if !self.searching.get() && !self.deque.is_empty() {
            self.scheduler.seek_at(self.node());
        }
        Some(task)
    }

    /// A task that is likely to be a descendant of the one this worker waits for: of its own deque,
    /// or of the deque of the worker that is at that one.
    pub fn take_related(&self, runner: Option<usize>) -> Option<T> {
        let tally = &self.member().tally;
        if let Some(task) = self.deque.pop() {
            tally.step(&tally.from_own);
            return Some(task);
        }
        let runner = runner.filter(|runner| *runner != self.index)?;
        let task = steal(&self.scheduler.members[runner].stealer)?;
        let same = self.scheduler.members[runner].node == self.node();
        tally.step(if same {
            &tally.stolen_same_node
        } else {
            &tally.stolen_cross_node
        });
        Some(task)
    }

    /// Sleep until there is something to look for.
    pub fn rest(&self) -> Rest {
        let mut look_nanoseconds = self.begin_rest();
        let rest = self.scheduler.rest(self.index, &mut look_nanoseconds);
        self.end_rest(rest, look_nanoseconds);
        rest
    }

    /// This worker looks for work from now on, as [`Scheduler::rest`] wants it; how long.
    pub fn begin_rest(&self) -> u64 {
        if !self.searching.replace(true) {
            self.scheduler.idle.search();
        }
        self.look_nanoseconds.get()
    }

    /// What came of [`Scheduler::rest`].
    pub fn end_rest(&self, rest: Rest, look_nanoseconds: u64) {
        self.look_nanoseconds.set(look_nanoseconds);
        self.is_late.set(rest == Rest::Late);
        if rest == Rest::Closed {
            self.searching.set(false);
        }
    }

    /// As [`Scheduler::take_seat`].
    pub fn take_seat(&self) -> bool {
        self.scheduler.take_seat()
    }

    /// Give the seat back, before a rest.
    pub fn leave_seat(&self) {
        self.scheduler.leave_seat();
    }
}

/// Look for so long, over and over, after a while letting others have the CPU in between; whether there
/// was something.
fn look_for(nanoseconds: u64, is_due: impl Fn() -> bool) -> bool {
    let until = now_nanoseconds() + nanoseconds;
    for round in 0.. {
        spin(round);
        if is_due() {
            return true;
        }
        if now_nanoseconds() >= until {
            break;
        }
    }
    false
}

impl<T: 'static> Scheduler<T> {
    /// Have the worker `who`, which looks for work, sleep until there is some. It looks some more
    /// first, longer while its sleeps are short.
    ///
    /// Source: Karlin, Li, Manasse and Owicki, Empirical studies of competitive spinning, SOSP 1991.
    pub fn rest(&self, who: usize, look_nanoseconds: &mut u64) -> Rest {
        let outlook = || match self.outlook(who) {
            Outlook::Work => Outlook::Work,
            _ if self.is_done() => Outlook::Work,
            other => other,
        };
        loop {
            if !look_for(*look_nanoseconds, || outlook() == Outlook::Work) {
                let kind = self.sleep(who, outlook);
                if kind != Outlook::Work {
                    let since = now_nanoseconds();
                    let is_late = self.park(who, kind);
                    // A look more would have spared a short sleep, and none a long one.
                    *look_nanoseconds = if now_nanoseconds() - since < SHORT_SLEEP_NANOSECONDS {
                        (*look_nanoseconds * 2).min(LONGEST_LOOK_NANOSECONDS)
                    } else {
                        (*look_nanoseconds / 2).max(SHORTEST_LOOK_NANOSECONDS)
                    };
                    if is_late && self.has_work() {
                        return Rest::Late;
                    }
                }
            }
            if self.outlook(who) == Outlook::Work {
                return Rest::Work;
            }
            if self.is_done() {
                self.found();
                // Who slept for the want of a seat has nothing left to wait for.
                self.wake_all();
                return Rest::Closed;
            }
        }
    }

    /// As [`Idle::sleep`]; counted, if it sleeps.
    pub(super) fn sleep(&self, who: usize, outlook: impl Fn() -> Outlook) -> Outlook {
        let outlook = self.idle.sleep(who, outlook);
        if outlook != Outlook::Work {
            let tally = &self.members[who].tally;
            tally.step(&tally.parks);
        }
        if outlook == Outlook::Later {
            // Those whom it is left to may sleep: they were not woken while this one looked.
            self.seek();
        }
        outlook
    }

    /// Park until called, or for a while; whether that is over.
    fn park(&self, who: usize, outlook: Outlook) -> bool {
        let parker = &self.members[who].parker;
        let mut patience = (outlook == Outlook::Later).then_some(PATIENCE);
        let until = now_nanoseconds() + PATIENCE.as_nanos() as u64;
        loop {
            match parker.park(patience) {
                Parked::Called => break,
                Parked::TimedOut if self.idle.stop_waiting(who) => return true,
                Parked::TimedOut => patience = None, // it is being called
                Parked::Interrupted if patience.is_some() => {
                    let left = until.saturating_sub(now_nanoseconds());
                    patience = Some(Duration::from_nanos(left));
                }
                Parked::Interrupted => {}
            }
        }
        parker.rearm();
        false
    }
}

#[inline]
pub(super) fn steal<T>(stealer: &Stealer<T>) -> Option<T> {
    loop {
        match stealer.steal() {
            Steal::Success(task) => return Some(task),
            Steal::Empty => return None,
            Steal::Retry => std::hint::spin_loop(),
        }
    }
}
