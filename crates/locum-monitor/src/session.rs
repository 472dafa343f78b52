//! A workload as locum knows it.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use locum_journal::{Counters, Journal, Seen, Slot};
use locum_keeper::client;
use locum_keeper::protocol::Delivery;
use locum_kernel::Errno;
use locum_kernel::notify::{Listener, Notification};
use locum_kernel::process::Thread;
use locum_kernel::table::Mark;
use locum_policy::Policy;

use crate::Shared;
use crate::audit::Audit;
use crate::caller::{Caller, Callers};
use crate::exact::Stray;
use crate::exports::Export;
use crate::keys::KeyId;
use crate::lifeline::Lifeline;
use crate::park::Park;
use crate::record::{FoundExport, Record};
use crate::watch::Watch;

/// How long a result that could not be delivered is kept, in milliseconds.
pub(crate) const KEPT_MS: u64 = 1000;
/// How many such results a session keeps at most.
const KEPT: usize = 64;

/// What a session may have: nothing, if its policy or peer was not in order.
#[derive(Debug)]
pub(crate) struct Granted {
    pub(crate) policy: Policy,
    /// The key that signs; `None` if the record names none, and then none does.
    pub(crate) key: Option<KeyId>,
    pub(crate) record: Mutex<Record>,
    /// The workload's first process, if the runtime named one that may be believed.
    pub(crate) first: Option<Thread>,
    exports: OnceLock<Vec<Export>>,
}

/// After so many milliseconds without a new worker, those that are too many leave.
const CALM_MS: u64 = 1000;

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: String,
    pub(crate) granted: Option<Granted>,
    pub(crate) journal: Arc<Journal>,
    pub(crate) counters: Counters,
    pub(crate) callers: Callers,
    pub(crate) audit: Audit,
    pub(crate) workers: AtomicUsize,
    pub(crate) shared: Arc<Shared>,
    /// Listener ids that are or were served here; a slot of any other is stale.
    pub(crate) served: Mutex<HashMap<u64, Arc<Served>>>,
    undelivered: Mutex<Vec<Undelivered>>,
    strays: Mutex<Vec<Stray>>,
    orphans: Mutex<Vec<Orphan>>,
    /// Whether its calls run unhelped, since somebody wished so.
    pub(crate) detached: AtomicBool,
}

/// One listener of a session.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) delivery: Delivery,
    pub(crate) listener: Listener,
    /// Workers that wait for a call.
    pub(crate) idle: AtomicUsize,
    pub(crate) ended: AtomicBool,
    /// Whether every worker has been at its call for longer than the deadline.
    pub(crate) overwhelmed: AtomicBool,
    /// Whether one more than the limit stands by.
    pub(crate) has_reserve: AtomicBool,
    /// When the last worker was added, in milliseconds since boot.
    pub(crate) grown: AtomicU64,
    pub(crate) watches: Mutex<Vec<Arc<Watch>>>,
    pub(crate) lifeline: Lifeline,
    /// Which calls were received; `None` if that cannot be noted.
    pub(crate) seen: Option<Seen>,
    /// Whether another monitor may be at its calls, or have left some.
    pub(crate) is_shared: AtomicBool,
    /// Whether what others left is being taken over, and not all of it is known yet.
    pub(crate) is_adopting: AtomicBool,
    /// Since when there is none, in milliseconds since boot; 0: there is one.
    pub(crate) alone_since: AtomicU64,
    parks: Mutex<HashMap<u32, Arc<Park>>>,
}

/// A result whose call was withdrawn before it could be delivered.
#[derive(Debug)]
pub(crate) struct Undelivered {
    pub(crate) slot: Slot,
    /// Where the file waits, if it was parked.
    pub(crate) park: Option<Arc<Park>>,
    pub(crate) file: OwnedFd,
    pub(crate) call: Notification,
    pub(crate) caller_started: u64,
    /// Its number in the caller's table, if it is there.
    pub(crate) descriptor: Option<RawFd>,
    /// In milliseconds since boot.
    pub(crate) since: u64,
}

