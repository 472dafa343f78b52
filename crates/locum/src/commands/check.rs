//! `locum check`.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::Context as _;
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::handle::{self, flag};
use locum_kernel::notify::{self, Answer, Buffer, Listener, Notification};
use locum_kernel::process::Thread;
use locum_kernel::{Errno, arch, credentials, memory};
use locum_monitor::keys::Keys;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::CapabilitySet;
use serde::Serialize;

use super::run::choose_policy;

/// Can this kernel, this user, this policy do it; what is missing and what that costs.
///
/// Everything is tried, nothing is taken from version numbers. Exit code 1: locum cannot work here.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum check --policy virtiofsd")]
pub(crate) struct Args {
    /// A built-in policy, or a file with one.
    #[arg(long, value_name = "NAME|FILE", default_value = "virtiofsd")]
    policy: String,
    /// The directory of keys.
    #[arg(long, value_name = "DIR", default_value = "/etc/locum/keys")]
    keys: PathBuf,
    /// For machines.
    #[arg(long)]
    json: bool,
}

/// What one probe found.
#[derive(Serialize)]
struct Finding {
    what: &'static str,
    result: Outcome,
    note: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Yes,
    /// It works without; the note says what is lost.
    Weaker,
    /// It does not work without.
    No,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut findings = kernel();
    findings.extend([user(), handles(), keys(&args.keys), policy(&args.policy)]);
    findings.extend(["crun", "runc", "podman"].map(runtime));
    let works = findings.iter().all(|finding| finding.result != Outcome::No);
    if args.json {
        println!("{}", serde_json::to_string(&serde_json::json!({"works": works, "findings": findings}))?);
    } else {
        for Finding { what, result, note } in &findings {
            let word = match result {
                Outcome::Yes => "yes",
                Outcome::Weaker => "weaker",
                Outcome::No => "NO",
            };
            println!("{word:<7}{what}{}{note}", if note.is_empty() { "" } else { ": " });
        }
        println!("{}", if works { "locum can work here" } else { "locum cannot work here" });
    }
    Ok(ExitCode::from(u8::from(!works)))
}

/// `what` if `has`, else what is lost without it.
fn nice(what: &'static str, has: bool, lost: &str) -> Finding {
    let result = if has { Outcome::Yes } else { Outcome::Weaker };
    Finding { what, result, note: if has { String::new() } else { lost.to_owned() } }
}

fn needed(what: &'static str, found: anyhow::Result<String>) -> Finding {
    match found {
        Ok(note) => Finding { what, result: Outcome::Yes, note },
        Err(error) => Finding { what, result: Outcome::No, note: format!("{error:#}") },
    }
}

fn kernel() -> Vec<Finding> {
    let killable = round_trip(Wait::Killable);
    let can_kill = killable.is_ok();
    let plain = killable.or_else(|_| round_trip(Wait::Interruptible));
    let sync_wake_up = *plain.as_ref().unwrap_or(&false);
    vec![
        needed("seccomp user notification", plain.map(|_| String::new())),
        nice(
            "WAIT_KILLABLE_RECV (5.19)",
            can_kill,
            "promise 3: any signal takes a call back, which is then made anew; a call that does not restart returns EINTR",
        ),
        nice("FD_SYNC_WAKE_UP (6.6)", sync_wake_up, "no promise; each call takes several times as long"),
        nice(
            "PIDFD_THREAD (6.9)",
            pidfd_of_a_thread(),
            "promise 10: a thread with a descriptor table apart from its process's gets EOPNOTSUPP",
        ),
        nice(
            "kcmp (CONFIG_KCMP)",
            finds_a_descriptor().is_ok(),
            "promise 4: a descriptor that was handed over just as the monitor died is handed over again, and one leaks",
        ),
        nice(
            "PROCMAP_QUERY (6.11)",
            knows_procmap_query(),
            "no promise; writing to a caller's memory is slower",
        ),
        nice(
            "AT_HANDLE_FID (6.5)",
            handle::name_flags_known(flag::FID),
            "callers that use it get EINVAL, as without locum",
        ),
        nice(
            "AT_HANDLE_MNT_ID_UNIQUE (6.12)",
            handle::name_flags_known(flag::MOUNT_ID_UNIQUE),
            "callers that use it get EINVAL, as without locum",
        ),
        nice(
            "AT_HANDLE_CONNECTABLE (6.13)",
            handle::name_flags_known(flag::CONNECTABLE),
            "callers that use it get EINVAL, as without locum",
        ),
    ]
}

