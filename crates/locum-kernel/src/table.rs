//! The descriptor tables of other threads: what is in them, and what of it is ours.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};

use crate::Errno;
use crate::notify::Listener;
use crate::process::{KCMP_FILE, Thread, compare};

impl Thread {
    /// How many descriptors the thread may have: the soft RLIMIT_NOFILE.
    pub fn descriptor_limit(&self) -> Result<RawFd, Errno> {
        let limits = self.read(c"limits")?;
        let soft = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files")?.split_ascii_whitespace().next());
        // "unlimited" is more than a table can hold.
        Ok(soft.and_then(|soft| soft.parse().ok()).unwrap_or(RawFd::MAX))
    }

    /// Whether the thread has as many descriptors as it may have.
    pub fn table_is_full(&self) -> Result<bool, Errno> {
        let limit = self.descriptor_limit()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let table = rustix::fs::Dir::new(rustix::fs::openat(self.proc(), c"fd", flags, Mode::empty())?)?;
        let number = |entry: rustix::fs::DirEntry| entry.file_name().to_str().ok()?.parse::<RawFd>().ok();
        let below = table.filter_map(|entry| entry.ok().and_then(number)).filter(|fd| *fd < limit);
        Ok(below.count() >= usize::try_from(limit).unwrap_or(0))
    }

