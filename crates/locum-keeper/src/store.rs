//! Copies of what is held, in the descriptor store of systemd (`FDSTORE` of sd_notify(3)): what a keeper loses with everything
//! else, the next finds there.
//!
//! For each listener two descriptors of one name, a number: the listener and a *note*, a memfd; for each monitor its pidfd. A
//! note is 16 bytes, the version and the monitor that holds the session, each a `u64` in little-endian, 0 for none; then the
//! delivery as JSON. Who holds it is changed in place: eight bytes are written whole or not at all.
//!
//! Names are short because the next keeper gets all of them in one variable, which execve(2) limits to 128 KiB.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use locum_kernel::Errno;
use locum_kernel::notify::{Listener, NotAListener};

use crate::lease::Leases;
use crate::memfd;
use crate::monitors::{Clients, Monitor, MonitorId};
use crate::protocol::{Delivery, ListenerId, Overlap, SessionId};
use crate::registry::Registry;
use crate::snapshot::{Inherited, Named, NoteSnapshot, SnapshotError, StoreSnapshot};
use crate::state::State;
use crate::systemd::Manager;

/// The version of a note.
const VERSION: u64 = 1;
const HEADER: usize = 16;
/// So many listeners are stored. Their names, each twice and with a colon, make less than 100,000 bytes.
const MOST: u32 = 10_000;

/// What a service manager stored for us, by name.
pub(crate) type Stored = Vec<(String, OwnedFd)>;

