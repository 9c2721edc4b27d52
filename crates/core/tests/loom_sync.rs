//! Models of the lock-free parts: every interleaving is tried. Run by `make loom`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use moirai_core::sync::front::{Claim, Front, Word};
use moirai_core::sync::{Bell, Budget, Published, Quota, QuotaRefusal};

#[test]
fn a_budget_never_exceeds_its_limit_and_loses_nothing() {
    loom::model(|| {
        let budget = Arc::new(Budget::new(10));
        let granted = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = [6, 5]
            .into_iter()
            .map(|bytes| {
                let budget = Arc::clone(&budget);
                let granted = Arc::clone(&granted);
                thread::spawn(move || {
                    if budget.reserve(bytes).is_ok() {
                        let now = granted.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        assert!(now <= 10);
                        granted.fetch_sub(bytes, Ordering::SeqCst);
                        budget.release(bytes);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(budget.used(), 0);
        assert!(budget.reserve(10).is_ok(), "everything came back");
    });
}

/// One owner lets go of a chunk in which nothing is alive and goes on with another, through the
/// same front, while two threads cut: what they cut is disjoint, and lies in a chunk that stays.
#[test]
fn a_front_is_never_taken_from_under_a_claim() {
    loom::model(|| {
        let front = Arc::new(Front::new());
        front.bind(1000, Word::open(1, 3, false));
        let cutters: Vec<_> = (0..2)
            .map(|_| {
                let front = Arc::clone(&front);
                thread::spawn(move || front.claim(1))
            })
            .collect();
        let seen = front.shut();
        if seen.count() == 0 {
            front.bind(2000, Word::open(1, 3, true));
        } else {
            front.open(seen.counted());
        }
        let claims: Vec<Claim> = cutters
            .into_iter()
            .filter_map(|cutter| cutter.join().unwrap())
            .collect();
        let late = front.look().count();
        assert_eq!(claims.len() as u64, seen.count() + late);
        let base = if seen.count() == 0 { 2000 } else { 1000 };
        assert!(claims.iter().all(|claim| claim.base == base));
        assert!(claims.iter().all(|claim| claim.reused == (base == 2000)));
        assert!(claims.len() < 2 || claims[0].granule != claims[1].granule);
    });
}

/// Going back to the start of a chunk whose blocks are all dead, while another thread cuts.
#[test]
fn a_front_goes_back_only_if_nothing_was_cut_meanwhile() {
    loom::model(|| {
        let front = Arc::new(Front::new());
        front.bind(1000, Word::open(1, 4, false));
        let first = front.claim(2).unwrap();
        assert_eq!(first.granule, 1);
        let cutter = {
            let front = Arc::clone(&front);
            thread::spawn(move || front.claim(1))
        };
        // The first block dies here: nothing else is alive, unless the other thread was quicker.
        let word = front.look();
        let back = word.count() == 1 && front.replace(word, Word::open(1, 3, true));
        let claim = cutter.join().unwrap().unwrap();
        assert_eq!(claim.granule, if back { 1 } else { 3 });
        assert_eq!(claim.reused, back);
    });
}

#[test]
fn a_quota_closed_at_any_moment_leaves_nothing_charged_above() {
    loom::model(|| {
        let above = std::sync::Arc::new(Quota::new(100, None));
        let account = std::sync::Arc::new(Quota::new(100, Some(above.clone())));
        account.reserve(8).unwrap();
        let spender = {
            let account = account.clone();
            thread::spawn(move || {
                if account.reserve(4).is_ok() {
                    account.release(4);
                }
                account.release(8);
            })
        };
        account.close();
        spender.join().unwrap();
        assert_eq!((account.used(), above.used()), (0, 0));
        assert_eq!(account.reserve(1), Err(QuotaRefusal::Closed));
        assert_eq!(above.used(), 0);
    });
}

#[test]
fn what_two_accounts_charge_never_exceeds_the_one_above() {
    loom::model(|| {
        let above = std::sync::Arc::new(Quota::new(10, None));
        let threads: Vec<_> = [6, 5]
            .into_iter()
            .map(|bytes| {
                let account = Quota::new(100, Some(above.clone()));
                thread::spawn(move || match account.reserve(bytes) {
                    Ok(()) => {
                        assert_eq!(account.used(), bytes);
                        account.release(bytes);
                    }
                    Err(refusal) => {
                        let QuotaRefusal::Full {
                            used, levels_up, ..
                        } = refusal
                        else {
                            panic!("nothing was closed");
                        };
                        assert!(levels_up == 1 && used <= 10 && account.used() == 0);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(above.used(), 0);
    });
}

#[test]
fn what_is_published_is_seen_whole_and_only_once() {
    loom::model(|| {
        let slot = Arc::new(Published::<AtomicUsize>::empty());
        let publish = |value: usize| {
            let slot = Arc::clone(&slot);
            thread::spawn(move || {
                let fresh = Box::into_raw(Box::new(AtomicUsize::new(value)));
                match slot.publish(fresh) {
                    Ok(()) => true,
                    Err(first) => {
                        // SAFETY: not published, so nobody else has it.
                        drop(unsafe { Box::from_raw(fresh) });
                        assert!(!first.is_null());
                        false
                    }
                }
            })
        };
        let first = publish(1);
        let second = publish(2);
        let seen = slot.get();
        if !seen.is_null() {
            // SAFETY: published values live until the end of the model.
            let value = unsafe { &*seen }.load(Ordering::Relaxed);
            assert!(
                value == 1 || value == 2,
                "a reader sees an initialised value"
            );
        }
        let winners = [first.join().unwrap(), second.join().unwrap()];
        assert_eq!(winners.iter().filter(|won| **won).count(), 1);
        // SAFETY: published above, and no thread is left.
        drop(unsafe { Box::from_raw(slot.get()) });
    });
}

#[test]
fn a_ring_after_new_work_is_never_lost() {
    loom::model(|| {
        let bell = Arc::new(Bell::new());
        let work = Arc::new(AtomicBool::new(false));
        let sleeper = {
            let (bell, work) = (Arc::clone(&bell), Arc::clone(&work));
            thread::spawn(move || {
                // Loom reports a deadlock if the ring below can be missed.
                while !work.load(Ordering::Relaxed) {
                    bell.sleep_unless(|| work.load(Ordering::Relaxed));
                }
            })
        };
        work.store(true, Ordering::Relaxed);
        bell.ring();
        sleeper.join().unwrap();
    });
}
