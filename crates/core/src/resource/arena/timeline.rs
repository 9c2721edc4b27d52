//! Which live blocks came after a savepoint, known without looking at any block.
//!
//! Savepoints, and what was retired, divide everything an arena ever cut into spans. Each span
//! counts its own live blocks; a free finds its span by where the block lies, with a binary search
//! among the spans. What a rollback would have to wait for is the sum over the spans it discards,
//! each of which a savepoint or a retirement paid for.

/// Where in the history of an arena something was cut: the number of the chunk's turn as the
/// current one, and a granule in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub turn: u64,
    pub granule: usize,
}

/// Where a span starts, and what is needed to go on from there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    pub position: Position,
    /// Index of the chunk, as long as the turn is still its own.
    pub chunk: usize,
    /// Bytes that had been cut from the chunk.
    pub cut_bytes: usize,
}

/// What was cut between two savepoints.
#[derive(Clone, Debug)]
pub(super) struct Span {
    /// Blocks with a chunk of their own remember it instead of a position.
    pub serial: u64,
    /// The savepoint it counts for; 0 is the arena's beginning. A retired span counts for none.
    pub savepoint: u64,
    pub place: Place,
    /// Live blocks; of the last span, less those that were cut since the last count.
    pub live: i64,
    /// Given up by the arena: its blocks are their views' business.
    pub retired: bool,
}

/// The spans, oldest first.
///
/// Positions, serials and savepoints ascend; several spans may count for one savepoint when something
/// between them was retired. The last span is not retired. No two retired spans are neighbours, and
/// none but the last and the first of each savepoint is empty.
#[derive(Debug)]
pub(super) struct Timeline {
    spans: Vec<Span>,
    next_serial: u64,
    next_savepoint: u64,
}

impl Timeline {
    pub(super) fn new() -> Self {
        let mut timeline = Timeline {
            spans: Vec::new(),
            next_serial: 0,
            next_savepoint: 1,
        };
        timeline.open(0, Place::default());
        timeline
    }

    fn open(&mut self, savepoint: u64, place: Place) {
        self.spans.push(Span {
            serial: self.next_serial,
            savepoint,
            place,
            live: 0,
            retired: false,
        });
        self.next_serial += 1;
        if self.spans.len() > 1 {
            self.tidy(self.spans.len() - 2);
        }
    }

    /// The span that is being cut for.
    #[inline]
    pub(super) fn top(&mut self) -> &mut Span {
        self.spans.last_mut().expect("the last span stays")
    }

    /// Open a span; returns the savepoint's number.
    pub(super) fn save(&mut self, place: Place) -> u64 {
        let savepoint = self.next_savepoint;
        self.next_savepoint += 1;
        self.open(savepoint, place);
        savepoint
    }

    /// Index of the first span that counts for `savepoint`.
    pub(super) fn find(&self, savepoint: u64) -> Option<usize> {
        let first = self
            .spans
            .partition_point(|span| span.savepoint < savepoint);
        let mut found = self.spans[first..].iter().take(2);
        let skipped = found.position(|span| !span.retired && span.savepoint == savepoint)?;
        Some(first + skipped)
    }

    pub(super) fn span(&self, index: usize) -> &Span {
        &self.spans[index]
    }

    /// Live blocks of the spans from `index` on that are not retired, and of those that are.
    pub(super) fn live_from(&self, index: usize) -> (u64, u64) {
        let (mut kept, mut retired) = (0, 0);
        for span in &self.spans[index..] {
            *(if span.retired {
                &mut retired
            } else {
                &mut kept
            }) += span.live;
        }
        (kept as u64, retired as u64)
    }

    /// Forget the spans behind `index`; nothing in them or in it is alive.
    pub(super) fn rewind(&mut self, index: usize) {
        debug_assert_eq!(self.live_from(index), (0, 0));
        self.spans.truncate(index + 1);
    }

    /// Give up what is alive in the spans from `index` on; what is cut next counts for the savepoint
    /// of `index`, from `place` on.
    pub(super) fn retire(&mut self, index: usize, place: Place) {
        let live = self.spans[index..].iter().map(|span| span.live).sum();
        self.spans.truncate(index + 1);
        let span = &mut self.spans[index];
        let savepoint = span.savepoint;
        (span.live, span.retired) = (live, true);
        self.open(savepoint, place);
    }

