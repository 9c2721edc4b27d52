//! Blocks of a resource as the items of a pool, and one of them in the hands of a user.

use super::object::Note;
use super::records::Acquisition;
use super::wait::{self, Waker, closed, settle, timed_out};
use crate::argument::{choice, count, milliseconds};
use crate::errors::{Closed, InvalidArgument, to_py};
use crate::resource::DETACH_BYTES;
use moirai_core::buffer::Buffer;
use moirai_core::os::now_milliseconds;
use moirai_core::pools::vector::{self, Vector, Viewed};
use moirai_core::pools::{
    Effects, Found, Hold, Kind, Loss, Options, Permit, Pool, Refused, Statistics, Turn, Waited,
};
use moirai_core::resource::Resource;
use moirai_core::sync::Lock;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::ptr::NonNull;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Blocks as items. They are shared with the object that a user has of them, so that a consumer
/// who does not keep his view, but that object, is not left with freed memory.
pub(super) enum Blocks {}

impl Kind for Blocks {
    type Item = Arc<Buffer>;
    type Tag = ();
    type Waker = Waker;
    type Note = Note;
}

/// A pool of blocks of one size.
pub(super) struct BlockPool {
    pool: Arc<Pool<Blocks>>,
    resource: Arc<dyn Resource>,
    block_bytes: usize,
    /// Larger blocks do not come back.
    cap_bytes: usize,
    at_once: bool,
    track_sites: bool,
}

/// A block and the turn in which it is out.
pub(super) struct Begun {
    turn: Turn,
    block: Arc<Buffer>,
    /// Whether it may hold what its last user left.
    used: bool,
}

/// The arguments that every pool of blocks has.
pub(super) struct Bounds {
    pub options: Options,
    pub at_once: bool,
    pub track_sites: bool,
}

impl Bounds {
    pub(super) fn new(
        max_count: &Bound<'_, PyAny>,
        overflow: &str,
        idle_seconds: Option<f64>,
        track_sites: bool,
    ) -> PyResult<Self> {
        let words = [
            ("block", (false, false)),
            ("raise", (true, false)),
            ("create", (false, true)),
        ];
        let (at_once, surplus) = choice("overflow", overflow, &words)?;
        Ok(Bounds {
            options: Options {
                min_count: 0,
                max_count: count("max_count", max_count, 1..=u32::MAX as usize)?,
                surplus,
                idle_milliseconds: milliseconds("idle_seconds", idle_seconds)?,
            },
            at_once,
            track_sites,
        })
    }
}

