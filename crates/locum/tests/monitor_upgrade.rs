//! Promise 6: monitors take each other's place while eight threads make checked calls, some of them killed in the middle of it.
//! Nothing is wrong, lost or leaked, nobody waits for long.
//!
//! LOCUM_CHAOS_SEED repeats the choices of a run that failed.

mod common;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::chaos::{Watchdog, must_be_clean, quiet};
use common::{Ground, Process, Random, Traffic, is_alive, list, locum, until};
use rustix::process::{Pid, Signal, kill_process};

/// One at a time: they would take the processors from each other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stops `process`, unless it is gone.
fn stop(process: &Process) {
    let pid = Pid::from_raw(process.pid().cast_signed()).unwrap();
    let _ = kill_process(pid, Signal::STOP);
}

/// Another monitor in the place of `old`, which ends in order.
fn upgrade(ground: &Ground, old: &mut Process) {
    let new = ground.successor();
    assert_eq!(old.0.wait().unwrap().code(), Some(0), "{}", ground.log_tail());
    *old = new;
}

/// Eight threads for `seconds`, with `during` done again and again. How long the longest call took, in microseconds.
fn window(ground: &Ground, seconds: &str, mut during: impl FnMut()) -> u64 {
    let traffic = ground.traffic(&[], &["--threads", "8", "--seconds", seconds]);
    let mut watchdog = Watchdog::new();
    while !traffic.has_ended() {
        during();
        watchdog.look(ground, &traffic);
    }
    must_be_clean(ground, traffic, 0)["longest_us"].as_u64().unwrap()
}

#[test]
fn a_thousand_upgrades_cost_no_call() {
    let _alone = alone();
    let ground = Ground::new();
    let keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let mut monitor = ground.monitor();
    let (mut upgrades, mut pairs) = (0, Vec::new());
    while upgrades < 1000 {
        let without = window(&ground, "4", || std::thread::sleep(Duration::from_millis(20)));
        let with = window(&ground, "4", || {
            upgrade(&ground, &mut monitor);
            upgrades += 1;
        });
        pairs.push((without, with));
    }
    let longest = |of: fn(&(u64, u64)) -> u64| pairs.iter().map(of).max().unwrap();
    let mut ratios: Vec<f64> = pairs.iter().map(|(without, with)| *with as f64 / *without as f64).collect();
    ratios.sort_by(f64::total_cmp);
    println!(
        "{upgrades} upgrades; the longest call of each 4 s without and with them, in us: {pairs:?}; of all: {} and {}; median ratio {:.2}",
        longest(|pair| pair.0),
        longest(|pair| pair.1),
        ratios[ratios.len() / 2]
    );
    assert!(
        fs::read_to_string(&ground.log).unwrap().matches("finishing what is in the making").count() >= 1000
    );
    drop(monitor);
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
}

/// One of the two, both, or the keeper, at any moment of an upgrade.
fn killed(run: &[&str], traffic: &[&str], leaks: u64) {
    let _alone = alone();
    let mut random = Random::new();
    let ground = Ground::new();
    let mut keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let mut monitor = ground.monitor();
    let traffic = ground.traffic(run, &[&["--threads", "8", "--seconds", "12"], traffic].concat());
    until("the first calls", || traffic.number("calls") > 0);
    let mut watchdog = Watchdog::new();
    let mut rounds = [0; 5];
    while !traffic.has_ended() {
        let mut new = ground.start_successor();
        std::thread::sleep(random.micros(0, 40_000));
        let choice = usize::try_from(random.micros(0, 5).as_micros()).unwrap();
        match choice {
            0 => monitor.kill(),
            1 => new.kill(),
            2 => {
                monitor.kill();
                new.kill();
            }
            3 => {
                keeper.kill();
                keeper = ground.keeper();
            }
            _ => {
                // It hangs, and somebody notices in the end.
                stop(&monitor);
                std::thread::sleep(random.micros(0, 40_000));
                monitor.kill();
            }
        }
        rounds[choice] += 1;
        if choice != 1 && choice != 2 {
            until("the new one's turn", || ground.status()["monitor"]["pid"] == new.pid());
            // It is gone, or goes.
            let _ = monitor.0.wait();
            monitor = new;
        }
        watchdog.look(&ground, &traffic);
    }
    let report = must_be_clean(&ground, traffic, leaks);
    println!("old, new, both, keeper killed, old stopped and killed: {rounds:?}, {report}");
    drop(monitor);
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
}

