//! What the clients of the control socket say, and what follows.

use std::os::fd::OwnedFd;

use locum_kernel::Errno;
use locum_kernel::notify::{Listener, NotAListener};

use super::Keeper;
use crate::frame::FrameError;
use crate::limits::{Exceeded, Use};
use crate::monitors::{ClientId, Monitor, MonitorId, Standing};
use crate::protocol::{
    AnyHello, Delivery, Door, FromKeeper, KeeperReport, ListenerId, MonitorReport, Overlap, PROTOCOL, Report,
    Role, ToKeeper,
};
use crate::snapshot::RELEASE;
use crate::state::State;

/// Why a client is not listened to any longer.
#[derive(Debug, thiserror::Error)]
enum Misspoken {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("what it says is none of our messages: {0}")]
    Json(#[from] serde_json::Error),
    #[error("its first message is no hello, or a later one is")]
    OutOfTurn,
    #[error("a message with {found} descriptors, wanted {wanted}")]
    Descriptors { wanted: usize, found: usize },
    #[error("what it fills is no listener: {0}")]
    NotAListener(#[from] NotAListener),
    #[error("descriptors were lost: the keeper's table is full")]
    DescriptorsLost,
}

impl Keeper {
    pub(super) fn read_client(&mut self, id: ClientId) {
        // To its end, so that a monitor's old connection is known to be gone when its new one speaks.
        let is_over = loop {
            let Some(client) = self.clients.all.get_mut(&id) else { return };
            match client.inbox.receive(&client.socket) {
                Ok(received) if received.is_cut => {
                    tracing::error!(
                        pid = client.peer.pid,
                        "a client is let go: {}",
                        Misspoken::DescriptorsLost
                    );
                    break true;
                }
                Ok(received) if received.bytes == 0 => break true,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break false,
                Err(_) => break true,
            }
            if let Err(why) = self.take_messages(id) {
                let pid = self.clients.all.get(&id).map_or(0, |client| client.peer.pid);
                tracing::warn!(pid, "a client is let go: {why}");
                break true;
            }
        };
        if is_over {
            self.let_go(id);
        }
    }

    /// Ends a connection. The monitor behind it keeps what it holds for as long as it lives.
    pub(super) fn let_go(&mut self, id: ClientId) {
        let Some(client) = self.clients.all.remove(&id) else { return };
        if let Standing::Monitor(monitor) = client.standing {
            // Before anyone else is told: if it lives, it must know, even while a rehearsal has a copy of the socket.
            let _ = rustix::net::shutdown(&client.socket, rustix::net::Shutdown::Both);
            drop(client);
            if let Some(known) = self.clients.monitors.get_mut(&monitor) {
                known.client.take_if(|client| *client == id);
            }
            self.depart(monitor);
        }
    }

    fn take_messages(&mut self, id: ClientId) -> Result<(), Misspoken> {
        loop {
            let Some(client) = self.clients.all.get_mut(&id) else { return Ok(()) };
            let Some((bytes, descriptors)) = client.inbox.next_bytes()? else { return Ok(()) };
            match client.standing {
                Standing::Leaving => {}
                Standing::Unknown => self.greet(id, &bytes)?,
                standing => self.obey(id, standing, serde_json::from_slice(&bytes)?, descriptors)?,
            }
        }
    }

    fn greet(&mut self, id: ClientId, bytes: &[u8]) -> Result<(), Misspoken> {
        let Some(client) = self.clients.all.get_mut(&id) else { return Ok(()) };
        let AnyHello { hello } = serde_json::from_slice(bytes)?;
        if hello.protocol > PROTOCOL {
            let why = format!(
                "this keeper (locum {RELEASE}) speaks protocol {PROTOCOL} and was addressed in {}; upgrade the keeper first",
                hello.protocol
            );
            tracing::warn!(pid = client.peer.pid, "refused at keeper.sock: {why}");
            client.tell(FromKeeper::Refused { why });
            client.standing = Standing::Leaving;
            return Ok(());
        }
        let ToKeeper::Hello { role, pid, version, generation, overlap, started, .. } =
            serde_json::from_slice(bytes)?
        else {
            return Err(Misspoken::OutOfTurn);
        };
        let unable = self.clients.monitors.values().find(|monitor| monitor.overlap == Overlap::Unable);
        if let (Role::Monitor, Overlap::Relieves, Some(other)) = (role, overlap, unable) {
            let why = format!(
                "the monitor that serves (pid {}, locum {}) is of a release that cannot be relieved; end it, and the next one takes over",
                other.pid, other.version
            );
            client.tell(FromKeeper::Refused { why });
            client.standing = Standing::Leaving;
            return Ok(());
        }
        let hello = |keeper: &mut Self, generation, overlap| {
            let Some(client) = keeper.clients.all.get_mut(&id) else { return };
            let (pid, version) = (std::process::id(), RELEASE.to_owned());
            client.tell(FromKeeper::Hello { protocol: PROTOCOL, pid, version, generation, overlap });
        };
        if role == Role::Observer {
            client.standing = Standing::Observer;
            hello(self, 0, overlap);
            return Ok(());
        }
        let welcome = self.clients.welcome(id, pid, version, generation, (overlap, started));
        let Some((monitor, generation)) = welcome else { return Ok(()) };
        let (overlap, sessions) = self.leases.arrive(monitor, overlap, &self.clients.younger(monitor));
        hello(self, generation, overlap);
        tracing::info!(pid, generation, ?overlap, "a monitor is there");
        for session in sessions {
            self.lease(&session, monitor);
        }
        if overlap == Overlap::Relieved {
            self.tell_relieved(monitor);
        }
        self.answer_the_waiting();
        Ok(())
    }

    fn tell_relieved(&mut self, monitor: MonitorId) {
        let overlap = self.clients.monitors.get(&monitor).map(|known| known.overlap);
        if overlap.is_none_or(|overlap| overlap == Overlap::Unable) {
            return;
        }
        let Some(client) = self.clients.of(monitor) else { return };
        client.tell(FromKeeper::Relieved {});
    }

    /// `monitor` serves all that it was told of.
    fn relieve(&mut self, monitor: MonitorId) {
        let (relieved, moved) = self.leases.relieve(monitor, &self.clients.younger(monitor));
        for (session, to) in moved {
            self.lease(&session, to);
        }
        if let Some(client) = self.clients.of(monitor) {
            client.tell(FromKeeper::Relieving {});
        }
        for other in relieved {
            if let Some(known) = self.clients.monitors.get(&other) {
                tracing::info!(pid = known.pid, generation = known.generation, "a monitor is relieved");
            }
            self.tell_relieved(other);
        }
    }

    fn obey(
        &mut self,
        id: ClientId,
        standing: Standing,
        message: ToKeeper,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Misspoken> {
        match (message, standing) {
            (ToKeeper::Status { when_monitored }, _) => {
                let waits = when_monitored && self.leases.first().is_none() && standing == Standing::Observer;
                let report = FromKeeper::Status(self.report());
                if let Some(client) = self.clients.all.get_mut(&id) {
                    if waits {
                        client.standing = Standing::Waiting;
                    } else {
                        client.tell(report);
                    }
                }
                Ok(())
            }
            (ToKeeper::Park { listener, slot }, Standing::Monitor(monitor)) => {
                let ends = ends(descriptors)?;
                self.park(monitor, listener, slot, ends);
                Ok(())
            }
            (ToKeeper::Fill { delivery, slots }, Standing::Monitor(monitor)) => {
                self.fill(monitor, delivery, &slots, descriptors)
            }
            (ToKeeper::Relieve {}, Standing::Monitor(monitor)) => {
                self.relieve(monitor);
                Ok(())
            }
            (ToKeeper::Upgrade {}, Standing::Observer) => {
                let found = descriptors.len();
                let [program] = <[OwnedFd; 1]>::try_from(descriptors)
                    .map_err(|_| Misspoken::Descriptors { wanted: 1, found })?;
                self.begin_upgrade(id, program);
                Ok(())
            }
            _ => Err(Misspoken::OutOfTurn),
        }
    }

    fn park(&mut self, monitor: MonitorId, listener: ListenerId, slot: u32, ends: [OwnedFd; 2]) {
        // One that has just ended, if none.
        let Some(held) = self.registry.listeners.get(&listener) else { return };
        let is_holder = self.leases.holder(&held.delivery.session) == Some(monitor);
        if !is_holder && !self.leases.is_beside(monitor) {
            return tracing::warn!(%listener, "a park for what another monitor holds is not taken");
        }
        if !held.parks.contains_key(&slot) {
            let door = held.delivery.door;
            if let Some(exceeded) = self.exceeds(door, Use { descriptors: 2, ..Use::default() }) {
                self.turned_away += 1;
                tracing::warn!(%listener, slot, "a park is not taken, its calls are not safe: {exceeded}");
                return;
            }
        }
        self.registry.park(listener, slot, ends);
    }

    fn exceeds(&self, door: Door, more: Use) -> Option<Exceeded> {
        let index = self.doors.iter().position(|known| known.door == door)?;
        let mut used = self.used(index);
        used.add(more);
        used.exceeds(&self.doors[index].limit)
    }

    fn fill(
        &mut self,
        monitor: MonitorId,
        delivery: Delivery,
        slots: &[u32],
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Misspoken> {
        let (wanted, found) = (1 + 2 * slots.len(), descriptors.len());
        if wanted != found {
            return Err(Misspoken::Descriptors { wanted, found });
        }
        let mut descriptors = descriptors.into_iter();
        let listener = descriptors.next().ok_or(Misspoken::Descriptors { wanted, found })?;
        let listener = Listener::try_from(listener)?;
        let state: State = serde_json::from_str(&delivery.state)?;
        let id = delivery.listener;
        let session = delivery.session.clone();
        let holder = self.leases.keep(monitor, &session);
        if holder != Some(monitor) && !self.leases.is_beside(monitor) {
            tracing::warn!(%session, "a fill of what another monitor holds is not taken");
            if !self.relieve_late(monitor) {
                return Ok(());
            }
        }
        if !self.registry.listeners.contains_key(&id) {
            // No limit here: each was within them when it was delivered.
            self.registry.fill(delivery, &state, listener.into());
            for other in self.leases.concerned(&session).into_iter().filter(|other| *other != monitor) {
                if let Some(client) = self.clients.of(other) {
                    client.lease(id);
                }
            }
        }
        for slot in slots {
            if let (Some(near), Some(far)) = (descriptors.next(), descriptors.next()) {
                self.registry.park(id, *slot, [near, far]);
            }
        }
        Ok(())
    }

    /// `monitor` did not hear in time that another serves what it does. False: it would not understand.
    fn relieve_late(&mut self, monitor: MonitorId) -> bool {
        let is_able = |known: &Monitor| known.overlap != Overlap::Unable;
        if !self.clients.monitors.get(&monitor).is_some_and(is_able) {
            return false;
        }
        for (session, to) in self.leases.dismiss(monitor) {
            self.lease(&session, to);
        }
        self.tell_relieved(monitor);
        true
    }

    fn answer_the_waiting(&mut self) {
        let report = self.report();
        for client in self.clients.all.values_mut() {
            if client.standing == Standing::Waiting {
                client.standing = Standing::Observer;
                client.tell(FromKeeper::Status(report.clone()));
            }
        }
    }

    fn report(&self) -> Report {
        let monitor = self.leases.first().and_then(|first| self.clients.monitors.get(&first));
        let monitor = monitor.map(|monitor| MonitorReport {
            pid: monitor.pid,
            version: monitor.version.clone(),
            generation: monitor.generation,
        });
        let keeper = KeeperReport {
            pid: std::process::id(),
            version: RELEASE.to_owned(),
            turned_away: self.turned_away,
        };
        Report { keeper, monitor, sessions: self.registry.report() }
    }
}

fn ends(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; 2], Misspoken> {
    descriptors
        .try_into()
        .map_err(|descriptors: Vec<OwnedFd>| Misspoken::Descriptors { wanted: 2, found: descriptors.len() })
}
