//! Locks on single bytes of a file that belong to how it was opened, and end when that is closed, by the owner's death if by
//! nothing else: "open file description locks" of fcntl_locking(2).
//!
//! A mapping of the file keeps open what it was made through, and a memory can outlive its process by a moment: locks want a
//! descriptor of their own.

use std::os::fd::{AsFd, AsRawFd as _};

use crate::Errno;

/// Whether others may hold it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// With others who share it. Wants a descriptor for reading.
    Shared,
    /// Alone. Wants a descriptor for writing.
    Exclusive,
}

/// Locks `byte`, which need not exist, without waiting. False: somebody else has a lock that excludes this one.
pub fn try_lock(file: impl AsFd, byte: u64, kind: Kind) -> Result<bool, Errno> {
    let kind = if kind == Kind::Shared { libc::F_RDLCK } else { libc::F_WRLCK };
    match ask(file, libc::F_OFD_SETLK, byte, kind) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes whatever lock this descriptor's has off `byte`.
pub fn unlock(file: impl AsFd, byte: u64) -> Result<(), Errno> {
    ask(file, libc::F_OFD_SETLK, byte, libc::F_UNLCK).map(drop)
}

/// Whether somebody else has any lock on `byte`.
pub fn is_locked_by_another(file: impl AsFd, byte: u64) -> Result<bool, Errno> {
    Ok(i32::from(ask(file, libc::F_OFD_GETLK, byte, libc::F_WRLCK)?.l_type) != libc::F_UNLCK)
}

fn ask(file: impl AsFd, command: libc::c_int, byte: u64, kind: libc::c_int) -> Result<libc::flock, Errno> {
    // SAFETY: all zeros is a valid `flock`: from the start of the file, with no process id, as these locks want it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(|_| Errno::INVAL)?;
    (lock.l_start, lock.l_len) = (byte.cast_signed(), 1);
    // SAFETY: both commands read and write one `struct flock` at this address, which lives until the call returns.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &raw mut lock) };
    crate::notify::check(done)?;
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_byte_is_locked_until_it_is_closed() {
        let memory = rustix::fs::memfd_create(c"lock", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, other) = (open(), open());
        assert_eq!(try_lock(&one, 3, Kind::Exclusive), Ok(true));
        assert_eq!(try_lock(&one, 4, Kind::Exclusive), Ok(true));
        for kind in [Kind::Exclusive, Kind::Shared] {
            assert_eq!(try_lock(&other, 3, kind), Ok(false));
        }
        assert_eq!(is_locked_by_another(&one, 3), Ok(false));
        assert_eq!(is_locked_by_another(&other, 3), Ok(true));
        assert_eq!(try_lock(&other, 5, Kind::Shared), Ok(true));
        assert_eq!(try_lock(&one, 5, Kind::Shared), Ok(true));
        unlock(&one, 3).unwrap();
        assert_eq!(try_lock(&other, 3, Kind::Exclusive), Ok(true));
        assert_eq!(try_lock(&other, 4, Kind::Exclusive), Ok(false));
        drop(one);
        assert_eq!(try_lock(&other, 4, Kind::Exclusive), Ok(true));
        assert_eq!(is_locked_by_another(&other, 5), Ok(false));
    }
}
