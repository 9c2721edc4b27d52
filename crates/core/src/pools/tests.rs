//! The pool against a plain model, with items, tags and wakers that object to being dropped, or
//! shared out of turn, while the pool's lock is held.

use super::*;
use proptest::prelude::*;
use std::sync::Weak;
use std::sync::mpsc;
use std::time::Duration;

/// Panics when dropped under the lock of its pool: where a destructor that calls the pool would hang.
struct Watched {
    id: usize,
    pool: Weak<Pool<Plain>>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Some(pool) = self.pool.upgrade() else {
            return;
        };
        assert!(
            pool.state.try_lock().is_some() || std::thread::panicking(),
            "{} is dropped under the lock",
            self.id
        );
        // What a destructor may do.
        pool.statistics();
    }
}

struct Plain;

impl Kind for Plain {
    type Item = Watched;
    type Tag = Watched;
    type Waker = Watched;
    type Note = Watched;
}

fn share(item: &Watched) -> Watched {
    Watched {
        id: item.id,
        pool: item.pool.clone(),
    }
}

fn options(max_count: usize) -> Options {
    Options {
        min_count: 0,
        max_count,
        surplus: false,
        idle_milliseconds: None,
    }
}

fn watched(pool: &Arc<Pool<Plain>>, id: usize) -> Watched {
    Watched {
        id,
        pool: Arc::downgrade(pool),
    }
}

/// An item that is out: what the caller has of it.
struct Out {
    id: usize,
    turn: Turn,
    item: Option<Watched>,
    leased: bool,
}

#[derive(Clone, Copy, Debug)]
enum After {
    Ready,
    ResetFailed,
}

#[derive(Clone, Debug)]
enum Step {
    Acquire { hold: u8, fails: bool },
    Wait,
    Take { hold: u8, fails: bool },
    Cancel { index: usize },
    TimeOut { index: usize },
    Release { index: usize },
    ReleaseByKey { index: usize },
    Reset { index: usize, after: After },
    Lose { index: usize, loss: u8 },
    Die { index: usize },
    Stock { fails: bool },
    Trim { age: u64 },
    Expire,
    Tick { milliseconds: u64 },
    Close,
    Nonsense { slot: u32, number: u64, key: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let index = 0usize..8;
    prop_oneof![
        6 => (0u8..3, any::<bool>()).prop_map(|(hold, fails)| Step::Acquire { hold, fails }),
        2 => Just(Step::Wait),
        3 => (0u8..3, any::<bool>()).prop_map(|(hold, fails)| Step::Take { hold, fails }),
        1 => index.clone().prop_map(|index| Step::Cancel { index }),
        1 => index.clone().prop_map(|index| Step::TimeOut { index }),
        5 => index.clone().prop_map(|index| Step::Release { index }),
        3 => index.clone().prop_map(|index| Step::ReleaseByKey { index }),
        2 => (index.clone(), any::<bool>()).prop_map(|(index, good)| Step::Reset {
            index,
            after: if good { After::Ready } else { After::ResetFailed },
        }),
        1 => (index.clone(), 0u8..4).prop_map(|(index, loss)| Step::Lose { index, loss }),
        1 => index.prop_map(|index| Step::Die { index }),
        1 => any::<bool>().prop_map(|fails| Step::Stock { fails }),
        1 => (0u64..20).prop_map(|age| Step::Trim { age }),
        1 => Just(Step::Expire),
        2 => (0u64..15).prop_map(|milliseconds| Step::Tick { milliseconds }),
        1 => prop_oneof![19 => Just(Step::Expire), 1 => Just(Step::Close)],
        1 => (0u32..6, 0u64..60, 1usize..60)
            .prop_map(|(slot, number, key)| Step::Nonsense { slot, number, key }),
    ]
}

/// What the pool should be, in plain lists.
#[derive(Default)]
struct Model {
    /// (id, since), longest idle first.
    idle: Vec<(usize, u64)>,
    waiting: Vec<u64>,
    /// What each ticket was granted: an item, or leave to make one.
    granted: Vec<(u64, Option<usize>)>,
    closed: bool,
    expected: Statistics,
}

struct Run {
    pool: Arc<Pool<Plain>>,
    options: Options,
    /// Whether items stay in their slots during their turns.
    kept: bool,
    model: Model,
    out: Vec<Out>,
    next_id: usize,
    now: u64,
    /// Tickets whose wakers came back from the pool, in that order.
    woken: Vec<u64>,
    tickets: Vec<u64>,
}

impl Run {
    fn new(options: Options, kept: bool) -> Self {
        Run {
            pool: Pool::new(options),
            options,
            kept,
            model: Model::default(),
            out: Vec::new(),
            next_id: 1,
            now: 1000,
            woken: Vec::new(),
            tickets: Vec::new(),
        }
    }

