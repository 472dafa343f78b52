//! Calls of which only the id is known: whose they are, and having the kernel make them anew.
//!
//! The kernel names a caller once, to whoever received its call. But a descriptor is put into a caller's table by the caller
//! itself, which is woken for that and sleeps again. Under a number beyond every table's end nothing is put there, and of all
//! threads that slept, the caller is the one that has slept once more.

use std::fs;
use std::os::fd::{AsFd as _, RawFd};
use std::time::{Duration, Instant};

use crate::Errno;
use crate::fault::die_at;
use crate::hand_over::{self, Unfit};
use crate::notify::{CallId, Listener};
use crate::process::Thread;

/// A thread that sleeps in a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sleeper {
    /// Its id in our pid namespace.
    pub tid: u32,
    /// The call's number, in the thread's own architecture.
    pub nr: i32,
    /// The arguments as they stood in the registers.
    pub args: [u64; 6],
    /// Where in the program the call was made.
    pub instruction_pointer: u64,
    /// How often it has fallen asleep so far.
    naps: u64,
}

impl Sleeper {
    /// `None`: it does not sleep in a call, or has ended.
    fn look(process: u32, tid: u32) -> Option<Self> {
        let folder = format!("/proc/{process}/task/{tid}");
        // The call first: the kernel shows it of a thread that has fallen asleep, and so has counted that.
        let (nr, args, instruction_pointer) =
            parse_call(&fs::read_to_string(format!("{folder}/syscall")).ok()?)?;
        let status = fs::read(format!("{folder}/status")).ok()?;
        // A thread may name itself with any bytes.
        let status = String::from_utf8_lossy(&status);
        let naps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some(Self { tid, nr, args, instruction_pointer, naps: naps.trim().parse().ok()? })
    }
}

/// The number, the arguments and the instruction pointer, of a line of proc_pid_syscall(5).
fn parse_call(line: &str) -> Option<(i32, [u64; 6], u64)> {
    let mut words = line.split_ascii_whitespace();
    let nr = words.next()?.parse().ok().filter(|nr| *nr >= 0)?;
    let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let mut args = [0; 6];
    for arg in &mut args {
        *arg = number()?;
    }
    let (_stack_pointer, instruction_pointer) = (number()?, number()?);
    Some((nr, args, instruction_pointer))
}

/// So long has a thread slept without a break that is taken for one that waits.
const QUIET: Duration = Duration::from_millis(5);

/// Every thread that sleeps in one of `calls`, and has slept for a while: not those whose calls are being served.
pub fn sleepers(calls: &[i32]) -> Vec<Sleeper> {
    let numbers = |path: String| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
    };
    let threads = numbers("/proc".to_owned())
        .flat_map(|process| numbers(format!("/proc/{process}/task")).map(move |tid| (process, tid)));
    let sleeper = |(process, tid)| Sleeper::look(process, tid).filter(|found| calls.contains(&found.nr));
    let mut found: Vec<Sleeper> = threads.filter_map(sleeper).collect();
    std::thread::sleep(QUIET);
    found.retain(|sleeper| Sleeper::look(sleeper.tid, sleeper.tid).as_ref() == Some(sleeper));
    found
}

/// How long threads are given to fall asleep again.
const PATIENCE: Duration = Duration::from_millis(50);
/// How often the caller is woken, if others slept once more by chance.
const TRIES: usize = 20;

/// Which of `sleepers` waits for the call `id`, all of whom slept when it was last found waiting. `None`: none of them, or the call
/// does not wait any more.
pub fn caller_of(listener: &Listener, id: CallId, sleepers: &[Sleeper]) -> Option<Sleeper> {
    let now = |sleeper: &Sleeper| Sleeper::look(sleeper.tid, sleeper.tid);
    let mut left: Vec<Sleeper> = sleepers.iter().filter_map(now).collect();
    for _ in 0..TRIES {
        if matches!(
            listener.add_descriptor_at(id, listener.as_fd(), RawFd::MAX),
            Err(Errno::NOENT | Errno::SRCH)
        ) {
            return None;
        }
        // Whoever does not sleep may be the caller, on its way back. One that sleeps and has not done so once more is not.
        let deadline = Instant::now() + PATIENCE;
        let awake = |sleeper: &Sleeper| now(sleeper).is_none();
        while left.iter().any(awake) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        left.retain_mut(|sleeper| {
            let Some(seen) = now(sleeper) else { return true };
            let has_slept = seen.naps != sleeper.naps;
            *sleeper = seen;
            has_slept
        });
        match left[..] {
            [] => return None,
            [caller] if now(&caller).is_some() && listener.still_waits(id) => return Some(caller),
            _ => {}
        }
    }
    None
}

/// Has the kernel make the call `id` anew, for which `caller` is known to wait. How long it was held for that, at most.
///
/// At whichever instruction this is killed, the caller goes on waiting, or makes its call anew.
pub fn ask_again(listener: &Listener, id: CallId, caller: &Thread) -> Result<Duration, Unfit> {
    let seized = hand_over::seize(caller)?;
    die_at(32);
    let start = Instant::now();
    let interrupted = seized.interrupt()?;
    die_at(33);
    // Where a signal can take a call back, the interrupt has done so already.
    let stop = hand_over::ask_again(listener, id, interrupted)?;
    die_at(34);
    drop(stop);
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_for_a_call_are_understood() {
        let line = "304 0x3 0x7ffc0010 0x200000 0x0 0x0 0x1 0x7ffc0000 0x7f0012345678\n";
        let wanted = (304, [3, 0x7ffc_0010, 0x0020_0000, 0, 0, 1], 0x7f00_1234_5678);
        assert_eq!(parse_call(line), Some(wanted));
        for other in ["running\n", "-1 0x7ffc0000 0x7f0012345678\n", "304 0x3\n", ""] {
            assert_eq!(parse_call(other), None, "{other}");
        }
    }
}
