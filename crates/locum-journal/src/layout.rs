//! Where things lie in the file.
//!
//! All of it is 64-bit words in the machine's order: the file never leaves the machine, and no boot outlives it.
//!
//! | words | hold |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | [`VERSION`] |
//! | 2..8 | the counters, see [`crate::Counters`] |
//! | 8 | who joined last, see [`Journal::join`] |
//! | 512.. | [`SLOTS`] slots of [`SLOT_WORDS`] words, see [`crate::Slot`] |
//!
//! Who has what is said by locks on bytes of the file, which the kernel takes off when their owner dies: byte *n* is that of
//! slot *n*, byte [`SLOTS`] is shared by all that joined.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use locum_kernel::Errno;
use locum_kernel::lock::{self, Kind};
use locum_kernel::mapping::SharedWords;
use locum_kernel::notify::{BUFFER_WORDS, CallId};

/// The layout's version. A journal of another one is left untouched.
pub const VERSION: u64 = 1;
/// Slots in a journal: those of two monitors at their widest, and results that wait for their thread.
pub const SLOTS: usize = 256;
/// "LOCUMJNL".
const MAGIC: u64 = u64::from_be_bytes(*b"LOCUMJNL");
pub(crate) const SLOT_WORDS: usize = 64;
const FIRST_SLOT: usize = 512;
const WORDS: usize = FIRST_SLOT + SLOTS * SLOT_WORDS;
const LAST_JOINED: usize = 8;
/// The byte that everyone who joined has locked.
const JOINED: u64 = SLOTS as u64;

/// Why a journal could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file could not be made, sized or mapped.
    #[error("cannot open the journal {path}: {source}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{path} is not a journal: wanted {WORDS} words that begin with LOCUMJNL, found {found}")]
    NotAJournal {
        /// Which file.
        path: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// The file was written by another release.
    #[error("the journal {path} has version {found}, this locum knows {VERSION}; it was left untouched")]
    Version {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

/// The journal of one session, mapped.
#[derive(Debug)]
pub struct Journal {
    words: SharedWords,
    /// Opened for its locks alone, so that they end with the process, and not with its memory.
    locks: File,
    /// Which slots were given out here. Locks do not exclude what took them.
    taken: Box<[AtomicBool]>,
}

impl Journal {
    /// Opens the journal at `path`, or makes a new one there that root alone can read.
    pub fn open(path: &Path) -> Result<Arc<Self>, JournalError> {
        open_or_make(path, WORDS, [MAGIC, VERSION])
            .map_err(|source| JournalError::Open { path: path.to_owned(), source })
            .and_then(|file| Self::map(path, &file))
    }

    /// Opens the journal at `path`, which must be there.
    pub fn open_existing(path: &Path) -> Result<Arc<Self>, JournalError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| JournalError::Open { path: path.to_owned(), source })
            .and_then(|file| Self::map(path, &file))
    }

    fn map(path: &Path, file: &File) -> Result<Arc<Self>, JournalError> {
        let foreign = |found| JournalError::NotAJournal { path: path.to_owned(), found };
        let words = SharedWords::map(file, 2).map_err(|_| foreign("fewer than two words".to_owned()))?;
        let (magic, version) = (words[0].load(Ordering::Acquire), words[1].load(Ordering::Acquire));
        if magic != MAGIC {
            return Err(foreign(format!("a beginning of {magic:#x}")));
        }
        if version != VERSION {
            return Err(JournalError::Version { path: path.to_owned(), found: version });
        }
        let words = SharedWords::map(file, WORDS).map_err(|_| foreign("a file cut short".to_owned()))?;
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let locks = OpenOptions::new().read(true).write(true).open(again);
        let locks = locks.map_err(|source| JournalError::Open { path: path.to_owned(), source })?;
        Ok(Arc::new(Self { words, locks, taken: (0..SLOTS).map(|_| AtomicBool::new(false)).collect() }))
    }

    /// Says that a process, `own`, works with this journal until it ends. An id is never 0 and never used twice.
    pub fn join(&self, own: u64) -> Result<(), Errno> {
        // Nobody has it alone.
        lock::try_lock(&self.locks, JOINED, Kind::Shared)?;
        self.words[LAST_JOINED].store(own, Ordering::SeqCst);
        Ok(())
    }

    /// Whether `own` is the last that joined. If not, another may be at calls too; if so, only one that came before.
    pub fn is_last(&self, own: u64) -> bool {
        self.words[LAST_JOINED].load(Ordering::SeqCst) == own
    }

    /// Whether no other that joined is left. From then on `own` is the last one, unless another joins meanwhile.
    pub fn is_alone(&self, own: u64) -> Result<bool, Errno> {
        let last = self.words[LAST_JOINED].load(Ordering::SeqCst);
        if lock::is_locked_by_another(&self.locks, JOINED)? {
            return Ok(false);
        }
        let replaced =
            self.words[LAST_JOINED].compare_exchange(last, own, Ordering::SeqCst, Ordering::SeqCst);
        Ok(replaced.is_ok())
    }

    /// Whether some slot has the call `id` of `listener`, whoever holds it.
    pub fn knows(&self, listener: u64, id: CallId) -> bool {
        (0..SLOTS).any(|index| {
            let slot = self.slot_words(index);
            let word = |index: usize| slot[index].load(Ordering::Acquire);
            (word(0), word(BUFFER_WORDS)) == (id.0, listener)
        })
    }

    pub(crate) fn counter(&self, index: usize) -> &AtomicU64 {
        &self.words[2 + index]
    }

    pub(crate) fn slot_words(&self, index: usize) -> &[AtomicU64] {
        &self.words[FIRST_SLOT + index * SLOT_WORDS..][..SLOT_WORDS]
    }

    /// Takes a slot that nobody has, here or in another process.
    pub(crate) fn take(&self, index: usize) -> bool {
        if self.taken[index].swap(true, Ordering::AcqRel) {
            return false;
        }
        let is_ours = lock::try_lock(&self.locks, index as u64, Kind::Exclusive) == Ok(true);
        if !is_ours {
            self.taken[index].store(false, Ordering::Release);
        }
        is_ours
    }

    pub(crate) fn give_back(&self, index: usize) {
        // It is a lock that we have; the kernel may lack memory to split a range, and then it stays until we end.
        let _ = lock::unlock(&self.locks, index as u64);
        self.taken[index].store(false, Ordering::Release);
    }

    /// Whether the slot was given out here.
    pub fn is_ours(&self, index: u32) -> bool {
        self.taken.get(index as usize).is_some_and(|taken| taken.load(Ordering::Acquire))
    }
}

