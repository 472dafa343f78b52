//! Promise 13: what the release before left on disk is served on; what a later one left is not touched, and nobody else notices.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Ground, Traffic, until};
use locum_journal::{Counters, Journal, Left, Slot};
use serde_json::{Map, Value};

/// The layout of a journal of 0.1.0, apart from this release's: words of 64 bits.
mod frozen {
    use super::*;

    const WORDS: usize = 16896;
    const FIRST_SLOT: usize = 512;
    const SLOT_WORDS: usize = 64;

    pub(super) fn journal(journal: &Path, listener: u64) -> Vec<u8> {
        let read = Journal::open_existing(journal).unwrap();
        let totals = Counters::of(&read).totals();
        let mut words = vec![0; WORDS];
        let head = [u64::from_be_bytes(*b"LOCUMJNL"), 1];
        let totals = [totals.calls, totals.refused, totals.recovered, totals.reattached, totals.abandoned];
        words[..2].copy_from_slice(&head);
        words[2..7].copy_from_slice(&totals);
        for slot in Slot::take_left(&read, listener) {
            let at = FIRST_SLOT + slot.index() as usize * SLOT_WORDS;
            words[at..][..SLOT_WORDS].copy_from_slice(&self::slot(&slot.left().unwrap(), listener));
        }
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn slot(left: &Left, listener: u64) -> [u64; SLOT_WORDS] {
        let mut words = [0; SLOT_WORDS];
        let call = left.call;
        words[..4].copy_from_slice(&[
            call.id.0,
            call.tid.into(),
            u64::from(call.nr.cast_unsigned()) | u64::from(call.arch) << 32,
            call.instruction_pointer,
        ]);
        words[4..10].copy_from_slice(&call.args);
        words[32..39].copy_from_slice(&[
            listener,
            left.stage as u64,
            left.tries,
            left.crashes,
            u64::from(left.descriptor.cast_unsigned()),
            left.caller_started,
            left.since,
        ]);
        words
    }

    /// `now` with the fields that `then` has, and its version.
    pub(super) fn record(now: &Path, then: &str) -> String {
        let now: Value = serde_json::from_slice(&fs::read(now).unwrap()).unwrap();
        let then: Map<String, Value> = serde_json::from_str(then).unwrap();
        let of = |(name, value): (String, Value)| {
            let value = if name == "version" { value } else { now[&name].clone() };
            (name, value)
        };
        Value::Object(then.into_iter().map(of).collect()).to_string()
    }
}

const RECORD: &str = include_str!("../../locum-monitor/src/frozen/0.1.0/record.json");
const LIFELINE: &str = include_str!("../../locum-monitor/src/frozen/0.1.0/lifeline.json");

/// The folder of the session whose calls are `traffic`'s, once it has one.
fn folder_beside(ground: &Ground, others: &[PathBuf]) -> PathBuf {
    let sessions = ground.runtime.path().join("sessions");
    let folder = || {
        let names = fs::read_dir(&sessions).into_iter().flatten().map(|folder| folder.unwrap().path());
        names.into_iter().find(|folder| !others.contains(folder) && lifeline(folder).is_some())
    };
    until("a session with a lifeline", || folder().is_some());
    folder().unwrap()
}

fn lifeline(folder: &Path) -> Option<PathBuf> {
    let mut files = fs::read_dir(folder).ok()?.map(|file| file.unwrap().path());
    files.find(|path| path.extension().is_some_and(|end| end == "lifeline"))
}

fn replace(path: &Path, bytes: &[u8]) {
    let fresh = path.with_extension("test");
    fs::write(&fresh, bytes).unwrap();
    fs::rename(fresh, path).unwrap();
}

fn more_calls(traffic: &Traffic) {
    let before = traffic.number("calls");
    until("calls", || traffic.number("calls") > before + 100);
}

fn must_be_clean(ground: &Ground, traffic: &Traffic) {
    let report = traffic.report();
    assert_eq!((&report["failed"], &report["wrong"]), (&0.into(), &0.into()), "{}", ground.log_tail());
}

#[test]
fn calls_that_0_1_0_left_are_settled() {
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "8", "--seconds", "8"]);
    let folder = folder_beside(&ground, &[]);
    let (journal, record) = (folder.join("journal"), folder.join("record.json"));
    let mut left = 0;
    for round in 0..20 {
        let before = traffic.number("calls");
        until("calls", || traffic.has_ended() || traffic.number("calls") > before + 100);
        monitor.kill();
        // On a slow machine the traffic may be over.
        let Some(lifeline) = lifeline(&folder) else { break };
        let listener = u64::from_str_radix(lifeline.file_stem().unwrap().to_str().unwrap(), 16).unwrap();
        let then = frozen::journal(&journal, listener);
        left += then.chunks_exact(512).skip(8).filter(|slot| slot[..8] != [0; 8]).count();
        replace(&journal, &then);
        replace(&record, frozen::record(&record, RECORD).as_bytes());
        replace(&lifeline, frozen::record(&lifeline, LIFELINE).as_bytes());
        if round % 5 == 4 {
            // Then the lifeline's record is all that is left.
            keeper.kill();
            keeper = ground.keeper();
        }
        monitor = ground.monitor();
    }
    let (_, report) = traffic.finish();
    for what in ["wrong", "failed", "leaked"] {
        assert_eq!(report[what], 0, "{what}: {report}\n{}", ground.log_tail());
    }
    assert!(left > 20, "only {left} calls were in the making when the monitor was killed");
    drop((monitor, keeper));
}

