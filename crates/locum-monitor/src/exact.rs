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
use locum_kernel::hand_over::{self, Done, Parcel, Unfit};
use locum_kernel::notify::{Answer, CallId, Notification};
use locum_kernel::process::Mark;

use crate::answer::Post;
use crate::caller::Caller;
use crate::session::now_ms;

/// A socket in a caller's table whose parcel nobody will take in.
#[derive(Debug)]
pub(crate) struct Stray {
    slot: Slot,
    caller: Arc<Caller>,
    socket: OwnedFd,
    /// Its number in the caller's table.
    number: RawFd,
    /// Whether the caller may still be about to take the parcel in: a monitor died just when it was told to. Not any more once
    /// it makes another call.
    doubtful: bool,
}

impl Stray {
    /// What a dead monitor left of the hand-over in `slot`, whose call does not wait any more.
    pub(crate) fn left(slot: Slot, left: &Left, caller: &Arc<Caller>) -> Result<Self, Slot> {
        match find(&slot, caller, left.call.id) {
            Some((number, socket)) if left.caller_started == caller.started => {
                slot.installed(number);
                slot.undelivered(now_ms());
                Ok(Self { slot, caller: Arc::clone(caller), socket, number, doubtful: true })
            }
            _ => Err(slot),
        }
    }

    /// Whether a call of `caller` may have it.
    pub(crate) fn is_for(&self, caller: &Caller) -> bool {
        let own = &self.caller;
        let is_same_thread = (own.thread.tid(), own.started) == (caller.thread.tid(), caller.started);
        is_same_thread || (!self.doubtful && own.process() == caller.process())
    }

    /// Whether `caller` has it where it was put.
    pub(crate) fn is_with(&self, caller: &Caller) -> bool {
        caller.thread.has(self.number, self.socket.as_fd()) == Ok(true)
    }

    /// Whether the process lives that has it.
    pub(crate) fn lasts(&self) -> bool {
        self.caller.process_lives()
    }

    /// Forgets it.
    pub(crate) fn settle(&self) {
        self.slot.settle();
    }
}

impl Post<'_> {
    /// Hands `file` over, an `O_PATH` descriptor. `was_begun`: a monitor died while it did the same. `None`: the slot stays
    /// behind with a stray.
    pub(crate) fn give_path(
        &self,
        slot: Slot,
        call: &Notification,
        caller: &Arc<Caller>,
        (file, close_on_exec): (&OwnedFd, bool),
        was_begun: bool,
    ) -> Option<Slot> {
        // Whoever waits for this call has nothing left to take out of an earlier parcel.
        if !self.served.listener.still_waits(call.id) {
            slot.settle();
            return Some(slot);
        }
        let parcel = match caller.parcel(call.id, file, Mark::new(slot.index())) {
            Ok(parcel) => parcel,
            Err(error) => return Some(self.give_up(slot, call, error)),
        };
        let gadgets = self.session.callers.program(caller);
        let begun = gadgets.and_then(|gadgets| Ok((gadgets, hand_over::seize(&caller.thread)?)));
        let (gadgets, seized) = match begun {
            Ok(begun) => begun,
            Err(why) => {
                self.unfit(call, &why);
                slot.settle();
                return Some(slot);
            }
        };
        let stray = self.session.stray(caller).map(|stray| (stray.number, Some(stray)));
        let lost =
            || was_begun.then(|| find(&slot, caller, call.id)).flatten().map(|(number, _)| (number, None));
        let (there, stray) =
            stray.or_else(lost).map_or((None, None), |(number, stray)| (Some(number), stray));
        slot.parked();
        let socket = parcel.socket().as_fd();
        let listener = &self.served.listener;
        let number = match there {
            Some(number) => listener.add_descriptor_at(call.id, socket, number),
            None => listener.add_descriptor(call.id, socket, true),
        };
        let number = match number {
            Ok(number) => number,
            Err(error) => {
                let error = if error == Errno::MFILE { error } else { Errno::IO };
                let _ = hand_over::refuse(listener, call.id, seized, error);
                self.session.counters.calls().fetch_add(1, Ordering::Relaxed);
                if let Some(stray) = stray {
                    self.session.keep_stray(stray);
                }
                slot.settle();
                return Some(slot);
            }
        };
        slot.installed(number);
        if let Some(stray) = stray {
            stray.slot.settle();
        }
        slot.sending();
        let done = hand_over::deliver(listener, call, seized, gadgets, &parcel, (number, close_on_exec));
        let done = done.unwrap_or_else(|error| {
            tracing::debug!(session = self.session.id, "a hand-over came to nothing: {error}");
            Done::Withdrawn
        });
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
        self.session.keep_stray(Stray { slot, caller, socket, number, doubtful: false });
        None
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

/// The socket that a dead monitor put into the caller's table, from `slot` for the call `id`, with its number there.
fn find(slot: &Slot, caller: &Caller, id: CallId) -> Option<(RawFd, OwnedFd)> {
    let is_it = |found: &OwnedFd| Parcel::call_of(found.as_fd()) == Some(id);
    caller.thread.find_marked_socket(Mark::new(slot.index()), is_it).ok().flatten()
}
