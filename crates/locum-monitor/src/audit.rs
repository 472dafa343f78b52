//! A limit on what one workload can have written into the log. The counters count everything.

use std::sync::Mutex;

use crate::session::{lock, now_ms};

/// Lines in one second.
const LINES: u32 = 10;

/// What one session has had written in the current second.
#[derive(Debug, Default)]
pub(crate) struct Audit(Mutex<Second>);

#[derive(Debug, Default)]
struct Second {
    since: u64,
    lines: u32,
}

impl Audit {
    /// Has `tell` write its line, unless there were too many of late. The last one says so.
    pub(crate) fn tell(&self, session: &str, tell: impl FnOnce()) {
        let mut second = lock(&self.0);
        let now = now_ms();
        if now.saturating_sub(second.since) >= 1000 {
            *second = Second { since: now, lines: 0 };
        }
        second.lines = second.lines.saturating_add(1);
        if second.lines <= LINES {
            tell();
        }
        if second.lines == LINES {
            tracing::warn!(session, "{LINES} lines in a second; the rest of it is only counted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_told_of_and_then_only_counted() {
        let audit = Audit::default();
        let mut told = 0;
        for _ in 0..10_000 {
            audit.tell("s", || told += 1);
        }
        // The second may have turned over while this ran.
        assert!((LINES..=LINES * 5).contains(&told), "{told}");
    }
}
