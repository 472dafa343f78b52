//! Which monitor serves which session. Pure, so that every order of events can be tried, below.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::protocol::Overlap;

/// Monitors in the order in which they came, and who holds what. One monitor holds a session, and tends it; as long as any
/// monitor stands in line, every session is held. During an upgrade others serve it too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Leases<M, S: Ord> {
    line: Vec<M>,
    held: BTreeMap<S, Option<M>>,
    /// Who serves beside the holders: newcomers that are to relieve them, and do stand in line; and whoever was relieved,
    /// finishes what it has, and does not.
    #[serde(default = "Vec::new")]
    beside: Vec<M>,
}

impl<M, S: Ord> Default for Leases<M, S> {
    fn default() -> Self {
        Self { line: Vec::new(), held: BTreeMap::new(), beside: Vec::new() }
    }
}

impl<M: Copy + Eq, S: Clone + Ord> Leases<M, S> {
    /// `monitor` is there, and stands to others as it says; `younger` are those that started later, to relieve others. Returns how
    /// it stands to them really, and what it has to be told of: all that nobody held, and, if it only was lost from sight, what it
    /// holds. To relieve others it has to be told of everything.
    pub(crate) fn arrive(&mut self, monitor: M, overlap: Overlap, younger: &[M]) -> (Overlap, Vec<S>) {
        let is_known = self.line.contains(&monitor) || self.is_beside(monitor);
        let is_among = |relieves: bool| {
            younger.iter().any(|other| self.line.contains(other) && self.is_beside(*other) == relieves)
        };
        let overlap = match overlap {
            _ if self.is_relieved(monitor) => Overlap::Relieved,
            // It was needed after all, and has not heard.
            Overlap::Relieved if is_known => Overlap::Able,
            // A former keeper had it relieved, or would have.
            Overlap::Able | Overlap::Relieves if !is_known && is_among(false) => Overlap::Relieved,
            Overlap::Relieves if !is_known && is_among(true) => Overlap::Able,
            other => other,
        };
        match overlap {
            Overlap::Relieved if is_known => {}
            Overlap::Relieved => self.beside.push(monitor),
            Overlap::Unable | Overlap::Able | Overlap::Relieves => {
                if !is_known {
                    self.line.push(monitor);
                }
                if overlap == Overlap::Relieves && !self.is_beside(monitor) {
                    self.beside.push(monitor);
                }
            }
        }
        let is_beside = self.is_beside(monitor);
        let mut tell = Vec::new();
        if self.line.contains(&monitor) {
            for (session, holder) in &mut self.held {
                if *holder.get_or_insert(monitor) == monitor || is_beside {
                    tell.push(session.clone());
                }
            }
        }
        (overlap, tell)
    }

    /// `monitor` serves all that it was told of, and holds everything from now on. Returns who is relieved, all but those who are
    /// `younger` and have come for the same, and what it holds now.
    pub(crate) fn relieve(&mut self, monitor: M, younger: &[M]) -> (Vec<M>, Vec<(S, M)>) {
        if !self.line.contains(&monitor) {
            return (Vec::new(), Vec::new());
        }
        let mut relieved = self.line.clone();
        relieved.retain(|other| *other != monitor && !(younger.contains(other) && self.is_beside(*other)));
        self.beside.retain(|other| *other != monitor);
        self.line.retain(|other| *other != monitor);
        self.line.insert(0, monitor);
        let mut moved = Vec::new();
        for (session, holder) in &mut self.held {
            if holder.replace(monitor) != Some(monitor) {
                moved.push((session.clone(), monitor));
            }
        }
        for other in &relieved {
            self.dismiss(*other);
        }
        (relieved, moved)
    }

    /// `monitor` is to finish what it has. Returns what goes to whom.
    pub(crate) fn dismiss(&mut self, monitor: M) -> Vec<(S, M)> {
        self.line.retain(|other| *other != monitor);
        if !self.beside.contains(&monitor) {
            self.beside.push(monitor);
        }
        self.pass_on(monitor)
    }

