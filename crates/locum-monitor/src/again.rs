//! Calls that a dead monitor received and that the journal does not have, since it was lost or is another release's: nobody knows
//! them, and they would wait for ever. They are found by their ids, and the kernel makes each anew.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use locum_journal::Seen;
use locum_kernel::arch::{AUDIT_ARCH, CALLS};
use locum_kernel::fault::die_at;
use locum_kernel::notify::{Answer, CallId, Notification};
use locum_kernel::process::Thread;
use locum_kernel::waiting::Sleeper;
use locum_kernel::{Errno, waiting};

use crate::answer::Post;
use crate::calls::CutOff;
use crate::exact::Stray;
use crate::session::{Served, Session};

/// How far back calls are looked for before any other is received, from the last that was: most of those in the making. To try one
/// takes less than a microsecond.
const NEAR: u64 = 256;
/// How far ahead: what was received, but not noted any more.
const AHEAD: u64 = 64;
/// How far back first, if only one number is known.
const FAR: u64 = 4096;
/// The same when the journal was lost: as many as are made while the slowest is carried out, and as many as may have been withdrawn
/// while nobody received any.
const DEEP: u64 = 1 << 18;
const DEEP_AHEAD: u64 = 1 << 16;
/// How often a caller is looked for that does not sleep yet, since a dead monitor has just woken it.
const TRIES: usize = 10;

/// To be called before the journal of the session in `folder` is begun anew: for each of its listeners, notes that the new one will
/// not know of every call that waits.
pub(crate) fn doubt_all(folder: &Path) {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path());
    for path in files.filter(|path| path.extension().is_some_and(|end| end == "seen")) {
        // One that cannot be used says nothing; whoever serves the listener tells of it.
        let Ok(seen) = Seen::open(&path) else { continue };
        if let (Some(CallId(last)), None) = (seen.last(), seen.doubted()) {
            seen.doubt(Some(CallId(last.wrapping_sub(DEEP))));
        }
    }
}

/// Looks for such calls of a listener that nobody serves yet, here or in another process. Those that are far off may take a while.
pub(crate) fn begin(session: &Arc<Session>, served: &Arc<Served>) {
    let Some(seen) = &served.seen else { return };
    let Some(CallId(last)) = seen.last() else { return };
    // None of them is about to be received, so nothing disturbs the search.
    let near = last.wrapping_sub(NEAR);
    Search { session, served, is_first: true }.run(near..last.wrapping_add(AHEAD));
    go_on(session, served);
}

/// Goes on with what a former monitor did not come to the end of.
pub(crate) fn go_on(session: &Arc<Session>, served: &Arc<Served>) {
    let Some(seen) = &served.seen else { return };
    let Some(CallId(last)) = seen.last().filter(|_| seen.doubted().is_some()) else { return };
    let near = last.wrapping_sub(FAR)..last.wrapping_sub(NEAR);
    start(session, served, near, Some(last.wrapping_add(DEEP_AHEAD)));
}

/// The same for one of which nothing was known until `first` was received: what it may have had before came earlier.
pub(crate) fn before(session: &Arc<Session>, served: &Arc<Served>, CallId(first): CallId) {
    start(session, served, first.wrapping_sub(FAR)..first, None);
}

fn start(session: &Arc<Session>, served: &Arc<Served>, range: Range<u64>, doubted_until: Option<u64>) {
    let (own_session, own_served) = (Arc::clone(session), Arc::clone(served));
    let look = move || {
        let search = Search { session: &own_session, served: &own_served, is_first: false };
        search.run(range);
        doubted_until.inspect(|end| search.run_deep(*end));
    };
    if let Err(error) = std::thread::Builder::new().name("again".into()).spawn(look) {
        tracing::warn!(session = session.id, "cannot look for calls that the journal lacks: {error}");
    }
}

struct Search<'a> {
    session: &'a Session,
    served: &'a Served,
    /// Nothing is handed over meanwhile.
    is_first: bool,
}

