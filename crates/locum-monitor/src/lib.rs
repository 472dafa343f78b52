//! The monitor: the process that answers calls. It has the privileges, and it may die.
//!
//! It takes listeners from the keeper, receives calls into each session's journal, carries them out with no more rights
//! than the policy names, and settles what a dead predecessor left. See `ARCHITECTURE.md`.
#![forbid(unsafe_code)]

mod adopt;
mod again;
mod answer;
mod audit;
mod caller;
mod calls;
mod exact;
mod exports;
#[cfg(debug_assertions)]
mod fault;
mod key_ring;
pub mod key_users;
pub mod keys;
mod lifeline;
mod overlap;
mod park;
pub mod parts;
pub mod reattach;
mod record;
mod recovery;
mod session;
mod signature;
mod watch;
mod worker;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use locum_keeper::client::{Connection, Event, Hello, KeeperHello};
use locum_keeper::protocol::Overlap;
use locum_keeper::{RuntimeDir, client::ClientError, systemd};
use locum_kernel::Errno;
use locum_policy::Policy;
use rustix::fs::{Mode, OFlags};
use sd_notify::NotifyState;

use crate::key_ring::KeyRing;
use crate::keys::KeyError;
use crate::overlap::Standing;
use crate::park::Park;
use crate::session::{Served, Session, lock, now_ms};

/// What a monitor works with.
#[derive(Debug)]
pub struct Config {
    /// Where the keeper and the sessions are.
    pub runtime_dir: RuntimeDir,
    /// The directory of keys.
    pub keys: PathBuf,
    /// Policy files beside the built-in ones.
    pub policies: Vec<PathBuf>,
    /// The process with which it is to end.
    pub parent: Option<u32>,
    /// Whether it takes the place of the monitor that serves.
    pub replace: bool,
    /// Where to say "serving" once it does; with `replace`, once nobody else needs to.
    pub serves: Option<OwnedFd>,
}

/// Why a monitor cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// A right is missing.
    #[error("the monitor needs root in the initial user namespace with {needed}: {source}; start it as root")]
    Rights {
        /// Which.
        needed: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// This kernel cannot do it.
    #[error("this kernel's seccomp notifier cannot be used: {0}")]
    Notifier(String),
    /// The kernel's word on something of our own.
    #[error("cannot {doing}: {source}")]
    Own {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The keys are not in order.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A policy file cannot be read.
    #[error("cannot read the policy file {path}: {source}")]
    PolicyFile {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A policy file is wrong.
    #[error(transparent)]
    Policy(#[from] locum_policy::PolicyError),
    /// The keeper does not take us.
    #[error(transparent)]
    Keeper(#[from] ClientError),
    /// The keeper knows of no upgrades.
    #[error(
        "the keeper (pid {pid}, locum {version}) lets no monitor relieve another; upgrade the keeper first"
    )]
    OldKeeper {
        /// Its process.
        pid: u32,
        /// Its release.
        version: String,
    },
    /// What others serve, it would not.
    #[error("this monitor cannot take over, whoever served serves on: {}", .0.join("; "))]
    Unserved(Vec<String>),
}

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) keys: Arc<KeyRing>,
    policies: HashMap<String, Policy>,
    runtime_dir: RuntimeDir,
    boot: String,
    /// /proc/self/fd.
    pub(crate) own_descriptors: OwnedFd,
    pub(crate) own_root: OwnedFd,
    keeper: Mutex<Option<Arc<Connection>>>,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    /// Listeners that have ended, for as long as workers of theirs are left.
    ending: Mutex<Vec<Arc<Served>>>,
    /// When the keeper was last connected to, in milliseconds since boot; 0 if it never was.
    connected: AtomicU64,
    /// The thread that looks after sessions, once there is one.
    watch: OnceLock<Thread>,
    pub(crate) standing: Standing,
}

impl Shared {
    pub(crate) fn sessions(&self) -> Vec<Arc<Session>> {
        lock(&self.sessions).values().cloned().collect()
    }

    pub(crate) fn folder(&self, session: &str) -> PathBuf {
        self.runtime_dir.sessions().join(session)
    }

    /// Whether the keeper has had time to tell of every listener that it holds.
    pub(crate) fn settled_in(&self) -> bool {
        let since = self.connected.load(Ordering::Relaxed);
        since != 0 && now_ms().saturating_sub(since) > 5000
    }

