//! Programs in each state that a program can be in.

use rustix::process::{Pid, Signal, kill_process};

use crate::common::until;
use crate::yard::{Yard, must_be_right};

#[test]
fn programs_in_each_state_are_attached() {
    let yard = Yard::new();
    for kind in ["reckon", "sleep", "fork", "leader gone"] {
        let busy = yard.start(kind);
        let (good, told) = yard.attach(&busy);
        assert!(good && told.contains(": attached"), "{kind}: {told}");
        yard.await_calls();
        let told = must_be_right(busy);
        assert!(told["served"].as_u64() > Some(0), "{kind}: {told}");
        until("no session", || yard.ground.status()["sessions"].as_array().unwrap().is_empty());
    }
}

#[test]
fn a_stopped_program_is_attached_and_stays_stopped() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    let pid = Pid::from_raw(busy.process.pid().cast_signed()).unwrap();
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", busy.process.pid())).unwrap();
        stat.rsplit_once(')').unwrap().1.trim().chars().next().unwrap()
    };
    kill_process(pid, Signal::STOP).unwrap();
    until("a stopped program", || state() == 'T');
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains(": attached"), "{told}");
    until("a stopped program", || state() == 'T');
    kill_process(pid, Signal::CONT).unwrap();
    yard.await_calls();
    must_be_right(busy);
}

#[test]
fn a_dry_run_changes_nothing() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    let out = yard.command("attach", &busy, &["--dry-run"]).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.contains("would get a filter"), "{told}");
    let told = must_be_right(busy);
    assert_eq!(told["served"], 0, "{told}");
}

#[test]
fn two_hundred_rounds_of_attach_and_detach_leave_a_program_right() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    for round in 0..200 {
        let (good, told) = yard.attach(&busy);
        assert!(good, "round {round}: {told}");
        let out = yard.command("detach", &busy, &[]).output().unwrap();
        assert!(out.status.success(), "round {round}: {}", String::from_utf8_lossy(&out.stderr));
    }
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains("attached again"), "{told}");
    yard.await_calls();
    must_be_right(busy);
}

/// Goroutines and coroutines have stacks that are parts of other memory; there is nothing to be written there.
#[test]
fn a_program_on_small_stacks_is_attached_and_nothing_beside_them_is_touched() {
    let yard = Yard::new();
    let busy = yard.start("small stacks");
    for _ in 0..3 {
        let (good, told) = yard.attach(&busy);
        assert!(good && told.contains(": "), "{told}");
    }
    let told = must_be_right(busy);
    assert_eq!(told["served"], 1, "{told}");
}

/// Who is about to take a signal when it is to stop, stops when it has begun to.
#[test]
fn a_program_under_a_storm_of_signals_is_attached_every_time() {
    let yard = Yard::new();
    let busy = yard.start("storm");
    for round in 0..100 {
        let (good, told) = yard.attach(&busy);
        assert!(good, "round {round}: {told}");
    }
    yard.await_calls();
    must_be_right(busy);
}
