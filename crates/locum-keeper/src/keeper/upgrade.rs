//! A keeper goes on in another program: it is started on copies of everything first, and only what has read them and says so
//! is executed, in the place of this one. Runtimes, monitors and workloads notice nothing.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use locum_kernel::{Errno, confine, program};
use rustix::pipe::PipeFlags;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use super::{Keeper, KeeperError, is_readable};
use crate::arrival::Arrival;
use crate::monitors::{ClientId, Clients, Standing};
use crate::protocol::FromKeeper;
use crate::registry::Registry;
use crate::snapshot::{self, Inherited, Named, RELEASE, Snapshot, SnapshotError};
use crate::sockets::Sockets;
use crate::systemd;

/// How long an upgrade waits for what strangers sent to be closed. A thread that closes cannot be ended, and so not be left behind.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a rehearsal may take, and how long it may take to end when it is killed then.
const REHEARSAL: Duration = Duration::from_secs(10);

/// An upgrade on its way.
pub(super) struct Upgrade {
    client: ClientId,
    program: OwnedFd,
    /// When the present stage has taken too long.
    pub(super) until: Instant,
    stage: Stage,
}

enum Stage {
    /// Waits to start the rehearsal.
    Wanted,
    Rehearsing(Rehearsal),
    /// Waits to execute the program.
    Rehearsed,
}

/// The program, on copies.
struct Rehearsal {
    process: OwnedFd,
    said: OwnedFd,
    /// How many descriptors it was given.
    count: usize,
    is_killed: bool,
}

/// What a rehearsal says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// It read the snapshot, and took so many descriptors.
    Ready {
        release: String,
        descriptors: usize,
    },
    Refused {
        why: String,
    },
}

/// Why the keeper goes on as it is.
#[derive(Debug, thiserror::Error)]
enum NotUpgraded {
    #[error("another upgrade is on its way")]
    Another,
    #[error(
        "it takes long to close what came through {0}; try again, or restart the keeper: its monitor fills the next"
    )]
    Closing(String),
    #[error("the program cannot be executed: {error}{}", hint(*error))]
    Execute { error: Errno },
    #[error("the rehearsal did not end within {} s", REHEARSAL.as_secs())]
    Hangs,
    #[error(
        "the rehearsal ended ({0}) and did not say that it is a keeper: is the program a locum of this release or a later one?"
    )]
    Silent(String),
    #[error("the rehearsal refused: {0}")]
    Refused(String),
    #[error("the rehearsal, of locum {release}, took {found} descriptors of {wanted}")]
    Descriptors { release: String, found: usize, wanted: usize },
    #[error("cannot {0}: {1}")]
    Own(&'static str, std::io::Error),
}

fn hint(error: Errno) -> &'static str {
    match error {
        Errno::ACCESS => "; it must be executable for every user, on a file system without noexec",
        Errno::NOENT => "; it is a script, or what it names as its interpreter is missing",
        _ => "",
    }
}

fn own<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> NotUpgraded {
    move |error| NotUpgraded::Own(what, error.into())
}

impl Upgrade {
    /// The rehearsing process.
    pub(super) fn process(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Rehearsing(rehearsal) => Some(rehearsal.process.as_fd()),
            _ => None,
        }
    }

    /// Whether it waits until nothing is being closed.
    pub(super) fn wants_quiet(&self) -> bool {
        !matches!(self.stage, Stage::Rehearsing(_))
    }
}

impl Keeper {
    pub(super) fn begin_upgrade(&mut self, id: ClientId, program: OwnedFd) {
        let Some(client) = self.clients.all.get_mut(&id) else { return };
        client.standing = Standing::Upgrading;
        if self.upgrade.is_some() {
            return self.stay(id, &NotUpgraded::Another);
        }
        tracing::info!(pid = client.peer.pid, "an upgrade is wanted");
        let until = Instant::now() + PATIENCE;
        self.upgrade = Some(Upgrade { client: id, program, until, stage: Stage::Wanted });
    }

    /// Tells that nothing became of it.
    fn stay(&mut self, id: ClientId, why: &NotUpgraded) {
        tracing::error!("not upgraded: {why}");
        if let Some(client) = self.clients.all.get_mut(&id) {
            client.tell(FromKeeper::NotUpgraded { why: why.to_string() });
            client.standing = Standing::Observer;
        }
    }

    /// Does what can be done. When the program is executed, does not return.
    pub(super) fn go_on_upgrading(&mut self, stop: BorrowedFd<'_>) {
        let Some(mut upgrade) = self.upgrade.take() else { return };
        let client = upgrade.client;
        match self.advance(&mut upgrade, stop) {
            Ok(()) => self.upgrade = Some(upgrade),
            Err(why) => self.stay(client, &why),
        }
    }

