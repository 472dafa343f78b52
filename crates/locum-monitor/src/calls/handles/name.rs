//! name_to_handle_at(2).

use std::ffi::CString;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};

use locum_kernel::handle::{self, Handle, KIND_INVALID, MAX_BYTES, flag};
use locum_kernel::notify::Notification;
use locum_kernel::{Errno, memory};
use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};

use super::super::{Outcome, Written, int};
use super::{Bench, Caller, Grant, look_up, own_folder};
use crate::exports::Export;
use crate::signature::{MAX_SIGNABLE, Purpose, TRAILER};

const PATH_MAX: usize = 4096;
const AT_FDCWD: RawFd = -100;

/// One call, copied out of the workload.
#[derive(Debug)]
pub(super) struct Request {
    /// Where the path begins; `None` if it does not matter, since the path is absolute.
    dir: Option<OwnedFd>,
    /// The path; `None` for the descriptor or folder itself (AT_EMPTY_PATH).
    path: Option<CString>,
    /// The room that the caller has; the kernel looks at it only after the path.
    room: Result<u32, Errno>,
    flags: u32,
    handle_at: u64,
    mount_id_at: u64,
}

pub(super) fn read(call: &Notification, caller: &Caller) -> Result<Request, Errno> {
    let [dir, path_at, handle_at, mount_id_at, flags, _] = call.args;
    let (dir, flags) = (int(dir), int(flags).cast_unsigned());
    let known = AtFlags::SYMLINK_FOLLOW.bits() | AtFlags::EMPTY_PATH.bits();
    if flags & !known != 0 && !handle::name_flags_known(flags) {
        return Err(Errno::INVAL);
    }
    // Both at once: nearly every path is short, and most are empty.
    let mut path = vec![0; memory::within_page(path_at, 64)];
    // The kernel wants the whole head to be there, of which the second half does not count.
    let mut head = [0; 8];
    let got = memory::read_both(call.tid, (path_at, &mut path), (handle_at, &mut head))?;
    path.truncate(got.0);
    let path = memory::read_string(call.tid, path_at, path, PATH_MAX)?;
    let [room @ .., _, _, _, _] = head;
    let room = if got.1 == head.len() { Ok(u32::from_ne_bytes(room)) } else { Err(Errno::FAULT) };
    let empty = path.is_empty();
    if empty && flags & AtFlags::EMPTY_PATH.bits() == 0 {
        return Err(Errno::NOENT);
    }
    let dir = match path.as_bytes().first() {
        Some(b'/') => None,
        _ if dir == AT_FDCWD => Some(own_folder(caller, c"cwd", OFlags::PATH)?),
        _ => Some(caller.thread.descriptor(dir)?),
    };
    Ok(Request { dir, path: (!empty).then_some(path), room, flags, handle_at, mount_id_at })
}

pub(super) fn perform(
    request: &Request,
    caller: &Caller,
    grant: &Grant<'_>,
    bench: &mut Bench<'_>,
) -> Result<Outcome, Errno> {
    #[cfg(debug_assertions)]
    request.path.as_deref().into_iter().for_each(crate::fault::inject);
    let looked_up;
    let target = match (&request.path, &request.dir) {
        (None, Some(dir)) => dir,
        (path, dir) => {
            let follow = request.flags & AtFlags::SYMLINK_FOLLOW.bits() != 0;
            let path = path.as_deref().unwrap_or(c"");
            looked_up = look_up(dir.as_ref(), path, follow, caller, bench)?;
            &looked_up
        }
    };
    let unique = request.flags & flag::MOUNT_ID_UNIQUE != 0;
    let named = name(target, request.flags, bench)?;
    let (export, room) = permit(request, &named, unique, grant)?;
    let purpose = if request.flags & flag::FID != 0 { Purpose::Compare } else { Purpose::Open };
    if purpose == Purpose::Open && !(bench.takes_path)() && !can_be_opened(target, caller, bench)? {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(answer(request, room, unique, &named, export, purpose))
}

/// Whether the file may be named: on which export it lies, and what room the caller has. Outside every export, and where
/// no room is left for a trailer, EOPNOTSUPP lets virtiofsd keep a descriptor instead.
fn permit<'a>(
    request: &Request,
    named: &handle::Named,
    unique: bool,
    grant: &'a Grant<'_>,
) -> Result<(&'a Export, u32), Errno> {
    let is_there = |export: &&Export| named.mount_id == if unique { export.unique } else { export.mount };
    let export = grant.exports.iter().find(is_there).ok_or(Errno::OPNOTSUPP)?;
    if named.handle.bytes().len() > MAX_SIGNABLE {
        return Err(Errno::OPNOTSUPP);
    }
    let room = request.room?;
    if room as usize > MAX_BYTES { Err(Errno::INVAL) } else { Ok((export, room)) }
}

