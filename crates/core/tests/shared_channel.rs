//! The shared channel's ring and blocks against plain models.

use moirai_core::channel::shared::blocks::{Blocks, Run};
use moirai_core::channel::shared::ring::{Front, Positions, Refused, Ring};
use moirai_core::channel::shared::word::{GRANULE_BYTES, State};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64};

const GRANULES: usize = 16;

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    /// Claim and die.
    Claim(usize),
    Receive,
    /// Take and die.
    Take,
    Reap,
}

fn step() -> impl Strategy<Value = Step> {
    let length = 0..=GRANULES / 2 * GRANULE_BYTES;
    prop_oneof![
        4 => length.clone().prop_map(Step::Send),
        1 => length.prop_map(Step::Claim),
        4 => Just(Step::Receive),
        1 => Just(Step::Take),
        1 => Just(Step::Reap),
    ]
}

const ALIVE: usize = 1;
const DEAD: usize = 2;

proptest! {
    #[test]
    fn a_ring_is_a_queue_without_the_claims_of_the_dead(steps in prop::collection::vec(step(), 0..300)) {
        let positions = Positions::default();
        let words: Vec<AtomicU64> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
        let ring = Ring::new(&positions, &words);
        // (number, length) of what was sent; None: claimed by one who died since.
        let mut model: VecDeque<Option<usize>> = VecDeque::new();
        let reap = |model: &mut VecDeque<Option<usize>>| {
            ring.walk(|record| match record.word.state() {
                Some(State::Claimed) => { ring.skip_claim(record); }
                Some(State::Taken) => { ring.finish_taken(record); }
                _ => {}
            });
            model.retain(Option::is_some);
        };
        for step in steps {
            match step {
                Step::Send(length) => match ring.claim(0, ALIVE, length) {
                    Ok(record) => {
                        let end = ring.index_of(record) * GRANULE_BYTES + length;
                        prop_assert!(end <= GRANULES * GRANULE_BYTES);
                        ring.publish(record);
                        model.push_back(Some(length));
                    }
                    Err(refused) => {
                        prop_assert_eq!(refused, Refused::Full);
                        prop_assert!(!ring.can_claim(length));
                    }
                },
                Step::Claim(length) => {
                    if ring.claim(0, DEAD, length).is_ok() {
                        model.push_back(None);
                    }
                }
                Step::Receive | Step::Take => match (ring.front(), model.front()) {
                    (Front::Data(found), Some(Some(length))) => {
                        prop_assert_eq!(found.word.length(), *length);
                        let taken = ring.take(found, DEAD).unwrap();
                        if matches!(step, Step::Receive) {
                            ring.release(taken);
                        }
                        model.pop_front();
                    }
                    (Front::Pending(owner), Some(None)) => prop_assert_eq!(owner, DEAD),
                    (Front::Empty, None) => {}
                    (front, expected) => prop_assert!(false, "{front:?}, expected {expected:?}"),
                },
                Step::Reap => reap(&mut model),
            }
        }
        reap(&mut model);
        while let Front::Data(found) = ring.front() {
            let taken = ring.take(found, ALIVE).unwrap();
            ring.release(taken);
            prop_assert_eq!(model.pop_front().flatten(), Some(taken.word.length()));
        }
        prop_assert!(model.is_empty());
        prop_assert!(ring.claim(0, ALIVE, GRANULES / 2 * GRANULE_BYTES).is_ok(), "all room came back");
    }

    #[test]
    fn blocks_never_overlap(steps in prop::collection::vec((any::<bool>(), 1..6usize, 0..3usize), 0..200)) {
        const UNITS: usize = 20;
        let turns = AtomicU32::new(0);
        let units: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
        let blocks = Blocks::new(&units, &turns);
        let mut out: Vec<(Run, usize)> = Vec::new();
        for (claims, count, owner) in steps {
            if claims {
                let could = blocks.could_claim(count);
                let run = blocks.claim(count, owner).map(|claim| claim.run);
                prop_assert_eq!(run.is_some(), could);
                if let Some(run) = run {
                    let apart = |other: &Run| {
                        run.start + run.count <= other.start || other.start + other.count <= run.start
                    };
                    prop_assert!(run.start + run.count <= UNITS);
                    prop_assert!(out.iter().all(|(other, _)| apart(other)));
                    out.push((run, owner));
                }
            } else if count < 5 {
                if !out.is_empty() {
                    let (run, _) = out.swap_remove(count % out.len());
                    blocks.free(run);
                    prop_assert!(!blocks.is_out(run));
                }
            } else {
                blocks.reap(owner, |_| false);
                out.retain(|(_, of)| *of != owner);
            }
            let used: usize = out.iter().map(|(run, _)| run.count).sum();
            prop_assert_eq!(blocks.used_count(), used);
        }
    }
}
