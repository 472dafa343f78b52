//! Everything is killed at once, and the journal is gone or not to be read: the calls in the making, which nobody knows any more,
//! are asked again. None fails, none hangs.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{Ground, Process, Traffic, locum, until};

/// One at a time: they would take the processors from each other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder of the only session.
fn folder(ground: &Ground) -> PathBuf {
    let sessions = ground.runtime.path().join("sessions");
    until("a session with a lifeline", || {
        let names = fs::read_dir(&sessions).into_iter().flatten().flatten();
        let mut files = names.flat_map(|folder| common::list(&folder.path()));
        files.any(|name| name.ends_with(".lifeline"))
    });
    sessions.join(&common::list(&sessions)[0])
}

const HEAD: usize = 512 * 8;
const SLOT: usize = 64 * 8;

/// How many calls a journal has.
fn calls(journal: &[u8]) -> usize {
    journal.get(HEAD..).unwrap_or_default().chunks_exact(SLOT).filter(|slot| slot[..8] != [0; 8]).count()
}

type Loss = fn(&Path, Vec<u8>);

/// What may become of a journal.
const LOSSES: [(&str, Loss); 5] = [
    ("deleted", |path, _| fs::remove_file(path).unwrap()),
    ("cut short", |path, journal| fs::write(path, &journal[..4096]).unwrap()),
    ("of a later release", |path, mut journal| {
        journal[8..16].copy_from_slice(&99_u64.to_ne_bytes());
        fs::write(path, journal).unwrap();
    }),
    ("garbage", |path, journal| fs::write(path, vec![b'x'; journal.len()]).unwrap()),
    ("without its calls", |path, mut journal| {
        journal[HEAD..].fill(0);
        fs::write(path, journal).unwrap();
    }),
];

/// What was said, but for the forged handles that are refused.
fn log(ground: &Ground) -> String {
    let log = fs::read_to_string(&ground.log).unwrap();
    log.lines().filter(|line| !line.contains("refused: ")).collect::<Vec<_>>().join("\n")
}

