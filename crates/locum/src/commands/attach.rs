//! `locum attach` and `locum detach`.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_keeper::protocol::SessionReport;
use locum_keeper::{RuntimeDir, client};
use locum_kernel::attach::{self, Refusal};
use locum_kernel::filter::{Filter, Origin, Wait};
use locum_kernel::hand_over::Unfit;
use locum_kernel::notify::Listener;
use locum_kernel::process::Thread;
use locum_kernel::verdict::{Action, InForce};
use locum_kernel::{Errno, arch};
use locum_monitor::reattach::{self, Filters, Lost, Told};
use locum_policy::Policy;

use super::confined::{self, Delivery};
use super::processes::{Named, Processes};
use super::whose::{Whose, whose};

/// Serves processes that run already: with no profile of ours, or after they have lost their listener.
///
/// Each process gets a filter of its own, for all its threads; what it starts later inherits it. A filter never leaves again.
/// Needs root, without a seccomp filter on this program itself, and no_new_privs in the process.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum attach --pid 4711 --policy virtiofsd")]
pub(crate) struct Args {
    #[command(flatten)]
    named: Named,
    /// The policy: a built-in one, or one that the monitor was given.
    #[arg(long, value_name = "NAME", default_value = "virtiofsd")]
    policy: String,
    /// Where the keeper works.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// Says what would be done to which process, and does nothing.
    #[arg(long)]
    dry_run: bool,
    /// Sets no_new_privs where it is missing, for good: set-user-id programs will not work there any more.
    #[arg(long)]
    set_no_new_privs: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    super::processes::must_be_root("attach")?;
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let status = client::status(&runtime_dir, false).with_context(|| {
        format!("no keeper answers in {}: is `locum serve` running there?", args.runtime_dir.display())
    })?;
    let keeper = Thread::hold(status.keeper.pid).context("the keeper is gone")?;
    let place = std::fs::metadata(&args.runtime_dir)
        .with_context(|| format!("cannot look at {}", args.runtime_dir.display()))?;
    let origin = Origin { device: place.dev(), inode: place.ino() };
    let own = status.monitor.iter().map(|monitor| monitor.pid).chain([status.keeper.pid]).collect();
    let mut work = Work {
        args,
        runtime_dir,
        keeper,
        origin,
        sessions: &status.sessions,
        own,
        seen: HashSet::new(),
        attached: Vec::new(),
        served: Vec::new(),
        refused: 0,
    };
    if args.named.lost {
        let is_held = |lost: &Lost| status.sessions.iter().any(|session| session.id.to_string() == lost.id);
        for lost in reattach::on_disk(&work.runtime_dir)?.into_iter().filter(|lost| !is_held(lost)) {
            work.again(&lost)?;
        }
    } else {
        for pid in &args.named.pid {
            // Of one that is never touched, what it has started is not meant either: of the first process, that is all.
            work.hold(*pid).with_context(|| format!("process {pid} cannot be named"))?;
        }
        let processes = Processes::of(&args.named)?;
        let name = processes.name();
        for session in status.sessions.iter().filter(|session| session.container == name) {
            let marker = work.runtime_dir.detached(&session.id.to_string());
            if !args.dry_run && std::fs::remove_file(marker).is_ok() {
                println!("{}: attached again", session.id);
            }
        }
        let workload = Workload { container: &name, policy: &args.policy, key: None, detached: false };
        work.all(&processes, &workload)?;
        anyhow::ensure!(!work.seen.is_empty(), "wanted a running process, found none");
    }
    work.tell(&format!("{} attached, {} left as they are", work.attached.len(), work.refused));
    Ok(ExitCode::from(u8::from(work.refused > 0)))
}

/// The calls to hand over: what the policy names, if it can be read here; whatever else comes runs unhelped.
fn calls(policy: &str) -> Vec<(&'static str, i32)> {
    let known = locum_policy::builtin().into_iter().find(|known: &Policy| known.name == policy);
    let wanted =
        |name: &str| known.as_ref().is_none_or(|policy| policy.calls.iter().any(|call| call.name() == name));
    arch::CALLS.iter().copied().filter(|(name, _)| wanted(name)).collect()
}

/// How many instructions a filter of ours has at most.
pub(crate) fn longest() -> usize {
    let all: Vec<i32> = arch::CALLS.iter().map(|(_, nr)| *nr).collect();
    Filter::notify(&all).with_origin(Origin { device: 0, inode: 0 }).length()
}

/// How long what keeps a lost listener's place is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

struct Work<'a> {
    args: &'a Args,
    runtime_dir: RuntimeDir,
    keeper: Thread,
    /// Where we work.
    origin: Origin,
    /// What the keeper had when we began.
    sessions: &'a [SessionReport],
    /// The keeper and the monitor.
    own: Vec<u32>,
    seen: HashSet<u32>,
    attached: Vec<u32>,
    served: Vec<u32>,
    refused: u32,
}

/// What the keeper is to be told of a workload.
struct Workload<'a> {
    container: &'a str,
    policy: &'a str,
    key: Option<&'a str>,
    detached: bool,
}

