//! What this process sent by reference and nobody has received yet.
//!
//! The list keeps the segments alive that the parcels are of, and takes back the parcels of messages
//! that cannot be received any more because what carried them is gone.

use super::holders::Parcel;
use super::holding::Holding;
use crate::resource::fork;
use crate::sync::Lock;
use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// What carries messages to other processes.
pub trait Carrier: Send + Sync {
    /// Whether this process is attached to it.
    fn is_attached(&self) -> bool;
    /// Whether another process is.
    fn has_others(&self) -> bool;
    /// Whether others may still receive what is in it.
    fn can_be_received(&self) -> bool;
}

struct Sent {
    holding: Arc<Holding>,
    parcel: Parcel,
    carrier: Arc<dyn Carrier>,
    generation: u64,
}

impl Sent {
    fn is_waiting(&self) -> bool {
        self.generation == fork::generation()
            && self.holding.segment().holders().is_waiting(self.parcel)
    }
}

type List = Lock<VecDeque<Sent>>;

static SENT: LazyLock<Arc<List>> = LazyLock::new(|| fork::shared(List::default()));

/// Note a parcel that was sent.
pub fn note(holding: &Arc<Holding>, parcel: Parcel, carrier: Arc<dyn Carrier>) {
    let mut over = Vec::new();
    let mut list = SENT.lock();
    while list.front().is_some_and(|sent| !sent.is_waiting()) {
        over.extend(list.pop_front());
    }
    list.push_back(Sent {
        holding: Arc::clone(holding),
        parcel,
        carrier,
        generation: fork::generation(),
    });
    drop(list);
    // What an entry holds may take locks of its own when it goes.
    drop(over);
}

/// Forget what was received, and take back what nobody can receive.
pub fn sweep() {
    // Not under the lock: carriers have locks of their own.
    let taken = std::mem::take(&mut *SENT.lock());
    let (waiting, over): (Vec<_>, Vec<_>) = taken.into_iter().partition(|sent| {
        if !sent.is_waiting() {
            return false;
        }
        let is_lost = !sent.carrier.is_attached() && !sent.carrier.has_others();
        if is_lost {
            sent.holding.segment().holders().take(sent.parcel);
        }
        !is_lost
    });
    let mut list = SENT.lock();
    for sent in waiting.into_iter().rev() {
        list.push_front(sent);
    }
    drop(list);
    drop(over);
}

/// How many messages another process can still receive.
fn receivable_count() -> usize {
    let carriers: Vec<Arc<dyn Carrier>> = {
        let list = SENT.lock();
        let waiting = list.iter().filter(|sent| sent.is_waiting());
        waiting.map(|sent| Arc::clone(&sent.carrier)).collect()
    };
    carriers
        .iter()
        .filter(|carrier| carrier.can_be_received())
        .count()
}

/// Wait until the others have received what was sent, at most so long; how many they have not.
pub fn linger(timeout: Duration) -> usize {
    let started = Instant::now();
    loop {
        let left = receivable_count();
        if left == 0 || started.elapsed() >= timeout {
            return left;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
