//! Which monitor serves which session. Pure, so that every order of events can be tried: `tests/lease.rs` does.

use std::collections::BTreeMap;

/// Monitors in the order in which they came, and who holds what. At most one monitor holds a session; as long as any
/// monitor is there, every session is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leases<M, S: Ord> {
    line: Vec<M>,
    held: BTreeMap<S, Option<M>>,
}

impl<M, S: Ord> Default for Leases<M, S> {
    fn default() -> Self {
        Self { line: Vec::new(), held: BTreeMap::new() }
    }
}

impl<M: Copy + Eq, S: Clone + Ord> Leases<M, S> {
    /// `monitor` is there. Returns what it has to be told of: all that nobody held, and, if it only was lost from sight, what it
    /// holds.
    pub(crate) fn arrive(&mut self, monitor: M) -> Vec<S> {
        if !self.line.contains(&monitor) {
            self.line.push(monitor);
        }
        let mut tell = Vec::new();
        for (session, holder) in &mut self.held {
            if *holder.get_or_insert(monitor) == monitor {
                tell.push(session.clone());
            }
        }
        tell
    }

    /// `monitor` is dead. Returns what goes to whom.
    pub(crate) fn depart(&mut self, monitor: M) -> Vec<(S, M)> {
        self.line.retain(|other| *other != monitor);
        let next = self.line.first().copied();
        let mut moved = Vec::new();
        for (session, holder) in &mut self.held {
            if *holder == Some(monitor) {
                *holder = next;
                moved.extend(next.map(|next| (session.clone(), next)));
            }
        }
        moved
    }

    /// A session begins, or has one more listener: whoever holds it has to be told.
    pub(crate) fn open(&mut self, session: &S) -> Option<M> {
        let first = self.line.first().copied();
        *self.held.entry(session.clone()).or_insert(first)
    }

    /// `monitor` says that it serves this session, to a keeper that did not know. False: another does.
    pub(crate) fn keep(&mut self, monitor: M, session: &S) -> bool {
        let holder = self.held.entry(session.clone()).or_insert(Some(monitor));
        *holder.get_or_insert(monitor) == monitor
    }

    /// The session is over.
    pub(crate) fn close(&mut self, session: &S) {
        self.held.remove(session);
    }

    /// Who serves it.
    pub(crate) fn holder(&self, session: &S) -> Option<M> {
        self.held.get(session).copied().flatten()
    }

    /// Whose turn it is.
    pub(crate) fn first(&self) -> Option<M> {
        self.line.first().copied()
    }
}