    fn key(id: usize) -> usize {
        id * 16
    }

    /// Note who was woken, and check what is to be destroyed.
    fn settle(&mut self, effects: Effects<Plain>, destroyed: Option<usize>) {
        let aftermath = effects.aftermath();
        if let Some(wake) = aftermath.as_ref().and_then(|it| it.wake.as_ref()) {
            self.woken.push(wake.ticket);
        }
        let item = aftermath.as_ref().and_then(|it| it.destroy.as_ref());
        assert_eq!(item.map(|item| item.id), destroyed);
    }

    /// An item is ready: to the oldest waiter, or to rest; the id if it is to be destroyed.
    fn model_ready(&mut self, id: usize) -> Option<usize> {
        let model = &mut self.model;
        let permits = model.expected.permits as usize;
        if model.closed || permits > self.options.max_count {
            model.expected.destroyed += 1;
            self.model_free();
            return Some(id);
        }
        if model.waiting.is_empty() {
            model.idle.push((id, self.now));
        } else {
            let ticket = model.waiting.remove(0);
            model.granted.push((ticket, Some(id)));
        }
        None
    }

    /// A permit is free: to the oldest waiter, or back.
    fn model_free(&mut self) {
        let model = &mut self.model;
        if model.waiting.is_empty() || model.expected.permits as usize > self.options.max_count {
            model.expected.permits -= 1;
        } else {
            let ticket = model.waiting.remove(0);
            model.granted.push((ticket, None));
        }
    }

    fn hold(number: u8) -> Hold {
        [Hold::Give, Hold::Lease, Hold::Check][number as usize]
    }

    /// What a caller does with what it found.
    fn complete(&mut self, found: Found<Plain>, hold: Hold, fails: bool, id: Option<usize>) {
        match found {
            Found::Item { turn, item } => {
                assert_eq!(Some(item.id), id, "last in, first out");
                if hold != Hold::Check {
                    self.begin(item.id, turn, Some(item), hold, true);
                } else if fails {
                    let (effects, permit) = self.pool.reject(turn).expect("it is being checked");
                    self.model.expected.destroyed += 1;
                    self.model.expected.validation_failures += 1;
                    self.settle(effects, id);
                    drop(item);
                    self.make(permit, Hold::Give, false);
                } else {
                    let surplus = self
                        .pool
                        .confirm(turn, Hold::Give)
                        .expect("it is being checked");
                    drop(surplus);
                    self.begin(item.id, turn, Some(item), Hold::Give, true);
                }
            }
            Found::Permit(permit) => {
                assert_eq!(id, None);
                let hold = if hold == Hold::Check {
                    Hold::Give
                } else {
                    hold
                };
                self.make(permit, hold, fails);
            }
        }
    }

