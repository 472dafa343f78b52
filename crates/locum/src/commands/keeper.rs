//! `locum keeper`.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use locum_keeper::{RuntimeDir, Sockets};
use signal_hook::consts::{SIGINT, SIGTERM};

/// The keeper alone: owns the front door, keeps copies of listeners, has no privileges.
///
/// Started as root, it binds its sockets and then becomes an unprivileged user without any capability.
#[derive(clap::Args)]
#[command(after_help = "Example: locum keeper --door 1000")]
pub(crate) struct Args {
    /// Where sockets, journals and single workloads' policies are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// A front door of its own for the container runtimes of the user UID.
    #[arg(long = "door", value_name = "UID")]
    users: Vec<u32>,
    /// End with this process.
    #[arg(long, hide = true)]
    parent: Option<u32>,
    /// Take the sockets from whoever started it.
    #[arg(long, hide = true)]
    sockets_on_stdin: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let sockets = if args.sockets_on_stdin {
        Sockets::receive(std::io::stdin()).context("standard input does not hold the sockets")?
    } else if let Some(sockets) = Sockets::from_systemd(&runtime_dir)? {
        sockets
    } else {
        Sockets::bind(&runtime_dir, &args.users)?
    };
    // No thread may wait for signals: it would keep the privileges that this one is about to give up.
    let (stop, stopping) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, stopping.try_clone()?)?;
    }
    locum_keeper::run(sockets, stop, args.parent)?;
    Ok(ExitCode::SUCCESS)
}
