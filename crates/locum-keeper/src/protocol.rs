//! What keeper and monitor say to each other. See `docs/protocol.md`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The version of the control protocol. A peer that speaks a newer one is refused; older ones will be spoken as long as there
/// are any.
pub const PROTOCOL: u32 = 1;

/// Names a session, for ever. Fit to be a file's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(String);

impl SessionId {
    /// A new one for `container`, told from others by `random`.
    pub(crate) fn new(container: &str, random: u32) -> Self {
        let safe = |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
        let name: String = container.chars().take(64).map(safe).collect();
        Self(format!("{name}-{random:08x}"))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a listener, for ever and whatever keeper holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ListenerId(pub u64);

impl fmt::Display for ListenerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A front door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Door {
    /// `oci.sock`.
    Root,
    /// `oci-UID.sock`, that of a rootless user.
    User(u32),
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("oci.sock"),
            Self::User(uid) => write!(f, "oci-{uid}.sock"),
        }
    }
}

/// Who delivered a listener, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The effective user id.
    pub uid: u32,
    /// The effective group id.
    pub gid: u32,
    /// The process; 0 if it is in a pid namespace that the keeper does not see.
    pub pid: u32,
}

impl From<locum_kernel::socket::Peer> for Peer {
    fn from(peer: locum_kernel::socket::Peer) -> Self {
        Self { uid: peer.uid, gid: peer.gid, pid: peer.pid }
    }
}

/// All that is known of a listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivery {
    /// The session that it belongs to.
    pub session: SessionId,
    /// Its own name.
    pub listener: ListenerId,
    /// Where it came in.
    pub door: Door,
    /// Who brought it.
    pub peer: Peer,
    /// The runtime's message, as received.
    pub state: String,
    /// The how manieth of its keeper.
    pub sequence: u64,
}

/// What a client of the keeper says. The first must be a hello.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToKeeper {
    Hello {
        protocol: u32,
        role: Role,
        pid: u32,
        version: String,
        generation: Option<u64>,
        #[serde(default)]
        overlap: Overlap,
        /// When it started, in nanoseconds since boot.
        #[serde(default)]
        started: u64,
    },
    /// I serve all that I was told of: whoever else does is to leave.
    Relieve {},
    /// With two descriptors.
    Park { listener: ListenerId, slot: u32 },
    /// With the listener, and two descriptors for each slot.
    Fill { delivery: Delivery, slots: Vec<u32> },
    /// Answered when there is a monitor, if that is what to wait for.
    Status { when_monitored: bool },
    /// With the program, to go on in: answered when it does, or does not.
    Upgrade {},
}

/// What a hello of any version holds.
#[derive(Deserialize)]
pub(crate) struct AnyHello {
    pub(crate) hello: AnyProtocol,
}

#[derive(Deserialize)]
pub(crate) struct AnyProtocol {
    pub(crate) protocol: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Monitor,
    Observer,
}

/// How a monitor stands to others that serve the same sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// It is of a release that can share none.
    #[default]
    Unable,
    /// It can, and can be relieved.
    Able,
    /// It came to relieve all others.
    Relieves,
    /// It was relieved, and finishes what it has.
    Relieved,
}

/// What the keeper says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FromKeeper {
    Hello {
        protocol: u32,
        pid: u32,
        version: String,
        generation: u64,
        /// How the monitor stands to others, whatever it said; unable, if the keeper is.
        #[serde(default)]
        overlap: Overlap,
    },
    /// Another serves all that you do: finish what you have, and leave. A lease after it says: stay.
    Relieved {},
    /// Everything is yours now.
    Relieving {},
    Refused {
        why: String,
    },
    /// With the listener, and two descriptors for each slot.
    Lease {
        delivery: Delivery,
        slots: Vec<u32>,
    },
    Ended {
        listener: ListenerId,
    },
    Status(Report),
    Upgraded {
        version: String,
    },
    NotUpgraded {
        why: String,
    },
}

/// What the keeper knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Itself.
    pub keeper: KeeperReport,
    /// The monitor whose turn it is.
    pub monitor: Option<MonitorReport>,
    /// Everyone who is served, or would be.
    pub sessions: Vec<SessionReport>,
}

/// The keeper itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperReport {
    /// Its process.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// Deliveries and parks that a limit turned away.
    pub turned_away: u64,
}

/// A monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorReport {
    /// Its process.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// The how manieth monitor it is.
    pub generation: u64,
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its name.
    pub id: SessionId,
    /// What the runtime calls the container.
    pub container: String,
    /// The profile's `listenerMetadata`.
    pub metadata: Option<String>,
    /// The container's first process, in the runtime's words; 0 if it did not say.
    pub pid: u32,
    /// How many listeners it has.
    pub listeners: usize,
}

/// Whether all that `old` says stands in `new` too.
#[cfg(test)]
pub(crate) fn is_within(old: &serde_json::Value, new: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            old.iter().all(|(name, old)| new.get(name).is_some_and(|new| is_within(old, new)))
        }
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| is_within(old, new))
        }
        _ => old == new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a release said, as it was: this one understands it, and says as much.
    #[test]
    fn messages_of_0_1_0_are_understood_and_answered_in_kind() {
        #[derive(Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Either {
            ToKeeper(ToKeeper),
            FromKeeper(FromKeeper),
        }
        for line in include_str!("frozen/0.1.0.jsonl").lines() {
            let read: Either = serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            let again = serde_json::to_value(read).unwrap();
            assert!(is_within(&serde_json::from_str(line).unwrap(), &again), "{line}\n{again}");
        }
    }

    #[test]
    fn a_session_id_is_a_file_name() {
        assert_eq!(SessionId::new("c1", 0xab).to_string(), "c1-000000ab");
        assert_eq!(SessionId::new("../..", 1).to_string(), "_____-00000001");
        assert_eq!(SessionId::new("\u{e4}/\0", 1).to_string(), "___-00000001");
        assert_eq!(SessionId::new(&"x".repeat(1000), 1).to_string().len(), 64 + 9);
    }
}
