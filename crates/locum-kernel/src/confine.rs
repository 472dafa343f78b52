//! Giving up rights, for a whole process that has one thread yet.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Errno;

/// Becomes `uid` and `gid` with `groups`, gives up every capability for good and sets `no_new_privs`.
///
/// Affects the calling thread alone, as all such calls do in the kernel: to be called before a process starts
/// others. EPERM: the process may not change its ids.
pub fn drop_everything(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    rustix::thread::clear_ambient_capability_set()?;
    empty_bounding_set()?;
    let groups: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    // Groups before user: without user 0 they can no longer be changed.
    rustix::thread::set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    rustix::thread::set_no_new_privs(true)
}

/// Leaves nothing in the capability bounding set. EINVAL from the kernel marks the end of the ones it knows.
pub(crate) fn empty_bounding_set() -> Result<(), Errno> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) => rustix::thread::remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Has the kernel kill this process when the thread that started it ends. A change of ids clears this: call it
/// after that. Returns false if the parent, `parent`, is gone already.
pub fn die_with_parent(parent: u32) -> Result<bool, Errno> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let now = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get().cast_unsigned());
    Ok(now == parent)
}

/// Has `command` run as the child of whoever adopts orphans: what is spawned is a process between, which ends at once and is to
/// be waited for.
pub fn orphan(command: &mut Command) {
    let between = || {
        // SAFETY: the process was forked itself and has one thread; what is in its memory stays whole in both copies.
        match unsafe { libc::fork() } {
            0 => Ok(()),
            -1 => Err(std::io::Error::last_os_error()),
            // SAFETY: _exit(2) runs nothing of this process.
            _ => unsafe { libc::_exit(0) },
        }
    };
    // SAFETY: between fork and exec it makes system calls, and touches no memory that another thread may hold a lock on.
    unsafe { command.pre_exec(between) };
}

/// Raises the process's limit of descriptors as far as it may.
pub fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Refused only if the hard limit changed meanwhile; then the soft one stays.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// How many descriptors the process may have; `None`: there is no limit.
pub fn descriptor_limit() -> Option<u64> {
    rustix::process::getrlimit(Resource::Nofile).current
}

/// Keeps other processes of the same user from tracing this one or reading its descriptors. A change of ids resets
/// this: call it after that.
pub fn forbid_tracing() -> Result<(), Errno> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Has every descriptor from `first` on closed when this process executes another program (5.11).
pub fn close_on_exec_from(first: u32) -> Result<(), Errno> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC the call closes nothing; it sets a flag that no owner of a descriptor relies on
    // being clear.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    crate::notify::check(i32::try_from(done).unwrap_or(-1)).map(drop)
}
