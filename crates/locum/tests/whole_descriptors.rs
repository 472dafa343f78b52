//! The monitor is killed at every step of handing an open file over, again and again, in each recovery of what the one before it
//! left too: the caller has the right file once, and no other. In debug builds only, which can be told where to die.
#![cfg(debug_assertions)]

mod common;

use std::sync::{Mutex, PoisonError};

use common::{Ground, until};

/// park and note, if the call cannot be repeated; mark, ADDFD, note, unmark, note, SEND, settle, take: `locum_kernel::fault::die_at`
/// names these.
const STEPS: std::ops::RangeInclusive<u32> = 21..=30;
fn killed_at_every_step(run: &[&str], traffic: &[&str], keeper_too: bool) {
    // One at a time: each wants both processors.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ground = Ground::new();
    let mut keeper = ground.keeper();
    let mut first = ground.monitor();
    let seconds = std::env::var("LOCUM_CHAOS_SECONDS").unwrap_or_else(|_| "15".into());
    let all = ["--threads", "4", "--truncate", "--seconds", &seconds];
    let traffic = ground.traffic(run, &[&all, traffic].concat());
    // Before its first call the workload has no lifeline.
    until("the first call", || traffic.number("calls") > 0);
    first.kill();
    let mut died = [0_u32; 10];
    for (step, deaths) in STEPS.zip(0..).cycle() {
        // Not always at the first hand-over: others are under way then.
        let mut monitor = ground.mortal_monitor(step, died[deaths] % 5);
        until("a death or the end", || traffic.has_ended() || monitor.0.try_wait().unwrap().is_some());
        if traffic.has_ended() {
            break;
        }
        died[deaths] += 1;
        if keeper_too {
            keeper.kill();
            keeper = ground.keeper();
        }
    }
    let (status, report) = traffic.finish();
    println!("died at each step: {died:?}; {report}");
    assert_eq!(report["done"], true, "{status}: {report}\n{}", ground.log_tail());
    for what in ["wrong", "failed", "leaked"] {
        assert_eq!(report[what], 0, "{what}: {report}\n{}", ground.log_tail());
    }
    assert!(died.iter().all(|deaths| *deaths > 0), "{died:?}\n{}", ground.log_tail());
}

#[test]
fn of_a_caller_that_waits_killably() {
    killed_at_every_step(&[], &[], false);
}

#[test]
fn of_a_caller_that_can_be_interrupted() {
    killed_at_every_step(&["--interruptible"], &[], false);
}

#[test]
fn of_a_caller_with_signals() {
    killed_at_every_step(&[], &["--signals", "500"], false);
}

/// A park dies with the keeper; the mark is left.
#[test]
fn with_the_keeper() {
    killed_at_every_step(&[], &[], true);
}
