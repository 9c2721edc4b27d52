#![expect(unused_must_use, reason = "most tests enter the workers themselves")]

use super::task::{Cancel, Stage, Task};
use super::{Priority, Queued, Rest, Scheduler};
use crate::sync::{AtomicUsize, Ordering};
use std::collections::HashSet;
use std::sync::Arc;

fn one_node(workers: usize) -> Arc<Scheduler<usize>> {
    Scheduler::new(&vec![0; workers], &[vec![0]], Box::default())
}

#[test]
fn lanes_go_by_priority_and_each_keeps_its_order() {
    let scheduler = one_node(1);
    assert_eq!(
        scheduler.push(0, Priority::Background, 30),
        Queued::Start(0)
    );
    let worker = scheduler.enter(0, 0).unwrap();
    scheduler.push(0, Priority::Normal, 20);
    scheduler.push(0, Priority::High, 10);
    scheduler.push(0, Priority::Realtime, 1);
    scheduler.push(0, Priority::Realtime, 2);
    scheduler.push(0, Priority::High, 11);
    let order: Vec<_> = std::iter::from_fn(|| worker.take()).collect();
    assert_eq!(order, [1, 2, 10, 11, 20, 30]);
}

#[test]
fn a_lane_that_waits_too_long_gets_a_turn() {
    let scheduler = one_node(1);
    scheduler.push(0, Priority::Background, 7);
    let worker = scheduler.enter(0, 0).unwrap();
    let mut turns = 0;
    loop {
        scheduler.push(0, Priority::Realtime, 1);
        if worker.take() == Some(7) {
            break;
        }
        turns += 1;
    }
    assert!(turns > 0, "the urgent ones go first");
}

#[test]
fn a_task_of_the_own_node_is_stolen_before_one_of_a_farther_node() {
    let order = [vec![0, 1, 2], vec![1, 0, 2], vec![2, 1, 0]];
    let scheduler = Scheduler::new(&[0, 0, 1, 2], &order, Box::default());
    let workers: Vec<_> = (0..4).map(|who| scheduler.enter(who, 0).unwrap()).collect();
    for task in 0..3 {
        workers[3].push(30 + task);
        workers[2].push(20 + task);
    }
    workers[1].push(1);
    let order: Vec<_> = std::iter::from_fn(|| workers[0].take()).collect();
    assert_eq!(order, [1, 21, 20, 31, 30]);
    let counts = scheduler.counts()[0];
    assert_eq!(counts.stolen_same_node, 1);
    assert_eq!(counts.stolen_cross_node, 2);
}

#[test]
fn a_steal_from_afar_brings_half_of_each_deque_there() {
    let order = [vec![0, 1], vec![1, 0]];
    let scheduler = Scheduler::new(&[0, 0, 1, 1], &order, Box::default());
    let workers: Vec<_> = (0..4).map(|who| scheduler.enter(who, 0).unwrap()).collect();
    workers[2].push(100);
    workers[2].push(101);
    for task in 0..7 {
        workers[3].push(task);
    }
    assert_eq!(workers[0].take(), Some(3));
    assert_eq!(scheduler.deque_counts(), [4, 0, 1, 3]);
    // The neighbour finds the rest at home, the oldest first.
    assert_eq!(workers[1].take(), Some(0));
    assert_eq!(workers[1].take(), Some(1));
    assert_eq!(workers[0].take(), Some(100));
    assert_eq!(workers[0].take(), Some(2));
    assert_eq!(workers[3].take(), Some(6));
    let counts = scheduler.counts();
    let steals = |who: usize| (counts[who].stolen_same_node, counts[who].stolen_cross_node);
    assert_eq!((steals(0), steals(1)), ((0, 1), (2, 0)));
    assert_eq!(counts[0].from_own, 2);
}

fn two_nodes() -> Arc<Scheduler<usize>> {
    Scheduler::new(&[0, 0, 1, 1], &[vec![0, 1], vec![1, 0]], Box::default())
}

#[test]
fn the_last_tasks_of_a_node_are_left_to_its_workers_for_a_while() {
    let scheduler = two_nodes();
    let workers: Vec<_> = (0..4).map(|who| scheduler.enter(who, 0).unwrap()).collect();
    for task in 0..3 {
        workers[2].push(task);
    }
    assert_eq!(workers[0].take(), None);
    assert_eq!(workers[3].take(), Some(0), "they are at home there");
    workers[2].push(3);
    assert_eq!(workers[0].rest(), Rest::Late);
    assert_eq!(workers[0].take(), Some(2), "it has waited");
    assert_eq!(workers[0].take(), Some(1), "what came along is its own");
    assert_eq!(workers[1].take(), None, "the next one waits for itself");
    // It takes what is not few at once, what is in lanes, and what is at its own node.
    for task in 10..13 {
        workers[3].push(task);
    }
    assert_eq!(workers[1].rest(), Rest::Work);
    assert_eq!(workers[1].take(), Some(11));
    let left = std::iter::from_fn(|| workers[1].take()).count();
    assert_eq!((left, scheduler.queued_count()), (1, 2));
    workers[0].push(20);
    assert_eq!(workers[1].rest(), Rest::Work);
    assert_eq!(workers[1].take(), Some(20));
    scheduler.push(1, Priority::Background, 30);
    assert_eq!(workers[1].rest(), Rest::Work);
    assert_eq!(workers[1].take(), Some(12), "before one of the lowest lane");
}

