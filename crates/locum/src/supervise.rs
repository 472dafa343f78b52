//! Keeper and monitor as children of this process, each started anew when it dies.
//!
//! The sockets are bound here and lent to the keeper, so that a runtime that connects while a keeper is being replaced
//! waits and is not refused.

use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
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
/// How long a monitor that was relieved may stay: longer than it takes by itself, and not so long that a call which has to wait
/// for its end is late.
pub(crate) const GRACE: Duration = Duration::from_secs(6);

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
    orders: mpsc::Sender<Order>,
    /// Wakes the thread for an order. Closed to have it end.
    wake: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread is to do.
enum Order {
    /// Nothing but to know that the keeper is this program now.
    Keeper(Arc<OwnedFd>),
    /// To have a monitor that is this program take the place of the one that runs, and to tell what came of it.
    Monitor(Arc<OwnedFd>, mpsc::Sender<anyhow::Result<()>>),
}

impl Supervisor {
    /// Starts both, and waits until the keeper has a monitor.
    pub(crate) fn start(runtime_dir: &RuntimeDir, options: Options) -> anyhow::Result<Self> {
        let sockets = Sockets::bind(runtime_dir, &options.users)
            .with_context(|| format!("cannot bind the sockets in {}", runtime_dir.path().display()))?;
        let pids = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let (woken, wake) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (tell, told) = mpsc::channel();
        let (orders, ordered) = mpsc::channel();
        let program = Arc::new(open_program(Path::new("/proc/self/exe"))?);
        let own = Supervised {
            runtime_dir: runtime_dir.clone(),
            options,
            sockets,
            pids: Arc::clone(&pids),
            ordered,
        };
        // One thread starts every child: a child's parent, to the kernel, is the thread that forked it.
        let thread = std::thread::Builder::new()
            .name("supervise".into())
            .spawn(move || own.run(&program, &woken, &tell))?;
        let runtime_dir = runtime_dir.clone();
        let supervisor = Self { runtime_dir, pids, orders, wake: Some(wake), thread: Some(thread) };
        await_monitor(&supervisor.runtime_dir, &told)?;
        Ok(supervisor)
    }

    /// Has the keeper go on in the file `program`, which then is what is started when it dies. Returns the release that it is; an
    /// error leaves it as it is.
    pub(crate) fn upgrade_keeper(&self, program: &Path) -> anyhow::Result<String> {
        let file = open_program(program)?;
        let (_, release) = client::upgrade(&self.runtime_dir, file.as_fd())?;
        self.order(Order::Keeper(Arc::new(file)))?;
        Ok(release)
    }

    /// Has a monitor that is the file `program` take the place of the one that runs, also whenever it dies. An error leaves that in its
    /// place.
    pub(crate) fn upgrade_monitor(&self, program: &Path) -> anyhow::Result<()> {
        let (tell, told) = mpsc::channel();
        self.order(Order::Monitor(Arc::new(open_program(program)?), tell))?;
        told.recv().context("nobody starts monitors any more")?
    }

