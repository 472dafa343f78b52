//! The seccomp notifier: a listener, what it delivers and how it is answered. See `seccomp_unotify(2)`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::retry_on_intr;

use crate::Errno;

/// Words that [`Listener::receive`] needs. The kernel's structure has ten (6.18) and may grow; [`sizes_fit`]
/// tells whether this kernel's still fits.
pub const BUFFER_WORDS: usize = 32;

/// The memory that one notification is received into. It is shared with other processes (the journal), so it is read
/// word by word and never borrowed as a structure.
pub type Buffer = [AtomicU64; BUFFER_WORDS];

/// Names one waiting call of one listener. Given by the kernel, never used twice by a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(pub u64);

/// One call as the kernel reports it: a copy of `struct seccomp_notif`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notification {
    /// The call's name for ID_VALID, ADDFD and SEND.
    pub id: CallId,
    /// The caller's thread id in the receiver's pid namespace; 0 if it is not visible there.
    pub tid: u32,
    /// The system call's number.
    pub nr: i32,
    /// The `AUDIT_ARCH_*` value under which it was made.
    pub arch: u32,
    /// Where in the program it was made.
    pub instruction_pointer: u64,
    /// The arguments as they stood in the registers.
    pub args: [u64; 6],
}

impl Notification {
    /// What `buffer` holds; `None` if nothing was received into it since it was zeroed.
    pub fn load(buffer: &Buffer) -> Option<Self> {
        let word = |index: usize| buffer[index].load(Ordering::Acquire);
        if word(0) == 0 {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is what is meant")]
        let (tid, nr) = (word(1) as u32, (word(2) as u32).cast_signed());
        Some(Self {
            id: CallId(word(0)),
            tid,
            nr,
            arch: (word(2) >> 32) as u32,
            instruction_pointer: word(3),
            args: std::array::from_fn(|index| word(4 + index)),
        })
    }
}

/// Empties `buffer`, as the kernel wants it before RECV: the id last, so that a half-emptied one is never taken for
/// a call whose fields are all there.
pub fn clear(buffer: &Buffer) {
    buffer[0].store(0, Ordering::Release);
    for word in &buffer[1..] {
        word.store(0, Ordering::Release);
    }
}

/// How a call ends for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The call returns this value.
    Value(i64),
    /// The call fails with this error.
    Error(Errno),
    /// The caller makes the call itself, with whatever its arguments are by then. Never a decision about security.
    Continue,
}

/// Why a descriptor is no listener.
#[derive(Clone, Debug)]
pub struct NotAListener {
    /// What the descriptor is instead, as /proc/self/fd shows it.
    pub found: String,
}

impl std::fmt::Display for NotAListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "wanted a seccomp listener (anon_inode:seccomp notify), found {}", self.found)
    }
}

impl std::error::Error for NotAListener {}

/// The kernel's notify descriptor for one filter tree.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.0
    }
}

impl TryFrom<OwnedFd> for Listener {
    type Error = NotAListener;

    /// Takes a descriptor from outside, after a look at what it is.
    fn try_from(fd: OwnedFd) -> Result<Self, NotAListener> {
        Self::recognise(fd.as_fd()).map(|()| Self(fd))
    }
}

impl Listener {
    /// Tells whether `fd` is a listener, without touching it: closing a descriptor that is something else may block.
    pub fn recognise(fd: BorrowedFd<'_>) -> Result<(), NotAListener> {
        let found = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        match found {
            Ok(path) if path.as_os_str() == "anon_inode:seccomp notify" => Ok(()),
            Ok(path) => Err(NotAListener { found: path.display().to_string() }),
            Err(error) => Err(NotAListener { found: error.to_string() }),
        }
    }

    /// A second descriptor of the same listener.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Waits for a call and has the kernel write it into `buffer`, which must have been [`clear`]ed.
    ///
    /// ENOENT: the caller went away between the wake-up and the read, or (6.11) every user of the filter is gone.
    /// EINTR: a signal. Neither says that the listener has ended; only POLLHUP does.
    pub fn receive(&self, buffer: &Buffer) -> Result<(), Errno> {
        // SAFETY: RECV writes `struct seccomp_notif`, whose size `sizes_fit` compared with `Buffer`, at this address
        // and nowhere else; atomics may be changed behind a shared reference.
        let done = unsafe { libc::ioctl(self.raw(), ioctl::RECV, buffer.as_ptr()) };
        check(done).map(drop)
    }

    /// Whether the caller of `id` still waits for an answer. Says nothing about what happens next.
    pub fn still_waits(&self, id: CallId) -> bool {
        // A signal while the kernel waits for its lock says nothing about the call.
        let asked = retry_on_intr(|| {
            // SAFETY: ID_VALID reads one u64 at this address, which lives until the call returns.
            check(unsafe { libc::ioctl(self.raw(), ioctl::ID_VALID, &raw const id.0) })
        });
        asked.is_ok()
    }

    /// Ends the call `id`. ENOENT: nobody waits for it any more.
    pub fn send(&self, id: CallId, answer: Answer) -> Result<(), Errno> {
        let (val, error, flags) = match answer {
            Answer::Value(value) => (value, 0, 0),
            Answer::Error(errno) => (0, -errno.raw_os_error(), 0),
            Answer::Continue => (0, 0, CONTINUE),
        };
        self.respond(&libc::seccomp_notif_resp { id: id.0, val, error, flags })
    }

    /// Ends the call `id` so that the kernel makes it anew. Only for a caller that is interrupted: see [`crate::hand_over`].
    pub(crate) fn send_again(&self, id: CallId) -> Result<(), Errno> {
        self.respond(&libc::seccomp_notif_resp { id: id.0, val: 0, error: -ERESTARTNOINTR, flags: 0 })
    }