    fn make(&mut self, permit: Permit, hold: Hold, fails: bool) {
        if fails {
            let effects = self.pool.forgo(permit, true);
            self.model.expected.factory_failures += 1;
            self.model_free();
            self.settle(effects, None);
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        let item = watched(&self.pool, id);
        let adopted = self
            .pool
            .adopt(permit, item, Self::key(id), self.kept, hold, share);
        let Ok((turn, item)) = adopted else {
            panic!("its key is new");
        };
        assert!(self.pool.tag(turn, watched(&self.pool, id)).is_none());
        self.model.expected.created += 1;
        self.begin(id, turn, Some(item), hold, false);
    }

    fn begin(&mut self, id: usize, turn: Turn, item: Option<Watched>, hold: Hold, hit: bool) {
        let expected = &mut self.model.expected;
        expected.acquires += 1;
        if hit {
            expected.hits += 1;
        } else {
            expected.misses += 1;
        }
        self.pool.note(turn, Box::new(watched(&self.pool, id)));
        self.out.push(Out {
            id,
            turn,
            item,
            leased: hold == Hold::Lease,
        });
        let count = self.out.len() as u64;
        expected_peak(&mut self.model.expected, count);
    }

    fn take_out(&mut self, index: usize) -> Option<Out> {
        let count = self.out.len();
        (count > 0).then(|| self.out.remove(index % count))
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Acquire { hold, fails } => self.acquire(Self::hold(hold), fails),
            Step::Wait => self.wait(),
            Step::Take { hold, fails } => self.take(Self::hold(hold), fails),
            Step::Cancel { index } => self.cancel(index),
            Step::TimeOut { index } => self.time_out(index),
            Step::Release { index } => self.release(index),
            Step::ReleaseByKey { index } => self.release_by_key(index),
            Step::Reset { index, after } => self.reset(index, after),
            Step::Lose { index, loss } => self.lose(index, loss),
            Step::Die { index } => self.die(index),
            Step::Stock { fails } => self.stock(fails),
            Step::Trim { age } => self.trim(0, self.now.saturating_sub(age)),
            Step::Expire => {
                if let Some(age) = self.options.idle_milliseconds {
                    self.trim(self.options.min_count, self.now.saturating_sub(age));
                }
            }
            Step::Tick { milliseconds } => self.now += milliseconds,
            Step::Close => self.close(),
            Step::Nonsense { slot, number, key } => self.nonsense(slot, number, key),
        }
        self.check();
    }

    fn acquire(&mut self, hold: Hold, fails: bool) {
        let found = self.pool.acquire(hold, share);
        match self.model_acquire() {
            Ok(id) => {
                let Ok(found) = found else {
                    panic!("refused, but there is something");
                };
                self.complete(found, hold, fails, id);
            }
            Err(refused) => assert_eq!(found.err(), Some(refused)),
        }
    }

    /// The item that an acquire gets, or `None` for leave to make one.
    fn model_acquire(&mut self) -> Result<Option<usize>, Refused> {
        let model = &mut self.model;
        if let Some((id, _)) = model.idle.pop() {
            return Ok(Some(id));
        }
        if model.closed {
            return Err(Refused::Closed);
        }
        if model.expected.permits as usize >= self.options.max_count && !self.options.surplus {
            return Err(Refused::Exhausted);
        }
        model.expected.permits += 1;
        Ok(None)
    }

    fn wait(&mut self) {
        let waker = watched(&self.pool, 0);
        let waited = self.pool.wait(Hold::Give, share, waker);
        match (waited, self.model_acquire()) {
            (Ok(Waited::Found(found, _)), Ok(id)) => self.complete(found, Hold::Give, false, id),
            (Ok(Waited::Queued(ticket)), Err(Refused::Exhausted)) => {
                self.model.expected.waits += 1;
                self.model.waiting.push(ticket);
                self.tickets.push(ticket);
            }
            (Err(Refused::Closed), Err(Refused::Closed)) => {}
            _ => panic!("the model says otherwise"),
        }
    }

