//! A caller's memory: read by its thread's id, written through a descriptor on its address space.
//!
//! A read by thread id is worth something only if the call was found to be still waiting *afterwards*: then the id
//! was the caller's all the time. A write cannot be taken back, so it goes through [`AddressSpace`], which was opened
//! before the call was last found waiting, and cannot reach another process, whatever becomes of the id.

use std::fs::File;
use std::io::{self, BufRead as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{Mode, OFlags};

use crate::Errno;

const PAGE: usize = 4096;

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

/// Reads a string that ends in NUL, of at most `limit` bytes with it, as the kernel reads a path.
///
/// EFAULT: not all of it is mapped. ENAMETOOLONG: no NUL within `limit`.
pub fn read_string(tid: u32, address: u64, limit: usize) -> Result<std::ffi::CString, Errno> {
    let mut text = Vec::new();
    while text.len() < limit {
        let at = address.wrapping_add(text.len() as u64);
        // Most paths are short: a first look of 64 bytes, then page by page.
        let ahead = if text.is_empty() { 64 } else { PAGE - usize::try_from(at).unwrap_or(0) % PAGE };
        let ahead = ahead.min(limit - text.len());
        let from = text.len();
        text.resize(from + ahead, 0);
        let got = read(tid, at, &mut text[from..])?;
        text.truncate(from + got);
        if let Some(end) = text[from..].iter().position(|byte| *byte == 0) {
            text.truncate(from + end);
            return std::ffi::CString::new(text).map_err(|_| Errno::INVAL);
        }
        if got < ahead {
            return Err(Errno::FAULT);
        }
    }
    Err(Errno::NAMETOOLONG)
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

    /// How many bytes from `address` on lie in one mapping that may be written; 0 if it may not.
    fn writable_from(&self, address: u64) -> Result<u64, Errno> {
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: VMA_WRITABLE,
            query_addr: address,
            ..ProcmapQuery::default()
        };
        // SAFETY: PROCMAP_QUERY reads and writes `size` bytes at this address, all within `query`, and writes to the two
        // buffers in it only if their sizes are not 0.
        let done = unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
        if done == 0 {
            return Ok(query.vma_end.saturating_sub(address));
        }
        match Errno::from_io_error(&io::Error::last_os_error()) {
            Some(Errno::NOENT) => Ok(0),
            Some(Errno::NOTTY) => self.writable_from_text(address),
            error => Err(error.unwrap_or(Errno::IO)),
        }
    }

    /// [`Self::writable_from`] for kernels without PROCMAP_QUERY (before 6.11).
    fn writable_from_text(&self, address: u64) -> Result<u64, Errno> {
        use std::io::Seek as _;
        let mut maps = &self.maps;
        let failed = |error: &io::Error| Errno::from_io_error(error).unwrap_or(Errno::IO);
        maps.rewind().map_err(|error| failed(&error))?;
        for line in io::BufReader::new(maps).split(b'\n') {
            let line = line.map_err(|error| failed(&error))?;
            let Some((start, end, writable)) = parse_mapping(&line) else { continue };
            if (start..end).contains(&address) {
                return Ok(if writable { end - address } else { 0 });
            }
        }
        Ok(0)
    }
}

/// Start, end and whether it may be written, of one line of /proc/PID/maps (proc_pid_maps(5)).
fn parse_mapping(line: &[u8]) -> Option<(u64, u64, bool)> {
    let mut words = line.split(|byte| *byte == b' ');
    let (range, access) = (std::str::from_utf8(words.next()?).ok()?, words.next()?);
    let (start, end) = range.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?, number(end)?, access.get(1) == Some(&b'w')))
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
/// `PROCMAP_QUERY`, `_IOWR('f', 0x11, struct procmap_query)`.
const PROCMAP_QUERY: u64 = 3 << 30 | (size_of::<ProcmapQuery>() as u64) << 16 | (b'f' as u64) << 8 | 0x11;

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> (u32, AddressSpace) {
        let proc = rustix::fs::open(c"/proc/self", OFlags::PATH, Mode::empty()).unwrap();
        (std::process::id(), AddressSpace::open(&proc).unwrap())
    }

    #[test]
    fn text_and_query_agree_on_every_mapping() {
        let (_, space) = own();
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let (start, end, _) = parse_mapping(line.as_bytes()).unwrap();
            if line.ends_with("[vsyscall]") {
                continue;
            }
            for at in [start, end - 1] {
                assert_eq!(space.writable_from(at), space.writable_from_text(at), "{line}");
            }
        }
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
        let read = |limit| read_string(tid, text.as_ptr() as u64, limit);
        assert_eq!(read(4096).unwrap().as_bytes().len(), 300);
        assert_eq!(read(301).unwrap().as_bytes().len(), 300);
        assert_eq!(read(300), Err(Errno::NAMETOOLONG));
        assert_eq!(read_string(tid, 0, 4096), Err(Errno::FAULT));
    }
}
