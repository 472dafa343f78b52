//! `locum keeper`.

use std::os::fd::{AsFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use locum_keeper::{RuntimeDir, Sockets, client};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::supervise::open_program;

/// The keeper alone: owns the front door, keeps copies of listeners, has no privileges.
///
/// Started as root, it binds its sockets and then becomes an unprivileged user without any capability.
#[derive(clap::Args)]
#[command(
    after_help = "Examples: locum keeper --door 1000\n          locum keeper --upgrade --program /usr/bin/locum"
)]
pub(crate) struct Args {
    /// Where sockets, journals and single workloads' policies are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// A front door of its own for the container runtimes of the user UID.
    #[arg(long = "door", value_name = "UID")]
    users: Vec<u32>,
    /// Have the keeper that runs go on in another program, once that has read a copy of its state; it keeps its process id and
    /// everything that it holds. If that fails, it serves on as it is.
    #[arg(long, conflicts_with = "users")]
    upgrade: bool,
    /// Which program; without it, this one.
    #[arg(long, value_name = "FILE", requires = "upgrade")]
    program: Option<PathBuf>,
    /// End with this process.
    #[arg(long, hide = true)]
    parent: Option<u32>,
    /// Take the sockets from whoever started it.
    #[arg(long, hide = true)]
    sockets_on_stdin: bool,
    /// Go on from what a keeper left in this descriptor.
    #[arg(long, hide = true, value_name = "FD")]
    resume: Option<RawFd>,
    /// Only say to this descriptor whether that would go well.
    #[arg(long, hide = true, value_name = "FD", requires = "resume")]
    rehearse: Option<RawFd>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    if args.upgrade {
        return upgrade(&runtime_dir, args.program.as_deref().unwrap_or(Path::new("/proc/self/exe")));
    }
    if let (Some(from), Some(to)) = (args.resume, args.rehearse) {
        locum_keeper::rehearse(from, to)?;
        return Ok(ExitCode::SUCCESS);
    }
    // No thread may wait for signals: it would keep the privileges that this one is about to give up.
    let (stop, stopping) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, stopping.try_clone()?)?;
    }
    if let Some(from) = args.resume {
        locum_keeper::resume(from, stop)?;
        return Ok(ExitCode::SUCCESS);
    }
    let sockets = if args.sockets_on_stdin {
        Sockets::receive(std::io::stdin()).context("standard input does not hold the sockets")?
    } else if let Some(sockets) = Sockets::from_systemd(&runtime_dir)? {
        sockets
    } else {
        Sockets::bind(&runtime_dir, &args.users)?
    };
    locum_keeper::run(sockets, stop, args.parent)?;
    Ok(ExitCode::SUCCESS)
}

/// Has the keeper go on in `program`.
fn upgrade(runtime_dir: &RuntimeDir, program: &Path) -> anyhow::Result<ExitCode> {
    let file = open_program(program)?;
    let (before, now) = client::upgrade(runtime_dir, file.as_fd())
        .with_context(|| format!("the keeper in {} was not upgraded", runtime_dir.path().display()))?;
    println!("the keeper (pid {}) was locum {} and is locum {now}", before.pid, before.version);
    Ok(ExitCode::SUCCESS)
}
