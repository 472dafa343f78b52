//! Every check and every test, and the sum at the end.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::setup;
use crate::step::{self, command, step};

/// A part of the tests.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Format, lints, documentation, dependencies
    Lint,
    /// The tests without a guest
    Unit,
    /// virtiofsd, container runtimes and a guest
    Real,
}

/// What the test programs said of themselves.
#[derive(Default)]
struct Sum {
    passed: u32,
    failed: u32,
    ignored: u32,
}

pub(crate) fn run(only: Option<Part>) -> Result<ExitCode> {
    setup::all()?;
    let wants = |part| only.is_none_or(|only| only == part);
    let mut good = true;
    if wants(Part::Lint) {
        good &= lint();
    }
    let mut sum = Sum::default();
    // The real components last, in a step of their own: the two together are `cargo test --workspace`.
    if wants(Part::Unit) {
        good &= report(&tests(
            "tests",
            &["--workspace"],
            &["--skip", "guest::", "--skip", "listeners::", "--skip", "migration::"],
            &mut sum,
        ));
    }
    if wants(Part::Real) {
        good &= report(&tests("tests with a guest", &["-p", "locum", "--test", "real"], &[], &mut sum));
    }
    if only != Some(Part::Lint) {
        // A step that failed without a failed test, by its build or its end, counts as one.
        println!("{} passed, {} failed", sum.passed, sum.failed.max(u32::from(!good)));
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says what went wrong, and whether all went well.
fn report(result: &Result<()>) -> bool {
    if let Err(error) = result {
        println!("{error:#}");
    }
    result.is_ok()
}

fn lint() -> bool {
    let steps: [(&str, &[&str]); 4] = [
        ("format", &["fmt", "--all", "--check"]),
        ("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
        ("documentation", &["doc", "--workspace", "--no-deps"]),
        ("licences, bans, sources", &["deny", "check", "bans", "licenses", "sources"]),
    ];
    // All of them, so that one run shows all that is to be done.
    let results = steps.map(|(name, args)| {
        report(&step::run(name, command("cargo", args).env("RUSTDOCFLAGS", "-D warnings")))
    });
    results.into_iter().all(|good| good)
}

/// Builds the tests that `which` names and runs those of them that `filter` leaves.
fn tests(name: &str, which: &[&str], filter: &[&str], sum: &mut Sum) -> Result<()> {
    let build = [&["test", "--no-run"], which].concat();
    step::run(&format!("build {name}"), &mut command("cargo", &build))?;
    let log = step::log(name)?;
    let result = step(name, || {
        let all = [&["test", "--no-fail-fast"], which, &["--"], filter].concat();
        let mut all = command("cargo", &all);
        // Each test is many processes; more at once only makes their clocks unfair.
        step::quietly(&log, all.env("LOCUM_REAL", step::real()).env("RUST_TEST_THREADS", "2"))
    });
    let text = fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
    let found = Sum::of(&text);
    sum.add(&found);
    let failed = failed(&text);
    for (test, said) in &failed {
        println!("  {test} FAILED; it ended with:\n{said}");
    }
    ensure!(failed.is_empty(), "{} tests failed; all they said is in {}", failed.len(), log.display());
    result?;
    ensure!(found.ignored == 0, "{} tests ignored: a test that cannot run is a failure", found.ignored);
    ensure!(found.passed > 0, "no test ran");
    Ok(())
}

/// The tests that failed, and the last lines of what each of them said, from what libtest prints behind `failures:`.
fn failed(text: &str) -> Vec<(&str, String)> {
    let sections = text.split("\n---- ").skip(1).filter_map(|section| section.split_once(" stdout ----\n"));
    let last = |(test, said)| {
        // What follows the last one is the list of all.
        let said: Vec<&str> =
            str::split(said, "\n\nfailures:").next().unwrap_or("").trim_end().lines().collect();
        (test, said[said.len().saturating_sub(40)..].join("\n"))
    };
    sections.map(last).collect()
}

impl Sum {
    /// From libtest's lines `test result: ok. 3 passed; 0 failed; 0 ignored; ...`.
    fn of(text: &str) -> Self {
        let mut sum = Self::default();
        for line in text.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            let words: Vec<&str> = line.split([' ', ';']).collect();
            let number = |name| {
                let at = words.iter().position(|word| *word == name).unwrap_or(0);
                words.get(at.wrapping_sub(1)).and_then(|number| number.parse().ok()).unwrap_or(0)
            };
            sum.add(&Self { passed: number("passed"), failed: number("failed"), ignored: number("ignored") });
        }
        sum
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

#[cfg(test)]
mod tests {
    use super::{Sum, failed};

    #[test]
    fn sums_what_libtest_says() {
        let text = "test a ... ok\ntest result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n\
                    test result: FAILED. 10 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 1s";
        let sum = Sum::of(text);
        assert_eq!((sum.passed, sum.failed, sum.ignored), (13, 2, 1));
    }

    #[test]
    fn shows_what_the_failed_tests_said() {
        let text = "test a ... FAILED\ntest b ... FAILED\n\nfailures:\n\n---- a stdout ----\none\n\ntwo\n\n\n---- m::b stdout ----\n\
                    three\n\n\nfailures:\n    a\n    m::b\n\ntest result: FAILED. 0 passed; 2 failed";
        assert_eq!(failed(text), [("a", "one\n\ntwo".to_owned()), ("m::b", "three".to_owned())]);
        assert_eq!(failed("test a ... ok\n\ntest result: ok. 1 passed"), []);
    }
}
