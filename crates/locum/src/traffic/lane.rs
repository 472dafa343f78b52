//! One thread of the traffic.

use std::ffi::CString;
use std::os::fd::{AsFd as _, AsRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::atomic::Ordering;

use locum_kernel::Errno;
use locum_kernel::handle::{self, Handle, Named};
use rustix::fs::{AtFlags, CWD, OFlags};
use rustix::io::FdFlags;

use super::counters::Counters;
use super::files::{Files, Kind, Known};

pub(super) struct Lane<'a> {
    files: &'a Files,
    counters: &'a Counters,
    index: usize,
    random: u64,
    native: bool,
    truncates: bool,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        files: &'a Files,
        counters: &'a Counters,
        index: usize,
        seed: u64,
        args: &super::Args,
    ) -> Self {
        let (native, truncates) = (args.native, args.truncate);
        Self { files, counters, index, random: seed | 1, native, truncates }
    }

    pub(super) fn run(mut self) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        self.counters.lanes[self.index].tid.store(tid, Ordering::Relaxed);
        while self.counters.go_on() {
            let known = &self.files.all[self.below(self.files.all.len())];
            // Like virtiofsd: about two opens for each name.
            match (known.handle.get(), self.below(48)) {
                (None, _) | (_, 0..16) => self.name(known),
                (Some(named), 16) if !self.native => self.forge(known, &named.handle),
                (Some(named), _) => self.open(known, &named.handle),
            }
        }
        // From here on the id may become another thread's.
        self.counters.lanes[self.index].tid.store(0, Ordering::Relaxed);
    }

    /// Asks for the handle: by descriptor mostly, as virtiofsd does.
    fn name(&mut self, known: &Known) {
        let (dir, path, flags) = match self.below(8) {
            0 => (self.files.dir.as_fd(), &known.name, AtFlags::empty()),
            1 if known.kind != Kind::PathOnly => (CWD, &known.path, AtFlags::SYMLINK_FOLLOW),
            _ => (known.fd.as_fd(), &CString::default(), AtFlags::EMPTY_PATH),
        };
        let named = self.counters.timed(self.index, || handle::name_to_handle_at(dir, path, flags));
        match named {
            Ok(named) => {
                let first = known.handle.get_or_init(|| named.clone());
                if *first != named {
                    self.wrong(known, &format!("was named {}, now {}", show(first), show(&named)));
                }
            }
            Err(error) => self.failed(known, "name_to_handle_at", error),
        }
    }

    fn open(&mut self, known: &Known, handle: &Handle) {
        let access = match self.below(8) {
            _ if known.kind == Kind::PathOnly => OFlags::PATH,
            0..4 if self.truncates && known.is_empty() => OFlags::WRONLY | OFlags::TRUNC,
            0 => OFlags::WRONLY,
            1 => OFlags::RDWR,
            2 => OFlags::RDONLY | OFlags::DIRECTORY,
            3 | 4 => OFlags::RDONLY,
            _ => OFlags::PATH,
        };
        let close_on_exec = if self.below(4) == 0 { OFlags::empty() } else { OFlags::CLOEXEC };
        let flags = access | close_on_exec;
        let wanted = match (&known.kind, access) {
            (Kind::Folder, OFlags::WRONLY | OFlags::RDWR) => Some(Errno::ISDIR),
            (Kind::File(_), access) if access.contains(OFlags::DIRECTORY) => Some(Errno::NOTDIR),
            _ => None,
        };
        match (self.open_by_handle(handle, flags), wanted) {
            (Ok(fd), None) => self.checked(fd, known, |fd| Self::look_at(known, fd, flags)),
            (Ok(fd), Some(wanted)) => {
                self.checked(fd, known, |_| Err(format!("{flags:?}: wanted {wanted:?}, got a descriptor")));
            }
            (Err(error), Some(wanted)) if error == wanted => {}
            (Err(Errno::INTR), _) if access.contains(OFlags::TRUNC) => {
                self.counters.cut_off.fetch_add(1, Ordering::Relaxed);
            }
            (Err(error), _) => self.failed(known, &format!("open_by_handle_at with {flags:?}"), error),
        }
    }

    /// A handle with one bit flipped must open nothing.
    fn forge(&mut self, known: &Known, handle: &Handle) {
        let mut bytes = handle.bytes().to_vec();
        let bit = self.below(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        // As long as the true one, so there is room.
        let Some(forged) = Handle::new(handle.kind, &bytes) else { return };
        match self.open_by_handle(&forged, OFlags::RDONLY | OFlags::CLOEXEC) {
            Err(Errno::STALE) => {}
            Err(error) => self.counters.note_failed(&format!("a forged handle: {error:?}, not ESTALE")),
            Ok(fd) => self.checked(fd, known, |_| Err(format!("a handle with bit {bit} flipped was opened"))),
        }
    }

    fn open_by_handle(&self, handle: &Handle, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mount = self.files.dir.as_fd();
        let flags = flags.bits().cast_signed();
        self.counters.timed(self.index, || handle::open_by_handle_at(mount, handle, flags))
    }

    /// Has `look` judge a descriptor that a call returned, and closes it.
    fn checked(&self, fd: OwnedFd, known: &Known, look: impl FnOnce(&OwnedFd) -> Result<(), String>) {
        let number = fd.as_raw_fd();
        if !self.counters.opened(number) {
            self.wrong(known, &format!("descriptor {number} is not a new one"));
            // So it is somebody else's to close.
            let _ = fd.into_raw_fd();
            return;
        }
        if let Err(what) = look(&fd) {
            self.wrong(known, &format!("descriptor {number}: {what}"));
        }
        self.counters.closes(number);
    }

    /// Whether `fd` is what was asked for.
    fn look_at(known: &Known, fd: &OwnedFd, flags: OFlags) -> Result<(), String> {
        let told = |error: Errno| format!("{error:?}");
        let stat = rustix::fs::fstat(fd).map_err(told)?;
        if (stat.st_dev, stat.st_ino) != (known.device, known.inode) {
            return Err(format!("it is another file, inode {}", stat.st_ino));
        }
        let on_exec = rustix::io::fcntl_getfd(fd).map_err(told)?.contains(FdFlags::CLOEXEC);
        if on_exec != flags.contains(OFlags::CLOEXEC) {
            return Err(format!("close-on-exec is {on_exec}"));
        }
        let modes = OFlags::RDONLY | OFlags::WRONLY | OFlags::RDWR | OFlags::PATH;
        let has = rustix::fs::fcntl_getfl(fd).map_err(told)? & modes;
        if flags.contains(OFlags::PATH) && has == OFlags::RDONLY && known.kind != Kind::PathOnly {
            // A policy may let a read-only descriptor stand in.
            return Ok(());
        }
        if has != flags & modes {
            return Err(format!("its access mode is {has:?}"));
        }
        Self::use_content(known, fd, has)
    }

    /// Reads what must be there, writes what is there already.
    fn use_content(known: &Known, fd: &OwnedFd, access: OFlags) -> Result<(), String> {
        let Kind::File(content) = &known.kind else { return Ok(()) };
        if access == OFlags::PATH {
            return Ok(());
        }
        if access != OFlags::RDONLY {
            let written = rustix::io::pwrite(fd, content.as_bytes(), 0);
            if written != Ok(content.len()) {
                return Err(format!("writing gives {written:?}"));
            }
        }
        if access != OFlags::WRONLY {
            let mut into = [0; 128];
            let read = rustix::io::pread(fd, &mut into, 0);
            if read != Ok(content.len()) || !into.starts_with(content.as_bytes()) {
                return Err(format!("reading gives {read:?}: {:?}", String::from_utf8_lossy(&into)));
            }
        }
        Ok(())
    }

    fn wrong(&self, known: &Known, what: &str) {
        self.counters.note_wrong(&format!("{}: {what}", known.name.to_string_lossy()));
    }

    fn failed(&self, known: &Known, what: &str, error: Errno) {
        self.counters.note_failed(&format!("{}: {what}: {error:?}", known.name.to_string_lossy()));
    }

    /// A number below `end` (xorshift64*: only variety is wanted).
    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let random = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        usize::try_from(random).unwrap_or(0) % end
    }
}

fn show(named: &Named) -> String {
    format!("{:#x}:{:02x?} on mount {}", named.handle.kind, named.handle.bytes(), named.mount_id)
}
