//! A copy of each listener in the workload itself: when everything of locum is lost at once, callers wait, and the next
//! monitor takes the listener back from there.
//!
//! Whoever holds a listener can answer the calls of every process under its filter. So a lifeline is put only into a process
//! that has the ids of the process with which the filter began, and only if neither could ever change them: then no process
//! under the filter has more rights than the holder, nor can the holder's children ever have fewer. That they cannot now is not
//! enough: a first process may have left others behind before it gave its rights up. But what gives them up keeps its
//! bounding set.

use std::fs;
use std::os::fd::{AsFd as _, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use locum_keeper::client::Connection;
use locum_keeper::protocol::{Delivery, ListenerId, SessionId};
use locum_kernel::Errno;
use locum_kernel::fault::die_at;
use locum_kernel::notify::{Listener, Notification};
use locum_kernel::process::{Status, Thread};
use serde::{Deserialize, Serialize};

use crate::caller::Caller;
use crate::record::{Process, write_whole};
use crate::session::{Served, Session, lock, now_ms};
use crate::{Shared, adopt, fill_one, reattach};

/// The version of what is kept on disk of a lifeline.
const VERSION: u32 = 1;
/// How often it is looked at, while there are calls: so long may a process be without one that closed it, or executed another program.
const LOOK_MS: u64 = 10;
/// Numbers are taken below this: the kernel's table of a process is as large as its highest number.
const HIGHEST: RawFd = 4096;
/// How many numbers are tried.
const TRIES: usize = 16;

/// Where a listener is to be found again. Written before it is put there, readable by root alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    /// [`VERSION`].
    version: u32,
    /// The boot in which it was put there.
    boot: String,
    /// All that the keeper knew of the listener.
    delivery: Delivery,
    /// Who has it.
    process: Process,
    /// Its number there.
    descriptor: RawFd,
}

/// The lifeline of one listener.
#[derive(Debug)]
pub(crate) struct Lifeline {
    /// The process with which the filter began, if the runtime named one that may be believed.
    first: Option<Thread>,
    /// When it was last looked at, in milliseconds since boot.
    looked: AtomicU64,
    holder: Mutex<Option<(Thread, RawFd)>>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
enum Without {
    #[error("the runtime named no first process of this filter that may be believed")]
    NoFirst,
    #[error(
        "the caller, or the filter's first process, can change its ids or may once have been able to, or they differ"
    )]
    Ids,
    #[error("no number is free between {0} and {1}")]
    NoNumber(RawFd, RawFd),
    #[error("its record: {0}")]
    Record(#[from] std::io::Error),
    #[error(transparent)]
    Foreign(#[from] Foreign),
    #[error(transparent)]
    Kernel(#[from] Errno),
}

/// What stands on disk is not what this release writes there.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} is not a lifeline's record of version {VERSION} for this session: {found}; it was left untouched"
)]
struct Foreign {
    path: PathBuf,
    found: String,
}

impl Lifeline {
    pub(crate) fn new(first: Option<Thread>) -> Self {
        Self { first, looked: AtomicU64::new(0), holder: Mutex::default() }
    }

