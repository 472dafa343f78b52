//! `locum demo` shows what it says it shows.

mod common;

use serde_json::Value;

#[test]
fn nothing_is_lost() {
    let out = common::locum(&["demo", "--seconds", "5", "--json"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text} {}", String::from_utf8_lossy(&out.stderr));
    let figures: Value = serde_json::from_str(&text).unwrap();
    let number = |name: &str| figures[name].as_u64().unwrap();
    assert!(number("calls") > 100, "{text}");
    assert!(number("monitors_killed") > 10, "{text}");
    assert!(number("keepers_upgraded") > 0, "{text}");
    assert!(number("monitors_upgraded") > 0, "{text}");
    // Every kill cuts off at most as many calls as there are callers.
    assert!((1..=8 * number("monitors_killed")).contains(&number("calls_recovered")), "{text}");
    assert!(number("longest_wait_us") > 0, "{text}");
    assert_eq!((number("wrong"), number("lost"), number("leaked")), (0, 0, 0), "{text}");
    let seconds = figures["seconds"].as_f64().unwrap();
    assert!((5.0..60.0).contains(&seconds), "{text}");
}

#[test]
fn a_reader_gets_a_table() {
    let out = common::locum(&["demo", "--seconds", "2"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text} {}", String::from_utf8_lossy(&out.stderr));
    for row in [
        "calls served",
        "monitors killed",
        "keepers upgraded",
        "monitors upgraded",
        "calls recovered",
        "longest wait",
        "wrong",
        "lost",
    ] {
        assert!(text.lines().any(|line| line.trim_start().starts_with(row)), "{row} in {text}");
    }
}
