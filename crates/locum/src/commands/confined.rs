//! `locum confined`: what `locum run` starts, and what becomes CMD.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Context as _;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::notify::Listener;
use locum_kernel::{Errno, arch, confine};
use locum_monitor::reattach::{ANNOTATION, Told};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// For `locum run`: gives up all rights, hands the listener of its filter to the front door, becomes CMD.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The front door.
    #[arg(long)]
    pub(crate) door: PathBuf,
    /// The workload's name, as a container runtime would give it.
    #[arg(long)]
    pub(crate) id: String,
    /// The policy's name.
    #[arg(long)]
    pub(crate) policy: String,
    /// The calls that the filter hands over, by name.
    #[arg(long, value_delimiter = ',')]
    pub(crate) calls: Vec<String>,
    #[arg(long)]
    pub(crate) uid: u32,
    #[arg(long)]
    pub(crate) gid: u32,
    /// The process without which there is no point in going on.
    #[arg(long)]
    pub(crate) parent: u32,
    /// As if the kernel lacked `WAIT_KILLABLE_RECV`.
    #[arg(long)]
    pub(crate) interruptible: bool,
    #[arg(last = true, required = true)]
    pub(crate) cmd: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // The door is opened as root, whom the policies believe; nothing else is done with that right.
    let door = connect(&args.door).with_context(|| {
        format!("cannot reach the front door {}: is a keeper running there?", args.door.display())
    })?;
    confine::drop_everything(args.uid, args.gid, &[]).with_context(|| {
        format!("cannot become user {}, group {}, without capabilities", args.uid, args.gid)
    })?;
    if !confine::die_with_parent(args.parent)? {
        anyhow::bail!("locum run is gone");
    }
    let listener = install(args)?;
    let delivery = Delivery { pid: std::process::id(), id: &args.id, policy: &args.policy, told: None };
    deliver(&door, &listener, &delivery).context("cannot hand the listener to the keeper")?;
    // Both are closed by exec too; but until then no copy of the listener may be here: whoever holds one can answer
    // the calls that it waits for.
    drop((door, listener));
    let (program, rest) = args.cmd.split_first().context("no command was given")?;
    let error = Command::new(program).args(rest).exec();
    eprintln!("locum: cannot run {}: {error}", program.display());
    // As shells have it: 127 not found, 126 found but not to be executed. A folder in PATH that this user may not look
    // into gives EACCES too.
    let by_path = !program.as_bytes().contains(&b'/');
    let is_missing = error.kind() == io::ErrorKind::NotFound || (by_path && !is_in_path(program));
    Ok(ExitCode::from(if is_missing { 127 } else { 126 }))
}

fn is_in_path(program: &OsStr) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

pub(crate) fn connect(door: &PathBuf) -> Result<OwnedFd, Errno> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // A keeper that accepts nothing fills its queue, and would make us wait for ever.
    set_socket_timeout(&socket, Timeout::Send, Some(Duration::from_secs(10)))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(door)?)?;
    Ok(socket)
}

fn install(args: &Args) -> anyhow::Result<Listener> {
    let number = |name: &String| {
        let call = arch::CALLS.iter().find(|(known, _)| known == name);
        call.map(|(_, nr)| *nr).with_context(|| format!("unknown call {name}"))
    };
    let numbers = args.calls.iter().map(number).collect::<anyhow::Result<Vec<_>>>()?;
    let filter = Filter::notify(&numbers);
    let wait = if args.interruptible { Wait::Interruptible } else { Wait::Killable };
    let installed = match filter.install(wait) {
        Err(Errno::INVAL) => filter.install(Wait::Interruptible),
        installed => installed,
    };
    match installed {
        Err(Errno::BUSY) => anyhow::bail!(
            "cannot install the filter: another monitor's filter with a listener is in force here (a container engine's?)"
        ),
        installed => installed.context("cannot install the filter"),
    }
}

/// What the keeper is told of a listener.
pub(crate) struct Delivery<'a> {
    /// The process that has the filter.
    pub(crate) pid: u32,
    /// Its container's id.
    pub(crate) id: &'a str,
    /// The policy's name.
    pub(crate) policy: &'a str,
    /// What an attached process's session is to know.
    pub(crate) told: Option<&'a Told>,
}

/// Sends what a container runtime sends: the OCI `ContainerProcessState`, with the listener.
pub(crate) fn deliver(door: &OwnedFd, listener: &Listener, delivery: &Delivery<'_>) -> anyhow::Result<()> {
    let Delivery { pid, id, policy, told } = delivery;
    let annotation = |told: &Told| Ok((ANNOTATION, serde_json::to_string(told)?));
    let annotations: HashMap<_, _> =
        told.iter().map(|told| annotation(told)).collect::<anyhow::Result<_>>()?;
    let state = serde_json::json!({
        "ociVersion": "1.0.2",
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": format!("policy={policy}"),
        "state": {"ociVersion": "1.0.2", "id": id, "status": "creating", "pid": pid, "bundle": "/", "annotations": annotations},
    })
    .to_string();
    let sent = locum_kernel::socket::send_with(door, state.as_bytes(), listener.as_fd())?;
    // A stream socket takes a message of this size whole, or the keeper is not reading.
    anyhow::ensure!(sent == state.len(), "the front door took {sent} bytes of {}", state.len());
    Ok(())
}
