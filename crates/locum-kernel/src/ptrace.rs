//! Threads that are traced: stopped for a moment, looked at, and changed at one single point. See ptrace(2).
//!
//! Every step is harmless if the tracer dies on it: the kernel then lets go of the thread, which goes on by itself. Only
//! [`Stopped::set_registers`] changes anything.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;

use crate::Errno;
use crate::arch::{NT_EXTENDED_STATE, Registers};
use crate::notify::check;
use crate::verdict::InForce;

/// A thread that this thread traces and that runs. Dropped as it is, it stays traced for as long as the calling thread lives.
#[derive(Debug)]
pub struct Seized {
    tid: u32,
    /// The kernel knows tracers as threads.
    _of_this_thread: PhantomData<*const ()>,
}

/// One that will stop before it next returns to its program, whatever becomes of the tracer's wish to see it.
#[derive(Debug)]
pub struct Interrupted(Seized);

/// One that has stopped, and goes on when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    seized: Seized,
    /// The signal that it was about to take, 0 if none.
    signal: i32,
}

/// What became of an interrupted thread.
#[derive(Debug)]
pub enum Stop {
    /// It stands where the interrupt caught it.
    Caught(Stopped),
    /// It was about to take a signal, and takes it now.
    Signalled,
    /// It has ended.
    Gone,
    /// It has not stopped in time: it waits in the kernel for what no signal ends.
    Never,
}

impl Seized {
    /// Begins to trace the thread `tid`; `options` are PTRACE_O_*. Not PTRACE_O_SUSPEND_SECCOMP: it goes on running meanwhile.
    ///
    /// EPERM: it may not be traced (CAP_SYS_PTRACE), it is traced already, or it is a kernel thread. ESRCH: there is none such.
    pub fn seize(tid: u32, options: i32) -> Result<Self, Errno> {
        request(libc::PTRACE_SEIZE, tid, 0, usize::try_from(options).unwrap_or(0))?;
        Ok(Self { tid, _of_this_thread: PhantomData })
    }

    /// Has it stop: at once if it runs or sleeps in a system call that a signal may end, else at the end of its system call.
    pub fn interrupt(self) -> Result<Interrupted, Errno> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)?;
        Ok(Interrupted(self))
    }
}

impl Seized {
    fn stop(self, status: libc::c_int) -> Stop {
        if !libc::WIFSTOPPED(status) {
            return Stop::Gone;
        }
        if status >> 16 == libc::PTRACE_EVENT_STOP {
            return Stop::Caught(Stopped { seized: self, signal: 0 });
        }
        drop(Stopped { seized: self, signal: libc::WSTOPSIG(status) });
        Stop::Signalled
    }
}

impl Interrupted {
    /// Waits until it has stopped.
    pub fn wait(self) -> Result<Stop, Errno> {
        let seized = self.0;
        let mut status = 0;
        retry_on_intr(|| {
            // SAFETY: the kernel writes one int at this address, which is ours.
            check(unsafe { libc::waitpid(seized.tid.cast_signed(), &raw mut status, libc::__WALL) })
        })?;
        Ok(seized.stop(status))
    }
}

