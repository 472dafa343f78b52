//! The files that the traffic is about, and what is known of them.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::OnceLock;

use locum_kernel::handle::Named;
use rustix::fs::{CWD, FileType, Mode, OFlags};

/// Of 56 files, some of them empty, 28 folders, and 12 of what can be opened with `O_PATH` alone.
const COUNT: usize = 96;

pub(super) struct Files {
    /// Their folder, open for reading: the mount, for open_by_handle_at.
    pub(super) dir: OwnedFd,
    pub(super) all: Vec<Known>,
}

pub(super) struct Known {
    /// Below the folder.
    pub(super) name: CString,
    pub(super) path: CString,
    /// `O_PATH`.
    pub(super) fd: OwnedFd,
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) kind: Kind,
    /// As it was first told. It must be the same for ever.
    pub(super) handle: OnceLock<Named>,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    /// With this content.
    File(String),
    /// A symbolic link, a FIFO, a socket, or a file that its owner may not read: only `O_PATH` opens all of them.
    PathOnly,
}

impl Files {
    /// Makes what is not there yet below `dir`, and takes a descriptor of each.
    pub(super) fn prepare(dir: &Path) -> io::Result<Self> {
        let dir = dir.canonicalize()?;
        let all = (0..COUNT).map(|index| Known::prepare(&dir, index)).collect::<io::Result<_>>()?;
        let dir =
            rustix::fs::open(&dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { dir, all })
    }
}

impl Known {
    /// Whether it is a file without content, which is not harmed by being cut to nothing.
    pub(super) fn is_empty(&self) -> bool {
        matches!(&self.kind, Kind::File(content) if content.is_empty())
    }

    fn prepare(dir: &Path, index: usize) -> io::Result<Self> {
        let (what, node) = match index % 24 {
            0 => ("link", None),
            6 => ("fifo", Some((FileType::Fifo, Mode::RUSR | Mode::WUSR))),
            12 => ("socket", Some((FileType::Socket, Mode::RUSR | Mode::WUSR))),
            // A regular file without a single right.
            18 => ("closed", Some((FileType::RegularFile, Mode::empty()))),
            9 => ("empty", None),
            other if other % 3 == 2 => ("folder", None),
            _ => ("file", None),
        };
        let name = format!("{what}-{index}");
        let path = dir.join(&name);
        let kind = match what {
            "folder" => Kind::Folder,
            "file" => Kind::File(format!("{name}: this and nothing else\n")),
            "empty" => Kind::File(String::new()),
            _ => Kind::PathOnly,
        };
        let made = match (&kind, node) {
            (Kind::Folder, _) => std::fs::create_dir(&path),
            (Kind::File(content), _) => {
                let file = OpenOptions::new().write(true).create_new(true).open(&path);
                file.and_then(|mut file| file.write_all(content.as_bytes()))
            }
            (Kind::PathOnly, None) => std::os::unix::fs::symlink("nowhere", &path),
            (Kind::PathOnly, Some((kind, mode))) => {
                rustix::fs::mknodat(CWD, &path, kind, mode, 0).map_err(io::Error::from)
            }
        };
        match made {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let path = CString::new(path.as_os_str().as_bytes())?;
        let fd =
            rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        let name = CString::new(name)?;
        let (device, inode) = (stat.st_dev, stat.st_ino);
        Ok(Self { name, path, fd, device, inode, kind, handle: OnceLock::new() })
    }
}

/// The numbers of this process's descriptors.
pub(super) fn own_descriptors() -> io::Result<BTreeSet<usize>> {
    let listed = std::fs::read_dir("/proc/self/fd")?;
    let numbers: BTreeSet<usize> =
        listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    // The one that the list was read through is closed by now, and not among those that are; a lifeline is locum's.
    let is_own = |fd: &usize| {
        std::fs::read_link(format!("/proc/self/fd/{fd}"))
            .is_ok_and(|target| target.as_os_str() != "anon_inode:seccomp notify")
    };
    Ok(numbers.into_iter().filter(is_own).collect())
}
