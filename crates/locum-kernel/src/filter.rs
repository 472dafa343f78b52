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

    /// The same with `origin` in it, where it never comes to.
    #[must_use]
    pub fn with_origin(mut self, origin: Origin) -> Self {
        self.0.extend(origin.words().map(|word| statement(LOAD_CONSTANT, word)));
        // The kernel wants a return at the end of every program.
        self.0.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
        self
    }

    /// The instructions as text, two equal filters' alike.
    pub fn to_text(&self) -> String {
        text(&self.0)
    }

    /// How many instructions it has.
    pub fn length(&self) -> usize {
        self.0.len()
    }

    /// The instructions.
    pub(crate) fn program(&self) -> &[libc::sock_filter] {
        &self.0
    }

    /// The flags of seccomp(2) with which a process that has threads already gets a filter and a listener; what `wait` asks for,
    /// where this kernel knows it.
    pub(crate) fn flags_for_all_threads(wait: Wait) -> libc::c_ulong {
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_TSYNC | TSYNC_ESRCH;
        let killable = flags | WAIT_KILLABLE_RECV;
        let none = std::ptr::null::<libc::sock_fprog>();
        // SAFETY: seccomp(2) looks at the flags first, and then fails with EFAULT, since there is no program.
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, killable, none) };
        let told = std::io::Error::last_os_error().raw_os_error();
        if wait == Wait::Killable && told == Some(libc::EFAULT) { killable } else { flags }
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

/// See [`Filter::to_text`].
pub(crate) fn text(program: &[libc::sock_filter]) -> String {
    let one =
        |step: &libc::sock_filter| format!("{:04x}{:02x}{:02x}{:08x}", step.code, step.jt, step.jf, step.k);
    program.iter().map(one).collect()
}

/// Which locum put a filter in, as the filter itself says: the device and the inode of its runtime directory, which no two
/// directories share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The device's number.
    pub device: u64,
    /// The inode's number.
    pub inode: u64,
}

impl Origin {
    /// What `program` says of itself; `None` if no locum put it in from outside.
    pub(crate) fn of(program: &[libc::sock_filter]) -> Option<Self> {
        let tail = program.get(program.len().checked_sub(WORDS + 1)?..program.len() - 1)?;
        let is_mark = tail.iter().all(|step| u32::from(step.code) == LOAD_CONSTANT) && tail[0].k == MAGIC;
        let word = |index: usize| u64::from(tail[index].k) << 32 | u64::from(tail[index + 1].k);
        is_mark.then(|| Self { device: word(1), inode: word(3) })
    }

    fn words(self) -> [u32; WORDS] {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is what is meant")]
        let halves = |word: u64| [(word >> 32) as u32, word as u32];
        let ([a, b], [c, d]) = (halves(self.device), halves(self.inode));
        [MAGIC, a, b, c, d]
    }
}

/// How many words tell an [`Origin`], and the first of them.
const WORDS: usize = 5;
const MAGIC: u32 = u32::from_be_bytes(*b"LOCM");

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` (5.19).
const WAIT_KILLABLE_RECV: libc::c_ulong = 1 << 5;

/// `SECCOMP_FILTER_FLAG_TSYNC_ESRCH` (5.7).
const TSYNC_ESRCH: libc::c_ulong = 1 << 4;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_CONSTANT: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_IMM;
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
        let origin = Origin { device: u64::MAX - 1, inode: 1 << 40 | 7 };
        let filter = Filter::notify(&numbers);
        assert_eq!(Origin::of(filter.program()), None);
        let filter = filter.with_origin(origin);
        assert_eq!(Origin::of(filter.program()), Some(origin));
        assert!(filter.program().len() <= 24, "{}", filter.program().len());
    }

    #[test]
    fn what_says_nothing_of_itself_has_no_origin() {
        for length in 0..10 {
            assert_eq!(Origin::of(&vec![statement(LOAD_CONSTANT, 0); length]), None);
        }
    }
}
