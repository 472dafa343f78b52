//! The sockets that a keeper serves, and the lock that keeps two keepers apart. Whoever binds them can hand them to one keeper
//! after the other, so that the doors stay open meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use locum_kernel::{Errno, program};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Uid;

use crate::dir::RuntimeDir;
use crate::frame::{self, Inbox, Progress};
use crate::protocol::Door;
use crate::store::Stored;

/// All that a keeper serves.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) doors: Vec<(Door, OwnedFd)>,
    pub(crate) control: OwnedFd,
    pub(crate) lock: OwnedFd,
    /// What systemd stored for a keeper before.
    pub(crate) stored: Stored,
}

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another keeper has the directory.
    #[error("a keeper is running in {0} already; stop it, or choose another --runtime-dir")]
    Locked(PathBuf),
    /// The kernel's word on one path.
    #[error("cannot {doing} {path}: {source}")]
    Path {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// What was handed over is not what was announced.
    #[error("the sockets handed over cannot be used: {0}")]
    Handed(String),
}

fn error(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::Path { doing, path, source: source.into() }
}

impl Sockets {
    /// Makes the directory if need be, takes its lock and binds root's door, one for each of `users`, and the control socket.
    pub fn bind(dir: &RuntimeDir, users: &[u32]) -> Result<Self, SocketError> {
        dir.prepare().map_err(|source| SocketError::Path {
            doing: "prepare the runtime directory",
            path: dir.path().to_owned(),
            source,
        })?;
        let lock = lock(dir)?;
        let mut doors = vec![(Door::Root, bind(&dir.front_door(), None)?)];
        for uid in users {
            doors.push((Door::User(*uid), bind(&dir.user_door(*uid), Some(*uid))?));
        }
        Ok(Self { doors, control: bind(&dir.control(), None)?, lock, stored: Stored::new() })
    }

    /// Those that systemd bound, by `LISTEN_FDS` and `LISTEN_FDNAMES` (sd_listen_fds(3)): `oci`, `oci-UID` and `keeper`. All other
    /// names are those of what it stored for a keeper before.
    /// `None`: there are none for this process.
    pub fn from_systemd(dir: &RuntimeDir) -> Result<Option<Self>, SocketError> {
        let variable = |name| std::env::var(name).ok();
        if variable("LISTEN_PID") != Some(std::process::id().to_string()) {
            return Ok(None);
        }
        let handed = |what: &str| SocketError::Handed(what.to_owned());
        let count: i32 = variable("LISTEN_FDS")
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| handed("LISTEN_FDS is no number"))?;
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let (mut doors, mut control, mut stored) = (Vec::new(), None, Stored::new());
        for (fd, name) in (3..3i32.saturating_add(count)).zip(names.split(':')) {
            let socket = program::inherited(fd)
                .map_err(|error| SocketError::Handed(format!("descriptor {fd}: {error}")))?;
            match (name, name.strip_prefix("oci-").map(str::parse)) {
                ("oci", _) => doors.push((Door::Root, socket)),
                ("keeper", _) => control = Some(socket),
                (_, Some(Ok(uid))) => doors.push((Door::User(uid), socket)),
                _ => stored.push((name.to_owned(), socket)),
            }
        }
        let control = control.ok_or_else(|| handed("none is named keeper"))?;
        dir.prepare().map_err(|source| SocketError::Path {
            doing: "prepare the runtime directory",
            path: dir.path().to_owned(),
            source,
        })?;
        Ok(Some(Self { doors, control, lock: lock(dir)?, stored }))
    }

    /// Hands them, and the lock, to the process at the other end of `to`.
    pub fn send(&self, to: impl AsFd) -> Result<(), SocketError> {
        let doors: Vec<Door> = self.doors.iter().map(|(door, _)| *door).collect();
        let first = [self.lock.as_fd(), self.control.as_fd()];
        let sockets: Vec<_> =
            first.into_iter().chain(self.doors.iter().map(|(_, socket)| socket.as_fd())).collect();
        let bytes = frame::encode(&doors, sockets.len());
        frame::send(to, &bytes, &sockets, &mut Progress::default())
            .map(drop)
            .map_err(|error| SocketError::Handed(error.to_string()))
    }

    /// Takes them from the process at the other end of `from`.
    pub fn receive(from: impl AsFd) -> Result<Self, SocketError> {
        let handed = |error: &dyn std::fmt::Display| SocketError::Handed(error.to_string());
        let mut inbox = Inbox::default();
        loop {
            if let Some((doors, descriptors)) = inbox.next::<Vec<Door>>().map_err(|error| handed(&error))? {
                let mut descriptors = descriptors.into_iter();
                let (Some(lock), Some(control)) = (descriptors.next(), descriptors.next()) else {
                    return Err(handed(&"too few descriptors"));
                };
                let doors = doors.into_iter().zip(descriptors).collect();
                return Ok(Self { doors, control, lock, stored: Stored::new() });
            }
            if inbox.receive(&from).map_err(|error| handed(&error))?.bytes == 0 {
                return Err(handed(&"the other end is closed"));
            }
        }
    }

    /// Removes the sockets' files.
    pub fn remove(&self, dir: &RuntimeDir) {
        let doors = self.doors.iter().map(|(door, _)| match door {
            Door::Root => dir.front_door(),
            Door::User(uid) => dir.user_door(*uid),
        });
        for path in doors.chain([dir.control()]) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::debug!("{} stays: {error}", path.display());
            }
        }
    }
}

fn lock(dir: &RuntimeDir) -> Result<OwnedFd, SocketError> {
    let path = dir.lock();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)).map_err(error("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::AGAIN) => Err(SocketError::Locked(dir.path().to_owned())),
        locked => locked.map(|()| file).map_err(error("lock", &path)),
    }
}

/// A listening socket that only its owner may connect to, from its first moment on.
fn bind(path: &Path, owner: Option<u32>) -> Result<OwnedFd, SocketError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(SocketError::Path { doing: "remove the old", path: path.to_owned(), source });
        }
        _ => {}
    }
    let address = SocketAddrUnix::new(path).map_err(error("bind", path))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(error("make a socket for", path))?;
    // The socket's mode becomes that of its file; there is no moment at which another could connect.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(0o600)).map_err(error("protect", path))?;
    rustix::net::bind(&socket, &address).map_err(error("bind", path))?;
    if let Some(uid) = owner {
        rustix::fs::chownat(CWD, path, Some(Uid::from_raw(uid)), None, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(error("give away", path))?;
    }
    rustix::net::listen(&socket, 128).map_err(error("listen at", path))?;
    Ok(socket)
}

/// Has the sockets never block: a connection can be gone before it is accepted.
pub(crate) fn unblock(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(socket)?;
    rustix::fs::fcntl_setfl(socket, flags | OFlags::NONBLOCK)
}
