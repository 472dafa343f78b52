//! Seccomp filters that hand calls to a listener, as classic BPF. See seccomp(2).

use std::os::fd::{FromRawFd, OwnedFd};

use crate::Errno;
use crate::arch::AUDIT_ARCH;
use crate::notify::Listener;

/// Whether a signal can take a call back after a monitor received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Only a fatal signal (`SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, 5.19).
    Killable,
    /// Any signal; the kernel then issues the call anew or fails it with EINTR.
    Interruptible,
}

/// A program that hands the named calls to a listener and allows everything else.
#[derive(Clone, Debug)]
pub struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// Hands each of `calls` (numbers of 64-bit calls) to the listener. Calls of other
    /// architectures, and of x32 (whose numbers differ), are not touched: locum grants, it never relies on a
    /// notification to forbid.
    ///
    /// # Panics
    /// With more than 200 calls: a jump is one byte wide.
    pub fn notify(calls: &[i32]) -> Self {
        let count = u8::try_from(calls.len()).ok().filter(|count| *count <= 200).expect("at most 200 calls");
        let mut program =
            vec![statement(LOAD, 4), jump(JUMP_IF_EQUAL, AUDIT_ARCH, 0, count + 1), statement(LOAD, 0)];
        for (left, nr) in (0..count).rev().zip(calls) {
            program.push(jump(JUMP_IF_EQUAL, nr.cast_unsigned(), left + 1, 0));
        }
        program.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
        program.push(statement(RETURN, libc::SECCOMP_RET_USER_NOTIF));
        Self(program)
    }

    /// The instructions.
    pub(crate) fn program(&self) -> &[libc::sock_filter] {
        &self.0
    }

    /// The flags of seccomp(2) with which a process that has threads already gets a filter and a listener; with
    /// WAIT_KILLABLE_RECV where this kernel knows it.
    pub(crate) fn flags_for_all_threads() -> libc::c_ulong {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_TSYNC | TSYNC_ESRCH;
        let killable = flags | WAIT_KILLABLE_RECV;
        let none = std::ptr::null::<libc::sock_fprog>();
        // SAFETY: seccomp(2) looks at the flags first, and then fails with EFAULT, since there is no program.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, killable, none) };
        let told = std::io::Error::last_os_error().raw_os_error();
        if told == Some(libc::EFAULT) { killable } else { flags }
    }

    /// Installs the filter in the calling thread, for good, and returns its listener. Close it in the process that
    /// makes the calls, or nobody is there to answer them.
    ///
    /// EACCES: neither `no_new_privs` nor CAP_SYS_ADMIN. EBUSY: another listener of this filter tree is open. EINVAL:
    /// the kernel does not know the flag.
    pub fn install(&self, wait: Wait) -> Result<Listener, Errno> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len()).map_err(|_| Errno::INVAL)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        let mut flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        if wait == Wait::Killable {
            flags |= WAIT_KILLABLE_RECV;
        }
        // SAFETY: seccomp(2) reads `program` and the instructions it points to, which live until it returns, and
        // writes neither.
        let done = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
        };
        let fd = crate::notify::check(i32::try_from(done).map_err(|_| Errno::OVERFLOW)?)?;
        // SAFETY: with NEW_LISTENER a non-negative result is a descriptor that was made for us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Listener::try_from(fd).map_err(|_| Errno::INVAL)
    }
}

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` (5.19).
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// `SECCOMP_FILTER_FLAG_TSYNC_ESRCH` (5.7).
const TSYNC_ESRCH: libc::c_ulong = 1 << 4;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn statement(code: u32, value: u32) -> libc::sock_filter {
    jump(code, value, 0, 0)
}

fn jump(code: u32, value: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    // Every BPF opcode fits into 16 bits (linux/bpf_common.h).
    #[expect(clippy::cast_possible_truncation)]
    let code = code as u16;
    libc::sock_filter { code, jt: if_true, jf: if_false, k: value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_locum_serves_fits_into_24_instructions() {
        let numbers: Vec<i32> = crate::arch::CALLS.iter().map(|(_, nr)| *nr).collect();
        assert!(Filter::notify(&numbers).program().len() <= 24);
    }
}
