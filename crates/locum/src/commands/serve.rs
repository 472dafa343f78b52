//! `locum serve`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_keeper::{RuntimeDir, SocketError, client, systemd};
use locum_kernel::process::Thread;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::supervise::{Options, Supervisor};

/// Keeper and monitor on one machine, each started again when it dies.
///
/// Container runtimes deliver at oci.sock in the runtime directory (`listenerPath` in the seccomp profile that `locum profile`
/// prints). Ends, with both, on SIGTERM or SIGINT. SIGHUP upgrades: the program that lies where this one was started from takes over, or, if it
/// is no good, nothing changes and the log says why.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum serve --door 1000 --policy /etc/locum/policy.toml")]
pub(crate) struct Args {
    /// Where sockets, journals and single workloads' policies are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// A front door of its own for the container runtimes of the user UID.
    #[arg(long = "door", value_name = "UID")]
    users: Vec<u32>,
    /// The directory of keys; one key is made there if there is none.
    #[arg(long, value_name = "DIR", default_value = "/etc/locum/keys")]
    keys: PathBuf,
    /// Policies beside the built-in ones; of two with one name, the later counts.
    #[arg(long = "policy", value_name = "FILE")]
    policies: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let found = rustix::process::geteuid();
    anyhow::ensure!(
        found.is_root(),
        "locum serve starts a monitor: wanted user 0, found user {}; use sudo",
        found.as_raw()
    );
    // By the time of an upgrade, what lies there is another file.
    let program = std::env::current_exe()?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let runtime_dir = RuntimeDir::new(&args.runtime_dir);
    let options =
        Options { keys: args.keys.clone(), users: args.users.clone(), policies: args.policies.clone() };
    let supervisor = start(&runtime_dir, &options)?;
    println!("serving at {}", runtime_dir.front_door().display());
    for uid in &args.users {
        println!("serving user {uid} at {}", runtime_dir.user_door(*uid).display());
    }
    systemd::tell(NotifyState::Ready);
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        // The keeper first: it refuses a monitor that speaks a newer protocol.
        let release = supervisor.upgrade_keeper(&program);
        let upgraded = release.and_then(|release| {
            supervisor.upgrade_monitor(&program).context("the keeper is, the monitor is not")?;
            Ok(release)
        });
        match upgraded {
            Ok(release) => tracing::info!("upgraded to {}, locum {release}", program.display()),
            Err(error) => tracing::error!("not upgraded to {}: {error:#}", program.display()),
        }
    }
    systemd::tell(NotifyState::Stopping);
    drop(supervisor);
    Ok(ExitCode::SUCCESS)
}

/// So long may a keeper take to die whose own `locum serve` was killed just now: it answers until then.
const DYING: Duration = Duration::from_secs(2);

fn start(runtime_dir: &RuntimeDir, options: &Options) -> anyhow::Result<Supervisor> {
    let deadline = Instant::now() + DYING;
    if let Ok(status) = client::status(runtime_dir, false) {
        let pid = status.keeper.pid;
        let keeper = Thread::hold(pid);
        while keeper.as_ref().is_ok_and(Thread::lives) {
            anyhow::ensure!(
                Instant::now() < deadline,
                "a keeper (pid {pid}) already works in {}; stop it first, or choose another --runtime-dir",
                runtime_dir.path().display()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    loop {
        match Supervisor::start(runtime_dir, options.clone()) {
            // It does not answer any more, and is not gone yet.
            Err(error) if is_locked(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            started => return started,
        }
    }
}

fn is_locked(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(SocketError::Locked(_)))
}