#[test]
fn a_record_of_a_later_release_is_not_touched_and_nobody_else_notices() {
    let ground = Ground::new();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let one = ground.traffic(&[], &["--threads", "2", "--seconds", "120"]);
    let folder = folder_beside(&ground, &[]);
    let other = ground.traffic(&[], &["--threads", "2", "--seconds", "120"]);
    folder_beside(&ground, std::slice::from_ref(&folder));
    more_calls(&one);
    monitor.kill();
    let path = folder.join("record.json");
    let own = fs::read(&path).unwrap();
    let later = br#"{"version": 99, "more": [1]}"#;
    replace(&path, later);
    monitor = ground.monitor();
    let said =
        format!("{} is not a record of version 1: its version is 99; it was left untouched", path.display());
    until("a word about it", || fs::read_to_string(&ground.log).unwrap().contains(&said));
    until("its calls to wait", || one.number("waiting_us") > 300_000);
    more_calls(&other);
    assert_eq!(fs::read(&path).unwrap(), later);
    monitor.kill();
    assert_eq!(fs::read(&path).unwrap(), later);
    replace(&path, &own);
    monitor = ground.monitor();
    more_calls(&one);
    must_be_clean(&ground, &one);
    must_be_clean(&ground, &other);
    drop(monitor);
}

/// What it holds is of use to nobody for long: its calls are asked again.
#[test]
fn a_journal_of_a_later_release_is_kept_and_its_session_served() {
    let ground = Ground::new();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "120"]);
    let folder = folder_beside(&ground, &[]);
    more_calls(&traffic);
    monitor.kill();
    let path = folder.join("journal");
    let own = fs::read(&path).unwrap();
    let later = [&own[..8], &99_u64.to_ne_bytes(), &own[16..]].concat();
    replace(&path, &later);
    monitor = ground.monitor();
    more_calls(&traffic);
    let said = format!("{} has version 99, this locum knows 1; it was left untouched", path.display());
    assert!(fs::read_to_string(&ground.log).unwrap().contains(&said), "{}", ground.log_tail());
    assert_eq!(fs::read(folder.join("journal.foreign")).unwrap(), later);
    must_be_clean(&ground, &traffic);
    drop(monitor);
}
