//! Pools: a bounded number of opaque items, handed out, taken back, and queued for when all are out.
//!
//! A *permit* is the right to have one item; there are `max_count` of them. An item sits in a *slot*
//! from the day it is adopted to the day it is discarded. Each time it is handed out is a *turn*:
//! what comes back names its turn, or the item itself, so that a second release, a foreign item and
//! a lease that is over are told apart. Idle items are handed out last in, first out, while their
//! memory is warm; what rests longest is the first to be destroyed. Who finds nothing waits in order of
//! arrival, and is handed what comes back directly, so that nobody overtakes.
//!
//! Nothing foreign runs under the pool's lock: items, tags and wakers are moved, never dropped,
//! compared or called. Whatever is to be destroyed, dropped or woken is returned as [`Effects`]. The
//! one exception, the `share` of [`Pool::acquire`], says what it must not do.
//!
//! Any number of threads may call at once. After `fork` the child's pool is empty and has all its
//! permits: what the parent's had is dropped there, and items that were out do not come back.
//!
//! Left out: caches for each thread. A short lock costs less than the interpreter's call, and a
//! bound that holds over all threads needs a shared count anyway.

mod counts;
mod slots;
pub mod vector;

pub use crate::sync::parker::{Parked, Parker};
pub use counts::{Census, Statistics};
pub use slots::Turn;

use crate::resource::fork::{self, ForkLocks};
use crate::sync::Lock;
use slots::{Phase, Slots};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, MutexGuard};

/// The types that a pool moves around without looking into them.
pub trait Kind: 'static {
    /// What is pooled.
    type Item: Send;
    /// What stays with an item from [`Pool::tag`] until it is discarded.
    type Tag: Send;
    /// Wakes one who waits. The pool stores it and hands it back; the caller wakes.
    type Waker: Send;
    /// What is noted about a turn, for [`Pool::outstanding`].
    type Note: Send;
}

/// The bounds of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Items that trimming and age leave alive.
    pub min_count: usize,
    /// Permits: the most items alive or being made; at least 1.
    pub max_count: usize,
    /// Whether an acquire beyond `max_count` makes an item that is destroyed when it comes back.
    pub surplus: bool,
    /// Items that rest at least this long are to be destroyed.
    pub idle_milliseconds: Option<u64>,
}

/// How an idle item is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// To the caller, who alone owns it now, unless it was adopted as `kept`.
    Give,
    /// Shared: the pool keeps a reference until the turn ends.
    Lease,
    /// Shared and not counted yet: the caller looks at it, then calls [`Pool::confirm`] or
    /// [`Pool::reject`].
    Check,
}

/// The right to make one item. Must end in [`Pool::adopt`], [`Pool::stock`] or [`Pool::forgo`].
#[must_use]
#[derive(Debug)]
pub struct Permit {
    generation: u64,
}

/// What an acquire found.
#[must_use]
pub enum Found<K: Kind> {
    /// An idle item.
    Item {
        /// The turn that began.
        turn: Turn,
        /// The item, or a shared reference to it.
        item: K::Item,
    },
    /// No idle item, but leave to make one.
    Permit(Permit),
}

/// Why an acquire found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Every permit is taken.
    Exhausted,
    /// The pool is closed, or was inherited over a fork by one who waited.
    Closed,
}

/// What a wait came to, so far.
pub enum Waited<K: Kind> {
    /// Something was there after all; the waker was not needed.
    Found(Found<K>, K::Waker),
    /// Queued under this ticket.
    Queued(u64),
}

/// Why something is not an item of a turn that is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotHeld {
    /// It never came from this pool, or the pool has given it up.
    Foreign,
    /// It came back already.
    Returned,
    /// It is leased: the lease gives it back.
    Leased,
    /// It was acquired before a fork: the copy in the child is nobody's business.
    Inherited,
}