#[test]
fn nothing_is_left_to_others_once_the_scheduler_is_closed() {
    let scheduler = two_nodes();
    let workers: Vec<_> = (0..4).map(|who| scheduler.enter(who, 0).unwrap()).collect();
    workers[2].push(1);
    assert_eq!(workers[0].take(), None);
    scheduler.close();
    assert_eq!(workers[0].rest(), Rest::Work);
    assert_eq!(workers[0].take(), Some(1));
    assert_eq!(workers[0].rest(), Rest::Closed);
}

#[test]
fn own_tasks_are_taken_last_come_first_and_stolen_in_order() {
    let scheduler = one_node(2);
    let (first, second) = (
        scheduler.enter(0, 0).unwrap(),
        scheduler.enter(1, 0).unwrap(),
    );
    for task in 0..4 {
        first.push(task);
    }
    assert_eq!(second.take(), Some(0));
    assert_eq!(first.take(), Some(3));
    assert_eq!(first.take_back(|task| *task == 1), None);
    assert_eq!(first.take_back(|task| *task == 2), Some(2));
    assert_eq!(second.take_related(Some(0)), Some(1));
    assert_eq!(second.take(), None);
}

#[test]
fn a_worker_is_started_only_if_more_waits_than_workers_look() {
    let scheduler = one_node(3);
    assert_eq!(scheduler.push(0, Priority::Normal, 1), Queued::Start(0));
    assert_eq!(scheduler.push(0, Priority::Normal, 2), Queued::Start(1));
    let worker = scheduler.enter(0, 0).unwrap();
    assert!(worker.take().is_some() && worker.take().is_some());
    // The other one looks for work already.
    assert_eq!(scheduler.push(0, Priority::Normal, 3), Queued::Done);
    scheduler.not_started(1);
    assert_eq!(scheduler.started_count(), 1);
    assert!(scheduler.enter(1, 0).is_none(), "its thread comes too late");
    // The first one is there already.
    scheduler.not_started(0);
    assert_eq!(scheduler.started_count(), 1);
}

#[test]
fn dead_entries_are_swept_out_and_the_rest_keeps_its_order() {
    let scheduler = one_node(1);
    for task in 0..10_000 {
        scheduler.push(0, Priority::Normal, task);
    }
    for _ in 0..9_000 {
        scheduler.died(|task| *task >= 1000);
    }
    assert!(scheduler.queued_count() <= 1000 + 1024);
    let kept: Vec<_> = std::iter::from_fn(|| scheduler.take_first()).collect();
    assert_eq!(kept[..1000], (0..1000).collect::<Vec<_>>());
}

#[test]
fn as_many_have_a_seat_as_there_may_be_workers() {
    let scheduler = one_node(2);
    assert!(scheduler.take_seat() && scheduler.take_seat());
    assert!(!scheduler.take_seat());
    scheduler.push(0, Priority::Normal, 1);
    assert!(!scheduler.has_work());
    scheduler.give_seat();
    assert!(scheduler.has_work() && scheduler.take_seat());
}

#[test]
fn fewer_may_run_than_there_are_workers_and_one_always() {
    let scheduler = one_node(3);
    assert!(scheduler.take_seat() && scheduler.take_seat());
    assert_eq!(scheduler.running_count(), 2);
    scheduler.allow(0);
    assert_eq!(
        (scheduler.allowed_count(), scheduler.running_count()),
        (1, 2)
    );
    scheduler.push(0, Priority::Normal, 1);
    assert!(scheduler.is_crowded() && !scheduler.take_seat());
    scheduler.give_seat();
    assert!(!scheduler.is_crowded() && !scheduler.has_work());
    scheduler.give_seat();
    assert!(scheduler.has_work() && scheduler.take_seat());
    assert!(!scheduler.take_seat());
    scheduler.allow(9);
    assert_eq!(
        (scheduler.allowed_count(), scheduler.running_count()),
        (3, 1)
    );
    assert!(scheduler.take_seat() && scheduler.take_seat() && !scheduler.take_seat());
}

