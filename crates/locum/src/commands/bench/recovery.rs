//! How long callers wait when the monitor is killed: from SIGKILL to the successor's first answer.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use locum_kernel::handle::name_to_handle_at;
use locum_kernel::mapping::SharedWords;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::Setup;
use crate::supervise::Supervisor;

/// Words of the shared file: answers so far, and when the last one came, in nanoseconds of the monotonic clock.
const WORDS: usize = 2;

/// Calls for ever, noting each answer in the file at `pulse`.
pub(super) fn beat(dir: &Path, pulse: &Path) -> anyhow::Result<std::convert::Infallible> {
    let words = map(pulse)?;
    let dir = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    loop {
        name_to_handle_at(dir.as_fd(), c"", AtFlags::EMPTY_PATH).context("name_to_handle_at")?;
        words[1].store(now(), Ordering::Release);
        words[0].fetch_add(1, Ordering::Release);
    }
}

fn map(path: &Path) -> anyhow::Result<SharedWords> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    Ok(SharedWords::map(&file, WORDS)?)
}

fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Kills the monitor `kills` times under a caller; how long each time until the successor's first answer.
pub(super) fn measure(setup: &Setup, supervisor: &Supervisor, kills: usize) -> anyhow::Result<Vec<Duration>> {
    let pulse = setup.export.path().join("pulse");
    std::fs::write(&pulse, [0; WORDS * 8])?;
    std::fs::set_permissions(&pulse, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let words = map(&pulse)?;
    let args = ["--pulse".into(), pulse.into_os_string()];
    let mut caller = setup.start_caller(0, 1, &args)?;
    let gaps = (0..kills).map(|_| {
        answers_more(&words, 50)?;
        let pid = supervisor.monitor_pid().context("there is no monitor to kill")?;
        let pid = Pid::from_raw(pid.cast_signed()).context("a monitor without an id")?;
        let monitor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let killed = now();
        rustix::process::pidfd_send_signal(&monitor, Signal::KILL)?;
        rustix::event::poll(&mut [PollFd::new(&monitor, PollFlags::IN)], None)?;
        // What comes from here on is the successor's.
        answers_more(&words, 1)?;
        Ok(Duration::from_nanos(words[1].load(Ordering::Acquire).saturating_sub(killed)))
    });
    let gaps = gaps.collect::<anyhow::Result<Vec<_>>>();
    caller.kill()?;
    caller.wait()?;
    gaps
}

/// Waits for `more` answers.
fn answers_more(words: &SharedWords, more: u64) -> anyhow::Result<()> {
    let (start, deadline) = (words[0].load(Ordering::Acquire), now() + 10_000_000_000);
    while words[0].load(Ordering::Acquire) < start + more {
        anyhow::ensure!(now() < deadline, "no answer in 10 s");
        std::thread::yield_now();
    }
    Ok(())
}
