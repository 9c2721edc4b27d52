//! Models of the lock-free parts: every interleaving is tried. Run by `make loom`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;
use moirai_core::sync::{Bell, Budget, Published};

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
