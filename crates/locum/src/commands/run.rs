//! `locum run`.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus};

use anyhow::Context as _;
use locum_keeper::RuntimeDir;
use locum_kernel::confine;
use locum_policy::Policy;
use rustix::process::{Pid, PidfdFlags, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::sweep::Sweeper;
use crate::supervise::{Options, Supervisor};

/// Runs a command under a policy, with no capabilities.
///
/// The command gets no_new_privs and the policy's filter; its working directory and environment stay. Keeper and monitor
/// are its own, and end with it, unless the runtime directory has living ones. Exits as the command does: 128 and the
/// signal's number if one killed it, 127 if it was not found, 126 if it cannot be executed.
#[derive(clap::Args)]
#[command(
    after_help = "Example: sudo locum run --export /srv/share -- virtiofsd --sandbox=none --inode-file-handles=prefer \
                        --shared-dir /srv/share --socket-path /tmp/vfs.sock"
)]
pub(crate) struct Args {
    /// A built-in policy, or a file with one.
    #[arg(long, value_name = "NAME|FILE", default_value = "virtiofsd")]
    policy: String,
    /// Files on the mount on which DIR lies may be opened by handle, instead of those the policy names.
    #[arg(long = "export", value_name = "DIR")]
    exports: Vec<PathBuf>,
    /// Who the command runs as [default: the user who ran sudo, else nobody; GID: as UID].
    #[arg(long, value_name = "UID[:GID]", value_parser = parse_user)]
    user: Option<(u32, u32)>,
    /// Where a keeper and a monitor may be running already.
    #[arg(long, value_name = "DIR", env = "LOCUM_RUNTIME_DIR", default_value = "/run/locum")]
    runtime_dir: PathBuf,
    /// As if the kernel lacked `WAIT_KILLABLE_RECV`, for tests.
    #[arg(long, hide = true)]
    interruptible: bool,
    #[arg(last = true, required = true, value_name = "CMD")]
    cmd: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let found = rustix::process::geteuid();
    anyhow::ensure!(
        found.is_root(),
        "locum run starts a monitor: wanted user 0, found user {}; use sudo",
        found.as_raw()
    );
    // From here on, whatever comes is kept for the command.
    let signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    // Of what we were given, the command gets standard input, output and error alone.
    confine::close_on_exec_from(3)?;
    let policy = choose_policy(&args.policy)?;
    let exports = args.exports.iter().map(|dir| mount_of(dir)).collect::<anyhow::Result<Vec<_>>>()?;
    let user = args.user.unwrap_or_else(default_user);
    anyhow::ensure!(user.0 != 0, "a workload as user 0 could read the keys; choose another with --user");
    let place = Place::find_or_start(&args.runtime_dir)?;
    let workload = Workload::prepare(&place, policy, exports, user)?;
    let mut child = workload.start(&args.cmd, args.interruptible, |_| {})?;
    forward(signals, &child)?;
    let status = child.wait()?;
    Ok(exit_code(status))
}

/// Where keeper and monitor are: living ones, or our own, which end with this.
pub(crate) struct Place {
    pub(crate) runtime_dir: RuntimeDir,
    // In this order: the directory goes when nobody writes there any more.
    pub(crate) own: Option<Supervisor>,
    _sweeper: Option<Sweeper>,
}

impl Place {
    fn find_or_start(directory: &Path) -> anyhow::Result<Self> {
        let runtime_dir = RuntimeDir::new(directory);
        if std::os::unix::net::UnixStream::connect(runtime_dir.front_door()).is_ok() {
            return Ok(Self { runtime_dir, own: None, _sweeper: None });
        }
        Self::start()
    }

    /// Starts a keeper and a monitor in a directory of their own.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("locum-").tempdir_in(memory_backed())?;
        // From here on the sweeper removes it, which outlives even a SIGKILL.
        let sweeper = Sweeper::start(&[directory.path()])?;
        let directory = directory.keep();
        let runtime_dir = RuntimeDir::new(&directory);
        let own =
            Supervisor::start(&runtime_dir, Options { keys: directory.join("keys"), ..Options::default() })?;
        Ok(Self { runtime_dir, own: Some(own), _sweeper: Some(sweeper) })
    }
}

/// Journals belong on a tmpfs: writing them must not wait for a disk.
fn memory_backed() -> &'static Path {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let is_tmpfs = |path: &&Path| rustix::fs::statfs(*path).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC);
    ["/run", "/dev/shm"].map(Path::new).into_iter().find(is_tmpfs).unwrap_or(Path::new("/run"))
}

/// What is to run, and as whom.
pub(crate) struct Workload {
    door: PathBuf,
    id: String,
    policy: Policy,
    user: (u32, u32),
    _sweeper: Option<Sweeper>,
}