impl Interrupted {
    /// Waits until it has stopped, at most so long, and if it is about to take a signal, until it has begun to. [`Stop::Never`]
    /// leaves it traced until the calling thread ends.
    pub fn wait_for(self, limit: Duration) -> Result<Stop, Errno> {
        let start = Instant::now();
        loop {
            let mut status = 0;
            let flags = libc::__WALL | libc::WNOHANG;
            // SAFETY: the kernel writes one int at this address, which is ours.
            let done = check(unsafe { libc::waitpid(self.0.tid.cast_signed(), &raw mut status, flags) })?;
            if done != 0 {
                if !libc::WIFSTOPPED(status) || status >> 16 == libc::PTRACE_EVENT_STOP {
                    return Ok(self.0.stop(status));
                }
                // This stop has taken the interrupt away.
                request(libc::PTRACE_INTERRUPT, self.0.tid, 0, 0)?;
                let signal = usize::try_from(libc::WSTOPSIG(status)).unwrap_or(0);
                request(libc::PTRACE_CONT, self.0.tid, 0, signal)?;
                continue;
            }
            if start.elapsed() > limit {
                return Ok(Stop::Never);
            }
            // Nothing tells of both a stop and a time.
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Stopped {
    /// Its id.
    pub fn tid(&self) -> u32 {
        self.seized.tid
    }

    /// The general registers.
    pub fn registers(&self) -> Result<Registers, Errno> {
        let mut registers = MaybeUninit::<Registers>::zeroed();
        let mut area =
            libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of::<Registers>() };
        request(libc::PTRACE_GETREGSET, self.tid(), libc::NT_PRSTATUS, &raw mut area as usize)?;
        if area.iov_len != size_of::<Registers>() {
            // A 32-bit thread has fewer.
            return Err(Errno::OPNOTSUPP);
        }
        // SAFETY: made of integers, of which the kernel has just written every one.
        Ok(unsafe { registers.assume_init() })
    }

    /// Has it go on from other registers: the one change that is ever made to it.
    pub fn set_registers(&self, registers: &Registers) -> Result<(), Errno> {
        let area = libc::iovec {
            iov_base: std::ptr::from_ref(registers).cast_mut().cast(),
            iov_len: size_of::<Registers>(),
        };
        request(libc::PTRACE_SETREGSET, self.tid(), libc::NT_PRSTATUS, &raw const area as usize).map(drop)
    }

    /// The state of its floating point and vector unit, as the kernel lays it out for the processor; as much as fits.
    pub fn extended_state(&self, into: &mut Vec<u8>) -> Result<(), Errno> {
        let mut area = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.capacity() };
        request(libc::PTRACE_GETREGSET, self.tid(), NT_EXTENDED_STATE, &raw mut area as usize)?;
        // SAFETY: the kernel wrote `iov_len` bytes, at most the capacity, from the beginning.
        unsafe { into.set_len(area.iov_len) };
        Ok(())
    }

    /// The signals that it blocks.
    pub fn signal_mask(&self) -> Result<u64, Errno> {
        let mut mask = 0_u64;
        request(PTRACE_GETSIGMASK, self.tid(), 8, &raw mut mask as usize)?;
        Ok(mask)
    }

    /// Blocks `mask` in place of what it blocks.
    pub fn set_signal_mask(&self, mask: u64) -> Result<(), Errno> {
        request(PTRACE_SETSIGMASK, self.tid(), 8, &raw const mask as usize).map(drop)
    }
}

impl Stopped {
    /// The filters that are in force for it, the newest first. EACCES: no CAP_SYS_ADMIN, or the calling thread has a filter.
    pub fn filters(&self) -> Result<InForce, Errno> {
        let mut filters = Vec::new();
        loop {
            let length = match request(PTRACE_SECCOMP_GET_FILTER, self.tid(), filters.len(), 0) {
                Err(Errno::NOENT) => return Ok(InForce(filters)),
                // It has never had any.
                Err(Errno::INVAL) if filters.is_empty() => return Ok(InForce(filters)),
                length => usize::try_from(length?).map_err(|_| Errno::OVERFLOW)?,
            };
            let mut program = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; length];
            request(PTRACE_SECCOMP_GET_FILTER, self.tid(), filters.len(), program.as_mut_ptr() as usize)?;
            filters.push(program);
        }
    }

    /// Suspends its filters while it goes on, or no longer. EPERM: no CAP_SYS_ADMIN, or the calling thread has a filter.
    pub fn suspend_filters(&self, suspend: bool) -> Result<(), Errno> {
        let options = libc::PTRACE_O_TRACESYSGOOD | if suspend { SUSPEND_SECCOMP } else { 0 };
        request(libc::PTRACE_SETOPTIONS, self.tid(), 0, usize::try_from(options).unwrap_or(0)).map(drop)
    }

    /// Lets it go on until it comes to the next beginning or end of a system call. Signals on the way are delivered. `None`: it
    /// has ended. Only with PTRACE_O_TRACESYSGOOD.
    pub fn next_call(mut self) -> Result<Option<Self>, Errno> {
        loop {
            let signal = usize::try_from(std::mem::take(&mut self.signal)).unwrap_or(0);
            request(libc::PTRACE_SYSCALL, self.tid(), 0, signal)?;
            let mut status = 0;
            retry_on_intr(|| {
                // SAFETY: the kernel writes one int at this address, which is ours.
                check(unsafe { libc::waitpid(self.tid().cast_signed(), &raw mut status, libc::__WALL) })
            })?;
            if !libc::WIFSTOPPED(status) {
                return Ok(None);
            }
            match libc::WSTOPSIG(status) {
                CALL_STOP => return Ok(Some(self)),
                _ if status >> 16 != 0 => {}
                signal => self.signal = signal,
            }
        }
    }
}

/// `PTRACE_O_SUSPEND_SECCOMP` (`linux/ptrace.h`, 4.3).
const SUSPEND_SECCOMP: libc::c_int = 1 << 21;
/// `PTRACE_SECCOMP_GET_FILTER` (`linux/ptrace.h`, 4.4).
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
/// `SIGTRAP | 0x80`: a stop at a system call, with PTRACE_O_TRACESYSGOOD.
const CALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;

impl Drop for Stopped {
    fn drop(&mut self) {
        // ESRCH: it was killed meanwhile, and nobody is left to let go.
        let _ = request(libc::PTRACE_DETACH, self.seized.tid, 0, usize::try_from(self.signal).unwrap_or(0));
    }
}

/// `PTRACE_GETSIGMASK` and `PTRACE_SETSIGMASK` (`linux/ptrace.h`, 3.11).
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;

fn request(
    request: libc::c_uint,
    tid: u32,
    address: impl TryInto<usize>,
    data: usize,
) -> Result<libc::c_long, Errno> {
    let address = address.try_into().map_err(|_| Errno::INVAL)?;
    // SAFETY: of the requests made here, those that write memory of ours are given the address of a whole object of the
    // size that they write, borrowed or owned by the caller; the others take numbers.
    let done = unsafe { libc::ptrace(request, tid.cast_signed(), address, data) };
    if done < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(done)
}