    /// Has the keeper hold a copy of `park`. Without a keeper, the next one gets it with everything else.
    pub(crate) fn show_park(&self, served: &Served, slot: u32, park: &Park) {
        let keeper = lock(&self.keeper).clone();
        let Some(keeper) = keeper else { return };
        let shown = session::copy(slot, park)
            .map_err(ClientError::from)
            .and_then(|copy| keeper.park(served.delivery.listener, &copy));
        if let Err(error) = shown {
            tracing::debug!("the keeper did not take a park: {error}");
        }
    }
}

/// Serves, for as long as the process lives. Once another has relieved it, it ends the process.
pub fn run(mut config: Config) -> Result<(), MonitorError> {
    let replace = config.replace;
    let mut start = Start { serves: config.serves.take(), is_over: false };
    let shared = Arc::new(prepare(config)?);
    let (watched, keys) = (Arc::clone(&shared), Arc::clone(&shared.keys));
    start_thread("watch", move || watch::run(&watched))?;
    start_thread("keys", move || keys.keep_looking())?;
    let mut generation = None;
    loop {
        // For ever: whatever the next keeper is told first, whoever was to be relieved is.
        let overlap = match shared.standing.is_relieved() {
            true => Overlap::Relieved,
            false if replace => Overlap::Relieves,
            false => Overlap::Able,
        };
        let (connection, keeper) = connect(&shared, generation, overlap)?;
        if replace && keeper.overlap == Overlap::Unable && !start.is_over {
            return Err(MonitorError::OldKeeper { pid: keeper.pid, version: keeper.version });
        }
        shared.standing.set_relieves(keeper.overlap == Overlap::Relieves);
        if !replace {
            start.end();
        }
        generation = Some(keeper.generation);
        let connection = Arc::new(connection);
        shared.connected.store(now_ms(), Ordering::Relaxed);
        *lock(&shared.keeper) = Some(Arc::clone(&connection));
        fill(&shared, &connection);
        serve(&shared, &connection, &mut start)?;
        *lock(&shared.keeper) = None;
        tracing::warn!("the keeper is gone; serving on, and looking for the next one");
    }
}

/// The time until this process serves.
struct Start {
    serves: Option<OwnedFd>,
    is_over: bool,
}

impl Start {
    /// Tells whoever started this process, and systemd, to which another may have been the service's main process until now.
    fn end(&mut self) {
        if !std::mem::replace(&mut self.is_over, true) {
            systemd::tell(NotifyState::MainPid(std::process::id()));
            systemd::tell(NotifyState::Ready);
            // Nobody may want to know any more.
            let _ = self.serves.take().map(|serves| rustix::io::write(&serves, b"serving\n"));
        }
    }
}

fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), MonitorError> {
    let started = std::thread::Builder::new().name(name.into()).spawn(work);
    started.map(drop).map_err(|source| MonitorError::Own { doing: "start a thread", source })
}

fn prepare(config: Config) -> Result<Shared, MonitorError> {
    use locum_kernel::{crash, credentials, notify, signal};
    let own = |doing| move |error: Errno| MonitorError::Own { doing, source: error.into() };
    match notify::sizes_fit() {
        Ok(true) => {}
        Ok(false) => {
            return Err(MonitorError::Notifier("its notifications have outgrown this release".into()));
        }
        Err(error) => return Err(MonitorError::Notifier(error.to_string())),
    }
    let keys = Arc::new(KeyRing::open(&config.keys)?);
    let mut policies: HashMap<String, Policy> =
        locum_policy::builtin().into_iter().map(|policy| (policy.name.clone(), policy)).collect();
    for path in &config.policies {
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|source| MonitorError::PolicyFile { path: path.clone(), source })?;
        let parsed = locum_policy::parse(&path.to_string_lossy(), &text)?;
        policies.extend(parsed.into_iter().map(|policy| (policy.name.clone(), policy)));
    }
    locum_kernel::confine::raise_descriptor_limit();
    credentials::limit_process().map_err(|source| MonitorError::Rights {
        needed: "CAP_SYS_PTRACE, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SYS_CHROOT, CAP_SETUID, CAP_SETGID and CAP_SETPCAP",
        source,
    })?;
    match config.parent.map(locum_kernel::confine::die_with_parent) {
        Some(Ok(false)) => return Err(own("go on without the process that started it")(Errno::SRCH)),
        Some(Err(error)) => return Err(own("tie itself to its parent")(error)),
        _ => {}
    }
    // What every worker will need.
    let worker = std::thread::spawn(|| credentials::Worker::start().map(drop)).join();
    worker.unwrap_or(Err(Errno::IO)).map_err(own("give a worker a root of its own"))?;
    crash::install().map_err(own("handle crashes"))?;
    signal::handle(signal::Restart::No).map_err(own("handle SIGUSR1"))?;
    let open = |path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    Ok(Shared {
        keys,
        policies,
        runtime_dir: config.runtime_dir,
        boot: record::boot_id().map_err(|source| MonitorError::Own { doing: "read the boot id", source })?,
        own_descriptors: open(c"/proc/self/fd").map_err(own("open /proc/self/fd"))?,
        own_root: open(c"/").map_err(own("open /"))?,
        keeper: Mutex::default(),
        sessions: Mutex::default(),
        ending: Mutex::default(),
        connected: AtomicU64::new(0),
        watch: OnceLock::new(),
        standing: Standing::new().map_err(own("get a random number"))?,
    })
}

