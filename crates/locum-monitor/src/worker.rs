//! The threads that serve a listener. Each receives into a slot of its own, carries the call out and answers it. There is
//! one, and one more whenever a call is found waiting while all are about another, up to the session's limit: a lone caller is
//! answered by the one worker that it woke, however soon it calls again, since a second one costs it a wake of another
//! processor; and a slow call delays others by one look of the watch at most.

use std::cell::RefCell;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use locum_journal::{Left, Slot};
use locum_kernel::credentials::{Rights, Worker as Thread};
use locum_kernel::notify::{Answer, Notification};
use locum_kernel::{Errno, crash};

use crate::again;
use crate::answer::Post;
use crate::caller::Caller;
use crate::calls::Outcome;
use crate::calls::handles::{self, Bench, Grant, Identity};
use crate::exact::Stray;
use crate::overlap;
use crate::recovery;
use crate::session::{Served, Session, Undelivered, lock, now_ms};
use crate::watch::{self, Watch};

/// Enough for the deepest handler, with room for a panic's message.
const STACK: usize = 256 * 1024;

/// One worker.
struct Worker {
    session: Arc<Session>,
    served: Arc<Served>,
    watch: Arc<Watch>,
    thread: Thread,
    /// Beyond the limit: fails calls at once for as long as all others are late.
    reserve: bool,
}

/// Starts a worker that stands by while all others are late, so that their lateness is not everybody's.
pub(crate) fn start_reserve(session: &Arc<Session>, served: &Arc<Served>) {
    if !served.has_reserve.swap(true, Ordering::AcqRel) {
        tracing::error!(
            session = session.id,
            "all workers are late; further calls get EIO until one is back"
        );
        start_one(session, served, None, true);
    }
}

/// Starts one more worker if calls wait with nobody to receive them, and the session may have one.
pub(crate) fn grow(session: &Arc<Session>, served: &Arc<Served>) {
    let limit = session.granted.as_ref().map_or(1, |granted| granted.policy.limits.workers as usize);
    if session.workers.load(Ordering::Relaxed) < limit && watch::is_short(served) {
        start(session, served, None);
    }
}

/// Starts a worker; with a slot that a dead monitor left, it settles that first.
pub(crate) fn start(session: &Arc<Session>, served: &Arc<Served>, left: Option<Slot>) {
    start_one(session, served, left, false);
}

