//! A place where an open file that cannot be opened again waits while it is handed over, outside every process that may die: a
//! socket of which the keeper holds a copy.

use std::os::fd::{BorrowedFd, OwnedFd};

use locum_kernel::notify::CallId;
use locum_kernel::{Errno, socket};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// One such place, that of one slot for one listener.
#[derive(Debug)]
pub(crate) struct Park {
    near: OwnedFd,
    far: OwnedFd,
}

impl Park {
    pub(crate) fn new() -> Result<Self, Errno> {
        let (near, far) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok(Self { near, far })
    }

    pub(crate) fn of(near: OwnedFd, far: OwnedFd) -> Self {
        Self { near, far }
    }

    /// Both ends, for the keeper.
    pub(crate) fn ends(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        use std::os::fd::AsFd as _;
        (self.near.as_fd(), self.far.as_fd())
    }

    /// Puts `file` there, for the call `id`.
    pub(crate) fn put(&self, id: CallId, file: BorrowedFd<'_>) -> Result<(), Errno> {
        socket::send_with(&self.near, &id.0.to_ne_bytes(), file).map(drop)
    }

    /// A copy of the file that waits for the call `id`, which goes on waiting. Whatever waits before it, for calls that
    /// are over, is closed.
    pub(crate) fn look(&self, id: CallId) -> Option<OwnedFd> {
        loop {
            let (found, file) = self.peek()?;
            if found == id {
                return file;
            }
            self.take();
        }
    }

    /// Closes all that waits.
    pub(crate) fn clear(&self) {
        while self.take() {}
    }

    /// Closes the first thing that waits, if one does: what is received with no room for a descriptor, the kernel closes.
    pub(crate) fn take(&self) -> bool {
        rustix::net::recv(&self.far, &mut [0; 8], RecvFlags::empty()).is_ok_and(|(_, bytes)| bytes > 0)
    }

    fn peek(&self) -> Option<(CallId, Option<OwnedFd>)> {
        let mut id = [0; 8];
        let (bytes, file) = socket::receive_with(&self.far, &mut id, RecvFlags::PEEK).ok()?;
        (bytes > 0).then_some((CallId(u64::from_ne_bytes(id)), file))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_file_waits_for_its_own_call_until_it_is_taken() {
        let park = Park::new().unwrap();
        let file = |path| std::fs::File::open(path).unwrap();
        park.put(CallId(1), file("/proc/self/maps").as_fd()).unwrap();
        park.put(CallId(2), file("/proc/self/status").as_fd()).unwrap();
        for _ in 0..2 {
            assert!(park.look(CallId(2)).is_some());
        }
        assert!(park.look(CallId(1)).is_none(), "the older one was closed, the newer one with it now");
        park.put(CallId(3), file("/proc/self/maps").as_fd()).unwrap();
        park.take();
        assert!(park.look(CallId(3)).is_none());
    }
}
