//! Executing a program by its descriptor, so that no path decides which one it is, and taking over what the program before
//! left open.

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;

use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags};

use crate::Errno;

/// What a program is executed with. Made beforehand, so that a child of a process with threads allocates nothing.
#[derive(Debug)]
pub struct Command {
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Command {
    /// `arguments` begin with the program's name. What has a zero byte in it is left out: the kernel could not pass it on.
    pub fn new(
        arguments: impl IntoIterator<Item = String>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Self {
        let line = |(mut name, value): (OsString, OsString)| {
            name.push("=");
            name.push(value);
            CString::new(name.into_vec()).ok()
        };
        Self {
            arguments: arguments.into_iter().filter_map(|text| CString::new(text).ok()).collect(),
            environment: environment.into_iter().filter_map(line).collect(),
        }
    }
}

/// The zero-terminated array that execve(2) wants.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Executes `program` in the place of this one, which goes on in it with the descriptors `keep` and the standard ones: those
/// that this program opened are closed on the way, as it opened them. Returns only if that fails, with all as it was.
///
/// EACCES: not executable for this user. ENOEXEC: no program. ENOENT: a script, or a program whose interpreter is missing.
pub fn replace(program: impl AsFd, command: &Command, keep: &[BorrowedFd<'_>]) -> Errno {
    let (arguments, environment) = (pointers(&command.arguments), pointers(&command.environment));
    let flag_all = |flags| {
        for fd in keep {
            // It cannot fail for an open descriptor.
            let _ = rustix::io::fcntl_setfd(fd, flags);
        }
    };
    flag_all(FdFlags::empty());
    let failed = execute(program.as_fd(), &arguments, &environment);
    flag_all(FdFlags::CLOEXEC);
    failed
}

/// Executes `program` in a child that dies with this thread, and gives it the descriptors `keep`, `report` among them, and the
/// standard ones. If it cannot be executed, the child writes the errno to `report`, as a little-endian `i32`, and ends.
pub fn spawn(
    program: BorrowedFd<'_>,
    command: &Command,
    keep: &[BorrowedFd<'_>],
    report: BorrowedFd<'_>,
) -> Result<OwnedFd, Errno> {
    let (arguments, environment) = (pointers(&command.arguments), pointers(&command.environment));
    let parent = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the child of a process with threads may only make system calls until it executes another program, and
    // `become_program` does nothing else.
    match unsafe { libc::fork() } {
        -1 => Err(last()),
        0 => become_program(program, &arguments, &environment, keep, report, parent),
        // Nobody else waits for it, so the id is its own.
        child => rustix::process::pidfd_open(Pid::from_raw(child).ok_or(Errno::SRCH)?, PidfdFlags::empty()),
    }
}

/// The child's part.
fn become_program(
    program: BorrowedFd<'_>,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    keep: &[BorrowedFd<'_>],
    report: BorrowedFd<'_>,
    parent: libc::pid_t,
) -> ! {
    // SAFETY: takes numbers alone.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: takes nothing.
    if unsafe { libc::getppid() } == parent {
        for fd in keep {
            // SAFETY: takes numbers alone; the table is the child's own, and it executes or ends.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
        }
        let failed = execute(program, arguments, environment).raw_os_error().to_le_bytes();
        // SAFETY: reads four bytes, which are ours.
        unsafe { libc::write(report.as_raw_fd(), failed.as_ptr().cast(), failed.len()) };
    }
    // SAFETY: ends this process, without a look at what belongs to the parent.
    unsafe { libc::_exit(127) }
}

/// `arguments` and `environment` end with a null pointer.
fn execute(
    program: BorrowedFd<'_>,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
) -> Errno {
    let fd = program.as_raw_fd();
    // SAFETY: both arrays are zero-terminated and hold pointers to strings that outlive the call; if it succeeds, nothing of
    // this program is left that could look at them.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    last()
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Takes the descriptor `fd`, which was left open for this program by the one before, or by whoever started it.
///
/// EBADF: it is not open, is a standard one, was opened by this program itself, or has been taken.
pub fn inherited(fd: RawFd) -> Result<OwnedFd, Errno> {
    static TAKING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    // There is nothing behind the lock that a panic could have broken.
    let _one_at_a_time = TAKING.lock();
    if fd <= libc::STDERR_FILENO {
        return Err(Errno::BADF);
    }
    // SAFETY: the number is only asked about here, and not kept.
    let number = unsafe { BorrowedFd::borrow_raw(fd) };
    if rustix::io::fcntl_getfd(number)?.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF);
    }
    rustix::io::fcntl_setfd(number, FdFlags::CLOEXEC)?;
    // SAFETY: everything that this program opens has the flag from its first moment, as the standard library and all of our
    // own code ask for it. One without it is inherited, and has no owner; from here on it has the flag, and so is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_inherited_is_taken_once() {
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        let fd = file.as_raw_fd();
        assert_eq!(inherited(fd).unwrap_err(), Errno::BADF, "it is ours");
        rustix::io::fcntl_setfd(&file, FdFlags::empty()).unwrap();
        // As execve(2) leaves it: a number without an owner.
        std::mem::forget(file);
        let taken = inherited(fd).unwrap();
        assert_eq!(inherited(fd).unwrap_err(), Errno::BADF, "it is taken");
        drop(taken);
        for never in [-1, 0, 1, 2, i32::MAX] {
            assert_eq!(inherited(never).unwrap_err(), Errno::BADF);
        }
    }

    #[test]
    fn what_cannot_be_executed_leaves_all_as_it_was() {
        let (kept, program) = (File::open("/dev/null").unwrap(), File::open("/etc/passwd").unwrap());
        let command = Command::new(["no program".to_owned()], []);
        assert_eq!(replace(&program, &command, &[kept.as_fd()]), Errno::ACCESS);
        assert!(rustix::io::fcntl_getfd(&kept).unwrap().contains(FdFlags::CLOEXEC));
        let (said, report) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let child = spawn(program.as_fd(), &command, &[], report.as_fd()).unwrap();
        let mut errno = [0; 4];
        assert_eq!(rustix::io::read(&said, &mut errno), Ok(4));
        assert_eq!(i32::from_le_bytes(errno), Errno::ACCESS.raw_os_error());
        let ended = rustix::process::waitid(
            rustix::process::WaitId::PidFd(child.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        );
        assert_eq!(ended.unwrap().unwrap().exit_status(), Some(127));
    }
}
