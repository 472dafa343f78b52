//! What a service manager is told that started us: sd_notify(3). Nothing where none did.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// A service's `WatchdogSec` has to be some times this.
const BEAT: Duration = Duration::from_secs(1);

/// Tells `state`.
pub fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("cannot notify systemd: {error}");
    }
}

/// Tells again and again that a loop goes on, so that one that hangs is killed, and the next settles what it left. It does not
/// ask for `WATCHDOG_USEC`, which a process that is started by `ExecReload` does not get.
#[derive(Debug)]
pub struct Heartbeat {
    /// `None`: nobody wants to know.
    due: Option<Instant>,
}

impl Heartbeat {
    /// The first is due now.
    pub fn start() -> Self {
        Self { due: std::env::var_os("NOTIFY_SOCKET").map(|_| Instant::now()) }
    }

    /// Tells, if it is due.
    pub fn beat(&mut self) {
        let now = Instant::now();
        if self.due.is_some_and(|due| due <= now) {
            tell(NotifyState::Watchdog);
            self.due = Some(now + BEAT);
        }
    }

    /// When the next is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }
}