#[test]
fn killed_in_the_middle() {
    killed(&[], &[], 0);
}

/// Calls are withdrawn, and made anew, while two monitors are there: at most one descriptor for every thousand signals stays behind,
/// hardly more than without upgrades.
#[test]
fn killed_in_the_middle_without_wait_killable_recv_with_signals() {
    killed(&["--interruptible"], &["--signals", "1000"], 12);
}

fn more_calls(traffic: &Traffic) {
    let before = traffic.number("calls");
    until("calls", || traffic.number("calls") > before + 100);
}

/// Whatever is wrong with the new one, the old one serves on, and the command says why.
#[test]
fn one_that_cannot_serve_leaves_the_old_one_in_its_place() {
    let _alone = alone();
    let ground = Ground::new();
    let keeper = ground.keeper();
    let monitor = ground.monitor();
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "120"]);
    until("calls", || traffic.number("calls") > 0);
    let keys = ground.runtime.path().join("keys");
    let replace = |more: &[&str]| {
        let mut command = locum(&["monitor", "--replace", "--keys", keys.to_str().unwrap()]);
        let output = command.args(["--runtime-dir", ground.path()]).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(ground.status()["monitor"]["pid"], monitor.pid(), "{said}");
        more_calls(&traffic);
        said
    };
    // It cannot start.
    let said = replace(&["--policy", "/nowhere/policy.toml"]);
    assert!(said.contains("cannot read the policy file /nowhere/policy.toml"), "{said}");
    // What a session is served with is not there any more for one that comes now.
    let sessions = ground.runtime.path().join("sessions");
    let session = sessions.join(&list(&sessions)[0]);
    let policies = ground.runtime.path().join("policies");
    let policy = policies.join(&list(&policies)[0]);
    let away = ground.runtime.path().join("away");
    let whoever = "this monitor cannot take over, whoever served serves on: session run-";
    for (path, why) in [(policy, "there is no policy "), (session.join("journal"), "is not a journal")] {
        fs::rename(&path, &away).unwrap();
        if path.ends_with("journal") {
            fs::write(&path, [b'x'; 5000]).unwrap();
        }
        let said = replace(&[]);
        assert!(said.contains(whoever) && said.contains(why), "{said}");
        fs::rename(&away, &path).unwrap();
    }
    let report = traffic.report();
    assert_eq!((&report["failed"], &report["wrong"]), (&0.into(), &0.into()), "{}", ground.log_tail());
    // And then it can.
    let successor = ground.successor();
    more_calls(&traffic);
    drop((successor, keeper));
}

#[test]
fn it_goes_on_in_the_background_if_it_is_to() {
    let _alone = alone();
    let ground = Ground::new();
    let _keeper = ground.keeper();
    let mut monitor = ground.monitor();
    until("a monitor", || ground.status()["monitor"]["pid"] == monitor.pid());
    let keys = ground.runtime.path().join("keys");
    let detach = |keys: &str| {
        let mut command = locum(&["monitor", "--replace", "--detach", "--keys", keys]);
        let log = fs::File::options().append(true).open(&ground.log).unwrap();
        command.args(["--runtime-dir", ground.path()]).stderr(log).status().unwrap().code()
    };
    assert_eq!(detach("/proc/nowhere"), Some(1));
    assert_eq!(ground.status()["monitor"]["pid"], monitor.pid());
    assert_eq!(detach(keys.to_str().unwrap()), Some(0), "{}", ground.log_tail());
    let pid = u32::try_from(ground.status()["monitor"]["pid"].as_u64().unwrap()).unwrap();
    assert_eq!(monitor.0.wait().unwrap().code(), Some(0));
    let parent = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let own = format!("PPid:\t{}", std::process::id());
    assert!(is_alive(pid) && !parent.lines().any(|line| line == own), "{parent}");
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    until("its end", || !is_alive(pid));
}