/// Waits until a keeper takes us.
fn connect(
    shared: &Shared,
    generation: Option<u64>,
    overlap: Overlap,
) -> Result<(Connection, KeeperHello), MonitorError> {
    let mut pause = Duration::from_millis(1);
    loop {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (pid, started) = (std::process::id(), shared.standing.started());
        let hello = Hello { pid, version, generation, overlap, started };
        match Connection::open(&shared.runtime_dir, &hello) {
            Ok((connection, keeper)) => {
                tracing::info!(
                    keeper = keeper.pid,
                    generation = keeper.generation,
                    "connected to the keeper"
                );
                return Ok((connection, keeper));
            }
            Err(error) if error.is_absence() => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Hands a new keeper all that this monitor holds.
fn fill(shared: &Shared, connection: &Connection) {
    for session in shared.sessions() {
        let served: Vec<_> = lock(&session.served).values().cloned().collect();
        for served in served {
            fill_one(connection, &session, &served);
        }
    }
    // What a connection does not take, its end tells.
    let _ = connection.ask();
}

fn fill_one(connection: &Connection, session: &Session, served: &Served) {
    let filled = served
        .parks(session)
        .map_err(ClientError::from)
        .and_then(|parks| connection.fill(&served.delivery, &served.listener, &parks));
    if let Err(error) = filled {
        tracing::warn!(session = session.id, "the keeper was not handed a listener: {error}");
    }
}

/// Takes what the keeper tells, until it is gone.
fn serve(shared: &Arc<Shared>, connection: &Connection, start: &mut Start) -> Result<(), MonitorError> {
    loop {
        match connection.receive() {
            Ok(Event::Lease { delivery, listener, parks }) => {
                shared.standing.stay();
                adopt::adopt(shared, delivery, listener, parks);
            }
            Ok(Event::Ended { listener }) => adopt::end(shared, listener),
            Ok(Event::Told { sessions }) => {
                if shared.standing.relieves() {
                    take_charge(shared, connection, start)?;
                } else if !shared.standing.is_relieved() {
                    lifeline::take_back(shared, connection, &sessions);
                }
            }
            Ok(Event::Relieving) => {
                shared.standing.set_relieves(false);
                // Now it is for us to see what is lost.
                let _ = connection.ask();
            }
            Ok(Event::Relieved) => overlap::retire(shared),
            Ok(Event::Lost) => return Ok(()),
            Err(error) => {
                tracing::warn!("the keeper cannot be understood: {error}");
                return Ok(());
            }
        }
    }
}

/// All that others serve was taken up: relieves them, unless something is missing that they may well serve.
fn take_charge(shared: &Shared, connection: &Connection, start: &mut Start) -> Result<(), MonitorError> {
    let unserved = shared.standing.unserved();
    if !start.is_over && !unserved.is_empty() {
        return Err(MonitorError::Unserved(unserved));
    }
    // Before whoever was the service's main process ends.
    start.end();
    // What a connection does not take, its end tells.
    let _ = connection.relieve();
    Ok(())
}
