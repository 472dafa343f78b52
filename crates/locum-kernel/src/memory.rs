//! A caller's memory: read by its thread's id, written through a descriptor on its address space.
//!
//! A read by thread id is worth something only if the call was found to be still waiting *afterwards*: then the id
//! was the caller's all the time. A write cannot be taken back, so it goes through [`AddressSpace`], which was opened
//! before the call was last found waiting, and cannot reach another process, whatever becomes of the id.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{Mode, OFlags};

use crate::Errno;

pub(crate) const PAGE: usize = 4096;

/// Reads as much of `into` as is mapped at `address` of thread `tid`, from its beginning; needs PTRACE_MODE_ATTACH.
///
/// Returns how many bytes were read, 0 if none is mapped. ESRCH: no such thread. EPERM: it may not be read.
pub fn read(tid: u32, address: u64, into: &mut [u8]) -> Result<usize, Errno> {
    let Ok(remote_address) = usize::try_from(address) else { return Ok(0) };
    if into.is_empty() {
        return Ok(0);
    }
    // The kernel stops a piece at the first page that is not there, but tells so only between pieces.
    let mut done = 0;
    while done < into.len() {
        let at = remote_address.wrapping_add(done);
        let in_page = (PAGE - at % PAGE).min(into.len() - done);
        let ahead = if done == 0 { into.len() } else { in_page };
        let local = libc::iovec { iov_base: into[done..].as_mut_ptr().cast(), iov_len: ahead };
        let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: ahead };
        // SAFETY: the kernel writes at most `ahead` bytes into `into[done..]`, which is that long; the other address is
        // one of another process and never followed here.
        let got = unsafe {
            libc::process_vm_readv(tid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0)
        };
        match usize::try_from(got) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                Some(Errno::FAULT) => break,
                error => return Err(error.unwrap_or(Errno::IO)),
            },
        }
    }
    Ok(done)
}

