//! The surgeon is killed, at every step.
#![cfg(debug_assertions)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Process, copy_caller, files};
use crate::yard::{Yard, must_be_right};

/// `locum_kernel::fault::die_at` names these.
const STEPS: std::ops::RangeInclusive<u32> = 21..=26;

fn seconds() -> u64 {
    std::env::var("LOCUM_CHAOS_SECONDS").map_or(15, |text| text.parse().unwrap())
}

/// The whole command: what it left is found by the next one.
#[test]
fn attaching_is_killed_and_done_again() {
    let yard = Yard::new();
    for kind in ["reckon", "sleep", "fork"] {
        for step in STEPS {
            let busy = yard.start(kind);
            let mut killed = yard.command("attach", &busy, &["--policy", "attached"]);
            let out = killed.env("LOCUM_DIE_AT", step.to_string()).output().unwrap();
            assert!(out.status.code().is_none(), "step {step}: {}", String::from_utf8_lossy(&out.stdout));
            let (good, told) = yard.attach(&busy);
            assert!(good, "after step {step}, {kind}: {told}");
            yard.await_calls();
            must_be_right(busy);
        }
    }
}

/// Attaches one program, which looks at all that is its own, as often as its filters leave room for or time is; all but every seventh
/// time the surgeon is killed, after each step in turn.
fn intact(wait: &str, signal_every_us: u32) {
    // One at a time: each wants both processors.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = files();
    let program = folder.path().join("caller");
    copy_caller(&program);
    // Its threads reckon all the time: the surgeon is not to wait for them.
    let mut target = Command::new("nice");
    target
        .args(["-n", "19"])
        .arg(&program)
        .args(["own", "attached"])
        .arg(folder.path())
        .arg(signal_every_us.to_string());
    let mut target = Process(target.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut input = target.0.stdin.take().unwrap();
    let mut said = BufReader::new(target.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut close = || -> u32 {
        writeln!(input).unwrap();
        said.next().unwrap().parse().unwrap()
    };
    // It answers when it has begun.
    assert_eq!(close(), 0);
    let (mut kills, mut left, end) = (0, 0, Instant::now() + Duration::from_secs(seconds()));
    // 6 instructions and the kernel's four for each.
    for round in 0..3000 {
        if Instant::now() > end && kills >= 60 {
            break;
        }
        let step = STEPS.clone().nth(round % 7);
        let mut surgeon = Command::new(&program);
        surgeon.args(["as-is", "surgeon"]).arg(folder.path()).arg(target.pid().to_string()).arg(wait);
        if let Some(step) = step {
            surgeon.env("LOCUM_DIE_AT", step.to_string());
        }
        let out = surgeon.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&out.stderr);
        assert!(step.is_some() || out.status.success(), "round {round}: {told}");
        // Until the last one's listener is closed, it is refused, and passes the last step.
        let died = out.status.signal() == Some(Signal::KILL.as_raw());
        assert!(step.is_none() || died || out.status.success(), "round {round}: {told}");
        kills += u32::from(died);
        left += close();
    }
    close();
    drop(input);
    let told = said.next().unwrap();
    println!(
        "{wait}, a signal every {signal_every_us} us: {kills} kills, {left} listeners left behind; {told}"
    );
    let seen: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&seen["damaged"], &seen["leaked"]), (&0.into(), &0.into()), "{told}");
    assert_eq!(seen["signals"] == 0, signal_every_us == 0, "{told}");
    assert!(left > 0, "none of {kills} surgeons left a listener behind");
}

#[test]
fn nothing_of_a_program_changes() {
    intact("killable", 0);
}

#[test]
fn nothing_of_a_program_changes_under_signals() {
    intact("killable", 500);
}

#[test]
fn nothing_of_a_program_changes_without_wait_killable_recv() {
    intact("interruptible", 0);
}

#[test]
fn nothing_of_a_program_changes_without_wait_killable_recv_under_signals() {
    intact("interruptible", 500);
}