impl Search<'_> {
    fn run(&self, range: Range<u64>) {
        let ids = (0..range.end.wrapping_sub(range.start)).map(|step| CallId(range.start.wrapping_add(step)));
        let is_lost = |id: &CallId| self.served.listener.still_waits(*id) && !self.is_known(*id);
        let mut lost: Vec<CallId> = ids.filter(is_lost).collect();
        let calls: Vec<i32> = CALLS.iter().map(|(_, nr)| *nr).collect();
        for _ in 0..TRIES {
            if lost.is_empty() {
                return;
            }
            let mut sleepers = waiting::sleepers(&calls);
            lost.retain(|id| match waiting::caller_of(&self.served.listener, *id, &sleepers) {
                Some(caller) => {
                    sleepers.retain(|other| other.tid != caller.tid);
                    self.ask(*id, caller);
                    false
                }
                None => self.served.listener.still_waits(*id),
            });
        }
        for id in lost {
            self.fail(id, Errno::IO, "a call is not in the journal, and nobody is found who made it");
        }
    }

    /// From the first call that is in doubt to `end`, piece by piece, so that the next monitor need not begin at the beginning.
    fn run_deep(&self, end: u64) {
        const PIECE: u64 = 1024;
        let Some(seen) = &self.served.seen else { return };
        while let Some(CallId(first)) = seen.doubted() {
            if self.served.has_ended() {
                return;
            }
            let left = end.wrapping_sub(first);
            // Workers note calls in no order, so what a former monitor looked at may lie a little beyond.
            let is_beyond = left > u64::MAX / 2;
            let next = if is_beyond { end } else { first.wrapping_add(PIECE.min(left)) };
            if !is_beyond {
                self.run(first..next);
            }
            seen.doubt(Some(CallId(next)).filter(|_| next != end));
        }
    }

    /// Whether a worker has the call. One that has just received it may be about to note that: then it is made anew for nothing, and
    /// the worker finds it withdrawn.
    fn is_known(&self, id: CallId) -> bool {
        self.session.journal.knows(self.served.id(), id)
    }

    fn ask(&self, id: CallId, caller: Sleeper) {
        let call = Notification {
            id,
            tid: caller.tid,
            nr: caller.nr,
            arch: AUDIT_ARCH,
            instruction_pointer: caller.instruction_pointer,
            args: caller.args,
        };
        if CutOff::of(&call) == CutOff::Neither {
            return self.fail(
                id,
                Errno::INTR,
                "a call is not in the journal, may have happened and cannot be repeated",
            );
        }
        die_at(31);
        let asked = Thread::hold(caller.tid).map_err(Into::into).and_then(|thread| {
            if self.is_first {
                self.find_left(id, &thread);
            }
            waiting::ask_again(&self.served.listener, id, &thread)
        });
        match asked {
            Ok(held) => {
                self.session.counters.recovered().fetch_add(1, Ordering::Relaxed);
                tracing::info!(
                    session = self.session.id,
                    tid = caller.tid,
                    held_us = held.as_micros(),
                    "a call that the journal does not have was asked again"
                );
            }
            Err(error) => {
                tracing::error!(session = self.session.id, tid = caller.tid, "cannot ask again: {error}");
                self.fail(id, Errno::IO, "a call is not in the journal, and cannot be asked again");
            }
        }
    }

    /// Looks for what a dead monitor put into the caller's table without answering the call.
    fn find_left(&self, id: CallId, thread: &Thread) {
        if let Ok(caller) = self.session.callers.meet(thread.tid()) {
            self.session.find_orphans(&caller);
            Stray::of(self.session, &caller, id);
        }
    }

    /// Ends the call, if it still waits: nobody waits for ever.
    fn fail(&self, id: CallId, error: Errno, why: &str) {
        if !self.served.listener.still_waits(id) {
            return;
        }
        tracing::error!(session = self.session.id, "{why}; {error}");
        self.session.counters.abandoned().fetch_add(1, Ordering::Relaxed);
        Post { session: self.session, served: self.served }.send(id, Answer::Error(error));
    }
}
