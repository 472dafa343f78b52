//! Room in the memory of a stopped thread in which nothing of its program lies.
//!
//! Below the stack pointer and the red zone a stack is free, down to where it begins. But where does it begin? A goroutine's or
//! a coroutine's is a small part of a mapping that holds other things, and so is an alternate stack for signals (sigaltstack(2)).
//! So a stack counts only if the kernel or the ABI tells what the mapping is:
//!
//! - the stack with which the program began, which the kernel names;
//! - one that a libc made for a thread. It ends with what the thread pointer points to (x86-64's ABI for thread-local storage,
//!   variant II), which is known by its first word, its own address. A goroutine's thread pointer points to no such word.
//!
//! Not told apart: an alternate stack that a program keeps in a local variable on one of these.

use std::os::unix::fs::FileExt as _;

use rustix::fs::{Mode, OFlags};

use crate::Errno;
use crate::arch::Registers;
use crate::memory::{AddressSpace, Kind, PAGE, read};
use crate::process::Thread;

/// From where to where something may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The first byte.
    pub from: u64,
    /// Behind the last.
    pub to: u64,
}

/// Below the stack pointer of the thread `tid`, which `leads` its process or not. `None`: nothing says what it points into.
pub(crate) fn below(
    space: &AddressSpace,
    tid: u32,
    leads: bool,
    registers: &Registers,
) -> Result<Option<Room>, Errno> {
    let Some(to) = registers.free_below() else { return Ok(None) };
    let Some(found) = space.mapping(to)?.filter(|found| found.is_writable) else { return Ok(None) };
    let is_one = match found.kind {
        Kind::Stack => true,
        Kind::Anonymous => {
            let pointer = registers.thread_pointer();
            let mut word = [0; 8];
            (to..found.end).contains(&pointer)
                && read(tid, pointer, &mut word)? == word.len()
                && u64::from_ne_bytes(word) == pointer
                // A first thread's thread pointer may point into the program's own variables.
                && (!leads || has_guard(space, found.start)?)
        }
        Kind::Other => false,
    };
    Ok(is_one.then_some(Room { from: found.start, to }))
}

/// Whether what lies directly below `start` may not be touched.
fn has_guard(space: &AddressSpace, start: u64) -> Result<bool, Errno> {
    let below = space.mapping(start.saturating_sub(1))?;
    Ok(below.is_some_and(|below| below.end == start && below.is_closed))
}

/// Pages at the far end of the stack with which the program began that have never been touched: for its first thread, while that
/// runs somewhere else, on a goroutine's stack or an alternate one. Nobody but that thread comes there.
pub(crate) fn untouched(
    leader: &Thread,
    space: &AddressSpace,
    registers: &Registers,
) -> Result<Option<Room>, Errno> {
    let Some(stack) =
        space.mappings()?.into_iter().find(|found| found.kind == Kind::Stack && found.is_writable)
    else {
        return Ok(None);
    };
    if (stack.start..stack.end).contains(&registers.stack_pointer()) {
        return Ok(None);
    }
    let pages = usize::try_from((stack.end - stack.start) / PAGE as u64).unwrap_or(0).min(MOST_PAGES);
    let mut entries = vec![0; pages * 8];
    let file =
        rustix::fs::openat(leader.proc(), c"pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let read = std::fs::File::from(file).read_exact_at(&mut entries, stack.start / PAGE as u64 * 8);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let is_touched = |entry: &[u8]| entry[7] & (PRESENT | SWAPPED) != 0;
    let touched: Vec<bool> = entries.chunks_exact(8).map(is_touched).collect();
    // Some are left between this room and the stack's use.
    let first = touched.windows(WANTED + SPARE).position(|pages| pages.iter().all(|touched| !touched));
    Ok(first.map(|first| {
        let from = stack.start + (first * PAGE) as u64;
        Room { from, to: from + (WANTED * PAGE) as u64 }
    }))
}

/// Of the far end, so many pages are looked at.
const MOST_PAGES: usize = 1024;
/// Pages of such a room: more than any [`Installation`](crate::arch::Installation) takes.
const WANTED: usize = 5;
const SPARE: usize = 4;
/// In the last byte of an entry of /proc/PID/pagemap.
const PRESENT: u8 = 0x80;
const SWAPPED: u8 = 0x40;
