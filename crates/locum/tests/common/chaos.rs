//! What the tests that kill at random share: choices that can be repeated, and a look at everything that must not be.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Ground, Process, Traffic, children, list, until};

/// Fails, with all there is to see, if no call returns for five seconds, or one of them does not, and a monitor that is left
/// alone does not change that: on a busy machine, none may have lived long enough.
pub(crate) struct Watchdog {
    calls: u64,
    moved: Instant,
}

impl Watchdog {
    const PATIENCE: Duration = Duration::from_secs(5);

    pub(crate) fn new() -> Self {
        Self { calls: 0, moved: Instant::now() }
    }

    pub(crate) fn look(&mut self, ground: &Ground, traffic: &Traffic) {
        if !self.is_stuck(traffic) {
            return;
        }
        let (_monitor, start) = (ground.monitor(), Instant::now());
        while self.is_stuck(traffic) && !traffic.has_ended() {
            let hangs = start.elapsed() > Self::PATIENCE;
            assert!(!hangs, "hanging: {}\n{}", traffic.report(), autopsy(ground, traffic));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_stuck(&mut self, traffic: &Traffic) -> bool {
        let calls = traffic.number("calls");
        if calls != self.calls {
            (self.calls, self.moved) = (calls, Instant::now());
        }
        let waits = Duration::from_micros(traffic.number("waiting_us"));
        self.moved.elapsed() > Self::PATIENCE || waits > Self::PATIENCE
    }
}

/// Where every thread of the workload is, what the journals hold, what the monitors said last.
fn autopsy(ground: &Ground, traffic: &Traffic) -> String {
    let mut text = String::new();
    for pid in children(traffic.run.pid()) {
        let tasks = format!("/proc/{pid}/task");
        for tid in std::fs::read_dir(&tasks).map(|_| list(tasks.as_ref())).unwrap_or_default() {
            let read = |name| std::fs::read_to_string(format!("{tasks}/{tid}/{name}")).unwrap_or_default();
            let _ = writeln!(text, "thread {tid} of {pid}: {} {}", read("syscall").trim(), read("wchan"));
        }
    }
    let sessions = ground.runtime.path().join("sessions");
    for session in std::fs::read_dir(&sessions).map(|_| list(&sessions)).unwrap_or_default() {
        let bytes = std::fs::read(sessions.join(&session).join("journal")).unwrap_or_default();
        let words: Vec<u64> =
            bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
        let _ = writeln!(text, "journal of {session}: {:?}", words.get(2..8));
        for (index, slot) in words.get(512..).unwrap_or_default().chunks_exact(64).enumerate() {
            if slot.iter().any(|word| *word != 0) {
                let _ = writeln!(
                    text,
                    "slot {index}: call {:x?}; listener, stage ... {:x?}",
                    &slot[..4],
                    &slot[32..40]
                );
            }
        }
    }
    let _ = writeln!(text, "{}", ground.log_tail());
    text
}

/// The last word of traffic that has ended, with at most `leaks` descriptors leaked.
pub(crate) fn must_be_clean(ground: &Ground, traffic: Traffic, leaks: u64) -> Value {
    let (status, report) = traffic.finish();
    assert!(report["done"] == true, "{status}: {report}\n{}", ground.log_tail());
    for (what, most) in [("wrong", 0), ("failed", 0), ("leaked", leaks)] {
        assert!(report[what].as_u64().unwrap() <= most, "{what}: {report}\n{}", ground.log_tail());
    }
    report
}

/// Keeper and monitor when nothing happens: how many descriptors each has.
pub(crate) fn quiet(ground: &Ground, keeper: &Process) -> (usize, usize) {
    let monitor = ground.monitor();
    until("a monitor that serves nobody", || {
        let status = ground.status();
        status["monitor"]["pid"] == monitor.pid() && status["sessions"].as_array().is_some_and(Vec::is_empty)
    });
    (settled(keeper), settled(&monitor))
}

/// How many descriptors a process has when it has closed what the last question to it opened.
fn settled(process: &Process) -> usize {
    let mut last = (process.descriptors(), 0);
    until("a process that rests", || {
        std::thread::sleep(Duration::from_millis(20));
        let now = process.descriptors();
        last = (now, if now == last.0 { last.1 + 1 } else { 0 });
        last.1 == 5
    });
    last.0
}
