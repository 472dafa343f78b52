//! How long callers wait when the monitor is killed, or everything: from SIGKILL to the first answer of what comes after.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use locum_journal::{Counters, Journal};
use locum_kernel::Errno;
use locum_kernel::handle::name_to_handle_at;
use locum_kernel::mapping::SharedWords;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::Setup;
use crate::commands::run::Workload;
use crate::supervise::Supervisor;

/// Words of the shared file: answers so far, and when the last one came, in nanoseconds of the monotonic clock.
const WORDS: usize = 2;

/// Calls for ever, noting each answer in the file at `pulse`.
pub(super) fn beat(dir: &Path, pulse: &Path) -> anyhow::Result<std::convert::Infallible> {
    let words = map(pulse)?;
    let dir = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    loop {
        match name_to_handle_at(dir.as_fd(), c"", AtFlags::EMPTY_PATH) {
            // There is no listener.
            Err(Errno::NOSYS) => {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            named => named.context("name_to_handle_at")?,
        };
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

/// What is lost.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    Monitor,
    /// Keeper and monitor; the listener comes back from the workload.
    Both,
    /// The same, and the journal, so that the call in the making is asked again.
    Journal,
    /// Keeper and monitor, without a lifeline: another listener is put in.
    Listener,
}

/// Has this lost `kills` times under a caller; how long each time until the first answer of what comes after.
pub(super) fn measure(
    setup: &Setup,
    workload: &Workload,
    kills: usize,
    loss: Loss,
) -> anyhow::Result<Vec<Duration>> {
    let supervisor = setup.place.own.as_ref().context("the keeper is not ours")?;
    let pulse = setup.export.path().join("pulse");
    std::fs::write(&pulse, [0; WORDS * 8])?;
    std::fs::set_permissions(&pulse, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let words = map(&pulse)?;
    let args = ["--pulse".into(), pulse.into_os_string()];
    let mut caller = setup.start_caller(workload, 0, 1, &args)?;
    let mut gaps = Vec::new();
    let mut measure = || -> anyhow::Result<()> {
        // Now and then no call was in the making: then none was asked again.
        for _ in 0..kills * 10 {
            let gap = lose(setup, supervisor, &words, loss)?;
            if loss != Loss::Journal || recovered(setup)? > 0 {
                gaps.push(gap);
            }
            if gaps.len() == kills {
                return Ok(());
            }
        }
        anyhow::bail!("of {} calls, only {} were in the making when all was lost", kills * 10, gaps.len())
    };
    let measured = measure();
    caller.kill()?;
    caller.wait()?;
    measured.map(|()| gaps)
}

fn lose(setup: &Setup, supervisor: &Supervisor, words: &SharedWords, loss: Loss) -> anyhow::Result<Duration> {
    answers_more(words, 50)?;
    let monitor = there("monitor", || supervisor.monitor_pid())?;
    let keeper = (loss != Loss::Monitor).then(|| there("keeper", || supervisor.keeper_pid())).transpose()?;
    let hold = |pid: u32| -> anyhow::Result<_> {
        let pid = Pid::from_raw(pid.cast_signed()).context("a process without an id")?;
        Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
    };
    let processes = keeper.into_iter().chain([monitor]).map(hold).collect::<anyhow::Result<Vec<_>>>()?;
    if loss == Loss::Journal {
        // Who has it mapped does not notice.
        std::fs::remove_file(journal(setup)?)?;
    }
    let killed = now();
    for process in &processes {
        rustix::process::pidfd_send_signal(process, Signal::KILL)?;
    }
    for process in &processes {
        rustix::event::poll(&mut [PollFd::new(process, PollFlags::IN)], None)?;
    }
    // What comes from here on is the successor's.
    answers_more(words, 1)?;
    Ok(Duration::from_nanos(words[1].load(Ordering::Acquire).saturating_sub(killed)))
}

/// Waits for what is only being replaced.
fn there<T>(what: &str, look: impl Fn() -> Option<T>) -> anyhow::Result<T> {
    let deadline = now() + 10_000_000_000;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        anyhow::ensure!(now() < deadline, "there is no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The journal of the only session.
fn journal(setup: &Setup) -> anyhow::Result<std::path::PathBuf> {
    there("journal", || find_journal(setup))
}

fn find_journal(setup: &Setup) -> Option<std::path::PathBuf> {
    let mut sessions = std::fs::read_dir(setup.place.runtime_dir.sessions()).ok()?;
    sessions.find_map(|folder| Some(folder.ok()?.path().join("journal")).filter(|path| path.exists()))
}

fn recovered(setup: &Setup) -> anyhow::Result<u64> {
    Ok(Counters::of(&Journal::open_existing(&journal(setup)?)?).totals().recovered)
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
