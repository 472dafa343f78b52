//! Journals of earlier releases, kept as they were, are read by this one; a newer one is left as it is.

use std::fs;
use std::path::PathBuf;

use locum_journal::{Counters, Journal, Slot, Stage, Totals, VERSION};
use locum_kernel::notify::{CallId, Notification};

const RELEASE_0_1_0: &str = include_str!("frozen/0.1.0.txt");
/// The listener of all its calls but one.
const LISTENER: u64 = 0x1122_3344_5566_7788;

fn words(text: &str) -> Vec<u64> {
    let mut words = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        match line.split_once(' ').unwrap() {
            ("words", count) => words.resize(count.parse().unwrap(), 0),
            (index, value) => {
                words[index.parse::<usize>().unwrap()] = u64::from_str_radix(value, 16).unwrap();
            }
        }
    }
    words
}

fn written(words: &[u64]) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    fs::write(&path, &bytes).unwrap();
    (folder, path, bytes)
}

#[test]
fn calls_that_0_1_0_left_are_found_in_every_stage() {
    let (_folder, path, _) = written(&words(RELEASE_0_1_0));
    let journal = Journal::open(&path).unwrap();
    let totals = Totals { calls: 1234, refused: 5, recovered: 6, reattached: 7, abandoned: 8 };
    assert_eq!(Counters::of(&journal).totals(), totals);
    let slots = Slot::take_left(&journal, LISTENER);
    let found: Vec<_> = slots.iter().map(|slot| (slot.index(), slot.left().unwrap())).collect();
    let stages: Vec<_> = found.iter().map(|(index, left)| (*index, left.stage)).collect();
    let wanted = [
        (0, Stage::Receiving),
        (1, Stage::Performing),
        (2, Stage::Parked),
        (3, Stage::Installed),
        (4, Stage::Sending),
        (9, Stage::Undelivered),
    ];
    assert_eq!(stages, wanted);
    let call = Notification {
        id: CallId(0x101),
        tid: 4002,
        nr: 304,
        arch: 0xc000_003e,
        instruction_pointer: 0x7f00_0000_1010,
        args: [5, 0x7ffc_4000, 0x0028_0000, 0, 0, 0],
    };
    let rest = |index: usize| {
        let left = found[index].1;
        (left.tries, left.crashes, left.descriptor, left.caller_started, left.since)
    };
    assert_eq!(found[1].1.call, call);
    assert_eq!(rest(0), (0, 0, 0, 0, 0));
    assert_eq!(rest(1), (1, 1, 0, 98765, 0));
    assert_eq!(rest(4), (3, 0, 18, 98768, 0));
    assert_eq!(rest(5), (1, 0, 19, 98769, 123_456));
    // Another listener's call is not taken for a free slot.
    drop(slots);
    assert_eq!(Slot::take(&journal, |_| false).unwrap().index(), 5);
    assert_eq!(Slot::take_left(&journal, 0x99).len(), 1);
}

#[test]
fn one_of_a_later_release_is_refused_and_not_touched() {
    let mut later = words(RELEASE_0_1_0);
    later[1] = VERSION + 1;
    let (_folder, path, bytes) = written(&later);
    let error = Journal::open(&path).unwrap_err().to_string();
    let said = format!("has version {}, this locum knows {VERSION}; it was left untouched", VERSION + 1);
    assert!(error.contains(&said) && error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}
