//! A class of equal blocks: its depot, and the runs they are cut from. Guarded by the class's lock.

use super::depot::Depot;
use super::run::Run;

/// Runs looked at to find one that is nearly full.
const RUNS_COMPARED: usize = 32;

/// The part of a class that its lock guards.
pub(super) struct Class {
    pub index: usize,
    pub depot: Depot,
    pub runs: Vec<*mut Run>,
    pub partial: Vec<*mut Run>,
    pub colour: usize,
    pub purged_bytes: usize,
}

impl Class {
    /// A class without runs.
    pub(super) fn new(index: usize) -> Self {
        Class {
            index,
            depot: Depot::new(),
            runs: Vec::new(),
            partial: Vec::new(),
            colour: 0,
            purged_bytes: 0,
        }
    }
}

// SAFETY: runs are boxes owned by the class; the pointers are only followed under its lock.
unsafe impl Send for Class {}

/// The fullest of the runs that became partly free lately: emptier ones may so become empty.
pub(super) fn fullest(class: &Class) -> Option<*mut Run> {
    // SAFETY: live runs of this class, whose lock is held.
    let free = |run: &&*mut Run| unsafe { (***run).free_count };
    class
        .partial
        .iter()
        .rev()
        .take(RUNS_COMPARED)
        .min_by_key(free)
        .copied()
}

/// Whether one of its runs stays when it is empty.
pub(super) fn keeps_a_run(class: &Class) -> bool {
    // SAFETY: live runs of this class, whose lock is held.
    class.runs.iter().any(|run| unsafe { (**run).kept })
}

/// Add a run with all its blocks to its class, whose lock is held.
pub(super) fn list_run(class: &mut Class, run: *mut Run) {
    // SAFETY: made by `draw_run`, in no list yet: the caller is its only user.
    unsafe { (*run).index = class.runs.len() };
    class.runs.push(run);
    list_partial(class, run);
}

pub(super) fn list_partial(class: &mut Class, run: *mut Run) {
    // SAFETY: a live run of this class, whose lock is held.
    unsafe { (*run).partial_index = Some(class.partial.len()) };
    class.partial.push(run);
}

pub(super) fn unlist_partial(class: &mut Class, run: *mut Run) {
    // SAFETY: a live run of this class, whose lock is held.
    let Some(index) = (unsafe { (*run).partial_index.take() }) else {
        return;
    };
    class.partial.swap_remove(index);
    if let Some(&moved) = class.partial.get(index) {
        // SAFETY: as above.
        unsafe { (*moved).partial_index = Some(index) };
    }
}