    fn advance(&mut self, upgrade: &mut Upgrade, stop: BorrowedFd<'_>) -> Result<(), NotUpgraded> {
        let is_late = upgrade.until <= Instant::now();
        match &mut upgrade.stage {
            Stage::Rehearsing(rehearsal) => {
                if is_readable(&rehearsal.process) {
                    let release = rehearsal.outcome()?;
                    tracing::info!("locum {release} has rehearsed it");
                    (upgrade.stage, upgrade.until) = (Stage::Rehearsed, Instant::now() + PATIENCE);
                    return self.advance(upgrade, stop);
                }
                if is_late && rehearsal.is_killed {
                    return Err(NotUpgraded::Hangs);
                }
                if is_late {
                    // It is our child, and not waited for yet.
                    let _ = rustix::process::pidfd_send_signal(&rehearsal.process, Signal::KILL);
                    (rehearsal.is_killed, upgrade.until) = (true, Instant::now() + REHEARSAL);
                }
            }
            stage => {
                if let Some(busy) = self.doors.iter().find(|door| !door.discarder.is_idle()) {
                    return if is_late { Err(NotUpgraded::Closing(busy.door.to_string())) } else { Ok(()) };
                }
                if matches!(stage, Stage::Wanted) {
                    *stage = Stage::Rehearsing(self.rehearse(&upgrade.program)?);
                    upgrade.until = Instant::now() + REHEARSAL;
                } else if !is_readable(stop) {
                    return Err(self.become_program(&upgrade.program, stop));
                }
            }
        }
        Ok(())
    }

    /// Everything, for a keeper that goes on.
    fn snapshot<'a>(&'a self, named: &mut Named<'a>) -> Snapshot {
        let (clients, monitors) = self.clients.snapshot(named);
        Snapshot {
            version: snapshot::VERSION,
            release: RELEASE.to_owned(),
            owner: self.owner,
            stop: None,
            lock: named.name(&self.sockets.lock),
            control: named.name(&self.sockets.control),
            doors: self.sockets.doors.iter().map(|(door, socket)| (*door, named.name(socket))).collect(),
            arrivals: self.arrivals.iter().map(|(id, arrival)| arrival.snapshot(*id, named)).collect(),
            clients,
            monitors,
            generation: self.clients.generation,
            latest_monitor: self.clients.next,
            listeners: self.registry.snapshot(named),
            sessions: self.registry.sessions.clone(),
            sequence: self.registry.sequence,
            leases: self.leases.clone(),
            latest: self.next,
            turned_away: self.turned_away,
            store: self.store.as_ref().map(|store| store.snapshot(named)),
        }
    }

    /// Starts `program` on copies of everything but the lock, which a rehearsal that outlives us must not keep from the next keeper.
    fn rehearse(&self, program: &OwnedFd) -> Result<Rehearsal, NotUpgraded> {
        let (said, report) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(own("make a pipe"))?;
        let no_lock = rustix::io::fcntl_dupfd_cloexec(&report, 3).map_err(own("copy a descriptor"))?;
        let mut named = Named::default();
        let snapshot = self.snapshot(&mut named);
        named.forget(snapshot.lock);
        let snapshot = Snapshot { lock: named.name(&no_lock), ..snapshot };
        let (count, written) = (named.all().len(), snapshot.write().map_err(own("write a snapshot"))?);
        let (from, to) = (named.name(&written).to_string(), named.name(&report).to_string());
        let arguments = ["locum", "keeper", "--resume", &from, "--rehearse", &to].map(str::to_owned);
        let command = program::Command::new(arguments, environment());
        let process = program::spawn(program.as_fd(), &command, &named.all(), report.as_fd());
        Ok(Rehearsal { process: process.map_err(own("start a process"))?, said, count, is_killed: false })
    }

    /// Returns only if it fails.
    fn become_program(&self, program: &OwnedFd, stop: BorrowedFd<'_>) -> NotUpgraded {
        let stop = match rustix::io::fcntl_dupfd_cloexec(stop, 3).map_err(own("copy a descriptor")) {
            Ok(stop) => stop,
            Err(error) => return error,
        };
        let mut named = Named::default();
        let mut snapshot = self.snapshot(&mut named);
        snapshot.stop = Some(named.name(&stop));
        let written = match snapshot.write().map_err(own("write a snapshot")) {
            Ok(written) => written,
            Err(error) => return error,
        };
        let from = named.name(&written).to_string();
        let command =
            program::Command::new(["locum", "keeper", "--resume", &from].map(str::to_owned), environment());
        NotUpgraded::Execute { error: program::replace(program, &command, &named.all()) }
    }
}

/// Ours, without what was told of descriptors that are long taken.
fn environment() -> impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)> {
    std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("LISTEN_"))
}

