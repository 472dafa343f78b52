//! Files that are memory, and descriptors only.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;

use locum_kernel::Errno;
use rustix::fs::MemfdFlags;

/// An empty one, which can be sealed.
pub(crate) fn create() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(c"locum-keeper", flags | MemfdFlags::NOEXEC_SEAL) {
        // Before 6.3; later ones can be set to refuse what has no such flag.
        Err(Errno::INVAL) => rustix::fs::memfd_create(c"locum-keeper", flags),
        made => made,
    }
}

/// All of `memfd`, from its beginning.
pub(crate) fn read(memfd: &OwnedFd) -> io::Result<Vec<u8>> {
    let (mut file, mut bytes) = (File::from(memfd.try_clone()?), Vec::new());
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}
