//! Signals to single threads, to take them out of a wait.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::Errno;

static COUNT: AtomicU64 = AtomicU64::new(0);

/// The signal that [`interrupt`] sends.
const SIGNAL: libc::c_int = libc::SIGUSR1;

/// Whether a call that a handler interrupted is made again (`SA_RESTART`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// It is, where the kernel can.
    Yes,
    /// It fails with EINTR.
    No,
}

/// Has SIGUSR1 do nothing in this process but count, and interrupt what waits.
pub fn handle(restart: Restart) -> Result<(), Errno> {
    extern "C" fn count(_: libc::c_int) {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: all zeros is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = if restart == Restart::Yes { libc::SA_RESTART } else { 0 };
    // SAFETY: `action` is whole, and its handler does nothing but add to an atomic.
    let done = unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) };
    crate::notify::check(done).map(drop)
}

/// How many signals were handled.
pub fn handled() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// Sends SIGUSR1 to the thread `tid` of this process. ESRCH: there is none such.
pub fn interrupt(tid: u32) -> Result<(), Errno> {
    // SAFETY: tgkill takes numbers alone; limited to this process, it reaches no other even if the id was used again.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, SIGNAL) };
    crate::notify::check(i32::try_from(done).unwrap_or(-1)).map(drop)
}
