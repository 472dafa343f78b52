//! The monitor is killed every 1 to 20 ms while eight threads make checked calls: nothing is wrong, lost or leaked.
//!
//! LOCUM_CHAOS_SECONDS sets how long each variant takes; LOCUM_CHAOS_SEED repeats the choices of a run that failed.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::chaos::{Watchdog, must_be_clean, quiet};
use common::{Ground, Process, Random, Traffic, until};

/// One variant at a time: they would take the processors from each other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seconds(default: u64) -> u64 {
    std::env::var("LOCUM_CHAOS_SECONDS").map_or(default, |text| text.parse().unwrap())
}

/// The whole of one variant: quiet, chaos, quiet.
fn chaos(default_seconds: u64, run: &[&str], traffic: &[&str], leaks: u64) {
    let _alone = alone();
    let mut random = Random::new();
    let ground = Ground::new();
    let keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let seconds = seconds(default_seconds).to_string();
    let traffic = ground.traffic(run, &[&["--threads", "8", "--seconds", &seconds], traffic].concat());
    let mut watchdog = Watchdog::new();
    let mut kills = 0;
    while !traffic.has_ended() {
        let mut monitor = ground.monitor();
        std::thread::sleep(random.micros(1000, 20_000));
        monitor.kill();
        kills += 1;
        watchdog.look(&ground, &traffic);
    }
    let report = must_be_clean(&ground, traffic, leaks);
    println!("{kills} kills, {report}");
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
    assert!(report["calls"].as_u64().unwrap() > 1000, "{report}");
}

#[test]
fn killed_with_wait_killable_recv() {
    chaos(60, &[], &[], 0);
}

#[test]
fn killed_without_wait_killable_recv() {
    chaos(20, &["--interruptible"], &[], 0);
}

#[test]
fn killed_with_signals_to_the_workload() {
    chaos(20, &[], &["--signals", "1000"], 0);
}

/// Without the flag, the kernel can take an answer (SEND returns 0) and still make the call anew, if a signal woke the caller
/// just before. Nobody can tell that from a program that opens the same file twice, and to give both the same number would
/// be worse than to leave one descriptor behind: so one signal in a few thousand costs one.
#[test]
fn killed_without_wait_killable_recv_with_signals_to_the_workload() {
    let most = seconds(20) * 1000 / 500;
    chaos(20, &["--interruptible"], &["--signals", "1000"], most);
}

/// Promise 7: the monitor serves on and fills the next keeper.
#[test]
fn the_keeper_is_killed_and_replaced() {
    let _alone = alone();
    let mut random = Random::new();
    let ground = Ground::new();
    let mut keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let mut monitor = ground.monitor();
    let seconds = seconds(20).to_string();
    let traffic = ground.traffic(&[], &["--threads", "8", "--seconds", &seconds]);
    let mut watchdog = Watchdog::new();
    let mut kills = 0;
    while !traffic.has_ended() {
        // Now and then the monitor too: the new keeper must really hold what it was filled with. Only one of the two at a
        // time: what both lose is lost.
        if kills % 5 == 4 {
            until("a filled keeper", || {
                traffic.has_ended() || !ground.status()["sessions"].as_array().unwrap().is_empty()
            });
            monitor.kill();
            monitor = ground.monitor();
            until("the lease of the next monitor", || ground.status()["monitor"]["pid"] == monitor.pid());
        }
        std::thread::sleep(random.micros(20_000, 300_000));
        keeper.kill();
        keeper = ground.keeper();
        kills += 1;
        watchdog.look(&ground, &traffic);
    }
    let report = must_be_clean(&ground, traffic, 0);
    println!("{kills} keepers killed, {report}");
    drop(monitor);
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
}

/// Promise 8: keeper and monitor are killed at once; callers wait, and the next monitor takes the listener back from the
/// workload. Files whose park died with the keeper are found in the caller's table, by their mark.
#[test]
fn everything_is_killed_at_once() {
    total_loss(&[], &[], 0);
}

/// A call that a signal withdrew is not looked for by its mark: one descriptor for each loss may stay behind.
#[test]
fn everything_is_killed_at_once_without_wait_killable_recv() {
    total_loss(&["--interruptible"], &["--signals", "200"], 1);
}

fn total_loss(run: &[&str], traffic: &[&str], leaks_per_loss: u64) {
    let _alone = alone();
    let mut random = Random::new();
    let ground = Ground::new();
    let mut keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let (mut losses, mut whole) = (0, Vec::new());
    // On a slow machine once more: at random means a hundred times at least.
    while losses < 100 {
        losses += lose_again_and_again(
            &ground,
            &mut keeper,
            &mut random,
            (run, traffic),
            leaks_per_loss,
            &mut whole,
        );
    }
    whole.sort_unstable();
    println!(
        "{losses} times everything lost; after {} of them every call was a new one within {:?} of the restart at the median, {:?} at most",
        whole.len(),
        whole[whole.len() / 2],
        whole[whole.len() - 1],
    );
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
}

