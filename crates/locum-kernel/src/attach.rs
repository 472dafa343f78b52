//! Putting a filter with a listener into a process that runs, for all its threads.
//!
//! One of its threads is stopped, and its registers are set, once, to an [`Installation`], which it carries out by itself. What
//! has to live for that is only this: while its own filters are to be suspended, so that one which refuses seccomp(2) does not
//! count, somebody must trace it. If the tracer dies before, the thread's own filters decide, and it goes on in any case.

use std::os::fd::RawFd;
use std::time::Duration;

use crate::Errno;
use crate::arch::{Gadgets, Installation, Registers, State};
use crate::fault::die_at;
use crate::filter::{Filter, Wait};
use crate::hand_over::{EXTENDED, Unfit, prepare, write};
use crate::memory::AddressSpace;
use crate::notify::Listener;
use crate::process::Thread;
use crate::ptrace::{Seized, Stop, Stopped};
use crate::stack::{self, Room};
use crate::verdict::{Action, InForce};

/// Why a process is left as it is.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Its program, or who traces it.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// A filter would not be enough of a promise to the kernel.
    #[error(
        "it may gain privileges by exec (no_new_privs is not set): --set-no-new-privs sets it, for good and for all that it will start"
    )]
    NewPrivs,
    /// A filter that is there decides first.
    #[error(
        "a filter that it runs under already has {call} fail or be killed for ({action:?}), which outranks ours: start it with a profile of `locum profile`"
    )]
    Outranked {
        /// The call's name.
        call: &'static str,
        /// What happens to it.
        action: Action,
    },
    /// A filter that is there would leave the process half way, should we be killed.
    #[error(
        "a filter that it runs under does not let it make {call}, which it would have to call by itself if this program died now: start it with a profile of `locum profile`"
    )]
    Deadly {
        /// The call's name.
        call: &'static str,
    },
    /// The kernel takes one listener at a time. It comes with the filters that are there.
    #[error("a listener is in force for it, and the kernel takes one at a time")]
    Busy(InForce),
    /// Its registers are not those that we know.
    #[error("it is a 32-bit program, whose calls have other numbers: there is no help for it")]
    Narrow,
    /// The kernel's limit.
    #[error(
        "its {filters} filters leave no room for another: the kernel takes 32768 instructions for each process; start it anew, with a profile of `locum profile`"
    )]
    Full {
        /// How many it is under.
        filters: usize,
    },
    /// Threads that are not under the same filters.
    #[error(
        "a thread of it is under a filter that the others are not under; the kernel then takes none for all of them"
    )]
    Diverged,
    /// No thread stops.
    #[error(
        "none of its threads stops within {0:?}: it waits in the kernel for what no signal ends, such as a child of vfork"
    )]
    Stuck(Duration),
    /// It may not be looked at.
    #[error(
        "its filters cannot be read and suspended: this needs CAP_SYS_ADMIN in the initial user namespace, CONFIG_CHECKPOINT_RESTORE, and no seccomp filter on locum itself (systemd's SystemCallFilter=, a container's default profile)"
    )]
    Rights,
    /// There is no room.
    #[error(
        "none of its threads has 5 KiB of room on a stack of its own: each runs on a small one within other memory (a goroutine's, a coroutine's), and its first thread has ended"
    )]
    NoRoom,
    /// The kernel's word.
    #[error("{0}")]
    Kernel(Errno),
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Self::Kernel(error)
    }
}

/// A process that has just got a filter. One of its threads is stopped until this is dropped.
#[derive(Debug)]
pub struct Attached {
    /// The filter's listener.
    pub listener: Listener,
    /// The filters that are there now.
    pub filters: InForce,
    stopped: Stopped,
    number: RawFd,
    close: u64,
}

impl Attached {
    /// Has the process close its own copy of the listener when it goes on.
    pub fn without_copy(self) -> Result<(), Errno> {
        let number = u64::from(self.number.cast_unsigned());
        write(self.stopped.tid(), &[(self.close, number.to_ne_bytes().to_vec())])
    }
}

/// How long one thread is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many threads of a process are waited for that long.
const STUCK: usize = 4;

