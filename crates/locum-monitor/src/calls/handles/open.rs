//! open_by_handle_at(2).

use std::os::fd::{AsFd as _, OwnedFd, RawFd};

use locum_kernel::credentials::Rights;
use locum_kernel::handle::{self, Handle, MAX_BYTES};
use locum_kernel::notify::Notification;
use locum_kernel::{Errno, memory};
use locum_policy::OPath;
use rustix::fs::{FileType, Mode, OFlags};

use super::super::{Outcome, int};
use super::{Bench, Caller, Grant, Identity, own_folder, reopen};
use crate::exports::mount_id;

const AT_FDCWD: RawFd = -100;
/// Bytes of `struct file_handle` before the handle's own.
const HEAD: usize = 8;
/// What of a `handle_type` is flags for the kernel (6.13).
const KIND_FLAGS: i32 = 0xffff_0000_u32.cast_signed();

/// One call, copied out of the workload.
#[derive(Debug)]
pub(super) struct Request {
    mount: OwnedFd,
    mount_id: u64,
    handle: Handle,
    flags: OFlags,
}

/// What may be done.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The kernel's handle may be opened on the mount of the request.
    Open { handle: Handle },
    /// Nothing.
    Fail(Errno),
    /// Nothing, and it looks like an attempt at what was never granted.
    Refuse(Errno, &'static str),
}

pub(super) fn read(call: &Notification, caller: &Caller) -> Result<Request, Errno> {
    let [mount, handle_at, flags, ..] = call.args;
    let mut bytes = [0; HEAD + MAX_BYTES];
    let got = memory::read(call.tid, handle_at, &mut bytes)?;
    if got < HEAD {
        return Err(Errno::FAULT);
    }
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|index| bytes[at + index]));
    let (len, kind) = (word(0) as usize, word(4).cast_signed());
    if len == 0 || len > MAX_BYTES || kind < 0 || (kind & KIND_FLAGS != 0 && !handle::kind_known(kind)) {
        return Err(Errno::INVAL);
    }
    let own = bytes.get(HEAD..HEAD + len).filter(|_| got >= HEAD + len).ok_or(Errno::FAULT)?;
    let handle = Handle::new(kind, own).ok_or(Errno::INVAL)?;
    let mount = match int(mount) {
        AT_FDCWD => own_folder(caller, c"cwd", OFlags::RDONLY)?,
        fd => caller.thread.descriptor(fd)?,
    };
    let mount_id = mount_id(&mount)?;
    Ok(Request { mount, mount_id, handle, flags: OFlags::from_bits_retain(int(flags).cast_unsigned()) })
}

/// What is no descriptor to open on is told before the handle is looked at, as the kernel does; for a good handle the kernel
/// tells it itself.
fn refuse(request: &Request, error: Errno, why: Option<&'static str>) -> Verdict {
    match (rustix::fs::fcntl_getfl(&request.mount), why) {
        (Ok(flags), _) if flags.contains(OFlags::PATH) => Verdict::Fail(Errno::BADF),
        (_, Some(why)) => Verdict::Refuse(error, why),
        (_, None) => Verdict::Fail(error),
    }
}

pub(super) fn permit(request: &Request, grant: &Grant<'_>) -> Verdict {
    let Some(export) = grant.export_on(request.mount_id) else { return refuse(request, Errno::STALE, None) };
    match export.signer.verify(&request.handle) {
        Some(handle) => Verdict::Open { handle },
        None => {
            refuse(request, Errno::STALE, Some("a handle that this session was not given for this export"))
        }
    }
}

pub(super) fn perform(
    request: &Request,
    handle: &Handle,
    caller: &Caller,
    o_path: OPath,
    bench: &mut Bench<'_>,
) -> Result<Outcome, Errno> {
    let close_on_exec = request.flags.contains(OFlags::CLOEXEC);
    let wants_path = request.flags.contains(OFlags::PATH);
    let ids = caller.ids()?;
    // The kernel makes room for a descriptor before it cuts a file to nothing. Remaining race: another thread of the
    // caller's fills the table meanwhile.
    let no_room = !wants_path && request.flags.contains(OFlags::TRUNC) && caller.thread.table_is_full()?;
    bench.worker.have(Rights::Decode)?;
    let path_only = OFlags::PATH | OFlags::CLOEXEC;
    let flags = if wants_path { request.flags | path_only } else { path_only };
    let found = handle::open_by_handle_at(request.mount.as_fd(), handle, flags.bits().cast_signed())?;
    if wants_path && o_path == OPath::Exact {
        return Ok(Outcome::GivePath { file: found, close_on_exec });
    }
    let stat = rustix::fs::fstat(&found)?;
    if let Some(file) = (bench.kept)(Identity { device: stat.st_dev, inode: stat.st_ino }) {
        return Ok(Outcome::Give { file, close_on_exec });
    }
    if no_room {
        return Err(Errno::MFILE);
    }
    let kind = FileType::from_raw_mode(stat.st_mode);
    let flags = if wants_path {
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Ok(Outcome::GivePath { file: found, close_on_exec });
        }
        OFlags::RDONLY | request.flags & OFlags::DIRECTORY
    } else {
        // A device would be opened under the monitor's device cgroup, not the caller's.
        if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
            return Err(Errno::ACCESS);
        }
        // What a handle names is never followed further, and /proc/self/fd always must be.
        request.flags - OFlags::NOFOLLOW
    };
    bench.worker.act_as(&ids)?;
    let opened = match kind {
        FileType::Directory => open_directory(bench, &found, flags),
        _ => reopen(bench, &found, flags),
    };
    match opened {
        Ok(file) => Ok(Outcome::Give { file, close_on_exec }),
        // A descriptor that can be read cannot stand in for one of a file that the caller may not read.
        Err(Errno::ACCESS | Errno::PERM) if wants_path => {
            Ok(Outcome::GivePath { file: found, close_on_exec })
        }
        Err(error) => Err(error),
    }
}

/// A directory is its own ".", which is the shorter way; but that way asks for the right to search it, which opening does not.
fn open_directory(bench: &Bench<'_>, found: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    if flags.intersects(OFlags::CREATE | OFlags::TMPFILE.difference(OFlags::DIRECTORY)) {
        return reopen(bench, found, flags);
    }
    match rustix::fs::openat(found, c".", flags | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::ACCESS) => reopen(bench, found, flags),
        opened => opened,
    }
}
