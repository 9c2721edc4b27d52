//! Models of channels: pushes, pops, waits and ends interleaved, over the real sources.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use moirai_core::channel::{Channel, Deque, Missed, Refused, Ring, Side, Store, Tasks};

/// Stands for a thread's parker: called at most once a wait.
#[derive(Clone)]
struct Waker(Arc<(AtomicBool, loom::sync::Notify)>);

impl Waker {
    fn new() -> Self {
        Waker(Arc::new((
            AtomicBool::new(false),
            loom::sync::Notify::new(),
        )))
    }

    fn call(&self) {
        self.0.0.store(true, Ordering::Release);
        self.0.1.notify();
    }

    fn park(&self) {
        while !self.0.0.load(Ordering::Acquire) {
            self.0.1.wait();
        }
        self.0.0.store(false, Ordering::Relaxed);
    }
}

type Line<S> = Channel<usize, Waker, S>;

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.call();
    }
}

fn send<S: Store<usize>>(line: &Line<S>, mut message: usize) -> Result<(), usize> {
    let mut ticket = None;
    let mut called = false;
    let waker = Waker::new();
    let result = loop {
        match line.push(message) {
            Ok(next) => {
                wake(next);
                break Ok(());
            }
            Err(Refused::Closed(back)) => break Err(back),
            Err(Refused::Full(back)) => message = back,
        }
        if ticket.is_some() && !called {
            waker.park();
            called = true;
            continue;
        }
        ticket = Some(line.join(Side::Senders, ticket, waker.clone()));
        called = false;
    };
    if let Some(ticket) = ticket
        && !called
    {
        wake(line.leave(Side::Senders, ticket));
    }
    result
}

fn receive<S: Store<usize>>(line: &Line<S>) -> Option<usize> {
    let mut ticket = None;
    let mut called = false;
    let waker = Waker::new();
    let result = loop {
        match line.pop() {
            Ok((message, next)) => {
                wake(next);
                break Some(message);
            }
            Err(Missed::Closed) => break None,
            Err(Missed::Empty) => {}
        }
        if ticket.is_some() && !called {
            waker.park();
            called = true;
            continue;
        }
        ticket = Some(line.join(Side::Receivers, ticket, waker.clone()));
        called = false;
    };
    if let Some(ticket) = ticket
        && !called
    {
        wake(line.leave(Side::Receivers, ticket));
    }
    result
}

/// Every interleaving in which threads are interrupted so many times at most; each may also wait,
/// which is no interruption. Without a bound a model of three threads does not end in hours.
fn model(interruptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(interruptions);
    builder.max_branches = 20_000;
    builder.check(run);
}

fn two_senders_and_a_receiver<S: Store<usize> + Send + Sync + 'static>(
    store: impl Fn() -> S + Send + Sync + 'static,
) {
    model(1, move || {
        let line = Arc::new(Line::new(store()));
        let senders: Vec<_> = [1, 2]
            .into_iter()
            .map(|message| {
                let line = Arc::clone(&line);
                thread::spawn(move || send(&line, message).unwrap())
            })
            .collect();
        let mut found = [receive(&line).unwrap(), receive(&line).unwrap()];
        found.sort_unstable();
        assert_eq!(found, [1, 2]);
        for sender in senders {
            sender.join().unwrap();
        }
        assert_eq!(line.store().count(), 0);
    });
}

#[test]
fn a_ring_of_one_hands_over_what_two_send() {
    two_senders_and_a_receiver(|| Ring::new(1));
}

#[test]
fn a_deque_of_one_hands_over_what_two_send() {
    two_senders_and_a_receiver(|| Deque::new(1));
}