    /// The oldest ticket that was woken takes what it was granted.
    fn take(&mut self, hold: Hold, fails: bool) {
        if let Some(&ticket) = self.model.waiting.first() {
            assert!(matches!(
                self.pool.take(ticket, Hold::Give, share),
                Ok(None)
            ));
        }
        if self.model.granted.is_empty() {
            return;
        }
        let (ticket, id) = self.model.granted.remove(0);
        let Ok(Some(found)) = self.pool.take(ticket, hold, share) else {
            panic!("it was granted something");
        };
        self.complete(found, hold, fails, id);
    }

    fn ticket(&self, index: usize) -> Option<u64> {
        let count = self.tickets.len();
        (count > 0).then(|| self.tickets[index % count])
    }

    fn cancel(&mut self, index: usize) {
        let Some(ticket) = self.ticket(index) else {
            return;
        };
        let granted = self.model.granted.iter().position(|it| it.0 == ticket);
        let destroyed = match granted.map(|place| self.model.granted.remove(place)) {
            Some((_, Some(id))) => self.model_ready(id),
            Some((_, None)) => {
                self.model_free();
                None
            }
            None => {
                self.model.waiting.retain(|&waiting| waiting != ticket);
                None
            }
        };
        let effects = self.pool.cancel(ticket, self.now);
        self.settle(effects, destroyed);
    }

    fn time_out(&mut self, index: usize) {
        let Some(ticket) = self.ticket(index) else {
            return;
        };
        let answer = self.pool.time_out(ticket, Hold::Give, share);
        if let Some(place) = self.model.granted.iter().position(|it| it.0 == ticket) {
            let (_, id) = self.model.granted.remove(place);
            let Ok(Ok(found)) = answer else {
                panic!("it was granted something");
            };
            self.complete(found, Hold::Give, false, id);
        } else if self.model.waiting.contains(&ticket) {
            self.model.waiting.retain(|&waiting| waiting != ticket);
            self.model.expected.timeouts += 1;
            let Ok(Err(census)) = answer else {
                panic!("it was granted nothing");
            };
            assert_eq!(census.in_use, self.out.len());
            assert_eq!(census.waiting, self.model.waiting.len());
        } else {
            assert!(matches!(answer, Err(Refused::Closed)));
        }
    }

    fn release(&mut self, index: usize) {
        let Some(out) = self.take_out(index) else {
            return;
        };
        let destroyed = self.model_ready(out.id);
        let Ok(effects) = self.pool.release(out.turn, out.item, self.now) else {
            panic!("it is out");
        };
        self.settle(effects, destroyed);
        let again = self.pool.release(out.turn, None, self.now);
        assert!(matches!(again, Err((NotHeld::Returned, None))));
    }

    fn release_by_key(&mut self, index: usize) {
        let Some(out) = self.take_out(index) else {
            return;
        };
        let key = Self::key(out.id);
        let id = out.id;
        let (pool, now) = (Arc::clone(&self.pool), self.now);
        let release = || pool.release_key(key, || watched(&pool, id), now);
        if out.leased {
            assert_eq!(release().err(), Some(NotHeld::Leased));
            self.out.push(out);
            return;
        }
        drop(out);
        let destroyed = self.model_ready(id);
        self.settle(release().expect("it is out"), destroyed);
        // Released twice, unless it is gone.
        let expected = if destroyed.is_some() {
            NotHeld::Foreign
        } else {
            NotHeld::Returned
        };
        assert_eq!(release().err(), Some(expected));
    }

    fn reset(&mut self, index: usize, after: After) {
        let Some(out) = self.take_out(index) else {
            return;
        };
        let by_key = !out.leased && out.id % 2 == 0;
        let withdrawn = if by_key {
            self.pool.withdraw_key(Self::key(out.id))
        } else {
            self.pool.withdraw(out.turn)
        };
        let turn = withdrawn.expect("it is out");
        assert!(matches!(
            self.pool.release(out.turn, None, self.now),
            Err((NotHeld::Returned, None))
        ));
        match after {
            After::Ready => {
                let destroyed = self.model_ready(out.id);
                let Ok(effects) = self.pool.restore(turn, out.item, self.now) else {
                    panic!("it was withdrawn");
                };
                self.settle(effects, destroyed);
            }
            After::ResetFailed => {
                self.model.expected.destroyed += 1;
                self.model.expected.reset_failures += 1;
                self.model_free();
                let effects = self
                    .pool
                    .discard(turn, Loss::ResetFailed)
                    .expect("it was withdrawn");
                let in_slot = self.kept || out.leased;
                self.settle(effects, in_slot.then_some(out.id));
            }
        }
    }

