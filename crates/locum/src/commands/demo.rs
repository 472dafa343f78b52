//! `locum demo`.

use std::ffi::{CString, OsString};
use std::io::{BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_journal::{Counters, Journal};
use locum_keeper::RuntimeDir;
use locum_kernel::{confine, handle};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::Serialize;

use super::run::{Place, Workload, choose_policy, default_user, mount_of};
use super::sweep::Sweeper;
use crate::supervise::Supervisor;
use crate::traffic::Report;

/// Shows it: an unprivileged workload does real handle traffic while the monitor is killed.
///
/// Threads without any capability name files by handle and open them again, as virtiofsd does, and check every result.
/// Meanwhile the monitor that answers them gets SIGKILL every 5 to 40 ms, and one time in eight the keeper with it: then nothing
/// of locum is left but a copy of the listener in the workload itself, and callers wait. As often, the keeper is upgraded: it goes on
/// in a program that is executed anew; and twice as often the monitor: another takes its place. Exit code 1: a call was lost or wrong.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum demo")]
pub(crate) struct Args {
    /// How long.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
    /// How many threads make calls.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// For machines.
    #[arg(long)]
    json: bool,
}

/// What came of it.
#[derive(Serialize)]
struct Figures {
    seconds: f64,
    calls: u64,
    monitors_killed: u64,
    everything_lost: u64,
    keepers_upgraded: u64,
    monitors_upgraded: u64,
    calls_recovered: u64,
    longest_wait_us: u64,
    wrong: u64,
    lost: u64,
    leaked: u64,
}

/// No answer for so long counts as lost.
const LOST: Duration = Duration::from_secs(15);

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let found = rustix::process::geteuid();
    anyhow::ensure!(found.is_root(), "wanted user 0, found user {}; use sudo", found.as_raw());
    confine::close_on_exec_from(3)?;
    let user = default_user();
    let (files, _sweeper) = folder_for(user)?;
    let place = Place::start()?;
    let supervisor = place.own.as_ref().context("the keeper is not ours")?;
    let workload = Workload::prepare(&place, choose_policy("virtiofsd")?, vec![mount_of(&files)?], user)?;
    let cmd = traffic(&files, args);
    // It is ours, and reachable as this whoever the user is.
    let mut child = workload.start(&cmd, false, |command| {
        command.stdout(Stdio::piped());
    })?;
    let start = Instant::now();
    let heard = Arc::new(Mutex::new(Report::default()));
    let ended = listen(child.stdout.take().context("no pipe")?, Arc::clone(&heard))?;
    let seen = kill_until(&ended, supervisor, &place.runtime_dir, &heard, args);
    if seen.hung {
        child.kill()?;
    }
    let status = child.wait()?;
    let report = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
    // Without its last word, at least one call never came back.
    let cut_off = u64::from(!report.done);
    let figures = Figures {
        seconds: start.elapsed().as_secs_f64(),
        calls: report.calls,
        monitors_killed: seen.killed,
        everything_lost: seen.lost,
        keepers_upgraded: seen.keepers,
        monitors_upgraded: seen.monitors,
        calls_recovered: seen.recovered(),
        longest_wait_us: report.longest_us.max(report.waiting_us),
        wrong: report.wrong,
        lost: report.failed + cut_off,
        leaked: report.leaked,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        figures.print();
    }
    if cut_off == 1 {
        eprintln!("locum: the traffic was cut off: {status}; a thread waited for {} us", report.waiting_us);
    }
    Ok(ExitCode::from(u8::from(!(report.is_clean() && report.done && figures.calls > 0))))
}

/// A folder of the workload's on a file system with handles, and who removes it.
fn folder_for((uid, gid): (u32, u32)) -> anyhow::Result<(PathBuf, Sweeper)> {
    // All of them are open to every user, and the last is a tmpfs, which has handles.
    let places = ["/var/tmp", "/tmp", "/dev/shm"].map(Path::new);
    let place = places.into_iter().find(|place| has_handles(place));
    let place =
        place.with_context(|| format!("wanted a file system with handles, found none at {places:?}"))?;
    let folder = tempfile::Builder::new().prefix("locum-demo-").tempdir_in(place)?;
    let sweeper = Sweeper::start(&[folder.path()])?;
    let folder = folder.keep();
    std::os::unix::fs::chown(&folder, Some(uid), Some(gid))?;
    Ok((folder, sweeper))
}

fn has_handles(place: &Path) -> bool {
    let Ok(path) = CString::new(place.as_os_str().as_bytes()) else { return false };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opens = || {
        let mount = rustix::fs::open(&path, flags, Mode::empty())?;
        let named = handle::name_to_handle_at(CWD, &path, AtFlags::empty())?;
        handle::open_by_handle_at(mount.as_fd(), &named.handle, flags.bits().cast_signed())
    };
    opens().is_ok()
}

fn traffic(files: &Path, args: &Args) -> Vec<OsString> {
    // This program, whoever may look at the way to it.
    let mut cmd: Vec<OsString> = ["/proc/self/exe", "traffic", "--json", "--dir"].map(Into::into).into();
    cmd.push(files.into());
    let numbers = [("--threads", args.threads), ("--seconds", args.seconds)];
    cmd.extend(numbers.into_iter().flat_map(|(name, value)| [name.into(), value.to_string().into()]));
    cmd
}

