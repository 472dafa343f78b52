//! The processes of a workload that runs, and which of all processes are never touched.

use std::collections::HashMap;

use anyhow::Context as _;
use locum_kernel::Errno;
use locum_kernel::process::Thread;

/// Which workload.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Named {
    /// Processes, and all that they have started.
    #[arg(long, value_name = "PID", num_args = 1..)]
    pub(crate) pid: Vec<u32>,
    /// All processes of the container with this id, as its control group names it.
    #[arg(long, value_name = "ID")]
    pub(crate) container: Option<String>,
    /// Every workload that root's runtimes began and whose listener is lost. Monitors do this by themselves.
    #[arg(long)]
    pub(crate) lost: bool,
}

/// The same, found.
pub(crate) enum Processes {
    /// With the first one's start time, which makes its name unique.
    Tree {
        roots: Vec<u32>,
        started: u64,
    },
    Container(String),
    /// What a container's first process has started, and whatever else is in the container.
    Both {
        first: u32,
        container: String,
    },
}

impl Processes {
    pub(crate) fn of(named: &Named) -> anyhow::Result<Self> {
        if let Some(id) = &named.container {
            anyhow::ensure!(!id.is_empty() && !id.contains('/'), "wanted a container's id, found {id:?}");
            return Ok(Self::Container(id.clone()));
        }
        let first = *named.pid.first().context("wanted a process")?;
        let process = Thread::hold(first).with_context(|| format!("there is no process {first}"))?;
        Ok(Self::Tree { roots: named.pid.clone(), started: process.start_time()? })
    }

    /// What the keeper is told as the container's id. A process's id alone could come again, and with it its scope.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Container(id) | Self::Both { container: id, .. } => id.clone(),
            Self::Tree { roots, started } => format!("pid-{}-{started}", roots.first().copied().unwrap_or(0)),
        }
    }

    /// Those that live now, parents first.
    pub(crate) fn now(&self) -> anyhow::Result<Vec<u32>> {
        let all = all()?;
        let in_container = |id: &str| all.iter().copied().filter(|pid| is_in_container(*pid, id)).collect();
        Ok(match self {
            Self::Container(id) => in_container(id),
            Self::Tree { roots, .. } => with_descendants(roots, &all),
            Self::Both { first, container } => {
                [with_descendants(&[*first], &all), in_container(container)].concat()
            }
        })
    }
}

/// And all that they have started, of `all`.
pub(crate) fn with_descendants(roots: &[u32], all: &[u32]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for pid in all {
        if let Ok(status) = Thread::hold(*pid).and_then(|process| process.status()) {
            children.entry(status.parent).or_default().push(*pid);
        }
    }
    let mut found = roots.to_vec();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found
}

/// All that there are.
pub(crate) fn all() -> std::io::Result<Vec<u32>> {
    let entries = std::fs::read_dir("/proc")?;
    let mut all: Vec<u32> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    Ok(all)
}

/// As crun, runc, podman, CRI-O, containerd and Docker name control groups.
pub(crate) fn is_in_container(pid: u32, id: &str) -> bool {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let is_named = |part: &str| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        part == id
            || ["libpod", "crio", "cri-containerd", "docker", "crun", "runc"]
                .iter()
                .any(|engine| part.strip_prefix(engine).and_then(|rest| rest.strip_prefix('-')) == Some(id))
    };
    groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| path.split('/').any(is_named))
}

pub(crate) fn must_be_root(command: &str) -> anyhow::Result<()> {
    anyhow::ensure!(rustix::process::geteuid().is_root(), "locum {command} needs root: use sudo");
    Ok(())
}

/// Takes hold of a process, unless it is one that is never touched: the first process of the host, this one and those that it
/// comes from, threads of the kernel.
pub(crate) fn hold(pid: u32) -> anyhow::Result<Thread> {
    anyhow::ensure!(pid != 1, "the first process of the host is never touched");
    let mut own = std::process::id();
    while own > 1 {
        anyhow::ensure!(pid != own, "this command itself, and what it was started by, are never touched");
        own = Thread::hold(own)?.status()?.parent;
    }
    let status = Thread::hold(pid)
        .and_then(|process| process.status())
        .with_context(|| format!("there is no process {pid}"))?;
    anyhow::ensure!(status.process == pid, "this is a thread of process {}: name that one", status.process);
    match Thread::hold_living(pid) {
        Err(Errno::SRCH) => Err(Errno::SRCH).context("it is a thread of the kernel, or has ended"),
        process => Ok(process?),
    }
}
