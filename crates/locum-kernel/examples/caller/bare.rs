//! System calls with bare numbers, memory that is not a Rust object, and how a result is told.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

const PAGE: u64 = 4096;
/// What of a mapping can be touched.
const ROOM: u64 = 4 * PAGE;
pub(crate) const AT_FDCWD: u64 = (-100_i64).cast_unsigned();
pub(crate) const EMPTY_PATH: u64 = 0x1000;
pub(crate) const FOLLOW: u64 = 0x400;
/// No address of this program.
pub(crate) const UNMAPPED: u64 = 0x1000;

/// An int as an argument.
pub(crate) fn number(int: i32) -> u64 {
    i64::from(int).cast_unsigned()
}

/// One system call: what the kernel returns, errors as negative numbers.
pub(crate) fn call(nr: i64, args: [u64; 6]) -> i64 {
    // SAFETY: whatever the kernel is told to write to is a mapping that was made for it below, or an array of the caller
    // that outlives the call; no call that is made here changes what Rust believes about other memory.
    let done = unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3], args[4], args[5]) };
    if done == -1 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()) } else { done }
}

/// One system call by the 32-bit way in.
pub(crate) fn int80(nr: u64, args: [u64; 3]) -> i64 {
    let result: u64;
    // SAFETY: only open_by_handle_at(2) is called so, which writes to no memory; rbx, which belongs to the compiler, is
    // put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {first}", "int 0x80", "xchg rbx, {first}",
            first = inout(reg) args[0] => _, inlateout("rax") nr => result, in("rcx") args[1], in("rdx") args[2],
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    // The upper half is nothing that the kernel says.
    i64::from(u32::try_from(result & 0xffff_ffff).unwrap().cast_signed())
}

pub(crate) fn name(dir: u64, path: u64, handle: u64, mount: u64, flags: u64) -> i64 {
    call(libc::SYS_name_to_handle_at, [dir, path, handle, mount, flags, 0])
}

pub(crate) fn open(mount: u64, handle: u64, flags: u64) -> i64 {
    call(libc::SYS_open_by_handle_at, [mount, handle, flags, 0, 0, 0])
}

pub(crate) fn close(fd: i64) {
    call(libc::SYS_close, [fd.cast_unsigned(), 0, 0, 0, 0, 0]);
}

/// "ok" or the number of the error.
pub(crate) fn told(result: i64) -> String {
    match result {
        0.. => "ok".into(),
        _ => format!("errno {}", -result),
    }
}

/// Some pages, of which the last cannot be touched.
pub(crate) struct Pages(pub(crate) u64);

impl Pages {
    pub(crate) fn new() -> Self {
        Self::of_kind(0)
    }

    /// Where 32 bits reach.
    pub(crate) fn low() -> Self {
        Self::of_kind(libc::MAP_32BIT)
    }

    fn of_kind(more: i32) -> Self {
        let kind = number(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | more);
        let rw = number(libc::PROT_READ | libc::PROT_WRITE);
        let at = call(libc::SYS_mmap, [0, ROOM + PAGE, rw, kind, u64::MAX, 0]);
        assert!(at > 0);
        let pages = Self(at.cast_unsigned());
        call(libc::SYS_mprotect, [pages.0 + ROOM, PAGE, 0, 0, 0, 0]);
        pages
    }

    /// The address of the last `count` bytes that can be touched.
    pub(crate) fn end(&self, count: usize) -> u64 {
        self.0 + ROOM - count as u64
    }

    pub(crate) fn read_only(&self) {
        call(libc::SYS_mprotect, [self.0, ROOM, number(libc::PROT_READ), 0, 0, 0]);
    }

    /// `bytes` as the last that can be touched.
    pub(crate) fn put(&self, ground: &Ground, bytes: &[u8]) -> u64 {
        ground.write(self.end(bytes.len()), bytes);
        self.end(bytes.len())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        call(libc::SYS_munmap, [self.0, ROOM + PAGE, 0, 0, 0, 0]);
    }
}

/// Where the calls are made.
pub(crate) struct Ground {
    pub(crate) dir: PathBuf,
    /// Whether what is a matter of permission is done by the user's own open(2).
    pub(crate) own: bool,
    memory: File,
    mount: u64,
    unique: u64,
}