    fn order(&self, order: Order) -> anyhow::Result<()> {
        self.orders.send(order).ok().context("nobody starts keepers and monitors any more")?;
        self.wake.as_ref().map(|wake| rustix::io::write(wake, &[0])).transpose()?;
        Ok(())
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
        self.wake = None;
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
    ordered: mpsc::Receiver<Order>,
}

/// One of the two, while it lives.
struct Running {
    child: Child,
    pidfd: OwnedFd,
    since: Instant,
}

/// A monitor that is to take the place of the one that runs.
struct Upgrade {
    program: Arc<OwnedFd>,
    running: Running,
    /// Says when it serves.
    said: ChildStdout,
    tell: mpsc::Sender<anyhow::Result<()>>,
}

/// One of the two.
struct Role {
    name: &'static str,
    /// What it is started from.
    program: Arc<OwnedFd>,
    running: Option<Running>,
    /// When it is to be started.
    due: Instant,
    pause: Duration,
}

impl Supervised {
    fn run(&self, program: &Arc<OwnedFd>, woken: &OwnedFd, failures: &mpsc::Sender<String>) {
        let role = |name| {
            let program = Arc::clone(program);
            Role { name, program, running: None, due: Instant::now(), pause: Duration::ZERO }
        };
        let mut roles = [role("keeper"), role("monitor")];
        let (mut upgrade, mut leaving) = (None, Vec::new());
        loop {
            for (index, role) in roles.iter_mut().enumerate() {
                // What is to take the place of one that died meanwhile is the next one.
                let is_coming = index == 1 && upgrade.is_some();
                if role.running.is_none() && !is_coming && role.due <= Instant::now() {
                    match self.start(role.name, &role.program, false) {
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
            let wake = wait(woken, &roles, upgrade.as_ref(), &leaving);
            if wake.contains(PollFlags::HUP) {
                break;
            }
            if wake.contains(PollFlags::IN) && rustix::io::read(woken, &mut [0]) == Ok(1) {
                match self.ordered.try_recv() {
                    Ok(Order::Keeper(program)) => roles[0].program = program,
                    Ok(Order::Monitor(program, tell)) => upgrade = self.begin_upgrade(program, tell),
                    Err(_) => {}
                }
            }
            upgrade = upgrade.and_then(|upgrade| self.go_on(upgrade, &mut roles[1], &mut leaving));
            for (index, role) in roles.iter_mut().enumerate() {
                let Some(running) = &mut role.running else { continue };
                let Ok(Some(status)) = running.child.try_wait() else { continue };
                self.pids[index].store(0, Ordering::Release);
                role.ended(status, failures);
            }
            leaving.retain_mut(|(running, until): &mut (Running, Instant)| !running.has_left(*until));
        }
        let rest = upgrade.into_iter().map(|upgrade: Upgrade| upgrade.running);
        let rest = rest.chain(leaving.into_iter().map(|(running, _)| running));
        for mut running in roles.into_iter().rev().filter_map(|role| role.running).chain(rest) {
            running.kill();
        }
        self.sockets.remove(&self.runtime_dir);
    }

    fn begin_upgrade(
        &self,
        program: Arc<OwnedFd>,
        tell: mpsc::Sender<anyhow::Result<()>>,
    ) -> Option<Upgrade> {
        let begun = self.start("monitor", &program, true).and_then(|mut running| {
            let said = running.child.stdout.take().context("no pipe")?;
            Ok((running, said))
        });
        match begun {
            Ok((running, said)) => Some(Upgrade { program, running, said, tell }),
            Err(error) => {
                // Whoever asked may have gone.
                let _ = tell.send(Err(error.context("cannot start the new monitor")));
                None
            }
        }
    }

    /// Looks how far an upgrade is. `None`: it is over.
    fn go_on(
        &self,
        mut upgrade: Upgrade,
        monitor: &mut Role,
        leaving: &mut Vec<(Running, Instant)>,
    ) -> Option<Upgrade> {
        let has_said = is_readable(&upgrade.said);
        if !has_said && upgrade.running.since.elapsed() < PATIENCE {
            return Some(upgrade);
        }
        if !has_said || !matches!(upgrade.said.read(&mut [0]), Ok(1)) {
            let status = upgrade.running.kill();
            let _ = upgrade.tell.send(Err(anyhow::anyhow!(
                "the new monitor does not serve, it ended ({status}), see its messages; whoever served serves on"
            )));
            return None;
        }
        self.pids[1].store(upgrade.running.child.id(), Ordering::Release);
        monitor.program = upgrade.program;
        let old = monitor.running.replace(upgrade.running);
        leaving.extend(old.map(|old| (old, Instant::now() + GRACE)));
        let _ = upgrade.tell.send(Ok(()));
        None
    }

    fn start(&self, name: &str, program: &OwnedFd, replaces: bool) -> anyhow::Result<Running> {
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.arg0("locum").stdout(Stdio::null());
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
            if replaces {
                command.args(["--replace", "--tell"]).stdout(Stdio::piped());
            }
        }
        // In a group of their own: what a terminal sends is for this process alone.
        let child = command.process_group(0).spawn()?;
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Running { child, pidfd, since: Instant::now() })
    }
}

impl Running {
    /// Ends it, if it has not ended by itself, and returns how it did.
    fn kill(&mut self) -> String {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Whether it has ended, as it was to by `until`.
    fn has_left(&mut self, until: Instant) -> bool {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return true;
        }
        let is_late = until <= Instant::now();
        if is_late {
            tracing::error!(pid = self.child.id(), "a monitor that was relieved does not end; killed");
            self.kill();
        }
        is_late
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

/// Waits until one of them ends, is due or says something, or the thread is woken: for an order, which is not taken during an
/// upgrade, or to end (`HUP`).
fn wait(
    woken: &OwnedFd,
    roles: &[Role],
    upgrade: Option<&Upgrade>,
    leaving: &[(Running, Instant)],
) -> PollFlags {
    let orders = if upgrade.is_none() { PollFlags::IN } else { PollFlags::empty() };
    let mut polled = vec![PollFd::from_borrowed_fd(woken.as_fd(), orders)];
    let running = roles.iter().filter_map(|role| role.running.as_ref());
    let running = running.chain(leaving.iter().map(|(running, _)| running));
    polled.extend(running.map(|running| PollFd::new(&running.pidfd, PollFlags::IN)));
    polled.extend(upgrade.map(|upgrade| PollFd::new(&upgrade.said, PollFlags::IN)));
    let is_coming = |role: &&Role| role.name == "monitor" && upgrade.is_some();
    let due = roles.iter().filter(|role| role.running.is_none() && !is_coming(role)).map(|role| role.due);
    let due = due.chain(leaving.iter().map(|(_, until)| *until));
    let due = due.chain(upgrade.map(|upgrade| upgrade.running.since + PATIENCE)).min();
    let timeout = due.map(|due| due.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
    // Interrupted is as good as nothing: the loop looks again.
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) => polled[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

fn is_readable(pipe: &ChildStdout) -> bool {
    let mut polled = [PollFd::new(pipe, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec::default())) == Ok(1)
}