/// Keeps `heard` up to date with what the traffic tells; the receiver hangs up when it has ended.
fn listen(told: ChildStdout, heard: Arc<Mutex<Report>>) -> anyhow::Result<mpsc::Receiver<()>> {
    let (end, ended) = mpsc::channel();
    std::thread::Builder::new().name("listen".into()).spawn(move || {
        for line in BufReader::new(told).lines().map_while(Result::ok) {
            if let Ok(report) = serde_json::from_str(&line) {
                *heard.lock().unwrap_or_else(PoisonError::into_inner) = report;
            }
        }
        drop(end);
    })?;
    Ok(ended)
}

#[derive(Default)]
struct Seen {
    killed: u64,
    lost: u64,
    /// Upgraded.
    keepers: u64,
    monitors: u64,
    hung: bool,
    /// Mapped, it outlives the session's end.
    counters: Option<Counters>,
}

impl Seen {
    fn recovered(&self) -> u64 {
        self.counters.as_ref().map_or(0, |counters| counters.totals().recovered)
    }
}

/// Kills whichever monitor there is, again and again, and tells how it goes.
fn kill_until(
    ended: &mpsc::Receiver<()>,
    supervisor: &Supervisor,
    runtime_dir: &RuntimeDir,
    heard: &Mutex<Report>,
    args: &Args,
) -> Seen {
    let mut seen = Seen::default();
    let (own, mut last) = (Path::new("/proc/self/exe"), 0);
    let terminal = std::io::stderr().is_terminal();
    let mut shown = Instant::now();
    let mut moved = (0, Instant::now());
    while ended.recv_timeout(pause()) == Err(RecvTimeoutError::Timeout) {
        if let Some(pid) = supervisor.monitor_pid().filter(|pid| *pid != last) {
            last = pid;
            if seen.killed % 8 == 3 {
                // A keeper that has just been lost is not upgraded.
                seen.keepers += u64::from(supervisor.upgrade_keeper(own).is_ok());
            }
            if seen.monitors < seen.killed / 4 && supervisor.upgrade_monitor(own).is_ok() {
                // The one that took its place is the next to be killed.
                seen.monitors += 1;
            } else {
                // Who has made no call has no lifeline yet.
                let may_lose_all = seen.killed % 8 == 7 && moved.0 > 0;
                let keeper = may_lose_all.then(|| supervisor.keeper_pid()).flatten();
                let killed = kill(pid, || supervisor.monitor_pid());
                let too = keeper.is_some_and(|keeper| kill(keeper, || supervisor.keeper_pid()));
                seen.killed += u64::from(killed);
                seen.lost += u64::from(killed && too);
            }
        }
        if seen.counters.is_none() {
            seen.counters = find_journal(runtime_dir).map(|journal| Counters::of(&journal));
        }
        let report = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if report.calls != moved.0 {
            moved = (report.calls, Instant::now());
        }
        if moved.1.elapsed() > LOST || report.waiting_us > u64::try_from(LOST.as_micros()).unwrap_or(u64::MAX)
        {
            seen.hung = true;
            break;
        }
        if shown.elapsed() > Duration::from_millis(if terminal { 100 } else { 5000 }) && !args.json {
            shown = Instant::now();
            let line = format!(
                "{} calls served, {} monitors killed, {} times everything lost, {} keepers and {} monitors upgraded, {} calls recovered, longest wait {}, wrong {}, lost {}",
                report.calls,
                seen.killed,
                seen.lost,
                seen.keepers,
                seen.monitors,
                seen.recovered(),
                milliseconds(report.longest_us),
                report.wrong,
                report.failed
            );
            // Whether anyone reads along changes nothing.
            let _ = if terminal {
                write!(std::io::stderr(), "\r\x1b[K{line}")
            } else {
                writeln!(std::io::stderr(), "{line}")
            };
        }
    }
    if terminal && !args.json {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
    }
    seen
}

/// 5 to 40 ms.
fn pause() -> Duration {
    let mut byte = [0];
    // Without a random byte it is 5 ms.
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::empty());
    Duration::from_micros(5000 + u64::from(byte[0]) * 137)
}

/// SIGKILL for the process `pid`, unless `current` says that it is not the one any more.
fn kill(pid: u32, current: impl Fn() -> Option<u32>) -> bool {
    let Some(id) = Pid::from_raw(pid.cast_signed()) else { return false };
    let Ok(process) = rustix::process::pidfd_open(id, PidfdFlags::empty()) else { return false };
    current() == Some(pid) && rustix::process::pidfd_send_signal(&process, Signal::KILL).is_ok()
}

/// The journal of the only session.
fn find_journal(runtime_dir: &RuntimeDir) -> Option<Arc<Journal>> {
    let mut sessions = std::fs::read_dir(runtime_dir.sessions()).ok()?;
    Journal::open_existing(&sessions.next()?.ok()?.path().join("journal")).ok()
}

impl Figures {
    fn print(&self) {
        let rows = [
            ("calls served", self.calls.to_string()),
            ("monitors killed", self.monitors_killed.to_string()),
            ("everything lost", self.everything_lost.to_string()),
            ("keepers upgraded", self.keepers_upgraded.to_string()),
            ("monitors upgraded", self.monitors_upgraded.to_string()),
            ("calls recovered", self.calls_recovered.to_string()),
            ("longest wait", milliseconds(self.longest_wait_us)),
            ("wrong", self.wrong.to_string()),
            ("lost", self.lost.to_string()),
            ("descriptors leaked", self.leaked.to_string()),
        ];
        println!("in {:.1} s", self.seconds);
        for (what, value) in rows {
            println!("  {what:<20}{value:>14}");
        }
    }
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}
