//! What a dead monitor left in the journal, and how it is settled.

use std::os::fd::{AsFd as _, OwnedFd, RawFd};
use std::sync::Arc;

use locum_journal::{Left, Slot, Stage};
use locum_kernel::Errno;
use locum_kernel::table::Mark;
use rustix::fs::OFlags;

use crate::answer::find;
use crate::caller::Caller;
use crate::calls::{CutOff, handles, int};
use crate::exact::Stray;
use crate::session::{KEPT_MS, Served, Session, Undelivered, now_ms};
use crate::worker;

/// A call on which the monitor crashed this often is not tried again.
const CRASHES: u64 = 2;
/// Nor is one in which this many monitors ended without a crash of their own: SIGKILL from outside says little about the
/// call, unless it comes every time.
const TRIES: u64 = 20;

/// What is to be done for a call that still waits.
#[derive(Debug)]
pub(crate) enum Repair {
    /// Carry it out, as if it had just come.
    Serve,
    /// Finish handing this file over.
    HandOver(OwnedFd),
    /// Give it up.
    Fail(Errno, &'static str),
}

/// Decides on a call that still waits, with the file that is parked for it.
pub(crate) fn decide(left: &Left, parked: Option<OwnedFd>) -> Repair {
    if let Some(file) = parked {
        return Repair::HandOver(file);
    }
    if left.stage == Stage::Receiving {
        return Repair::Serve;
    }
    if left.crashes >= CRASHES || left.tries >= TRIES {
        return Repair::Fail(Errno::IO, "a call on which the monitor died more than once is given up");
    }
    match CutOff::of(&left.call) {
        CutOff::Repeat => Repair::Serve,
        CutOff::Neither => {
            Repair::Fail(Errno::INTR, "a call that may have happened and cannot be repeated was cut off")
        }
    }
}

/// The file of a hand-over that is not parked, from the table of the caller, which has it already.
pub(crate) fn installed(session: &Session, left: &Left) -> Option<OwnedFd> {
    if !matches!(left.stage, Stage::Installed | Stage::Sending | Stage::Undelivered) {
        return None;
    }
    let caller = session.callers.who_made(left)?;
    // On an export, it is not a socket in which something else was handed over.
    caller.thread.descriptor_on(|mount| session.exports_on(&caller, mount), left.descriptor)
}

/// The same if the park was lost together with the keeper before the number was noted.
pub(crate) fn marked(session: &Session, slot: &Slot, left: &Left) -> Option<OwnedFd> {
    if left.stage != Stage::Parked || CutOff::of(&left.call) == CutOff::Repeat {
        return None;
    }
    find_marked(session, slot, left, &*session.callers.who_made(left)?).map(|(_, file)| file)
}

/// What has the mark of `slot` in the caller's table and can be what the call in it was to have.
fn find_marked(session: &Session, slot: &Slot, left: &Left, caller: &Caller) -> Option<(RawFd, OwnedFd)> {
    let mounts = |mount| session.exports_on(caller, mount);
    let flags = OFlags::from_bits_retain(int(left.call.args[2]).cast_unsigned());
    caller.thread.find_marked_on(mounts, Mark::new(slot.index()), flags).ok().flatten()
}

/// Goes through what dead monitors left of `served`: each call that still waits gets a worker, which settles it.
pub(crate) fn adopt(session: &Arc<Session>, served: &Arc<Served>) {
    let (waiting, over): (Vec<Slot>, Vec<Slot>) = Slot::take_left(&session.journal, served.id())
        .into_iter()
        .partition(|slot| slot.call_id().is_some_and(|id| served.listener.still_waits(id)));
    // A monitor that died between settling a slot and emptying its park left a file there, which would stay for ever.
    served.clear_parks(|index| Slot::take_idle(&session.journal, index).is_some());
    for slot in over {
        let kept =
            Stray::left(session, slot).and_then(|slot| keep_withdrawn(session, served, slot, &waiting));
        if let Some(slot) = kept {
            slot.settle();
            if let Some(park) = served.known_park(slot.index()) {
                park.clear();
            }
        }
    }
    for slot in waiting {
        worker::start(session, served, Some(slot));
    }
}

/// Keeps what is in `slot` if it is a descriptor that the caller has and does not know of. Gives the slot back if not.
fn keep_withdrawn(session: &Session, served: &Served, slot: Slot, waiting: &[Slot]) -> Option<Slot> {
    let Some(left) = slot.left() else { return Some(slot) };
    // In the stage Sending, the answer was most likely taken; to give the same number out twice would be worse than to
    // leave one behind.
    let may_have_begun = match left.stage {
        Stage::Performing => handles::opens(&left.call),
        Stage::Parked | Stage::Installed | Stage::Undelivered => true,
        _ => false,
    };
    let since = if left.stage == Stage::Undelivered { left.since } else { now_ms() };
    if !may_have_begun || now_ms().saturating_sub(since) >= KEPT_MS {
        return Some(slot);
    }
    let Some(caller) = session.callers.who_made(&left) else { return Some(slot) };
    let park = served.known_park(slot.index());
    let parked = park.as_ref().and_then(|park| park.look(left.call.id)).or_else(|| installed(session, &left));
    let found = parked.map(|file| (find(&left, &caller, &file).ok().flatten(), file)).or_else(|| {
        // Nothing is known but its mark. What is taken for it is compared with what the call made anew opens.
        find_marked(session, &slot, &left, &caller).map(|(number, file)| (Some(number), file))
    });
    let Some((descriptor, file)) = found else { return Some(slot) };
    let taken = |number| {
        session.stands_for(left.call.tid, number)
            || waiting.iter().filter_map(Slot::left).any(|other| {
                (other.call.tid, other.descriptor) == (left.call.tid, number)
                    && matches!(other.stage, Stage::Installed | Stage::Sending)
            })
    };
    if descriptor.is_some_and(taken) || (descriptor.is_none() && CutOff::of(&left.call) == CutOff::Repeat) {
        return Some(slot);
    }
    if let Some(number) = descriptor {
        slot.installed(number);
    }
    slot.undelivered(since);
    // Known by its number from now on; the slot's mark may be another file's before this one is given out.
    let _ = Mark::remove(file.as_fd());
    session.keep(Undelivered {
        slot,
        park,
        file,
        call: left.call,
        caller_started: left.caller_started,
        descriptor,
        since,
    });
    None
}

#[cfg(test)]
mod tests {
    use locum_kernel::notify::{CallId, Notification};
    use locum_policy::Call;

