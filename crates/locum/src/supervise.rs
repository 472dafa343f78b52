//! Keeper and monitor as children of this process, each started anew when it dies.
//!
//! The sockets are bound here and lent to the keeper, so that a runtime that connects while a keeper is being replaced
//! waits and is not refused.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_keeper::client;
use locum_keeper::{RuntimeDir, Sockets};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};

/// A child that lived for less than this, and ended by itself, is not started again at once.
const TOO_SHORT: Duration = Duration::from_millis(500);
/// The longest pause before it is.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long keeper and monitor may take to find each other.
const PATIENCE: Duration = Duration::from_secs(20);

/// What keeper and monitor are started with.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The directory of keys.
    pub(crate) keys: PathBuf,
    /// The rootless users who get a door.
    pub(crate) users: Vec<u32>,
    /// Policy files beside the built-in ones.
    pub(crate) policies: Vec<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { keys: PathBuf::from("/etc/locum/keys"), users: Vec::new(), policies: Vec::new() }
    }
}

/// A keeper and a monitor that end with this.
#[derive(Debug)]
pub(crate) struct Supervisor {
    runtime_dir: RuntimeDir,
    pids: Arc<[AtomicU32; 2]>,
    /// What is started.
    program: Arc<Mutex<OwnedFd>>,
    /// Closed to have the thread end.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts both, and waits until the keeper has a monitor.
    pub(crate) fn start(runtime_dir: &RuntimeDir, options: Options) -> anyhow::Result<Self> {
        let sockets = Sockets::bind(runtime_dir, &options.users)
            .with_context(|| format!("cannot bind the sockets in {}", runtime_dir.path().display()))?;
        let pids = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let (stop, stopped) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (tell, told) = mpsc::channel();
        let program = Arc::new(Mutex::new(open_program(Path::new("/proc/self/exe"))?));
        let own = Supervised {
            runtime_dir: runtime_dir.clone(),
            options,
            sockets,
            pids: Arc::clone(&pids),
            program: Arc::clone(&program),
        };
        // One thread starts every child: a child's parent, to the kernel, is the thread that forked it.
        let thread =
            std::thread::Builder::new().name("supervise".into()).spawn(move || own.run(&stop, &tell))?;
        let runtime_dir = runtime_dir.clone();
        let supervisor = Self { runtime_dir, pids, program, stop: Some(stopped), thread: Some(thread) };
        await_monitor(&supervisor.runtime_dir, &told)?;
        Ok(supervisor)
    }

    /// Has the keeper go on in the file `program`, which then is what is started when one of the two dies. Returns the release that
    /// it is; an error leaves all as it is.
    pub(crate) fn upgrade(&self, program: &Path) -> anyhow::Result<String> {
        let file = open_program(program)?;
        let (_, release) = client::upgrade(&self.runtime_dir, file.as_fd())?;
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(release)
    }

    /// The keeper's process id, if it lives.
    pub(crate) fn keeper_pid(&self) -> Option<u32> {
        self.pid(0)
    }

    /// The monitor's process id, if it lives.
    pub(crate) fn monitor_pid(&self) -> Option<u32> {
        self.pid(1)
    }

    fn pid(&self, index: usize) -> Option<u32> {
        Some(self.pids[index].load(Ordering::Acquire)).filter(|pid| *pid != 0)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until there is a monitor, or one of the two cannot be started.
fn await_monitor(runtime_dir: &RuntimeDir, failures: &mpsc::Receiver<String>) -> anyhow::Result<()> {
    let (tell, told) = mpsc::channel();
    let asked = runtime_dir.clone();
    // The keeper answers when there is a monitor; a failure may come first. The question ends with the keeper.
    std::thread::Builder::new().name("await".into()).spawn(move || {
        loop {
            match client::status(&asked, true) {
                Err(error) if error.is_absence() => std::thread::sleep(Duration::from_millis(1)),
                answer => return tell.send(answer.map(drop)),
            }
        }
    })?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match told.recv_timeout(Duration::from_millis(20)) {
            Ok(answer) => return answer.context("the keeper cannot say whether there is a monitor"),
            Err(_) if Instant::now() > deadline => {
                anyhow::bail!("keeper and monitor did not find each other in {PATIENCE:?}")
            }
            Err(_) => {}
        }
        if let Ok(failure) = failures.try_recv() {
            anyhow::bail!(failure);
        }
    }
}

/// A file to be executed, whatever becomes of its path.
pub(crate) fn open_program(path: &Path) -> anyhow::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open the program {}", path.display()))
}

