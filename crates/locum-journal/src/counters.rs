//! What has been done for a session since it began, by however many monitors.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Journal;

/// The counters of one session. They live in its journal and only go up.
#[derive(Clone, Debug)]
pub struct Counters(Arc<Journal>);

/// The counters' values at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Calls that were answered.
    pub calls: u64,
    /// Calls that the policy, a limit or a signature refused.
    pub refused: u64,
    /// Calls that one monitor received and a later one settled.
    pub recovered: u64,
    /// Listeners that were put in or taken back from outside.
    pub reattached: u64,
    /// Calls that were given up: a deadline, a panic, a call that brought a monitor down.
    pub abandoned: u64,
}

impl Counters {
    /// Those in `journal`.
    pub fn of(journal: &Arc<Journal>) -> Self {
        Self(Arc::clone(journal))
    }

    /// The counter of answered calls.
    pub fn calls(&self) -> &AtomicU64 {
        self.0.counter(0)
    }

    /// The counter of refused calls.
    pub fn refused(&self) -> &AtomicU64 {
        self.0.counter(1)
    }

    /// The counter of recovered calls.
    pub fn recovered(&self) -> &AtomicU64 {
        self.0.counter(2)
    }

    /// The counter of listeners put in or taken back.
    pub fn reattached(&self) -> &AtomicU64 {
        self.0.counter(3)
    }

    /// The counter of calls given up.
    pub fn abandoned(&self) -> &AtomicU64 {
        self.0.counter(4)
    }

    /// All of them.
    pub fn totals(&self) -> Totals {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            calls: value(self.calls()),
            refused: value(self.refused()),
            recovered: value(self.recovered()),
            reattached: value(self.reattached()),
            abandoned: value(self.abandoned()),
        }
    }
}
