//! Which monitor serves which session: one at a time, the longest-serving one that lives.

use std::collections::BTreeMap;

use crate::protocol::SessionId;

/// Names a monitor's connection, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct MonitorId(pub(crate) u64);

/// The leases. Pure: what it returns is what the keeper has to tell.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leases {
    monitors: Vec<MonitorId>,
    holders: BTreeMap<SessionId, Option<MonitorId>>,
}

impl Leases {
    /// A monitor came: it gets what nobody holds.
    pub(crate) fn join(&mut self, monitor: MonitorId) -> Vec<(SessionId, MonitorId)> {
        self.monitors.push(monitor);
        self.grant()
    }

    /// A monitor's connection ended, so all its threads have: what it held goes to the next in line.
    pub(crate) fn leave(&mut self, monitor: MonitorId) -> Vec<(SessionId, MonitorId)> {
        self.monitors.retain(|known| *known != monitor);
        for holder in self.holders.values_mut().filter(|holder| **holder == Some(monitor)) {
            *holder = None;
        }
        self.grant()
    }

    /// A session began, or one more listener of it came. Returns who is to serve it; `None` while there is no monitor.
    pub(crate) fn open(&mut self, session: &SessionId) -> Option<MonitorId> {
        let next = self.current();
        *self.holders.entry(session.clone()).or_insert(next)
    }

    /// `monitor` says that it serves `session`. False if another one does.
    pub(crate) fn fill(&mut self, session: &SessionId, monitor: MonitorId) -> bool {
        *self.holders.entry(session.clone()).or_insert(Some(monitor)) == Some(monitor)
    }

    /// The last listener of a session ended.
    pub(crate) fn close(&mut self, session: &SessionId) {
        self.holders.remove(session);
    }

    /// Who serves `session`.
    pub(crate) fn holder(&self, session: &SessionId) -> Option<MonitorId> {
        self.holders.get(session).copied().flatten()
    }

    /// The monitor that gets what is new.
    pub(crate) fn current(&self) -> Option<MonitorId> {
        self.monitors.first().copied()
    }

    fn grant(&mut self) -> Vec<(SessionId, MonitorId)> {
        let Some(next) = self.current() else { return Vec::new() };
        let free = self.holders.iter_mut().filter(|(_, holder)| holder.is_none());
        free.map(|(session, holder)| {
            *holder = Some(next);
            (session.clone(), next)
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What really is: who lives, and who was told to serve what and has not died since.
    #[derive(Clone, Default)]
    struct World {
        leases: Leases,
        alive: BTreeSet<MonitorId>,
        told: BTreeMap<SessionId, MonitorId>,
        open: BTreeSet<SessionId>,
        next: u64,
    }

    impl World {
        fn tell(&mut self, grants: Vec<(SessionId, MonitorId)>) {
            for (session, monitor) in grants {
                assert!(self.alive.contains(&monitor), "granted to a dead monitor");
                assert_eq!(self.told.insert(session, monitor), None, "granted while another serves");
            }
        }

        /// Every world that one step leads to.
        fn steps(&self) -> Vec<World> {
            let mut all = Vec::new();
            let mut with = |step: &dyn Fn(&mut World)| {
                let mut world = self.clone();
                step(&mut world);
                world.check();
                all.push(world);
            };
            if self.alive.len() < 3 {
                with(&World::monitor_comes);
            }
            for monitor in &self.alive {
                with(&|world| world.monitor_dies(*monitor));
            }
            for name in ["a", "b"] {
                with(&|world| world.session_begins_or_ends(&SessionId(name.to_owned())));
            }
            for reversed in [false, true] {
                with(&|world| world.keeper_dies(reversed));
            }
            all
        }

        fn monitor_comes(&mut self) {
            let monitor = MonitorId(self.next);
            self.next += 1;
            self.alive.insert(monitor);
            let grants = self.leases.join(monitor);
            self.tell(grants);
        }

        fn monitor_dies(&mut self, monitor: MonitorId) {
            self.alive.remove(&monitor);
            self.told.retain(|_, holder| *holder != monitor);
            let grants = self.leases.leave(monitor);
            self.tell(grants);
        }

        fn session_begins_or_ends(&mut self, session: &SessionId) {
            if self.open.remove(session) {
                self.leases.close(session);
                self.told.remove(session);
                return;
            }
            self.open.insert(session.clone());
            if let Some(monitor) = self.leases.open(session) {
                self.tell(vec![(session.clone(), monitor)]);
            }
        }

        /// A new keeper knows nothing; each living monitor comes, in any order, and fills it.
        fn keeper_dies(&mut self, reversed: bool) {
            self.leases = Leases::default();
            let mut alive: Vec<_> = self.alive.iter().copied().collect();
            if reversed {
                alive.reverse();
            }
            for monitor in alive {
                let grants = self.leases.join(monitor);
                self.tell(grants);
                for (session, _) in self.told.iter().filter(|(_, holder)| **holder == monitor) {
                    assert!(self.leases.fill(session, monitor), "a session that it serves was denied it");
                }
            }
            // What no living monitor held is lost with the keeper.
            self.open = self.told.keys().cloned().collect();
        }

        fn check(&self) {
            for session in &self.open {
                let holder = self.leases.holder(session);
                assert_eq!(holder, self.told.get(session).copied(), "keeper and monitors disagree");
                assert!(holder.is_some() || self.alive.is_empty(), "nobody serves, though somebody could");
            }
        }
    }

    #[test]
    fn at_every_step_of_every_history_each_session_has_the_one_monitor_that_it_can_have() {
        let mut worlds = vec![World::default()];
        for _ in 0..6 {
            worlds = worlds.iter().flat_map(World::steps).collect();
        }
        assert!(worlds.len() > 10_000, "{} histories are too few to mean anything", worlds.len());
    }
}