struct Supervised {
    runtime_dir: RuntimeDir,
    options: Options,
    sockets: Sockets,
    pids: Arc<[AtomicU32; 2]>,
    program: Arc<Mutex<OwnedFd>>,
}

/// One of the two, while it lives.
struct Running {
    child: Child,
    pidfd: OwnedFd,
    since: Instant,
}

/// One of the two.
struct Role {
    name: &'static str,
    running: Option<Running>,
    /// When it is to be started.
    due: Instant,
    pause: Duration,
}

impl Supervised {
    fn run(&self, stop: &OwnedFd, failures: &mpsc::Sender<String>) {
        let role = |name| Role { name, running: None, due: Instant::now(), pause: Duration::ZERO };
        let mut roles = [role("keeper"), role("monitor")];
        loop {
            for (index, role) in roles.iter_mut().enumerate() {
                if role.running.is_none() && role.due <= Instant::now() {
                    match self.start(role.name) {
                        Ok(running) => {
                            self.pids[index].store(running.child.id(), Ordering::Release);
                            role.running = Some(running);
                        }
                        Err(error) => {
                            tracing::error!("cannot start the {}: {error:#}", role.name);
                            role.wait_longer();
                        }
                    }
                }
            }
            if wait(stop, &roles) {
                break;
            }
            for (index, role) in roles.iter_mut().enumerate() {
                let Some(running) = &mut role.running else { continue };
                let Ok(Some(status)) = running.child.try_wait() else { continue };
                self.pids[index].store(0, Ordering::Release);
                role.ended(status, failures);
            }
        }
        for mut running in roles.into_iter().rev().filter_map(|role| role.running) {
            let _ = rustix::process::pidfd_send_signal(&running.pidfd, Signal::KILL);
            let _ = running.child.wait();
        }
        self.sockets.remove(&self.runtime_dir);
    }

    fn start(&self, name: &str) -> anyhow::Result<Running> {
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner);
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.arg0("locum");
        // Systemd is told by us how we are.
        command.env_remove("NOTIFY_SOCKET");
        command.env("LOCUM_LOG", crate::LOG.get().map_or("info", String::as_str));
        command.arg(name).arg("--runtime-dir").arg(self.runtime_dir.path());
        command.args(["--parent", &std::process::id().to_string()]);
        if name == "keeper" {
            let (ours, theirs) = rustix::net::socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            self.sockets.send(&ours)?;
            command.arg("--sockets-on-stdin").stdin(Stdio::from(theirs));
        } else {
            command.arg("--keys").arg(&self.options.keys).stdin(Stdio::null());
            for policy in &self.options.policies {
                command.arg("--policy").arg(policy);
            }
        }
        // In a group of their own: what a terminal sends is for this process alone.
        let child = command.stdout(Stdio::null()).process_group(0).spawn()?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Running { child, pidfd, since: Instant::now() })
    }
}

impl Role {
    fn ended(&mut self, status: ExitStatus, failures: &mpsc::Sender<String>) {
        let lived = self.running.take().map_or(Duration::ZERO, |running| running.since.elapsed());
        // What a signal ended says nothing about the next one.
        let by_itself = status.signal().is_none();
        if by_itself && lived < TOO_SHORT {
            let failure =
                format!("the {} ended right after its start ({status}); see its messages", self.name);
            self.wait_longer();
            tracing::error!("{failure}; starting it again in {:?}", self.pause);
            let _ = failures.send(failure);
        } else {
            tracing::warn!("the {} ended ({status}); starting it again", self.name);
            (self.pause, self.due) = (Duration::ZERO, Instant::now());
        }
    }

    fn wait_longer(&mut self) {
        self.pause = (self.pause * 2).clamp(Duration::from_millis(100), LONGEST_PAUSE);
        self.due = Instant::now() + self.pause;
    }
}

/// Waits until one of them ends or is due. True: they are to be stopped.
fn wait(stop: &OwnedFd, roles: &[Role]) -> bool {
    let mut polled = vec![PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)];
    let running = roles.iter().filter_map(|role| role.running.as_ref());
    polled.extend(running.map(|running| PollFd::new(&running.pidfd, PollFlags::IN)));
    let due = roles.iter().filter(|role| role.running.is_none()).map(|role| role.due).min();
    let timeout = due.map(|due| due.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
    // Interrupted is as good as nothing: the loop looks again.
    let _ = rustix::event::poll(&mut polled, timeout.as_ref());
    !polled[0].revents().is_empty()
}