    /// `monitor` is dead. Returns what goes to whom, and what has to be looked at again by the monitor that holds it, since
    /// the dead one served it too.
    pub(crate) fn depart(&mut self, monitor: M) -> Vec<(S, M)> {
        let was_beside = self.is_beside(monitor);
        self.line.retain(|other| *other != monitor);
        self.beside.retain(|other| *other != monitor);
        // Better one that was about to leave than nobody.
        if self.line.is_empty() {
            self.line.extend(self.beside.pop());
        }
        let mut tell = self.pass_on(monitor);
        if was_beside {
            tell = self
                .held
                .iter()
                .filter_map(|(session, holder)| Some((session.clone(), (*holder)?)))
                .collect();
        }
        tell
    }

    fn pass_on(&mut self, monitor: M) -> Vec<(S, M)> {
        let next = self.line.first().copied();
        let mut moved = Vec::new();
        for (session, holder) in &mut self.held {
            if holder.is_none_or(|holder| holder == monitor) {
                *holder = next;
                moved.extend(next.map(|next| (session.clone(), next)));
            }
        }
        moved
    }

    /// A session begins, or has one more listener: returns who has to be told.
    pub(crate) fn open(&mut self, session: &S) -> Vec<M> {
        let first = self.line.first().copied();
        self.held.entry(session.clone()).or_insert(first);
        self.concerned(session)
    }

    /// `monitor` says that it serves this session, to a keeper that may not know. Returns who holds it.
    pub(crate) fn keep(&mut self, monitor: M, session: &S) -> Option<M> {
        let own = if self.line.contains(&monitor) { Some(monitor) } else { self.line.first().copied() };
        let holder = self.held.entry(session.clone()).or_insert(own);
        *holder = holder.or(own);
        *holder
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

    /// Who serves it, and is to go on: its holder, and whoever is to relieve that.
    pub(crate) fn concerned(&self, session: &S) -> Vec<M> {
        let holder = self.holder(session);
        let others =
            self.beside.iter().copied().filter(|other| self.line.contains(other) && Some(*other) != holder);
        holder.into_iter().chain(others).collect()
    }

    /// Who holds it.
    pub(crate) fn holder(&self, session: &S) -> Option<M> {
        self.held.get(session).copied().flatten()
    }

    /// Whether `monitor` serves, or finishes, what others hold.
    pub(crate) fn is_beside(&self, monitor: M) -> bool {
        self.beside.contains(&monitor)
    }

    /// Whether `monitor` was relieved.
    pub(crate) fn is_relieved(&self, monitor: M) -> bool {
        self.is_beside(monitor) && !self.line.contains(&monitor)
    }

    /// Whose turn it is.
    pub(crate) fn first(&self) -> Option<M> {
        self.line.first().copied()
    }
}

#[cfg(test)]
mod tests {
    //! Every order of events, without a limit of depth: sessions begin and end; monitors come, lose sight of their keeper, come to
    //! relieve another, do, die; the keeper dies and is filled. Beside the leases, the model keeps what no process may know
    //! better: who really serves what.

    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const SESSIONS: [u8; 2] = [10, 20];

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Begin(u8),
        End(u8),
        /// A monitor starts, and connects.
        Start(u8),
        /// The same, to relieve others.
        Replace(u8),
        /// It has taken up all that it was told of, and says so.
        Relieve(u8),
        /// Its connection breaks; it lives, and serves on.
        Disconnect(u8),
        Reconnect(u8),
        /// SIGKILL, or, for one that was relieved, the end. The keeper sees it at once or, if it has died itself, never.
        Kill(u8),
        KillKeeper,
    }

    #[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
    struct Monitor {
        is_connected: bool,
        /// It came to relieve others, and says so to every keeper.
        replaces: bool,
        /// Whether it was told that it is relieved: it receives no more.
        is_relieved: bool,
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
        /// The living by age, the oldest first.
        ages: Vec<u8>,
    }

