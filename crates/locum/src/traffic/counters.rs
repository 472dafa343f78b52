//! What the threads count, and what is told of it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// How the traffic goes, or went.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Report {
    /// Calls that returned.
    pub(crate) calls: u64,
    /// Calls that returned what the kernel would not have returned.
    pub(crate) wrong: u64,
    /// Calls that failed with an error that the kernel would not have given.
    pub(crate) failed: u64,
    /// Calls that ended with EINTR since they may have cut a file to nothing and cannot be repeated.
    pub(crate) cut_off: u64,
    /// Descriptors that nobody knows, at the end.
    pub(crate) leaked: u64,
    /// The longest call that returned.
    pub(crate) longest_us: u64,
    /// How long the call that waits longest has been waiting.
    pub(crate) waiting_us: u64,
    /// The thread that makes it.
    pub(crate) waiting_tid: u32,
    /// Signals sent to the threads.
    pub(crate) signals: u64,
    /// Whether this is the end.
    pub(crate) done: bool,
}

impl Report {
    pub(crate) fn is_clean(&self) -> bool {
        self.wrong == 0 && self.failed == 0 && self.leaked == 0
    }
}

pub(crate) struct Counters {
    start: Instant,
    pub(super) end: AtomicBool,
    left: Option<AtomicU64>,
    calls: AtomicU64,
    wrong: AtomicU64,
    failed: AtomicU64,
    pub(super) cut_off: AtomicU64,
    longest_us: AtomicU64,
    pub(super) signals: AtomicU64,
    pub(super) lanes: Box<[LaneState]>,
    /// By number, the descriptors of this process.
    known: Box<[AtomicBool]>,
}

#[derive(Default)]
pub(super) struct LaneState {
    pub(super) tid: AtomicU32,
    /// When its call began, in microseconds since the start and 1; 0: it is in no call.
    since: AtomicU64,
}

/// More than a process is allowed to have where this runs.
const DESCRIPTORS: usize = 1 << 16;

impl Counters {
    pub(super) fn new(lanes: usize, calls: Option<u64>, descriptors: &BTreeSet<usize>) -> Self {
        Self {
            start: Instant::now(),
            end: AtomicBool::new(false),
            left: calls.map(AtomicU64::new),
            calls: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            cut_off: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            signals: AtomicU64::new(0),
            lanes: (0..lanes).map(|_| LaneState::default()).collect(),
            known: (0..DESCRIPTORS).map(|fd| AtomicBool::new(descriptors.contains(&fd))).collect(),
        }
    }

    /// Whether one more call is to be made.
    pub(super) fn go_on(&self) -> bool {
        let one_less = |left: u64| left.checked_sub(1);
        !self.end.load(Ordering::Relaxed)
            && self
                .left
                .as_ref()
                .is_none_or(|left| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok())
    }

    /// Makes one call for lane `index`, with a look at the clock before and after.
    pub(super) fn timed<T>(&self, index: usize, call: impl FnOnce() -> T) -> T {
        let lane = &self.lanes[index];
        let begun = self.now();
        lane.since.store(begun, Ordering::Relaxed);
        let result = call();
        lane.since.store(0, Ordering::Relaxed);
        self.longest_us.fetch_max(self.now().saturating_sub(begun), Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        result
    }

    /// Notes a new descriptor; false if the process has it already.
    pub(super) fn opened(&self, fd: i32) -> bool {
        let known = usize::try_from(fd).ok().and_then(|fd| self.known.get(fd));
        known.is_some_and(|known| !known.swap(true, Ordering::AcqRel))
    }

    /// To be called before the descriptor is closed: from then on another thread may get its number.
    pub(super) fn closes(&self, fd: i32) {
        if let Some(known) = usize::try_from(fd).ok().and_then(|fd| self.known.get(fd)) {
            known.store(false, Ordering::Release);
        }
    }

    pub(super) fn note_wrong(&self, what: &str) {
        if self.wrong.fetch_add(1, Ordering::Relaxed) < 10 {
            eprintln!("wrong: {what}");
        }
    }

    pub(super) fn note_failed(&self, what: &str) {
        if self.failed.fetch_add(1, Ordering::Relaxed) < 10 {
            eprintln!("failed: {what}");
        }
    }

    pub(super) fn report(&self) -> Report {
        let now = self.now();
        let waits = |lane: &LaneState| match lane.since.load(Ordering::Relaxed) {
            0 => (0, 0),
            since => (now.saturating_sub(since), lane.tid.load(Ordering::Relaxed)),
        };
        let (waiting_us, waiting_tid) = self.lanes.iter().map(waits).max().unwrap_or_default();
        Report {
            calls: self.calls.load(Ordering::Relaxed),
            wrong: self.wrong.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            cut_off: self.cut_off.load(Ordering::Relaxed),
            leaked: 0,
            longest_us: self.longest_us.load(Ordering::Relaxed),
            waiting_us,
            waiting_tid,
            signals: self.signals.load(Ordering::Relaxed),
            done: false,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
    }
}
