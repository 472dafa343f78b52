//! What seccomp filters that are in force already say of a call: whether a filter of ours, put behind them, would hear of it.
//!
//! A filter is a classic BPF program (`linux/filter.h`). It is followed along every path that it may take for a call with this
//! number, whatever the arguments.

use std::collections::HashSet;

use crate::arch::AUDIT_ARCH;
use crate::filter::{self, Origin};

/// What a filter has happen to a call, the gravest first: of several filters' actions, the first in this order counts
/// (seccomp(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The process or thread is killed.
    Kill,
    /// It gets SIGSYS.
    Trap,
    /// The call fails.
    Errno,
    /// A listener is asked.
    Notify,
    /// A tracer is asked; or the call is logged, or allowed.
    Allow,
}

impl Action {
    fn of(value: u32) -> Self {
        match value & libc::SECCOMP_RET_ACTION_FULL {
            libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG | libc::SECCOMP_RET_TRACE => Self::Allow,
            libc::SECCOMP_RET_USER_NOTIF => Self::Notify,
            libc::SECCOMP_RET_ERRNO => Self::Errno,
            libc::SECCOMP_RET_TRAP => Self::Trap,
            // What the kernel does not know, it kills for.
            _ => Self::Kill,
        }
    }
}

/// The filters that a thread is under, the newest first.
#[derive(Clone, Debug, Default)]
pub struct InForce(pub(crate) Vec<Vec<libc::sock_filter>>);

