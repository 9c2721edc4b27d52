//! Stores against a plain deque, ends, and what is dropped when.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A waker that counts its calls.
type Line<T, S = Ring<T>> = Channel<T, Sender<()>, S>;

fn waker() -> (Sender<()>, Receiver<()>) {
    channel()
}

#[derive(Clone, Debug)]
enum Step {
    Push,
    Pop,
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Push),
        8 => Just(Step::Pop),
        1 => Just(Step::Close),
    ];
    proptest::collection::vec(step, 0..200)
}

fn behaves_like_a_deque(store: &impl Store<Arc<usize>>, capacity: usize, steps: &[Step]) {
    let mut model = VecDeque::new();
    let mut closed = false;
    for (number, step) in steps.iter().enumerate() {
        let message = Arc::new(number);
        match step {
            Step::Push => match store.push(Arc::clone(&message)) {
                Ok(waits) => {
                    assert!(!waits && !closed && model.len() < capacity);
                    model.push_back(message);
                }
                Err(Refused::Full(back)) => {
                    assert!(!closed && model.len() == capacity && Arc::ptr_eq(&back, &message));
                }
                Err(Refused::Closed(back)) => assert!(closed && Arc::ptr_eq(&back, &message)),
            },
            Step::Pop => match (store.pop(), model.pop_front()) {
                (Ok((found, false)), Some(expected)) => assert!(Arc::ptr_eq(&found, &expected)),
                (Err(Missed::Empty), None) => assert!(!closed),
                (Err(Missed::Closed), None) => assert!(closed),
                (found, expected) => panic!("{found:?} for {expected:?}"),
            },
            Step::Close => {
                store.close();
                closed = true;
            }
        }
        assert_eq!(store.count(), model.len());
        let mut seen = Vec::new();
        // SAFETY: no other thread knows the store.
        let visited = unsafe {
            store.visit(|message| {
                seen.push(**message);
                Ok::<(), ()>(())
            })
        };
        assert_eq!(visited, Ok(()));
        assert!(seen.iter().eq(model.iter().map(|message| &**message)));
    }
    for message in model {
        assert_eq!(
            Arc::strong_count(&message),
            2,
            "held once here and once there"
        );
    }
}

proptest! {
    #[test]
    fn a_ring_behaves_like_a_bounded_deque(capacity in 1_usize..10, steps in steps()) {
        let ring = Ring::new(capacity);
        behaves_like_a_deque(&ring, capacity, &steps);
        prop_assert_eq!(ring.total_pushed() - ring.total_popped(), ring.count());
    }

    #[test]
    fn a_deque_behaves_like_a_bounded_deque(capacity in 1_usize..10, steps in steps()) {
        behaves_like_a_deque(&Deque::new(capacity), capacity, &steps);
    }
}

#[test]
fn what_is_left_is_dropped_with_the_ring() {
    let message = Arc::new(());
    let ring = Ring::new(3);
    for _ in 0..2 {
        ring.push(Arc::clone(&message)).unwrap();
        ring.pop().unwrap();
        ring.push(Arc::clone(&message)).unwrap();
    }
    assert_eq!(Arc::strong_count(&message), 3);
    drop(ring);
    assert_eq!(Arc::strong_count(&message), 1);
}

#[test]
fn many_threads_pass_every_message_once_through_a_small_ring() {
    const COUNT: usize = 20_000;
    let ring = Ring::new(3);
    let totals: Vec<usize> = std::thread::scope(|scope| {
        for first in 0..2 {
            let ring = &ring;
            scope.spawn(move || {
                for number in (first..COUNT).step_by(2) {
                    let mut message = number;
                    while let Err(Refused::Full(back)) = ring.push(message) {
                        message = back;
                        std::thread::yield_now();
                    }
                }
            });
        }
        let takers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut found = Vec::new();
                    while ring.total_popped() < COUNT {
                        match ring.pop() {
                            Ok((number, _)) => found.push(number),
                            Err(_) => std::thread::yield_now(),
                        }
                    }
                    for parity in 0..2 {
                        let one = found.iter().filter(|number| *number % 2 == parity);
                        assert!(one.is_sorted(), "each sender's messages are in order");
                    }
                    found.into_iter().sum()
                })
            })
            .collect();
        takers.into_iter().map(|it| it.join().unwrap()).collect()
    });
    assert_eq!(totals.into_iter().sum::<usize>(), COUNT * (COUNT - 1) / 2);
}

#[test]
fn a_push_calls_the_first_in_line_and_only_it() {
    let line = Line::new(Ring::new(4));
    let (first, first_called) = waker();
    let (second, second_called) = waker();
    let ticket = line.join(Side::Receivers, None, first.clone());
    line.join(Side::Receivers, None, second);
    line.push(1).unwrap().expect("one waits").send(()).unwrap();
    first_called.try_recv().unwrap();
    assert!(second_called.try_recv().is_err());
    // In vain: it goes back to the front of the line.
    line.join(Side::Receivers, Some(ticket), first);
    line.push(2).unwrap().expect("two wait").send(()).unwrap();
    first_called.try_recv().unwrap();
    assert_eq!(line.census().receivers_waiting, 1);
}

#[test]
fn leaving_after_a_call_calls_the_next() {
    let line: Line<i32> = Line::new(Ring::new(4));
    let (first, _kept) = waker();
    let (second, second_called) = waker();
    let ticket = line.join(Side::Receivers, None, first);
    line.join(Side::Receivers, None, second);
    drop(line.push(1).unwrap());
    let next = line.leave(Side::Receivers, ticket);
    next.expect("the second").send(()).unwrap();
    second_called.try_recv().unwrap();
    assert!(line.push(2).unwrap().is_none(), "nobody waits any more");
}

#[test]
fn the_last_receiver_takes_what_is_left_with_it() {
    let line: Line<i32> = Line::new(Ring::new(4));
    assert!(line.open_handle(Side::Receivers));
    assert!(line.open_handle(Side::Receivers));
    line.push(1).unwrap();
    assert_eq!(line.close_handle(Side::Receivers).1, []);
    assert_eq!(line.close_handle(Side::Receivers).1, [1]);
    assert_eq!(line.push(2).err(), Some(Refused::Closed(2)));
    assert_eq!(
        line.ended(Side::Senders),
        Some(Ended::Side(Side::Receivers))
    );
    assert!(!line.open_handle(Side::Receivers));
}

#[test]
fn a_deque_with_another_limit_keeps_what_is_in_it() {
    let deque = Deque::new(usize::MAX);
    for number in 0..10 {
        deque.push(number).unwrap();
    }
    deque.set_limit(2);
    assert_eq!(deque.push(10), Err(Refused::Full(10)));
    assert_eq!((deque.count(), deque.limit()), (10, 2));
}

#[test]
fn a_bell_is_heard_once_for_many_rings() {
    let bell = Doorbell::new().unwrap();
    bell.ring(3);
    bell.ring(4);
    assert_eq!(bell.answer(), [3, 4]);
    assert!(bell.answer().is_empty());
    bell.ring(5);
    assert_eq!(bell.answer(), [5]);
}
