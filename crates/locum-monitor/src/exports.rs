//! The mounts of a workload whose files may be opened by handle.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use locum_kernel::Errno;
use locum_kernel::process::Thread;
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};

use crate::key_ring::KeyRing;
use crate::keys::KeyId;
use crate::signature::Signer;

/// One export: a path of the policy, found in one workload.
#[derive(Debug)]
pub(crate) struct Export {
    /// Its path in the policy.
    pub(crate) path: String,
    /// The mount, as it is told to callers that do not ask for the unique id.
    pub(crate) mount: u64,
    /// The mount's id that is never used twice (6.8); the other one before.
    pub(crate) unique: u64,
    pub(crate) signer: Signer,
    /// Keeps `mount` from being used again for another one while the session lasts.
    _pinned: OwnedFd,
}

/// Why an export of the policy is not one in this workload.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// Not there, or not to be reached.
    #[error("{0}")]
    Path(#[from] Errno),
    /// Its server chooses the handles, and may be the workload itself.
    #[error(
        "it is a FUSE mount, whose server could have any handle signed; share the file system under it instead"
    )]
    Fuse,
    /// Something else was mounted there when the session began.
    #[error("another mount than when the session began")]
    Changed,
}

/// `FUSE_SUPER_MAGIC` (`linux/magic.h`).
const FUSE: i64 = 0x6573_5546;

impl Export {
    /// Finds `path` as the thread `of` sees it from its root. `unique` is what a former monitor found.
    pub(crate) fn find(
        path: &str,
        of: &Thread,
        unique: Option<u64>,
        keys: &Arc<KeyRing>,
        key: Option<KeyId>,
        scope: &str,
    ) -> Result<Self, ExportError> {
        let open = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::openat(of.proc(), c"root", open | OFlags::DIRECTORY, Mode::empty())?;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(root, path, open, Mode::empty(), within)?;
        if rustix::fs::fstatfs(&found)?.f_type == FUSE {
            return Err(ExportError::Fuse);
        }
        let mount = mount_id(&found)?;
        let own_unique = unique_mount_id(&found).unwrap_or(mount);
        if unique.is_some_and(|unique| unique != own_unique) {
            return Err(ExportError::Changed);
        }
        let signer = Signer::new(keys, key, scope, path);
        Ok(Self { path: path.to_owned(), mount, unique: own_unique, signer, _pinned: found })
    }
}

/// The id of the mount that `fd` was opened on (5.8).
pub(crate) fn mount_id(fd: &OwnedFd) -> Result<u64, Errno> {
    let told = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if told.stx_mask & StatxFlags::MNT_ID.bits() == 0 { Err(Errno::NOSYS) } else { Ok(told.stx_mnt_id) }
}

/// The id of that mount which is never used twice (6.8).
fn unique_mount_id(fd: &OwnedFd) -> Result<u64, Errno> {
    /// `STATX_MNT_ID_UNIQUE` (`linux/stat.h`).
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let told = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, UNIQUE)?;
    if told.stx_mask & UNIQUE.bits() == 0 { Err(Errno::NOSYS) } else { Ok(told.stx_mnt_id) }
}
