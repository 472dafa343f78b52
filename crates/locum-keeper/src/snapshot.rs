//! All that a keeper is, for the one that goes on in its place: JSON in a sealed memfd, and descriptors that are inherited
//! by number.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;

use locum_kernel::notify::{Listener, NotAListener};
use locum_kernel::{Errno, program};
use rustix::fs::SealFlags;
use serde::{Deserialize, Serialize};

use crate::frame::Progress;
use crate::lease::Leases;
use crate::memfd;
use crate::monitors::{ClientId, Item, MonitorId, Standing};
use crate::protocol::{Delivery, Door, ListenerId, Overlap, SessionId};
use crate::registry::Session;

/// The release of this program.
pub(crate) const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// The version of the snapshot.
pub(crate) const VERSION: u32 = 1;

/// Why a snapshot cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is another release's.
    #[error("locum {RELEASE} reads snapshots of version {VERSION}, found one of version {0}")]
    Version(u32),
    /// It is none.
    #[error("the snapshot cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// A descriptor is not there.
    #[error("descriptor {0}, {1}, was not inherited: {2}")]
    Descriptor(RawFd, &'static str, Errno),
    /// A descriptor is something else.
    #[error("descriptor {0}: {1}")]
    NotAListener(RawFd, NotAListener),
    /// It refers to what is not in it.
    #[error("the snapshot is not whole: {0}")]
    Torn(&'static str),
    /// The kernel's word.
    #[error("cannot {0}: {1}")]
    Own(&'static str, io::Error),
}

/// The whole.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) version: u32,
    pub(crate) release: String,
    pub(crate) owner: u32,
    /// What can be read when the keeper is to stop, if that must be looked at by the next.
    pub(crate) stop: Option<RawFd>,
    pub(crate) lock: RawFd,
    pub(crate) control: RawFd,
    pub(crate) doors: Vec<(Door, RawFd)>,
    pub(crate) arrivals: Vec<ArrivalSnapshot>,
    pub(crate) clients: Vec<ClientSnapshot>,
    pub(crate) monitors: Vec<MonitorSnapshot>,
    /// The highest generation and the latest monitor.
    pub(crate) generation: u64,
    pub(crate) latest_monitor: MonitorId,
    pub(crate) listeners: Vec<HeldSnapshot>,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    pub(crate) sequence: u64,
    pub(crate) leases: Leases<MonitorId, SessionId>,
    /// The latest arrival or client.
    pub(crate) latest: u64,
    pub(crate) turned_away: u64,
    pub(crate) store: Option<StoreSnapshot>,
}

/// A connection at a front door.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ArrivalSnapshot {
    pub(crate) id: u64,
    pub(crate) door: usize,
    pub(crate) socket: RawFd,
    #[serde(with = "as_text")]
    pub(crate) bytes: Vec<u8>,
    /// Listeners, and what else came and was closed.
    pub(crate) descriptors: Vec<Result<RawFd, String>>,
    /// How long it may still take.
    pub(crate) left_ms: Option<u64>,
}

/// A connection to the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ClientSnapshot {
    pub(crate) id: ClientId,
    pub(crate) socket: RawFd,
    #[serde(with = "as_text")]
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<RawFd>,
    pub(crate) standing: Standing,
    pub(crate) queue: Vec<Item>,
    pub(crate) sending: Option<SendingSnapshot>,
}

/// A message that a client has a part of.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SendingSnapshot {
    #[serde(with = "as_text")]
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<RawFd>,
    pub(crate) progress: Progress,
}

/// A monitor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MonitorSnapshot {
    pub(crate) id: MonitorId,
    pub(crate) client: Option<ClientId>,
    pub(crate) process: Option<RawFd>,
    pub(crate) pid: u32,
    pub(crate) version: String,
    pub(crate) generation: u64,
    #[serde(default)]
    pub(crate) overlap: Overlap,
    #[serde(default)]
    pub(crate) started: u64,
}

/// A listener.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HeldSnapshot {
    pub(crate) delivery: Delivery,
    pub(crate) listener: RawFd,
    pub(crate) parks: BTreeMap<u32, [RawFd; 2]>,
}

/// What is in systemd's descriptor store.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoreSnapshot {
    pub(crate) notes: BTreeMap<ListenerId, NoteSnapshot>,
    pub(crate) numbers: BTreeSet<u32>,
    pub(crate) monitors: BTreeMap<MonitorId, String>,
}

/// The note of a listener there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NoteSnapshot {
    pub(crate) number: u32,
    pub(crate) memfd: RawFd,
    pub(crate) holder: Option<MonitorId>,
}

/// Bytes as a text of as many characters, since most of them are ASCII.
mod as_text {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&bytes.iter().map(|byte| char::from(*byte)).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        text.chars().map(|char| u8::try_from(char).map_err(D::Error::custom)).collect()
    }
}

/// The descriptors that a snapshot names.
#[derive(Debug, Default)]
pub(crate) struct Named<'a>(BTreeMap<RawFd, BorrowedFd<'a>>);

