//! How much of the keeper one front door may use. A door belongs to one user, so these are limits on users.

use std::time::Duration;

use crate::protocol::Door;

/// How much of a container's id and of its metadata is reported.
pub(crate) const LONGEST_NAME: usize = 256;
/// The longest message of a runtime, in bytes.
pub(crate) const LONGEST_STATE: usize = 1 << 20;
/// How long it may take from its first byte to its last. Before the first, a runtime may wait as long as it likes: crun connects
/// at `create` and speaks at `start`.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors on one connection: as many as one sendmsg(2) carries.
pub(crate) const MOST_DESCRIPTORS: usize = 253;
/// Connections to the control socket, which is root's.
pub(crate) const CLIENTS: usize = 256;
/// Connections of one door that may wait to be closed before it pauses.
pub(crate) const MOST_DISCARDED: usize = 16;

/// What is used, or may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// Connections that have not delivered yet.
    pub(crate) connections: usize,
    pub(crate) listeners: usize,
    /// All that stands in the keeper's table.
    pub(crate) descriptors: usize,
    /// States held or coming in.
    pub(crate) bytes: usize,
}

impl Use {
    /// What `door` may use of a table with room for `descriptors`, beside `users` doors of rootless users: those a quarter
    /// together, root the half.
    pub(crate) fn limit(door: Door, descriptors: usize, users: usize) -> Self {
        match door {
            Door::Root => {
                Self { connections: 1024, listeners: 8192, descriptors: descriptors / 2, bytes: 256 << 20 }
            }
            Door::User(_) => Self {
                connections: 64,
                listeners: 256,
                descriptors: descriptors / (4 * users.max(2)),
                bytes: 16 << 20,
            },
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.connections += other.connections;
        self.listeners += other.listeners;
        self.descriptors += other.descriptors;
        self.bytes += other.bytes;
    }

    /// The first of its limits that this exceeds.
    pub(crate) fn exceeds(&self, limit: &Self) -> Option<Exceeded> {
        let all = [
            ("connections", self.connections, limit.connections),
            ("listeners", self.listeners, limit.listeners),
            ("descriptors", self.descriptors, limit.descriptors),
            ("bytes of states", self.bytes, limit.bytes),
        ];
        all.into_iter().find(|(_, used, limit)| used > limit).map(|(what, _, limit)| Exceeded { what, limit })
    }
}

/// A limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this user has all of its {limit} {what}")]
pub(crate) struct Exceeded {
    what: &'static str,
    limit: usize,
}
