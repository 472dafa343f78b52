//! Nobody waits for ever: one thread looks at what every worker is about, and answers for those that take too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use locum_keeper::systemd::Heartbeat;
use locum_kernel::notify::{Answer, CallId};
use locum_kernel::{Errno, signal};

use crate::Shared;
use crate::adopt;
use crate::answer::Post;
use crate::overlap;
use crate::session::{Served, Session, lock, now_ms};
use crate::worker;

/// How often it looks while calls are in the making: so long may a slow call delay others.
const TICK: Duration = Duration::from_millis(5);
/// How often it looks when there are none.
const QUIET_TICK: Duration = Duration::from_millis(50);
/// After so many milliseconds it is asked whether the caller still waits, so that a worker does not block for a dead one.
const PATIENCE_MS: u64 = 100;

/// What one worker is about.
#[derive(Debug)]
pub(crate) struct Watch {
    tid: u32,
    /// Whether it is the one that stands by when all others are late.
    reserve: bool,
    /// When its call began, in milliseconds since boot; 0 if it has none.
    since: AtomicU64,
    call: AtomicU64,
    /// Whether its call has its answer, and only tidying up is left.
    answered: AtomicBool,
}

impl Watch {
    pub(crate) fn of_this_thread(reserve: bool) -> Self {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        Self {
            tid,
            reserve,
            since: AtomicU64::new(0),
            call: AtomicU64::new(0),
            answered: AtomicBool::new(false),
        }
    }

    pub(crate) fn tid(&self) -> u32 {
        self.tid
    }

    pub(crate) fn begin(&self, call: CallId) {
        self.call.store(call.0, Ordering::Relaxed);
        self.answered.store(false, Ordering::Relaxed);
        self.since.store(now_ms(), Ordering::Release);
    }

    pub(crate) fn answered(&self) {
        self.answered.store(true, Ordering::Release);
    }

    pub(crate) fn end(&self) {
        self.since.store(0, Ordering::Release);
    }

    /// The call that it is about, and for how many milliseconds.
    fn busy(&self, now: u64) -> Option<(CallId, u64)> {
        let since = self.since.load(Ordering::Acquire);
        (since != 0).then(|| (CallId(self.call.load(Ordering::Relaxed)), now.saturating_sub(since)))
    }
}

/// Whether a call waits that none of the workers will receive at once: all are, before and after, about the same others.
pub(crate) fn is_short(served: &Served) -> bool {
    let tick = u64::try_from(TICK.as_millis()).unwrap_or(u64::MAX);
    let now = now_ms();
    let about = || {
        let watches = lock(&served.watches);
        let workers = watches.iter().filter(|watch| !watch.reserve);
        let calls = workers.map(|watch| {
            let (call, lasted) = watch.busy(now)?;
            (!watch.answered.load(Ordering::Acquire) || lasted >= tick).then_some(call)
        });
        calls.collect::<Option<Vec<_>>>()
    };
    let before = about();
    before.is_some() && served.listener.is_queued() && before == about()
}

/// Looks after all sessions, for ever.
pub(crate) fn run(shared: &Shared) {
    let (mut busy, mut swept) = (false, false);
    let mut heartbeat = Heartbeat::start();
    // There is one such thread.
    let _ = shared.watch.set(std::thread::current());
    loop {
        let is_leaving = shared.standing.is_relieved();
        std::thread::park_timeout(if busy || is_leaving { TICK } else { QUIET_TICK });
        heartbeat.beat();
        if overlap::is_done(shared) {
            tracing::info!("relieved; what was in the making is done or left to the successor");
            std::process::exit(0);
        }
        busy = false;
        let now = now_ms();
        // A worker may have been on its way into RECV when it was last interrupted.
        lock(&shared.ending).retain(|served| {
            let watches = lock(&served.watches);
            for watch in watches.iter() {
                let _ = signal::interrupt(watch.tid);
            }
            !watches.is_empty()
        });
        if !swept && shared.settled_in() && shared.standing.is_in_charge() {
            adopt::sweep(shared);
            swept = true;
        }
        for session in shared.sessions() {
            session.expire(now);
            session.look_for_wish();
            let served: Vec<Arc<Served>> = lock(&session.served).values().cloned().collect();
            for served in served {
                busy |= look_at(&session, &served, now);
                overlap::look(&session, &served, now);
                worker::grow(&session, &served);
            }
        }
    }
}

/// Returns whether any worker is about a call.
fn look_at(session: &Arc<Session>, served: &Arc<Served>, now: u64) -> bool {
    let deadline = session.granted.as_ref().map_or(u64::MAX, |granted| granted.policy.limits.deadline_ms);
    let post = Post { session, served };
    let is_leaving = session.shared.standing.is_relieved();
    let watches: Vec<Arc<Watch>> =
        lock(&served.watches).iter().filter(|watch| !watch.reserve).cloned().collect();
    let mut all_late = !watches.is_empty() && !is_leaving;
    for watch in &watches {
        let Some((call, lasted)) = watch.busy(now) else {
            all_late = false;
            if served.has_ended()
                || is_leaving
                || (served.idle.load(Ordering::Relaxed) > 1 && served.is_calm())
            {
                // It finds out by itself whether it has to leave.
                let _ = signal::interrupt(watch.tid);
            }
            continue;
        };
        all_late &= lasted >= deadline;
        if lasted >= deadline {
            if post.send(call, Answer::Error(Errno::IO)) {
                session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
                tracing::error!(session = session.id, lasted, "a call took longer than its deadline; EIO");
            }
            let _ = signal::interrupt(watch.tid);
        } else if lasted >= PATIENCE_MS && !served.listener.still_waits(call) {
            let _ = signal::interrupt(watch.tid);
        }
    }
    served.overwhelmed.store(all_late, Ordering::Release);
    if all_late {
        worker::start_reserve(session, served);
    }
    watches.iter().any(|watch| watch.busy(now).is_some())
}
