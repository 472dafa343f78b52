//! Programs in each state that a program can be in.

use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Process, locum, until};
use crate::yard::{Busy, Yard, must_be_right};

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
fn a_dry_run_says_what_would_be_done_and_changes_nothing() {
    let yard = Yard::new();
    let would = |busy: &Busy| {
        let out = yard.command("attach", busy, &["--dry-run"]).output().unwrap();
        let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        assert!(told.ends_with("0 attached, 0 left as they are\n") == out.status.success(), "{told}");
        told
    };
    let busy = yard.start("reckon");
    // 8 are the kernel's count for the filter that it has; ours take 17 each.
    let fits = (32768 - 8) / 17 - 1;
    let wanted = format!(
        "would get a filter of 13 instructions of its own, its filter number 2; {fits} more would fit"
    );
    let told = would(&busy);
    assert!(told.contains(&wanted), "{told}");
    let other = yard.start("forbids open_by_handle_at errno");
    let told = would(&other);
    assert!(told.contains("open_by_handle_at") && told.contains("outranks ours"), "{told}");
    let vfork = yard.start("vfork");
    let told = would(&vfork);
    assert!(told.contains("none of its threads stops"), "{told}");
    assert_eq!(yard.ground.status()["sessions"].as_array().unwrap().len(), 0);
    assert!(yard.attach(&busy).0);
    let told = would(&busy);
    assert!(told.contains("is served already"), "{told}");
    must_be_right(busy);
    for busy in [other, vfork] {
        let told = must_be_right(busy);
        assert_eq!(told["served"], 0, "{told}");
    }
}

/// `--set-no-new-privs`.
#[test]
fn the_promise_is_made_for_a_program_if_asked_for() {
    let yard = Yard::new();
    let mut shell = Command::new("sh");
    shell.args(["-c", "read line; exit 7"]).stdin(Stdio::piped());
    let mut shell = Process(shell.spawn().unwrap());
    let status = || std::fs::read_to_string(format!("/proc/{}/status", shell.pid())).unwrap();
    until("the shell", || status().starts_with("Name:\tsh\n"));
    let pid = shell.pid().to_string();
    let attach = |more: &[&str]| {
        let mut attach = locum(&["attach", "--runtime-dir", yard.ground.path(), "--pid", &pid]);
        attach.args(["--policy", "attached"]).args(more).status().unwrap().success()
    };
    assert!(!attach(&[]) && !attach(&["--dry-run"]));
    assert!(status().contains("NoNewPrivs:\t0\nSeccomp:\t0\n"), "{}", status());
    assert!(attach(&["--set-no-new-privs"]));
    assert!(status().contains("NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"), "{}", status());
    drop(shell.0.stdin.take());
    assert_eq!(shell.0.wait().unwrap().code(), Some(7));
}

/// Real installations, in as many programs.
#[test]
fn many_programs_are_attached_at_once() {
    let yard = Yard::new();
    let programs: Vec<_> = (0..12).map(|_| yard.start("sleep")).collect();
    let mut all = locum(&["attach", "--runtime-dir", yard.ground.path(), "--policy", "attached", "--pid"]);
    let out = all.args(programs.iter().map(|busy| busy.process.pid().to_string())).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.ends_with("12 attached, 0 left as they are\n"), "{told}");
    yard.await_calls();
    for busy in programs {
        let told = must_be_right(busy);
        assert!(told["served"].as_u64() > Some(0), "{told}");
    }
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

/// Its filters are suspended for the calls by which it takes ours, and for no call of its own.
#[test]
fn a_program_that_insists_on_what_it_may_not_is_refused_it_all_the_time() {
    let yard = Yard::new();
    let busy = yard.start("insists");
    for round in 0..100 {
        let (good, told) = yard.attach(&busy);
        assert!(good, "round {round}: {told}");
    }
    yard.await_calls();
    must_be_right(busy);
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