#[test]
fn who_sleeps_for_the_want_of_a_seat_ends_with_the_others() {
    let scheduler = one_node(2);
    scheduler.allow(1);
    let worker = scheduler.enter(0, 0).unwrap();
    assert!(worker.take_seat());
    scheduler.push(0, Priority::Normal, 1);
    let (tell, told) = std::sync::mpsc::channel();
    let other = Arc::clone(&scheduler);
    let thread = std::thread::spawn(move || {
        let worker = other.enter(1, 0).unwrap();
        tell.send(worker.rest()).unwrap();
    });
    let parks = |count| {
        while scheduler.counts()[1].parks < count {
            std::thread::yield_now();
        }
    };
    parks(1);
    scheduler.close(); // wakes it, and it sleeps again: there is a task, and no seat
    parks(2);
    assert_eq!(worker.take(), Some(1));
    worker.leave_seat();
    assert_eq!(worker.rest(), Rest::Closed);
    let end = told.recv_timeout(std::time::Duration::from_secs(30));
    assert_eq!(end, Ok(Rest::Closed));
    thread.join().unwrap();
}

#[test]
fn a_task_is_taken_once_or_cancelled() {
    let task = Task::new("call");
    assert_eq!(task.stage(), Stage::Pending);
    assert_eq!(task.claim(), Some("call"));
    assert_eq!(task.claim(), None);
    assert!(matches!(task.cancel(false), Cancel::Late));
    assert!(task.watch());
    assert!(task.finish(false).unwrap().watched);
    assert!(!task.watch());

    let task = Task::new("call");
    assert!(task.lock_end());
    assert!(matches!(task.cancel(false), Cancel::Locked));
    assert!(matches!(task.cancel(true), Cancel::Done(Some("call"), _)));
    assert_eq!(task.claim(), None);
    assert_eq!(task.stage(), Stage::Cancelled);

    let task = Task::new(());
    task.claim();
    assert_eq!(task.fill(()), Err(()));
    assert!(task.lock_end());
    assert!(task.finish(false).is_none());
    assert!(!task.finish_locked(false).watched);
    assert_eq!(task.stage(), Stage::Finished);
}

#[test]
fn an_empty_task_is_taken_once_it_is_filled() {
    let task = Task::empty();
    assert_eq!(task.claim(), None);
    assert!(matches!(task.cancel(true), Cancel::Late));
    assert_eq!(task.fill(1), Ok(()));
    assert_eq!(task.fill(2), Err(2));
    assert_eq!(task.claim(), Some(1));
    assert!(task.finish(true).is_some());
    assert_eq!(task.stage(), Stage::Cancelled);
}

/// Workers in threads, several who queue, and tasks that queue others.
#[test]
fn every_task_is_run_once() {
    const EACH: usize = 20_000;
    for scheduler in [one_node(1), one_node(2), one_node(4), two_nodes()] {
        let ran = Arc::new(AtomicUsize::new(0));
        let run = |who: usize| {
            let scheduler = Arc::clone(&scheduler);
            let ran = Arc::clone(&ran);
            std::thread::spawn(move || {
                let start = scheduler.next_start(who);
                let worker = scheduler.enter(who, start).unwrap();
                let mut seen = HashSet::new();
                loop {
                    if worker.take_seat() {
                        while let Some(task) = worker.take() {
                            assert!(seen.insert(task));
                            ran.fetch_add(1, Ordering::Relaxed);
                            if task % 2 == 0 {
                                if let Queued::Start(other) = worker.push(task + 1) {
                                    scheduler.not_started(other);
                                }
                            }
                        }
                        worker.leave_seat();
                    }
                    if worker.rest() == Rest::Closed {
                        return seen;
                    }
                }
            })
        };
        let threads = std::thread::scope(|scope| {
            let producers: Vec<_> = (0..2)
                .map(|producer| {
                    let (scheduler, run) = (&scheduler, &run);
                    scope.spawn(move || {
                        let mut started = Vec::new();
                        for task in 0..EACH {
                            let task = 2 * (producer * EACH + task);
                            let queued = scheduler.push(0, Priority::Normal, task);
                            if let Queued::Start(who) = queued {
                                started.push(run(who));
                            }
                        }
                        started
                    })
                })
                .collect();
            let each = producers.into_iter().map(|it| it.join().unwrap());
            each.flatten().collect::<Vec<_>>()
        });
        while ran.load(Ordering::Relaxed) < 4 * EACH {
            std::thread::yield_now();
        }
        scheduler.close();
        let seen: Vec<_> = threads.into_iter().map(|it| it.join().unwrap()).collect();
        assert_eq!(seen.iter().map(HashSet::len).sum::<usize>(), 4 * EACH);
        assert_eq!(seen.concat_len(), 4 * EACH);
        assert_eq!(scheduler.push(0, Priority::Normal, 0), Queued::TooLate);
    }
}

trait ConcatLen {
    fn concat_len(&self) -> usize;
}

impl ConcatLen for Vec<HashSet<usize>> {
    fn concat_len(&self) -> usize {
        self.iter().flatten().collect::<HashSet<_>>().len()
    }
}
