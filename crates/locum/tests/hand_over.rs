//! The monitor is killed at every step of handing an O_PATH descriptor over: the caller gets the right one each time, and
//! nothing else of it has changed. In debug builds only, which can be told where to die.
//!
//! LOCUM_CHAOS_SECONDS sets how long each variant takes.
#![cfg(debug_assertions)]

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{Ground, Process, USER, locum, until};
use serde_json::Value;

/// `locum_kernel::fault::die_at` names these.
const STEPS: std::ops::RangeInclusive<u32> = 1..=11;

fn monitor(ground: &Ground, die_at: Option<(u32, u32)>) -> Process {
    let log = std::fs::File::options().create(true).append(true).open(&ground.log).unwrap();
    let mut command = locum(&["monitor", "--runtime-dir", ground.path(), "--keys"]);
    command.arg(ground.runtime.path().join("keys")).stderr(log);
    if let Some((step, after)) = die_at {
        command.env("LOCUM_DIE_AT", step.to_string()).env("LOCUM_DIE_AFTER", after.to_string());
    }
    Process(command.spawn().unwrap())
}

/// One at a time: each wants both processors.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the caller saw, and how often a monitor died at each step.
fn intact(options: &[&str], signal_every_us: u32, keeper_too: bool) -> Value {
    let _alone = alone();
    let seconds = std::env::var("LOCUM_CHAOS_SECONDS").unwrap_or_else(|_| "20".into());
    let ground = Ground::new();
    std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = ground.files.path().join("caller");
    common::copy_caller(&program);
    let mut keeper = ground.keeper();
    let files = ground.files.path().to_str().unwrap();
    let mut run =
        locum(&["run", "--runtime-dir", ground.path(), "--export", files, "--user", &USER.to_string()]);
    run.args(options).arg("--").arg(&program).args(["as-is", "intact", files, &seconds]);
    let mut run = Process(run.arg(signal_every_us.to_string()).stdout(Stdio::piped()).spawn().unwrap());
    let mut died = [0_u32; 12];
    // Before its first call the workload has no lifeline.
    let mut first = monitor(&ground, None);
    until("the first call", || {
        let sessions = ground.status();
        sessions["sessions"].as_array().unwrap().iter().any(|one| one["calls"].as_u64() > Some(0))
    });
    first.kill();
    for step in STEPS.cycle() {
        // Not always at the first hand-over: others are under way then.
        let mut monitor = monitor(&ground, Some((step, died.iter().sum::<u32>() / 11 % 5)));
        let ended = loop {
            if run.0.try_wait().unwrap().is_some() {
                break true;
            }
            if monitor.0.try_wait().unwrap().is_some() {
                break false;
            }
            std::thread::yield_now();
        };
        if ended {
            break;
        }
        died[step as usize] += 1;
        if keeper_too {
            keeper.kill();
            keeper = ground.keeper();
        }
    }
    let mut told = String::new();
    std::io::Read::read_to_string(run.0.stdout.as_mut().unwrap(), &mut told).unwrap();
    let seen: Value =
        serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}\n{}", ground.log_tail()));
    println!("died at each step: {:?}; the caller saw {seen}", &died[1..]);
    for what in ["wrong", "failed", "damaged", "leaked"] {
        assert_eq!(seen[what], 0, "{what}: {seen}\n{}", ground.log_tail());
    }
    assert!(died[1..].iter().all(|deaths| *deaths > 0), "{died:?}\n{}", ground.log_tail());
    seen
}

#[test]
fn killed_at_every_step() {
    intact(&[], 0, false);
}

#[test]
fn killed_at_every_step_under_signals() {
    let seen = intact(&[], 500, false);
    assert_ne!(seen["signals"], 0);
}

#[test]
fn killed_at_every_step_without_wait_killable_recv() {
    intact(&["--interruptible"], 0, false);
}

#[test]
fn killed_at_every_step_without_wait_killable_recv_under_signals() {
    let seen = intact(&["--interruptible"], 500, false);
    assert_ne!(seen["signals"], 0);
}

#[test]
fn killed_at_every_step_with_the_keeper() {
    intact(&[], 0, true);
}

/// A goroutine's or a coroutine's, or one for signals: what is beside it is not ours.
#[test]
fn nothing_beside_a_small_stack_is_touched() {
    let ground = Ground::new();
    std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = ground.files.path().join("caller");
    common::copy_caller(&program);
    let (_keeper, _monitor) = (ground.keeper(), monitor(&ground, None));
    let files = ground.files.path().to_str().unwrap();
    let mut run =
        locum(&["run", "--runtime-dir", ground.path(), "--export", files, "--user", &USER.to_string()]);
    let out = run.arg("--").arg(&program).args(["as-is", "small", files]).output().unwrap();
    let seen: Value = serde_json::from_slice(&out.stdout).unwrap();
    let no_room = format!("errno {}", rustix::io::Errno::NOMEM.raw_os_error());
    assert_eq!(seen, serde_json::json!({"small": no_room, "own": "ok", "damaged": false}));
}

/// A monitor dies with its socket in the caller's table; the calling thread ends, its process lives on.
#[test]
fn what_a_thread_that_ended_was_left_with_is_put_to_use() {
    let _alone = alone();
    let ground = Ground::new();
    std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = ground.files.path().join("caller");
    common::copy_caller(&program);
    let _keeper = ground.keeper();
    let mut first = monitor(&ground, None);
    let files = ground.files.path().to_str().unwrap();
    let mut run =
        locum(&["run", "--runtime-dir", ground.path(), "--export", files, "--user", &USER.to_string()]);
    run.args(["--interruptible", "--"]).arg(&program).args(["as-is", "leave", files]);
    let mut run = Process(run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(run.0.stdout.take().unwrap()).lines();
    until("its first call", || {
        ground.status()["sessions"].as_array().unwrap().iter().any(|one| one["calls"].as_u64() > Some(0))
    });
    first.kill();
    let tell = |run: &mut Process| run.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    for round in 0..10 {
        let mut monitor = monitor(&ground, Some((2 + round % 2, round / 2)));
        tell(&mut run);
        until("the monitor's death", || monitor.0.try_wait().unwrap().is_some());
        tell(&mut run);
        assert_eq!(lines.next().unwrap().unwrap(), "left");
    }
    let _last = monitor(&ground, None);
    drop(run.0.stdin.take());
    let told = lines.next().unwrap().unwrap();
    let seen: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&seen["failed"], &seen["sockets"]), (&0.into(), &0.into()), "{}", ground.log_tail());
}
