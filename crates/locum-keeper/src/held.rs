//! What the keeper holds: sessions, their listeners, and the files parked for them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use locum_kernel::notify::Listener;
use locum_policy::State;

use crate::protocol::{Door, Label, ListenerId, Peer, SessionId, SessionStatus};

/// The most listeners of one session: one more comes with each `exec`.
const MOST_IN_SESSION: usize = 128;
/// The most listeners that came in at one rootless user's door.
const MOST_OF_USER: usize = 1024;

/// One listener.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) label: Label,
    pub(crate) listener: Listener,
    /// The runtime's state, in a memfd.
    pub(crate) state: OwnedFd,
    /// Both ends of each park, by slot.
    pub(crate) parks: BTreeMap<u32, (OwnedFd, OwnedFd)>,
    key: Key,
    pid: Option<u32>,
}

/// What makes two deliveries one session: an `exec` says the same as the container did.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    door: Door,
    uid: u32,
    container: String,
    metadata: Option<String>,
}

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) held: Vec<Held>,
}

impl Store {
    /// Which session a delivery belongs to: with status `running`, the latest with the same key, if it lives; else a new one.
    pub(crate) fn session_for(&self, door: Door, peer: Peer, state: &State, random: u32) -> SessionId {
        let key = key(door, peer, state);
        let known = self.held.iter().rev().find(|held| held.key == key);
        match known {
            Some(held) if state.status == "running" => held.label.session.clone(),
            _ => {
                let fits = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
                let name: String = state.container.chars().filter(fits).take(64).collect();
                SessionId(format!("{name}-{random:08x}"))
            }
        }
    }

    /// Why one more listener of `session` is too many, if it is.
    pub(crate) fn refuses(&self, door: Door, session: &SessionId) -> Option<String> {
        let count = |belongs: &dyn Fn(&Held) -> bool| self.held.iter().filter(|held| belongs(held)).count();
        if count(&|held| held.label.session == *session) >= MOST_IN_SESSION {
            return Some(format!("session {session} has {MOST_IN_SESSION} listeners already"));
        }
        let is_user = matches!(door, Door::User(_));
        (is_user && count(&|held| held.label.door == door) >= MOST_OF_USER)
            .then(|| format!("this user's workloads have {MOST_OF_USER} listeners already"))
    }

    pub(crate) fn add(&mut self, label: Label, listener: Listener, state: OwnedFd, parsed: &State) -> &Held {
        let key = key(label.door, label.peer, parsed);
        let pid = parsed.first_process();
        self.held.push(Held { label, listener, state, parks: BTreeMap::new(), key, pid });
        &self.held[self.held.len() - 1]
    }

    pub(crate) fn find(&mut self, listener: ListenerId) -> Option<&mut Held> {
        self.held.iter_mut().find(|held| held.label.listener == listener)
    }

    pub(crate) fn of_session<'a>(&'a self, session: &'a SessionId) -> impl Iterator<Item = &'a Held> {
        self.held.iter().filter(move |held| held.label.session == *session)
    }

    /// Lets go of `listener`. Returns its session, and whether it was the last.
    pub(crate) fn remove(&mut self, listener: ListenerId) -> Option<(SessionId, bool)> {
        let index = self.held.iter().position(|held| held.label.listener == listener)?;
        let session = self.held.remove(index).label.session;
        let is_last = self.of_session(&session).next().is_none();
        Some((session, is_last))
    }

    pub(crate) fn sessions(&self) -> Vec<SessionStatus> {
        let mut sessions: Vec<SessionStatus> = Vec::new();
        for held in &self.held {
            let id = held.label.session.to_string();
            match sessions.iter_mut().find(|session| session.id == id) {
                Some(session) => session.listeners += 1,
                None => sessions.push(SessionStatus {
                    id,
                    container: held.key.container.clone(),
                    metadata: held.key.metadata.clone(),
                    pid: held.pid,
                    listeners: 1,
                }),
            }
        }
        sessions
    }
}

fn key(door: Door, peer: Peer, state: &State) -> Key {
    Key { door, uid: peer.uid, container: state.container.clone(), metadata: state.metadata.clone() }
}
