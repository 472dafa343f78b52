//! Which calls of a listener have been received: what is left to go by if its session's journal is lost.
//!
//! The kernel numbers a filter's calls one after the other, from a random number on. Whoever knows a recent one can try those about
//! it. The file is apart from the journal, since it is of use only when that is gone:
//!
//! | words | hold |
//! |---|---|
//! | 0 | [`MAGIC`] |
//! | 1 | [`VERSION`] |
//! | 2 | the latest call that was received, 0 if none was |
//! | 3 | the first call that may wait without the journal knowing of it, 0 if there is none |

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use locum_kernel::mapping::SharedWords;
use locum_kernel::notify::CallId;

use crate::layout::open_or_make;

/// "LOCUMSEE".
const MAGIC: u64 = u64::from_be_bytes(*b"LOCUMSEE");
/// The layout's version. A file of another one is left untouched.
const VERSION: u64 = 1;
const LAST: usize = 2;
const DOUBTED: usize = 3;
const WORDS: usize = 4;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum SeenError {
    /// The kernel's word.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is something else, or another release's.
    #[error("{path} does not begin with LOCUMSEE and version {VERSION}; it was left untouched")]
    Foreign {
        /// Which file.
        path: PathBuf,
    },
}

/// The file of one listener, mapped.
#[derive(Debug)]
pub struct Seen(SharedWords);

impl Seen {
    /// Opens the file at `path`, or makes a new one there that root alone can read.
    pub fn open(path: &Path) -> Result<Self, SeenError> {
        let file = open_or_make(path, WORDS, [MAGIC, VERSION])
            .map_err(|source| SeenError::Open { path: path.to_owned(), source })?;
        let words = SharedWords::map(&file, WORDS).ok();
        let is_ours = |words: &SharedWords| {
            (words[0].load(Ordering::Acquire), words[1].load(Ordering::Acquire)) == (MAGIC, VERSION)
        };
        words.filter(is_ours).map(Self).ok_or_else(|| SeenError::Foreign { path: path.to_owned() })
    }

    /// The latest call that was received.
    pub fn last(&self) -> Option<CallId> {
        call(&self.0[LAST])
    }

    /// Notes that `call` was received; false if it is the first.
    pub fn note(&self, call: CallId) -> bool {
        // Workers come here in any order; and the kernel counts on from 0 after the highest number.
        let is_later = |last: u64| last == 0 || call.0.wrapping_sub(last) <= u64::MAX / 2;
        let noted = self.0[LAST]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| is_later(last).then_some(call.0));
        noted != Ok(0)
    }

    /// From which call on the journal may lack some that wait.
    pub fn doubted(&self) -> Option<CallId> {
        call(&self.0[DOUBTED])
    }

    /// Notes that the journal may lack calls from `first` on, or none any more.
    pub fn doubt(&self, first: Option<CallId>) {
        self.0[DOUBTED].store(first.map_or(0, |call| call.0), Ordering::Release);
    }
}

fn call(word: &AtomicU64) -> Option<CallId> {
    Some(word.load(Ordering::Acquire)).filter(|id| *id != 0).map(CallId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_found_again_and_another_releases_file_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1122334455667788.seen");
        let seen = Seen::open(&path).unwrap();
        assert_eq!((seen.last(), seen.doubted()), (None, None));
        assert!(!seen.note(CallId(7)));
        assert!(seen.note(CallId(8)) && seen.note(CallId(6)));
        seen.doubt(Some(CallId(3)));
        let again = Seen::open(&path).unwrap();
        assert_eq!((again.last(), again.doubted()), (Some(CallId(8)), Some(CallId(3))));
        again.doubt(None);
        assert_eq!(seen.doubted(), None);
        let mut later = std::fs::read(&path).unwrap();
        seen.note(CallId(u64::MAX));
        assert_eq!(seen.last(), Some(CallId(8)), "an earlier one, by the way that the kernel counts");
        later[8] += 1;
        for bytes in [&later[..], &later[..16], b"garbage", b""] {
            std::fs::write(&path, bytes).unwrap();
            assert!(matches!(Seen::open(&path), Err(SeenError::Foreign { .. })));
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }

    #[test]
    fn one_of_0_1_0_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("1122334455667788.seen");
        let words = [u64::from_be_bytes(*b"LOCUMSEE"), 1, 0x105, 0x101];
        std::fs::write(&path, words.map(u64::to_ne_bytes).concat()).unwrap();
        let seen = Seen::open(&path).unwrap();
        assert_eq!((seen.last(), seen.doubted()), (Some(CallId(0x105)), Some(CallId(0x101))));
    }
}