    impl World {
        fn connected(&mut self, monitor: u8) -> Option<&mut Monitor> {
            self.living.get_mut(&monitor).filter(|monitor| monitor.is_connected)
        }

        /// A monitor is told of a session. Without a connection it does not hear of it.
        fn tell(&mut self, monitor: u8, session: u8) {
            if let Some(monitor) = self.connected(monitor) {
                monitor.serves.insert(session);
                // It stays after all.
                monitor.is_relieved = false;
            }
        }

        fn tell_all(&mut self, what: Vec<(u8, u8)>) {
            for (session, monitor) in what {
                self.tell(monitor, session);
            }
        }

        fn tell_relieved(&mut self, monitor: u8) {
            if let Some(monitor) = self.connected(monitor) {
                monitor.is_relieved = true;
            }
        }

        fn connect(&mut self, monitor: u8) {
            let known = self.living[&monitor].clone();
            let overlap = match (known.is_relieved, known.replaces) {
                (true, _) => Overlap::Relieved,
                (false, true) => Overlap::Relieves,
                (false, false) => Overlap::Able,
            };
            let (overlap, sessions) = self.leases.arrive(monitor, overlap, &self.younger(monitor));
            for session in sessions {
                self.tell(monitor, session);
            }
            if overlap == Overlap::Relieved {
                self.tell_relieved(monitor);
            }
            for session in known.serves {
                let holder = self.leases.keep(monitor, &session);
                self.held.insert(session);
                for other in self.leases.concerned(&session).into_iter().filter(|other| *other != monitor) {
                    self.tell(other, session);
                }
                if holder != Some(monitor) && !self.leases.is_beside(monitor) {
                    let moved = self.leases.dismiss(monitor);
                    self.tell_all(moved);
                    self.tell_relieved(monitor);
                }
            }
        }

        fn younger(&self, monitor: u8) -> Vec<u8> {
            let later = self.ages.iter().skip_while(|other| **other != monitor).skip(1);
            later.copied().filter(|other| self.living[other].replaces).collect()
        }

        fn start(&mut self, monitor: u8, replaces: bool) -> bool {
            if self.living.contains_key(&monitor) {
                return false;
            }
            self.living.insert(monitor, Monitor { is_connected: true, replaces, ..Monitor::default() });
            self.ages.push(monitor);
            self.connect(monitor);
            true
        }