    /// Looks for the open file `ours` in the thread's table and returns its number there.
    pub fn find(&self, ours: BorrowedFd<'_>) -> Result<Option<RawFd>, Errno> {
        let path = c"fd";
        let table = rustix::fs::openat(
            self.proc(),
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        for entry in rustix::fs::Dir::new(table)? {
            let entry = entry?;
            let Some(fd) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if self.has(fd, ours)? {
                return Ok(Some(fd));
            }
        }
        Ok(None)
    }

    /// Looks in the thread's table for a file with this [`Mark`], the same one as `like` and opened in the same way. Returns its
    /// number there and a copy.
    pub fn find_marked(
        &self,
        mark: Mark,
        like: BorrowedFd<'_>,
        close_on_exec: bool,
    ) -> Result<Option<(RawFd, OwnedFd)>, Errno> {
        let wanted = identity(&rustix::fs::statx(like, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?);
        let is_same = |stat: &Statx| identity(stat) == wanted;
        self.search(mark, is_same, |fd, copy| self.is_opened_like(fd, copy, like, close_on_exec))
    }

    /// Whether `copy`, of which the thread has the original as `fd`, is the same file as `like` and opened in the same way.
    pub fn is_opened_like(
        &self,
        fd: RawFd,
        copy: &OwnedFd,
        like: BorrowedFd<'_>,
        close_on_exec: bool,
    ) -> bool {
        let file = |fd: BorrowedFd<'_>| {
            let stat = rustix::fs::fstat(fd)?;
            Ok::<_, Errno>((stat.st_dev, stat.st_ino, rustix::fs::fcntl_getfl(fd)?))
        };
        file(copy.as_fd()).is_ok_and(|copy| Ok(copy) == file(like))
            && self.closes_on_exec(fd) == Some(close_on_exec)
    }

    /// A copy of descriptor `fd` of this thread if it was opened on one of `mounts`.
    pub fn descriptor_on(&self, mounts: impl Fn(u64) -> bool, fd: RawFd) -> Option<OwnedFd> {
        let name = std::ffi::CString::new(format!("fd/{fd}")).ok()?;
        let stat = look_at(self.proc().as_fd(), &name).ok()?;
        is_file_on(mounts)(&stat).then(|| self.descriptor(fd).ok()).flatten()
    }

    /// All files in the thread's table that have a [`Mark`] and were opened on one of `mounts`, with their numbers there.
    pub fn marked_files(&self, mounts: impl Fn(u64) -> bool) -> Result<Vec<(RawFd, OwnedFd, Mark)>, Errno> {
        let mut marked = Vec::new();
        self.first_copy(is_file_on(mounts), |fd, copy| {
            marked.extend(Mark::of(copy.as_fd()).map(|mark| (fd, copy, mark)));
            None::<()>
        })?;
        Ok(marked)
    }

    /// Looks in the thread's table for whatever has this [`Mark`] and was opened on one of `mounts` with `flags`, as far as that
    /// can be seen. Returns its number there and a copy.
    pub fn find_marked_on(
        &self,
        mounts: impl Fn(u64) -> bool,
        mark: Mark,
        flags: OFlags,
    ) -> Result<Option<(RawFd, OwnedFd)>, Errno> {
        let seen = OFlags::RWMODE | OFlags::APPEND | OFlags::NONBLOCK;
        // What stands in for an O_PATH descriptor can be read.
        let wanted = if flags.contains(OFlags::PATH) { OFlags::RDONLY } else { flags & seen };
        self.search(mark, is_file_on(mounts), |fd, copy| {
            rustix::fs::fcntl_getfl(copy).is_ok_and(|flags| flags & seen == wanted)
                && self.closes_on_exec(fd) == Some(flags.contains(OFlags::CLOEXEC))
        })
    }

    /// Looks in the thread's table for a socket with this [`Mark`], or any if it is not known, that `is_it` recognises. Returns its
    /// number there and a copy.
    pub fn find_marked_socket(
        &self,
        mark: Option<Mark>,
        is_it: impl Fn(&OwnedFd) -> bool,
    ) -> Result<Option<(RawFd, OwnedFd)>, Errno> {
        self.first_copy(is_socket, |fd, copy| {
            let found = Mark::of(copy.as_fd());
            let is_marked = found.is_some() && mark.is_none_or(|mark| Some(mark) == found);
            (is_marked && is_it(&copy)).then_some((fd, copy))
        })
    }

    fn search(
        &self,
        mark: Mark,
        is_like: impl Fn(&Statx) -> bool,
        is_it: impl Fn(RawFd, &OwnedFd) -> bool,
    ) -> Result<Option<(RawFd, OwnedFd)>, Errno> {
        self.first_copy(is_like, |fd, copy| {
            (Mark::of(copy.as_fd()) == Some(mark) && is_it(fd, &copy)).then_some((fd, copy))
        })
    }

    /// Copies what is in the thread's table and `is_like` what is looked for, one after the other, until `pick` takes something.
    fn first_copy<T>(
        &self,
        is_like: impl Fn(&Statx) -> bool,
        mut pick: impl FnMut(RawFd, OwnedFd) -> Option<T>,
    ) -> Result<Option<T>, Errno> {
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let table = rustix::fs::openat(self.proc(), c"fd", directory, Mode::empty())?;
        for entry in rustix::fs::Dir::read_from(&table)? {
            let entry = entry?;
            let Some(fd) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if !look_at(table.as_fd(), entry.file_name()).is_ok_and(|stat| is_like(&stat)) {
                continue;
            }
            // Whatever the workload closes meanwhile was not what is looked for.
            let Ok(copy) = self.descriptor(fd) else { continue };
            let picked = pick(fd, copy);
            if picked.is_some() {
                return Ok(picked);
            }
        }
        Ok(None)
    }

    fn closes_on_exec(&self, fd: RawFd) -> Option<bool> {
        let text = self.read(&std::ffi::CString::new(format!("fdinfo/{fd}")).ok()?).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        Some(u32::from_str_radix(flags.trim(), 8).ok()? & OFlags::CLOEXEC.bits() != 0)
    }

    /// Whether the thread's descriptor `fd` is the open file `ours`.
    pub fn has(&self, fd: RawFd, ours: BorrowedFd<'_>) -> Result<bool, Errno> {
        let numbers = (u64::from(fd.cast_unsigned()), u64::from(ours.as_raw_fd().cast_unsigned()));
        match compare(KCMP_FILE, self.tid(), std::process::id(), numbers.0, numbers.1) {
            Ok(order) => Ok(order == std::cmp::Ordering::Equal),
            Err(Errno::BADF) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Copies of all listeners in the process's table.
    pub fn listeners(&self) -> Result<Vec<Listener>, Errno> {
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let table = rustix::fs::openat(self.proc(), c"fd", directory, Mode::empty())?;
        let mut listeners = Vec::new();
        for entry in rustix::fs::Dir::read_from(&table)? {
            let entry = entry?;
            let target = rustix::fs::readlinkat(&table, entry.file_name(), Vec::new());
            if target.is_ok_and(|target| target.as_bytes() == b"anon_inode:seccomp notify")
                && let Some(fd) = entry.file_name().to_str().ok().and_then(|name| name.parse().ok())
                // It may have closed it meanwhile.
                && let Ok(copy) = self.descriptor(fd)
                && let Ok(listener) = Listener::try_from(copy)
            {
                listeners.push(listener);
            }
        }
        Ok(listeners)
    }
}

/// What is known of a descriptor without asking the server of a FUSE file: it may be of the workload, and wait for whoever looks.
fn look_at(folder: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<Statx, Errno> {
    let what = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
    rustix::fs::statx(folder, name, AtFlags::STATX_DONT_SYNC, what)
}

/// Which file something is.
fn identity(stat: &Statx) -> (u32, u32, u64) {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
}

fn is_socket(stat: &Statx) -> bool {
    FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Socket
}

fn is_file_on(mounts: impl Fn(u64) -> bool) -> impl Fn(&Statx) -> bool {
    move |stat| !is_socket(stat) && mounts(stat.stx_mnt_id)
}

/// `F_SETSIG` and `F_GETSIG` (`linux/fcntl.h`).
const SET_SIGNAL: libc::c_int = 10;
const GET_SIGNAL: libc::c_int = 11;

/// What an open file is known by in whatever table it is: the signal that it would send if it were asked to send any (`F_SETSIG`),
/// which it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(libc::c_int);

impl Mark {
    /// How many there are: one for each signal.
    pub const COUNT: u32 = 64;

    /// The mark number `index`, counted from 0, modulo [`Self::COUNT`].
    pub fn new(index: u32) -> Self {
        Self((index % Self::COUNT).cast_signed() + 1)
    }

    /// Puts the mark on `file`. EBADF: an `O_PATH` descriptor.
    pub fn put(self, file: BorrowedFd<'_>) -> Result<(), Errno> {
        Self::set(file, self.0)
    }

    /// Takes whatever mark is on `file` from it.
    pub fn remove(file: BorrowedFd<'_>) -> Result<(), Errno> {
        Self::set(file, 0)
    }

    fn set(file: BorrowedFd<'_>, signal: libc::c_int) -> Result<(), Errno> {
        // SAFETY: F_SETSIG takes a number and touches no memory of ours.
        crate::notify::check(unsafe { libc::fcntl(file.as_raw_fd(), SET_SIGNAL, signal) }).map(drop)
    }

    /// The mark on `file`. One that a program has put there itself, to be sent signals, is none.
    pub fn of(file: BorrowedFd<'_>) -> Option<Self> {
        // SAFETY: F_GETSIG takes nothing and touches no memory of ours.
        let signal = unsafe { libc::fcntl(file.as_raw_fd(), GET_SIGNAL) };
        // Whoever has a file send signals has named who gets them, or the kernel has (F_SETLEASE).
        // SAFETY: as before.
        let is_ours = signal > 0 && unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETOWN) } == 0;
        is_ours.then_some(Self(signal))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_file_is_found_among_others_of_the_same_name() {
        let own = Thread::hold(std::process::id()).unwrap();
        let open = || std::fs::File::open("/proc/version").unwrap();
        let (others, marked) = ([open(), open()], open());
        let find = |mark| own.find_marked(mark, others[0].as_fd(), true).unwrap();
        assert!(find(Mark::new(3)).is_none());
        Mark::new(3).put(marked.as_fd()).unwrap();
        let (number, copy) = find(Mark::new(3)).unwrap();
        assert_eq!(number, marked.as_raw_fd());
        assert!(find(Mark::new(4)).is_none());
        assert!(own.find_marked(Mark::new(3), others[0].as_fd(), false).unwrap().is_none());
        let own_pid = rustix::process::getpid().as_raw_nonzero().get();
        let send_to = |owner: libc::pid_t| {
            // SAFETY: F_SETOWN takes a number and touches no memory of ours.
            crate::notify::check(unsafe { libc::fcntl(copy.as_raw_fd(), libc::F_SETOWN, owner) }).unwrap();
        };
        send_to(own_pid);
        assert!(find(Mark::new(3)).is_none(), "a program's own, which is to send it signals");
        send_to(0);
        assert!(find(Mark::new(3)).is_some());
        Mark::remove(copy.as_fd()).unwrap();
        assert!(find(Mark::new(3)).is_none());
    }

    #[test]
    fn a_fuse_server_that_does_not_answer_is_not_waited_for() {
        use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
        let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let system = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        let number = device.as_raw_fd().to_string();
        for (key, value) in [("fd", &*number), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
            rustix::mount::fsconfig_set_string(&system, key, value).unwrap();
        }
        rustix::mount::fsconfig_create(&system).unwrap();
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let root = rustix::mount::fsmount(&system, flags, MountAttrFlags::empty()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let looking = std::thread::spawn(move || {
            let own = Thread::hold(std::process::id()).unwrap();
            tell.send(own.find_marked_on(|_| true, Mark::new(9), OFlags::RDONLY).map(drop)).unwrap();
        });
        let looked = told.recv_timeout(std::time::Duration::from_secs(20));
        // Whoever still waits for it gets an error.
        drop((device, root));
        looking.join().unwrap();
        assert_eq!(looked, Ok(Ok(())));
    }
}