    fn lose(&mut self, index: usize, loss: u8) {
        let Some(out) = self.take_out(index) else {
            return;
        };
        let expected = &mut self.model.expected;
        let loss = match loss {
            0 => {
                expected.detached += 1;
                Loss::Detached
            }
            1 => {
                expected.leaked += 1;
                Loss::Leaked
            }
            2 => {
                expected.destroyed += 1;
                expected.exported += 1;
                Loss::Exported
            }
            _ => {
                expected.destroyed += 1;
                expected.oversize += 1;
                Loss::Oversize
            }
        };
        self.model_free();
        let effects = self.pool.discard(out.turn, loss).expect("it is out");
        let in_slot = self.kept || out.leased;
        let destroyed = matches!(loss, Loss::Exported | Loss::Oversize) && in_slot;
        self.settle(effects, destroyed.then_some(out.id));
        let again = self.pool.discard(out.turn, loss);
        assert_eq!(again.err(), Some(NotHeld::Returned));
    }

    /// An item that was given away is collected; its tag says so.
    fn die(&mut self, index: usize) {
        let Some(out) = self.take_out(index) else {
            return;
        };
        let slot = out.turn.slot;
        let stale = Turn { slot, number: 0 };
        assert!(self.pool.died(Self::key(out.id), stale).is_none());
        let birth = self.birth(slot);
        let effects = self.pool.died(Self::key(out.id), birth);
        if out.leased {
            assert!(effects.is_none());
            self.out.push(out);
            return;
        }
        self.model.expected.leaked += 1;
        self.model_free();
        self.settle(effects.expect("it is out"), None);
    }

    fn birth(&self, slot: u32) -> Turn {
        let state = self.pool.state.lock();
        let mut found = (1..state.slots.next_turn())
            .map(|number| Turn { slot, number })
            .filter(|&turn| state.slots.was_born(slot, turn));
        found.next_back().expect("every item was born")
    }

