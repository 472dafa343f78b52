//! What keeper, monitors and `locum status` say to each other on the control socket: one JSON text a datagram, with the
//! descriptors that it names. See `docs/protocol.md`.

use serde::{Deserialize, Serialize};

/// The protocol's version. A peer of a newer one is refused.
pub const VERSION: u32 = 1;

/// Names a session for as long as anything of it is left; fit to be a file's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub(crate) String);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a listener, for every keeper and monitor: random, and never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ListenerId(pub u64);

/// At which front door something was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    /// `oci.sock`.
    Root,
    /// `oci-UID.sock`.
    User(u32),
}

/// Who delivered it, by SO_PEERCRED.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id, as the keeper sees it.
    pub pid: u32,
}

/// One listener, and what its runtime said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The session that it belongs to.
    pub session: SessionId,
    /// The listener.
    pub listener: ListenerId,
    /// Where it came in.
    pub door: Door,
    /// Who brought it.
    pub peer: Peer,
    /// The runtime's JSON, as it was received.
    pub state: String,
}

/// A delivery without its state, which travels in a memfd: it may be larger than a datagram.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Label {
    pub(crate) session: SessionId,
    pub(crate) listener: ListenerId,
    pub(crate) door: Door,
    pub(crate) peer: Peer,
}

/// What a peer of the keeper says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// First of all.
    Hello { protocol: u32, pid: u32, version: String, generation: Option<u64> },
    /// With two descriptors, the ends of a park.
    Park { listener: ListenerId, slot: u32 },
    /// With a listener and its state: what a monitor held when a keeper was lost.
    Fill(Label),
    /// Asks for a [`Status`].
    Status,
    /// The same, answered as soon as there is a monitor.
    AwaitMonitor,
}

/// What the keeper says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// To a monitor's hello.
    Hello { protocol: u32, pid: u32, version: String, generation: u64 },
    /// Why a peer is not served.
    Refused { why: String },
    /// With two descriptors; belongs to the lease that follows.
    Park { slot: u32 },
    /// With a listener and its state.
    Lease(Label),
    /// The listener's last user is gone.
    Ended { listener: ListenerId },
    /// To a status request.
    Status(Status),
}

/// Who is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The keeper.
    pub keeper: ProcessStatus,
    /// The monitor that serves, if one does.
    pub monitor: Option<MonitorStatus>,
    /// The sessions.
    pub sessions: Vec<SessionStatus>,
    /// Connections and deliveries that were turned away since the keeper started.
    pub turned_away: u64,
}

/// A process of locum.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Its id.
    pub pid: u32,
    /// Its release.
    pub version: String,
}

/// A monitor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorStatus {
    /// Its id.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// How many monitors there were, with it.
    pub generation: u64,
}

/// A session, as far as the keeper knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its name.
    pub id: String,
    /// The container's id, as the runtime gave it.
    pub container: String,
    /// The profile's `listenerMetadata`.
    pub metadata: Option<String>,
    /// The container's first process, as the runtime gave it.
    pub pid: Option<u32>,
    /// How many listeners it has.
    pub listeners: usize,
}