    /// Sees to it that the workload of `caller`, which waits for `call`, holds a copy of the listener. The first look is waited
    /// for: no call is answered before there is a lifeline, if there can be one.
    pub(crate) fn keep(&self, session: &Session, served: &Served, call: &Notification, caller: &Caller) {
        let (now, looked) = (now_ms(), self.looked.load(Ordering::Acquire));
        if now.saturating_sub(looked) < LOOK_MS {
            return;
        }
        let is_first_look = looked == 0;
        let mut holder = match self.holder.try_lock() {
            Ok(holder) => holder,
            Err(_) if is_first_look => lock(&self.holder),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if is_first_look && self.looked.load(Ordering::Acquire) != 0 {
            return;
        }
        self.look(&mut holder, is_first_look, session, served, (call, caller));
        self.looked.store(now, Ordering::Release);
    }

    fn look(
        &self,
        holder: &mut Option<(Thread, RawFd)>,
        is_first_look: bool,
        session: &Session,
        served: &Served,
        (call, caller): (&Notification, &Caller),
    ) {
        if !session.granted.as_ref().is_some_and(|granted| granted.policy.lifeline) {
            return;
        }
        if is_first_look {
            // One that a former monitor put there.
            let path = path(&session.shared, &session.id, served.delivery.listener);
            *holder = held(&path, &session.id).ok().flatten();
        }
        let ours = served.listener.as_fd();
        // What is found there is the listener, whoever has the process's id by now.
        if holder.as_ref().is_some_and(|(thread, number)| thread.has(*number, ours) == Ok(true)) {
            return;
        }
        let first = self.first.as_ref().ok_or(Without::NoFirst);
        match first.and_then(|first| put(session, served, call, caller, first)) {
            Ok(put) => *holder = Some(put),
            Err(why) if is_first_look => {
                tracing::warn!(
                    session = session.id,
                    listener = %served.delivery.listener,
                    "no lifeline, if keeper and monitor are lost at once this workload's calls fail: {why}"
                );
            }
            Err(why) => tracing::debug!(session = session.id, "no lifeline: {why}"),
        }
    }
}

fn put(
    session: &Session,
    served: &Served,
    call: &Notification,
    caller: &Caller,
    first: &Thread,
) -> Result<(Thread, RawFd), Without> {
    let (own, its) = (first.status()?, caller.thread.status()?);
    let is_fixed = |status: &Status| status.ids_fixed && status.is_bounded;
    if !is_fixed(&own) || !is_fixed(&its) || own.ids != its.ids {
        return Err(Without::Ids);
    }
    let path = path(&session.shared, &session.id, served.delivery.listener);
    let _alone = adopt::lock_folder(&session.shared.folder(&session.id))?;
    if let Some(there) = held(&path, &session.id)?
        && there.0.has(there.1, served.listener.as_fd()) == Ok(true)
    {
        // Another monitor put it there meanwhile.
        return Ok(there);
    }
    // Its leader outlives it as an entry in /proc, so it is the process that is written down.
    let process = Thread::hold(its.process)?;
    let number = free_number(&caller.thread)?;
    let held = Held {
        version: VERSION,
        boot: session.shared.boot.clone(),
        delivery: served.delivery.clone(),
        process: Process { pid: its.process, start_time: process.start_time()? },
        descriptor: number,
    };
    write_whole(&held, &path)?;
    served.listener.add_descriptor_at(call.id, served.listener.as_fd(), number)?;
    tracing::info!(session = session.id, pid = its.process, descriptor = number, "a lifeline was put");
    Ok((process, number))
}

/// A high number that is free. Remaining race: another thread of the caller's takes this very one, of a thousand, between the
/// look and the use.
fn free_number(caller: &Thread) -> Result<RawFd, Without> {
    let limit = caller.descriptor_limit()?.min(HIGHEST);
    let lowest = limit / 4 * 3;
    let span = limit - lowest;
    for _ in 0..TRIES {
        let mut random = [0; 2];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let number = lowest + RawFd::from(u16::from_ne_bytes(random)).checked_rem(span).unwrap_or(0);
        match caller.descriptor(number) {
            Err(Errno::BADF) => return Ok(number),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Without::NoNumber(lowest, limit))
}

fn path(shared: &Shared, session: &str, listener: ListenerId) -> PathBuf {
    shared.folder(session).join(format!("{listener}.lifeline"))
}

/// What is written down at `path` for `session`, if anything is.
fn read(path: &Path, session: &str) -> Result<Option<Held>, Foreign> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let Ok(text) = fs::read(path) else { return Ok(None) };
    let foreign = |found: String| Foreign { path: path.to_owned(), found };
    let Head { version } = serde_json::from_slice(&text).map_err(|error| foreign(error.to_string()))?;
    if version != VERSION {
        return Err(foreign(format!("its version is {version}")));
    }
    let held: Held = serde_json::from_slice(&text).map_err(|error| foreign(error.to_string()))?;
    // The folder's name is the session's; a record that says otherwise was not written by us.
    let named = held.delivery.session.to_string();
    if named == session { Ok(Some(held)) } else { Err(foreign(format!("it names the session {named}"))) }
}

/// Who is written down at `path` to hold the lifeline, if he lives, and its number there.
fn held(path: &Path, session: &str) -> Result<Option<(Thread, RawFd)>, Foreign> {
    let held = read(path, session)?;
    Ok(held.and_then(|held| Some((Thread::hold(held.process.pid).ok()?, held.descriptor))))
}

/// Forgets the lifeline of a listener that has ended.
pub(crate) fn forget(shared: &Shared, session: &str, listener: ListenerId) {
    // There may never have been one.
    let _ = fs::remove_file(path(shared, session, listener));
}

/// Takes back every listener that nobody has, and hands it to the keeper. What it holds of a session, this monitor was told before;
/// those of `known` that it was not told of are another monitor's.
pub(crate) fn take_back(shared: &Arc<Shared>, connection: &Connection, known: &[SessionId]) {
    let Ok(folders) = fs::read_dir(shared.runtime_dir.sessions()) else { return };
    let mut lost = Vec::new();
    for folder in folders.flatten() {
        let id = folder.file_name().to_string_lossy().into_owned();
        let session = lock(&shared.sessions).get(&id).cloned();
        if session.is_none() && known.iter().any(|known| known.to_string() == id) {
            continue;
        }
        let served: Vec<u64> = session
            .iter()
            .flat_map(|session| lock(&session.served).keys().copied().collect::<Vec<_>>())
            .collect();
        let Ok(files) = fs::read_dir(folder.path()) else { continue };
        let paths = files.flatten().map(|file| file.path());
        for path in paths.filter(|path| path.extension().is_some_and(|end| end == "lifeline")) {
            let held = match read(&path, &id) {
                // Nothing of another boot lives.
                Ok(held) => held
                    .filter(|held| held.boot == shared.boot && !served.contains(&held.delivery.listener.0)),
                Err(foreign) => {
                    tracing::error!(session = id, "{foreign}");
                    None
                }
            };
            let Some(held) = held else { continue };
            match listener_of(&held) {
                Ok(listener) => {
                    tracing::info!(
                        session = id,
                        pid = held.process.pid,
                        "the listener was taken back from its workload"
                    );
                    adopt::adopt(shared, held.delivery.clone(), listener, Vec::new());
                    hand_to_keeper(shared, connection, &held.delivery);
                    die_at(41);
                }
                Err(error) => tracing::warn!(
                    session = id,
                    pid = held.process.pid,
                    "{}: the listener cannot be taken back from the workload: {error}",
                    path.display()
                ),
            }
        }
        if !lock(&shared.sessions).contains_key(&id) {
            lost.push(id);
        }
    }
    reattach::begin(shared, &lost);
}

fn hand_to_keeper(shared: &Shared, connection: &Connection, delivery: &Delivery) {
    let session = lock(&shared.sessions).get(&delivery.session.to_string()).cloned();
    let Some(session) = session else { return };
    let served = lock(&session.served).get(&delivery.listener.0).cloned();
    if let Some(served) = served {
        fill_one(connection, &session, &served);
        session.counters.reattached().fetch_add(1, Ordering::Relaxed);
    }
}

/// The listener where the record says that it is.
fn listener_of(held: &Held) -> Result<Listener, Box<dyn std::error::Error>> {
    let process = Thread::hold(held.process.pid)?;
    if process.start_time()? != held.process.start_time {
        return Err(Errno::SRCH.into());
    }
    Ok(Listener::try_from(process.descriptor(held.descriptor)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_0_1_0_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1122334455667788.lifeline");
        fs::write(&path, include_str!("frozen/0.1.0/lifeline.json")).unwrap();
        let held = read(&path, "virt-launcher-1f2e3d4c").unwrap().unwrap();
        assert_eq!(held.boot, "0b5e7a6c-1111-2222-3333-444455556666");
        assert_eq!(held.process, Process { pid: 4711, start_time: 987_654 });
        assert_eq!(held.descriptor, 3801);
        assert_eq!(held.delivery.listener.to_string(), "1122334455667788");
        assert_eq!(held.delivery.sequence, 3);
        assert!(held.delivery.state.contains("policy=virtiofsd"));
    }
}
