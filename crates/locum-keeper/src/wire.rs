//! Datagrams with descriptors.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest datagram of the control protocol.
const LONGEST: usize = 64 * 1024;
/// The most descriptors in one datagram of the control protocol.
const MOST: usize = 2;
/// The longest state that a runtime may send.
pub(crate) const LONGEST_STATE: usize = 1024 * 1024;

pub(crate) fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one datagram"));
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)
    })?;
    if sent == text.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The next datagram; `None` at the end of the connection.
pub(crate) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut text = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let fds = descriptors(&mut control);
    if message.bytes == 0 {
        return Ok(None);
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "wanted a datagram of at most {LONGEST} bytes and {MOST} descriptors, found a larger one"
            ),
        ));
    }
    Ok(Some((serde_json::from_slice(&text[..message.bytes])?, fds)))
}

/// All descriptors of a message, owned before anything else is looked at.
pub(crate) fn descriptors(control: &mut RecvAncillaryBuffer<'_>) -> Vec<OwnedFd> {
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds.collect::<Vec<_>>()),
        _ => None,
    });
    fds.flatten().collect()
}

/// A memfd with `text`, for a peer to read.
pub(crate) fn sheet(text: &str) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(c"locum-state", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(text.as_bytes())?;
    Ok(file.into())
}

/// What is in a memfd made by [`sheet`].
pub(crate) fn read_sheet(fd: OwnedFd) -> io::Result<String> {
    let mut file = std::fs::File::from(fd);
    file.rewind()?;
    let mut text = String::new();
    file.take(LONGEST_STATE as u64 + 1).read_to_string(&mut text)?;
    if text.len() > LONGEST_STATE { Err(io::ErrorKind::InvalidData.into()) } else { Ok(text) }
}

/// A socket of `kind`, bound to `path` and listening there, in place of whatever was left behind.
pub(crate) fn listen(path: &std::path::Path, kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Nobody may connect between bind and chmod.
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(&fresh)?)?;
    rustix::fs::chmod(&fresh, rustix::fs::Mode::from_raw_mode(0o600))?;
    rustix::net::listen(&socket, 1024)?;
    std::fs::rename(&fresh, path)?;
    Ok(socket)
}

/// A connection to the socket of `kind` at `path`.
pub(crate) fn connect(path: &std::path::Path, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}
