//! From a delivery to a session that is served, and its end.

use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use locum_journal::{Journal, JournalError, Seen};
use locum_keeper::client::Park;
use locum_keeper::protocol::{Delivery, Door, ListenerId};
use locum_kernel::Errno;
use locum_kernel::notify::Listener;
use locum_kernel::process::Thread;
use locum_kernel::signal;
use locum_policy::{Metadata, Policy, State, Subject};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::retry_on_intr;

use crate::Shared;
use crate::again;
use crate::lifeline;
use crate::overlap;
use crate::reattach::{ANNOTATION, Told};
use crate::record::{Filters, Process, Record, RecordError, VERSION, pid_namespace};
use crate::session::{Granted, Served, Session, lock};
use crate::worker;

/// Why a session gets nothing: its calls are then made as if locum were not there.
#[derive(Debug, thiserror::Error)]
enum Denied {
    #[error("the runtime's state: {0}")]
    State(#[from] locum_policy::StateError),
    #[error("the profile names no policy: set listenerMetadata to policy=NAME")]
    NoMetadata,
    #[error("listenerMetadata: {0}")]
    Metadata(#[from] locum_policy::MetadataError),
    #[error("there is no policy {0:?}: give its file to the monitor, or use the built-in virtiofsd")]
    NoPolicy(String),
    #[error(transparent)]
    Policy(#[from] locum_policy::PolicyError),
    #[error("uid {uid} may not choose the policy {policy:?}; its `peers` are {peers:?}")]
    Peer { uid: u32, policy: String, peers: Vec<u32> },
    #[error(transparent)]
    Scope(#[from] locum_policy::ScopeError),
}

/// Why a session is not served: its calls wait for a monitor that can read, or write, what belongs to it.
#[derive(Debug, thiserror::Error)]
enum Unserved {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Denied(#[from] Denied),
}

/// Takes on a listener: a session's first, one more, or one that a former monitor served.
pub(crate) fn adopt(shared: &Arc<Shared>, delivery: Delivery, listener: Listener, parks: Vec<Park>) {
    let id = delivery.session.to_string();
    let known = lock(&shared.sessions).get(&id).cloned();
    let session = match known.map_or_else(|| begin(shared, &id, &delivery), Ok) {
        Ok(session) => session,
        Err(error) => {
            tracing::error!(session = id, "not served, its calls wait: {error}");
            return shared.standing.cannot(listener, format!("session {id}: {error}"));
        }
    };
    // Told anew: after a reconnect to the same keeper, or since another monitor that served it is gone.
    let known = lock(&session.served).get(&delivery.listener.0).cloned();
    if let Some(served) = known {
        served.learn(parks, &session);
        overlap::take_over(&session, &served);
        // Whoever was leaving, and stays, has none.
        if lock(&served.watches).is_empty() {
            worker::start(&session, &served, None);
        }
        return;
    }
    let first = State::parse(&delivery.state).ok().and_then(|state| hold(&delivery, state.own_process()?));
    let alone = lock_folder(&shared.folder(&id));
    let seen = Seen::open(&seen_path(shared, &id, delivery.listener)).inspect_err(|error| {
        tracing::error!(session = id, "calls are not safe if the journal is lost: {error}");
    });
    drop(alone);
    let served = Arc::new(Served::new(delivery, listener, first, seen.ok(), parks));
    lock(&session.served).insert(served.id(), Arc::clone(&served));
    overlap::take_over(&session, &served);
    worker::start(&session, &served, None);
    tracing::info!(session = id, listener = format!("{:016x}", served.id()), "serving");
}

/// Lets go of a listener whose last user is gone, and of its session with the last of them.
pub(crate) fn end(shared: &Shared, listener: ListenerId) {
    for session in shared.sessions() {
        let mut all = lock(&session.served);
        let Some(served) = all.remove(&listener.0) else { continue };
        let is_last = all.is_empty();
        drop(all);
        served.ended.store(true, Ordering::Release);
        for watch in lock(&served.watches).iter() {
            let _ = signal::interrupt(watch.tid());
        }
        lifeline::forget(shared, &session.id, listener);
        if shared.standing.is_in_charge() {
            // There may never have been one.
            let _ = std::fs::remove_file(seen_path(shared, &session.id, listener));
        }
        lock(&shared.ending).push(served);
        if is_last {
            lock(&shared.sessions).remove(&session.id);
            // Whoever is in charge may serve it by another listener.
            if shared.standing.is_in_charge()
                && let Err(error) = std::fs::remove_dir_all(shared.folder(&session.id))
            {
                tracing::warn!(session = session.id, "its folder stays behind: {error}");
            }
            tracing::info!(session = session.id, "ended");
        }
        return;
    }
}

fn seen_path(shared: &Shared, session: &str, listener: ListenerId) -> PathBuf {
    shared.folder(session).join(format!("{listener}.seen"))
}

fn begin(shared: &Arc<Shared>, id: &str, delivery: &Delivery) -> Result<Arc<Session>, Unserved> {
    let folder = shared.folder(id);
    let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder);
    made.map_err(|source| JournalError::Open { path: folder.clone(), source })?;
    let failed = |source: Errno| JournalError::Open { path: folder.clone(), source: source.into() };
    let _alone = lock_folder(&folder).map_err(failed)?;
    let path = folder.join("record.json");
    let left = Record::read(&path, &shared.boot)?;
    let is_new = left.is_none();
    let journal = if !is_new && shared.standing.relieves() {
        // Whoever holds the session has the right one.
        Journal::open_existing(&folder.join("journal"))?
    } else {
        open_journal(&folder)?
    };
    journal.join(shared.standing.own()).map_err(failed)?;
    let told = told(delivery);
    if is_new && told.detached {
        let marker = shared.runtime_dir.detached(id);
        std::fs::write(&marker, "").map_err(|source| JournalError::Open { path: marker, source })?;
    }
    let granted = grant(shared, delivery, left, told.filters).inspect_err(|why| {
        tracing::error!(session = id, "nothing is granted, its calls run unhelped: {why}");
    });
    let granted = match granted {
        // Whoever holds the session may well help; without a record, nothing was ever granted.
        Err(why) if !is_new && shared.standing.relieves() => return Err(why.into()),
        granted => granted.ok(),
    };
    if let Some(granted) = &granted {
        let record = lock(&granted.record);
        if is_new {
            record.write(&path)?;
        }
        if granted.key.is_none_or(|key| shared.keys.current().get(key).is_none()) {
            tracing::error!(
                session = id,
                "its key {:?} is not there or not in order: until it is, names get EOPNOTSUPP and opens ESTALE",
                record.key
            );
        }
    }
    let session = Arc::new(Session::new(id.to_owned(), granted, journal, Arc::clone(shared)));
    lock(&shared.sessions).insert(id.to_owned(), Arc::clone(&session));
    Ok(session)
}

/// The session's journal: the one that is there, or a new one if it was lost or cannot be read.
fn open_journal(folder: &Path) -> Result<Arc<Journal>, JournalError> {
    let path = folder.join("journal");
    match Journal::open_existing(&path) {
        Err(JournalError::Open { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            again::doubt_all(folder);
        }
        Err(foreign @ (JournalError::Version { .. } | JournalError::NotAJournal { .. })) => {
            again::doubt_all(folder);
            let kept = folder.join("journal.foreign");
            tracing::error!(
                "{foreign}; it is {} now, and calls in the making are asked again",
                kept.display()
            );
            std::fs::rename(&path, &kept).map_err(|source| JournalError::Open { path: kept, source })?;
        }
        opened => return opened,
    }
    Journal::open(&path)
}

/// What `locum attach` says beside what a runtime says.
fn told(delivery: &Delivery) -> Told {
    let state = State::parse(&delivery.state).ok().filter(|_| matches!(delivery.door, Door::Root));
    let text = state.and_then(|state| state.annotations.get(ANNOTATION).cloned());
    text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

/// Keeps other monitors from changing what is in a session's folder, until the descriptor is closed.
pub(crate) fn lock_folder(folder: &Path) -> Result<OwnedFd, Errno> {
    let folder = rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    retry_on_intr(|| rustix::fs::flock(&folder, FlockOperation::LockExclusive))?;
    Ok(folder)
}

/// What the session may have. `left` is its record, if it was served before.
fn grant(
    shared: &Shared,
    delivery: &Delivery,
    left: Option<Record>,
    filters: Option<Filters>,
) -> Result<Granted, Denied> {
    let state = State::parse(&delivery.state)?;
    let metadata: Metadata = state.metadata.as_deref().ok_or(Denied::NoMetadata)?.parse()?;
    let policy = find_policy(shared, &metadata.policy)?;
    let uid = delivery.peer.uid;
    if !policy.permits_peer(uid) {
        return Err(Denied::Peer { uid, policy: policy.name.clone(), peers: policy.peers.clone() });
    }
    let first = state.first_process().and_then(|pid| hold(delivery, pid));
    let keys = shared.keys.look();
    if let Some(record) = left {
        return Ok(Granted::new(policy, record, first));
    }
    let is_root = matches!(delivery.door, Door::Root);
    let subject = Subject {
        peer_uid: (!is_root).then_some(uid),
        container: &state.container,
        annotations: &state.annotations,
    };
    let record = Record {
        version: VERSION,
        boot: shared.boot.clone(),
        container: state.container.clone(),
        policy: policy.name.clone(),
        scope: policy.scope(&subject)?,
        // With none there, none ever signs for this session.
        key: metadata.key.or_else(|| Some(keys.newest()?.to_string())).unwrap_or_default(),
        user: (!is_root).then_some(uid),
        process: first
            .as_ref()
            .and_then(|first| Some(Process { pid: first.tid(), start_time: first.start_time().ok()? })),
        namespace: pid_namespace().ok(),
        filters,
        exports: Vec::new(),
    };
    Ok(Granted::new(policy, record, first))
}

/// A policy that the monitor was started with, or one in the runtime directory's `policies`.
fn find_policy(shared: &Shared, name: &str) -> Result<Policy, Denied> {
    if let Some(policy) = shared.policies.get(name) {
        return Ok(policy.clone());
    }
    // The name has passed `Metadata`, which takes no separator.
    let path = shared.runtime_dir.policies().join(format!("{name}.toml"));
    let text = std::fs::read_to_string(&path).map_err(|_| Denied::NoPolicy(name.to_owned()))?;
    let parsed = locum_policy::parse(&path.to_string_lossy(), &text)?;
    parsed.into_iter().find(|policy| policy.name == name).ok_or_else(|| Denied::NoPolicy(name.to_owned()))
}

/// A process that the runtime names, if that may be believed: root's word is; a rootless user's only for a process of its
/// own, or in a user namespace that it owns.
fn hold(delivery: &Delivery, pid: u32) -> Option<Thread> {
    let process = Thread::hold(pid).ok()?;
    let believed = match delivery.door {
        Door::Root => true,
        Door::User(_) => {
            let uid = delivery.peer.uid;
            process.status().is_ok_and(|status| status.effective_user == uid)
                || process.namespace_owner().is_ok_and(|owner| owner == uid)
        }
    };
    if !believed {
        tracing::warn!(session = %delivery.session, pid = process.tid(), "the runtime named a process that is not its peer's");
    }
    believed.then_some(process)
}

/// Removes the folders of sessions that ended while no monitor ran: those that the keeper has not told of, and whose first
/// process is gone or of another boot.
pub(crate) fn sweep(shared: &Shared) {
    let Ok(folders) = std::fs::read_dir(shared.runtime_dir.sessions()) else { return };
    for folder in folders.flatten() {
        let is_served = lock(&shared.sessions).contains_key(&*folder.file_name().to_string_lossy());
        if is_served || !is_over(shared, &folder.path().join("record.json")) {
            continue;
        }
        match std::fs::remove_dir_all(folder.path()) {
            Ok(()) => tracing::info!(session = %folder.file_name().display(), "ended while no monitor ran"),
            Err(error) => tracing::warn!("{} stays behind: {error}", folder.path().display()),
        }
    }
}

fn is_over(shared: &Shared, record: &Path) -> bool {
    match Record::read(record, &shared.boot) {
        Ok(Some(Record { process: Some(process), .. })) => {
            let lives = |thread: &Thread| thread.start_time() == Ok(process.start_time);
            !Thread::hold(process.pid).is_ok_and(|thread| lives(&thread))
        }
        // Nothing is known of its processes: a later release may know how to find them.
        Ok(Some(_)) | Err(_) => false,
        // Of another boot, or never begun.
        Ok(None) => true,
    }
}
