//! A note of the call on which the process crashed, written by the crash itself.
//!
//! A fault in a worker ends the whole monitor. Its successor has to tell the call that brought the fault from those
//! that merely were in the making, so the handler of the fatal signals leaves a mark where the journal will be found.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Errno;

thread_local! {
    static MARK: Cell<*const AtomicU64> = const { Cell::new(std::ptr::null()) };
}

/// Has a crash of the calling thread add 1 to `mark` while `work` runs.
pub fn marked<T>(mark: &AtomicU64, work: impl FnOnce() -> T) -> T {
    struct Unmark;
    impl Drop for Unmark {
        fn drop(&mut self) {
            MARK.set(std::ptr::null());
        }
    }
    MARK.set(mark);
    let _unmark = Unmark;
    work()
}

/// Installs the handler, for SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT and SIGTRAP. The process still dies of them.
pub fn install() -> Result<(), Errno> {
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGTRAP] {
        let handler: extern "C" fn(libc::c_int) = note;
        // SAFETY: all zeros is a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        // The default comes back before the handler runs, so that returning from it ends the process as it should; on the
        // alternate stack, since the fault may be an overflow of the other.
        action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: `action` is whole, and its handler only does what a signal handler may: see there.
        let done = unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
        crate::notify::check(done)?;
    }
    Ok(())
}

extern "C" fn note(signal: libc::c_int) {
    // A thread-local without a destructor and with a constant start value is a plain load here.
    let mark = MARK.get();
    if !mark.is_null() {
        // SAFETY: `marked` borrows the word for as long as MARK points to it.
        let mark = unsafe { &*mark };
        mark.fetch_add(1, Ordering::Release);
    }
    // SAFETY: raise(3) may be called in a handler; the default action is in force again. A fault would also come again by
    // itself; an abort or a signal from outside would not.
    unsafe { libc::raise(signal) };
}