    /// Forget a savepoint; what came after it counts for the one before. False if it is unknown.
    pub(super) fn release(&mut self, savepoint: u64) -> bool {
        let Some(first) = self.find(savepoint).filter(|_| savepoint != 0) else {
            return false;
        };
        let before = self.spans[..first].iter().rfind(|span| !span.retired);
        let heir = before.map_or(0, |span| span.savepoint);
        // Among them may be a retired span just before the first, which keeps the order.
        let from = first - usize::from(first > 0 && self.spans[first - 1].retired);
        let to = self
            .spans
            .partition_point(|span| span.savepoint <= savepoint);
        for span in &mut self.spans[from..to] {
            span.savepoint = heir;
        }
        for index in (first..to).rev() {
            self.tidy(index);
        }
        true
    }

    /// Remove the span at `index`, or join it to the one before it, if nothing needs it any more.
    fn tidy(&mut self, index: usize) {
        let last = index + 1 == self.spans.len();
        let span = &self.spans[index];
        if span.retired {
            if span.live == 0 {
                self.spans.remove(index);
                self.join(index);
            } else {
                self.join(index);
            }
            return;
        }
        let earlier = &self.spans[index.saturating_sub(2)..index];
        let counted_before = earlier
            .iter()
            .any(|other| !other.retired && other.savepoint == span.savepoint);
        if !last && span.live == 0 && counted_before {
            self.spans.remove(index);
            self.join(index);
        } else {
            self.join(index);
        }
    }

    /// Join the span at `index` to the one before it if both are of a kind.
    fn join(&mut self, index: usize) {
        if index == 0 || index >= self.spans.len() {
            return;
        }
        let (before, span) = (&self.spans[index - 1], &self.spans[index]);
        let alike = before.retired && span.retired
            || !before.retired && !span.retired && before.savepoint == span.savepoint;
        if alike {
            let live = self.spans.remove(index).live;
            self.spans[index - 1].live += live;
        }
    }

    /// The span that a position lies in.
    #[inline]
    fn at(&self, position: Position) -> usize {
        if self.spans.len() == 1 {
            return 0;
        }
        let behind = self
            .spans
            .partition_point(|span| span.place.position <= position);
        behind.saturating_sub(1)
    }

    /// Whether what lies at `position` was retired.
    pub(super) fn retired(&self, position: Position) -> bool {
        self.spans[self.at(position)].retired
    }

    /// A block at `position` was freed.
    #[inline]
    pub(super) fn freed(&mut self, position: Position) {
        let index = self.at(position);
        self.freed_in(index);
    }

    /// A block with a chunk of its own was freed, cut when the last span was the one of `serial`.
    pub(super) fn freed_own(&mut self, serial: u64) {
        let behind = self.spans.partition_point(|span| span.serial <= serial);
        self.freed_in(behind.saturating_sub(1));
    }

    #[inline]
    fn freed_in(&mut self, index: usize) {
        let span = &mut self.spans[index];
        span.live -= 1;
        if span.live == 0 && index + 1 < self.spans.len() {
            self.tidy(index);
        }
    }

    /// Savepoints that can be rolled back to.
    pub(super) fn savepoint_count(&self) -> usize {
        let mut numbers: Vec<u64> = self.kept().map(|span| span.savepoint).collect();
        numbers.dedup();
        numbers.iter().filter(|number| **number != 0).count()
    }

    fn kept(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(|span| !span.retired)
    }

    /// Live blocks in all spans.
    pub(super) fn live(&self) -> i64 {
        self.spans.iter().map(|span| span.live).sum()
    }

    /// What is wrong with the spans; `None` if nothing is.
    pub(super) fn disorder(&self) -> Option<String> {
        let ordered = self.spans.windows(2).all(|pair| {
            let (before, span) = (&pair[0], &pair[1]);
            before.place.position <= span.place.position
                && before.serial < span.serial
                && before.savepoint <= span.savepoint
                && !(before.retired && span.retired)
        });
        let counted = self.spans.iter().rev().skip(1).all(|span| span.live >= 0);
        let sound = ordered && counted && self.spans.last().is_some_and(|span| !span.retired);
        (!sound).then(|| format!("arena: spans are out of order: {:?}", self.spans))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Cut { own: bool },
        Free(usize),
        Save,
        Rollback(usize),
        Release(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => any::<bool>().prop_map(|own| Step::Cut { own }),
            8 => any::<usize>().prop_map(Step::Free),
            3 => Just(Step::Save),
            2 => any::<usize>().prop_map(Step::Rollback),
            2 => any::<usize>().prop_map(Step::Release),
        ]
    }

