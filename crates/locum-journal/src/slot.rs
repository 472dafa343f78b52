//! The life of a slot.
//!
//! ```text
//! Idle ─► Receiving ─► Performing ─► Parked ─► Installed ─► Sending ─► Idle
//!                          │      (what cannot    ▲                      ▲
//!                          │      be repeated)    │                      │
//!                          ├──────────────────────┘ (calls that open)    │
//!                          └─────────────────────────────────────────────┘
//!               Performing, Parked, Installed ─► Undelivered ─► Idle
//! ```
//! Every step is one store, made before what it announces is done. `Parked` says that the open file waits in the slot's park;
//! `Sending`, that the caller may have its answer; `Undelivered`, that the call was withdrawn with the descriptor in the
//! caller's table already, and that the same call made anew is to get it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use locum_kernel::notify::{BUFFER_WORDS, Buffer, CallId, Notification, clear};

use crate::layout::{Journal, SLOTS};

/// How far the call in a slot has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Stage {
    /// No call.
    Idle = 0,
    /// Received or about to be; nothing was done for it.
    Receiving = 1,
    /// Something may have been done for it. A file that can be opened again may have been installed.
    Performing = 2,
    /// Its open file is parked; the caller may have it already, under a number not noted yet.
    Parked = 3,
    /// The caller has it, under the number in the slot.
    Installed = 4,
    /// As before, and the answer may have been sent.
    Sending = 5,
    /// The caller has the file under the number in the slot and does not know, since its call was withdrawn.
    Undelivered = 6,
}

impl Stage {
    fn from_word(word: u64) -> Option<Self> {
        [
            Self::Idle,
            Self::Receiving,
            Self::Performing,
            Self::Parked,
            Self::Installed,
            Self::Sending,
            Self::Undelivered,
        ]
        .into_iter()
        .find(|stage| *stage as u64 == word)
    }
}

const LISTENER: usize = BUFFER_WORDS;
const STAGE: usize = BUFFER_WORDS + 1;
const TRIES: usize = BUFFER_WORDS + 2;
const CRASHES: usize = BUFFER_WORDS + 3;
const DESCRIPTOR: usize = BUFFER_WORDS + 4;
const CALLER_STARTED: usize = BUFFER_WORDS + 5;
const SINCE: usize = BUFFER_WORDS + 6;
/// Not yet in 0.1.0, which left it 0.
const PROCESS: usize = BUFFER_WORDS + 7;

/// One slot, held by one worker of one process; given back when dropped, or when the process ends, as it then is.
#[derive(Debug)]
pub struct Slot {
    journal: Arc<Journal>,
    index: usize,
}

/// A call that was found in a slot of a dead monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The call.
    pub call: Notification,
    /// How far it had come.
    pub stage: Stage,
    /// How many monitors had begun to perform it.
    pub tries: u64,
    /// How many of them crashed in it.
    pub crashes: u64,
    /// The number under which the caller has its file; meaningful from [`Stage::Installed`] on.
    pub descriptor: RawFd,
    /// When the calling thread started; 0 if that was not noted yet.
    pub caller_started: u64,
    /// The process that the thread is of; 0 if that was not noted.
    pub process: u32,
    /// When the stage [`Stage::Undelivered`] was reached, in milliseconds since boot.
    pub since: u64,
}

impl Slot {
    /// Takes a slot that nobody holds and that has no call, or one for which `stale` says that the listener with that id has
    /// ended. `None`: there is none.
    pub fn take(journal: &Arc<Journal>, stale: impl Fn(u64) -> bool) -> Option<Self> {
        (0..SLOTS).find_map(|index| {
            let slot = Self::hold(journal, index)?;
            (slot.left().is_none() || stale(slot.listener())).then(|| {
                slot.settle();
                slot
            })
        })
    }

    /// Takes every slot with a call that came from `listener` and that nobody holds.
    pub fn take_left(journal: &Arc<Journal>, listener: u64) -> Vec<Self> {
        let is_left = |index: &usize| {
            let words = journal.slot_words(*index);
            words[0].load(Ordering::Acquire) != 0 && words[LISTENER].load(Ordering::Acquire) == listener
        };
        (0..SLOTS)
            .filter(is_left)
            .filter_map(|index| Self::hold(journal, index))
            // It may have been settled meanwhile.
            .filter(|slot| slot.listener() == listener && slot.left().is_some())
            .collect()
    }

    /// Takes the slot `index` if nobody holds it and it has no call.
    pub fn take_idle(journal: &Arc<Journal>, index: u32) -> Option<Self> {
        let index = usize::try_from(index).ok().filter(|index| *index < SLOTS)?;
        Self::hold(journal, index).filter(|slot| slot.left().is_none())
    }

    /// Whether a slot that is not this process's has a call of the thread `tid` from `listener`: a process that shares the
    /// journal is at it, or was when it died.
    pub fn others_have(journal: &Journal, listener: u64, tid: u32) -> bool {
        (0..SLOTS).any(|index| {
            let words = journal.slot_words(index);
            let call = words.first_chunk().and_then(Notification::load);
            call.is_some_and(|call| call.tid == tid)
                && words[LISTENER].load(Ordering::Acquire) == listener
                && !journal.is_ours(u32::try_from(index).unwrap_or(u32::MAX))
        })
    }

    /// Whether one of the slots that `which` picks by their index has a call.
    pub fn any_has_call(journal: &Journal, which: impl Fn(u32) -> bool) -> bool {
        (0..SLOTS).any(|index| {
            u32::try_from(index).is_ok_and(&which)
                && journal.slot_words(index)[0].load(Ordering::Acquire) != 0
        })
    }

