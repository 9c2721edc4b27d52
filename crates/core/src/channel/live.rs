//! The channels of this process that keep memory which no message needs, so that it can be given back.
//!
//! Held weakly, and asked without our lock. Any thread may call anything here; a forked child
//! inherits the list.

use crate::resource::fork;
use crate::sync::Lock;
use std::sync::{Arc, LazyLock, Weak};

/// Something that may have memory to give back.
pub trait KeepsMemory: Send + Sync {
    /// Bytes that could be given back.
    fn idle_bytes(&self) -> usize;
    /// Give them back; how many that were.
    fn trim(&self) -> usize;
}

type List = Lock<Vec<Weak<dyn KeepsMemory>>>;

static LIVE: LazyLock<Arc<List>> = LazyLock::new(|| fork::shared(List::default()));

/// Have a channel asked for as long as it lives.
pub(crate) fn enter(channel: Weak<dyn KeepsMemory>) {
    fork::push_live(&mut LIVE.lock(), channel);
}

fn all() -> Vec<Arc<dyn KeepsMemory>> {
    LIVE.lock().iter().filter_map(Weak::upgrade).collect()
}

/// Bytes that all channels could give back.
pub fn idle_bytes() -> usize {
    all().iter().map(|channel| channel.idle_bytes()).sum()
}

/// Have all channels give back what no message needs; how many bytes that was.
pub fn trim_all() -> usize {
    all().iter().map(|channel| channel.trim()).sum()
}
