//! What the kernel alone charges for a delegated call: a monitor with the fewest system calls, no policy, no signature, no
//! journal, and no protection against anything. To measure against, never to serve with.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::AtomicU64;

use rustix::fs::AtFlags;

use crate::Errno;
use crate::handle::{self, Handle, MAX_BYTES};
use crate::memory;
use crate::notify::{Answer, Buffer, Listener, Notification, clear};
use crate::process::Thread;

/// Answers the calls of `listener`, all of one thread, until it ends.
pub fn serve(listener: &Listener) -> Result<(), Errno> {
    let buffer: Buffer = [const { AtomicU64::new(0) }; crate::notify::BUFFER_WORDS];
    let mut caller = None;
    loop {
        clear(&buffer);
        match listener.receive(&buffer) {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::INTR) if !listener.has_ended() => continue,
            Err(_) => return Ok(()),
        }
        let Some(call) = Notification::load(&buffer) else { continue };
        let caller = match &mut caller {
            Some(caller) => caller,
            none => none.insert(Thread::hold(call.tid)?),
        };
        let answer = match call.nr {
            nr if nr == number("name_to_handle_at") => name(listener, &call, caller),
            nr if nr == number("open_by_handle_at") => open(listener, &call, caller),
            _ => Ok(Answer::Value(0)),
        };
        let _ = listener.send(call.id, answer.unwrap_or_else(Answer::Error));
    }
}

#[expect(clippy::cast_possible_truncation, reason = "an int argument")]
fn descriptor(argument: u64) -> i32 {
    (argument as u32).cast_signed()
}

fn name(listener: &Listener, call: &Notification, caller: &Thread) -> Result<Answer, Errno> {
    let target = caller.descriptor(descriptor(call.args[0]))?;
    let (mut path, mut room) = ([0], [0; 4]);
    memory::read_both(call.tid, (call.args[1], &mut path), (call.args[2], &mut room))?;
    let named = handle::name_to_handle_at(target.as_fd(), c"", AtFlags::EMPTY_PATH)?;
    drop(target);
    if !listener.still_waits(call.id) {
        return Err(Errno::INTR);
    }
    let bytes = named.handle.bytes();
    let mut head = [0; 8 + MAX_BYTES];
    head[..4].copy_from_slice(&u32::try_from(bytes.len()).unwrap_or(0).to_ne_bytes());
    head[4..8].copy_from_slice(&named.handle.kind.to_ne_bytes());
    head[8..8 + bytes.len()].copy_from_slice(bytes);
    let mount_id = named.mount_id.to_ne_bytes();
    let pieces = [(call.args[2], &head[..8 + bytes.len()]), (call.args[3], &mount_id[..4])];
    let local = pieces
        .map(|(_, from)| libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() });
    let remote = pieces.map(|(to, from)| libc::iovec {
        iov_base: usize::try_from(to).unwrap_or(0) as *mut libc::c_void,
        iov_len: from.len(),
    });
    // SAFETY: the kernel reads `iov_len` bytes at each local address, which are slices that long; the remote ones are
    // another process's and never followed here.
    let done =
        unsafe { libc::process_vm_writev(call.tid.cast_signed(), local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
    if done < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(Answer::Value(0))
}

fn open(listener: &Listener, call: &Notification, caller: &Thread) -> Result<Answer, Errno> {
    let mut raw = [0; 8 + MAX_BYTES];
    memory::read(call.tid, call.args[1], &mut raw)?;
    let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|index| raw[at + index]));
    let bytes = raw.get(8..8 + word(0) as usize).ok_or(Errno::INVAL)?;
    let handle = Handle::new(word(4).cast_signed(), bytes).ok_or(Errno::INVAL)?;
    let mount = caller.descriptor(descriptor(call.args[0]))?;
    let file = handle::open_by_handle_at(mount.as_fd(), &handle, descriptor(call.args[2]))?;
    drop(mount);
    let number = listener.add_descriptor(call.id, file.as_fd(), false)?;
    Ok(Answer::Value(i64::from(number)))
}

fn number(name: &str) -> i32 {
    crate::arch::CALLS.iter().find(|(known, _)| *known == name).map_or(-1, |(_, nr)| *nr)
}