impl BlockPool {
    pub(super) fn new(
        resource: Arc<dyn Resource>,
        block_bytes: usize,
        cap_bytes: usize,
        bounds: &Bounds,
    ) -> Arc<Self> {
        Arc::new(BlockPool {
            pool: Pool::new(bounds.options),
            resource,
            block_bytes,
            cap_bytes,
            at_once: bounds.at_once,
            track_sites: bounds.track_sites,
        })
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    #[inline]
    fn settle(&self, py: Python<'_>, effects: Effects<Blocks>) -> PyResult<()> {
        if effects.is_none() {
            return Ok(());
        }
        // A block is destroyed by being dropped.
        settle(py, &self.pool, effects, |_| Ok(()))
    }

    fn expire(&self, py: Python<'_>) -> PyResult<()> {
        if self.pool.options().idle_milliseconds.is_none() {
            return Ok(());
        }
        while let Some(effects) = self.pool.take_expired(now_milliseconds()) {
            self.settle(py, effects)?;
        }
        Ok(())
    }

    /// Begin a turn: hand out an idle block, draw one, or wait.
    pub(super) fn begin(
        &self,
        py: Python<'_>,
        timeout: Option<Duration>,
        zeroed: bool,
    ) -> PyResult<Begun> {
        self.expire(py)?;
        let found = match self.pool.acquire(Hold::Give, Arc::clone) {
            Ok(found) => found,
            Err(Refused::Closed) => return Err(closed("acquire")),
            Err(Refused::Exhausted) => {
                if self.at_once || timeout.is_some_and(|it| it.is_zero()) {
                    return Err(timed_out("acquire", None, self.pool.note_timeout()));
                }
                wait::wait(py, &self.pool, Hold::Give, Arc::clone, timeout, |_| Ok(()))?
            }
        };
        self.complete(py, found, zeroed)
    }

    /// As `begin`, but queue instead of waiting.
    pub(super) fn begin_or_queue(
        &self,
        py: Python<'_>,
        timeout: Option<Duration>,
        zeroed: bool,
        wake: Py<PyAny>,
    ) -> PyResult<Result<Begun, u64>> {
        self.expire(py)?;
        let waker = Waker::Call(wake);
        let waited = if self.at_once || timeout.is_some_and(|it| it.is_zero()) {
            let found = self.pool.acquire(Hold::Give, Arc::clone);
            found.map(|found| Waited::Found(found, waker))
        } else {
            self.pool.wait(Hold::Give, Arc::clone, waker)
        };
        match waited {
            Ok(Waited::Found(found, _)) => self.complete(py, found, zeroed).map(Ok),
            Ok(Waited::Queued(ticket)) => Ok(Err(ticket)),
            Err(Refused::Exhausted) => Err(timed_out("acquire", None, self.pool.note_timeout())),
            Err(Refused::Closed) => Err(closed("acquire")),
        }
    }

    pub(super) fn take(&self, py: Python<'_>, ticket: u64, zeroed: bool) -> PyResult<Begun> {
        match self.pool.take(ticket, Hold::Give, Arc::clone) {
            Ok(Some(found)) => self.complete(py, found, zeroed),
            Ok(None) | Err(_) => Err(closed("acquire")),
        }
    }

    pub(super) fn time_out(
        &self,
        py: Python<'_>,
        ticket: u64,
        waited: Duration,
        zeroed: bool,
    ) -> PyResult<Begun> {
        match self.pool.time_out(ticket, Hold::Give, Arc::clone) {
            Ok(Ok(found)) => self.complete(py, found, zeroed),
            Ok(Err(census)) => Err(timed_out("acquire", Some(waited), census)),
            Err(_) => Err(closed("acquire")),
        }
    }

    pub(super) fn cancel(&self, py: Python<'_>, ticket: u64) -> PyResult<()> {
        self.settle(py, self.pool.cancel(ticket, now_milliseconds()))
    }

    fn complete(&self, py: Python<'_>, found: Found<Blocks>, zeroed: bool) -> PyResult<Begun> {
        let begun = match found {
            Found::Item { turn, item } => Begun {
                turn,
                block: item,
                used: true,
            },
            Found::Permit(permit) => {
                let (permit, block) = self.draw(py, permit, zeroed)?;
                let adopted = self
                    .pool
                    .adopt(permit, block, 0, false, Hold::Give, Arc::clone);
                let Ok((turn, block)) = adopted else {
                    unreachable!("only a key can be here already, and 0 is none");
                };
                Begun {
                    turn,
                    block,
                    used: false,
                }
            }
        };
        if self.track_sites {
            self.pool.note(begun.turn, Note::of_caller(py));
        }
        Ok(begun)
    }

    fn draw(
        &self,
        py: Python<'_>,
        permit: Permit,
        zeroed: bool,
    ) -> PyResult<(Permit, Arc<Buffer>)> {
        match self.draw_bytes(py, self.block_bytes, zeroed) {
            Ok(block) => Ok((permit, block)),
            Err(error) => {
                self.settle(py, self.pool.forgo(permit, true))?;
                Err(error)
            }
        }
    }

    fn draw_bytes(&self, py: Python<'_>, bytes: usize, zeroed: bool) -> PyResult<Arc<Buffer>> {
        let draw = || vector::draw(&self.resource, bytes, zeroed);
        let block = if bytes > DETACH_BYTES {
            py.detach(draw)
        } else {
            draw()
        };
        block.map_err(to_py)
    }

    /// Draw blocks until `idle_count` rest, as far as the permits go; how many were drawn.
    pub(super) fn prefill(&self, py: Python<'_>, idle_count: usize) -> PyResult<usize> {
        let mut made = 0;
        loop {
            let permit = match self.pool.permit_to_stock(idle_count) {
                Ok(Some(permit)) => permit,
                Ok(None) => return Ok(made),
                Err(_) => return Err(closed("prefill")),
            };
            let (permit, block) = self.draw(py, permit, false)?;
            let Ok(turn) = self.pool.stock(permit, block, 0, false) else {
                unreachable!("only a key can be here already, and 0 is none");
            };
            if let Ok(effects) = self.pool.restore(turn, None, now_milliseconds()) {
                self.settle(py, effects)?;
            }
            made += 1;
        }
    }

    pub(super) fn max_count(&self) -> usize {
        self.pool.options().max_count
    }

    /// Give back what has rested for at least so long; `None` is the pool's own age, or none.
    pub(super) fn trim(&self, py: Python<'_>, milliseconds: Option<u64>) -> PyResult<usize> {
        let age = milliseconds.or(self.pool.options().idle_milliseconds);
        let mut count = 0;
        let Some(limit) = now_milliseconds().checked_sub(age.unwrap_or(0)) else {
            return Ok(0);
        };
        while let Some(effects) = self.pool.take_rested(0, limit) {
            self.settle(py, effects)?;
            count += 1;
        }
        Ok(count)
    }

    pub(super) fn close(&self, py: Python<'_>) -> PyResult<()> {
        let woken = wait::wake_all(py, self.pool.close());
        self.trim(py, Some(0))?;
        woken
    }

    pub(super) fn is_closed(&self) -> bool {
        self.pool.is_closed()
    }

    pub(super) fn statistics(&self) -> Statistics {
        self.pool.statistics()
    }

    pub(super) fn outstanding(&self, kind: &str) -> Vec<Acquisition> {
        self.pool.outstanding(|_, _, note| Acquisition {
            kind: kind.to_owned(),
            site: note.and_then(|note| note.site.clone()),
            held_seconds: note.map(|note| note.since.elapsed().as_secs_f64()),
        })
    }

    pub(super) fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.pool.visit(
            |_| Ok(()),
            |()| Ok(()),
            |waker| match waker {
                Waker::Call(function) => visit.call(function),
                Waker::Thread(_) => Ok(()),
            },
        )
    }

