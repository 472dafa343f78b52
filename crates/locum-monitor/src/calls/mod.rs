//! The calls, one file for each family. Each call is carried out in the same four steps: *read* copies what it refers to
//! out of the workload, *permit* decides, *perform* acts with no more rights than that, and returns what should happen;
//! the one place that *answers* is `answer.rs`.

pub(crate) mod handles;

use std::os::fd::OwnedFd;

use locum_kernel::Errno;
use locum_kernel::notify::Notification;

/// What should happen to a caller.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The call fails with this error.
    Fail(Errno),
    /// As before, and somebody may want to know: the reason goes into the audit log.
    Refuse(Errno, &'static str),
    /// This is written into the caller's memory, up to what cannot be; then the call returns 0 or fails as told.
    Write(Written, Result<(), Errno>),
    /// The caller is handed this open file and its number.
    Give {
        /// The open file.
        file: OwnedFd,
        /// Whether it is closed on exec in the caller.
        close_on_exec: bool,
    },
    /// The same for an `O_PATH` descriptor, which is handed over in another way.
    GivePath {
        /// The descriptor.
        file: OwnedFd,
        /// Whether it is closed on exec in the caller.
        close_on_exec: bool,
    },
    /// The caller makes the call itself, unhelped.
    Decline,
}

/// What is written into a caller's memory, with the addresses.
#[derive(Debug)]
pub(crate) struct Written {
    /// First: all of it or, with EFAULT, nothing.
    pub(crate) put: (u64, Vec<u8>),
    /// Then: up to the first byte that may not be written.
    pub(crate) written: (u64, Vec<u8>),
}

/// What becomes of a call that was cut off after *perform* began, and whose result is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutOff {
    /// It is carried out anew.
    Repeat,
    /// It may have happened and must not happen twice: EINTR.
    Neither,
}

impl CutOff {
    pub(crate) fn of(call: &Notification) -> Self {
        handles::cut_off(call)
    }
}

/// An argument that the kernel declares as an int: only its lower half counts.
#[expect(clippy::cast_possible_truncation, reason = "as the kernel does")]
pub(crate) fn int(argument: u64) -> i32 {
    (argument as u32).cast_signed()
}