/// A call that takes longer than the old one may stay. Calls stall on demand in debug builds alone.
#[cfg(debug_assertions)]
#[test]
fn what_the_old_one_does_not_finish_goes_to_the_new_one() {
    use std::os::unix::fs::PermissionsExt;
    let _alone = alone();
    let ground = Ground::new();
    let _keeper = ground.keeper();
    let mut monitor = ground.monitor();
    fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let (program, files) = (ground.files.path().join("caller"), ground.files.path().to_str().unwrap());
    common::copy_caller(&program);
    fs::write(ground.files.path().join("file"), "file").unwrap();
    let mut run = locum(&["run", "--runtime-dir", ground.path(), "--export", files, "--user", "65534", "--"]);
    run.arg(&program).args(["as-is", "fault", files, "stall"]);
    let _run = Process(run.spawn().unwrap());
    let number = |name: &str| ground.status()["sessions"][0][name].as_u64().unwrap_or(0);
    until("calls beside the one that stalls", || number("calls") > 200);
    let start = std::time::Instant::now();
    upgrade(&ground, &mut monitor);
    assert!(start.elapsed() > Duration::from_secs(4), "it was given its time: {:?}", start.elapsed());
    until("the call in the hands of the new one", || number("recovered") == 1);
}

/// It hangs between a caller's answer and the note that it was given: the caller's next call waits for its end, and is not late.
#[cfg(debug_assertions)]
#[test]
fn one_that_hangs_is_killed_before_a_call_is_late() {
    let _alone = alone();
    let ground = Ground::new();
    let _keeper = ground.keeper();
    let keys = ground.runtime.path().join("keys");
    let log = || fs::File::options().create(true).append(true).open(&ground.log).unwrap();
    let mut old = locum(&["monitor", "--runtime-dir", ground.path(), "--keys"]);
    old.arg(&keys).stderr(log()).env("LOCUM_STOP_AT", "28").env("LOCUM_DIE_AFTER", "50");
    let mut old = Process(old.spawn().unwrap());
    let policy = ground.runtime.path().join("policy.toml");
    let calls = "calls = [\"name_to_handle_at\", \"open_by_handle_at\"]";
    fs::write(&policy, format!("[p]\n{calls}\nscope = \"x\"\n[p.limits]\ndeadline_ms = 9000\n")).unwrap();
    let policy = ["--policy", policy.to_str().unwrap()];
    let traffic = ground.traffic(&policy, &["--threads", "1", "--seconds", "60"]);
    let hangs = || fs::read_to_string(format!("/proc/{}/stat", old.pid())).unwrap().contains(") T ");
    until("it to hang", hangs);
    let mut replace = locum(&["monitor", "--replace", "--detach", "--runtime-dir", ground.path(), "--keys"]);
    let replaced = replace.arg(&keys).env("MAINPID", old.pid().to_string()).stderr(log()).status().unwrap();
    let status = ground.status();
    let new = Pid::from_raw(i32::try_from(status["monitor"]["pid"].as_i64().unwrap()).unwrap()).unwrap();
    assert!(replaced.success() && new != Pid::from_child(&old.0), "{}", ground.log_tail());
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&old.0.wait().unwrap()), Some(9));
    more_calls(&traffic);
    let report = traffic.report();
    kill_process(new, Signal::KILL).unwrap();
    assert_eq!((&report["failed"], &report["wrong"]), (&0.into(), &0.into()), "{}", ground.log_tail());
    drop(traffic);
    until("its end", || !is_alive(u32::try_from(new.as_raw_nonzero().get()).unwrap()));
}