    use super::*;
    use crate::calls::handles::number;

    fn left(stage: Stage, flags: OFlags) -> Left {
        let call = Notification {
            id: CallId(1),
            tid: 2,
            nr: number(Call::OpenByHandleAt),
            arch: 0,
            instruction_pointer: 0,
            args: [0, 0, u64::from(flags.bits()), 0, 0, 0],
        };
        Left { call, stage, tries: 1, crashes: 0, descriptor: 3, caller_started: 4, process: 2, since: 0 }
    }

    #[test]
    fn what_can_be_repeated_is_and_what_cannot_gets_eintr() {
        assert!(matches!(decide(&left(Stage::Receiving, OFlags::TRUNC), None), Repair::Serve));
        assert!(matches!(decide(&left(Stage::Performing, OFlags::RDONLY), None), Repair::Serve));
        assert!(matches!(
            decide(&left(Stage::Performing, OFlags::TRUNC), None),
            Repair::Fail(Errno::INTR, _)
        ));
        for stage in [Stage::Performing, Stage::Parked, Stage::Installed, Stage::Sending] {
            let file = std::fs::File::open("/dev/null").unwrap().into();
            assert!(matches!(decide(&left(stage, OFlags::TRUNC), Some(file)), Repair::HandOver(_)));
        }
    }

    #[test]
    fn a_call_that_kills_is_not_tried_a_third_time() {
        let once = Left { crashes: 1, tries: 1, ..left(Stage::Performing, OFlags::RDONLY) };
        assert!(matches!(decide(&once, None), Repair::Serve));
        assert!(matches!(decide(&Left { crashes: 2, tries: 2, ..once }, None), Repair::Fail(Errno::IO, _)));
        assert!(matches!(
            decide(&Left { crashes: 0, tries: TRIES, ..once }, None),
            Repair::Fail(Errno::IO, _)
        ));
        assert!(matches!(decide(&Left { crashes: 0, tries: TRIES - 1, ..once }, None), Repair::Serve));
    }
}