/// Has a thread make a call that is answered here, and tells whether the kernel can wake synchronously.
///
/// Filter and no_new_privs are the thread's own, and end with it.
fn round_trip(wait: Wait) -> anyhow::Result<bool> {
    anyhow::ensure!(
        notify::sizes_fit().context("the kernel has none")?,
        "the kernel's notifications have outgrown this release"
    );
    let nr = arch::CALLS.iter().find(|(name, _)| *name == "name_to_handle_at").map_or(0, |(_, nr)| *nr);
    let (give, given) = mpsc::channel();
    let caller = std::thread::spawn(move || -> anyhow::Result<Errno> {
        rustix::thread::set_no_new_privs(true)?;
        give.send(Filter::notify(&[nr]).install(wait)?)?;
        // Nobody may hold the listener but the one who answers; the call would else wait for ever if that one fails.
        drop(give);
        match name(CWD, c".") {
            Ok(_) => anyhow::bail!("the call was made and not handed over"),
            Err(error) => Ok(error),
        }
    });
    let wakes = given.recv().map(|listener| serve(&listener));
    let answer = caller.join().map_err(|_| anyhow::anyhow!("the caller panicked"))??;
    // An error that the call itself never gives.
    anyhow::ensure!(answer == Errno::XFULL, "the call returned {answer:?} and not what was answered");
    wakes.context("no listener")?
}

fn serve(listener: &Listener) -> anyhow::Result<bool> {
    let wakes = listener.wake_synchronously().is_ok();
    let buffer = Buffer::default();
    listener.receive(&buffer)?;
    let notification = Notification::load(&buffer).context("nothing was received")?;
    listener.send(notification.id, Answer::Error(Errno::XFULL))?;
    Ok(wakes)
}

fn name(dir: BorrowedFd<'_>, path: &CStr) -> Result<handle::Named, Errno> {
    handle::name_to_handle_at(dir, path, AtFlags::empty())
}

fn pidfd_of_a_thread() -> bool {
    // `PIDFD_THREAD` has the value of O_EXCL.
    let flag = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());
    let tries = std::thread::spawn(move || {
        let tid: Pid = rustix::thread::gettid();
        rustix::process::pidfd_open(tid, flag).is_ok()
    });
    tries.join().unwrap_or(false)
}

fn finds_a_descriptor() -> Result<(), Errno> {
    let own = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    match Thread::hold(std::process::id())?.find(own.as_fd())? {
        Some(_) => Ok(()),
        None => Err(Errno::NOENT),
    }
}

fn knows_procmap_query() -> bool {
    let own = rustix::fs::open(c"/proc/self", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    own.and_then(|proc| memory::AddressSpace::open(&proc)).is_ok_and(|space| space.knows_query())
}

fn user() -> Finding {
    let found = || {
        let has = rustix::thread::capabilities(None)?.effective;
        // It also empties its bounding set.
        let missing = credentials::NEEDED.union(CapabilitySet::SETPCAP).difference(has);
        let user = rustix::process::geteuid().as_raw();
        anyhow::ensure!(missing.is_empty(), "user {user} lacks {missing:?}; start the monitor as root");
        Ok(format!("user {user} has all that the monitor needs"))
    };
    needed("capabilities", found())
}

/// Opens a handle: the one thing that a user namespace's root cannot do.
fn handles() -> Finding {
    let found = || {
        let places = [c".", c"/var/tmp", c"/dev/shm", c"/tmp"];
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for place in places {
            let Ok(named) = name(CWD, place) else { continue };
            let Ok(mount) = rustix::fs::open(place, flags, Mode::empty()) else { continue };
            handle::open_by_handle_at(mount.as_fd(), &named.handle, OFlags::PATH.bits().cast_signed())
                .context("open_by_handle_at; it takes CAP_DAC_READ_SEARCH in the initial user namespace")?;
            return Ok(String::new());
        }
        anyhow::bail!("no file system with file handles among {places:?}")
    };
    needed("file handles", found())
}

fn keys(directory: &Path) -> Finding {
    let is_empty = std::fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none());
    if is_empty && rustix::process::geteuid().is_root() {
        return needed(
            "keys",
            Ok(format!("{} is empty; the first monitor makes one there", directory.display())),
        );
    }
    let found = Keys::read(directory).map_err(anyhow::Error::from).and_then(|(keys, faults)| {
        let faults = faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        anyhow::ensure!(faults.is_empty(), faults);
        let newest = keys.newest().context("no key is there; make one with `locum keys create`")?;
        Ok(format!("new sessions sign with {newest}"))
    });
    needed("keys", found)
}

fn policy(name: &str) -> Finding {
    needed("policy", choose_policy(name).map(|policy| format!("{} can be used", policy.name)))
}

/// A program that can set the flag holds its name, since profiles give it by name.
const FLAG: &[u8] = b"SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// Whether a runtime is there, and whether it can set `WAIT_KILLABLE_RECV`.
fn runtime(name: &'static str) -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(program) = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
    else {
        return nice(name, false, "not found; no matter if it is not used");
    };
    let found = Finding { what: name, result: Outcome::Yes, note: String::new() };
    if name == "podman" {
        return Finding { note: "starts containers with one of the above".to_owned(), ..found };
    }
    let knows =
        std::fs::read(&program).is_ok_and(|bytes| bytes.windows(FLAG.len()).any(|window| window == FLAG));
    if knows {
        return Finding { note: "can set WAIT_KILLABLE_RECV".to_owned(), ..found };
    }
    nice(
        name,
        false,
        "cannot set WAIT_KILLABLE_RECV; promise 3: in its containers any signal takes a call back, which is then made anew",
    )
}
