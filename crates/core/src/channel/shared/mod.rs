//! Channels between processes: a ring of records and a pool of blocks in one shared segment.
//!
//! [`word`], [`ring`], [`blocks`] and [`gate`] are the lock-free parts, over words wherever they
//! lie; [`layout`] says where that is. [`segment`] is the file, [`attachment`] a process at it,
//! [`endpoint`] what sends and receives, [`block`] a block it has, [`message`] how arrays and objects lie in a message,
//! [`reference`] messages whose bytes lie in memory of a `SharedMemoryResource`.

pub mod attachment;
pub mod block;
pub mod blocks;
pub mod descriptor;
pub mod doorbell;
pub mod endpoint;
pub mod gate;
pub mod layout;
pub mod message;
pub mod reference;
pub mod ring;
pub mod segment;
pub mod word;

use crate::error::{Error, Result};
use crate::sync::{AtomicBool, Lock, Ordering};
use attachment::{Attachment, Role};
use endpoint::Endpoint;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

/// A handle of a channel: attached to its segment until it and what was opened with it are closed.
pub struct Channel {
    attachment: Arc<Attachment>,
    /// What was opened with this handle, for closing it.
    endpoints: Lock<Vec<Weak<Endpoint>>>,
    closed: AtomicBool,
}

impl Channel {
    /// A new channel for `capacity` bytes of large messages, by name or for whoever gets its file.
    pub fn create(name: Option<&str>, capacity: usize) -> Result<Self> {
        Attachment::create(name, capacity).map(Self::over)
    }

    /// The channel of this name.
    pub fn open(name: &str) -> Result<Self> {
        Attachment::open(name).map(Self::over)
    }

    /// The channel in this file.
    pub fn adopt(file: OwnedFd) -> Result<Self> {
        Attachment::adopt(file).map(Self::over)
    }

    fn over(attachment: Arc<Attachment>) -> Self {
        Channel {
            attachment,
            endpoints: Lock::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// What it is attached by.
    pub fn attachment(&self) -> &Arc<Attachment> {
        &self.attachment
    }

    /// Open a sender or a receiver.
    pub fn endpoint(&self, role: Role) -> Result<Arc<Endpoint>> {
        let mut endpoints = self.endpoints.lock();
        if self.is_closed() {
            return Err(Error::closed("this handle of the channel is closed"));
        }
        let endpoint = Arc::new(Endpoint::new(Arc::clone(&self.attachment), role)?);
        endpoints.retain(|endpoint| endpoint.strong_count() > 0);
        endpoints.push(Arc::downgrade(&endpoint));
        Ok(endpoint)
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Close what was opened with it, then leave the channel; blocks that are viewed stay until
    /// their views end.
    pub fn close(&self) {
        let endpoints = {
            let mut endpoints = self.endpoints.lock();
            if self.closed.swap(true, Ordering::AcqRel) {
                return;
            }
            std::mem::take(&mut *endpoints)
        };
        for endpoint in endpoints.iter().filter_map(Weak::upgrade) {
            endpoint.close();
        }
        self.attachment.let_go();
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.attachment.let_go();
        }
    }
}