impl Ground {
    pub(crate) fn new(dir: &str, own: bool) -> Self {
        let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
        std::env::set_current_dir(dir).unwrap();
        let id = |which| rustix::fs::statx(CWD, dir, AtFlags::empty(), which).unwrap().stx_mnt_id;
        let (mount, unique) = (id(StatxFlags::MNT_ID), id(StatxFlags::from_bits_retain(0x4000)));
        Self { dir: dir.into(), own, memory, mount, unique }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn read(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Page protection does not hold here.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    /// What a mount id that was filled with `fill` holds now.
    pub(crate) fn mount_told(&self, bytes: &[u8], fill: u8) -> &'static str {
        let whole = u64::from_ne_bytes(bytes.try_into().unwrap());
        let low = (self.mount & 0xffff_ffff) | u64::from_ne_bytes([fill; 8]) << 32;
        match whole {
            whole if whole == u64::from_ne_bytes([fill; 8]) => "untouched",
            whole if whole == self.unique => "unique",
            whole if whole == low => "own",
            _ => "another",
        }
    }

    /// The handle of `path` here, as the kernel or locum gives it: head and bytes.
    pub(crate) fn handle(&self, path: &Path) -> Vec<u8> {
        self.handle_with(path, 0).unwrap_or_else(|error| panic!("{}: {}", path.display(), told(error)))
    }

    pub(crate) fn handle_with(&self, path: &Path, flags: u64) -> Result<Vec<u8>, i64> {
        let (pages, text) = (Pages::new(), Pages::new());
        let mut path = path.as_os_str().as_encoded_bytes().to_vec();
        path.push(0);
        let path = text.put(self, &path);
        let handle = pages.end(8 + 128);
        self.write(handle, &128_u32.to_ne_bytes());
        match name(AT_FDCWD, path, handle, pages.0, flags) {
            0 => {
                let len = u32::from_ne_bytes(self.read(handle, 4).try_into().unwrap());
                Ok(self.read(handle, 8 + len as usize))
            }
            error => Err(error),
        }
    }
}

pub(crate) fn fd(file: &impl std::os::fd::AsFd) -> u64 {
    number(file.as_fd().as_raw_fd())
}

/// Whether `fd` is the file at `path`, its flags, and whether it is closed on exec.
pub(crate) fn descriptor(fd: i64, path: &Path) -> String {
    let Ok(named) = std::fs::metadata(format!("/proc/self/fd/{fd}")) else { return "\"unreadable\"".into() };
    let wanted = std::fs::symlink_metadata(path);
    let same = wanted.is_ok_and(|wanted| (wanted.dev(), wanted.ino()) == (named.dev(), named.ino()));
    let ask = |what: i32| call(libc::SYS_fcntl, [fd.cast_unsigned(), number(what), 0, 0, 0, 0]);
    let (flags, cloexec) = (ask(libc::F_GETFL), ask(libc::F_GETFD));
    format!(
        "{{\"same\": {same}, \"size\": {}, \"flags\": \"{flags:#o}\", \"cloexec\": {cloexec}}}",
        named.len()
    )
}

/// One line of the report.
pub(crate) fn tell(class: &str, case: &str, result: i64, effect: &str) {
    println!(
        "{{\"case\": {case:?}, \"class\": {class:?}, \"result\": {:?}, \"effect\": {effect}}}",
        told(result)
    );
}

/// Becomes the user of workloads, for good; with `decode`, it keeps CAP_DAC_READ_SEARCH.
pub(crate) fn become_user(decode: bool) {
    const NOBODY: u64 = 65534;
    const DAC_READ_SEARCH: u32 = 1 << 2;
    let prctl = |what: i32, value: u64| call(libc::SYS_prctl, [number(what), value, 0, 0, 0, 0]);
    let all = [NOBODY, NOBODY, NOBODY, 0, 0, 0];
    assert_eq!(prctl(libc::PR_SET_KEEPCAPS, u64::from(decode)), 0);
    assert_eq!(call(libc::SYS_setgroups, [0; 6]), 0);
    assert_eq!(call(libc::SYS_setresgid, all), 0);
    assert_eq!(call(libc::SYS_setresuid, all), 0);
    let kept = if decode { DAC_READ_SEARCH } else { 0 };
    let (head, sets) = ([0x2008_0522_u32, 0], [kept, kept, 0, 0, 0, 0]);
    let args = [head.as_ptr() as u64, sets.as_ptr() as u64, 0, 0, 0, 0];
    assert_eq!(call(libc::SYS_capset, args), 0);
    assert_eq!(prctl(libc::PR_SET_DUMPABLE, 1), 0);
    assert_eq!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1), 0);
}