fn start_one(session: &Arc<Session>, served: &Arc<Served>, left: Option<Slot>, reserve: bool) {
    if left.is_none() && session.shared.standing.is_relieved() {
        return;
    }
    let Some(slot) = left.or_else(|| session.take_slot(served)) else {
        tracing::error!(session = session.id, "no slot is free in the journal; calls wait until one is");
        return;
    };
    session.workers.fetch_add(1, Ordering::Relaxed);
    served.grown.store(now_ms(), Ordering::Relaxed);
    let (own_session, own_served) = (Arc::clone(session), Arc::clone(served));
    let started = std::thread::Builder::new().name("worker".into()).stack_size(STACK).spawn(move || {
        run(&own_session, &own_served, slot, reserve);
        own_session.workers.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(error) = started {
        session.workers.fetch_sub(1, Ordering::Relaxed);
        tracing::warn!(session = session.id, "cannot start a worker: {error}");
    }
}

fn run(session: &Arc<Session>, served: &Arc<Served>, slot: Slot, reserve: bool) {
    let thread = match Thread::start() {
        Ok(thread) => thread,
        Err(error) => {
            return tracing::error!(session = session.id, "a worker cannot have a root of its own: {error}");
        }
    };
    let watch = Arc::new(Watch::of_this_thread(reserve));
    lock(&served.watches).push(Arc::clone(&watch));
    let mut worker =
        Worker { session: Arc::clone(session), served: Arc::clone(served), watch, thread, reserve };
    let sound = std::panic::catch_unwind(AssertUnwindSafe(|| worker.work(slot)));
    lock(&served.watches).retain(|watch| !Arc::ptr_eq(watch, &worker.watch));
    if reserve {
        served.has_reserve.store(false, Ordering::Release);
    }
    if !matches!(sound, Ok(Leave::ForGood)) && !reserve && !served.has_ended() {
        // What rights and root this thread was left with is not known.
        start(session, served, None);
    }
}

/// Why a worker leaves.
#[derive(PartialEq, Eq)]
enum Leave {
    /// It is not needed any more.
    ForGood,
    /// A handler panicked; another is to take its place.
    Unsound,
}

impl Worker {
    fn work(&mut self, mut slot: Slot) -> Leave {
        if let Some(left) = slot.left() {
            match self.settle_left(slot, &left) {
                Ok(next) => slot = next,
                Err(leave) => return leave,
            }
        }
        loop {
            if self.session.shared.standing.is_relieved() {
                slot.settle();
                return Leave::ForGood;
            }
            let buffer = slot.begin(self.served.id());
            self.served.idle.fetch_add(1, Ordering::AcqRel);
            let received = self.served.listener.receive(buffer);
            let others = self.served.idle.fetch_sub(1, Ordering::AcqRel) - 1;
            match received {
                Ok(()) => {}
                Err(error) => {
                    slot.settle();
                    if self.has_to_leave(error, others) {
                        return Leave::ForGood;
                    }
                    continue;
                }
            }
            let Some(call) = slot.call() else { continue };
            if self.served.seen.as_ref().is_some_and(|seen| !seen.note(call.id)) {
                again::before(&self.session, &self.served, call.id);
            }
            if self.reserve && self.served.overwhelmed.load(Ordering::Acquire) {
                self.session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
                Post { session: &self.session, served: &self.served }.send(call.id, Answer::Error(Errno::IO));
                continue;
            }
            match self.serve(slot, &call) {
                Ok(next) => slot = next,
                Err(leave) => return leave,
            }
            if others > 0 && self.served.is_calm() {
                slot.settle();
                return Leave::ForGood;
            }
        }
    }

    /// Whether RECV's `error` is a reason to leave, with `others` waiting beside this worker.
    fn has_to_leave(&self, error: Errno, others: usize) -> bool {
        if self.served.has_ended() {
            return true;
        }
        match error {
            Errno::INTR => others > 0 && self.served.is_calm(),
            // A caller that went away, or (6.11) the last of them.
            Errno::NOENT => self.served.listener.has_ended(),
            error => {
                tracing::error!(session = self.session.id, "cannot receive calls: {error}");
                true
            }
        }
    }

    /// Carries out the call in `slot` and answers it. Returns the slot to go on with.
    fn serve(&mut self, slot: Slot, call: &Notification) -> Result<Slot, Leave> {
        self.watch.begin(call.id);
        let done = match self.session.callers.meet(call.tid) {
            Ok(_) if !overlap::await_turn(&self.session, &self.served, call) => self.drop_withdrawn(slot),
            Ok(caller) => self.serve_caller(slot, call, &caller),
            Err(error) => {
                self.fail_unmet(call, error);
                slot.settle();
                Ok(slot)
            }
        };
        self.watch.end();
        done
    }

    fn serve_caller(&mut self, slot: Slot, call: &Notification, caller: &Arc<Caller>) -> Result<Slot, Leave> {
        let turn = caller.turn(&self.watch);
        self.served.lifeline.keep(&self.session, &self.served, call, caller);
        // That takes long, once, next to the call itself: to be killed in it says nothing about the call.
        self.session.callers.takes_path(caller);
        let was_begun = slot.left().is_some_and(|left| left.tries > 0);
        if was_begun {
            Stray::left_waiting(&self.session, &slot, caller);
        }
        slot.performing(caller.started, caller.process());
        let kept = RefCell::new(None);
        let done = crash::marked(slot.crash_mark(), || {
            std::panic::catch_unwind(AssertUnwindSafe(|| self.carry_out(call, caller, &kept)))
        });
        // Comparing descriptors with the caller's, and meeting the next one, takes more than the handler had last.
        let sound = done.is_ok() && self.thread.have(Rights::Full).is_ok();
        let outcome = done.unwrap_or_else(|_| {
            self.session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                session = self.session.id,
                tid = call.tid,
                nr = call.nr,
                "a handler panicked; EIO"
            );
            Outcome::Fail(Errno::IO)
        });
        let post = Post { session: &self.session, served: &self.served };
        let slot = post.deliver(slot, call, (caller, turn), outcome, kept.into_inner(), was_begun);
        match slot {
            Some(slot) if sound => Ok(slot),
            Some(_) => Err(Leave::Unsound),
            // The slot stays behind with a result; without another, this worker cannot go on.
            None => self.session.take_slot(&self.served).ok_or(Leave::Unsound),
        }
    }

    /// Nobody waits for the call in `slot`, and what came of it, if anything, is known to another monitor.
    fn drop_withdrawn(&self, slot: Slot) -> Result<Slot, Leave> {
        let slot = Stray::left(&self.session, slot);
        slot.inspect(Slot::settle).or_else(|| self.session.take_slot(&self.served)).ok_or(Leave::Unsound)
    }

    fn carry_out(
        &mut self,
        call: &Notification,
        caller: &Arc<Caller>,
        taken: &RefCell<Option<Undelivered>>,
    ) -> Outcome {
        let session = &self.session;
        let granted = session.granted.as_ref().filter(|_| !session.detached.load(Ordering::Relaxed));
        let Some(granted) = granted else { return Outcome::Decline };
        let exports = granted.exports(session, caller);
        let kept = |identity: Identity| {
            let fits = |file: &_| Identity::of(file) == Ok(identity);
            let result = session.kept_for(call, caller, fits)?;
            let file = result.file.try_clone().ok();
            *taken.borrow_mut() = Some(result);
            file
        };
        let mut bench = Bench {
            worker: &mut self.thread,
            own_descriptors: &session.shared.own_descriptors,
            own_root: &session.shared.own_root,
            kept: &kept,
            takes_path: &|| session.callers.takes_path(caller),
        };
        let policy = &granted.policy;
        let grant = Grant { calls: &policy.calls, exports, o_path: policy.o_path };
        handles::carry_out(call, caller, &grant, &mut bench)
    }

    /// A caller that cannot be looked at: gone, or somewhere that this monitor does not see.
    fn fail_unmet(&self, call: &Notification, error: Errno) {
        if self.served.listener.still_waits(call.id) {
            self.session.audit.tell(&self.session.id, || {
                tracing::warn!(
                    session = self.session.id,
                    tid = call.tid,
                    "cannot look at the caller: {error}; EIO"
                );
            });
            self.session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
            let post = Post { session: &self.session, served: &self.served };
            post.send(call.id, Answer::Error(Errno::IO));
        }
    }

    /// Settles what a dead monitor left in `slot`, a call that still waits.
    fn settle_left(&mut self, slot: Slot, left: &Left) -> Result<Slot, Leave> {
        self.session.counters.recovered().fetch_add(1, Ordering::Relaxed);
        let call = left.call;
        let post = Post { session: &self.session, served: &self.served };
        let parked = post.parked(&slot, call.id).or_else(|| recovery::installed(&self.session, left));
        let parked = parked.or_else(|| recovery::marked(&self.session, &slot, left));
        match recovery::decide(left, parked) {
            recovery::Repair::Serve => self.serve(slot, &call),
            recovery::Repair::HandOver(file) => {
                self.watch.begin(call.id);
                let slot = match self.session.callers.meet(call.tid) {
                    Ok(caller) => post.hand_over_again(slot, left, (&caller, caller.turn(&self.watch)), file),
                    Err(error) => {
                        self.fail_unmet(&call, error);
                        slot.settle();
                        Some(slot)
                    }
                };
                self.watch.end();
                slot.or_else(|| self.session.take_slot(&self.served)).ok_or(Leave::Unsound)
            }
            recovery::Repair::Fail(error, why) => {
                tracing::error!(session = self.session.id, tid = call.tid, nr = call.nr, "{why}; {error}");
                self.session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
                let slot = Stray::left(&self.session, slot);
                post.send(call.id, Answer::Error(error));
                slot.inspect(Slot::settle)
                    .or_else(|| self.session.take_slot(&self.served))
                    .ok_or(Leave::Unsound)
            }
        }
    }
}