/// Why something that was stored is left alone.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error("nothing of this release has such a name")]
    Name,
    #[error("wanted a listener and a note, found {0} descriptors")]
    Count(usize),
    #[error("wanted a note of version {VERSION}, found {0}")]
    Version(u64),
    #[error("its note is of {0} bytes")]
    Short(usize),
    #[error("its listener is there by another name")]
    Twice,
    #[error(transparent)]
    NotAListener(#[from] NotAListener),
    #[error("its note cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    #[error("its note cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

#[derive(Debug)]
struct Note {
    /// Its name.
    number: u32,
    memfd: OwnedFd,
    holder: Option<MonitorId>,
}

/// What is in the store.
#[derive(Debug)]
pub(crate) struct Store {
    manager: Manager,
    notes: BTreeMap<ListenerId, Note>,
    /// Names that are in use, also by what could not be understood.
    numbers: BTreeSet<u32>,
    /// The next to be tried.
    next: u32,
    monitors: BTreeMap<MonitorId, String>,
    /// The manager takes nothing before.
    pub(crate) not_before: Option<Instant>,
}

fn monitor_name(id: MonitorId, monitor: &Monitor) -> String {
    format!("monitor-{id}-{}-{}", monitor.generation, monitor.pid)
}

/// The monitor of a name: its own, its generation's and its process's number.
fn monitor_of(name: &str) -> Option<(MonitorId, u64, u32)> {
    let mut numbers = name.strip_prefix("monitor-")?.split('-');
    let monitor =
        (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    numbers.next().is_none().then_some(monitor)
}

impl Store {
    /// An empty one, if a service manager started us.
    pub(crate) fn start() -> Option<Self> {
        let manager = Manager::start()?;
        let (notes, numbers, monitors) = Default::default();
        Some(Self { manager, notes, numbers, next: 0, monitors, not_before: None })
    }

    /// Takes back what a keeper before stored. What cannot be understood stays in the store.
    pub(crate) fn take_back(
        &mut self,
        stored: Stored,
        registry: &mut Registry,
        leases: &mut Leases<MonitorId, SessionId>,
        clients: &mut Clients,
    ) {
        let mut listeners: BTreeMap<String, Vec<OwnedFd>> = BTreeMap::new();
        for (name, fd) in stored {
            if let Some((id, generation, pid)) = monitor_of(&name) {
                // One that has died meanwhile is seen as any other.
                clients.take_back(id, Monitor::lost(fd, pid, generation));
                self.monitors.insert(id, name);
            } else {
                listeners.entry(name).or_default().push(fd);
            }
        }
        self.monitors.keys().for_each(|monitor| drop(leases.arrive(*monitor, Overlap::Able, &[])));
        for (name, descriptors) in listeners {
            match self.take_back_listener(&name, descriptors, registry) {
                Ok((session, holder)) => leases.take_back(&session, holder),
                Err(why) => {
                    tracing::error!("{name:?}, which systemd stored for a keeper, is left untouched: {why}");
                }
            }
        }
    }

    fn take_back_listener(
        &mut self,
        name: &str,
        descriptors: Vec<OwnedFd>,
        registry: &mut Registry,
    ) -> Result<(SessionId, Option<MonitorId>), Unknown> {
        let number = name.parse().map_err(|_| Unknown::Name)?;
        self.numbers.insert(number);
        let found = descriptors.len();
        let [one, other] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| Unknown::Count(found))?;
        let is_first = Listener::recognise(one.as_fd()).is_ok();
        let (listener, memfd) = if is_first { (one, other) } else { (other, one) };
        let listener = Listener::try_from(listener)?;
        let bytes = memfd::read(&memfd)?;
        let (header, json) = bytes.split_first_chunk::<HEADER>().ok_or(Unknown::Short(bytes.len()))?;
        let header = u128::from_le_bytes(*header);
        #[expect(clippy::cast_possible_truncation, reason = "its lower half")]
        let (version, holder) = (header as u64, (header >> 64) as u64);
        if version != VERSION {
            return Err(Unknown::Version(version));
        }
        let delivery: Delivery = serde_json::from_slice(json)?;
        let state: State = serde_json::from_str(&delivery.state)?;
        let (session, holder) = (delivery.session.clone(), Some(holder).filter(|holder| *holder != 0));
        if registry.listeners.contains_key(&delivery.listener) {
            return Err(Unknown::Twice);
        }
        self.notes.insert(delivery.listener, Note { number, memfd, holder });
        registry.fill(delivery, &state, listener.into());
        Ok((session, holder))
    }

    /// Has the store hold what is held.
    pub(crate) fn update(
        &mut self,
        registry: &Registry,
        leases: &Leases<MonitorId, SessionId>,
        clients: &Clients,
    ) {
        self.not_before.take_if(|before| *before <= Instant::now());
        if self.not_before.is_some() {
            return;
        }
        let pause = match self.try_update(registry, leases, clients) {
            Ok(()) => return,
            // It has much to do.
            Err(Errno::AGAIN | Errno::TOOMANYREFS) => Duration::from_millis(10),
            Err(error) => {
                tracing::error!(
                    "systemd stores nothing; if keeper and monitor die at once, sessions may be lost: {error}"
                );
                Duration::from_secs(10)
            }
        };
        self.not_before = Some(Instant::now() + pause);
    }

    fn try_update(
        &mut self,
        registry: &Registry,
        leases: &Leases<MonitorId, SessionId>,
        clients: &Clients,
    ) -> Result<(), Errno> {
        // Before any note that names one.
        for (id, monitor) in &clients.monitors {
            let (Some(process), false) = (&monitor.process, self.monitors.contains_key(id)) else { continue };
            let name = monitor_name(*id, monitor);
            self.manager.store(&name, &[process.as_fd()])?;
            self.monitors.insert(*id, name);
        }
        for (id, held) in &registry.listeners {
            let holder = leases.holder(&held.delivery.session);
            let lease = holder.unwrap_or(0).to_le_bytes();
            match self.notes.get_mut(id) {
                Some(note) if note.holder == holder => {}
                Some(note) => {
                    rustix::io::pwrite(&note.memfd, &lease, 8)?;
                    note.holder = holder;
                }
                None => {
                    let mut numbers = (self.next..MOST).chain(0..self.next.min(MOST));
                    let Some(number) = numbers.find(|number| !self.numbers.contains(number)) else {
                        continue;
                    };
                    let mut bytes = [VERSION.to_le_bytes(), lease].concat();
                    // Our own messages have string keys alone, and a Vec takes all that is written.
                    serde_json::to_writer(&mut bytes, &held.delivery).map_err(|_| Errno::INVAL)?;
                    let memfd = memfd::create()?;
                    // Either all of it goes into a memfd, or there is no memory.
                    rustix::io::pwrite(&memfd, &bytes, 0)?;
                    self.manager.store(&number.to_string(), &[held.listener.as_fd(), memfd.as_fd()])?;
                    (self.next, _) = (number + 1, self.numbers.insert(number));
                    self.notes.insert(*id, Note { number, memfd, holder });
                }
            }
        }
        while let Some(id) = self.notes.keys().find(|id| !registry.listeners.contains_key(id)).copied() {
            self.manager.remove(&self.notes[&id].number.to_string())?;
            if let Some(note) = self.notes.remove(&id) {
                self.numbers.remove(&note.number);
            }
        }
        while let Some(id) = self.monitors.keys().find(|id| !clients.monitors.contains_key(id)).copied() {
            self.manager.remove(&self.monitors[&id])?;
            self.monitors.remove(&id);
        }
        Ok(())
    }

    /// For a keeper that goes on.
    pub(crate) fn snapshot<'a>(&'a self, named: &mut Named<'a>) -> StoreSnapshot {
        let note = |(id, note): (&ListenerId, &'a Note)| {
            (*id, NoteSnapshot { number: note.number, memfd: named.name(&note.memfd), holder: note.holder })
        };
        StoreSnapshot {
            notes: self.notes.iter().map(note).collect(),
            numbers: self.numbers.clone(),
            monitors: self.monitors.clone(),
        }
    }

    /// Goes on from `snapshot`.
    pub(crate) fn resume(
        &mut self,
        snapshot: StoreSnapshot,
        from: &mut Inherited,
    ) -> Result<(), SnapshotError> {
        for (id, NoteSnapshot { number, memfd, holder }) in snapshot.notes {
            self.notes.insert(id, Note { number, memfd: from.take(memfd, "a note")?, holder });
        }
        (self.numbers, self.monitors) = (snapshot.numbers, snapshot.monitors);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_fit_into_one_variable() {
        let numbers: usize = (0..MOST).map(|number| 2 * format!(":{number}").len()).sum();
        let monitors = crate::limits::CLIENTS * format!(":monitor-{0}-{0}-{1}", u64::MAX, u32::MAX).len();
        let doors = 500 * format!(":oci-{}", u32::MAX).len();
        let all = "LISTEN_FDNAMES=oci:keeper".len() + numbers + monitors + doors;
        // MAX_ARG_STRLEN of execve(2).
        assert!(all < 128 << 10, "{all}");
    }

    #[test]
    fn a_monitor_is_known_by_its_name() {
        assert_eq!(monitor_of("monitor-3-7-4711"), Some((3, 7, 4711)));
        for other in ["monitor", "monitor-", "monitor-3-7", "monitor-3-7-4711-1", "monitor-3--7", "3", ""] {
            assert_eq!(monitor_of(other), None, "{other}");
        }
    }
}
