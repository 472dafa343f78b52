//! Which monitor serves which session. Pure, so that every order of events can be tried, below.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Monitors in the order in which they came, and who holds what. At most one monitor holds a session; as long as any
/// monitor is there, every session is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

    /// `holder` had the session when a keeper before died. If that is not there, whoever is first has it.
    pub(crate) fn take_back(&mut self, session: &S, holder: Option<M>) {
        let holder = holder.filter(|holder| self.line.contains(holder));
        self.held.insert(session.clone(), holder.or(self.first()));
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

#[cfg(test)]
mod tests {
    //! Every order of events, up to a depth: sessions begin and end, monitors come, lose sight of their keeper, die; the keeper
    //! dies and is filled. Beside the leases, the model keeps what no process may know better: who really serves what.

    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const MONITORS: [u8; 2] = [1, 2];
    const SESSIONS: [u8; 2] = [10, 20];

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Begin(u8),
        End(u8),
        /// A monitor starts, and connects.
        Start(u8),
        /// Its connection breaks; it lives, and serves on.
        Disconnect(u8),
        Reconnect(u8),
        /// SIGKILL. The keeper sees it at once or, if it has died itself, never.
        Kill(u8),
        KillKeeper,
    }

    #[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
    struct Monitor {
        is_connected: bool,
        /// What it serves, as far as it knows.
        serves: BTreeSet<u8>,
    }

    /// The world.
    #[derive(Clone, Default)]
    struct World {
        leases: Leases<u8, u8>,
        /// Sessions that live and whose listener the keeper holds.
        held: BTreeSet<u8>,
        living: BTreeMap<u8, Monitor>,
    }

    impl World {
        /// A monitor is told of a session. Without a connection it does not hear of it.
        fn tell(&mut self, monitor: u8, session: u8) {
            if let Some(monitor) = self.living.get_mut(&monitor).filter(|monitor| monitor.is_connected) {
                monitor.serves.insert(session);
            }
        }

        fn connect(&mut self, monitor: u8) {
            for session in self.leases.arrive(monitor) {
                self.tell(monitor, session);
            }
            let known = self.living.get(&monitor).map(|monitor| monitor.serves.clone()).unwrap_or_default();
            for session in known {
                if self.leases.keep(monitor, &session) {
                    self.held.insert(session);
                }
            }
        }

        /// False: it cannot happen now.
        fn step(&mut self, step: Step) -> bool {
            match step {
                Step::Begin(session) => {
                    let lives = self.living.values().any(|monitor| monitor.serves.contains(&session));
                    if lives || !self.held.insert(session) {
                        return false;
                    }
                    if let Some(monitor) = self.leases.open(&session) {
                        self.tell(monitor, session);
                    }
                }
                Step::End(session) => {
                    let was_held = self.held.remove(&session);
                    self.leases.close(&session);
                    let mut was_served = false;
                    // Whoever serves it sees its end by itself too.
                    self.living
                        .values_mut()
                        .for_each(|monitor| was_served |= monitor.serves.remove(&session));
                    return was_held || was_served;
                }
                Step::Start(monitor) => {
                    if self.living.contains_key(&monitor) {
                        return false;
                    }
                    self.living.insert(monitor, Monitor { is_connected: true, ..Monitor::default() });
                    self.connect(monitor);
                }
                Step::Disconnect(monitor) => match self.living.get_mut(&monitor) {
                    Some(known) if known.is_connected => known.is_connected = false,
                    _ => return false,
                },
                Step::Reconnect(monitor) => match self.living.get_mut(&monitor) {
                    Some(known) if !known.is_connected => {
                        known.is_connected = true;
                        self.connect(monitor);
                    }
                    _ => return false,
                },
                Step::Kill(monitor) => {
                    if self.living.remove(&monitor).is_none() {
                        return false;
                    }
                    for (session, next) in self.leases.depart(monitor) {
                        self.tell(next, session);
                    }
                }
                Step::KillKeeper => {
                    self.leases = Leases::default();
                    self.held.clear();
                    self.living.values_mut().for_each(|monitor| monitor.is_connected = false);
                }
            }
            true
        }

        fn check(&self, steps: &[Step]) {
            for session in SESSIONS {
                let serving: Vec<_> =
                    self.living.iter().filter(|(_, monitor)| monitor.serves.contains(&session)).collect();
                assert!(serving.len() <= 1, "two monitors serve {session}: {steps:?}");
                let holder = self.leases.holder(&session);
                if let (Some((monitor, _)), Some(holder)) = (serving.first(), holder) {
                    assert_eq!(**monitor, holder, "the keeper is wrong about {session}: {steps:?}");
                }
                if self.held.contains(&session) {
                    let anyone = self.leases.first().is_some();
                    assert_eq!(holder.is_some(), anyone, "nobody holds {session}: {steps:?}");
                    // A holder that is connected serves; one that is not will be told, or dies.
                    let connected = holder.and_then(|holder| self.living.get(&holder));
                    if connected.is_some_and(|monitor| monitor.is_connected) {
                        assert_eq!(serving.len(), 1, "nobody serves {session}: {steps:?}");
                    }
                }
            }
        }
    }

    fn steps() -> Vec<Step> {
        let sessions = SESSIONS.into_iter().flat_map(|session| [Step::Begin(session), Step::End(session)]);
        let monitors = MONITORS.into_iter().flat_map(|monitor| {
            [Step::Start(monitor), Step::Disconnect(monitor), Step::Reconnect(monitor), Step::Kill(monitor)]
        });
        sessions.chain(monitors).chain([Step::KillKeeper]).collect()
    }

    /// Everything that tells two worlds apart.
    type Seen = (Vec<u8>, BTreeMap<u8, Option<u8>>, BTreeSet<u8>, BTreeMap<u8, Monitor>);

    #[test]
    fn no_order_of_events_gives_a_session_to_two_or_to_none() {
        let mut seen: BTreeSet<Seen> = BTreeSet::new();
        let mut open = vec![(World::default(), Vec::new())];
        // Until there is no world left that was not looked at: no depth limits this.
        while let Some((world, history)) = open.pop() {
            for step in steps() {
                let mut next = world.clone();
                if !next.step(step) {
                    continue;
                }
                let mut history: Vec<Step> = history.clone();
                history.push(step);
                next.check(&history);
                let World { leases, held, living } = &next;
                if seen.insert((leases.line.clone(), leases.held.clone(), held.clone(), living.clone())) {
                    open.push((next, history));
                }
            }
        }
        assert!(seen.len() > 100, "only {} worlds", seen.len());
    }
}
