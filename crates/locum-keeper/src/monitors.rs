//! The clients of the control socket: what they said and what they have yet to be told.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;

use locum_kernel::Errno;
use locum_kernel::socket::{self, Peer};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::frame::{self, Inbox, Progress};
use crate::protocol::{FromKeeper, ListenerId, Overlap};
use crate::registry::Registry;
use crate::snapshot::{
    ClientSnapshot, Inherited, MonitorSnapshot, Named, SendingSnapshot, Snapshot, SnapshotError,
};

pub(crate) type ClientId = u64;
pub(crate) type MonitorId = u64;

/// What a client is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Standing {
    /// It has not said yet.
    Unknown,
    /// It asks and is answered.
    Observer,
    /// It asked, and wants to hear when there is a monitor.
    Waiting,
    /// It wants to hear what became of the upgrade that it asked for.
    Upgrading,
    Monitor(MonitorId),
    /// It gets what is queued, and then is let go.
    Leaving,
}

/// What a client is to be told. Leases are looked up when their turn comes, so that a queue holds no descriptor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Item {
    Message(FromKeeper),
    Lease(ListenerId),
}

#[derive(Debug)]
struct Sending {
    bytes: Vec<u8>,
    descriptors: Vec<Rc<OwnedFd>>,
    progress: Progress,
}

/// A connection to the control socket.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) socket: OwnedFd,
    pub(crate) peer: Peer,
    pub(crate) inbox: Inbox,
    pub(crate) standing: Standing,
    queue: VecDeque<Item>,
    sending: Option<Sending>,
}

/// How far a queue got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    All,
    /// The socket takes no more for now.
    Part,
    /// The kernel has too many descriptors of ours on the way; nothing tells when they have arrived.
    TooMany,
}

impl Client {
    pub(crate) fn new(socket: OwnedFd, peer: Peer) -> Self {
        let (queue, standing) = (VecDeque::new(), Standing::Unknown);
        Self { socket, peer, inbox: Inbox::default(), standing, queue, sending: None }
    }

