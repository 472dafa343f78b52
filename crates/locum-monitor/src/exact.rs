//! Handing over an `O_PATH` descriptor, which ADDFD refuses: trace, journal, ADDFD of a socket, and the one change to the
//! caller's registers. See [`locum_kernel::hand_over`].
//!
//! There is no park: what opens such a descriptor can be repeated. What a try that came to nothing leaves in the caller's
//! table, the socket, is a *stray*; the next hand-over puts its own socket in the stray's place. A dead monitor's is found by
//! its mark and by the call that it names.

use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use locum_journal::{Left, Slot};
use locum_kernel::Errno;
use locum_kernel::fault::die_at;
use locum_kernel::hand_over::{self, Done, Parcel, Unfit};
use locum_kernel::notify::{Answer, CallId, Notification};
use locum_kernel::process::Thread;
use locum_kernel::table::Mark;

use crate::answer::Post;
use crate::caller::{Caller, Turn};
use crate::calls::handles;
use crate::session::{Session, now_ms};

/// A socket in a caller's table whose parcel nobody will take in.
#[derive(Debug)]
pub(crate) struct Stray {
    /// What remembers it if this monitor dies; `None`: the slot of a later try, in the same thread.
    slot: Option<Slot>,
    caller: Arc<Caller>,
    socket: OwnedFd,
    /// Its number in the caller's table.
    number: RawFd,
    /// Whether the caller may still be about to take the parcel in: a monitor died just when it was told to. Not any more once
    /// it makes another call, or has ended.
    doubtful: bool,
}

impl Stray {
    /// What a dead monitor left of the hand-over in `slot`, whose call does not wait any more. Gives the slot back if nothing.
    pub(crate) fn left(session: &Session, slot: Slot) -> Option<Slot> {
        let Some(left) = slot.left().filter(has_begun) else { return Some(slot) };
        let same = session.callers.who_made(&left);
        // If the thread has ended, what was put into its process's table is still there.
        let doubtful = same.is_some();
        let Some(caller) = same.or_else(|| any_of(session, left.process)) else { return Some(slot) };
        let mark = Some(Mark::new(slot.index()));
        let Some((number, socket)) = find(mark, &caller, left.call.id) else { return Some(slot) };
        slot.installed(number);
        slot.undelivered(now_ms());
        session.keep_stray(Self { slot: Some(slot), caller, socket, number, doubtful });
        None
    }

    /// The same for a call that still waits, before it is tried again from the same slot.
    pub(crate) fn left_waiting(session: &Session, slot: &Slot, caller: &Arc<Caller>) {
        let left = slot.left().filter(has_begun);
        if let Some(left) = left {
            Self::keep(session, Some(Mark::new(slot.index())), caller, left.call.id);
        }
    }

    /// The same before the call `id` is made anew, of which no slot tells.
    pub(crate) fn of(session: &Session, caller: &Arc<Caller>, id: CallId) {
        Self::keep(session, None, caller, id);
    }

    fn keep(session: &Session, mark: Option<Mark>, caller: &Arc<Caller>, id: CallId) {
        if let Some((number, socket)) = find(mark, caller, id) {
            let caller = Arc::clone(caller);
            session.keep_stray(Self { slot: None, caller, socket, number, doubtful: true });
        }
    }

    /// Whether a call of `caller` may have it.
    pub(crate) fn is_for(&self, caller: &Caller) -> bool {
        let own = &self.caller;
        let is_same_thread = (own.thread.tid(), own.started) == (caller.thread.tid(), caller.started);
        let is_certain = !self.doubtful || !own.thread.lives();
        is_same_thread || (is_certain && own.process() == caller.process())
    }

    /// Whether it has a slot of its own.
    pub(crate) fn is_remembered(&self) -> bool {
        self.slot.is_some()
    }

    /// Whether `caller` has it where it was put.
    pub(crate) fn is_with(&self, caller: &Caller) -> bool {
        caller.thread.has(self.number, self.socket.as_fd()) == Ok(true)
    }

    /// Whether the process lives that has it.
    pub(crate) fn lasts(&self) -> bool {
        self.caller.process_lives()
    }

    /// The same, remembered by `slot`, from which a dead monitor put it there.
    fn remembered_by(self, slot: Slot) -> Self {
        slot.installed(self.number);
        slot.undelivered(now_ms());
        Self { slot: Some(slot), ..self }
    }

    /// Forgets it.
    pub(crate) fn settle(&self) {
        self.slot.iter().for_each(Slot::settle);
    }
}