/// Puts `filter`, which hands `calls` over, into all of the process of which `process` is a thread that lives.
pub fn attach(
    process: &Thread,
    (filter, wait): (&Filter, Wait),
    calls: &[(&'static str, i32)],
    no_new_privs: bool,
) -> Result<Attached, Refusal> {
    let chosen = choose(process)?;
    let filters = permit(&chosen, calls, filter.length())?;
    install(process, chosen, filters, (filter, wait), no_new_privs)
}

/// Looks whether [`attach`] would be refused, and returns the filters that the process is under. Changes nothing; one of its threads
/// is stopped for an instant.
pub fn examine(process: &Thread, calls: &[(&'static str, i32)], length: usize) -> Result<InForce, Refusal> {
    permit(&choose(process)?, calls, length)
}

/// The filters that the process is under. As of [`examine`].
pub fn filters(process: &Thread) -> Result<InForce, Refusal> {
    choose(process)?.stopped.filters().map_err(|_| Refusal::Rights)
}

/// So often the first thread is looked at, and every other twice, before the process is refused.
const PASSES: usize = 32;

/// A thread that can carry an [`Installation`] out.
struct Chosen {
    stopped: Stopped,
    registers: Registers,
    room: Room,
    gadgets: Gadgets,
}

fn choose(process: &Thread) -> Result<Chosen, Refusal> {
    let (space, pid) = (AddressSpace::open(process.proc())?, process.status()?.process);
    let threads = process.threads()?;
    let mut refusal = Refusal::Stuck(PATIENCE);
    let mut stuck = Vec::new();
    for pass in 0..PASSES {
        // A first thread may be on an alternate stack for a moment.
        for tid in threads.iter().copied().filter(|tid| pass < 2 || *tid == pid) {
            if stuck.len() >= STUCK || stuck.contains(&tid) {
                continue;
            }
            let stopped = match stop(process, tid) {
                Ok(Some(stopped)) => stopped,
                Ok(None) => {
                    stuck.push(tid);
                    continue;
                }
                // Whoever traces one thread would be surprised by what happens to it.
                Err(error @ (Refusal::Unfit(_) | Refusal::Rights)) => return Err(error),
                Err(error) => {
                    refusal = error;
                    continue;
                }
            };
            let registers = match stopped.registers() {
                // A 32-bit program has fewer.
                Err(Errno::OPNOTSUPP) => return Err(Refusal::Narrow),
                registers => registers?,
            };
            if !registers.are_wide() {
                return Err(Refusal::Narrow);
            }
            // Left for the second time around: its call would fail with EINTR.
            if pass == 0 && registers.are_in_remembered_call() {
                continue;
            }
            let room = match stack::below(&space, tid, tid == pid, &registers)? {
                // These pages are used up for good.
                None if tid == pid && pass + 1 == PASSES => stack::untouched(process, &space, &registers)?,
                room => room,
            };
            let Some(room) = room else {
                refusal = Refusal::NoRoom;
                continue;
            };
            let gadgets = prepare(process)?;
            return Ok(Chosen { stopped, registers, room, gadgets });
        }
    }
    Err(refusal)
}

/// Stops a thread of `process`. `None`: it does not stop.
fn stop(process: &Thread, tid: u32) -> Result<Option<Stopped>, Refusal> {
    let seized =
        Seized::seize(tid, libc::PTRACE_O_TRACESYSGOOD).map_err(|error| match (error, process.tracer()) {
            (Errno::PERM, Ok(tracer @ 1..)) => Refusal::Unfit(Unfit::Traced(tracer)),
            (Errno::PERM, _) => Refusal::Rights,
            _ => Refusal::Kernel(error),
        })?;
    // Its id was read from the process, and may have gone to a thread of another since.
    let is_its = process.threads().is_ok_and(|threads| threads.contains(&tid));
    match seized.interrupt()?.wait_for(PATIENCE)? {
        Stop::Caught(stopped) if is_its => Ok(Some(stopped)),
        Stop::Caught(_) | Stop::Gone => Err(Refusal::Kernel(Errno::SRCH)),
        Stop::Signalled | Stop::Never => Ok(None),
    }
}

/// Whether the filters that are there let ours be put in, by the thread itself, and let it hear of `calls`.
fn permit(chosen: &Chosen, calls: &[(&'static str, i32)], length: usize) -> Result<InForce, Refusal> {
    let filters = chosen.stopped.filters().map_err(|_| Refusal::Rights)?;
    for (call, nr) in calls {
        let (action, _) = filters.of_call(*nr);
        if action < Action::Notify {
            return Err(Refusal::Outranked { call, action });
        }
    }
    for (call, nr) in OWN {
        // The others may fail. A return from a handler that fails goes on at what lies behind it.
        let worst = if nr == libc::SYS_rt_sigreturn { Action::Notify } else { Action::Trap };
        if filters.of_call(i32::try_from(nr).unwrap_or(-1)).1 <= worst {
            return Err(Refusal::Deadly { call });
        }
    }
    if filters.room(length) == 0 {
        return Err(Refusal::Full { filters: filters.count() });
    }
    Ok(filters)
}

fn install(
    process: &Thread,
    Chosen { stopped, registers, room, gadgets }: Chosen,
    mut filters: InForce,
    (filter, wait): (&Filter, Wait),
    no_new_privs: bool,
) -> Result<Attached, Refusal> {
    let mut extended = Vec::with_capacity(EXTENDED);
    stopped.extended_state(&mut extended)?;
    let state = State { registers: &registers, signal_mask: stopped.signal_mask()?, extended: &extended };
    let program = filter.program();
    let installation =
        Installation::of(&state, room, gadgets, program, Filter::flags_for_all_threads(wait), no_new_privs)
            .ok_or(Refusal::NoRoom)?;
    die_at(21);
    write(stopped.tid(), &installation.memory).map_err(|_| Refusal::NoRoom)?;
    die_at(22);
    stopped.set_registers(&installation.registers)?;
    die_at(23);
    stopped.set_signal_mask(u64::MAX)?;
    let (stopped, result) = follow(stopped, &installation.past_filters)?;
    die_at(26);
    let number = match result {
        Ok(number) => number,
        Err(Errno::BUSY) => return Err(Refusal::Busy(filters)),
        Err(Errno::SRCH) => return Err(Refusal::Diverged),
        Err(Errno::ACCESS) => return Err(Refusal::NewPrivs),
        Err(error) => return Err(Refusal::Kernel(error)),
    };
    let listener =
        Listener::try_from(process.descriptor(number)?).map_err(|_| Refusal::Kernel(Errno::BADF))?;
    filters.0.insert(0, program.to_vec());
    Ok(Attached { listener, filters, stopped, number, close: installation.close })
}

/// The calls that an installation makes.
const OWN: [(&str, libc::c_long); 4] = [
    ("rt_sigreturn", libc::SYS_rt_sigreturn),
    ("prctl", libc::SYS_prctl),
    ("seccomp", libc::SYS_seccomp),
    ("close", libc::SYS_close),
];

/// Goes with the thread until it has its listener, and returns that one's number, or why it has none. Its filters are suspended from
/// the beginning to the end of the calls `past_filters`, as the registers have them, and at no other time: its other threads
/// can write to the frames from which it goes on.
fn follow(
    mut stopped: Stopped,
    past_filters: &[(libc::c_long, [u64; 3])],
) -> Result<(Stopped, Result<RawFd, Errno>), Refusal> {
    // Twice for each call: rt_sigreturn, prctl, rt_sigreturn, seccomp.
    for step in 0..8 {
        stopped = stopped.next_call()?.ok_or(Refusal::Kernel(Errno::SRCH))?;
        die_at(24);
        let (registers, is_beginning) = (stopped.registers()?, step % 2 == 0);
        let is_ours = past_filters.iter().any(|call| registers.are_about(*call));
        stopped.suspend_filters(is_beginning && is_ours)?;
        let (nr, result) = registers.call();
        if nr != libc::SYS_seccomp || is_beginning {
            continue;
        }
        die_at(25);
        let result = RawFd::try_from(result).map_err(|_| Refusal::Kernel(Errno::OVERFLOW))?;
        return Ok((stopped, if result < 0 { Err(Errno::from_raw_os_error(-result)) } else { Ok(result) }));
    }
    Err(Refusal::Kernel(Errno::IO))
}