/// One run of traffic. Returns how often everything was lost, and adds to `whole` how long it took until no call waited that had begun
/// before the restart.
fn lose_again_and_again(
    ground: &Ground,
    keeper: &mut Process,
    random: &mut Random,
    (run, traffic): (&[&str], &[&str]),
    leaks_per_loss: u64,
    whole: &mut Vec<Duration>,
) -> u64 {
    let mut monitor = ground.monitor();
    let seconds = seconds(20).to_string();
    let told = ["--threads", "8", "--tell-ms", "5", "--seconds", &seconds];
    let traffic = ground.traffic(run, &[&told[..], traffic].concat());
    until("the first calls", || traffic.number("calls") > 0);
    let mut watchdog = Watchdog::new();
    let mut losses = 0;
    while !traffic.has_ended() {
        std::thread::sleep(random.micros(1000, 60_000));
        if random.micros(0, 2).is_zero() {
            keeper.kill();
            monitor.kill();
        } else {
            monitor.kill();
            keeper.kill();
        }
        losses += 1;
        let restart = Instant::now();
        *keeper = ground.keeper();
        monitor = ground.monitor();
        watchdog.look(ground, &traffic);
        if losses % 4 == 0 {
            let waits = || Duration::from_micros(traffic.number("waiting_us"));
            while !traffic.has_ended() && waits() >= restart.elapsed() {
                std::thread::sleep(Duration::from_millis(1));
                watchdog.look(ground, &traffic);
            }
            whole.push(restart.elapsed());
        }
    }
    println!("{losses} times everything lost, {}", must_be_clean(ground, traffic, losses * leaks_per_loss));
    losses
}

/// Its policy refuses a lifeline: calls fail from the loss on, until locum has come back and put another listener in; then none does.
#[test]
fn everything_is_killed_at_once_without_a_lifeline() {
    let _alone = alone();
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let policy = ground.runtime.path().join("bare.toml");
    std::fs::write(&policy, "[bare]\nlifeline = false\n").unwrap();
    let traffic = ["--threads", "8", "--tell-ms", "5", "--seconds", "120"];
    let traffic = ground.traffic(&["--policy", policy.to_str().unwrap()], &traffic);
    until("the first calls", || traffic.number("calls") > 100);
    let (mut failed, mut whole) = (0, Vec::new());
    for _ in 0..5 {
        keeper.kill();
        monitor.kill();
        until("calls that fail", || traffic.number("failed") > failed);
        let restart = Instant::now();
        (keeper, monitor) = (ground.keeper(), ground.monitor());
        // Whole: many calls, and none of them fails.
        until("calls that do not fail", || {
            let before = traffic.report();
            std::thread::sleep(Duration::from_millis(50));
            let after = traffic.report();
            let more = |what: &str| after[what].as_u64().unwrap() - before[what].as_u64().unwrap();
            more("calls") > 50 && more("failed") == 0
        });
        whole.push(restart.elapsed());
        failed = traffic.number("failed");
        let before = traffic.number("calls");
        until("many calls", || traffic.number("calls") > before + 5000);
        // A thread may have had its error before, and counts it only now.
        let late = traffic.number("failed") - failed;
        assert!(late <= 8, "{late} outside the window\n{}", ground.log_tail());
        failed += late;
    }
    println!("{failed} calls failed while there was no listener; whole within {whole:?} of the restart");
    assert_eq!(traffic.number("wrong"), 0, "{}", ground.log_tail());
    drop((traffic, monitor, keeper));
}

/// Promise 1: the front door is open while no monitor runs.
#[test]
fn workloads_start_while_no_monitor_runs() {
    let _alone = alone();
    let mut random = Random::new();
    let ground = Ground::new();
    let keeper = ground.keeper();
    let before = quiet(&ground, &keeper);
    let start = Instant::now();
    let mut served = 0;
    while start.elapsed().as_secs() < seconds(20) {
        let all: Vec<_> =
            (0..4).map(|_| ground.traffic(&[], &["--threads", "2", "--calls", "300"])).collect();
        until("four waiting workloads", || {
            all.iter().all(|traffic| traffic.number("waiting_us") > 0 && traffic.number("calls") == 0)
        });
        let mut watchdogs: Vec<_> = all.iter().map(|_| Watchdog::new()).collect();
        while !all.iter().all(Traffic::has_ended) {
            let mut monitor = ground.monitor();
            std::thread::sleep(random.micros(1000, 20_000));
            monitor.kill();
            for (traffic, watchdog) in
                all.iter().zip(&mut watchdogs).filter(|(traffic, _)| !traffic.has_ended())
            {
                watchdog.look(&ground, traffic);
            }
        }
        for traffic in all {
            let report = must_be_clean(&ground, traffic, 0);
            served += report["calls"].as_u64().unwrap();
        }
    }
    println!("{served} calls");
    assert_eq!(quiet(&ground, &keeper), before, "descriptors of (keeper, monitor)\n{}", ground.log_tail());
}