impl<'a> Named<'a> {
    /// The number of `fd`, which is handed on.
    pub(crate) fn name(&mut self, fd: &'a impl AsFd) -> RawFd {
        let fd = fd.as_fd();
        self.0.insert(fd.as_raw_fd(), fd);
        fd.as_raw_fd()
    }

    /// Does not hand on `fd` after all.
    pub(crate) fn forget(&mut self, fd: RawFd) {
        self.0.remove(&fd);
    }

    /// All of them, once each.
    pub(crate) fn all(&self) -> Vec<BorrowedFd<'a>> {
        self.0.values().copied().collect()
    }
}

/// The descriptors that a keeper inherits.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    shared: BTreeMap<RawFd, Rc<OwnedFd>>,
    /// How many were taken.
    pub(crate) count: usize,
}

impl Inherited {
    /// Takes `fd`, a `what`.
    pub(crate) fn take(&mut self, fd: RawFd, what: &'static str) -> Result<OwnedFd, SnapshotError> {
        let taken = program::inherited(fd).map_err(|error| SnapshotError::Descriptor(fd, what, error))?;
        self.count += 1;
        Ok(taken)
    }

    /// Takes `fd`, if it is a listener.
    pub(crate) fn listener(&mut self, fd: RawFd) -> Result<Listener, SnapshotError> {
        let taken = self.take(fd, "a listener")?;
        Listener::try_from(taken).map_err(|found| SnapshotError::NotAListener(fd, found))
    }

    /// Takes `fd`, if it is a listener, which may be named more than once.
    pub(crate) fn share_listener(&mut self, fd: RawFd) -> Result<Rc<OwnedFd>, SnapshotError> {
        let shared = self.share(fd, "a listener")?;
        Listener::recognise(shared.as_fd()).map_err(|found| SnapshotError::NotAListener(fd, found))?;
        Ok(shared)
    }

    /// Takes `fd`, a `what` that may be named more than once.
    pub(crate) fn share(&mut self, fd: RawFd, what: &'static str) -> Result<Rc<OwnedFd>, SnapshotError> {
        if let Some(shared) = self.shared.get(&fd) {
            return Ok(Rc::clone(shared));
        }
        let shared = Rc::new(self.take(fd, what)?);
        self.shared.insert(fd, Rc::clone(&shared));
        Ok(shared)
    }
}

impl Snapshot {
    /// A memfd of it, which nothing can change any more.
    pub(crate) fn write(&self) -> io::Result<OwnedFd> {
        let mut to = BufWriter::new(File::from(memfd::create()?));
        serde_json::to_writer(&mut to, self)?;
        to.flush()?;
        let file = to.into_inner().map_err(io::IntoInnerError::into_error)?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(file.into())
    }

    /// What a keeper before wrote into the memfd `from`.
    pub(crate) fn read(from: &OwnedFd) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct AnyVersion {
            version: u32,
        }
        let bytes = memfd::read(from).map_err(|error| SnapshotError::Own("read the snapshot", error))?;
        let AnyVersion { version } = serde_json::from_slice(&bytes)?;
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        Ok(serde_json::from_slice(&bytes)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::is_within;

    /// What a release left, as it was: this one reads it, and leaves as much.
    #[test]
    fn the_snapshot_of_0_1_0_is_understood() {
        let frozen = include_str!("frozen/0.1.0-snapshot.json");
        let read: Snapshot = serde_json::from_str(frozen).unwrap();
        let again = serde_json::to_value(&read).unwrap();
        assert!(is_within(&serde_json::from_str(frozen).unwrap(), &again), "{again}");
        let back = Snapshot::read(&read.write().unwrap()).unwrap();
        assert_eq!(serde_json::to_value(back).unwrap(), again);
        assert_eq!(read.clients[2].bytes, [0, 0xff, b'{', 0xe9]);
    }

    #[test]
    fn another_versions_snapshot_is_refused_whatever_it_holds() {
        let file = |text: &str| {
            let made = memfd::create().unwrap();
            rustix::io::write(&made, text.as_bytes()).unwrap();
            made
        };
        let refused = |text| Snapshot::read(&file(text)).unwrap_err().to_string();
        let version = refused(r#"{"version":9,"arrivals":"elsewhere"}"#);
        assert!(version.ends_with("reads snapshots of version 1, found one of version 9"), "{version}");
        for text in ["", "{", "null", r#"{"version":-1}"#, r#"{"version":1}"#] {
            assert!(refused(text).starts_with("the snapshot cannot be read: "), "{text}");
        }
    }

    #[test]
    fn a_snapshot_is_sealed() {
        let read: Snapshot = serde_json::from_str(include_str!("frozen/0.1.0-snapshot.json")).unwrap();
        let written = read.write().unwrap();
        assert_eq!(rustix::io::write(&written, b"x"), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&written, 0), Err(Errno::PERM));
    }
}
