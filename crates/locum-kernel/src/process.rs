//! Other processes and threads: finding them again, their ids. What is in their tables is for `table`.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::Errno;

/// One thread, held so that its id, used again, is never taken for it.
#[derive(Debug)]
pub struct Thread {
    tid: u32,
    proc: OwnedFd,
    /// A descriptor of the thread (6.9), or of its whole process.
    pidfd: Option<OwnedFd>,
    process: u32,
    whole_process: bool,
}

impl Thread {
    /// Takes hold of whoever has the id `tid` now. ENOENT or ESRCH: nobody.
    pub fn hold(tid: u32) -> Result<Self, Errno> {
        let path = format!("/proc/{tid}");
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open(path, directory, Mode::empty())?;
        let pid = Pid::from_raw(tid.cast_signed()).ok_or(Errno::SRCH)?;
        // `PIDFD_THREAD` (6.9) has the value of O_EXCL.
        let thread = PidfdFlags::from_bits_retain(OFlags::EXCL.bits());
        let mut held = Self { tid, proc, pidfd: None, process: tid, whole_process: false };
        match rustix::process::pidfd_open(pid, thread) {
            Ok(pidfd) => held.pidfd = Some(pidfd),
            Err(Errno::INVAL) => {
                held.process = held.status()?.process;
                let leader = Pid::from_raw(held.process.cast_signed()).ok_or(Errno::SRCH)?;
                held.whole_process = true;
                held.pidfd = Some(rustix::process::pidfd_open(leader, PidfdFlags::empty())?);
            }
            Err(error) => return Err(error),
        }
        // What was opened last may belong to a later owner of the id than what was opened first.
        if held.lives() { Ok(held) } else { Err(Errno::SRCH) }
    }

    /// Takes hold of a thread of process `pid` that lives: the leader, unless it has ended before others. ESRCH: there is none, or
    /// it is a thread of the kernel.
    pub fn hold_living(pid: u32) -> Result<Self, Errno> {
        let leader = Self::hold(pid)?;
        let threads = leader.threads()?;
        let mut living = threads.iter().filter_map(|tid| Self::hold(*tid).ok());
        living.find(|thread| thread.has_memory() == Ok(true)).ok_or(Errno::SRCH)
    }

    /// The thread's id in our pid namespace.
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// Its folder in /proc, an `O_PATH` descriptor. Once the thread is gone, look-ups there fail with ENOENT or ESRCH.
    pub fn proc(&self) -> &OwnedFd {
        &self.proc
    }

