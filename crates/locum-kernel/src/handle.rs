//! File handles: name_to_handle_at(2) and open_by_handle_at(2).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::AtFlags;

use crate::Errno;

/// The most bytes a handle can have (`MAX_HANDLE_SZ`).
pub const MAX_BYTES: usize = 128;

/// `handle_type` when the room was too small (`FILEID_INVALID`).
pub const KIND_INVALID: i32 = 0xff;

/// Flags of name_to_handle_at(2) beyond AT_SYMLINK_FOLLOW and AT_EMPTY_PATH (`linux/fcntl.h`).
pub mod flag {
    /// Only to compare with: never opens (6.5).
    pub const FID: u32 = 0x200;
    /// The mount's 64-bit id, never used twice (6.12).
    pub const MOUNT_ID_UNIQUE: u32 = 0x001;
    /// Holds the way to a directory entry too (6.13).
    pub const CONNECTABLE: u32 = 0x002;
}

/// A file handle: what `struct file_handle` holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handle {
    /// `handle_type`.
    pub kind: i32,
    bytes: [u8; MAX_BYTES],
    len: usize,
}

impl Handle {
    /// `None` if there are more bytes than a handle can have.
    pub fn new(kind: i32, bytes: &[u8]) -> Option<Self> {
        let mut own = [0; MAX_BYTES];
        own.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(Self { kind, bytes: own, len: bytes.len() })
    }

    /// `f_handle`, as long as `handle_bytes` says.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The same handle with `more` behind its bytes; `None` if there is no room.
    pub fn with(&self, more: &[u8]) -> Option<Self> {
        let mut grown = self.clone();
        grown.bytes.get_mut(self.len..self.len + more.len())?.copy_from_slice(more);
        grown.len += more.len();
        Some(grown)
    }
}

/// What name_to_handle_at(2) told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The file's handle.
    pub handle: Handle,
    /// The id of the mount it was reached by.
    pub mount_id: u64,
}

/// `struct file_handle` with room for the largest.
#[repr(C)]
struct Raw {
    handle_bytes: u32,
    handle_type: i32,
    f_handle: [u8; MAX_BYTES],
}

/// The handle of the file that `path` names, as seen from `dir`. With [`flag::MOUNT_ID_UNIQUE`], `mount_id` is the
/// unique one.
///
/// EOPNOTSUPP: the file system has no handles. EOVERFLOW: this file has none, or one of more than 128 bytes. EINVAL: the
/// kernel does not know a flag. Others as of a path look-up.
pub fn name_to_handle_at(dir: BorrowedFd<'_>, path: &CStr, flags: AtFlags) -> Result<Named, Errno> {
    let mut raw = Raw { handle_bytes: 128, handle_type: 0, f_handle: [0; MAX_BYTES] };
    let mut mount_id = 0_u64;
    // SAFETY: the path ends in NUL; the kernel writes at most `handle_bytes` bytes behind the eight of `raw`'s head, for
    // which `raw` has room, and four or (AT_HANDLE_MNT_ID_UNIQUE) eight bytes into `mount_id`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            path.as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            flags.bits(),
        )
    };
    if done != 0 {
        return Err(last_error());
    }
    let bytes = raw.f_handle.get(..raw.handle_bytes as usize).ok_or(Errno::OVERFLOW)?;
    let handle = Handle::new(raw.handle_type, bytes).ok_or(Errno::OVERFLOW)?;
    Ok(Named { handle, mount_id })
}

/// Opens the file that `handle` names on the mount of `mount`. `flags` are those of open(2), as bits: the kernel
/// judges them. Needs CAP_DAC_READ_SEARCH.
///
/// ESTALE: no such file there. EBADF: `mount` is an `O_PATH` descriptor. EPERM: the capability is missing. EINVAL: an
/// empty handle, or a type that the kernel does not take.
pub fn open_by_handle_at(mount: BorrowedFd<'_>, handle: &Handle, flags: i32) -> Result<OwnedFd, Errno> {
    let raw = Raw {
        // A handle never has more than `MAX_BYTES`.
        handle_bytes: u32::try_from(handle.len).unwrap_or(u32::MAX),
        handle_type: handle.kind,
        f_handle: handle.bytes,
    };
    // SAFETY: the kernel reads `handle_bytes` bytes behind the eight of the head, all within `raw`.
    let done =
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw const raw, flags) };
    let fd = i32::try_from(done).map_err(|_| Errno::OVERFLOW)?;
    if fd < 0 {
        return Err(last_error());
    }
    // SAFETY: a non-negative result is a descriptor that was made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether the kernel takes `flags` for name_to_handle_at(2) at all: asked with a descriptor that is none.
pub fn name_flags_known(flags: u32) -> bool {
    // SAFETY: with a bad descriptor, and flags checked before it, the call returns EINVAL or EBADF; it reads the path,
    // which ends in NUL, and nothing else.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            -1,
            c"x".as_ptr(),
            std::ptr::null_mut::<Raw>(),
            std::ptr::null_mut::<u64>(),
            flags,
        )
    };
    done == 0 || last_error() != Errno::INVAL
}

/// Whether the kernel takes `kind` as a `handle_type` for open_by_handle_at(2) at all (6.13 looks at its upper half):
/// asked with a descriptor that is none.
pub fn kind_known(kind: i32) -> bool {
    let raw = Raw { handle_bytes: 8, handle_type: kind, f_handle: [0; MAX_BYTES] };
    // SAFETY: the kernel reads 16 bytes, all within `raw`.
    let done = unsafe { libc::syscall(libc::SYS_open_by_handle_at, -1, &raw const raw, 0) };
    done == 0 || last_error() != Errno::INVAL
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}
