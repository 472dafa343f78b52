//! The rights of one worker thread: full for looking at callers, one capability for decoding a handle, none and the
//! caller's own ids for opening.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::fs::Gid;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::Errno;
use crate::process::Ids;

/// All that a monitor ever needs: SYS_PTRACE for callers' memory and descriptors, DAC_OVERRIDE since /proc/TID/mem may
/// be opened for writing by its owner alone, DAC_READ_SEARCH for handles, SYS_CHROOT for callers' paths, SETUID and SETGID to
/// take on their ids.
pub const NEEDED: CapabilitySet = CapabilitySet::SYS_PTRACE
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// What the surgeon needs beside that, the short-lived program which puts a listener into a process that lost its own: to suspend
/// that process's filters for a moment, and to read them. No thread of a monitor ever has it in effect.
const SURGEON: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// What of its capabilities a worker has in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// [`NEEDED`].
    Full,
    /// CAP_DAC_READ_SEARCH alone.
    Decode,
    /// None.
    Nothing,
}

/// Leaves the process with [`NEEDED`] and no way to more, and keeps a change of ids from changing capabilities. To be
/// called before it has a second thread. EPERM: it does not have what is needed.
pub fn limit_process() -> Result<(), Errno> {
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_ROOT,
    )?;
    let own = rustix::thread::capabilities(None)?;
    // Who started us without the right may have us serve, but not put lost listeners back.
    let permitted = NEEDED.union(SURGEON).intersection(own.permitted.union(NEEDED));
    // Nothing can become inheritable any more once the bounding set is empty.
    rustix::thread::set_capabilities(None, CapabilitySets { inheritable: permitted, ..own })?;
    crate::confine::empty_bounding_set()?;
    let sets = CapabilitySets { effective: NEEDED, permitted, inheritable: permitted };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)
}

/// Has `command` run with [`NEEDED`] and what the surgeon needs beside. EPERM, when it starts: the calling thread was not the one
/// that called [`limit_process`].
pub fn as_surgeon(command: &mut Command) {
    let raise = || {
        for bit in 0..64 {
            let capability = CapabilitySet::from_bits_retain(1 << bit);
            if NEEDED.union(SURGEON).contains(capability) {
                rustix::thread::configure_capability_in_ambient_set(capability, true)?;
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls, and touches no memory that another thread may hold a lock on.
    unsafe { command.pre_exec(raise) };
}

/// The calling thread's rights, and the ids that it has taken on.
#[derive(Debug)]
pub struct Worker {
    rights: Rights,
    ids: Option<Ids>,
    /// Only the thread whose rights these are may change them.
    _of_this_thread: std::marker::PhantomData<*const ()>,
}

impl Worker {
    /// For a thread that has just been started in a process after [`limit_process`]: full rights, whatever the thread had that
    /// started it, and a root and a working directory of its own, so that a path can be looked up as a caller would.
    pub fn start() -> Result<Self, Errno> {
        // SAFETY: CLONE_FS parts the thread from the others' root, working directory and umask; no memory, descriptor or
        // lock of ours depends on sharing them.
        let done = unsafe { libc::unshare(libc::CLONE_FS) };
        crate::notify::check(done)?;
        let mut worker =
            Self { rights: Rights::Nothing, ids: None, _of_this_thread: std::marker::PhantomData };
        worker.have(Rights::Full)?;
        Ok(worker)
    }

    /// Puts `rights` in effect.
    pub fn have(&mut self, rights: Rights) -> Result<(), Errno> {
        if self.rights == rights {
            return Ok(());
        }
        let effective = match rights {
            Rights::Full => NEEDED,
            Rights::Decode => CapabilitySet::DAC_READ_SEARCH,
            Rights::Nothing => CapabilitySet::empty(),
        };
        let sets = CapabilitySets { effective, permitted: NEEDED, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets)?;
        self.rights = rights;
        Ok(())
    }

    /// Takes on `ids`, for whatever the thread does with files from now on, and gives up every capability for the time being.
    pub fn act_as(&mut self, ids: &Ids) -> Result<(), Errno> {
        if self.ids.as_ref() != Some(ids) {
            self.have(Rights::Full)?;
            self.ids = None;
            let groups: Vec<Gid> = ids.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            // Groups before user, as everywhere.
            rustix::thread::set_thread_groups(&groups)?;
            set_file_system_id(libc::SYS_setfsgid, ids.group)?;
            set_file_system_id(libc::SYS_setfsuid, ids.user)?;
            self.ids = Some(ids.clone());
        }
        self.have(Rights::Nothing)
    }
}

/// setfsuid(2) and setfsgid(2) tell no error: only asking again shows whether the id was taken.
fn set_file_system_id(call: libc::c_long, id: u32) -> Result<(), Errno> {
    // SAFETY: the id goes by value; no memory of ours is touched.
    unsafe { libc::syscall(call, id) };
    // SAFETY: as above; -1 is no valid id, so nothing changes.
    let now = unsafe { libc::syscall(call, -1) };
    if u32::try_from(now) == Ok(id) { Ok(()) } else { Err(Errno::PERM) }
}

/// Whether the calling thread may read what `fd` refers to, with its file system ids and effective capabilities
/// (faccessat2(2), 5.8; through a descriptor of any kind).
pub fn may_read(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: the path ends in NUL and is all that the kernel reads.
    let done = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::R_OK,
            libc::AT_EMPTY_PATH | libc::AT_EACCESS,
        )
    };
    done == 0
}