        /// False: it cannot happen now.
        fn step(&mut self, step: Step) -> bool {
            match step {
                Step::Begin(session) => {
                    let lives = self.living.values().any(|monitor| monitor.serves.contains(&session));
                    if lives || !self.held.insert(session) {
                        return false;
                    }
                    for monitor in self.leases.open(&session) {
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
                Step::Start(monitor) => return self.start(monitor, false),
                Step::Replace(monitor) => return self.start(monitor, true),
                Step::Relieve(monitor) => {
                    let known = self.connected(monitor).map(|known| known.replaces && !known.is_relieved);
                    if known != Some(true) {
                        return false;
                    }
                    let (relieved, moved) = self.leases.relieve(monitor, &self.younger(monitor));
                    self.tell_all(moved);
                    for other in relieved {
                        self.tell_relieved(other);
                    }
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
                    self.ages.retain(|other| *other != monitor);
                    if self.leases.line.contains(&monitor) || self.leases.is_beside(monitor) {
                        let tell = self.leases.depart(monitor);
                        self.tell_all(tell);
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

        fn check(&self, steps: impl Fn() -> Vec<Step>) {
            for session in SESSIONS {
                let holder = self.leases.holder(&session);
                let receives = |monitor: &u8| {
                    let monitor = &self.living[monitor];
                    monitor.serves.contains(&session) && !monitor.is_relieved
                };
                // Who neither is about to relieve the holder nor has yet to hear that it was relieved itself.
                let settled = |monitor: &&u8| {
                    self.living[*monitor].is_connected
                        && !self.leases.is_beside(**monitor)
                        && receives(monitor)
                };
                let serving: Vec<u8> = self.living.keys().filter(settled).copied().collect();
                assert!(serving.len() <= 1, "two monitors serve {session}: {:?}", steps());
                if let (Some(monitor), Some(holder)) = (serving.first(), holder) {
                    assert_eq!(*monitor, holder, "the keeper is wrong about {session}: {:?}", steps());
                }
                if self.held.contains(&session) {
                    let anyone = self.leases.first().is_some();
                    assert_eq!(holder.is_some(), anyone, "nobody holds {session}: {:?}", steps());
                    // A holder that is connected serves; one that is not will be told, or dies.
                    let connected = holder
                        .filter(|holder| self.living.get(holder).is_some_and(|known| known.is_connected));
                    if let Some(holder) = connected {
                        assert!(receives(&holder), "nobody serves {session}: {:?}", steps());
                    }
                }
            }
            // Whoever was relieved, and only he, is told so: the overlap ends.
            for (monitor, known) in self.living.iter().filter(|(_, known)| known.is_connected) {
                assert!(
                    known.is_relieved || !self.leases.is_relieved(*monitor),
                    "{monitor} never leaves: {:?}",
                    steps()
                );
            }
            let first = self.leases.first();
            assert!(
                first.is_none_or(|first| self.living.contains_key(&first)),
                "the dead stand in line: {:?}",
                steps()
            );
        }
    }

    fn steps(monitors: u8, sessions: &[u8]) -> Vec<Step> {
        let sessions = sessions.iter().flat_map(|session| [Step::Begin(*session), Step::End(*session)]);
        let monitors = (1..=monitors).flat_map(|monitor| {
            [
                Step::Start(monitor),
                Step::Replace(monitor),
                Step::Relieve(monitor),
                Step::Disconnect(monitor),
                Step::Reconnect(monitor),
                Step::Kill(monitor),
            ]
        });
        sessions.chain(monitors).chain([Step::KillKeeper]).collect()
    }

    /// Everything that tells two worlds apart.
    type Seen = (Leases<u8, u8>, BTreeSet<u8>, BTreeMap<u8, Monitor>, Vec<u8>);

    fn try_all(steps: &[Step]) {
        let mut seen: BTreeSet<Seen> = BTreeSet::new();
        // Each with how it came about: the last step, and what it was made in.
        let mut worlds: Vec<(World, Option<(Step, usize)>)> = vec![(World::default(), None)];
        let mut at = 0;
        // Until there is no world left that was not looked at: no depth limits this.
        while let Some((world, _)) = worlds.get(at) {
            let world = world.clone();
            for step in steps {
                let mut next = world.clone();
                if !next.step(*step) {
                    continue;
                }
                let World { leases, held, living, ages } = next.clone();
                if seen.insert((leases, held, living, ages)) {
                    next.check(|| history(&worlds, (*step, at)));
                    worlds.push((next, Some((*step, at))));
                }
            }
            at += 1;
        }
        assert!(at > 1000, "only {at} worlds");
    }

    fn history(worlds: &[(World, Option<(Step, usize)>)], last: (Step, usize)) -> Vec<Step> {
        let before = |(_, at): &(Step, usize)| worlds[*at].1;
        let mut steps: Vec<_> = std::iter::successors(Some(last), before).map(|(step, _)| step).collect();
        steps.reverse();
        steps
    }

    #[test]
    fn no_order_of_events_gives_a_session_to_two_or_to_none() {
        try_all(&steps(2, &SESSIONS));
        // The keeper's death breaks connections enough.
        let mut three = steps(3, &SESSIONS[..1]);
        three.retain(|step| !matches!(step, Step::Disconnect(_)));
        try_all(&three);
    }
}