    /// For a keeper that goes on.
    fn snapshot<'a>(&'a self, id: ClientId, named: &mut Named<'a>) -> ClientSnapshot {
        let sending = self.sending.as_ref().map(|sending| SendingSnapshot {
            bytes: sending.bytes.clone(),
            descriptors: sending.descriptors.iter().map(|fd| named.name(fd)).collect(),
            progress: sending.progress,
        });
        ClientSnapshot {
            id,
            socket: named.name(&self.socket),
            bytes: self.inbox.bytes.clone(),
            descriptors: self.inbox.descriptors.iter().map(|fd| named.name(fd)).collect(),
            standing: self.standing,
            queue: self.queue.iter().cloned().collect(),
            sending,
        }
    }

    fn resume(snapshot: ClientSnapshot, from: &mut Inherited) -> Result<Self, SnapshotError> {
        let socket = from.take(snapshot.socket, "a client's connection")?;
        let peer =
            socket::peer(&socket).map_err(|error| SnapshotError::Own("ask who a client is", error.into()))?;
        let mut client = Self::new(socket, peer);
        client.inbox.bytes = snapshot.bytes;
        for fd in snapshot.descriptors {
            client.inbox.descriptors.push_back(from.take(fd, "what a client sent")?);
        }
        client.standing = snapshot.standing;
        client.queue = snapshot.queue.into();
        if let Some(SendingSnapshot { bytes, descriptors, progress }) = snapshot.sending {
            let descriptors = descriptors
                .into_iter()
                .map(|fd| from.share(fd, "what a client is sent"))
                .collect::<Result<_, _>>()?;
            client.sending = Some(Sending { bytes, descriptors, progress });
        }
        Ok(client)
    }

    pub(crate) fn tell(&mut self, message: FromKeeper) {
        self.queue.push_back(Item::Message(message));
    }

    pub(crate) fn lease(&mut self, listener: ListenerId) {
        self.queue.push_back(Item::Lease(listener));
    }

    pub(crate) fn has_to_send(&self) -> bool {
        self.sending.is_some() || !self.queue.is_empty()
    }

    /// Sends what the socket takes.
    pub(crate) fn flush(&mut self, registry: &Registry) -> Result<Sent, Errno> {
        loop {
            if self.sending.is_none() {
                let Some(item) = self.queue.pop_front() else { return Ok(Sent::All) };
                // A listener that has ended meanwhile needs no lease.
                let Some(sending) = Sending::new(item, registry) else { continue };
                self.sending = Some(sending);
            }
            let Some(sending) = &mut self.sending else { return Ok(Sent::All) };
            let descriptors: Vec<_> = sending.descriptors.iter().map(|fd| fd.as_fd()).collect();
            match frame::send(&self.socket, &sending.bytes, &descriptors, &mut sending.progress) {
                Ok(true) => self.sending = None,
                Ok(false) => return Ok(Sent::Part),
                Err(Errno::TOOMANYREFS) => return Ok(Sent::TooMany),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Sending {
    fn new(item: Item, registry: &Registry) -> Option<Self> {
        let (message, descriptors) = match item {
            Item::Message(message) => (message, Vec::new()),
            Item::Lease(listener) => {
                let held = registry.listeners.get(&listener)?;
                let message = FromKeeper::Lease {
                    delivery: held.delivery.clone(),
                    slots: held.parks.keys().copied().collect(),
                };
                let parks = held.parks.values().flatten();
                (message, [&held.listener].into_iter().chain(parks).cloned().collect())
            }
        };
        let bytes = frame::encode(&message, descriptors.len());
        Some(Self { bytes, descriptors, progress: Progress::default() })
    }
}

/// A monitor process. It stays one while it has no connection: as long as it lives, it may be at its calls.
#[derive(Debug)]
pub(crate) struct Monitor {
    pub(crate) client: Option<ClientId>,
    /// `None`: it cannot be seen from here, and its connection has to stand for it.
    pub(crate) process: Option<OwnedFd>,
    pub(crate) pid: u32,
    pub(crate) version: String,
    pub(crate) generation: u64,
    pub(crate) overlap: Overlap,
    /// When it started, in nanoseconds since boot.
    pub(crate) started: u64,
}

impl Monitor {
    /// One of a keeper before, which has no connection yet.
    pub(crate) fn lost(process: OwnedFd, pid: u32, generation: u64) -> Self {
        // Until it says how it stands to others.
        let (version, overlap, started) = ("unknown".to_owned(), Overlap::Able, 0);
        Self { client: None, process: Some(process), pid, version, generation, overlap, started }
    }

    /// Whether the process has ended, every thread of it.
    pub(crate) fn is_dead(&self) -> bool {
        let Some(process) = &self.process else { return self.client.is_none() };
        let mut poll = [PollFd::new(process, PollFlags::IN)];
        rustix::event::poll(&mut poll, Some(&Timespec::default())) != Ok(0)
    }
}

/// The process at the other end of `client`, if it can be had.
pub(crate) fn process_of(client: &Client) -> Option<OwnedFd> {
    match socket::peer_process(&client.socket) {
        Ok(process) => Some(process),
        // Before 6.5. It lives: it has just spoken.
        Err(Errno::NOPROTOOPT) => {
            let pid = Pid::from_raw(client.peer.pid.cast_signed())?;
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
        }
        Err(_) => None,
    }
}

/// All clients and monitors.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    pub(crate) all: BTreeMap<ClientId, Client>,
    pub(crate) monitors: BTreeMap<MonitorId, Monitor>,
    /// The highest generation seen.
    pub(crate) generation: u64,
    pub(crate) next: MonitorId,
}

impl Clients {
    /// Takes the client `id` as a monitor: one that is known already, by an older connection, or a new one. A process is one
    /// monitor; its newest connection is told.
    pub(crate) fn welcome(
        &mut self,
        id: ClientId,
        pid: u32,
        version: String,
        generation: Option<u64>,
        (overlap, started): (Overlap, u64),
    ) -> Option<(MonitorId, u64)> {
        let client = self.all.get_mut(&id)?;
        let process = process_of(client);
        let pid = if client.peer.pid == 0 { pid } else { client.peer.pid };
        let is_same =
            |monitor: &Monitor| monitor.pid == pid && monitor.process.is_some() && !monitor.is_dead();
        let known = self.monitors.iter().find(|(_, monitor)| is_same(monitor));
        let monitor = known.map_or_else(|| self.next + 1, |(id, _)| *id);
        self.next = self.next.max(monitor);
        self.generation = self.generation.max(generation.unwrap_or(self.generation + 1));
        let generation = generation.unwrap_or(self.generation);
        client.standing = Standing::Monitor(monitor);
        let client = Some(id);
        let known = Monitor { client, process, pid, version, generation, overlap, started };
        self.monitors.insert(monitor, known);
        Some((monitor, generation))
    }

    /// Takes a monitor of a keeper before.
    pub(crate) fn take_back(&mut self, id: MonitorId, monitor: Monitor) {
        self.generation = self.generation.max(monitor.generation);
        self.next = self.next.max(id);
        self.monitors.insert(id, monitor);
    }

    /// All of them, for a keeper that goes on.
    pub(crate) fn snapshot<'a>(
        &'a self,
        named: &mut Named<'a>,
    ) -> (Vec<ClientSnapshot>, Vec<MonitorSnapshot>) {
        let clients = self.all.iter().map(|(id, client)| client.snapshot(*id, named)).collect();
        let monitor = |(id, monitor): (&MonitorId, &'a Monitor)| MonitorSnapshot {
            id: *id,
            client: monitor.client,
            process: monitor.process.as_ref().map(|process| named.name(process)),
            pid: monitor.pid,
            version: monitor.version.clone(),
            generation: monitor.generation,
            overlap: monitor.overlap,
            started: monitor.started,
        };
        (clients, self.monitors.iter().map(monitor).collect())
    }

    /// Goes on from `snapshot`, and takes its part of it.
    pub(crate) fn resume(snapshot: &mut Snapshot, from: &mut Inherited) -> Result<Self, SnapshotError> {
        let mut clients =
            Self { generation: snapshot.generation, next: snapshot.latest_monitor, ..Self::default() };
        for client in snapshot.clients.drain(..) {
            clients.all.insert(client.id, Client::resume(client, from)?);
        }
        for monitor in snapshot.monitors.drain(..) {
            let MonitorSnapshot { id, client, process, pid, version, generation, overlap, started } = monitor;
            let process = process.map(|process| from.take(process, "a monitor's process")).transpose()?;
            let known = Monitor { client, process, pid, version, generation, overlap, started };
            clients.monitors.insert(id, known);
        }
        Ok(clients)
    }

    /// The monitors that started after `monitor`, to relieve others.
    pub(crate) fn younger(&self, monitor: MonitorId) -> Vec<MonitorId> {
        let started = self.monitors.get(&monitor).map(|known| known.started);
        let is_younger = |(_, other): &(&MonitorId, &Monitor)| {
            other.overlap == Overlap::Relieves && Some(other.started) > started
        };
        self.monitors.iter().filter(is_younger).map(|(id, _)| *id).collect()
    }

    /// The connection to `monitor`, if there is one.
    pub(crate) fn of(&mut self, monitor: MonitorId) -> Option<&mut Client> {
        let client = self.monitors.get(&monitor)?.client?;
        self.all.get_mut(&client)
    }
}
