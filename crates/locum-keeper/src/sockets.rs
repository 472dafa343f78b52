//! The sockets that a keeper listens on. They may be bound by whoever starts it, and then outlive it: a runtime that
//! connects while a keeper is being replaced waits, and is not refused.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Uid};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType,
};
use serde::{Deserialize, Serialize};

use crate::protocol::Door;
use crate::{RuntimeDir, wire};

/// The most doors of rootless users.
const MOST_DOORS: usize = 200;

/// Front doors and control socket, bound.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) doors: Vec<(Door, OwnedFd)>,
    pub(crate) control: OwnedFd,
}

#[derive(Serialize, Deserialize)]
struct Names(Vec<Door>);

impl Sockets {
    /// Binds them in `runtime_dir`, with a door for each of `users`. A door belongs to its user and is open to nobody else.
    pub fn bind(runtime_dir: &RuntimeDir, users: &[u32]) -> io::Result<Self> {
        if users.len() > MOST_DOORS {
            return Err(io::Error::other(format!(
                "wanted at most {MOST_DOORS} doors of users, found {}",
                users.len()
            )));
        }
        runtime_dir.create()?;
        let mut doors = vec![(Door::Root, wire::listen(&runtime_dir.front_door(), SocketType::STREAM)?)];
        for uid in users {
            let path = runtime_dir.user_door(*uid);
            doors.push((Door::User(*uid), wire::listen(&path, SocketType::STREAM)?));
            rustix::fs::chown(&path, Some(Uid::from_raw(*uid)), None::<Gid>)?;
        }
        Ok(Self { doors, control: wire::listen(&runtime_dir.control(), SocketType::SEQPACKET)? })
    }

    /// Sends them through `socket`, to be taken by [`Self::receive`].
    pub fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let names = Names(self.doors.iter().map(|(door, _)| *door).collect());
        let text = serde_json::to_vec(&names)?;
        let fds: Vec<_> = self.doors.iter().map(|(_, fd)| fd.as_fd()).chain([self.control.as_fd()]).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DOORS + 2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        rustix::net::sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Takes what [`Self::send`] sent.
    pub fn receive(socket: impl AsFd) -> io::Result<Self> {
        let mut text = vec![0; 16 * 1024];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DOORS + 2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut text)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = wire::descriptors(&mut control);
        let Names(names) = serde_json::from_slice(&text[..message.bytes])?;
        let control = fds.pop().filter(|_| fds.len() == names.len()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { doors: names.into_iter().zip(fds).collect(), control })
    }

    /// Removes their files.
    pub fn remove(&self, runtime_dir: &RuntimeDir) {
        for (door, _) in &self.doors {
            // Gone already is as good.
            let _ = std::fs::remove_file(match door {
                Door::Root => runtime_dir.front_door(),
                Door::User(uid) => runtime_dir.user_door(*uid),
            });
        }
        let _ = std::fs::remove_file(runtime_dir.control());
    }
}
