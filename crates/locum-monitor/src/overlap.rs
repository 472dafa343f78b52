//! Two monitors at once, during an upgrade. The new one serves everything beside the old one, each in slots of its own. If it
//! can, the keeper has the old one leave: it receives no more, finishes what it has, and ends. What it leaves behind is taken
//! over by the new one like anything that a dead monitor left.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use locum_journal::Slot;
use locum_kernel::Errno;
use locum_kernel::notify::{Listener, Notification};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::session::{Served, Session, lock, now_ms, now_ns};
use crate::{Shared, again, recovery};

/// So long a monitor that was relieved may take for what it has, in milliseconds.
const GRACE_MS: u64 = 5000;
/// After so many milliseconds without any other that works with a journal, it is not waited any longer for the keeper to tell
/// what that one parked.
const PATIENCE_MS: u64 = 200;
/// So long a session may take to end, in milliseconds, after the first that belongs to it is gone.
const ENDING_MS: u64 = 1000;
/// How often it is looked whether another monitor is done with a thread's earlier call.
const LOOK: Duration = Duration::from_micros(50);

/// How this monitor stands to others.
#[derive(Debug)]
pub(crate) struct Standing {
    /// Names this process in journals.
    own: u64,
    /// When it started, in nanoseconds since boot.
    started: u64,
    /// It has come to relieve others, and has not yet.
    relieves: AtomicBool,
    /// Since when it is relieved, in milliseconds since boot; 0: it is not.
    relieved: AtomicU64,
    /// What it could not serve of what others do, and why.
    unserved: Mutex<Vec<(Listener, String)>>,
}

impl Standing {
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut own = [0; 8];
        getrandom(&mut own, GetRandomFlags::empty())?;
        Ok(Self {
            // Never 0, which is nobody.
            own: u64::from_ne_bytes(own) | 1,
            started: now_ns(),
            relieves: AtomicBool::new(false),
            relieved: AtomicU64::new(0),
            unserved: Mutex::default(),
        })
    }

    pub(crate) fn own(&self) -> u64 {
        self.own
    }

    pub(crate) fn started(&self) -> u64 {
        self.started
    }

    /// Whether others still hold what it serves: what belongs to a session is theirs to tend.
    pub(crate) fn relieves(&self) -> bool {
        self.relieves.load(Ordering::Acquire)
    }

    pub(crate) fn set_relieves(&self, relieves: bool) {
        self.relieves.store(relieves, Ordering::Release);
    }

    /// Whether it is to leave.
    pub(crate) fn is_relieved(&self) -> bool {
        self.relieved.load(Ordering::Acquire) != 0
    }

    /// Whether the sessions are its own to tend: nobody else does.
    pub(crate) fn is_in_charge(&self) -> bool {
        !self.relieves() && !self.is_relieved()
    }

    /// It is needed after all.
    pub(crate) fn stay(&self) {
        self.relieved.store(0, Ordering::Release);
    }

    /// Notes why it does not serve what another monitor may well serve.
    pub(crate) fn cannot(&self, listener: Listener, why: String) {
        if self.relieves() {
            lock(&self.unserved).push((listener, why));
        }
    }

    /// All such notes. A session that is just ending takes what belongs to it along, and is missed by nobody.
    pub(crate) fn unserved(&self) -> Vec<String> {
        let unserved = std::mem::take(&mut *lock(&self.unserved));
        let until = now_ms() + ENDING_MS;
        let lasts = |(listener, why): (Listener, String)| {
            while !listener.has_ended() {
                if now_ms() > until {
                    return Some(why);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            None
        };
        unserved.into_iter().filter_map(lasts).collect()
    }
}

/// Receives no more.
pub(crate) fn retire(shared: &Shared) {
    shared.standing.relieved.store(now_ms(), Ordering::Release);
    tracing::info!("relieved by another monitor; finishing what is in the making");
    // It takes workers that wait for calls out of their wait.
    shared.watch.get().inspect(|watch| watch.unpark());
}

/// Whether this monitor was relieved and has nothing left to do, or no time.
pub(crate) fn is_done(shared: &Shared) -> bool {
    let since = shared.standing.relieved.load(Ordering::Acquire);
    let works = |session: &Arc<Session>| session.workers.load(Ordering::Acquire) > 0;
    since != 0 && (now_ms().saturating_sub(since) > GRACE_MS || !shared.sessions().iter().any(works))
}

impl Session {
    /// Whether no other monitor works with the journal. If one did, its calls are to be taken over before anything else is
    /// believed about them.
    fn is_alone(&self) -> bool {
        if !self.journal.is_last(self.shared.standing.own) {
            lock(&self.served).values().for_each(|served| served.is_shared.store(true, Ordering::Release));
        }
        self.journal.is_alone(self.shared.standing.own).unwrap_or_else(|error| {
            tracing::error!(session = self.id, "cannot tell who works with the journal: {error}");
            false
        })
    }
}

/// Takes over what other monitors left of `served`, and minds them no longer if none is there.
pub(crate) fn take_over(session: &Arc<Session>, served: &Arc<Served>) {
    let alone = session.is_alone();
    if alone && lock(&served.watches).is_empty() {
        again::begin(session, served);
    } else if alone && served.is_shared.load(Ordering::Acquire) {
        again::go_on(session, served);
    }
    served.is_adopting.store(true, Ordering::SeqCst);
    recovery::adopt(session, served);
    served.is_adopting.store(false, Ordering::SeqCst);
    if alone {
        served.is_shared.store(false, Ordering::Release);
    }
}

/// Takes over what was left by a monitor of whose end the keeper did not tell.
pub(crate) fn look(session: &Arc<Session>, served: &Arc<Served>, now: u64) {
    if !is_shared(session, served) || session.shared.standing.is_relieved() {
        return;
    }
    if !session.is_alone() {
        return served.alone_since.store(0, Ordering::Relaxed);
    }
    match served.alone_since.load(Ordering::Relaxed) {
        0 => served.alone_since.store(now, Ordering::Relaxed),
        since if now.saturating_sub(since) > PATIENCE_MS => take_over(session, served),
        _ => {}
    }
}

/// Whether another monitor may be at calls of `served`, or have left some.
fn is_shared(session: &Session, served: &Served) -> bool {
    served.is_shared.load(Ordering::Acquire) || !session.journal.is_last(session.shared.standing.own)
}

/// Waits until no other monitor is about an earlier call of the same thread. False: `call` was withdrawn meanwhile.
///
/// The slot of the earlier call says so since before the later one was made; of two that wait for each other, one was
/// withdrawn.
pub(crate) fn await_turn(session: &Session, served: &Served, call: &Notification) -> bool {
    // Threads that cannot be seen from here all have the id 0.
    while call.tid != 0
        && is_shared(session, served)
        && (Slot::others_have(&session.journal, served.id(), call.tid)
            // What they had may be ours by now, and not kept yet for this very call.
            || served.is_adopting.load(Ordering::SeqCst))
    {
        if !served.listener.still_waits(call.id) {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}
