//! Unix sockets: who is at the other end, and single descriptors through them.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use crate::Errno;

/// Who connected, as the kernel noted it then (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The process's id; 0 if our pid namespace does not see it.
    pub pid: u32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

/// Who connected the other end of `socket`.
pub fn peer(socket: impl AsFd) -> Result<Peer, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    option(&socket, libc::SO_PEERCRED, &mut credentials)?;
    Ok(Peer { pid: credentials.pid.cast_unsigned(), uid: credentials.uid, gid: credentials.gid })
}

/// A descriptor of the process that connected the other end of `socket`, whatever became of its id (`SO_PEERPIDFD`, 6.5).
/// ENOPROTOOPT: an older kernel. ESRCH or EINVAL: the process is gone.
pub fn peer_process(socket: impl AsFd) -> Result<OwnedFd, Errno> {
    let mut fd: libc::c_int = -1;
    option(&socket, SO_PEERPIDFD, &mut fd)?;
    // SAFETY: SO_PEERPIDFD succeeded, so this is a descriptor that was made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends `bytes`, and a copy of `fd` with them. EAGAIN: a socket that does not block is full.
pub fn send_with(socket: impl AsFd, bytes: &[u8], fd: BorrowedFd<'_>) -> Result<usize, Errno> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// Receives into `bytes`: how many came, and the descriptor that came with them.
pub fn receive_with(
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((message.bytes, fd))
}

/// `SO_PEERPIDFD` (`asm-generic/socket.h`).
const SO_PEERPIDFD: libc::c_int = 77;

fn option<T: Copy>(socket: &impl AsFd, name: libc::c_int, value: &mut T) -> Result<(), Errno> {
    let mut length = u32::try_from(size_of::<T>()).map_err(|_| Errno::INVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes at this address, the size of `value`, and both callers' types
    // are made of integers, for which any bytes are valid.
    let done = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, name, std::ptr::from_mut(value).cast(), &raw mut length)
    };
    crate::notify::check(done).map(drop)
}