/// Opens the file at `path`, or makes one there of so many words that root alone can read, with `head` first.
pub(crate) fn open_or_make(path: &Path, words: usize, head: [u64; 2]) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return opened,
    }
    // Made whole under another name, so that a monitor killed here leaves no half of one.
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = options.create_new(true).open(&fresh)?;
    // Every page now: on a full tmpfs, a write into a hole of the mapping would be a SIGBUS.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, (words * 8) as u64)?;
    let mapped = SharedWords::map(&file, words)?;
    mapped[0].store(head[0], Ordering::Relaxed);
    mapped[1].store(head[1], Ordering::Release);
    std::fs::rename(&fresh, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_new_one_is_private_and_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let journal = Journal::open(&path).unwrap();
        journal.counter(0).store(7, Ordering::Relaxed);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Journal::open(&path).unwrap().counter(0).load(Ordering::Relaxed), 7);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn two_that_joined_know_of_each_other_until_one_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Journal::open(&folder.path().join("journal")).unwrap();
        let (old, new) = (open(), open());
        old.join(1).unwrap();
        assert_eq!((old.is_last(1), old.is_alone(1)), (true, Ok(true)));
        new.join(2).unwrap();
        assert_eq!((old.is_last(1), old.is_alone(1)), (false, Ok(false)));
        assert_eq!((new.is_last(2), new.is_alone(2)), (true, Ok(false)));
        drop(new);
        assert!(!old.is_last(1));
        assert_eq!((old.is_alone(1), old.is_last(1)), (Ok(true), true));
    }

    #[test]
    fn a_foreign_file_is_told_from_a_newer_one_and_neither_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut newer = vec![0_u8; WORDS * 8];
        newer[..8].copy_from_slice(&MAGIC.to_ne_bytes());
        newer[8..16].copy_from_slice(&(VERSION + 1).to_ne_bytes());
        let mut cut = newer[..4096].to_vec();
        cut[8..16].copy_from_slice(&VERSION.to_ne_bytes());
        for (bytes, wanted) in [
            (newer.as_slice(), "has version 2, this locum knows 1"),
            (&[b'x'; 5000], "a beginning of 0x7878787878787878"),
            (b"", "fewer than two words"),
            (&cut, "a file cut short"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = Journal::open(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }
}