    fn respond(&self, response: &libc::seccomp_notif_resp) -> Result<(), Errno> {
        // The kernel answers EINTR only while it waits for its lock: nothing was sent.
        let sent = retry_on_intr(|| {
            // SAFETY: SEND reads one `struct seccomp_notif_resp` at this address, which lives until the call returns.
            check(unsafe { libc::ioctl(self.raw(), ioctl::SEND, std::ptr::from_ref(response)) })
        });
        sent.map(drop)
    }

    /// Puts a copy of `fd` into the table of the caller of `id` and returns its number there. The call goes on
    /// waiting: what the caller gets to know is what [`Self::send`] says.
    ///
    /// EMFILE: its table is full. ENOENT or ESRCH: nobody waits any more. EBADF: `fd` is an `O_PATH` descriptor.
    pub fn add_descriptor(
        &self,
        id: CallId,
        fd: BorrowedFd<'_>,
        close_on_exec: bool,
    ) -> Result<RawFd, Errno> {
        self.add(id, fd, None, close_on_exec)
    }

    /// The same under `number`, close-on-exec, in place of what may be there. EBADF: the number is beyond the caller's limit.
    pub fn add_descriptor_at(&self, id: CallId, fd: BorrowedFd<'_>, number: RawFd) -> Result<RawFd, Errno> {
        self.add(id, fd, Some(number), true)
    }

    fn add(
        &self,
        id: CallId,
        fd: BorrowedFd<'_>,
        number: Option<RawFd>,
        close_on_exec: bool,
    ) -> Result<RawFd, Errno> {
        let request = libc::seccomp_notif_addfd {
            id: id.0,
            flags: if number.is_some() { SETFD } else { 0 },
            srcfd: fd.as_raw_fd().cast_unsigned(),
            newfd: number.unwrap_or(0).cast_unsigned(),
            newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        // Interrupted, the kernel takes its request back, or says what became of it if the caller was faster.
        retry_on_intr(|| {
            // SAFETY: ADDFD reads one `struct seccomp_notif_addfd` at this address, which lives until the call returns.
            check(unsafe { libc::ioctl(self.raw(), ioctl::ADDFD, &raw const request) })
        })
    }

    /// Whether the last user of the filter is gone: POLLHUP, and nothing else, ends a listener.
    pub fn has_ended(&self) -> bool {
        self.is_told(PollFlags::empty(), PollFlags::HUP)
    }

    /// Whether a call waits to be received.
    pub fn is_queued(&self) -> bool {
        self.is_told(PollFlags::IN, PollFlags::IN)
    }

    fn is_told(&self, asked: PollFlags, wanted: PollFlags) -> bool {
        let mut polled = [PollFd::new(&self.0, asked)];
        let told = retry_on_intr(|| rustix::event::poll(&mut polled, Some(&Timespec::default())));
        told.is_ok() && polled[0].revents().contains(wanted)
    }

    /// Lets a caller's wake-up of the receiver, and the answer's of the caller, happen on the same processor (6.6).
    /// EINVAL on kernels that lack it.
    pub fn wake_synchronously(&self) -> Result<(), Errno> {
        // SAFETY: SET_FLAGS takes its flags by value and touches no memory of ours.
        let done = unsafe { libc::ioctl(self.raw(), ioctl::SET_FLAGS, SYNC_WAKE_UP) };
        check(done).map(drop)
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Whether this kernel's notification fits into a [`Buffer`]; the kernel's structures may grow.
pub fn sizes_fit() -> Result<bool, Errno> {
    static FITS: OnceLock<Result<bool, i32>> = OnceLock::new();
    let answer = FITS.get_or_init(|| {
        let mut sizes =
            libc::seccomp_notif_sizes { seccomp_notif: 0, seccomp_notif_resp: 0, seccomp_data: 0 };
        // SAFETY: GET_NOTIF_SIZES writes one `struct seccomp_notif_sizes` at this address, which is ours.
        let done =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, &raw mut sizes) };
        if done != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOSYS));
        }
        Ok(usize::from(sizes.seccomp_notif) <= size_of::<Buffer>()
            && usize::from(sizes.seccomp_notif_resp) <= size_of::<libc::seccomp_notif_resp>())
    });
    answer.map_err(Errno::from_raw_os_error)
}

/// `SECCOMP_ADDFD_FLAG_SETFD` (5.9).
const SETFD: u32 = 1;
/// `ERESTARTNOINTR` (`linux/errno.h`).
const ERESTARTNOINTR: i32 = 513;
/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE` (5.5).
const CONTINUE: u32 = 1;
/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP` (6.6).
const SYNC_WAKE_UP: libc::c_ulong = 1;

/// The notifier's requests (`linux/seccomp.h`), which libc does not name.
mod ioctl {
    const fn request(direction: u64, number: u64, size: usize) -> u64 {
        direction << 30 | (size as u64) << 16 | (b'!' as u64) << 8 | number
    }
    const WRITE: u64 = 1;
    const READ_WRITE: u64 = 3;
    pub(super) const RECV: u64 = request(READ_WRITE, 0, size_of::<libc::seccomp_notif>());
    pub(super) const SEND: u64 = request(READ_WRITE, 1, size_of::<libc::seccomp_notif_resp>());
    pub(super) const ID_VALID: u64 = request(WRITE, 2, size_of::<u64>());
    pub(super) const ADDFD: u64 = request(WRITE, 3, size_of::<libc::seccomp_notif_addfd>());
    pub(super) const SET_FLAGS: u64 = request(WRITE, 4, size_of::<u64>());
}

pub(crate) fn check(done: libc::c_int) -> Result<libc::c_int, Errno> {
    if done < 0 {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    } else {
        Ok(done)
    }
}