    fn at(position: Position) -> Place {
        Place {
            position,
            ..Place::default()
        }
    }

    /// Blocks one by one: what the timeline must count without having them.
    #[derive(Default)]
    struct Model {
        blocks: Vec<ModelBlock>,
        /// Savepoints, each with the time it was made or last rolled back to.
        savepoints: Vec<(u64, u64)>,
        time: u64,
    }

    struct ModelBlock {
        position: Position,
        own_serial: Option<u64>,
        time: u64,
        retired: bool,
    }

    impl Model {
        fn live_since(&self, time: u64) -> (u64, u64) {
            let count = |retired| {
                let blocks = self.blocks.iter();
                blocks
                    .filter(|block| block.retired == retired && block.time >= time)
                    .count() as u64
            };
            (count(false), count(true))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn spans_count_what_a_list_of_blocks_would(
            steps in proptest::collection::vec(step(), 1..200),
        ) {
            let mut timeline = Timeline::new();
            let mut model = Model::default();
            let mut now = Position { turn: 0, granule: 0 };
            for step in steps {
                model.time += 1;
                match step {
                    Step::Cut { own } => {
                        let serial = timeline.top().serial;
                        timeline.top().live += 1;
                        model.blocks.push(ModelBlock {
                            position: now,
                            own_serial: own.then_some(serial),
                            time: model.time,
                            retired: false,
                        });
                        if !own {
                            now.granule += 1;
                        }
                    }
                    Step::Free(which) if !model.blocks.is_empty() => {
                        let block = model.blocks.swap_remove(which % model.blocks.len());
                        match block.own_serial {
                            Some(serial) => timeline.freed_own(serial),
                            None => {
                                prop_assert_eq!(timeline.retired(block.position), block.retired);
                                timeline.freed(block.position);
                            }
                        }
                    }
                    Step::Save => {
                        let number = timeline.save(at(now));
                        model.savepoints.push((number, model.time));
                    }
                    Step::Rollback(which) if !model.savepoints.is_empty() => {
                        let which = which % model.savepoints.len();
                        model.savepoints.truncate(which + 1);
                        let (number, time) = model.savepoints[which];
                        let index = timeline.find(number).unwrap();
                        let expected = model.live_since(time);
                        prop_assert_eq!(timeline.live_from(index), expected);
                        if expected == (0, 0) {
                            timeline.rewind(index);
                            now = timeline.span(index).place.position;
                        } else {
                            now = Position { turn: now.turn + 1, granule: 0 };
                            timeline.retire(index, at(now));
                            for block in &mut model.blocks {
                                block.retired |= block.time >= time;
                            }
                            model.savepoints[which].1 = model.time;
                        }
                    }
                    Step::Release(which) if !model.savepoints.is_empty() => {
                        let which = which % model.savepoints.len();
                        prop_assert!(timeline.release(model.savepoints.remove(which).0));
                    }
                    _ => {}
                }
                prop_assert_eq!(timeline.disorder(), None);
                prop_assert_eq!(timeline.live(), model.blocks.len() as i64);
                prop_assert_eq!(timeline.savepoint_count(), model.savepoints.len());
                prop_assert_eq!(timeline.live_from(0), model.live_since(0));
                let spans_bound = 2 * (model.savepoints.len() + model.blocks.len() + 1);
                prop_assert!(timeline.spans.len() <= spans_bound, "{:?}", timeline.spans);
            }
        }
    }

    #[test]
    fn a_loop_of_savepoints_leaves_no_spans_behind() {
        let mut timeline = Timeline::new();
        let mut previous = None;
        let mut now = Position {
            turn: 0,
            granule: 0,
        };
        for turn in 1..1000 {
            let number = timeline.save(at(now));
            if let Some(previous) = previous.replace(number) {
                assert!(timeline.release(previous));
            }
            timeline.top().live += 1;
            now = Position { turn, granule: 0 };
            let index = timeline.find(number).unwrap();
            timeline.retire(index, at(now));
            assert!(timeline.spans.len() <= 3, "{:?}", timeline.spans);
        }
        assert_eq!(timeline.live_from(0), (0, 999));
    }
}