/// A file in a caller's table, by a monitor that died, of which no slot tells.
#[derive(Debug)]
struct Orphan {
    process: u32,
    /// Its number there.
    number: RawFd,
    file: OwnedFd,
    /// When it was found, in milliseconds since boot.
    since: u64,
}

impl Undelivered {
    /// Forgets it, everywhere.
    pub(crate) fn settle(&self) {
        self.slot.settle();
        self.park.iter().for_each(|park| park.clear());
    }

    fn is_for(&self, call: &Notification, caller: &Caller) -> bool {
        let known = &self.call;
        (known.tid, self.caller_started) == (call.tid, caller.started)
            && known.instruction_pointer == call.instruction_pointer
            && (known.nr, known.args) == (call.nr, call.args)
    }
}

impl Granted {
    pub(crate) fn new(policy: Policy, record: Record, first: Option<Thread>) -> Self {
        let key = record.key.parse().ok();
        Self { policy, key, record: Mutex::new(record), first, exports: OnceLock::new() }
    }

    /// The session's exports. They are looked for once: in the workload's first process, or, if none is known, as its first
    /// caller sees them.
    pub(crate) fn exports(&self, session: &Session, caller: &Caller) -> &[Export] {
        self.exports.get_or_init(|| self.find_exports(session, self.first.as_ref().unwrap_or(&caller.thread)))
    }

    /// Looks for the exports now if the workload's first process is known.
    pub(crate) fn find_now(&self, session: &Session) {
        if let Some(first) = &self.first {
            self.exports.get_or_init(|| self.find_exports(session, first));
        }
    }

    fn find_exports(&self, session: &Session, of: &Thread) -> Vec<Export> {
        let mut record = lock(&self.record);
        let mut found = Vec::new();
        for path in &self.policy.exports {
            let before = record.exports.iter().find(|known| known.path == *path).map(|known| known.mount);
            match Export::find(path, of, before, &session.shared.keys, self.key, &record.scope) {
                Ok(export) => found.push(export),
                Err(error) => tracing::warn!(
                    session = session.id,
                    export = path,
                    "not an export: {error}; files there get EOPNOTSUPP and ESTALE"
                ),
            }
        }
        let exports: Vec<_> = found
            .iter()
            .map(|export| FoundExport { path: export.path.clone(), mount: export.unique })
            .collect();
        if !exports.is_empty() && exports != record.exports {
            record.exports = exports;
            if let Err(error) = record.write(&session.shared.folder(&session.id).join("record.json")) {
                tracing::error!(session = session.id, "{error}");
            }
        }
        found
    }
}

impl Session {
    pub(crate) fn new(
        id: String,
        granted: Option<Granted>,
        journal: Arc<Journal>,
        shared: Arc<Shared>,
    ) -> Self {
        let session = Self {
            id,
            granted,
            counters: Counters::of(&journal),
            journal,
            callers: Callers::default(),
            audit: Audit::default(),
            workers: AtomicUsize::new(0),
            shared,
            served: Mutex::default(),
            undelivered: Mutex::default(),
            strays: Mutex::default(),
            orphans: Mutex::default(),
            detached: AtomicBool::new(false),
        };
        session.look_for_wish();
        if let Some(granted) = &session.granted {
            granted.find_now(&session);
        }
        session
    }

    /// Looks whether its calls are to run unhelped.
    pub(crate) fn look_for_wish(&self) {
        let wish = self.shared.runtime_dir.detached(&self.id).exists();
        if self.detached.swap(wish, Ordering::Relaxed) != wish {
            tracing::info!(session = self.id, "{}", if wish { "detached" } else { "attached again" });
        }
    }

    /// A free slot, for calls of `served`. Slots of listeners that this monitor does not serve are free once it has been told of
    /// all that live.
    pub(crate) fn take_slot(&self, served: &Served) -> Option<Slot> {
        let knows_all = self.shared.standing.is_in_charge() && self.shared.settled_in();
        let all = lock(&self.served);
        let slot = Slot::take(&self.journal, |listener| knows_all && !all.contains_key(&listener))?;
        // Another monitor may have had the slot meanwhile, with a park of its own, and the keeper holds that one.
        lock(&served.parks).remove(&slot.index());
        Some(slot)
    }