    /// Whether the thread is still there: if so, its id has been its own since [`Self::hold`].
    pub fn lives(&self) -> bool {
        let Some(pidfd) = &self.pidfd else { return false };
        if self.whole_process {
            return rustix::fs::accessat(
                &self.proc,
                c"stat",
                rustix::fs::Access::EXISTS,
                rustix::fs::AtFlags::empty(),
            )
            .is_ok();
        }
        let mut poll = [PollFd::new(pidfd, PollFlags::IN)];
        // A signal for this thread says nothing about the other.
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&Timespec::default()))) == Ok(0)
    }

    /// A copy of descriptor `fd` of this thread. EBADF: it has none such. ESRCH: the thread is gone.
    pub fn descriptor(&self, fd: RawFd) -> Result<OwnedFd, Errno> {
        let pidfd = self.pidfd.as_ref().ok_or(Errno::SRCH)?;
        if self.whole_process && self.process != self.tid {
            // Before 6.9 only a process can be asked, so its table must be the thread's too.
            if compare(KCMP_FILES, self.tid, self.process, 0, 0)? != std::cmp::Ordering::Equal {
                return Err(Errno::OPNOTSUPP);
            }
        }
        if fd < 0 {
            return Err(Errno::BADF);
        }
        rustix::process::pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty())
    }

    /// What /proc/TID/status says.
    pub fn status(&self) -> Result<Status, Errno> {
        Status::parse(&self.read(c"status")?).ok_or(Errno::SRCH)
    }

    /// When the thread started, in clock ticks since boot: with the id, its name for as long as the machine is up.
    pub fn start_time(&self) -> Result<u64, Errno> {
        let stat = self.read(c"stat")?;
        // The name, in parentheses, may hold anything; field 22 is the 20th behind it (proc_pid_stat(5)).
        let rest = stat.rsplit_once(')').ok_or(Errno::SRCH)?.1;
        rest.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok()).ok_or(Errno::SRCH)
    }

    /// The ids of all threads of its process, its own first.
    pub fn threads(&self) -> Result<Vec<u32>, Errno> {
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let tasks = rustix::fs::Dir::new(rustix::fs::openat(&self.proc, c"task", directory, Mode::empty())?)?;
        let number = |entry: rustix::fs::DirEntry| entry.file_name().to_str().ok()?.parse().ok();
        let mut threads: Vec<u32> = tasks.filter_map(|entry| entry.ok().and_then(number)).collect();
        threads.sort_by_key(|tid| *tid != self.tid);
        Ok(threads)
    }

    /// The process that traces the thread; 0 if none does.
    pub fn tracer(&self) -> Result<u32, Errno> {
        let status = self.read(c"status")?;
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        match tracer.and_then(|tid| tid.trim().parse().ok()).ok_or(Errno::SRCH)? {
            0 => Ok(0),
            // It is a thread's id.
            tid => Ok(Self::hold(tid)?.status()?.process),
        }
    }

    /// Whether its processor keeps a shadow stack for it (x86, 6.6).
    pub fn has_shadow_stack(&self) -> Result<bool, Errno> {
        Ok(says_shadow_stack(&self.read(c"status")?))
    }

    /// Where its code lies: start and end of each mapping that may be executed, the smallest first.
    pub fn code(&self) -> Result<Vec<(u64, u64)>, Errno> {
        let maps = self.read(c"maps")?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let mut code: Vec<_> = maps
            .lines()
            .filter_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (start, end) = range.split_once('-')?;
                // The page of old system calls cannot be read.
                let is_code = rest.as_bytes().get(2) == Some(&b'x') && !rest.ends_with("[vsyscall]");
                is_code.then_some((number(start)?, number(end)?))
            })
            .collect();
        code.sort_by_key(|(start, end)| end.saturating_sub(*start));
        Ok(code)
    }

    /// The user, as our user namespace numbers it, who made the user namespace that the thread is in.
    pub fn namespace_owner(&self) -> Result<u32, Errno> {
        let namespace =
            rustix::fs::openat(&self.proc, c"ns/user", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut owner: libc::uid_t = 0;
        // SAFETY: NS_GET_OWNER_UID writes one `uid_t` at this address, which is ours.
        let done = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_OWNER_UID, &raw mut owner) };
        crate::notify::check(done)?;
        Ok(owner)
    }

    /// Whether it has memory of its own: a thread of the kernel has none, nor has a process that has ended.
    pub fn has_memory(&self) -> Result<bool, Errno> {
        Ok(!self.read(c"maps")?.is_empty())
    }

    /// The name that it has given itself (proc_pid_comm(5)).
    pub fn name(&self) -> Result<String, Errno> {
        Ok(self.read(c"comm")?.trim_end().to_owned())
    }

    /// Whether the thread's address space is also that of process `other`.
    pub fn shares_memory_with(&self, other: u32) -> Result<bool, Errno> {
        Ok(compare(KCMP_VM, self.tid, other, 0, 0)? == std::cmp::Ordering::Equal)
    }

    pub(crate) fn read(&self, name: &std::ffi::CStr) -> Result<String, Errno> {
        let file = rustix::fs::openat(&self.proc, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut bytes = Vec::new();
        let read = File::from(file).read_to_end(&mut bytes);
        read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::SRCH))?;
        // A thread may name itself with any bytes.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// What a file is opened with: the ids that decide on permission, as our user namespace numbers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    /// The file system user id.
    pub user: u32,
    /// The file system group id.
    pub group: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

/// What locum reads of /proc/TID/status (proc_pid_status(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The thread group's id.
    pub process: u32,
    /// The parent's id; 0 if it is in no namespace that we see.
    pub parent: u32,
    /// The ids that decide on file access.
    pub ids: Ids,
    /// The effective user id.
    pub effective_user: u32,
    /// Whether it can gain no privileges by executing a program.
    pub no_new_privs: bool,
    /// How many seccomp filters it is under.
    pub filters: usize,
    /// Whether nothing the thread may do can change `ids`: no capability, no_new_privs, equal user and group ids.
    pub ids_fixed: bool,
    /// Whether its capability bounding set is empty. Who gives up capabilities keeps that set, unless CAP_SETPCAP was used to
    /// empty it: without, neither this thread nor what it started has had any since the program was executed.
    pub is_bounded: bool,
}

impl Status {
    /// `None` if a line is missing or has an unknown form.
    pub fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let numbers = |name| -> Option<Vec<u32>> {
            field(name)?.split_ascii_whitespace().map(|word| word.parse().ok()).collect()
        };
        let (users, owners) = (numbers("Uid")?, numbers("Gid")?);
        let ([.., effective_user, _, user], [.., group]) = (users.as_slice(), owners.as_slice()) else {
            return None;
        };
        let capabilities = ["CapInh", "CapPrm", "CapEff", "CapAmb"].map(|name| field(name).map(is_zero));
        let no_new_privs = field("NoNewPrivs") == Some("1");
        let ids_fixed = capabilities.iter().all(|zero| *zero == Some(true))
            && no_new_privs
            && users.iter().all(|id| id == user)
            && owners.iter().all(|id| id == group);
        Some(Self {
            process: field("Tgid")?.parse().ok()?,
            parent: field("PPid")?.parse().ok()?,
            ids: Ids { user: *user, group: *group, groups: numbers("Groups")? },
            effective_user: *effective_user,
            no_new_privs,
            filters: field("Seccomp_filters").and_then(|count| count.parse().ok()).unwrap_or(0),
            ids_fixed,
            is_bounded: field("CapBnd").is_some_and(is_zero),
        })
    }
}