/// [`read`] from two places; one system call if all of both is mapped.
#[expect(clippy::needless_pass_by_value, reason = "the slices are written to")]
pub fn read_both(tid: u32, one: (u64, &mut [u8]), other: (u64, &mut [u8])) -> Result<(usize, usize), Errno> {
    let local = [&mut *one.1, &mut *other.1]
        .map(|into| libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
    let remote = [(one.0, one.1.len()), (other.0, other.1.len())].map(|(address, len)| libc::iovec {
        iov_base: usize::try_from(address).unwrap_or(0) as *mut libc::c_void,
        iov_len: len,
    });
    // SAFETY: the kernel writes at most `iov_len` bytes to each local address, which are slices that long and borrowed
    // mutably here; the remote addresses are another process's and never followed here.
    let got = unsafe { libc::process_vm_readv(tid.cast_signed(), local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
    if usize::try_from(got) == Ok(one.1.len() + other.1.len()) {
        return Ok((one.1.len(), other.1.len()));
    }
    Ok((read(tid, one.0, one.1)?, read(tid, other.0, other.1)?))
}

/// Bytes from `address` to the end of its page, `most` at most: what can be read at once if any of it can.
pub fn within_page(address: u64, most: usize) -> usize {
    (PAGE - usize::try_from(address).unwrap_or(0) % PAGE).min(most)
}

/// Reads on a string that ends in NUL and begins with `text`, of at most `limit` bytes in all, as the kernel reads a path.
///
/// EFAULT: not all of it is mapped. ENAMETOOLONG: no NUL within `limit`.
pub fn read_string(tid: u32, address: u64, mut text: Vec<u8>, limit: usize) -> Result<CString, Errno> {
    loop {
        if let Some(end) = text.iter().position(|byte| *byte == 0) {
            text.truncate(end);
            return CString::new(text).map_err(|_| Errno::INVAL);
        }
        let known = text.len();
        if known >= limit {
            return Err(Errno::NAMETOOLONG);
        }
        let at = address.wrapping_add(known as u64);
        let ahead = within_page(at, limit - known);
        text.resize(known + ahead, 0);
        if read(tid, at, &mut text[known..])? < ahead {
            return Err(Errno::FAULT);
        }
    }
}

/// One address space, for as long as this lives: /proc/TID/mem, and /proc/TID/maps to honour its page protection,
/// which a write through the first would override.
#[derive(Debug)]
pub struct AddressSpace {
    memory: File,
    maps: File,
}

impl AddressSpace {
    /// Opens the address space of the thread whose folder in /proc is `proc`. ENOENT or ESRCH: it is gone.
    pub fn open(proc: &OwnedFd) -> Result<Self, Errno> {
        let open = |name, access| rustix::fs::openat(proc, name, access | OFlags::CLOEXEC, Mode::empty());
        Ok(Self { memory: open(c"mem", OFlags::WRONLY)?.into(), maps: open(c"maps", OFlags::RDONLY)?.into() })
    }

    /// Whether all of both ranges may be written, if one mapping holds both: one look in place of two.
    fn hold(&self, one: (u64, usize), other: (u64, usize)) -> bool {
        let first = one.0.min(other.0);
        let end = |range: (u64, usize)| range.0.checked_add(range.1 as u64);
        let (Some(a), Some(b)) = (end(one), end(other)) else { return false };
        self.writable_from(first).is_ok_and(|length| a.max(b) - first <= length)
    }

    /// Writes `first`, then `second`: [`Self::put`], then [`Self::write`]. Errors as of those.
    pub fn put_and_write(&self, first: (u64, &[u8]), second: (u64, &[u8])) -> Result<(), Errno> {
        if self.hold((first.0, first.1.len()), (second.0, second.1.len())) {
            self.copy(first.0, first.1)?;
            return self.copy(second.0, second.1);
        }
        self.put(first.0, first.1)?;
        self.write(second.0, second.1)
    }

    fn copy(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        match self.memory.write_at(bytes, address) {
            Ok(0) => Err(Errno::SRCH),
            Ok(written) if written == bytes.len() => Ok(()),
            _ => Err(Errno::FAULT),
        }
    }

    /// Writes `bytes` at `address` as the kernel's copy_to_user does: up to the first byte that may not be written.
    ///
    /// EFAULT: not all of it could be written. ESRCH: nobody uses this address space any more.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.checked_add(done as u64).ok_or(Errno::FAULT)?;
            let writable = usize::try_from(self.writable_from(at)?).unwrap_or(usize::MAX);
            let piece = &bytes[done..bytes.len().min(done.saturating_add(writable))];
            match self.memory.write_at(piece, at) {
                _ if piece.is_empty() => return Err(Errno::FAULT),
                Ok(0) => return Err(Errno::SRCH),
                Ok(written) => done += written,
                Err(_) => return Err(Errno::FAULT),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes` or none of them, as the kernel's put_user does. Errors as of [`Self::write`].
    pub fn put(&self, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let mut checked = 0_u64;
        while checked < bytes.len() as u64 {
            match self.writable_from(address.checked_add(checked).ok_or(Errno::FAULT)?)? {
                0 => return Err(Errno::FAULT),
                writable => checked = checked.saturating_add(writable),
            }
        }
        self.write(address, bytes)
    }

    /// Whether the kernel has PROCMAP_QUERY (6.11); without it, a write reads all of /proc/TID/maps.
    pub fn knows_query(&self) -> bool {
        self.query(0) != Err(Errno::NOTTY)
    }

    /// How many bytes from `address` on lie in one mapping that may be written; 0 if it may not.
    fn writable_from(&self, address: u64) -> Result<u64, Errno> {
        match self.query(address) {
            Err(Errno::NOENT) => Ok(0),
            Err(Errno::NOTTY) => self.writable_from_text(address),
            answer => answer,
        }
    }

    fn query(&self, address: u64) -> Result<u64, Errno> {
        let found = self.ask(VMA_WRITABLE, address, &mut [])?;
        Ok(found.vma_end.saturating_sub(address))
    }

    fn ask(&self, flags: u64, address: u64, name: &mut [u8]) -> Result<ProcmapQuery, Errno> {
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: flags,
            query_addr: address,
            vma_name_size: u32::try_from(name.len()).unwrap_or(0),
            vma_name_addr: if name.is_empty() { 0 } else { name.as_mut_ptr() as u64 },
            ..ProcmapQuery::default()
        };
        // SAFETY: PROCMAP_QUERY reads and writes `size` bytes at this address, all within `query`; of the two buffers in it, it
        // writes to the first, `name`, at most its length, and not to the second, whose size is 0.
        let done = unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
        crate::notify::check(done)?;
        Ok(query)
    }

    /// The mapping in which `address` lies; a file's may be passed over.
    pub(crate) fn mapping(&self, address: u64) -> Result<Option<Mapping>, Errno> {
        let mut name = [0; 16];
        match self.ask(0, address, &mut name) {
            Ok(found) => {
                let length = usize::try_from(found.vma_name_size).unwrap_or(0).min(name.len());
                let name = &name[..length.saturating_sub(1)];
                Ok(Some(Mapping {
                    start: found.vma_start,
                    end: found.vma_end,
                    is_writable: found.vma_flags & VMA_WRITABLE != 0,
                    is_closed: found.vma_flags & VMA_ANY_ACCESS == 0,
                    kind: Kind::of(found.inode, name),
                }))
            }
            // A name that is too long is a file's.
            Err(Errno::NOENT | Errno::NAMETOOLONG) => Ok(None),
            Err(Errno::NOTTY) => {
                Ok(self.mappings()?.into_iter().find(|found| (found.start..found.end).contains(&address)))
            }
            Err(error) => Err(error),
        }
    }

    /// All mappings.
    pub(crate) fn mappings(&self) -> Result<Vec<Mapping>, Errno> {
        let lines: Result<Vec<_>, _> = self.lines()?.collect();
        let lines = lines.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(lines.iter().filter_map(|line| Mapping::parse(line)).collect())
    }

    fn lines(&self) -> Result<impl Iterator<Item = io::Result<Vec<u8>>>, Errno> {
        use std::io::Seek as _;
        let mut maps = &self.maps;
        maps.rewind().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(io::BufReader::new(maps).split(b'\n'))
    }

    /// [`Self::writable_from`] for kernels without PROCMAP_QUERY (before 6.11).
    fn writable_from_text(&self, address: u64) -> Result<u64, Errno> {
        for line in self.lines()? {
            let line = line.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            let Some(found) = Mapping::parse(&line) else { continue };
            if (found.start..found.end).contains(&address) {
                return Ok(if found.is_writable { found.end - address } else { 0 });
            }
        }
        Ok(0)
    }
}

/// One mapping, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) is_writable: bool,
    /// Whether it may not be touched at all.
    pub(crate) is_closed: bool,
    pub(crate) kind: Kind,
}

/// What a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The stack with which the program began.
    Stack,
    /// Memory that the program asked for by mmap(2).
    Anonymous,
    /// A file, the heap, or something of the kernel's.
    Other,
}

impl Kind {
    fn of(inode: u64, name: &[u8]) -> Self {
        match name {
            b"[stack]" => Self::Stack,
            [] if inode == 0 => Self::Anonymous,
            // As a program may name it (PR_SET_VMA_ANON_NAME).
            _ if inode == 0 && name.starts_with(b"[anon:") => Self::Anonymous,
            _ => Self::Other,
        }
    }
}

impl Mapping {
    /// Of one line of /proc/PID/maps (proc_pid_maps(5)).
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ').filter(|word| !word.is_empty());
        let (range, access) = (std::str::from_utf8(words.next()?).ok()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let inode = std::str::from_utf8(words.nth(2)?).ok()?.parse().ok()?;
        Some(Self {
            start: number(start)?,
            end: number(end)?,
            is_writable: access.get(1) == Some(&b'w'),
            is_closed: access.starts_with(b"---"),
            kind: Kind::of(inode, words.next().unwrap_or_default()),
        })
    }
}

/// `struct procmap_query` (`linux/fs.h`, 6.11).
#[derive(Default)]
#[repr(C)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `PROCMAP_QUERY_VMA_WRITABLE`: only a mapping that may be written counts.
const VMA_WRITABLE: u64 = 2;
/// `PROCMAP_QUERY_VMA_READABLE`, `_WRITABLE` and `_EXECUTABLE`.
const VMA_ANY_ACCESS: u64 = 1 | 2 | 4;
/// `PROCMAP_QUERY`, `_IOWR('f', 0x11, struct procmap_query)`.
const PROCMAP_QUERY: u64 = 3 << 30 | (size_of::<ProcmapQuery>() as u64) << 16 | (b'f' as u64) << 8 | 0x11;

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::process::{Command, Stdio};

    use super::*;

    fn own() -> (u32, AddressSpace) {
        (std::process::id(), of(std::process::id()))
    }

    fn of(pid: u32) -> AddressSpace {
        AddressSpace::open(&rustix::fs::open(format!("/proc/{pid}"), OFlags::PATH, Mode::empty()).unwrap())
            .unwrap()
    }

    /// Another process, since other tests' threads change the mappings of this one; it waits in a read, once it echoed.
    #[test]
    fn text_and_query_agree_on_every_mapping() {
        let mut quiet = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut input = quiet.stdin.take().unwrap();
        input.write_all(b"\n").unwrap();
        quiet.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();

        let space = of(quiet.id());
        for line in std::fs::read_to_string(format!("/proc/{}/maps", quiet.id())).unwrap().lines() {
            let parsed = Mapping::parse(line.as_bytes()).unwrap();
            if line.ends_with("[vsyscall]") {
                continue;
            }
            for at in [parsed.start, parsed.end - 1] {
                assert_eq!(space.writable_from(at), space.writable_from_text(at), "{line}");
                if let Some(asked) = space.mapping(at).unwrap() {
                    assert_eq!(asked, parsed, "{line}");
                } else {
                    assert_eq!(parsed.kind, Kind::Other, "{line}");
                }
            }
        }
        drop(input);
        assert!(quiet.wait().unwrap().success());
    }

    #[test]
    fn read_only_memory_is_not_written() {
        static FIXED: [u8; 4] = *b"keep";
        let (_, space) = own();
        assert_eq!(space.write(FIXED.as_ptr() as u64, b"lost"), Err(Errno::FAULT));
        assert_eq!(&FIXED, b"keep");
        assert_eq!(space.put(1, b"x"), Err(Errno::FAULT));
    }

    #[test]
    fn strings_end_at_nul_or_limit() {
        let (tid, _) = own();
        let text = format!("{}\0", "p".repeat(300));
        let read = |limit| read_string(tid, text.as_ptr() as u64, Vec::new(), limit);
        assert_eq!(read(4096).unwrap().as_bytes().len(), 300);
        assert_eq!(read(301).unwrap().as_bytes().len(), 300);
        assert_eq!(read(300), Err(Errno::NAMETOOLONG));
        assert_eq!(read_string(tid, 0, Vec::new(), 4096), Err(Errno::FAULT));
    }
}