    pub(super) fn sever(&self) {
        self.pool.sever();
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Status {
    Held,
    Released,
    Detached,
}

/// What a user has of a block, and whether he still has it.
pub(super) struct Loan {
    blocks: Arc<BlockPool>,
    turn: Turn,
    /// What the user calls it, for messages.
    noun: &'static str,
    state: Lock<LoanState>,
}

pub(super) struct LoanState {
    status: Status,
    vector: Vector,
}

impl Loan {
    /// The first `size` bytes of a block.
    pub(super) fn new(
        py: Python<'_>,
        blocks: &Arc<BlockPool>,
        begun: Begun,
        noun: &'static str,
        size: usize,
        zeroed: bool,
    ) -> Self {
        let mut vector = Vector::new(begun.block, size);
        if zeroed && begun.used {
            if size > DETACH_BYTES {
                py.detach(|| vector.zero());
            } else {
                vector.zero();
            }
        }
        Loan {
            blocks: Arc::clone(blocks),
            turn: begun.turn,
            noun,
            state: Lock::new(LoanState {
                status: Status::Held,
                vector,
            }),
        }
    }

    pub(super) fn is_from(&self, blocks: &Arc<BlockPool>) -> bool {
        Arc::ptr_eq(&self.blocks, blocks)
    }

    /// The state, unless the loan is over.
    fn held(&self) -> PyResult<MutexGuard<'_, LoanState>> {
        let state = self.state.lock();
        if state.status != Status::Released {
            return Ok(state);
        }
        drop(state);
        Err(Closed::new_err(format!(
            "{}: was released; its memory belongs to the pool again",
            self.noun
        )))
    }

    /// Begin a view: where the bytes are and how many.
    pub(super) fn view(&self) -> PyResult<(NonNull<u8>, usize)> {
        Ok(self.held()?.vector.view())
    }

    pub(super) fn end_view(&self) {
        self.state.lock().vector.end_view();
    }

    pub(super) fn size(&self) -> PyResult<usize> {
        Ok(self.held()?.vector.size())
    }

    pub(super) fn capacity(&self) -> PyResult<usize> {
        Ok(self.held()?.vector.capacity())
    }

    pub(super) fn clear(&self) -> PyResult<()> {
        let cleared = self.held()?.vector.clear();
        cleared.map_err(|viewed| self.viewed(viewed))
    }

    fn viewed(&self, viewed: Viewed) -> PyErr {
        InvalidArgument::new_err(format!(
            "{}: must have no views while its length changes, got {} (memoryviews or arrays): \
             delete them first",
            self.noun, viewed.view_count
        ))
    }

    /// Run `append` once there is room for `bytes` more; it must use it up under the same lock.
    pub(super) fn append(
        &self,
        py: Python<'_>,
        bytes: usize,
        growth: f64,
        append: impl Fn(&mut Vector) -> Result<bool, Viewed> + Send + Sync,
    ) -> PyResult<()> {
        let appended = || match self.held() {
            Ok(mut state) => Ok(append(&mut state.vector)),
            Err(error) => Err(error),
        };
        loop {
            let fitted = if bytes > DETACH_BYTES {
                py.detach(appended)
            } else {
                appended()
            };
            if fitted?.map_err(|viewed| self.viewed(viewed))? {
                return Ok(());
            }
            self.grow(py, bytes, growth)?;
        }
    }

    /// Move to a block with room for `bytes` more. Drawn with no lock held: a limit may call Python.
    fn grow(&self, py: Python<'_>, bytes: usize, growth: f64) -> PyResult<()> {
        let (room, size) = {
            let state = self.held()?;
            (state.vector.room(bytes, growth), state.vector.size())
        };
        let wanted = match room.map_err(|viewed| self.viewed(viewed))? {
            vector::Room::Enough => return Ok(()),
            vector::Room::Short(wanted) => wanted,
        };
        let block = self.blocks.draw_bytes(py, wanted, false)?;
        let moved = || match self.held() {
            Ok(mut state) => Ok(state.vector.move_to(block)),
            Err(error) => Err(error),
        };
        let moved = if size > DETACH_BYTES {
            py.detach(moved)
        } else {
            moved()
        };
        match moved? {
            Ok(old) => drop(old),
            Err((viewed, block)) => {
                drop(block);
                return Err(self.viewed(viewed));
            }
        }
        Ok(())
    }

    /// End the loan; the block goes back, unless views of it are alive or it grew too large.
    pub(super) fn release(&self, py: Python<'_>) -> PyResult<()> {
        let Some((loss, block)) = self.finish(Status::Released) else {
            return Err(InvalidArgument::new_err(format!(
                "{0}: must be in use, got a {0} that was released or detached before",
                self.noun
            )));
        };
        let effects = match loss {
            None => {
                let released = self
                    .blocks
                    .pool
                    .release(self.turn, Some(block), now_milliseconds());
                released.ok()
            }
            Some(loss) => self.blocks.pool.discard(self.turn, loss).ok(),
        };
        // Nothing to do for one inherited over a fork.
        effects.map_or(Ok(()), |effects| self.blocks.settle(py, effects))
    }

    /// As `release`, but for the second time too.
    pub(super) fn leave(&self, py: Python<'_>) -> PyResult<()> {
        if self.state.lock().status == Status::Held {
            self.release(py)
        } else {
            Ok(())
        }
    }

    /// Take the block out of the pool for good; the loan goes on without it.
    pub(super) fn detach(&self, py: Python<'_>) -> PyResult<()> {
        if self.finish(Status::Detached).is_none() {
            drop(self.held()?);
            return Ok(());
        }
        match self.blocks.pool.discard(self.turn, Loss::Detached) {
            Ok(effects) => self.blocks.settle(py, effects),
            Err(_) => Ok(()),
        }
    }

    /// The user dropped it without a release: its memory is given up, its permit comes back.
    pub(super) fn abandon(&mut self) {
        if self.state.get_mut().status != Status::Held {
            return;
        }
        Python::try_attach(|py| {
            if let Ok(effects) = self.blocks.pool.discard(self.turn, Loss::Leaked)
                && let Err(error) = self.blocks.settle(py, effects)
            {
                error.write_unraisable(py, None);
            }
        });
    }

    /// Change the status, once; why the block must not go back, and the block.
    fn finish(&self, status: Status) -> Option<(Option<Loss>, Arc<Buffer>)> {
        let mut state = self.state.lock();
        if state.status != Status::Held {
            return None;
        }
        state.status = status;
        let vector = &state.vector;
        let loss = if vector.view_count() > 0 {
            Some(Loss::Exported)
        } else if vector.block().size() > self.blocks.cap_bytes {
            Some(Loss::Oversize)
        } else {
            None
        };
        Some((loss, Arc::clone(vector.block())))
    }

    pub(super) fn word(&self) -> &'static str {
        match self.state.lock().status {
            Status::Held => "in use",
            Status::Released => "released",
            Status::Detached => "detached",
        }
    }
}