    fn hold(journal: &Arc<Journal>, index: usize) -> Option<Self> {
        journal.take(index).then(|| Self { journal: Arc::clone(journal), index })
    }

    /// Which slot of the journal this is.
    pub fn index(&self) -> u32 {
        // There are only `SLOTS`.
        u32::try_from(self.index).unwrap_or(u32::MAX)
    }

    /// Readies the slot for a call of `listener` and returns where to receive it.
    pub fn begin(&self, listener: u64) -> &Buffer {
        self.settle();
        self.word(LISTENER).store(listener, Ordering::Relaxed);
        self.word(STAGE).store(Stage::Receiving as u64, Ordering::Release);
        self.buffer()
    }

    /// The call that was received, if one was.
    pub fn call(&self) -> Option<Notification> {
        Notification::load(self.buffer())
    }

    /// Notes that something is about to be done for the call, by a thread of `process` that started at `caller_started`.
    pub fn performing(&self, caller_started: u64, process: u32) {
        self.word(CALLER_STARTED).store(caller_started, Ordering::Relaxed);
        self.word(PROCESS).store(process.into(), Ordering::Relaxed);
        self.word(TRIES).fetch_add(1, Ordering::Relaxed);
        self.enter(Stage::Performing);
    }

    /// The word that a crash of the worker adds 1 to.
    pub fn crash_mark(&self) -> &AtomicU64 {
        self.word(CRASHES)
    }

    /// Notes that the open file is parked.
    pub fn parked(&self) {
        self.enter(Stage::Parked);
    }

    /// Notes that the caller has the file as `descriptor`.
    pub fn installed(&self, descriptor: RawFd) {
        self.word(DESCRIPTOR).store(u64::from(descriptor.cast_unsigned()), Ordering::Relaxed);
        self.enter(Stage::Installed);
    }

    /// Notes that the answer is about to be sent.
    pub fn sending(&self) {
        self.enter(Stage::Sending);
    }

    /// Notes that the call was withdrawn, at `now` (milliseconds since boot), with the file in the caller's table.
    pub fn undelivered(&self, now: u64) {
        self.word(SINCE).store(now, Ordering::Relaxed);
        self.enter(Stage::Undelivered);
    }

    /// Forgets the call.
    pub fn settle(&self) {
        // The id first: without one there is no call, whatever else is still there.
        clear(self.buffer());
        for index in [STAGE, LISTENER, TRIES, CRASHES, DESCRIPTOR, CALLER_STARTED, SINCE, PROCESS] {
            self.word(index).store(0, Ordering::Relaxed);
        }
    }

    /// Which listener the call came from.
    pub fn listener(&self) -> u64 {
        self.word(LISTENER).load(Ordering::Acquire)
    }

    /// The call in the slot with all that is known of it; `None` if there is none. A stage that no release wrote is read as
    /// [`Stage::Performing`], the one that says least.
    pub fn left(&self) -> Option<Left> {
        let word = |index| self.word(index).load(Ordering::Acquire);
        #[expect(clippy::cast_possible_truncation, reason = "stored from 32 bits")]
        let descriptor = (word(DESCRIPTOR) as u32).cast_signed();
        Some(Left {
            call: self.call()?,
            stage: Stage::from_word(word(STAGE)).unwrap_or(Stage::Performing),
            tries: word(TRIES),
            crashes: word(CRASHES),
            descriptor,
            caller_started: word(CALLER_STARTED),
            process: u32::try_from(word(PROCESS)).unwrap_or(0),
            since: word(SINCE),
        })
    }

    /// The id of the call in the slot.
    pub fn call_id(&self) -> Option<CallId> {
        self.call().map(|call| call.id)
    }

    fn enter(&self, stage: Stage) {
        self.word(STAGE).store(stage as u64, Ordering::Release);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.journal.slot_words(self.index)[index]
    }

    fn buffer(&self) -> &Buffer {
        self.journal.slot_words(self.index).first_chunk().expect("a slot has more words than a buffer")
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.journal.give_back(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_nobody_elses_until_its_owner_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        // Opened twice, it is locked as by two processes.
        let open = || Journal::open(&folder.path().join("journal")).unwrap();
        let (one, other) = (open(), open());
        let receive = |slot: &Slot, id, tid: u64| {
            let buffer = slot.begin(7);
            buffer[1].store(tid, Ordering::Relaxed);
            buffer[0].store(id, Ordering::Relaxed);
        };
        let slot = Slot::take(&one, |_| false).unwrap();
        receive(&slot, 1, 100);
        let theirs = Slot::take(&other, |_| true).unwrap();
        assert_eq!((slot.index(), theirs.index()), (0, 1));
        receive(&theirs, 2, 200);
        for journal in [&one, &other] {
            assert!(Slot::take_left(journal, 7).is_empty());
            assert!(Slot::take_idle(journal, 1).is_none());
        }
        let have = |journal: &Arc<Journal>, tid| Slot::others_have(journal, 7, tid);
        assert_eq!([have(&one, 100), have(&one, 200), have(&other, 100)], [false, true, true]);
        assert!(!Slot::others_have(&one, 8, 200));
        drop((slot, one));
        assert!(have(&other, 100), "left, and not taken over yet");
        let left = Slot::take_left(&other, 7);
        assert_eq!(left.iter().map(Slot::index).collect::<Vec<_>>(), [0]);
        assert!(!have(&other, 100));
        left[0].settle();
        drop(left);
        assert!(Slot::take_idle(&other, 0).is_some());
        assert!(Slot::take_idle(&other, 256).is_none());
    }
}
