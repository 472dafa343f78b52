//! Handing an `O_PATH` descriptor to a caller, which ADDFD refuses (EBADF).
//!
//! The descriptor waits in a socket; the socket goes into the caller's table; the caller's call is answered with "make it
//! anew" while an interrupt is pending, so that it stops on its way; and its registers are set, once, to the head of a
//! [`Chain`], which takes the descriptor out of the socket. Until then nothing has changed and the caller, let go by whatever
//! kills its tracer, makes the call anew; from then on it finishes by itself.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};

use memchr::memmem;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::arch::{Chain, FIRST, Gadgets, State, UPPER_HALF};
use crate::fault::die_at;
use crate::memory::AddressSpace;
use crate::notify::{CallId, Listener, Notification};
use crate::process::Thread;
use crate::ptrace::{Interrupted, Seized, Stop, Stopped};
use crate::table::Mark;
use crate::{Errno, memory, socket, stack};

/// A socket with an `O_PATH` descriptor in it, on its way into a caller.
#[derive(Debug)]
pub struct Parcel {
    /// The caller's end.
    near: OwnedFd,
    far: OwnedFd,
}

impl Parcel {
    /// An empty one.
    pub fn new() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(Self { near, far })
    }

    /// Packs a copy of `file` for the call `id`, in place of what may still be in it. The socket bears `mark` from now on.
    ///
    /// What was packed before must be for the same thread, or a thread that has made another call since: whoever still has the
    /// socket in its table can take in what is packed now. EPIPE: somebody shut the socket down.
    pub fn pack(&self, id: CallId, file: BorrowedFd<'_>, mark: Mark) -> Result<(), Errno> {
        while rustix::net::recv(&self.near, &mut [0], RecvFlags::DONTWAIT).is_ok() {}
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&FIRST);
        bytes[4..].copy_from_slice(&id.0.to_ne_bytes());
        socket::send_with(&self.far, &bytes, file)?;
        mark.put(self.near.as_fd())
    }

    /// The end that goes into the caller's table.
    pub fn socket(&self) -> &OwnedFd {
        &self.near
    }

    /// The same, alone.
    pub fn into_socket(self) -> OwnedFd {
        self.near
    }

    /// For which call the parcel was packed of which `fd` is the caller's end. `None`: it is none, or has been taken in.
    pub fn call_of(fd: BorrowedFd<'_>) -> Option<CallId> {
        let mut bytes = [0; 12];
        let peeked = socket::receive_with(fd, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        let [first @ .., _, _, _, _, _, _, _, _] = bytes;
        let [_, _, _, _, id @ ..] = bytes;
        let is_ours = matches!(peeked, Ok((12, Some(_)))) && first == FIRST;
        is_ours.then_some(CallId(u64::from_ne_bytes(id)))
    }
}

/// How a hand-over ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// The caller has the descriptor, or its call fails with EMFILE; the socket is closed.
    Taken,
    /// Nothing has happened: the call was withdrawn and, unless a signal ends it, comes anew. The socket is in the caller's table.
    Withdrawn,
    /// The call fails with ENOMEM: there is no room on the caller's stack. The socket is in its table.
    NoRoom,
    /// The caller has ended.
    Gone,
}

/// Has a caller that is traced, and waits for `call`, take the parcel in, whose socket it has as `number`. It has the address space
/// `space`, and is the first thread of its process or not.
pub fn deliver(
    listener: &Listener,
    call: &Notification,
    (seized, gadgets): (Seized, Gadgets),
    (space, leads): (&AddressSpace, bool),
    parcel: &Parcel,
    (number, close_on_exec): (RawFd, bool),
) -> Result<Done, Errno> {
    die_at(4);
    let interrupted = seized.interrupt()?;
    die_at(5);
    let stopped = match ask_again(listener, call.id, interrupted)? {
        Stop::Caught(stopped) => stopped,
        Stop::Signalled => return Ok(Done::Withdrawn),
        // It cannot be that it does not stop: that is awaited without an end.
        Stop::Gone | Stop::Never => return Ok(Done::Gone),
    };
    let registers = stopped.registers()?;
    if !registers.are_at_the_end_of(call) {
        return Ok(Done::Withdrawn);
    }
    let mut extended = Vec::with_capacity(EXTENDED);
    stopped.extended_state(&mut extended)?;
    let signal_mask = stopped.signal_mask()?;
    let state = State { registers: &registers, signal_mask, extended: &extended };
    let room = stack::below(space, stopped.tid(), leads, &registers)?;
    let chain = room.and_then(|room| Chain::take_in(&state, room, gadgets, number, close_on_exec));
    let Some(chain) = chain else { return no_room(&stopped, &registers) };
    rustix::net::send(&parcel.far, &chain.mend, SendFlags::NOSIGNAL)?;
    rustix::net::send(&parcel.far, &UPPER_HALF, SendFlags::NOSIGNAL)?;
    die_at(7);
    match write(stopped.tid(), &chain.memory) {
        Ok(()) => {}
        Err(Errno::FAULT) => return no_room(&stopped, &registers),
        Err(error) => return Err(error),
    }
    die_at(8);
    stopped.set_registers(&chain.registers)?;
    die_at(9);
    // The chain blocks all signals, from its second step on. That it is killed before this costs a handler that does not
    // return its descriptor, no more.
    let _ = stopped.set_signal_mask(u64::MAX);
    die_at(10);
    Ok(Done::Taken)
}