/// Nothing waits since before `then`.
fn whole(ground: &Ground, traffic: &Traffic, then: Instant) {
    let before = traffic.number("calls");
    loop {
        let waits = Duration::from_micros(traffic.number("waiting_us"));
        if traffic.has_ended() || (traffic.number("calls") > before + 50 && waits < then.elapsed()) {
            return;
        }
        assert!(then.elapsed() < Duration::from_secs(10), "hanging: {}\n{}", traffic.report(), log(ground));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whatever was said of the calls asked again: how long each was held, in microseconds.
fn held(ground: &Ground) -> Vec<u64> {
    let log = fs::read_to_string(&ground.log).unwrap();
    let asked = log.lines().filter(|line| line.contains("was asked again"));
    let mut held: Vec<u64> = asked
        .map(|line| line.split_once("held_us=").unwrap().1.split(' ').next().unwrap().parse().unwrap())
        .collect();
    held.sort_unstable();
    held
}

/// Returns how many calls were asked again, and how many were cut off, since they cannot be repeated.
fn must_be_clean(ground: &Ground, traffic: Traffic, lost: usize, are_withdrawn: bool) -> (usize, u64) {
    let (_, report) = traffic.finish();
    let held = held(ground);
    println!(
        "{lost} calls lost, {} asked again, each thread held for {:?} us at the median, {:?} at most; {report}",
        held.len(),
        held.get(held.len() / 2),
        held.last(),
    );
    assert!(report["done"] == true, "{report}\n{}", log(ground));
    for what in ["wrong", "failed"] {
        assert_eq!(report[what], 0, "{what}: {report}\n{}", log(ground));
    }
    // What was installed and has its mark is taken up again, unless the call is withdrawn before the next monitor looks. It has none
    // in the instant before the answer.
    let limit = if are_withdrawn { lost } else { lost / 4 };
    assert!(report["leaked"].as_u64().unwrap() <= limit as u64, "{report}\n{}", log(ground));
    assert!(!log(ground).contains("nobody is found"), "{}", log(ground));
    (held.len(), report["cut_off"].as_u64().unwrap())
}

/// Returns what [`must_be_clean`] does.
fn lose(run: &[&str], traffic: &[&str]) -> (usize, u64) {
    let _alone = alone();
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let are_withdrawn = !run.is_empty() && traffic.contains(&"--signals");
    let traffic = ground.traffic(run, &[&["--threads", "8", "--seconds", "15"], traffic].concat());
    let folder = folder(&ground);
    let path = folder.join("journal");
    let (mut lost, mut by_kind) = (0, [0; LOSSES.len()]);
    while !traffic.has_ended() {
        for ((_, lose), by_kind) in LOSSES.iter().zip(&mut by_kind) {
            whole(&ground, &traffic, Instant::now());
            if traffic.has_ended() {
                break;
            }
            monitor.kill();
            // The listener is the keeper's every other time, and comes from the workload else.
            if lost % 2 == 0 {
                keeper.kill();
                keeper = ground.keeper();
            }
            let Ok(journal) = fs::read(&path) else { break };
            *by_kind += calls(&journal);
            lost += calls(&journal);
            lose(&path, journal);
            monitor = ground.monitor();
        }
    }
    let names = LOSSES.map(|(name, _)| name);
    println!("calls that the journal had, by what became of it: {by_kind:?} ({names:?})");
    let asked = must_be_clean(&ground, traffic, lost, are_withdrawn);
    assert!(by_kind.iter().all(|calls| *calls > 0), "{by_kind:?}");
    drop((keeper, monitor));
    asked
}

/// Where a monitor that asks again is killed: `locum_kernel::fault::die_at` names these.
#[cfg(debug_assertions)]
const STEPS: [u32; 5] = [31, 32, 33, 6, 34];

/// All is lost, and each next monitor dies while it asks again, one step further each time.
#[cfg(debug_assertions)]
fn killed_at_every_step(run: &[&str]) {
    let _alone = alone();
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(run, &["--threads", "8", "--seconds", "15"]);
    let folder = folder(&ground);
    let (mut lost, mut died) = (0, [0; STEPS.len()]);
    while !traffic.has_ended() {
        whole(&ground, &traffic, Instant::now());
        if traffic.has_ended() {
            break;
        }
        keeper.kill();
        monitor.kill();
        let path = folder.join("journal");
        let Ok(journal) = fs::read(&path) else { break };
        lost += calls(&journal);
        fs::remove_file(path).unwrap();
        keeper = ground.keeper();
        for (step, died) in STEPS.iter().zip(&mut died) {
            let log = fs::File::options().append(true).open(&ground.log).unwrap();
            let mut command = locum(&["monitor", "--runtime-dir", ground.path(), "--keys"]);
            command.arg(ground.runtime.path().join("keys")).stderr(log);
            let mut dying = Process(command.env("LOCUM_DIE_AT", step.to_string()).spawn().unwrap());
            let then = Instant::now();
            // If there is nothing left to ask again, it lives.
            until("its death, or calls", || {
                let waits = Duration::from_micros(traffic.number("waiting_us"));
                dying.0.try_wait().unwrap().is_some() || traffic.has_ended() || waits < then.elapsed() / 2
            });
            *died += u32::from(dying.0.try_wait().unwrap().is_some());
        }
        monitor = ground.monitor();
    }
    println!("died at each of the steps {STEPS:?}: {died:?}");
    must_be_clean(&ground, traffic, lost, false);
    assert!(died.iter().all(|deaths| *deaths > 0), "{died:?}\n{}", log(&ground));
    drop((keeper, monitor));
}

#[test]
#[cfg(debug_assertions)]
fn killed_at_every_step_of_asking_again() {
    killed_at_every_step(&[]);
}

#[test]
#[cfg(debug_assertions)]
fn killed_at_every_step_of_asking_again_without_wait_killable_recv() {
    killed_at_every_step(&["--interruptible"]);
}

#[test]
fn calls_that_the_journal_lost() {
    assert_ne!(lose(&[], &[]).0, 0);
}

/// What cuts a file to nothing is not made twice: EINTR.
#[test]
fn calls_that_the_journal_lost_and_that_cannot_be_repeated() {
    let (asked, cut_off) = lose(&[], &["--truncate"]);
    assert!(asked > 0 && cut_off > 0, "{asked} asked again, {cut_off} cut off");
}

#[test]
fn calls_that_the_journal_lost_under_signals() {
    assert_ne!(lose(&[], &["--signals", "1000"]).0, 0);
}

#[test]
fn calls_that_the_journal_lost_without_wait_killable_recv() {
    assert_ne!(lose(&["--interruptible"], &[]).0, 0);
}

#[test]
fn calls_that_the_journal_lost_without_wait_killable_recv_under_signals() {
    // The signals do it, mostly.
    lose(&["--interruptible"], &["--signals", "1000"]);
}