/// Of what /proc/TID/status says.
fn says_shadow_stack(status: &str) -> bool {
    let features = status.lines().find_map(|line| line.strip_prefix("x86_Thread_features:"));
    features.is_some_and(|features| features.split_ascii_whitespace().any(|feature| feature == "shstk"))
}

fn is_zero(hexadecimal: &str) -> bool {
    hexadecimal.bytes().all(|byte| byte == b'0')
}

/// `_IO(0xb7, 4)` (`linux/nsfs.h`, 4.11).
const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;

/// `KCMP_FILE`: compare two descriptors of two processes.
pub(crate) const KCMP_FILE: i32 = 0;
/// `KCMP_VM`: compare two address spaces.
const KCMP_VM: i32 = 1;
/// `KCMP_FILES`: compare two descriptor tables.
const KCMP_FILES: i32 = 2;

/// kcmp(2). ENOSYS: a kernel without CONFIG_KCMP. ESRCH: one of them is gone. EBADF: no such descriptor.
pub(crate) fn compare(
    what: i32,
    one: u32,
    other: u32,
    index_one: u64,
    index_other: u64,
) -> Result<std::cmp::Ordering, Errno> {
    // SAFETY: of these kinds, kcmp reads its arguments by value and touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_kcmp, one, other, what, index_one, index_other) };
    match done {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        2.. => Ok(std::cmp::Ordering::Greater),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_thread_that_does_not_lead_its_group_is_held() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()).unwrap();
            let _ = ended.recv();
        });
        let held = Thread::hold(told.recv().unwrap()).unwrap();
        assert_ne!(held.tid(), std::process::id());
        assert!(held.lives());
        assert_eq!(held.status().unwrap().process, std::process::id());
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert_eq!(held.find(file.as_fd()).unwrap(), Some(file.as_raw_fd()));
        assert!(held.has(file.as_raw_fd(), file.as_fd()).unwrap());
        assert!(!held.has(-1, file.as_fd()).unwrap());
        assert_eq!(held.descriptor(i32::MAX).unwrap_err(), Errno::BADF);
        drop(end);
        thread.join().unwrap();
        // Joined means that its work is done; the kernel may take a moment more to release the id.
        while held.lives() {
            std::thread::yield_now();
        }
        assert_eq!(held.descriptor(0).unwrap_err(), Errno::SRCH);
    }

    #[test]
    fn a_shadow_stack_is_seen() {
        // As Documentation/arch/x86/shstk.rst has it.
        let status = |features: &str| {
            format!(
                "Name:\tshstk\nx86_Thread_features:\t{features}\nx86_Thread_features_locked:\tshstk wrss\n"
            )
        };
        assert!(says_shadow_stack(&status("shstk wrss ")) && says_shadow_stack(&status("wrss shstk")));
        assert!(!says_shadow_stack(&status("")) && !says_shadow_stack("Name:\tx\n"));
    }

    #[test]
    fn ids_are_fixed_only_without_any_way_to_change_them() {
        let text = |uid: &str, cap: &str, nnp: &str| {
            format!(
                "Name:\tx y\nTgid:\t7\nPPid:\t1\nUid:\t{uid}\nGid:\t5\t5\t5\t5\nGroups:\t5 6 \n\
                 CapInh:\t0000000000000000\nCapPrm:\t{cap}\nCapEff:\t0000000000000000\n\
                 CapAmb:\t0000000000000000\nNoNewPrivs:\t{nnp}\n"
            )
        };
        let fixed = |uid, cap, nnp| Status::parse(&text(uid, cap, nnp)).unwrap().ids_fixed;
        assert!(fixed("9\t9\t9\t9", "0000000000000000", "1"));
        assert!(!fixed("9\t9\t8\t9", "0000000000000000", "1"));
        assert!(!fixed("9\t9\t9\t9", "0000000000000004", "1"));
        assert!(!fixed("9\t9\t9\t9", "0000000000000000", "0"));
        let ids = Status::parse(&text("1\t2\t3\t4", "0", "1")).unwrap();
        assert_eq!((ids.effective_user, ids.ids), (2, Ids { user: 4, group: 5, groups: vec![5, 6] }));
        assert_eq!(Status::parse("Tgid:\t1\n"), None);
        let bounded = |set: &str| {
            let text = format!("{}CapBnd:\t{set}\n", text("9\t9\t9\t9", "0", "1"));
            Status::parse(&text).unwrap().is_bounded
        };
        assert!(bounded("0000000000000000") && !bounded("00000000000000c0"));
    }
}