/// Ends a call of a traced thread with `error`, without a descriptor: a thread that is traced can be let go only when it stops.
pub fn refuse(listener: &Listener, id: CallId, seized: Seized, error: Errno) -> Result<(), Errno> {
    let interrupted = seized.interrupt()?;
    // ENOENT: it was withdrawn, and stops all the same.
    let _ = listener.send(id, crate::notify::Answer::Error(error));
    interrupted.wait().map(drop)
}

/// Has the kernel make the call `id` of an interrupted thread anew, and waits until the thread stops on its way to it. Without
/// the interrupt, the program itself would see an error that no program knows.
pub fn ask_again(listener: &Listener, id: CallId, interrupted: Interrupted) -> Result<Stop, Errno> {
    // ENOENT: it was withdrawn by the interrupt, and is made anew all the same.
    let _ = listener.send_again(id);
    die_at(6);
    interrupted.wait()
}

/// More than the largest state of a vector unit (AMX: 11 KiB).
pub(crate) const EXTENDED: usize = 16 * 1024;

fn no_room(stopped: &Stopped, registers: &crate::arch::Registers) -> Result<Done, Errno> {
    stopped.set_registers(&registers.with_result(-i64::from(Errno::NOMEM.raw_os_error())))?;
    Ok(Done::NoRoom)
}

/// Writes to the memory of a stopped thread, which no other can get the id of. EFAULT: not all of it may be written.
pub(crate) fn write(tid: u32, pieces: &[(u64, Vec<u8>)]) -> Result<(), Errno> {
    // A guard may lie between (MADV_GUARD_INSTALL), which no list of mappings shows: below it something else begins.
    for (to, from) in pieces {
        let mut there = vec![0; from.len()];
        if memory::read(tid, *to, &mut there)? < there.len() {
            return Err(Errno::FAULT);
        }
    }
    let local: Vec<_> = pieces
        .iter()
        .map(|(_, from)| libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() })
        .collect();
    let remote: Vec<_> = pieces
        .iter()
        .map(|(to, from)| libc::iovec {
            iov_base: usize::try_from(*to).unwrap_or(0) as *mut libc::c_void,
            iov_len: from.len(),
        })
        .collect();
    let count = pieces.len() as libc::c_ulong;
    // SAFETY: the kernel reads `iov_len` bytes at each local address, which are vectors that long; the remote ones are
    // another process's and never followed here.
    let done = unsafe {
        libc::process_vm_writev(tid.cast_signed(), local.as_ptr(), count, remote.as_ptr(), count, 0)
    };
    match usize::try_from(done) {
        Ok(written) if written == pieces.iter().map(|(_, from)| from.len()).sum() => Ok(()),
        Ok(_) => Err(Errno::FAULT),
        Err(_) => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// Begins to trace a caller.
pub fn seize(caller: &Thread) -> Result<Seized, Unfit> {
    let seized = Seized::seize(caller.tid(), 0).map_err(|error| match (error, caller.tracer()) {
        (Errno::PERM, Ok(tracer @ 1..)) => Unfit::Traced(tracer),
        _ => Unfit::Kernel(error),
    })?;
    if caller.lives() {
        return Ok(seized);
    }
    // Whoever has the id by now is let go.
    drop(seized.interrupt()?.wait());
    Err(Unfit::Kernel(Errno::SRCH))
}

/// What a chain needs of the program that `caller` runs.
pub fn prepare(caller: &Thread) -> Result<Gadgets, Unfit> {
    if caller.has_shadow_stack()? {
        return Err(Unfit::ShadowStack);
    }
    let (mut call, mut sigreturn) = (None, None);
    let mut code = vec![0; PIECE + OVERLAP];
    for (start, end) in caller.code()? {
        for at in (start..end).step_by(PIECE) {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(code.len());
            let length = memory::read(caller.tid(), at, &mut code[..wanted])?;
            let find = |wanted: &[u8]| Some(at + memmem::find(&code[..length], wanted)? as u64);
            call = call.or_else(|| find(Gadgets::CALL));
            sigreturn = sigreturn.or_else(|| Gadgets::SIGRETURN.iter().find_map(|known| find(known)));
            if let (Some(call), Some(sigreturn)) = (call, sigreturn) {
                return Ok(Gadgets { call, sigreturn });
            }
        }
    }
    Err(Unfit::NoLibc)
}

/// How much of a program is read at once, and how much of that again with what follows.
const PIECE: usize = 256 * 1024;
const OVERLAP: usize = 16;

/// Whether the code is still where it was found.
pub fn still_there(caller: &Thread, gadgets: Gadgets) -> bool {
    let (mut call, mut sigreturn) = ([0; Gadgets::CALL.len()], [0; Gadgets::SIGRETURN[0].len()]);
    let read =
        memory::read_both(caller.tid(), (gadgets.call, &mut call), (gadgets.sigreturn, &mut sigreturn));
    read.is_ok()
        && call == Gadgets::CALL
        && Gadgets::SIGRETURN.iter().any(|known| sigreturn.starts_with(known))
}

/// Why a caller cannot be handed an `O_PATH` descriptor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Somebody else traces it.
    #[error("process {0} traces it, and only one can: let it detach")]
    Traced(u32),
    /// Its processor keeps a second stack, which the chain would disagree with.
    #[error(
        "it runs with a user-mode shadow stack; start it without (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)"
    )]
    ShadowStack,
    /// Its program has no such code.
    #[error("its program has no `syscall; ret` and no return from a signal handler, as every libc has them")]
    NoLibc,
    /// The kernel's word.
    #[error(transparent)]
    Kernel(#[from] Errno),
}