impl Rehearsal {
    /// The release of the program that is ready. It has ended.
    fn outcome(&self) -> Result<String, NotUpgraded> {
        let waited = rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED);
        if self.is_killed {
            return Err(NotUpgraded::Hangs);
        }
        let mut said = Vec::new();
        let mut from = std::fs::File::from(self.said.try_clone().map_err(own("read what a rehearsal says"))?);
        // It has ended, but a child of its own may have the pipe too.
        rustix::io::ioctl_fionbio(&from, true).map_err(own("read what a rehearsal says"))?;
        let _ = from.read_to_end(&mut said);
        if let Ok(errno) = <[u8; 4]>::try_from(said.as_slice()) {
            let error = Errno::from_raw_os_error(i32::from_le_bytes(errno));
            return Err(NotUpgraded::Execute { error });
        }
        match serde_json::from_slice(&said) {
            Ok(Answer::Ready { release, descriptors }) if descriptors == self.count => Ok(release),
            Ok(Answer::Ready { release, descriptors }) => {
                Err(NotUpgraded::Descriptors { release, found: descriptors, wanted: self.count })
            }
            Ok(Answer::Refused { why }) => Err(NotUpgraded::Refused(why)),
            Err(_) => Err(NotUpgraded::Silent(match waited {
                Ok(Some(status)) if status.terminating_signal().is_some() => {
                    format!("signal {}", status.terminating_signal().unwrap_or_default())
                }
                Ok(Some(status)) => format!("exit status {}", status.exit_status().unwrap_or_default()),
                _ => "nobody knows how".to_owned(),
            })),
        }
    }
}

impl Keeper {
    /// Goes on from the snapshot in the inherited descriptor `from`: the keeper, what to look at for an unread stop, and how many
    /// descriptors it took.
    fn resume(from: RawFd) -> Result<(Self, Option<OwnedFd>, usize), KeeperError> {
        let mut inherited = Inherited::default();
        let mut snapshot = Snapshot::read(&inherited.take(from, "the snapshot")?)?;
        inherited.count = 0;
        let mut doors = Vec::new();
        for (door, socket) in snapshot.doors.drain(..) {
            doors.push((door, inherited.take(socket, "a door")?));
        }
        let control = inherited.take(snapshot.control, "the control socket")?;
        let lock = inherited.take(snapshot.lock, "the lock")?;
        let stop = snapshot.stop.map(|stop| inherited.take(stop, "what tells to stop")).transpose()?;
        let mut keeper = Self::new(Sockets { doors, control, lock, stored: Vec::new() }, snapshot.owner)?;
        for arrival in snapshot.arrivals.drain(..) {
            if arrival.door >= keeper.doors.len() {
                return Err(SnapshotError::Torn("a delivery at no door").into());
            }
            keeper.arrivals.insert(arrival.id, Arrival::resume(arrival, &mut inherited)?);
        }
        keeper.clients = Clients::resume(&mut snapshot, &mut inherited)?;
        keeper.registry = Registry::resume(&mut snapshot, &mut inherited)?;
        keeper.leases = snapshot.leases;
        if let (Some(store), Some(stored)) = (&mut keeper.store, snapshot.store) {
            store.resume(stored, &mut inherited)?;
        }
        (keeper.next, keeper.turned_away) = (snapshot.latest, snapshot.turned_away);
        Ok((keeper, stop, inherited.count))
    }
}

/// Goes on in the place of the keeper that executed this program and left its snapshot in the descriptor `from`.
pub fn resume(from: RawFd, stop: impl AsFd) -> Result<(), KeeperError> {
    confine::forbid_tracing().map_err(KeeperError::Confine)?;
    // The kernel called it after the descriptor.
    let _ = rustix::thread::set_name(c"locum");
    let (mut keeper, stopped, _) = Keeper::resume(from)?;
    // What wrote into it is gone with the program before, so that it is at its end anyway.
    if stopped.is_some_and(|stopped| rustix::io::ioctl_fionread(stopped).is_ok_and(|left| left > 0)) {
        return Ok(());
    }
    for client in keeper.clients.all.values_mut().filter(|client| client.standing == Standing::Upgrading) {
        client.tell(FromKeeper::Upgraded { version: RELEASE.to_owned() });
        client.standing = Standing::Observer;
    }
    tracing::info!(sessions = keeper.registry.sessions.len(), "the keeper goes on as locum {RELEASE}");
    systemd::tell(NotifyState::Ready);
    keeper.keep(stop.as_fd())
}

/// Does what [`resume`] does, on copies, up to the point where it would serve, and says to the descriptor `to` how that went.
pub fn rehearse(from: RawFd, to: RawFd) -> Result<(), KeeperError> {
    confine::forbid_tracing().map_err(KeeperError::Confine)?;
    let answer = match Keeper::resume(from) {
        Ok((_, _, descriptors)) => Answer::Ready { release: RELEASE.to_owned(), descriptors },
        Err(error) => Answer::Refused { why: error.to_string() },
    };
    let to = program::inherited(to).map_err(|error| SnapshotError::Descriptor(to, "whom to tell", error))?;
    let said = serde_json::to_vec(&answer).map_err(SnapshotError::Json)?;
    std::fs::File::from(to).write_all(&said).map_err(|error| KeeperError::Own("tell that it is ready", error))
}