    /// Keeps a result for the thread whose call was withdrawn.
    pub(crate) fn keep(&self, result: Undelivered) {
        let mut kept = lock(&self.undelivered);
        if kept.len() >= KEPT {
            kept.remove(0).settle();
        }
        kept.push(result);
    }

    /// Takes the result that was kept for this very call, if `fits` agrees.
    pub(crate) fn kept_for(
        &self,
        call: &Notification,
        caller: &Caller,
        fits: impl Fn(&OwnedFd) -> bool,
    ) -> Option<Undelivered> {
        let mut kept = lock(&self.undelivered);
        let index = kept.iter().position(|result| result.is_for(call, caller) && fits(&result.file))?;
        Some(kept.swap_remove(index))
    }

    /// Whether some result already stands for `descriptor` of the thread `tid`.
    pub(crate) fn stands_for(&self, tid: u32, descriptor: RawFd) -> bool {
        lock(&self.undelivered)
            .iter()
            .any(|result| (result.call.tid, result.descriptor) == (tid, Some(descriptor)))
    }

    /// Whether `mount` is an export. Whatever `caller` is handed was opened on one; to copy anything else that it has, and to close
    /// it again, may have a FUSE server asked.
    pub(crate) fn exports_on(&self, caller: &Caller, mount: u64) -> bool {
        let exports = self.granted.as_ref().map(|granted| granted.exports(self, caller));
        exports.into_iter().flatten().any(|export| export.mount == mount)
    }

    /// Looks for orphans in the table of `caller`, before any of its calls is made anew. What has the mark of a slot with a call is none.
    pub(crate) fn find_orphans(&self, caller: &Caller) {
        let marked = caller.thread.marked_files(|mount| self.exports_on(caller, mount));
        let mut orphans = lock(&self.orphans);
        let (since, process) = (now_ms(), caller.process());
        for (number, file, mark) in marked.unwrap_or_default() {
            let is_known = orphans.iter().any(|known| (known.process, known.number) == (process, number));
            if !is_known
                && !Slot::any_has_call(&self.journal, |index| Mark::new(index) == mark)
                // A worker that has settled its slot since the search took the mark off before that.
                && Mark::of(file.as_fd()) == Some(mark)
            {
                orphans.push(Orphan { process, number, file, since });
            }
        }
    }

    /// Takes an orphan in the table of `caller` that is the same file as `like` and opened in the same way.
    pub(crate) fn orphan(
        &self,
        caller: &Caller,
        like: &OwnedFd,
        close_on_exec: bool,
    ) -> Option<(RawFd, OwnedFd)> {
        let mut orphans = lock(&self.orphans);
        let index = orphans.iter().position(|orphan| {
            let Orphan { process, number, file, .. } = orphan;
            *process == caller.process()
                && caller.thread.is_opened_like(*number, file, like.as_fd(), close_on_exec)
                && caller.thread.has(*number, file.as_fd()) == Ok(true)
        })?;
        let Orphan { number, file, .. } = orphans.swap_remove(index);
        Some((number, file))
    }

    /// Keeps a stray until it can be put to use.
    pub(crate) fn keep_stray(&self, stray: Stray) {
        let mut strays = lock(&self.strays);
        if strays.len() >= KEPT {
            strays.remove(0).settle();
        }
        strays.push(stray);
    }

    /// Takes a stray that `caller` has in its table and that is good for its call.
    pub(crate) fn stray(&self, caller: &Caller) -> Option<Stray> {
        let mut strays = lock(&self.strays);
        // First the one that nothing but this try remembers.
        strays.sort_by_key(Stray::is_remembered);
        while let Some(index) = strays.iter().position(|stray| stray.is_for(caller)) {
            let stray = strays.remove(index);
            if stray.is_with(caller) {
                return Some(stray);
            }
            stray.settle();
        }
        None
    }

    /// Takes a stray of `caller` that no slot remembers.
    pub(crate) fn forgotten_stray(&self, caller: &Caller) -> Option<Stray> {
        let mut strays = lock(&self.strays);
        let index = strays.iter().position(|stray| !stray.is_remembered() && stray.is_for(caller))?;
        Some(strays.swap_remove(index))
    }

