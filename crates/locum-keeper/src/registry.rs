//! The listeners that are held, and the sessions that they belong to.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use locum_kernel::Errno;
use locum_kernel::notify::Listener;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use crate::limits::{LONGEST_NAME, Use};
use crate::protocol::{Delivery, Door, ListenerId, Peer, SessionId, SessionReport};
use crate::snapshot::{HeldSnapshot, Inherited, Named, Snapshot, SnapshotError};
use crate::state::State;

/// What makes two deliveries one session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    door: Door,
    uid: u32,
    container: String,
    metadata: Option<String>,
}

impl Key {
    fn of(door: Door, peer: Peer, state: &State) -> Self {
        Self { door, uid: peer.uid, container: state.container.id.clone(), metadata: state.metadata.clone() }
    }
}

/// A session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Session {
    key: Key,
    pid: u32,
    /// Of its first delivery.
    sequence: u64,
    listeners: Vec<ListenerId>,
}

/// Both ends of a park.
type Ends = [Rc<OwnedFd>; 2];

/// A listener.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) delivery: Delivery,
    pub(crate) listener: Rc<OwnedFd>,
    pub(crate) parks: BTreeMap<u32, Ends>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    pub(crate) listeners: BTreeMap<ListenerId, Held>,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    pub(crate) sequence: u64,
}

impl Registry {
    /// Takes what a runtime brought, as a session's first listener or one more.
    pub(crate) fn admit(
        &mut self,
        door: Door,
        peer: Peer,
        state: &State,
        text: &str,
        listeners: Vec<Listener>,
    ) -> Result<(SessionId, Vec<ListenerId>), Errno> {
        let session = self.session_for(Key::of(door, peer, state), state)?;
        let mut admitted = Vec::new();
        for listener in listeners {
            let (id, sequence) = (ListenerId(random()?), self.next_sequence());
            let delivery = Delivery {
                session: session.clone(),
                listener: id,
                door,
                peer,
                state: text.to_owned(),
                sequence,
            };
            let listener = Rc::new(OwnedFd::from(listener));
            self.listeners.insert(id, Held { delivery, listener, parks: BTreeMap::new() });
            admitted.push(id);
            if let Some(session) = self.sessions.get_mut(&session) {
                session.listeners.push(id);
            }
        }
        Ok((session, admitted))
    }

    fn session_for(&mut self, key: Key, state: &State) -> Result<SessionId, Errno> {
        let same = self.sessions.iter().filter(|(_, session)| session.key == key);
        let newest = same.max_by_key(|(_, session)| session.sequence).map(|(id, _)| id.clone());
        if let (Some(known), false) = (newest, state.is_start()) {
            return Ok(known);
        }
        #[expect(clippy::cast_possible_truncation, reason = "half of it is random enough")]
        let id = SessionId::new(&key.container, random()? as u32);
        self.sessions.insert(
            id.clone(),
            Session { key, pid: state.pid(), sequence: self.sequence, listeners: Vec::new() },
        );
        Ok(id)
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Takes what a monitor serves that is not known here.
    pub(crate) fn fill(&mut self, delivery: Delivery, state: &State, listener: OwnedFd) {
        self.sequence = self.sequence.max(delivery.sequence);
        let new = || Session {
            key: Key::of(delivery.door, delivery.peer, state),
            pid: state.pid(),
            sequence: delivery.sequence,
            listeners: Vec::new(),
        };
        let session = self.sessions.entry(delivery.session.clone()).or_insert_with(new);
        if state.is_start() {
            // The first process is the one that came with the start, in whatever order they are handed over.
            (session.pid, session.sequence) = (state.pid(), delivery.sequence);
        }
        session.listeners.push(delivery.listener);
        let held = Held { listener: Rc::new(listener), parks: BTreeMap::new(), delivery };
        self.listeners.insert(held.delivery.listener, held);
    }

    /// Keeps both ends of the park of (`listener`, `slot`). False: there is no such listener.
    pub(crate) fn park(&mut self, listener: ListenerId, slot: u32, ends: [OwnedFd; 2]) -> bool {
        let Some(held) = self.listeners.get_mut(&listener) else { return false };
        held.parks.insert(slot, ends.map(Rc::new));
        true
    }

    /// Lets go of a listener. Returns its session, and whether that is over.
    pub(crate) fn end(&mut self, listener: ListenerId) -> Option<(SessionId, bool)> {
        let id = self.listeners.remove(&listener)?.delivery.session;
        let session = self.sessions.get_mut(&id)?;
        session.listeners.retain(|other| *other != listener);
        let is_over = session.listeners.is_empty();
        if is_over {
            self.sessions.remove(&id);
        }
        Some((id, is_over))
    }

    /// The listeners of a session.
    pub(crate) fn of(&self, session: &SessionId) -> &[ListenerId] {
        self.sessions.get(session).map_or(&[], |session| &session.listeners)
    }

    /// What is held for `door`.
    pub(crate) fn used(&self, door: Door) -> Use {
        let mut used = Use::default();
        for held in self.listeners.values().filter(|held| held.delivery.door == door) {
            let (descriptors, bytes) = (1 + 2 * held.parks.len(), held.delivery.state.len());
            used.add(Use { connections: 0, listeners: 1, descriptors, bytes });
        }
        used
    }

    /// The listeners, for a keeper that goes on.
    pub(crate) fn snapshot<'a>(&'a self, named: &mut Named<'a>) -> Vec<HeldSnapshot> {
        let held = |held: &'a Held| HeldSnapshot {
            delivery: held.delivery.clone(),
            listener: named.name(&held.listener),
            parks: held
                .parks
                .iter()
                .map(|(slot, ends)| (*slot, ends.each_ref().map(|end| named.name(end))))
                .collect(),
        };
        self.listeners.values().map(held).collect()
    }

    /// Goes on from `snapshot`, and takes its part of it.
    pub(crate) fn resume(snapshot: &mut Snapshot, from: &mut Inherited) -> Result<Self, SnapshotError> {
        let (sessions, sequence) = (std::mem::take(&mut snapshot.sessions), snapshot.sequence);
        let mut listeners = BTreeMap::new();
        for HeldSnapshot { delivery, listener, parks } in snapshot.listeners.drain(..) {
            let is_known = |session: &Session| session.listeners.contains(&delivery.listener);
            if !sessions.get(&delivery.session).is_some_and(is_known) {
                return Err(SnapshotError::Torn("a listener of no session"));
            }
            let listener = from.share_listener(listener)?;
            let mut held = Held { delivery, listener, parks: BTreeMap::new() };
            for (slot, [near, far]) in parks {
                held.parks.insert(slot, [from.share(near, "a park")?, from.share(far, "a park")?]);
            }
            listeners.insert(held.delivery.listener, held);
        }
        Ok(Self { listeners, sessions, sequence })
    }

    pub(crate) fn report(&self) -> Vec<SessionReport> {
        // A stranger chose these, and a report has to fit into one message.
        let short = |text: &String| text.chars().take(LONGEST_NAME).collect();
        let report = |(id, session): (&SessionId, &Session)| SessionReport {
            id: id.clone(),
            container: short(&session.key.container),
            metadata: session.key.metadata.as_ref().map(short),
            pid: session.pid,
            listeners: session.listeners.len(),
        };
        self.sessions.iter().map(report).collect()
    }
}

fn random() -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    // As few as these always come at once.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_ne_bytes(bytes))
}