/// Why an item leaves the pool for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nobody wants it any more.
    Destroyed,
    /// It could not be made ready for the next turn.
    ResetFailed,
    /// Its turn ended by its collection, not by a release.
    Leaked,
    /// Its holder took it out.
    Detached,
    /// It is still in use through views, so it must not be handed out again.
    Exported,
    /// It grew beyond what is worth keeping.
    Oversize,
}

/// One who waits and has now been granted something.
pub struct Wake<K: Kind> {
    /// The ticket; if waking fails, [`Pool::cancel`] it, so that the next one gets the grant.
    pub ticket: u64,
    /// As given to [`Pool::wait`].
    pub waker: K::Waker,
}

/// What the caller has to do after the lock was released; mostly nothing, so it is one word.
#[must_use]
pub struct Effects<K: Kind>(Option<Box<Aftermath<K>>>);

/// What there is to do, and what is of no more use. Dropping it drops that.
pub struct Aftermath<K: Kind> {
    /// Wake this one.
    pub wake: Option<Wake<K>>,
    /// Destroy this item.
    pub destroy: Option<K::Item>,
    /// A reference that is of no more use.
    pub spare: Option<K::Item>,
    /// The tag of an item and the note of a turn that ended.
    pub rest: (Option<K::Tag>, Option<Box<K::Note>>),
}

impl<K: Kind> Effects<K> {
    #[inline]
    fn none() -> Self {
        Effects(None)
    }

    fn wake(wake: Option<Wake<K>>) -> Self {
        Effects(wake.map(|wake| {
            Box::new(Aftermath {
                wake: Some(wake),
                destroy: None,
                spare: None,
                rest: (None, None),
            })
        }))
    }

    /// Whether there is nothing to do, and nothing to drop.
    #[inline]
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// What there is to do, if anything.
    #[inline]
    pub fn aftermath(self) -> Option<Box<Aftermath<K>>> {
        self.0
    }

    /// Split off the reference that is of no more use to the pool.
    pub fn without_spare(mut self) -> (Self, Option<K::Item>) {
        let spare = self.0.as_mut().and_then(|aftermath| aftermath.spare.take());
        (self, spare)
    }

    /// Have the caller destroy this item.
    pub fn with_destroy(self, item: K::Item) -> Self {
        let mut aftermath = self.0.unwrap_or_else(|| {
            Box::new(Aftermath {
                wake: None,
                destroy: None,
                spare: None,
                rest: (None, None),
            })
        });
        aftermath.destroy = Some(item);
        Effects(Some(aftermath))
    }
}

/// What was granted to one who waits and has not been taken yet.
enum Grant {
    Item(u32),
    Permit,
}

/// An idle item and when it came to rest.
struct Rest {
    slot: u32,
    since_milliseconds: u64,
}

/// Invariants: `idle.len() + in_use + busy == permits`, where busy are the items (or permits) in the
/// pool's own hands: being made, looked at, reset, or granted and not taken yet; `permits <=
/// max_count` unless surplus; `waiting` is empty or `idle` is, and every permit is taken.
struct State<K: Kind> {
    slots: Slots<K>,
    idle: VecDeque<Rest>,
    /// By ticket, so oldest first.
    waiting: BTreeMap<u64, K::Waker>,
    granted: BTreeMap<u64, Grant>,
    next_ticket: u64,
    permits: usize,
    in_use: usize,
    counts: counts::Counts,
    closed: bool,
    generation: u64,
    /// Keys of what was out when this process was forked.
    inherited: HashSet<usize>,
}

/// A pool of items of `K`.
pub struct Pool<K: Kind> {
    options: Options,
    state: Lock<State<K>>,
}

impl<K: Kind> ForkLocks for Pool<K> {
    fn lock_all(&self) {
        self.state.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.state.release() };
    }
}