impl Workload {
    /// With exports, or `policy` from a file, the workload gets a policy of its own, which the monitor finds by its name.
    pub(crate) fn prepare(
        place: &Place,
        mut policy: Policy,
        exports: Vec<String>,
        user: (u32, u32),
    ) -> anyhow::Result<Self> {
        let id = format!("run-{:08x}", random()?);
        let mut sweeper = None;
        if !exports.is_empty() || !locum_policy::builtin().contains(&policy) {
            if !exports.is_empty() {
                policy.exports = exports;
            }
            policy.name.clone_from(&id);
            let path = place.runtime_dir.policies().join(format!("{id}.toml"));
            // A directory of our own goes as a whole.
            sweeper = place.own.is_none().then(|| Sweeper::start(&[&path])).transpose()?;
            write_private(&path, &policy.to_toml()).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(Self { door: place.runtime_dir.front_door(), id, policy, user, _sweeper: sweeper })
    }

    /// Starts `cmd` as the workload; `adjust` has a last look at how. It dies when the calling thread ends.
    pub(crate) fn start(
        &self,
        cmd: &[OsString],
        interruptible: bool,
        adjust: impl FnOnce(&mut Command),
    ) -> anyhow::Result<Child> {
        let calls: Vec<_> = self.policy.calls.iter().map(|call| call.name()).collect();
        let mut confined = Command::new("/proc/self/exe");
        confined.arg0("locum").arg("confined").arg("--door").arg(&self.door);
        confined.args(["--id", &self.id, "--policy", &self.policy.name, "--calls", &calls.join(",")]);
        confined.args(["--uid", &self.user.0.to_string(), "--gid", &self.user.1.to_string()]);
        confined.args(["--parent", &std::process::id().to_string()]);
        confined.args(interruptible.then_some("--interruptible")).arg("--").args(cmd);
        adjust(&mut confined);
        confined.spawn().context("cannot start the confined process")
    }
}

/// Finds the built-in policy, or reads the file with one, that `wanted` names.
pub(crate) fn choose_policy(wanted: &str) -> anyhow::Result<Policy> {
    let builtin = locum_policy::builtin();
    if let Some(policy) = builtin.iter().find(|policy| policy.name == wanted) {
        return Ok(policy.clone());
    }
    let text = std::fs::read_to_string(wanted).with_context(|| {
        let names: Vec<_> = builtin.iter().map(|policy| policy.name.as_str()).collect();
        format!("wanted a policy, found no file {wanted:?}; the built-in ones are: {}", names.join(", "))
    })?;
    let mut policies = locum_policy::parse(wanted, &text)?;
    match (policies.pop(), policies.len()) {
        (Some(policy), 0) => Ok(policy),
        (_, more) => anyhow::bail!("wanted a file with one policy, found {} in {wanted}", more + 1),
    }
}

/// The path of the mount on which `dir` lies.
pub(crate) fn mount_of(dir: &Path) -> anyhow::Result<String> {
    use rustix::fs::{AtFlags, CWD, StatxFlags};
    let told = rustix::fs::statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID | StatxFlags::TYPE)
        .with_context(|| format!("cannot export {}", dir.display()))?;
    let is_dir = rustix::fs::FileType::from_raw_mode(told.stx_mode.into()).is_dir();
    anyhow::ensure!(is_dir, "cannot export {}: wanted a directory, found a file", dir.display());
    let id = told.stx_mnt_id.to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut lines = mounts.lines().map(|line| line.split(' '));
    let mount = lines.find_map(|mut words| (words.next()? == id).then(|| words.nth(3)).flatten());
    let mount = mount.with_context(|| format!("mount {id} of {} is not in mountinfo", dir.display()))?;
    Ok(unescape(mount))
}

/// mountinfo writes space, tab, newline and backslash as three octal digits behind a backslash.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

fn parse_user(text: &str) -> Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    let number = |text: &str| text.parse().map_err(|_| format!("wanted a number, found {text:?}"));
    Ok((number(uid)?, number(gid)?))
}

/// The user who ran sudo, else nobody.
pub(crate) fn default_user() -> (u32, u32) {
    const NOBODY: u32 = 65534;
    let id = |name| std::env::var(name).ok()?.parse().ok().filter(|id| *id != 0);
    match (id("SUDO_UID"), id("SUDO_GID")) {
        (Some(uid), Some(gid)) => (uid, gid),
        _ => (NOBODY, NOBODY),
    }
}

/// Passes on to the command what we are sent.
fn forward(mut signals: Signals, child: &Child) -> anyhow::Result<()> {
    let pid = Pid::from_child(child);
    let command: OwnedFd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            // What a terminal sends goes to the whole foreground group; the command has it already.
            let from_terminal = signal == SIGINT
                && rustix::termios::tcgetpgrp(std::io::stdin())
                    .is_ok_and(|group| group == rustix::process::getpgrp());
            if let (false, Some(signal)) = (from_terminal, Signal::from_named_raw(signal)) {
                // Refused only if it has ended, and then so do we.
                let _ = rustix::process::pidfd_send_signal(&command, signal);
            }
        }
    })?;
    Ok(())
}

pub(crate) fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn random() -> anyhow::Result<u32> {
    let mut bytes = [0; 4];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    anyhow::ensure!(got == bytes.len(), "the kernel gave {got} random bytes of 4");
    Ok(u32::from_ne_bytes(bytes))
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    if let Some(folder) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}
