//! A file mapped as words that several processes share.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use crate::Errno;

/// The words of a file, mapped for reading and writing and shared with whoever maps it too.
///
/// Whoever can cut the file short makes the next access fail with SIGBUS: only for files that root alone can write.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only ever reached as atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above; atomics may be used from several threads at once.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of `file`, which must be at least that long.
    pub fn map(file: &File, words: usize) -> Result<Self, Errno> {
        let length = words.checked_mul(size_of::<AtomicU64>()).ok_or(Errno::OVERFLOW)?;
        let size = rustix::fs::fstat(file)?.st_size;
        if words == 0 || usize::try_from(size).is_ok_and(|size| size < length) {
            return Err(Errno::INVAL);
        }
        // SAFETY: no address is asked for, so no mapping of ours is replaced.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, words })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` words long, lives until drop, and any bits are a valid `AtomicU64`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`; every borrow of it has ended with `self`. An error would mean a wrong
        // address and leaves it mapped.
        let _ =
            unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}