impl Post<'_> {
    /// Hands `file` over, an `O_PATH` descriptor. `None`: the slot stays behind with a stray.
    pub(crate) fn give_path(
        &self,
        slot: Slot,
        call: &Notification,
        (caller, turn): (&Arc<Caller>, Turn<'_>),
        (file, close_on_exec): (&OwnedFd, bool),
    ) -> Option<Slot> {
        // Whoever waits for this call has nothing left to take out of an earlier parcel.
        if !self.served.listener.still_waits(call.id) {
            return self.let_go(slot, caller);
        }
        let parcel = match caller.parcel(call.id, file, Mark::new(slot.index())) {
            Ok(parcel) => parcel,
            Err(error) => return self.give_up(slot, call, caller, error),
        };
        let gadgets = self.session.callers.program(caller);
        let begun = gadgets.and_then(|gadgets| Ok((gadgets, hand_over::seize(&caller.thread)?)));
        let (gadgets, seized) = match begun {
            Ok(begun) => begun,
            Err(why) => {
                self.unfit(call, &why);
                return self.let_go(slot, caller);
            }
        };
        die_at(1);
        let stray = self.session.stray(caller);
        slot.parked();
        let socket = parcel.socket().as_fd();
        let listener = &self.served.listener;
        let number = match &stray {
            Some(stray) => listener.add_descriptor_at(call.id, socket, stray.number),
            None => listener.add_descriptor(call.id, socket, true),
        };
        die_at(2);
        let number = match number {
            Ok(number) => number,
            Err(error) => {
                let error = if error == Errno::MFILE { error } else { Errno::IO };
                let _ = hand_over::refuse(listener, call.id, seized, error);
                self.session.counters.calls().fetch_add(1, Ordering::Relaxed);
                if let Some(stray) = stray {
                    self.session.keep_stray(stray);
                }
                return self.let_go(slot, caller);
            }
        };
        slot.installed(number);
        if let Some(stray) = stray {
            stray.settle();
        }
        slot.sending();
        die_at(3);
        let leads = caller.process() == caller.thread.tid();
        turn.answered();
        let done = hand_over::deliver(
            listener,
            call,
            (seized, gadgets),
            (&caller.memory, leads),
            &parcel,
            (number, close_on_exec),
        );
        let done = done.unwrap_or_else(|error| {
            tracing::debug!(session = self.session.id, "a hand-over came to nothing: {error}");
            Done::Withdrawn
        });
        die_at(11);
        if matches!(done, Done::Taken | Done::NoRoom) {
            self.session.counters.calls().fetch_add(1, Ordering::Relaxed);
        }
        if matches!(done, Done::Taken | Done::Gone) {
            caller.keep_parcel(parcel);
            slot.settle();
            return Some(slot);
        }
        slot.undelivered(now_ms());
        let (caller, socket) = (Arc::clone(caller), parcel.into_socket());
        self.session.keep_stray(Stray { slot: Some(slot), caller, socket, number, doubtful: false });
        None
    }

    /// Ends with a call of `caller` that was answered or withdrawn. `None`: the slot stays behind, since nothing else remembers
    /// a stray that an earlier try of the same call left.
    pub(crate) fn let_go(&self, slot: Slot, caller: &Caller) -> Option<Slot> {
        if let Some(stray) = self.session.forgotten_stray(caller) {
            self.session.keep_stray(stray.remembered_by(slot));
            return None;
        }
        slot.settle();
        Some(slot)
    }

    /// Nothing was done to the caller, and nothing can be.
    fn unfit(&self, call: &Notification, why: &Unfit) {
        self.session.audit.tell(&self.session.id, || {
            tracing::warn!(
                session = self.session.id,
                tid = call.tid,
                "the caller cannot be handed an O_PATH descriptor: {why}; EOPNOTSUPP"
            );
        });
        self.send(call.id, Answer::Error(Errno::OPNOTSUPP));
    }
}

/// Some thread of `process` that lives.
fn any_of(session: &Session, process: u32) -> Option<Arc<Caller>> {
    let thread = Thread::hold_living(process).ok()?;
    session.callers.meet(thread.tid()).ok()
}

/// Whether a dead monitor may have put a socket into the caller's table.
fn has_begun(left: &Left) -> bool {
    left.tries > 0 && handles::wants_path(&left.call)
}

/// The socket that a dead monitor put into the caller's table for the call `id`, with the mark of its slot if that is known, and its
/// number there.
fn find(mark: Option<Mark>, caller: &Caller, id: CallId) -> Option<(RawFd, OwnedFd)> {
    let is_it = |found: &OwnedFd| Parcel::call_of(found.as_fd()) == Some(id);
    caller.thread.find_marked_socket(mark, is_it).ok().flatten()
}
