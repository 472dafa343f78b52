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
use rustix::fs::{CWD, Mode, OFlags};

/// Of 64 files, and half as many folders.
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
    /// `None`: it is a folder.
    pub(super) content: Option<String>,
    /// As it was first told. It must be the same for ever.
    pub(super) handle: OnceLock<Named>,
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
    fn prepare(dir: &Path, index: usize) -> io::Result<Self> {
        let is_folder = index % 3 == 2;
        let name = format!("{}-{index}", if is_folder { "folder" } else { "file" });
        let path = dir.join(&name);
        let content = (!is_folder).then(|| format!("{name}: this and nothing else\n"));
        match &content {
            None => match std::fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            },
            Some(content) => match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => file.write_all(content.as_bytes())?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            },
        }
        let path = CString::new(path.as_os_str().as_bytes())?;
        let fd =
            rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = rustix::fs::fstat(&fd)?;
        let name = CString::new(name)?;
        let (device, inode) = (stat.st_dev, stat.st_ino);
        Ok(Self { name, path, fd, device, inode, content, handle: OnceLock::new() })
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
