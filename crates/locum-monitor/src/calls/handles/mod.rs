//! name_to_handle_at(2) and open_by_handle_at(2): signed handles for files on the session's exports.

mod name;
mod open;

use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};

use locum_kernel::Errno;
use locum_kernel::arch::AUDIT_ARCH;
use locum_kernel::credentials::{Rights, Worker};
use locum_kernel::notify::Notification;
use locum_policy::{Call, OPath};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::{CutOff, Outcome, int};
use crate::caller::Caller;
use crate::exports::Export;

/// What a session may have of this family.
#[derive(Debug)]
pub(crate) struct Grant<'a> {
    pub(crate) calls: &'a [Call],
    pub(crate) exports: &'a [Export],
    pub(crate) o_path: OPath,
}

impl Grant<'_> {
    fn export_on(&self, mount: u64) -> Option<&Export> {
        self.exports.iter().find(|export| export.mount == mount)
    }
}

/// What performing a call of this family works with.
pub(crate) struct Bench<'a> {
    /// The worker's rights.
    pub(crate) worker: &'a mut Worker,
    /// The monitor's own descriptors as a folder, /proc/self/fd.
    pub(crate) own_descriptors: &'a OwnedFd,
    /// The monitor's root.
    pub(crate) own_root: &'a OwnedFd,
    /// A file that an earlier try of this very call opened and could not deliver, if it is the one with this identity.
    pub(crate) kept: &'a dyn Fn(Identity) -> Option<OwnedFd>,
    /// Whether the caller can be handed an `O_PATH` descriptor.
    pub(crate) takes_path: &'a dyn Fn() -> bool,
}

/// Which file something is: device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(crate) fn of(file: &OwnedFd) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(file)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// Carries out one call.
pub(crate) fn carry_out(
    call: &Notification,
    caller: &Caller,
    grant: &Grant<'_>,
    bench: &mut Bench<'_>,
) -> Outcome {
    let granted = |nr: i32| {
        (call.arch == AUDIT_ARCH)
            .then(|| grant.calls.iter().find(|granted| number(**granted) == nr).copied())
            .flatten()
    };
    if let Err(error) = bench.worker.have(Rights::Full) {
        return Outcome::Fail(error);
    }
    let done = match granted(call.nr) {
        None => return Outcome::Decline,
        Some(Call::NameToHandleAt) => {
            name::read(call, caller).and_then(|request| name::perform(&request, caller, grant, bench))
        }
        Some(Call::OpenByHandleAt) => {
            open::read(call, caller).and_then(|request| match open::permit(&request, grant) {
                open::Verdict::Open { handle } => {
                    open::perform(&request, &handle, caller, grant.o_path, bench)
                }
                open::Verdict::Fail(error) => Err(error),
                open::Verdict::Refuse(error, why) => Ok(Outcome::Refuse(error, why)),
            })
        }
    };
    done.unwrap_or_else(Outcome::Fail)
}

/// Naming can be done over and again. So can opening, unless it cuts the file to nothing: what was written in between
/// would be lost.
pub(super) fn cut_off(call: &Notification) -> CutOff {
    let flags = OFlags::from_bits_retain(int(call.args[2]).cast_unsigned());
    // With O_PATH, the kernel looks at no other flag that does anything.
    let truncates = flags.contains(OFlags::TRUNC) && !wants_path(call);
    if opens(call) && truncates { CutOff::Neither } else { CutOff::Repeat }
}

/// Whether the call asks for a descriptor.
pub(crate) fn opens(call: &Notification) -> bool {
    call.nr == number(Call::OpenByHandleAt)
}

/// Whether the call asks for an `O_PATH` descriptor.
pub(crate) fn wants_path(call: &Notification) -> bool {
    let flags = OFlags::from_bits_retain(int(call.args[2]).cast_unsigned());
    opens(call) && flags.contains(OFlags::PATH)
}

pub(crate) fn number(call: Call) -> i32 {
    // Every call that a policy can name is in the table: a test goes through them.
    locum_kernel::arch::CALLS.iter().find(|(name, _)| *name == call.name()).map_or(-1, |(_, nr)| *nr)
}

/// The caller's root or working directory, opened with `flags`.
fn own_folder(caller: &Caller, name: &'static std::ffi::CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(caller.thread.proc(), name, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Looks `path` up as the caller would: in its root, from `dir`, with its ids and no capability. EOPNOTSUPP: it leads through
/// a link of /proc that is not a path but a file, and of whom it is depends on who looks.
fn look_up(
    dir: Option<&OwnedFd>,
    path: &std::ffi::CStr,
    follow: bool,
    caller: &Caller,
    bench: &mut Bench<'_>,
) -> Result<OwnedFd, Errno> {
    let ids = caller.ids()?.into_owned();
    let enter = |root: &OwnedFd| rustix::process::fchdir(root).and_then(|()| rustix::process::chroot(c"."));
    enter(&own_folder(caller, c"root", OFlags::PATH)?)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC | if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
    let dir = dir.map_or(CWD, AsFd::as_fd);
    let walk = |resolve| rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve);
    let found = bench.worker.act_as(&ids).and_then(|()| match walk(ResolveFlags::NO_MAGICLINKS) {
        // Either a loop, or a link of /proc: what this process has is no business of the caller's.
        Err(Errno::LOOP) if walk(ResolveFlags::empty()).err() != Some(Errno::LOOP) => Err(Errno::OPNOTSUPP),
        found => found,
    });
    let back = bench.worker.have(Rights::Full).and_then(|()| enter(bench.own_root));
    // A worker that cannot leave the caller's root must not go on; its panic is answered like any other.
    assert!(back.is_ok(), "cannot return to the monitor's own root: {back:?}");
    found
}

/// Opens anew what `fd` refers to, by way of /proc/self/fd.
fn reopen(bench: &Bench<'_>, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let name = fd.as_raw_fd().to_string();
    rustix::fs::openat(bench.own_descriptors, name, flags | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_that_a_policy_can_name_has_a_number() {
        for call in Call::ALL {
            assert!(number(*call) > 0, "{}", call.name());
        }
    }
}