    /// Forgets the results and orphans whose time is over, and strays of processes that are gone.
    pub(crate) fn expire(&self, now: u64) {
        lock(&self.orphans).retain(|orphan| now.saturating_sub(orphan.since) < KEPT_MS);
        lock(&self.strays).retain(|stray| {
            let keep = stray.lasts();
            if !keep {
                stray.settle();
            }
            keep
        });
        lock(&self.undelivered).retain(|result| {
            let keep = now.saturating_sub(result.since) < KEPT_MS;
            if !keep {
                result.settle();
            }
            keep
        });
    }
}

impl Served {
    /// `first` is the process with which its filter began, if that is known.
    pub(crate) fn new(
        delivery: Delivery,
        listener: Listener,
        first: Option<Thread>,
        seen: Option<Seen>,
        parks: Vec<client::Park>,
    ) -> Self {
        // Not on kernels before 6.6, where answers are slower and nothing else differs.
        let _ = listener.wake_synchronously();
        let parks = parks.into_iter().map(known).collect();
        Self {
            delivery,
            listener,
            idle: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            overwhelmed: AtomicBool::new(false),
            has_reserve: AtomicBool::new(false),
            grown: AtomicU64::new(0),
            watches: Mutex::default(),
            lifeline: Lifeline::new(first),
            seen,
            is_shared: AtomicBool::new(true),
            is_adopting: AtomicBool::new(false),
            alone_since: AtomicU64::new(0),
            parks: Mutex::new(parks),
        }
    }

    /// The listener's id, as slots carry it.
    pub(crate) fn id(&self) -> u64 {
        self.delivery.listener.0
    }

    /// Whether the workers that are too many may leave: none was added of late.
    pub(crate) fn is_calm(&self) -> bool {
        now_ms().saturating_sub(self.grown.load(Ordering::Relaxed)) > CALM_MS
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The park of `slot`, if there is one.
    pub(crate) fn known_park(&self, slot: u32) -> Option<Arc<Park>> {
        lock(&self.parks).get(&slot).cloned()
    }

    /// The park of `slot`, made and shown to the keeper when it is first needed.
    pub(crate) fn park(&self, slot: u32, shared: &Shared) -> Result<Arc<Park>, Errno> {
        let mut parks = lock(&self.parks);
        if let Some(park) = parks.get(&slot) {
            return Ok(Arc::clone(park));
        }
        let park = Arc::new(Park::new()?);
        shared.show_park(self, slot, &park);
        parks.insert(slot, Arc::clone(&park));
        Ok(park)
    }

    /// Closes what waits in the parks of those slots.
    pub(crate) fn clear_parks(&self, of: impl Fn(u32) -> bool) {
        lock(&self.parks).iter().filter(|(slot, _)| of(**slot)).for_each(|(_, park)| park.clear());
    }

    /// Learns what others parked. Of its own slots it knows better.
    pub(crate) fn learn(&self, parks: Vec<client::Park>, session: &Session) {
        let others = parks.into_iter().filter(|park| !session.journal.is_ours(park.slot));
        lock(&self.parks).extend(others.map(known));
    }

    /// The parks of its own slots, as copies for a keeper.
    pub(crate) fn parks(&self, session: &Session) -> std::io::Result<Vec<client::Park>> {
        let parks = lock(&self.parks);
        let own = parks.iter().filter(|(slot, _)| session.journal.is_ours(**slot));
        own.map(|(slot, park)| copy(*slot, park)).collect()
    }
}

fn known(park: client::Park) -> (u32, Arc<Park>) {
    (park.slot, Arc::new(Park::of(park.near, park.far)))
}

pub(crate) fn copy(slot: u32, park: &Park) -> std::io::Result<client::Park> {
    let (near, far) = park.ends();
    Ok(client::Park { slot, near: near.try_clone_to_owned()?, far: far.try_clone_to_owned()? })
}

/// Every lock here guards data that is whole after each statement, so a panic of another holder spoils nothing.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Milliseconds since boot, the same for every process.
pub(crate) fn now_ms() -> u64 {
    now_ns() / 1_000_000
}

/// The same in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