impl InForce {
    /// What the kernel counts of them: their instructions, and four for each.
    pub fn instructions(&self) -> usize {
        self.0.iter().map(|filter| filter.len() + OVERHEAD).sum()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The newest one's [text](crate::filter::Filter::to_text).
    pub fn newest(&self) -> Option<String> {
        self.0.first().map(|filter| filter::text(filter))
    }

    /// How many more filters of `length` instructions the kernel takes.
    pub fn room(&self, length: usize) -> usize {
        room(self.instructions(), 0, length)
    }

    /// Who put each filter in that may ask a listener; `None` for one that no locum put in from outside.
    pub fn origins(&self) -> Vec<Option<Origin>> {
        let asks = |filter: &&Vec<libc::sock_filter>| {
            filter.iter().any(|step| {
                u32::from(step.code) == libc::BPF_RET | libc::BPF_K && Action::of(step.k) == Action::Notify
            })
        };
        self.0.iter().filter(asks).map(|filter| Origin::of(filter)).collect()
    }

    /// Whether the filter with this [text](crate::filter::Filter::to_text) is one of them.
    pub fn have(&self, text: &str) -> bool {
        self.0.iter().any(|filter| filter::text(filter) == text)
    }

    /// The mildest and the gravest of what they may have happen to the call number `nr`.
    pub fn of_call(&self, nr: i32) -> (Action, Action) {
        of_call(&self.0, nr)
    }
}

/// How many more filters of `length` instructions the kernel takes at least, where it counts `instructions` for those that are known
/// and there are `others`.
pub fn room(instructions: usize, others: usize, length: usize) -> usize {
    let used = instructions.saturating_add(others.saturating_mul(LONGEST + OVERHEAD));
    MOST_INSTRUCTIONS.saturating_sub(used) / (length + OVERHEAD)
}

/// `BPF_MAXINSNS`: no filter is longer.
const LONGEST: usize = 4096;
/// `MAX_INSNS_PER_PATH`, and what a filter costs beside its instructions (`kernel/seccomp.c`).
const MOST_INSTRUCTIONS: usize = 32768;
const OVERHEAD: usize = 4;

fn of_call(filters: &[Vec<libc::sock_filter>], nr: i32) -> (Action, Action) {
    let each = filters.iter().map(|filter| paths(filter, nr.cast_unsigned()));
    each.fold((Action::Allow, Action::Allow), |(mild, grave), found| {
        let mildest = found.iter().max().copied().unwrap_or(Action::Kill);
        let gravest = found.iter().min().copied().unwrap_or(Action::Kill);
        (mild.min(mildest), grave.min(gravest))
    })
}

/// A register or word of the scratch memory; `None`: it depends on the arguments.
type Word = Option<u32>;

#[derive(Clone, PartialEq, Eq, Hash)]
struct At {
    instruction: usize,
    accumulator: Word,
    index: Word,
    memory: [Word; 16],
}

/// Every action that `filter` may end with. Nothing, if it cannot be followed.
fn paths(filter: &[libc::sock_filter], nr: u32) -> HashSet<Action> {
    /// More states than any filter has that the kernel takes and somebody wrote.
    const MOST: usize = 200_000;
    let start = At { instruction: 0, accumulator: Some(0), index: Some(0), memory: [Some(0); 16] };
    let (mut open, mut seen, mut ends) = (vec![start], HashSet::new(), HashSet::new());
    while let Some(at) = open.pop() {
        let Some(step) = filter.get(at.instruction) else { return HashSet::new() };
        if seen.len() > MOST {
            return HashSet::new();
        }
        if !seen.insert(at.clone()) {
            continue;
        }
        match follow(&at, *step, nr) {
            Some(Next::End(action)) => {
                ends.insert(action);
            }
            Some(Next::Go(next)) => open.extend(next),
            None => return HashSet::new(),
        }
    }
    ends
}

enum Next {
    End(Action),
    Go(Vec<At>),
}

/// One instruction. `None`: one that seccomp does not take.
fn follow(at: &At, step: libc::sock_filter, nr: u32) -> Option<Next> {
    use libc::{BPF_ABS, BPF_IMM, BPF_LEN, BPF_MEM, BPF_X};
    let code = u32::from(step.code);
    let mut next = At { instruction: at.instruction + 1, ..at.clone() };
    let place = usize::try_from(step.k).ok();
    let operand = if code & 0x08 == BPF_X { at.index } else { Some(step.k) };
    match code & 0x07 {
        libc::BPF_LD | libc::BPF_LDX => {
            let word = match code & 0xe0 {
                BPF_IMM => Some(step.k),
                // `struct seccomp_data`: number, architecture, instruction pointer, arguments.
                BPF_ABS => match step.k {
                    0 => Some(nr),
                    4 => Some(AUDIT_ARCH),
                    _ => None,
                },
                BPF_MEM => *at.memory.get(place?)?,
                BPF_LEN => Some(64),
                _ => return None,
            };
            if code & 0x07 == libc::BPF_LD { next.accumulator = word } else { next.index = word }
        }
        libc::BPF_ST => *next.memory.get_mut(place?)? = at.accumulator,
        libc::BPF_STX => *next.memory.get_mut(place?)? = at.index,
        libc::BPF_ALU => next.accumulator = calculate(code & 0xf0, at.accumulator, operand)?,
        libc::BPF_JMP => {
            let to = |offset: u32| {
                Some(At { instruction: next.instruction + usize::try_from(offset).ok()?, ..next.clone() })
            };
            if code & 0xf0 == libc::BPF_JA {
                return Some(Next::Go(vec![to(step.k)?]));
            }
            let (yes, no) = (to(step.jt.into())?, to(step.jf.into())?);
            let (Some(left), Some(right)) = (at.accumulator, operand) else {
                return Some(Next::Go(vec![yes, no]));
            };
            let holds = match code & 0xf0 {
                libc::BPF_JEQ => left == right,
                libc::BPF_JGT => left > right,
                libc::BPF_JGE => left >= right,
                libc::BPF_JSET => left & right != 0,
                _ => return None,
            };
            return Some(Next::Go(vec![if holds { yes } else { no }]));
        }
        libc::BPF_RET => {
            let value = if code & 0x18 == 0x10 { at.accumulator } else { Some(step.k) };
            // An action made of an argument may be any.
            return Some(Next::End(value.map_or(Action::Kill, Action::of)));
        }
        _ if code & 0xf8 == libc::BPF_TXA => next.accumulator = at.index,
        _ => next.index = at.accumulator,
    }
    Some(Next::Go(vec![next]))
}

fn calculate(operation: u32, left: Word, right: Word) -> Option<Word> {
    let both = |of: fn(u32, u32) -> u32| left.zip(right).map(|(left, right)| of(left, right));
    Some(match operation {
        libc::BPF_ADD => both(u32::wrapping_add),
        libc::BPF_SUB => both(u32::wrapping_sub),
        libc::BPF_MUL => both(u32::wrapping_mul),
        libc::BPF_DIV => left.zip(right).and_then(|(left, right)| left.checked_div(right)),
        libc::BPF_AND => both(|left, right| left & right),
        libc::BPF_OR => both(|left, right| left | right),
        0xa0 => both(|left, right| left ^ right),
        libc::BPF_LSH => both(|left, right| left.checked_shl(right).unwrap_or(0)),
        libc::BPF_RSH => both(|left, right| left.checked_shr(right).unwrap_or(0)),
        libc::BPF_NEG => left.map(u32::wrapping_neg),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
        libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k }
    }

    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const IF: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

    /// Call 1 fails, call 2 fails if its first argument is 7, call 3 kills, all others are allowed.
    fn filter() -> Vec<libc::sock_filter> {
        vec![
            step(LOAD, 0, 0, 0),
            step(IF, 1, 4, 0),
            step(IF, 3, 4, 0),
            step(IF, 2, 0, 4),
            step(LOAD, 16, 0, 0),
            step(IF, 7, 0, 2),
            step(RETURN, libc::SECCOMP_RET_ERRNO | 1, 0, 0),
            step(RETURN, libc::SECCOMP_RET_KILL_PROCESS, 0, 0),
            step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
        ]
    }

    #[test]
    fn every_path_is_followed() {
        let one = [filter()];
        assert_eq!(of_call(&one, 1), (Action::Errno, Action::Errno));
        assert_eq!(of_call(&one, 2), (Action::Allow, Action::Errno));
        assert_eq!(of_call(&one, 3), (Action::Kill, Action::Kill));
        assert_eq!(of_call(&one, 4), (Action::Allow, Action::Allow));
        assert_eq!(of_call(&[], 1), (Action::Allow, Action::Allow));
    }

    #[test]
    fn of_several_filters_the_gravest_counts() {
        let allow = vec![step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0)];
        let notify = vec![step(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0)];
        assert_eq!(of_call(&[allow.clone(), filter(), notify.clone()], 1).0, Action::Errno);
        assert_eq!(of_call(&[allow, notify], 1), (Action::Notify, Action::Notify));
    }

    #[test]
    fn there_is_room_for_as_many_filters_as_the_kernel_counts() {
        let two = InForce(vec![filter(), filter()]);
        assert_eq!((two.count(), two.instructions()), (2, 26));
        assert_eq!(two.room(13), (32768 - 26) / 17);
        assert_eq!(room(0, 0, 32764), 1);
        assert_eq!(room(0, 0, 32765), 0);
        assert_eq!(room(26, 1, 13), (32768 - 26 - 4100) / 17);
        assert_eq!(room(26, 100, 13), 0);
    }

    #[test]
    fn what_is_no_filter_is_taken_for_the_worst() {
        assert_eq!(of_call(&[vec![]], 1).0, Action::Kill);
        assert_eq!(of_call(&[vec![step(0xffff, 0, 0, 0)]], 1).0, Action::Kill);
        assert_eq!(of_call(&[vec![step(IF, 1, 255, 255)]], 1).0, Action::Kill);
    }
}
