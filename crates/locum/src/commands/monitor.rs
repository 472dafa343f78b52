//! `locum monitor`.

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context as _;
use locum_keeper::RuntimeDir;
use locum_kernel::confine;
use locum_monitor::Config;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::supervise::GRACE;

/// The monitor alone: answers the calls of the sessions that its keeper holds. Needs root.
///
/// It may be killed at any moment: the next one settles what it left.
#[derive(clap::Args)]
#[command(after_help = "Examples: locum monitor --policy /etc/locum/policy.toml
          locum monitor --replace --policy /etc/locum/policy.toml")]
pub(crate) struct Args {
    /// Where sockets, journals and single workloads' policies are.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// The directory of keys; one key is made there if there is none.
    #[arg(long, value_name = "DIR", default_value = "/etc/locum/keys")]
    keys: PathBuf,
    /// Policies beside the built-in ones; of two with one name, the later counts.
    #[arg(long = "policy", value_name = "FILE")]
    policies: Vec<PathBuf>,
    /// Take the place of the monitor that serves: an upgrade, or a change of policies.
    ///
    /// Both serve for a moment; then the other one finishes what it has, within five seconds, and ends. If this one cannot serve
    /// all that the other does, it ends with exit code 1 and says why, and the other one serves on.
    #[arg(long)]
    replace: bool,
    /// Go on in the background; return once that serves, with exit code 0, or does not, with 1.
    #[arg(long, requires = "replace")]
    detach: bool,
    /// End with this process.
    #[arg(long, hide = true)]
    parent: Option<u32>,
    /// Begin when standard input ends, and say on standard output when it serves.
    #[arg(long, hide = true)]
    tell: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.detach {
        return detach(args);
    }
    let serves = args.tell.then(take_output).transpose().context("standard input and output")?;
    locum_monitor::run(Config {
        runtime_dir: RuntimeDir::new(&args.runtime_dir),
        keys: args.keys.clone(),
        policies: args.policies.clone(),
        parent: args.parent,
        replace: args.replace,
        serves,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Standard output, of which this process keeps nothing else.
fn take_output() -> anyhow::Result<OwnedFd> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let output = std::io::stdout().as_fd().try_clone_to_owned()?;
    rustix::stdio::dup2_stdout(std::fs::File::options().write(true).open("/dev/null")?)?;
    Ok(output)
}

/// Starts the new monitor as nobody's child: systemd wants to be the parent of a service's main process when it is told of it.
fn detach(args: &Args) -> anyhow::Result<ExitCode> {
    // Systemd says so to whoever reloads a service.
    let old = std::env::var("MAINPID").ok().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    let old = old.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    let mut command = Command::new("/proc/self/exe");
    command.args(["monitor", "--replace", "--tell", "--runtime-dir"]).arg(&args.runtime_dir);
    command.arg("--keys").arg(&args.keys);
    args.policies.iter().for_each(|policy| {
        command.arg("--policy").arg(policy);
    });
    confine::orphan(&mut command);
    let mut between = command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (input, output) = between.stdin.take().zip(between.stdout.take()).context("no pipes")?;
    between.wait()?;
    // Now it may begin.
    drop(input);
    let mut said = String::new();
    BufReader::new(output).read_line(&mut said)?;
    anyhow::ensure!(
        said == "serving\n",
        "the new monitor does not serve, whoever served serves on; see its messages"
    );
    if let Some(old) = old {
        end(&old)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until a monitor that was relieved has ended. One that hangs is killed: what it has waits for it.
fn end(old: &OwnedFd) -> anyhow::Result<()> {
    let patience = Timespec::try_from(GRACE)?;
    if rustix::event::poll(&mut [PollFd::new(old, PollFlags::IN)], Some(&patience))? == 0 {
        tracing::error!("the monitor that was relieved does not end; killed");
        rustix::process::pidfd_send_signal(old, Signal::KILL)?;
    }
    Ok(())
}
