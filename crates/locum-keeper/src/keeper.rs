//! The keeper's loop: one thread that never blocks and takes one thing from each who has something, in turn.

mod control;
mod upgrade;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_kernel::{Errno, confine, socket};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::net::SocketFlags;
use sd_notify::NotifyState;

use crate::arrival::{Arrival, Refused};
use crate::discard::Discarder;
use crate::lease::Leases;
use crate::limits::{self, Use};
use crate::monitors::{Client, ClientId, Clients, Monitor, MonitorId, Sent, Standing};
use crate::protocol::{Door, FromKeeper, ListenerId, Peer, SessionId};
use crate::registry::Registry;
use crate::snapshot::SnapshotError;
use crate::sockets::{self, Sockets};
use crate::store::Store;
use crate::systemd::{self, Heartbeat};
use upgrade::Upgrade;
pub use upgrade::{rehearse, resume};

/// Whom the keeper becomes, user and group. Not nobody: whatever runs as the same user could signal the keeper, and
/// nobody is whom many things run as. Nothing else should use this number.
const KEEPER_ID: u32 = 64998;

/// Why a keeper cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A privilege could not be given up.
    #[error("cannot give up privileges: {0}")]
    Confine(Errno),
    /// Whoever wanted it is gone.
    #[error("the process that started the keeper is gone")]
    Orphaned,
    /// What the keeper before left cannot be gone on from.
    #[error("cannot go on from the keeper before: {0}")]
    Snapshot(#[from] SnapshotError),
    /// The kernel's word on something of our own.
    #[error("cannot {0}: {1}")]
    Own(&'static str, std::io::Error),
}

/// Keeps, until `stop` can be read. With `starter`, it dies with that process, its parent.
pub fn run(sockets: Sockets, stop: impl AsFd, starter: Option<u32>) -> Result<(), KeeperError> {
    let owner = rustix::process::geteuid().as_raw();
    confine::raise_descriptor_limit();
    if owner == 0 {
        confine::drop_everything(KEEPER_ID, KEEPER_ID, &[]).map_err(KeeperError::Confine)?;
    }
    confine::forbid_tracing().map_err(KeeperError::Confine)?;
    if let Some(starter) = starter {
        let lives = confine::die_with_parent(starter).map_err(KeeperError::Confine)?;
        lives.then_some(()).ok_or(KeeperError::Orphaned)?;
    }
    let mut keeper = Keeper::new(sockets, owner)?;
    let stored = std::mem::take(&mut keeper.sockets.stored);
    if let Some(store) = &mut keeper.store {
        store.take_back(stored, &mut keeper.registry, &mut keeper.leases, &mut keeper.clients);
    }
    let (doors, sessions) = (keeper.doors.len(), keeper.registry.sessions.len());
    tracing::info!(doors, sessions, "the keeper is ready");
    systemd::tell(NotifyState::Ready);
    keeper.keep(stop.as_fd())
}

fn is_readable(fd: impl AsFd) -> bool {
    let mut poll = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    rustix::event::poll(&mut poll, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// A door as it is served.
struct FrontDoor {
    door: Door,
    /// The only user who may come.
    owner: u32,
    limit: Use,
    discarder: Discarder,
    complaints: Complaints,
    was_full: bool,
}

/// Who has something.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Stop,
    Wake,
    Rehearsal,
    Door(usize),
    Control,
    Arrival(u64),
    Client(ClientId),
    Process(MonitorId),
    Listener(ListenerId),
}

struct Keeper {
    sockets: Sockets,
    doors: Vec<FrontDoor>,
    wake: Arc<OwnedFd>,
    /// Who may use the control socket, beside root.
    owner: u32,
    arrivals: BTreeMap<u64, Arrival>,
    clients: Clients,
    registry: Registry,
    leases: Leases<MonitorId, SessionId>,
    next: u64,
    turned_away: u64,
    no_accept_before: Option<Instant>,
    no_send_before: Option<Instant>,
    heartbeat: Heartbeat,
    upgrade: Option<Upgrade>,
    /// `None`: no service manager keeps descriptors for us.
    store: Option<Store>,
}

impl Keeper {
    /// One that has nothing yet but its sockets.
    fn new(sockets: Sockets, owner: u32) -> Result<Self, KeeperError> {
        let own = |what| move |error: Errno| KeeperError::Own(what, error.into());
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(own("make an eventfd"))?);
        let users = sockets.doors.len().saturating_sub(1);
        let table = usize::try_from(confine::descriptor_limit().unwrap_or(1 << 20)).unwrap_or(usize::MAX);
        sockets::unblock(sockets.control.as_fd()).map_err(own("prepare the control socket"))?;
        let mut doors = Vec::new();
        for (door, socket) in &sockets.doors {
            sockets::unblock(socket.as_fd()).map_err(own("prepare a door"))?;
            let discarder = Discarder::start(Arc::clone(&wake));
            let discarder = discarder.map_err(|error| KeeperError::Own("start a thread", error))?;
            let limit = Use::limit(*door, table, users);
            let owner = if let Door::User(uid) = door { *uid } else { owner };
            let (door, complaints) = (*door, Complaints::new());
            doors.push(FrontDoor { door, owner, limit, discarder, complaints, was_full: false });
        }
        Ok(Self {
            sockets,
            doors,
            wake,
            owner,
            arrivals: BTreeMap::new(),
            clients: Clients::default(),
            registry: Registry::default(),
            leases: Leases::default(),
            next: 0,
            turned_away: 0,
            no_accept_before: None,
            no_send_before: None,
            heartbeat: Heartbeat::start(),
            upgrade: None,
            store: Store::start(),
        })
    }

    /// Keeps, until `stop` can be read.
    fn keep(&mut self, stop: BorrowedFd<'_>) -> Result<(), KeeperError> {
        loop {
            match self.wait(stop) {
                Ok(ready) if ready.contains(&Source::Stop) => return Ok(()),
                Ok(ready) => ready.into_iter().for_each(|source| self.serve(source)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(KeeperError::Own("wait", error.into())),
            }
            self.refuse_slow();
            if let Some(store) = &mut self.store {
                store.update(&self.registry, &self.leases, &self.clients);
            }
            self.go_on_upgrading(stop);
            self.flush();
            self.heartbeat.beat();
        }
    }

    /// Waits until someone has something.
    fn wait(&mut self, stop: impl AsFd) -> Result<Vec<Source>, Errno> {
        let now = Instant::now();
        for pause in [&mut self.no_accept_before, &mut self.no_send_before] {
            pause.take_if(|until| *until <= now);
        }
        let mut sources = vec![Source::Stop, Source::Wake];
        let mut polls = vec![
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
        ];
        let mut add = |source, fd, events| {
            sources.push(source);
            polls.push(PollFd::from_borrowed_fd(fd, events));
        };
        let upgrade = self.upgrade.as_ref();
        if let Some(process) = upgrade.and_then(Upgrade::process) {
            add(Source::Rehearsal, process, PollFlags::IN);
        }
        let upgrade_due = upgrade.map(|upgrade| upgrade.until);
        let store_due = self.store.as_ref().and_then(|store| store.not_before);
        let pauses =
            [self.no_accept_before, self.no_send_before, self.heartbeat.due(), upgrade_due, store_due];
        let mut until = pauses.into_iter().flatten().min();
        if self.no_accept_before.is_none() {
            for (index, (_, socket)) in self.sockets.doors.iter().enumerate() {
                if self.is_open(index) {
                    add(Source::Door(index), socket.as_fd(), PollFlags::IN);
                }
            }
            add(Source::Control, self.sockets.control.as_fd(), PollFlags::IN);
        }
        for (id, arrival) in &self.arrivals {
            if self.is_open(arrival.door) {
                add(Source::Arrival(*id), arrival.socket.as_fd(), PollFlags::IN);
            }
            until = until.into_iter().chain(arrival.deadline).min();
        }
        for (id, client) in &self.clients.all {
            let sends = client.has_to_send() && self.no_send_before.is_none();
            let events = if sends { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            add(Source::Client(*id), client.socket.as_fd(), events);
        }
        for (id, monitor) in &self.clients.monitors {
            if let (None, Some(process)) = (monitor.client, &monitor.process) {
                add(Source::Process(*id), process.as_fd(), PollFlags::IN);
            }
        }
        for (id, held) in &self.registry.listeners {
            // Calls are none of our business; an end is told unasked.
            add(Source::Listener(*id), held.listener.as_fd(), PollFlags::empty());
        }
        let left = until.map(|until| until.saturating_duration_since(now) + Duration::from_millis(1));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        rustix::event::poll(&mut polls, left.as_ref())?;
        let ready = sources.into_iter().zip(&polls).filter(|(source, poll)| match source {
            // POLLERR may come of a signal, and ends nothing.
            Source::Listener(_) => poll.revents().contains(PollFlags::HUP),
            _ => !poll.revents().is_empty(),
        });
        Ok(ready.map(|(source, _)| source).collect())
    }

    /// Whether what comes at the door `index` is taken in, and not left waiting.
    fn is_open(&self, index: usize) -> bool {
        let discarder = &self.doors[index].discarder;
        let pauses = self.upgrade.as_ref().is_some_and(Upgrade::wants_quiet) && !discarder.is_idle();
        !pauses && !discarder.is_full()
    }

    fn serve(&mut self, source: Source) {
        match source {
            // What becomes of a rehearsal is looked at in each round.
            Source::Stop | Source::Rehearsal => {}
            Source::Wake => {
                // What it counts does not matter.
                let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
                self.doors.iter_mut().for_each(|door| door.was_full &= door.discarder.is_full());
            }
            Source::Door(index) => self.accept_arrival(index),
            Source::Control => self.accept_client(),
            Source::Arrival(id) => self.read_arrival(id),
            Source::Client(id) => self.read_client(id),
            Source::Process(id) => self.depart(id),
            Source::Listener(id) => self.end(id),
        }
    }

    /// At a door, or at the control socket.
    fn accept(&mut self, door: Option<usize>) -> Option<(OwnedFd, socket::Peer)> {
        let socket = door.map_or(&self.sockets.control, |index| &self.sockets.doors[index].1);
        match rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(accepted) => socket::peer(&accepted).ok().map(|peer| (accepted, peer)),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                tracing::error!("no descriptors are left; nobody is let in for 100 ms");
                self.no_accept_before = Some(Instant::now() + Duration::from_millis(100));
                None
            }
            // Whoever it was is gone.
            Err(_) => None,
        }
    }

    fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn accept_arrival(&mut self, index: usize) {
        let Some((accepted, peer)) = self.accept(Some(index)) else { return };
        let door = &mut self.doors[index];
        let peer = Peer::from(peer);
        if peer.uid != door.owner {
            door.complaints.say(door.door, peer, &format!("only uid {} may come here", door.owner));
            return door.discard(vec![accepted]);
        }
        let arrival = Arrival::new(index, peer, accepted);
        let mut used = self.used(index);
        used.add(arrival.used());
        if let Some(exceeded) = used.exceeds(&self.doors[index].limit) {
            return self.refuse(arrival, &exceeded.into());
        }
        let id = self.next_id();
        self.arrivals.insert(id, arrival);
    }

    /// What the door's user uses.
    fn used(&self, index: usize) -> Use {
        let mut used = self.registry.used(self.doors[index].door);
        for arrival in self.arrivals.values().filter(|arrival| arrival.door == index) {
            used.add(arrival.used());
        }
        used
    }

    fn read_arrival(&mut self, id: u64) {
        let Some(mut arrival) = self.arrivals.remove(&id) else { return };
        let index = arrival.door;
        let mut foreign = Vec::new();
        let read = arrival.read(&mut foreign);
        if !foreign.is_empty() {
            self.doors[index].discard(foreign);
        }
        let brought = match read {
            Ok(Some(brought)) => brought,
            Ok(None) => {
                let mut used = self.used(index);
                used.add(arrival.used());
                if let Some(exceeded) = used.exceeds(&self.doors[index].limit) {
                    return self.refuse(arrival, &exceeded.into());
                }
                self.arrivals.insert(id, arrival);
                return;
            }
            Err(refused) => return self.refuse(arrival, &refused),
        };
        let (peer, door) = (arrival.peer, self.doors[index].door);
        let count = brought.listeners.len();
        let mut used = self.used(index);
        used.add(Use {
            connections: 0,
            listeners: count,
            descriptors: count,
            bytes: count * brought.text.len(),
        });
        if let Some(exceeded) = used.exceeds(&self.doors[index].limit) {
            return self.refuse(arrival, &exceeded.into());
        }
        if brought.has_more {
            let why = "more came behind the state on one connection and is refused";
            self.doors[index].complaints.say(door, peer, why);
        }
        self.doors[index].discard(vec![arrival.socket]);
        let admitted = self.registry.admit(door, peer, &brought.state, &brought.text, brought.listeners);
        let (session, admitted) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => return tracing::error!("no random number: {error}"),
        };
        tracing::info!(%session, listeners = admitted.len(), uid = peer.uid, pid = peer.pid, "delivered at {door}");
        for monitor in self.leases.open(&session) {
            if let Some(client) = self.clients.of(monitor) {
                for listener in &admitted {
                    client.lease(*listener);
                }
            }
        }
    }

    fn refuse(&mut self, arrival: Arrival, why: &Refused) {
        let door = &mut self.doors[arrival.door];
        match why {
            // What crun leaves behind when it fails early.
            Refused::Silent => tracing::debug!("nothing delivered at {}: {why}", door.door),
            _ => door.complaints.say(door.door, arrival.peer, &why.to_string()),
        }
        if matches!(why, Refused::Exceeded(_)) {
            self.turned_away += 1;
        }
        door.discard(vec![arrival.socket]);
    }

    fn refuse_slow(&mut self) {
        let now = Instant::now();
        let is_slow = |arrival: &Arrival| arrival.deadline.is_some_and(|deadline| deadline <= now);
        let slow: Vec<u64> =
            self.arrivals.iter().filter(|(_, arrival)| is_slow(arrival)).map(|(id, _)| *id).collect();
        for id in slow {
            if let Some(arrival) = self.arrivals.remove(&id) {
                self.refuse(arrival, &Refused::Slow);
            }
        }
    }

    fn accept_client(&mut self) {
        let Some((accepted, peer)) = self.accept(None) else { return };
        if peer.uid != 0 && peer.uid != self.owner {
            return tracing::warn!(uid = peer.uid, pid = peer.pid, "refused at keeper.sock: not root");
        }
        if self.clients.all.len() >= limits::CLIENTS {
            return tracing::warn!(pid = peer.pid, "refused at keeper.sock: {} are there", limits::CLIENTS);
        }
        let id = self.next_id();
        self.clients.all.insert(id, Client::new(accepted, peer));
    }

    /// A listener's last user is gone.
    fn end(&mut self, listener: ListenerId) {
        let Some((session, is_over)) = self.registry.end(listener) else { return };
        let concerned = self.leases.concerned(&session);
        if is_over {
            tracing::info!(%session, "over");
            self.leases.close(&session);
        }
        for monitor in concerned {
            if let Some(client) = self.clients.of(monitor) {
                client.tell(FromKeeper::Ended { listener });
            }
        }
    }

    /// A monitor is dead: what it held goes to the next, and who served beside it looks at what it left.
    fn depart(&mut self, monitor: MonitorId) {
        if !self.clients.monitors.get(&monitor).is_some_and(Monitor::is_dead) {
            return;
        }
        let Some(gone) = self.clients.monitors.remove(&monitor) else { return };
        tracing::info!(pid = gone.pid, generation = gone.generation, "a monitor is gone");
        for (session, next) in self.leases.depart(monitor) {
            self.lease(&session, next);
        }
    }

    fn lease(&mut self, session: &SessionId, monitor: MonitorId) {
        let Some(client) = self.clients.of(monitor) else { return };
        self.registry.of(session).iter().for_each(|listener| client.lease(*listener));
    }

    fn flush(&mut self) {
        if self.no_send_before.is_some() {
            return;
        }
        let mut broken = Vec::new();
        for (id, client) in &mut self.clients.all {
            match client.flush(&self.registry) {
                Ok(Sent::All) if client.standing == Standing::Leaving => broken.push(*id),
                Ok(Sent::All | Sent::Part) => {}
                Ok(Sent::TooMany) => self.no_send_before = Some(Instant::now() + Duration::from_millis(10)),
                Err(_) => broken.push(*id),
            }
        }
        for id in broken {
            self.let_go(id);
        }
    }
}

impl FrontDoor {
    /// Closes what a stranger sent, or the connection on which it did.
    fn discard(&mut self, descriptors: Vec<OwnedFd>) {
        self.discarder.discard(descriptors);
        if self.discarder.is_full() && !self.was_full {
            self.was_full = true;
            tracing::warn!("{} pauses: closing what came through it takes long", self.door);
        }
    }
}

/// What is logged of one door's senders: so much in ten seconds that no log is flooded.
struct Complaints {
    since: Instant,
    said: u32,
}

impl Complaints {
    const MOST: u32 = 20;

    fn new() -> Self {
        Self { since: Instant::now(), said: 0 }
    }

    fn say(&mut self, door: Door, peer: Peer, why: &str) {
        if self.since.elapsed() > Duration::from_secs(10) {
            if self.said > Self::MOST {
                tracing::warn!("{} more were refused at {door}", self.said - Self::MOST);
            }
            *self = Self::new();
        }
        self.said += 1;
        if self.said <= Self::MOST {
            tracing::warn!(uid = peer.uid, pid = peer.pid, "refused at {door}: {why}");
        }
    }
}