#[test]
fn two_receivers_get_a_message_each() {
    model(1, || {
        let line = Arc::new(Line::new(Ring::new(2)));
        let receivers: Vec<_> = (0..2)
            .map(|_| {
                let line = Arc::clone(&line);
                thread::spawn(move || receive(&line).unwrap())
            })
            .collect();
        send(&line, 1).unwrap();
        send(&line, 2).unwrap();
        let mut found: Vec<_> = receivers
            .into_iter()
            .map(|receiver| receiver.join().unwrap())
            .collect();
        found.sort_unstable();
        assert_eq!(found, [1, 2]);
    });
}

#[test]
fn a_sender_goes_through_laps_in_order() {
    model(2, || {
        let line = Arc::new(Line::new(Ring::new(2)));
        let sending = {
            let line = Arc::clone(&line);
            thread::spawn(move || (0..4).for_each(|message| send(&line, message).unwrap()))
        };
        for expected in 0..4 {
            assert_eq!(receive(&line), Some(expected));
        }
        sending.join().unwrap();
    });
}

/// What a push returned `Ok` for is received, whenever the channel was closed; and who waits learns
/// the end.
#[test]
fn closing_loses_no_message_and_wakes_who_waits() {
    model(2, || {
        let line = Arc::new(Line::new(Ring::new(1)));
        let sending = {
            let line = Arc::clone(&line);
            thread::spawn(move || send(&line, 7).is_ok())
        };
        let receiving = {
            let line = Arc::clone(&line);
            thread::spawn(move || {
                let first = receive(&line);
                if first.is_some() {
                    assert_eq!(receive(&line), None);
                }
                first
            })
        };
        line.close().into_iter().for_each(|waker| waker.call());
        let sent = sending.join().unwrap();
        assert_eq!(receiving.join().unwrap(), sent.then_some(7));
    });
}

/// One who waits gives up just when it is called: the other gets the message.
#[test]
fn a_call_that_is_not_used_is_passed_on() {
    model(2, || {
        let line = Arc::new(Line::new(Ring::new(1)));
        let quitter = Waker::new();
        let ticket = line.join(Side::Receivers, None, quitter);
        let receiving = {
            let line = Arc::clone(&line);
            thread::spawn(move || receive(&line).unwrap())
        };
        let sending = {
            let line = Arc::clone(&line);
            thread::spawn(move || send(&line, 7).unwrap())
        };
        wake(line.leave(Side::Receivers, ticket));
        assert_eq!(receiving.join().unwrap(), 7);
        sending.join().unwrap();
    });
}

#[test]
fn the_last_sender_that_leaves_ends_the_receivers_after_its_message() {
    model(1, || {
        let line = Arc::new(Line::new(Ring::new(2)));
        assert!(line.open_handle(Side::Senders));
        assert!(line.open_handle(Side::Senders));
        let senders: Vec<_> = (0..2)
            .map(|message| {
                let line = Arc::clone(&line);
                thread::spawn(move || {
                    send(&line, message).unwrap();
                    let (woken, lost) = line.close_handle(Side::Senders);
                    woken.into_iter().for_each(|waker: Waker| waker.call());
                    assert!(lost.is_empty());
                })
            })
            .collect();
        let mut found = Vec::new();
        while let Some(message) = receive(&line) {
            found.push(message);
        }
        found.sort_unstable();
        assert_eq!(found, [0, 1]);
        for sender in senders {
            sender.join().unwrap();
        }
    });
}

#[test]
fn who_joins_is_woken_by_the_last_task() {
    model(2, || {
        let tasks = Arc::new(Tasks::default());
        tasks.add();
        tasks.add();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let tasks = Arc::clone(&tasks);
                thread::spawn(move || {
                    let woken: Vec<Waker> = tasks.done(1).unwrap();
                    woken.into_iter().for_each(|waker| waker.call());
                })
            })
            .collect();
        let waker = Waker::new();
        tasks.join(None, waker.clone());
        if tasks.unfinished() != 0 {
            waker.park();
            assert_eq!(tasks.unfinished(), 0);
        }
        for worker in workers {
            worker.join().unwrap();
        }
    });
}