    fn stock(&mut self, fails: bool) {
        let idle_count = self.model.idle.len() + 1;
        let permit = self.pool.permit_to_stock(idle_count);
        if self.model.closed {
            assert_eq!(permit.err(), Some(Refused::Closed));
            return;
        }
        let permit = permit.expect("it is open");
        if self.model.expected.permits as usize >= self.options.max_count {
            assert!(permit.is_none());
            return;
        }
        let permit = permit.expect("there is room");
        self.model.expected.permits += 1;
        if fails {
            self.model.expected.factory_failures += 1;
            self.model_free();
            let effects = self.pool.forgo(permit, true);
            self.settle(effects, None);
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        let item = watched(&self.pool, id);
        let Ok(turn) = self.pool.stock(permit, item, Self::key(id), self.kept) else {
            panic!("its key is new");
        };
        assert!(self.pool.tag(turn, watched(&self.pool, id)).is_none());
        self.model.expected.created += 1;
        let destroyed = self.model_ready(id);
        let Ok(effects) = self.pool.restore(turn, None, self.now) else {
            panic!("it was stocked");
        };
        self.settle(effects, destroyed);
    }

    fn trim(&mut self, min_count: usize, limit: u64) {
        while let Some(effects) = self.pool.take_rested(min_count, limit) {
            let (id, since) = self.model.idle.remove(0);
            assert!(since <= limit);
            assert!(self.model.expected.permits as usize > min_count);
            self.model.expected.destroyed += 1;
            self.model_free();
            self.settle(effects, Some(id));
        }
        let oldest = self.model.idle.first();
        let permits = self.model.expected.permits as usize;
        assert!(oldest.is_none_or(|&(_, since)| since > limit) || permits <= min_count);
    }

    fn close(&mut self) {
        let wakers = self.pool.close();
        assert_eq!(wakers.len(), self.model.waiting.len());
        self.model.closed = true;
        self.model.waiting.clear();
        self.trim(0, u64::MAX);
    }

    fn nonsense(&mut self, slot: u32, number: u64, key: usize) {
        let turn = Turn { slot, number };
        if self.out.iter().all(|out| out.turn != turn) {
            assert!(self.pool.release(turn, None, self.now).is_err());
            assert!(self.pool.withdraw(turn).is_err());
        }
        // Keys of items are multiples of 16.
        let never = || unreachable!("there is no such item");
        let refused = self.pool.release_key(key * 16 + 8, never, self.now);
        assert_eq!(refused.err(), Some(NotHeld::Foreign));
        assert!(self.pool.withdraw_key(key * 16 + 8).is_err());
    }

    fn check(&mut self) {
        let model = &mut self.model;
        model.expected.idle = model.idle.len() as u64;
        model.expected.in_use = self.out.len() as u64;
        model.expected.waiting = model.waiting.len() as u64;
        let found = self.pool.statistics();
        assert_eq!(found, model.expected);
        assert_eq!(found.acquires, found.hits + found.misses);
        let alive = found.created - found.destroyed - found.leaked - found.detached;
        let items = model.granted.iter().filter(|it| it.1.is_some()).count();
        let permits = model.granted.len() - items;
        assert_eq!(alive, found.idle + found.in_use + items as u64);
        assert_eq!(found.permits, alive + permits as u64);
        let mut outstanding = self
            .pool
            .outstanding(|_, tag, note| (tag.map(|it| it.id), note.map(|it| it.id)));
        let mut out: Vec<_> = self
            .out
            .iter()
            .map(|it| (Some(it.id), Some(it.id)))
            .collect();
        outstanding.sort_unstable();
        out.sort_unstable();
        assert_eq!(outstanding, out);
        // Whoever was granted something was woken for it, in the order of arrival.
        let granted: Vec<u64> = model.granted.iter().map(|it| it.0).collect();
        assert!(granted.iter().all(|ticket| self.woken.contains(ticket)));
        assert!(self.woken.is_sorted());
    }
}

fn expected_peak(expected: &mut Statistics, count: u64) {
    expected.peak_in_use = expected.peak_in_use.max(count);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn a_pool_is_what_its_model_is_and_drops_nothing_under_its_lock(
        steps in prop::collection::vec(step(), 1..80),
        max_count in 1usize..5,
        min_count in 0usize..3,
        idle_milliseconds in prop::option::of(0u64..30),
        surplus in any::<bool>(),
        kept in any::<bool>(),
    ) {
        let min_count = min_count.min(max_count);
        let options = Options { min_count, max_count, surplus, idle_milliseconds };
        let mut run = Run::new(options, kept);
        for step in steps {
            run.apply(step);
        }
    }
}

fn acquire(pool: &Arc<Pool<Plain>>, id: usize) -> (Turn, Watched) {
    let Ok(found) = pool.acquire(Hold::Give, share) else {
        panic!("refused");
    };
    match found {
        Found::Item { turn, item } => (turn, item),
        Found::Permit(permit) => {
            let item = watched(pool, id);
            let Ok(adopted) = pool.adopt(permit, item, id, false, Hold::Give, share) else {
                panic!("the key is here");
            };
            adopted
        }
    }
}

#[test]
fn an_item_whose_key_is_here_is_refused_and_the_permit_comes_back() {
    let pool = Pool::<Plain>::new(options(2));
    let (turn, item) = acquire(&pool, 16);
    let Ok(Found::Permit(permit)) = pool.acquire(Hold::Give, share) else {
        panic!("there is a permit");
    };
    let refused = pool.adopt(permit, watched(&pool, 16), 16, false, Hold::Give, share);
    let Err((_, permit)) = refused else {
        panic!("the key is here");
    };
    assert!(pool.forgo(permit, false).aftermath().is_none());
    assert_eq!(pool.statistics().permits, 1);
    assert!(pool.release(turn, Some(item), 0).is_ok());
}

#[test]
fn severing_drops_what_the_pool_has_outside_its_lock_and_closes_it() {
    let pool = Pool::<Plain>::new(options(2));
    let (turn, item) = acquire(&pool, 16);
    assert!(pool.tag(turn, watched(&pool, 16)).is_none());
    assert!(pool.release(turn, Some(item), 0).is_ok());
    pool.sever();
    assert!(pool.is_closed());
    assert_eq!(pool.acquire(Hold::Give, share).err(), Some(Refused::Closed));
    assert_eq!(pool.statistics().idle, 0);
}

#[test]
fn a_visitor_sees_every_reference_the_pool_has() {
    let pool = Pool::<Plain>::new(options(1));
    let (turn, item) = acquire(&pool, 16);
    assert!(pool.tag(turn, watched(&pool, 17)).is_none());
    assert!(pool.release(turn, Some(item), 0).is_ok());
    let (turn, item) = acquire(&pool, 0);
    let Ok(Waited::Queued(_)) = pool.wait(Hold::Give, share, watched(&pool, 18)) else {
        panic!("every permit is taken");
    };
    let seen = std::cell::RefCell::new(Vec::new());
    let note = |it: &Watched| {
        seen.borrow_mut().push(it.id);
        Ok::<_, ()>(())
    };
    assert_eq!(pool.visit(note, note, note), Ok(()));
    assert_eq!(seen.take(), [17, 18]);
    assert!(pool.release(turn, Some(item), 0).is_ok());
    // Granted to the one who waits, and still referred to.
    assert_eq!(pool.visit(note, note, note), Ok(()));
    assert_eq!(seen.take(), [16, 17]);
}

/// Make a pool believe that this process is a child of the one it was used in.
fn fork(pool: &Arc<Pool<Plain>>) {
    pool.state.lock().generation = u64::MAX;
}

#[test]
fn a_child_starts_empty_and_drops_what_it_inherited_outside_the_lock() {
    let pool = Pool::<Plain>::new(options(4));
    let (idle, idle_item) = acquire(&pool, 16);
    assert!(pool.tag(idle, watched(&pool, 16)).is_none());
    let (out, out_item) = acquire(&pool, 32);
    pool.note(out, Box::new(watched(&pool, 32)));
    let (leased, leased_item) = acquire(&pool, 48);
    let (waiting, waiting_item) = acquire(&pool, 64);
    let Ok(Waited::Queued(ticket)) = pool.wait(Hold::Give, share, watched(&pool, 0)) else {
        panic!("every permit is taken");
    };
    assert!(pool.cancel(ticket, 0).aftermath().is_none());
    assert!(pool.release(idle, Some(idle_item), 0).is_ok());
    let Ok(Found::Item { turn: checked, .. }) = pool.acquire(Hold::Check, share) else {
        panic!("one is idle");
    };

    fork(&pool);

    assert_eq!(pool.statistics(), Statistics::default());
    let inherited = |turn, item| {
        let released = pool.release(turn, item, 0);
        assert!(matches!(released, Err((NotHeld::Inherited, _))));
    };
    inherited(leased, Some(leased_item));
    inherited(waiting, Some(waiting_item));
    assert_eq!(
        pool.confirm(checked, Hold::Give).err(),
        Some(NotHeld::Inherited)
    );
    // By key once: then it is a stranger's.
    drop(out_item);
    let release = || pool.release_key(32, || unreachable!("it is not taken in"), 0);
    assert_eq!(release().err(), Some(NotHeld::Inherited));
    assert_eq!(release().err(), Some(NotHeld::Foreign));
    let (turn, item) = acquire(&pool, 80);
    assert!(turn.number > checked.number);
    assert!(pool.release(turn, Some(item), 0).is_ok());
    assert_eq!(pool.statistics().permits, 1);
}

#[test]
fn a_permit_of_the_parent_is_not_counted_twice_in_a_child() {
    let pool = Pool::<Plain>::new(options(1));
    // As given out by another generation of the process.
    let permit = |pool: &Arc<Pool<Plain>>| match pool.acquire(Hold::Give, share) {
        Ok(Found::Permit(permit)) => Permit {
            generation: permit.generation + 1,
        },
        _ => panic!("there is a permit"),
    };
    let used = permit(&pool);
    assert!(matches!(pool.permit_to_stock(1), Ok(None)));
    fork(&pool);
    let adopted = pool.adopt(used, watched(&pool, 16), 16, false, Hold::Give, share);
    let Ok((turn, item)) = adopted else {
        panic!("its key is new");
    };
    assert_eq!(pool.statistics().permits, 1);
    assert!(pool.release(turn, Some(item), 0).is_ok());
    assert!(pool.take_rested(0, u64::MAX).is_some());
    let forgone = permit(&pool);
    fork(&pool);
    assert!(pool.forgo(forgone, true).aftermath().is_none());
    assert_eq!(pool.statistics().permits, 0);
}

#[test]
fn a_call_before_the_parking_is_not_lost_and_time_passes() {
    let parker = Parker::default();
    assert_eq!(
        parker.park(Some(Duration::from_micros(10))),
        Parked::TimedOut
    );
    parker.call();
    assert_eq!(parker.park(None), Parked::Called);
}

/// Many threads and few items: nothing is lost, nothing is handed out twice.
#[test]
fn threads_that_wait_are_all_served() {
    const THREADS: usize = 4;
    const TURNS: usize = 500;

    struct Threads;
    impl Kind for Threads {
        type Item = usize;
        type Tag = ();
        type Waker = Arc<Parker>;
        type Note = ();
    }
    fn wake(effects: Effects<Threads>) {
        if let Some(wake) = effects.aftermath().and_then(|it| it.wake) {
            wake.waker.call();
        }
    }

    let pool = Pool::<Threads>::new(options(2));
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let sender = sender.clone();
            let pool = &pool;
            scope.spawn(move || {
                for _ in 0..TURNS {
                    let parker = Arc::new(Parker::default());
                    let copy = |item: &usize| *item;
                    let waited = pool.wait(Hold::Give, copy, Arc::clone(&parker));
                    let found = match waited.expect("it is open") {
                        Waited::Found(found, _) => found,
                        Waited::Queued(ticket) => {
                            while parker.park(None) != Parked::Called {}
                            let taken = pool.take(ticket, Hold::Give, copy);
                            taken.expect("it is open").expect("it was called")
                        }
                    };
                    let (turn, mut item) = match found {
                        Found::Item { turn, item } => (turn, item),
                        Found::Permit(permit) => {
                            let adopted = pool.adopt(permit, 0, 0, false, Hold::Give, copy);
                            adopted.expect("it has no key")
                        }
                    };
                    item += 1;
                    wake(pool.release(turn, Some(item), 0).expect("it is out"));
                }
                sender.send(()).expect("the receiver lives");
            });
        }
    });
    drop(sender);
    assert_eq!(receiver.iter().count(), THREADS);
    let statistics = pool.statistics();
    assert_eq!(statistics.acquires, (THREADS * TURNS) as u64);
    assert_eq!((statistics.in_use, statistics.waiting), (0, 0));
    let mut turns = 0;
    while let Some(effects) = pool.take_rested(0, u64::MAX) {
        let item = effects.aftermath().and_then(|it| it.destroy);
        turns += item.expect("it rested");
    }
    assert_eq!(turns, THREADS * TURNS);
}
