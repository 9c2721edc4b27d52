//! Which free span serves a request: the index over free spans, by policy.

use std::collections::BTreeSet;

/// How a free span is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The smallest that is large enough; among equals the one freed last.
    Best,
    /// The one with the lowest address. Looks at free spans one by one.
    First,
    /// The largest.
    Worst,
}

/// A free span as the index sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub pages: usize,
    pub start: usize,
    /// Grows with each free, so that a larger one was freed later.
    pub sequence: u64,
    pub id: u32,
}

/// Free spans of one area and one state.
pub(super) struct FreeIndex {
    fit: Fit,
    /// (pages, newest first, id) for best and worst fit; (start, pages, id) for first fit.
    entries: BTreeSet<(usize, u64, u32)>,
}

impl FreeIndex {
    pub(super) fn new(fit: Fit) -> Self {
        FreeIndex {
            fit,
            entries: BTreeSet::new(),
        }
    }

    fn key(&self, entry: &Entry) -> (usize, u64, u32) {
        match self.fit {
            Fit::Best | Fit::Worst => (entry.pages, u64::MAX - entry.sequence, entry.id),
            Fit::First => (entry.start, entry.pages as u64, entry.id),
        }
    }

    pub(super) fn insert(&mut self, entry: &Entry) {
        let fresh = self.entries.insert(self.key(entry));
        debug_assert!(fresh);
    }

    /// Remove a span; false if it was not there.
    pub(super) fn remove(&mut self, entry: &Entry) -> bool {
        self.entries.remove(&self.key(entry))
    }

    /// The span that the policy chooses for `pages`, left in place.
    pub(super) fn choose(&self, pages: usize) -> Option<u32> {
        let chosen = match self.fit {
            Fit::Best => self.entries.range((pages, 0, 0)..).next(),
            Fit::Worst => self
                .entries
                .last()
                .and_then(|largest| self.entries.range((largest.0, 0, 0)..).next())
                .filter(|largest| largest.0 >= pages),
            Fit::First => self.entries.iter().find(|entry| entry.1 >= pages as u64),
        };
        chosen.map(|entry| entry.2)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn contains(&self, entry: &Entry) -> bool {
        self.entries.contains(&self.key(entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(fit: Fit) -> FreeIndex {
        let mut index = FreeIndex::new(fit);
        for (id, pages) in [8, 2, 32, 4, 4].into_iter().enumerate() {
            index.insert(&Entry {
                pages,
                start: id * 1000,
                sequence: id as u64,
                id: id as u32,
            });
        }
        index
    }

    #[test]
    fn best_fit_takes_the_smallest_and_the_newest_of_equals() {
        assert_eq!(index(Fit::Best).choose(3), Some(4));
        assert_eq!(index(Fit::Best).choose(33), None);
    }

    #[test]
    fn first_fit_takes_the_lowest_address() {
        assert_eq!(index(Fit::First).choose(3), Some(0));
        assert_eq!(index(Fit::First).choose(9), Some(2));
    }

    #[test]
    fn worst_fit_takes_the_largest() {
        assert_eq!(index(Fit::Worst).choose(1), Some(2));
        assert_eq!(index(Fit::Worst).choose(33), None);
    }
}