/// The kernel's handle of `target`.
fn name(target: &OwnedFd, flags: u32, bench: &Bench<'_>) -> Result<handle::Named, Errno> {
    let asked = AtFlags::from_bits_retain(flags & (flag::FID | flag::MOUNT_ID_UNIQUE | flag::CONNECTABLE));
    if flags & flag::CONNECTABLE != 0 {
        // Not to be had for a descriptor as such; by way of /proc it is a path that ends at the same place.
        let path = CString::new(target.as_raw_fd().to_string()).map_err(|_| Errno::INVAL)?;
        return handle::name_to_handle_at(
            std::os::fd::AsFd::as_fd(bench.own_descriptors),
            &path,
            asked | AtFlags::SYMLINK_FOLLOW,
        );
    }
    handle::name_to_handle_at(std::os::fd::AsFd::as_fd(target), c"", asked | AtFlags::EMPTY_PATH)
}

/// Whether a descriptor that stands in for an `O_PATH` one could be had: a folder or regular file that the caller may
/// read. Asked of callers that cannot be handed a true one. A matter of convenience, not of permission: opening asks the kernel.
fn can_be_opened(target: &OwnedFd, caller: &Caller, bench: &mut Bench<'_>) -> Result<bool, Errno> {
    let wanted = StatxFlags::TYPE | StatxFlags::MODE | StatxFlags::UID;
    let file = rustix::fs::statx(target, c"", AtFlags::EMPTY_PATH, wanted)?;
    let kind = FileType::from_raw_mode(file.stx_mode.into());
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        return Ok(false);
    }
    let ids = caller.ids()?;
    // The owner's bits are the last word for the owner, whatever an ACL says of others.
    if file.stx_uid == ids.user {
        return Ok(file.stx_mode & 0o400 != 0);
    }
    bench.worker.act_as(&ids)?;
    let readable = locum_kernel::credentials::may_read(std::os::fd::AsFd::as_fd(target));
    bench.worker.have(locum_kernel::credentials::Rights::Full)?;
    Ok(readable)
}

/// What the kernel would write, with the signed handle in place of its own.
fn answer(
    request: &Request,
    room: u32,
    unique: bool,
    named: &handle::Named,
    export: &Export,
    purpose: Purpose,
) -> Outcome {
    let Some(signed) = export.signer.sign(&named.handle, purpose) else {
        return Outcome::Fail(Errno::OPNOTSUPP);
    };
    let fits = signed.bytes().len() <= room as usize;
    let mut head = Vec::with_capacity(8 + MAX_BYTES);
    head.extend_from_slice(&length(&signed).to_ne_bytes());
    head.extend_from_slice(&(if fits { signed.kind } else { KIND_INVALID }).to_ne_bytes());
    if fits {
        head.extend_from_slice(signed.bytes());
    }
    let mount_id = named.mount_id.to_ne_bytes();
    let mount_id = if unique { mount_id.to_vec() } else { mount_id[..4].to_vec() };
    let written = Written { put: (request.mount_id_at, mount_id), written: (request.handle_at, head) };
    Outcome::Write(written, if fits { Ok(()) } else { Err(Errno::OVERFLOW) })
}

fn length(handle: &Handle) -> u32 {
    // At most `MAX_BYTES`.
    u32::try_from(handle.bytes().len()).unwrap_or(u32::MAX)
}

const _: () = assert!(TRAILER + MAX_SIGNABLE == MAX_BYTES);
