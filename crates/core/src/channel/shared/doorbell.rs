//! What wakes an event loop in another process: a datagram to a name that dies with its process.
//!
//! A word in shared memory cannot be waited for together with sockets, and an eventfd would have to
//! be handed to every process that may come. A Unix socket with an abstract name needs neither a
//! file nor a hand-over. A datagram that is lost, or comes from somebody else, does no harm: who is
//! rung looks for himself, and looks now and then unrung.

use crate::error::{Error, Result};
use crate::os::shared;
use crate::sync::Lock;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

#[derive(Default)]
struct Sockets {
    /// The one that is rung, and the number in its name.
    own: Option<(UnixDatagram, u64)>,
    /// The one to ring others with.
    outgoing: Option<UnixDatagram>,
}

/// The doorbell of one process at one segment.
#[derive(Default)]
pub struct Doorbell(Lock<Sockets>);

fn address(id: u64, slot: usize, number: u64) -> std::io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("moirai-{id:016x}-{slot}-{number:016x}"))
}

impl Doorbell {
    /// The descriptor to watch and the number that others need to ring it.
    pub fn open(&self, id: u64, slot: usize) -> Result<(i32, u64)> {
        let mut sockets = self.0.lock();
        if let Some((socket, number)) = &sockets.own {
            return Ok((socket.as_raw_fd(), *number));
        }
        let make = || -> std::io::Result<(UnixDatagram, u64)> {
            let number = shared::random()?;
            let socket = UnixDatagram::bind_addr(&address(id, slot, number)?)?;
            socket.set_nonblocking(true)?;
            Ok((socket, number))
        };
        let (socket, number) =
            make().map_err(|error| Error::unsupported(format!("a socket for asyncio: {error}")))?;
        let fd = socket.as_raw_fd();
        sockets.own = Some((socket, number));
        Ok((fd, number))
    }

    /// Take what rang.
    pub fn drain(&self) {
        let sockets = self.0.lock();
        if let Some((socket, _)) = &sockets.own {
            let mut byte = [0; 1];
            while socket.recv(&mut byte).is_ok() {}
        }
    }

    /// Ring another's. Nobody there, or rung often enough already: nothing to do.
    pub fn ring(&self, id: u64, slot: usize, number: u64) {
        let mut sockets = self.0.lock();
        if sockets.outgoing.is_none() {
            let made = UnixDatagram::unbound();
            sockets.outgoing = made.ok().filter(|it| it.set_nonblocking(true).is_ok());
        }
        if let (Some(socket), Ok(address)) = (&sockets.outgoing, address(id, slot, number)) {
            let _ = socket.send_to_addr(&[1], &address);
        }
    }

    /// Before a fork.
    pub fn hold(&self) {
        self.0.hold();
    }

    /// After a fork; a child forgets its parent's sockets.
    ///
    /// # Safety
    /// This thread, or the one it was forked from, called `hold`.
    pub unsafe fn release(&self, in_child: bool) {
        if in_child {
            // SAFETY: the caller's promise.
            *unsafe { self.0.held() } = Sockets::default();
        }
        // SAFETY: the caller's promise.
        unsafe { self.0.release() };
    }
}