impl<K: Kind> State<K> {
    fn new(first_turn: u64, closed: bool) -> Self {
        State {
            slots: Slots::new(first_turn),
            idle: VecDeque::new(),
            waiting: BTreeMap::new(),
            granted: BTreeMap::new(),
            next_ticket: 0,
            permits: 0,
            in_use: 0,
            counts: counts::Counts::default(),
            closed,
            generation: fork::generation(),
            inherited: HashSet::new(),
        }
    }

    /// Hand the item of an idle or granted slot to a new turn.
    #[inline]
    fn hand_out(
        &mut self,
        slot: u32,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Found<K> {
        let turn = self.slots.begin_turn(slot);
        if hold == Hold::Check {
            self.slots.entry(slot).phase = Phase::Busy;
        } else {
            self.start_use(slot, hold);
            self.counts.hits += 1;
        }
        let entry = self.slots.entry(slot);
        let item = if hold == Hold::Give && !entry.kept {
            entry.item.take()
        } else {
            entry.item.as_ref().map(share)
        };
        Found::Item {
            turn,
            item: item.expect("an item that rests is in its slot"),
        }
    }

    #[inline]
    fn start_use(&mut self, slot: u32, hold: Hold) {
        self.slots.entry(slot).phase = if hold == Hold::Lease {
            Phase::Leased
        } else {
            Phase::InUse
        };
        self.in_use += 1;
        self.counts.peak_in_use = self.counts.peak_in_use.max(self.in_use);
    }

    /// Leave to make one more item, if there is any.
    fn take_permit(&mut self, options: &Options) -> Result<Permit, Refused> {
        if self.closed {
            return Err(Refused::Closed);
        }
        if self.permits >= options.max_count && !options.surplus {
            return Err(Refused::Exhausted);
        }
        self.permits += 1;
        Ok(Permit {
            generation: self.generation,
        })
    }

    /// Grant something to the one who waits longest.
    fn grant(&mut self, grant: Grant) -> Result<Wake<K>, Grant> {
        let Some((ticket, waker)) = self.waiting.pop_first() else {
            return Err(grant);
        };
        if let Grant::Item(slot) = grant {
            self.slots.entry(slot).phase = Phase::Busy;
        }
        self.granted.insert(ticket, grant);
        Ok(Wake { ticket, waker })
    }

    /// A permit came back: the one who waits longest may make an item with it.
    fn give_permit_back(&mut self, options: &Options) -> Option<Wake<K>> {
        if self.permits <= options.max_count
            && let Ok(wake) = self.grant(Grant::Permit)
        {
            return Some(wake);
        }
        self.permits -= 1;
        None
    }

    /// Take an item out of its slot for good and give its permit back.
    fn remove(&mut self, slot: u32, options: &Options) -> Aftermath<K> {
        let (item, tag, note) = self.slots.vacate(slot);
        Aftermath {
            wake: self.give_permit_back(options),
            destroy: item,
            spare: None,
            rest: (tag, note),
        }
    }

    /// An item whose turn is over goes to rest, or to the one who waits longest.
    #[inline]
    fn settle(
        &mut self,
        slot: u32,
        item: Option<K::Item>,
        now_milliseconds: u64,
        options: &Options,
    ) -> Effects<K> {
        let entry = self.slots.entry(slot);
        let spare = match item {
            Some(item) => entry.item.replace(item),
            None => None,
        };
        debug_assert!(
            entry.item.is_some(),
            "an item that comes back is in its slot"
        );
        let wanted = self.closed || self.permits > options.max_count || !self.waiting.is_empty();
        if wanted || spare.is_some() || entry.note.is_some() {
            return self.settle_wanted(slot, spare, now_milliseconds, options);
        }
        entry.phase = Phase::Idle;
        self.idle.push_back(Rest {
            slot,
            since_milliseconds: now_milliseconds,
        });
        Effects::none()
    }

    #[cold]
    fn settle_wanted(
        &mut self,
        slot: u32,
        spare: Option<K::Item>,
        now_milliseconds: u64,
        options: &Options,
    ) -> Effects<K> {
        if self.closed || self.permits > options.max_count {
            self.counts.destroyed += 1;
            let mut aftermath = self.remove(slot, options);
            aftermath.spare = spare;
            return Effects(Some(Box::new(aftermath)));
        }
        let note = self.slots.entry(slot).note.take();
        let wake = match self.grant(Grant::Item(slot)) {
            Ok(wake) => Some(wake),
            Err(_) => {
                self.slots.entry(slot).phase = Phase::Idle;
                self.idle.push_back(Rest {
                    slot,
                    since_milliseconds: now_milliseconds,
                });
                None
            }
        };
        Effects(Some(Box::new(Aftermath {
            wake,
            destroy: None,
            spare,
            rest: (None, note),
        })))
    }

    /// Take what was granted to a ticket.
    fn take_grant(
        &mut self,
        ticket: u64,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Option<Found<K>> {
        Some(match self.granted.remove(&ticket)? {
            Grant::Item(slot) => self.hand_out(slot, hold, share),
            Grant::Permit => Found::Permit(Permit {
                generation: self.generation,
            }),
        })
    }

    fn census(&self, options: &Options) -> Census {
        Census {
            in_use: self.in_use,
            idle: self.idle.len(),
            waiting: self.waiting.len(),
            max_count: options.max_count,
        }
    }
}

type Guard<'a, K> = MutexGuard<'a, State<K>>;

impl<K: Kind> Pool<K> {
    /// An empty pool.
    pub fn new(options: Options) -> Arc<Self> {
        debug_assert!(options.max_count >= 1 && options.min_count <= options.max_count);
        fork::shared(Pool {
            options,
            state: Lock::new(State::new(1, false)),
        })
    }

    /// The bounds given at construction.
    pub fn options(&self) -> &Options {
        &self.options
    }

    #[inline]
    fn enter(&self) -> Guard<'_, K> {
        let state = self.state.lock();
        if state.generation == fork::generation() {
            return state;
        }
        self.enter_child(state)
    }

    /// Start afresh in a forked child: its parent's items may be tied to the parent.
    #[cold]
    fn enter_child<'a>(&'a self, mut state: Guard<'a, K>) -> Guard<'a, K> {
        let mut fresh = State::new(state.slots.next_turn(), state.closed);
        fresh.inherited = state.slots.keys_in_use();
        let old = std::mem::replace(&mut *state, fresh);
        drop(state);
        // Unlocked: destructors may call this pool.
        drop(old);
        self.enter()
    }

    /// An idle item, or leave to make one.
    ///
    /// `share` makes a second reference to an item. It runs under the lock: it may count references,
    /// but must run no foreign code.
    #[inline]
    pub fn acquire(
        &self,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Result<Found<K>, Refused> {
        let mut state = self.enter();
        match state.idle.pop_back() {
            Some(rest) => Ok(state.hand_out(rest.slot, hold, share)),
            None => state.take_permit(&self.options).map(Found::Permit),
        }
    }

    /// As [`Pool::acquire`], and queue if every permit is taken.
    pub fn wait(
        &self,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
        waker: K::Waker,
    ) -> Result<Waited<K>, Refused> {
        let mut state = self.enter();
        if let Some(rest) = state.idle.pop_back() {
            return Ok(Waited::Found(state.hand_out(rest.slot, hold, share), waker));
        }
        match state.take_permit(&self.options) {
            Ok(permit) => Ok(Waited::Found(Found::Permit(permit), waker)),
            Err(Refused::Exhausted) => {
                let ticket = state.next_ticket;
                state.next_ticket += 1;
                state.counts.waits += 1;
                state.waiting.insert(ticket, waker);
                Ok(Waited::Queued(ticket))
            }
            Err(Refused::Closed) => {
                drop(state);
                Err(Refused::Closed)
            }
        }
    }

    /// What was granted to a ticket; `None` while it waits.
    pub fn take(
        &self,
        ticket: u64,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Result<Option<Found<K>>, Refused> {
        let mut state = self.enter();
        match state.take_grant(ticket, hold, share) {
            Some(found) => Ok(Some(found)),
            None if state.waiting.contains_key(&ticket) => Ok(None),
            None => Err(Refused::Closed),
        }
    }

    /// Stop waiting because time is up: what was granted in the last moment, or how things stand.
    pub fn time_out(
        &self,
        ticket: u64,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Result<Result<Found<K>, Census>, Refused> {
        let mut state = self.enter();
        if let Some(found) = state.take_grant(ticket, hold, share) {
            return Ok(Ok(found));
        }
        match state.waiting.remove(&ticket) {
            Some(waker) => {
                state.counts.timeouts += 1;
                let census = state.census(&self.options);
                drop(state);
                drop(waker);
                Ok(Err(census))
            }
            None => Err(Refused::Closed),
        }
    }

    /// Stop waiting; what was granted goes to the next one. A ticket that is over is ignored.
    pub fn cancel(&self, ticket: u64, now_milliseconds: u64) -> Effects<K> {
        let mut state = self.enter();
        let effects = match state.granted.remove(&ticket) {
            Some(Grant::Item(slot)) => {
                // Nothing happened to it since it was last ready for use.
                state.settle(slot, None, now_milliseconds, &self.options)
            }
            Some(Grant::Permit) => Effects::wake(state.give_permit_back(&self.options)),
            None => Effects::none(),
        };
        let waker = state.waiting.remove(&ticket);
        drop(state);
        drop(waker);
        effects
    }

    /// Count an acquire that found nothing and did not wait.
    pub fn note_timeout(&self) -> Census {
        let mut state = self.enter();
        state.counts.timeouts += 1;
        state.census(&self.options)
    }

    /// Begin the turn of an item that was found fit. Returns a reference too many, to be dropped.
    pub fn confirm(&self, turn: Turn, hold: Hold) -> Result<Option<K::Item>, NotHeld> {
        let mut state = self.enter();
        let slot = state.slots.find(turn, Phase::Busy)?;
        state.start_use(slot, hold);
        state.counts.hits += 1;
        let entry = state.slots.entry(slot);
        Ok(if hold == Hold::Give && !entry.kept {
            entry.item.take()
        } else {
            None
        })
    }

    /// Give up an item that was found unfit, but not its permit: a new one is to be made.
    pub fn reject(&self, turn: Turn) -> Result<(Effects<K>, Permit), NotHeld> {
        let mut state = self.enter();
        let slot = state.slots.find(turn, Phase::Busy)?;
        let (item, tag, note) = state.slots.vacate(slot);
        state.counts.destroyed += 1;
        state.counts.validation_failures += 1;
        let permit = Permit {
            generation: state.generation,
        };
        let aftermath = Aftermath {
            wake: None,
            destroy: item,
            spare: None,
            rest: (tag, note),
        };
        Ok((Effects(Some(Box::new(aftermath))), permit))
    }

    /// Begin the first turn of a new item.
    ///
    /// `key` finds it again in [`Pool::release_key`]; 0 for none. A `kept` item stays in its slot
    /// during its turns. `share` as for [`Pool::acquire`].
    ///
    /// # Errors
    /// With the item and its permit: an item of this key is here already.
    pub fn adopt(
        &self,
        permit: Permit,
        item: K::Item,
        key: usize,
        kept: bool,
        hold: Hold,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Result<(Turn, K::Item), (K::Item, Permit)> {
        debug_assert!(hold != Hold::Check);
        let mut state = self.enter();
        let in_slot = kept || hold == Hold::Lease;
        let reference = in_slot.then(|| share(&item));
        let (stored, given) = match reference {
            Some(reference) => (Some(item), reference),
            None => (None, item),
        };
        let slot = match state.slots.occupy(stored, key, kept) {
            Ok(slot) => slot,
            Err(stored) => {
                drop(state);
                drop(stored);
                return Err((given, permit));
            }
        };
        state.use_permit(permit);
        state.counts.created += 1;
        state.counts.misses += 1;
        state.start_use(slot, hold);
        let turn = state.slots.begin_turn(slot);
        Ok((turn, given))
    }

    /// Put a new item to rest, or hand it to one who waits. `key` and `kept` as in [`Pool::adopt`].
    ///
    /// Returns the turn by which to [`Pool::tag`] it.
    pub fn stock(
        &self,
        permit: Permit,
        item: K::Item,
        key: usize,
        kept: bool,
    ) -> Result<Turn, (Option<K::Item>, Permit)> {
        let mut state = self.enter();
        match state.slots.occupy(Some(item), key, kept) {
            Ok(slot) => {
                state.use_permit(permit);
                state.counts.created += 1;
                state.slots.entry(slot).phase = Phase::Busy;
                Ok(state.slots.begin_turn(slot))
            }
            Err(item) => {
                drop(state);
                Err((item, permit))
            }
        }
    }

    /// Give a permit back unused, because making the item failed.
    pub fn forgo(&self, permit: Permit, failed: bool) -> Effects<K> {
        let mut state = self.enter();
        state.counts.factory_failures += u64::from(failed);
        if permit.generation != state.generation {
            return Effects::none();
        }
        Effects::wake(state.give_permit_back(&self.options))
    }

    /// Have something stay with an item as long as it is here; gives back what cannot.
    pub fn tag(&self, turn: Turn, tag: K::Tag) -> Option<K::Tag> {
        let mut state = self.enter();
        match state.slots.current(turn) {
            Ok(slot) => state.slots.entry(slot).tag.replace(tag),
            Err(_) => Some(tag),
        }
    }

    /// A reference to an item that is leased. `share` as for [`Pool::acquire`].
    pub fn peek(
        &self,
        turn: Turn,
        share: impl FnOnce(&K::Item) -> K::Item,
    ) -> Result<K::Item, NotHeld> {
        let mut state = self.enter();
        let slot = state.slots.find(turn, Phase::Leased)?;
        let item = state.slots.entry(slot).item.as_ref().map(share);
        item.ok_or(NotHeld::Returned)
    }

    /// Count an item that was given up and could not be destroyed in order.
    pub fn note_destroy_failure(&self) {
        self.enter().counts.destroy_failures += 1;
    }

    /// Say something about a turn, for [`Pool::outstanding`].
    pub fn note(&self, turn: Turn, note: Box<K::Note>) {
        let mut state = self.enter();
        let old = match state.slots.current(turn) {
            Ok(slot) => state.slots.entry(slot).note.replace(note),
            Err(_) => Some(note),
        };
        drop(state);
        drop(old);
    }

    /// End a turn; the item is ready for the next. `item` is wanted if it was given, not kept.
    ///
    /// # Errors
    /// With the item: the turn is over.
    #[inline]
    pub fn release(
        &self,
        turn: Turn,
        item: Option<K::Item>,
        now_milliseconds: u64,
    ) -> Result<Effects<K>, (NotHeld, Option<K::Item>)> {
        let mut state = self.enter();
        match state.slots.find_held(turn) {
            Ok(slot) => {
                state.in_use -= 1;
                Ok(state.settle(slot, item, now_milliseconds, &self.options))
            }
            Err(not_held) => Err((not_held, item)),
        }
    }

    /// End the turn of the item with this key. `item` makes a reference for the pool, if it has none;
    /// it runs under the lock, as `share` of [`Pool::acquire`].
    #[inline]
    pub fn release_key(
        &self,
        key: usize,
        item: impl FnOnce() -> K::Item,
        now_milliseconds: u64,
    ) -> Result<Effects<K>, NotHeld> {
        let mut state = self.enter();
        let slot = state.find_key_in_use(key)?;
        state.in_use -= 1;
        let item = state.slots.entry(slot).item.is_none().then(item);
        Ok(state.settle(slot, item, now_milliseconds, &self.options))
    }

    /// End a turn, but leave the item in the caller's hands, who has to make it ready: then
    /// [`Pool::restore`] or [`Pool::discard`] by the turn that is returned.
    pub fn withdraw(&self, turn: Turn) -> Result<Turn, NotHeld> {
        let mut state = self.enter();
        let slot = state.slots.find_held(turn)?;
        Ok(state.withdraw(slot))
    }

    /// As [`Pool::withdraw`], by key.
    pub fn withdraw_key(&self, key: usize) -> Result<Turn, NotHeld> {
        let mut state = self.enter();
        let slot = state.find_key_in_use(key)?;
        Ok(state.withdraw(slot))
    }

    /// An item that was withdrawn, stocked or checked is ready for its next turn.
    pub fn restore(
        &self,
        turn: Turn,
        item: Option<K::Item>,
        now_milliseconds: u64,
    ) -> Result<Effects<K>, (NotHeld, Option<K::Item>)> {
        let mut state = self.enter();
        match state.slots.find(turn, Phase::Busy) {
            Ok(slot) => Ok(state.settle(slot, item, now_milliseconds, &self.options)),
            Err(not_held) => Err((not_held, item)),
        }
    }

    /// Take an item that is out or withdrawn away for good; its permit goes back.
    pub fn discard(&self, turn: Turn, loss: Loss) -> Result<Effects<K>, NotHeld> {
        let mut state = self.enter();
        let slot = state.slots.current(turn)?;
        match state.slots.entry(slot).phase {
            Phase::InUse | Phase::Leased => state.in_use -= 1,
            Phase::Busy => {}
            Phase::Idle | Phase::Vacant => return Err(NotHeld::Returned),
        }
        state.counts.lose(loss);
        let mut aftermath = state.remove(slot, &self.options);
        if matches!(loss, Loss::Leaked | Loss::Detached) {
            aftermath.spare = aftermath.destroy.take();
        }
        Ok(Effects(Some(Box::new(aftermath))))
    }

    /// The item with this key was collected while it was out; `birth` is the turn it was tagged by.
    /// `None` if it is not out, or not that item any more.
    pub fn died(&self, key: usize, birth: Turn) -> Option<Effects<K>> {
        let mut state = self.enter();
        let slot = state.find_key_in_use(key).ok()?;
        if !state.slots.was_born(slot, birth) {
            return None;
        }
        state.in_use -= 1;
        state.counts.lose(Loss::Leaked);
        let mut aftermath = state.remove(slot, &self.options);
        aftermath.spare = aftermath.destroy.take();
        Some(Effects(Some(Box::new(aftermath))))
    }

    /// A permit to make an item ahead of use, while fewer than `idle_count` rest.
    pub fn permit_to_stock(&self, idle_count: usize) -> Result<Option<Permit>, Refused> {
        let mut state = self.enter();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.idle.len() >= idle_count || state.permits >= self.options.max_count {
            return Ok(None);
        }
        state.permits += 1;
        Ok(Some(Permit {
            generation: state.generation,
        }))
    }

    /// Take away the item that rests longest, if it has rested since `since_milliseconds` or before and
    /// more than `min_count` are alive. For trimming: called until it returns `None`.
    pub fn take_rested(&self, min_count: usize, since_milliseconds: u64) -> Option<Effects<K>> {
        let mut state = self.enter();
        let rested = state
            .idle
            .front()
            .is_some_and(|rest| rest.since_milliseconds <= since_milliseconds);
        if !rested || state.permits <= min_count {
            return None;
        }
        let rest = state.idle.pop_front()?;
        state.counts.destroyed += 1;
        let aftermath = state.remove(rest.slot, &self.options);
        Some(Effects(Some(Box::new(aftermath))))
    }

    /// As [`Pool::take_rested`], for what is older than the pool's own `idle_milliseconds`.
    #[inline]
    pub fn take_expired(&self, now_milliseconds: u64) -> Option<Effects<K>> {
        let limit = now_milliseconds.checked_sub(self.options.idle_milliseconds?)?;
        self.take_rested(self.options.min_count, limit)
    }

    /// Hand nothing out any more. Those who wait are returned, to be woken; what rests is left to
    /// [`Pool::take_rested`], what is out is destroyed when it comes back.
    pub fn close(&self) -> Vec<K::Waker> {
        let mut state = self.enter();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_values().collect()
    }

    /// Whether [`Pool::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.enter().closed
    }

    /// What happened so far.
    pub fn statistics(&self) -> Statistics {
        let state = self.enter();
        state
            .counts
            .statistics(state.census(&self.options), state.permits)
    }

    /// What `describe` says of each item that is out, oldest turn first.
    ///
    /// `describe` runs under the lock: it may count references, but must run no foreign code.
    pub fn outstanding<R>(
        &self,
        mut describe: impl FnMut(Option<&K::Item>, Option<&K::Tag>, Option<&K::Note>) -> R,
    ) -> Vec<R> {
        let mut state = self.enter();
        let mut found = state.slots.held();
        found.sort_unstable();
        let slots = &mut state.slots;
        found
            .into_iter()
            .map(|(_, slot)| {
                let entry = slots.entry(slot);
                describe(
                    entry.item.as_ref(),
                    entry.tag.as_ref(),
                    entry.note.as_deref(),
                )
            })
            .collect()
    }

    /// Show every item, tag and waker that the pool refers to; under the lock, as `outstanding`.
    pub fn visit<E>(
        &self,
        mut item: impl FnMut(&K::Item) -> Result<(), E>,
        mut tag: impl FnMut(&K::Tag) -> Result<(), E>,
        mut waker: impl FnMut(&K::Waker) -> Result<(), E>,
    ) -> Result<(), E> {
        // Not `enter`: this may be called by a collector, which must see what is there unchanged.
        let state = self.state.lock();
        for entry in state.slots.iter() {
            entry.item.as_ref().map_or(Ok(()), &mut item)?;
            entry.tag.as_ref().map_or(Ok(()), &mut tag)?;
        }
        state.waiting.values().try_for_each(&mut waker)
    }

    /// Drop everything the pool refers to and close it, to break a cycle that nobody uses any more.
    pub fn sever(&self) {
        let mut state = self.state.lock();
        let closed = State::new(state.slots.next_turn(), true);
        let old = std::mem::replace(&mut *state, closed);
        drop(state);
        drop(old);
    }
}

impl<K: Kind> State<K> {
    /// A permit becomes an item. One from before a fork is not among those counted here.
    fn use_permit(&mut self, permit: Permit) {
        if permit.generation != self.generation {
            self.permits += 1;
        }
    }

    fn withdraw(&mut self, slot: u32) -> Turn {
        self.in_use -= 1;
        self.slots.entry(slot).phase = Phase::Busy;
        self.slots.begin_turn(slot)
    }

    #[inline]
    fn find_key_in_use(&mut self, key: usize) -> Result<u32, NotHeld> {
        let Some(slot) = self.slots.by_key(key) else {
            // Once: another object may come to lie where the inherited one lay.
            return Err(if self.inherited.remove(&key) {
                NotHeld::Inherited
            } else {
                NotHeld::Foreign
            });
        };
        match self.slots.entry(slot).phase {
            Phase::InUse => Ok(slot),
            Phase::Leased => Err(NotHeld::Leased),
            Phase::Idle | Phase::Busy | Phase::Vacant => Err(NotHeld::Returned),
        }
    }
}

#[cfg(test)]
mod tests;