enum Done {
    Attached,
    TakenBack,
    Served,
    Would(String),
}

impl Done {
    fn as_str(&self) -> &str {
        match self {
            Self::Attached => "attached",
            Self::TakenBack => "attached, with a listener that it still had",
            Self::Served => "is served already",
            Self::Would(what) => what,
        }
    }
}

impl Work<'_> {
    /// All of a workload. What is started while we work is found the next time around, until there is nothing new.
    fn all(&mut self, processes: &Processes, workload: &Workload<'_>) -> anyhow::Result<()> {
        loop {
            let new: Vec<u32> = processes.now()?.into_iter().filter(|pid| self.seen.insert(*pid)).collect();
            if new.is_empty() {
                return Ok(());
            }
            // Whoever has a listener of its own comes first: it may be in force for others too.
            let has_one = |pid: &u32| {
                let held = Thread::hold(*pid).and_then(|process| process.listeners());
                held.is_ok_and(|listeners| !listeners.is_empty())
            };
            let (first, then): (Vec<u32>, Vec<u32>) = new.into_iter().partition(has_one);
            for pid in first.into_iter().chain(then) {
                match self.one(pid, workload) {
                    Ok(done) => {
                        match done {
                            Done::Attached | Done::TakenBack => self.attached.push(pid),
                            Done::Served => self.served.push(pid),
                            Done::Would(_) => {}
                        }
                        self.tell(&format!("process {pid}: {}", done.as_str()));
                    }
                    // It has ended meanwhile, whatever was found on the way.
                    Err(error) if has_ended(&error) || !lives(pid) => {}
                    Err(error) => {
                        self.refused += 1;
                        self.tell(&format!("process {pid}: left as it is: {error:#}"));
                    }
                }
            }
        }
    }

    /// What a monitor started is said where the monitor says what it does.
    fn tell(&self, line: &str) {
        if self.args.named.lost { eprintln!("surgeon: {line}") } else { println!("{line}") }
    }

    /// A workload whose listener is lost.
    fn again(&mut self, lost: &Lost) -> anyhow::Result<()> {
        if let Err(error) = self.is_it(lost) {
            if !has_ended(&error) {
                self.refused += 1;
                self.tell(&format!("process {}: left as it is: {error:#}", lost.process));
            }
            return Ok(());
        }
        let processes = Processes::Both { first: lost.process, container: lost.container.clone() };
        let key = lost.key.as_deref();
        let workload =
            Workload { container: &lost.container, policy: &lost.policy, key, detached: lost.detached };
        self.all(&processes, &workload)?;
        if self.attached.iter().chain(&self.served).any(|pid| *pid == lost.process) {
            // The workload has another session now.
            match std::fs::remove_dir_all(&lost.folder) {
                // By another surgeon.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.with_context(|| format!("cannot remove {}", lost.folder.display()))?,
            }
        }
        Ok(())
    }

    /// Whether the first process is the one that was served: it is under the very filter of then.
    fn is_it(&self, lost: &Lost) -> anyhow::Result<()> {
        let filters = attach::filters(&self.hold(lost.process)?)?;
        match &lost.filters {
            Some(known) => anyhow::ensure!(
                filters.have(&known.newest),
                "it is not under the filter that it had when it was attached"
            ),
            None => anyhow::ensure!(
                !filters.origins().is_empty(),
                "it is under no filter that asks a listener, so it cannot have lost one"
            ),
        }
        Ok(())
    }

    fn hold(&self, pid: u32) -> anyhow::Result<Thread> {
        anyhow::ensure!(
            !self.own.contains(&pid),
            "it is locum's own keeper or monitor, which are never touched"
        );
        super::processes::hold(pid)
    }

    fn one(&self, pid: u32, workload: &Workload<'_>) -> anyhow::Result<Done> {
        let process = self.hold(pid)?;
        let status = process.status()?;
        // What is in its table may be of anybody, such as a container engine's of its containers; what the keeper has too is ours.
        if status.filters > 0 {
            for listener in process.listeners()? {
                if self.keeper.find(listener.as_fd())?.is_some() {
                    return Ok(Done::Served);
                }
            }
        }
        let has_promise = status.no_new_privs;
        if !has_promise && !self.args.set_no_new_privs {
            return Err(Refusal::NewPrivs.into());
        }
        let (calls, start) = (calls(workload.policy), Instant::now());
        let numbers: Vec<i32> = calls.iter().map(|(_, nr)| *nr).collect();
        let filter = Filter::notify(&numbers).with_origin(self.origin);
        if self.args.dry_run {
            return self.would(&process, &filter, &calls);
        }
        loop {
            return match attach::attach(&process, (&filter, Wait::Killable), &calls, !has_promise) {
                Ok(attached) => {
                    // Before the process goes on and closes its own copy: from then on somebody else holds it.
                    self.deliver(&process, &attached.listener, &attached.filters, workload)?;
                    attached.without_copy()?;
                    Ok(Done::Attached)
                }
                Err(Refusal::Busy(filters)) => match self.whose(&process, &filters, &calls)? {
                    Whose::LeftBehind(listener) => {
                        self.deliver(&process, &listener, &filters, workload)?;
                        Ok(Done::TakenBack)
                    }
                    // Whoever had the one that is lost may not be all gone yet.
                    _ if self.args.named.lost && start.elapsed() < PATIENCE => {
                        std::thread::sleep(Duration::from_millis(50));
                        continue;
                    }
                    // Its parent was attached before it was started, or a runtime's profile is in force.
                    Whose::Kept => Ok(Done::Served),
                    Whose::Foreign(told) => Err(anyhow::anyhow!("{}: {told}", Refusal::Busy(filters))),
                },
                // Another surgeon, whose monitor and keeper are lost too by now, may be at it still.
                Err(Refusal::Unfit(Unfit::Traced(_)))
                    if self.args.named.lost && start.elapsed() < PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(refusal) => Err(refusal.into()),
            };
        }
    }

    fn whose(&self, process: &Thread, filters: &InForce, calls: &[(&str, i32)]) -> anyhow::Result<Whose> {
        let hand_over = calls.iter().all(|(_, nr)| filters.of_call(*nr).1 == Action::Notify);
        whose(process, (filters, hand_over), (&self.keeper, self.sessions, self.origin))
    }

    /// What would be done, as far as that can be told without doing it.
    fn would(
        &self,
        process: &Thread,
        filter: &Filter,
        calls: &[(&'static str, i32)],
    ) -> anyhow::Result<Done> {
        let filters = attach::examine(process, calls, filter.length())?;
        if filters.origins().is_empty() {
            return Ok(Done::Would(format!(
                "would get a filter of {} instructions of its own, its filter number {}; {} more would fit behind it",
                filter.length(),
                filters.count() + 1,
                filters.room(filter.length()) - 1
            )));
        }
        Ok(match self.whose(process, &filters, calls)? {
            Whose::Kept => Done::Would(
                "would be left, is served already; or, if its listener is lost, get another".into(),
            ),
            Whose::LeftBehind(_) => {
                Done::Would("would be attached, with a listener that it still has".into())
            }
            Whose::Foreign(told) => {
                anyhow::bail!(
                    "it is under a filter that asks a listener, {told}: if that is in force, it is in the way"
                )
            }
        })
    }

    fn deliver(
        &self,
        process: &Thread,
        listener: &Listener,
        filters: &InForce,
        workload: &Workload<'_>,
    ) -> anyhow::Result<()> {
        let door =
            confined::connect(&self.runtime_dir.front_door()).context("cannot reach the front door")?;
        let policy = workload
            .key
            .map_or_else(|| workload.policy.to_owned(), |key| format!("{},key={key}", workload.policy));
        let filters = filters.newest().map(|newest| Filters {
            count: filters.count(),
            instructions: filters.instructions(),
            newest,
        });
        let told = Told { filters, detached: workload.detached };
        confined::deliver(
            &door,
            listener,
            &Delivery { pid: process.tid(), id: workload.container, policy: &policy, told: Some(&told) },
        )
    }
}

fn lives(pid: u32) -> bool {
    !matches!(Thread::hold_living(pid), Err(Errno::SRCH | Errno::NOENT))
}

fn has_ended(error: &anyhow::Error) -> bool {
    let is_gone = |error: &Errno| matches!(*error, Errno::SRCH | Errno::NOENT);
    error.chain().any(|cause| {
        cause.downcast_ref().is_some_and(is_gone)
            || matches!(cause.downcast_ref(), Some(Refusal::Kernel(error)) if is_gone(error))
    })
}

/// Lets the calls of a workload run unhelped from now on, until it ends or is attached again.
///
/// Its filter and its listener stay: a filter never leaves.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum detach --pid 4711")]
pub(crate) struct DetachArgs {
    #[command(flatten)]
    named: Named,
    /// Where the keeper works.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
}

pub(crate) fn detach(args: &DetachArgs) -> anyhow::Result<ExitCode> {
    super::processes::must_be_root("detach")?;
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let status = client::status(&runtime_dir, false).with_context(|| {
        format!("no keeper answers in {}: is `locum serve` running there?", args.runtime_dir.display())
    })?;
    let name = args
        .named
        .container
        .clone()
        .map_or_else(|| Processes::of(&args.named).map(|found| found.name()), Ok)?;
    let is_it = |container: &str, pid: u32| container == name || args.named.pid.contains(&pid);
    let mut found = 0;
    for session in status.sessions.iter().filter(|session| is_it(&session.container, session.pid)) {
        let marker = runtime_dir.detached(&session.id.to_string());
        std::fs::write(&marker, "").with_context(|| format!("cannot write {}", marker.display()))?;
        println!("{}: its calls run unhelped", session.id);
        found += 1;
    }
    anyhow::ensure!(
        found > 0,
        "wanted a workload that is served, found none of that name: see `locum status`"
    );
    Ok(ExitCode::SUCCESS)
}
