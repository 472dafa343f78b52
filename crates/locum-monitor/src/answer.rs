//! The one place that answers callers, by the id of their call.

use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use locum_journal::{Left, Slot, Stage};
use locum_kernel::Errno;
use locum_kernel::fault::die_at;
use locum_kernel::notify::{Answer, CallId, Notification};
use locum_kernel::table::Mark;
use rustix::fs::OFlags;

use crate::caller::{Caller, Turn};
use crate::calls::{CutOff, Outcome, Written, int};
use crate::park::Park;
use crate::session::{Served, Session, Undelivered, now_ms};

/// Delivers to the callers of one listener.
pub(crate) struct Post<'a> {
    pub(crate) session: &'a Session,
    pub(crate) served: &'a Served,
}

impl Post<'_> {
    /// Has `outcome` happen to the caller. `kept` is the earlier result that it stands for. `None`: the slot stays behind
    /// with a result that could not be delivered. `was_begun`: a monitor that died, and its park with the keeper, may have
    /// installed the file already.
    pub(crate) fn deliver(
        &self,
        slot: Slot,
        call: &Notification,
        (caller, turn): (&Arc<Caller>, Turn<'_>),
        outcome: Outcome,
        kept: Option<Undelivered>,
        was_begun: bool,
    ) -> Option<Slot> {
        let answer = match outcome {
            Outcome::Give { file, close_on_exec } => {
                let found = if was_begun {
                    find_lost(&slot, caller, &file, close_on_exec)
                } else {
                    self.session.orphan(caller, &file, close_on_exec)
                };
                let (there, file) = found.map_or((None, file), |(number, file)| (Some(number), file));
                return self.give(slot, call, (caller, turn), (file, close_on_exec, there), kept);
            }
            Outcome::GivePath { file, close_on_exec } => {
                return self.give_path(slot, call, (caller, turn), (&file, close_on_exec));
            }
            Outcome::Decline => Answer::Continue,
            Outcome::Fail(error) => Answer::Error(error),
            Outcome::Refuse(error, why) => {
                self.session.counters.refused().fetch_add(1, Ordering::Relaxed);
                self.session.audit.tell(&self.session.id, || {
                    tracing::warn!(session = self.session.id, tid = call.tid, nr = call.nr, "refused: {why}");
                });
                Answer::Error(error)
            }
            Outcome::Write(written, result) => match self.write(call.id, caller, &written).and(result) {
                Ok(()) => Answer::Value(0),
                Err(error) => Answer::Error(error),
            },
        };
        turn.answered();
        self.send(call.id, answer);
        self.let_go(slot, caller)
    }

    /// Answers the call `id`. That nobody waits for it any more is no error.
    pub(crate) fn send(&self, id: CallId, answer: Answer) -> bool {
        match self.served.listener.send(id, answer) {
            Ok(()) => {
                self.session.counters.calls().fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::debug!(session = self.session.id, "an answer was not taken: {error}");
                false
            }
        }
    }

    /// The file that waits in the park of `slot` for the call `id`.
    pub(crate) fn parked(&self, slot: &Slot, id: CallId) -> Option<OwnedFd> {
        self.served.known_park(slot.index())?.look(id)
    }

    fn write(&self, id: CallId, caller: &Arc<Caller>, written: &Written) -> Result<(), Errno> {
        // The caller's memory was opened before this; from here on nothing else is written to.
        if !self.served.listener.still_waits(id) {
            return Err(Errno::INTR);
        }
        let put = |caller: &Caller| {
            let (first, then) = (&written.put, &written.written);
            caller.memory.put_and_write((first.0, &first.1), (then.0, &then.1))
        };
        match put(caller) {
            Err(Errno::SRCH) => {
                // The thread has executed another program since it was remembered.
                self.session.callers.forget(caller.thread.tid());
                let caller = self.session.callers.meet(caller.thread.tid())?;
                if !self.served.listener.still_waits(id) {
                    return Err(Errno::INTR);
                }
                put(&caller)
            }
            done => done,
        }
    }

    /// Hands `file` over: mark, ADDFD, journal, SEND. What cannot be opened again if this monitor dies is parked before.
    fn give(
        &self,
        slot: Slot,
        call: &Notification,
        (caller, turn): (&Caller, Turn<'_>),
        (file, close_on_exec, there): (OwnedFd, bool, Option<RawFd>),
        kept: Option<Undelivered>,
    ) -> Option<Slot> {
        let park = match CutOff::of(call) {
            CutOff::Repeat => Ok(None),
            CutOff::Neither => self.put_in_park(&slot, call.id, &file).map(Some),
        };
        let park = match park {
            Ok(park) => park,
            Err(error) => {
                if let Some(kept) = kept {
                    self.session.keep(kept);
                }
                return self.give_up(slot, call, caller, error);
            }
        };
        let there = there.or_else(|| kept.as_ref().and_then(|kept| kept.descriptor));
        let there = there.filter(|fd| caller.thread.has(*fd, file.as_fd()) == Ok(true));
        if let Some(kept) = kept {
            // Noted in this slot first: no moment at which the caller's number is nowhere.
            if let Some(descriptor) = there {
                slot.installed(descriptor);
            }
            kept.settle();
        }
        let number = there.map_or_else(|| self.install(&slot, call.id, &file, close_on_exec), Ok);
        self.finish(slot, call, (caller, turn), (file, number), park)
    }

    /// Parks `file`, and notes that it is.
    fn put_in_park(&self, slot: &Slot, id: CallId, file: &OwnedFd) -> Result<Arc<Park>, Errno> {
        let park = self.served.park(slot.index(), &self.session.shared)?;
        park.put(id, file.as_fd())?;
        die_at(21);
        slot.parked();
        die_at(22);
        Ok(park)
    }

    /// Goes on with a hand-over that a dead monitor began.
    pub(crate) fn hand_over_again(
        &self,
        slot: Slot,
        left: &Left,
        (caller, turn): (&Caller, Turn<'_>),
        file: OwnedFd,
    ) -> Option<Slot> {
        let call = &left.call;
        let park = self.served.known_park(slot.index());
        let number = match find(left, caller, &file) {
            Ok(Some(number)) => Ok(number),
            Ok(None) => {
                let flags = OFlags::from_bits_retain(int(call.args[2]).cast_unsigned());
                self.install(&slot, call.id, &file, flags.contains(OFlags::CLOEXEC))
            }
            Err(error) => Err(error),
        };
        self.finish(slot, call, (caller, turn), (file, number), park)
    }

    /// Puts `file` into the caller's table. Marked, it is found there if this monitor dies before its number is noted.
    fn install(&self, slot: &Slot, id: CallId, file: &OwnedFd, close_on_exec: bool) -> Result<RawFd, Errno> {
        Mark::new(slot.index()).put(file.as_fd())?;
        die_at(23);
        let number = self.served.listener.add_descriptor(id, file.as_fd(), close_on_exec);
        die_at(24);
        number
    }

    fn finish(
        &self,
        slot: Slot,
        call: &Notification,
        (caller, turn): (&Caller, Turn<'_>),
        (file, number): (OwnedFd, Result<RawFd, Errno>),
        park: Option<Arc<Park>>,
    ) -> Option<Slot> {
        let undelivered = match number {
            Ok(number) => {
                slot.installed(number);
                die_at(25);
                // It is one that takes marks.
                let _ = Mark::remove(file.as_fd());
                // The caller has it. When it makes its next call, the file may be deleted, and must not be found by its handle
                // because of a copy of ours.
                drop(file);
                die_at(26);
                slot.sending();
                die_at(27);
                turn.answered();
                if self.send(call.id, Answer::Value(i64::from(number))) {
                    die_at(28);
                    slot.settle();
                    die_at(29);
                    // The caller's next call waits for its turn.
                    if let Some(park) = park {
                        park.clear();
                    }
                    die_at(30);
                    return Some(slot);
                }
                // What cannot be opened again is kept, whatever its number stands for by now.
                let file = park.as_ref().and_then(|park| park.look(call.id));
                let file = file.or_else(|| caller.thread.descriptor(number).ok());
                file.map(|file| (file, Some(number)))
            }
            Err(error) => {
                self.cannot_give(call, error);
                (CutOff::of(call) == CutOff::Neither).then_some((file, None))
            }
        };
        let Some((file, descriptor)) = undelivered else {
            slot.settle();
            if let Some(park) = park {
                park.clear();
            }
            return Some(slot);
        };
        let (since, caller_started) = (now_ms(), caller.started);
        slot.undelivered(since);
        self.session.keep(Undelivered { slot, park, file, call: *call, caller_started, descriptor, since });
        None
    }

    /// The caller's table does not take what it was to be given.
    fn cannot_give(&self, call: &Notification, error: Errno) {
        if error == Errno::MFILE {
            self.send(call.id, Answer::Error(Errno::MFILE));
        } else if self.served.listener.still_waits(call.id) {
            self.session.audit.tell(&self.session.id, || {
                tracing::warn!(session = self.session.id, "cannot hand a descriptor over: {error}; EIO");
            });
            self.send(call.id, Answer::Error(Errno::IO));
        }
    }

    pub(crate) fn give_up(
        &self,
        slot: Slot,
        call: &Notification,
        caller: &Caller,
        error: Errno,
    ) -> Option<Slot> {
        tracing::error!(session = self.session.id, "cannot park a file: {error}; EIO");
        self.send(call.id, Answer::Error(Errno::IO));
        self.let_go(slot, caller)
    }
}

/// What a monitor installed from `slot` before it died.
fn find_lost(slot: &Slot, caller: &Caller, like: &OwnedFd, close_on_exec: bool) -> Option<(RawFd, OwnedFd)> {
    let mark = Mark::new(slot.index());
    caller.thread.find_marked(mark, like.as_fd(), close_on_exec).ok().flatten()
}

/// The number under which the caller has `file`, if it has it.
pub(crate) fn find(left: &Left, caller: &Caller, file: &OwnedFd) -> Result<Option<RawFd>, Errno> {
    let noted = matches!(left.stage, Stage::Installed | Stage::Sending | Stage::Undelivered);
    if noted && caller.thread.has(left.descriptor, file.as_fd())? {
        return Ok(Some(left.descriptor));
    }
    caller.thread.find(file.as_fd())
}
