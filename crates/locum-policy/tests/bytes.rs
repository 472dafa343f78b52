//! Whatever reads bytes from outside answers with a value or an error, whatever the bytes.

use std::panic::catch_unwind;

use locum_policy::profile::{Runtime, merge};
use locum_policy::{Metadata, State, builtin, parse};

const ROUNDS: u64 = 20_000;

/// xorshift64*: a failing case is its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit.max(1)
    }
}

/// `good` after a few changes: a byte replaced, a piece cut, doubled, or another good piece put in.
fn changed(good: &[&str], pieces: &[&str], seed: u64) -> String {
    let mut random = Random(seed);
    let mut bytes = good[random.below(good.len())].as_bytes().to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        let end = (at + random.below(24)).min(bytes.len());
        match random.below(4) {
            0 if at < bytes.len() => bytes[at] = random.next().to_le_bytes()[0],
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let piece = pieces[random.below(pieces.len())].bytes();
                bytes.splice(at..end, piece);
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn never_panics(good: &[&str], pieces: &[&str], read: impl Fn(&str) + std::panic::RefUnwindSafe) {
    for seed in 1..=ROUNDS {
        let text = changed(good, pieces, seed);
        assert!(catch_unwind(|| read(&text)).is_ok(), "seed {seed}: {text:?}");
    }
}

const JSON: &[&str] = &[
    "null",
    "{}",
    "[]",
    "-1",
    "1e999",
    "18446744073709551616",
    "\"\\ud800\"",
    "\"names\":",
    "\"includes\":",
    "[[[[",
    "é",
    "\0",
    ",",
];

#[test]
fn policies() {
    let good = builtin()[0].to_toml();
    let pieces = [
        "\"\"\"\n\n",
        "é",
        "\r\n",
        "\t",
        "{",
        "}",
        "{annotation:}",
        "0x_",
        "1_0",
        "inf",
        "1979-05-27",
        "[[a]]",
        "a.b = 1",
        "\u{feff}",
        "\0",
        "'",
        "#",
    ];
    never_panics(&[&good], &pieces, |text| {
        if let Err(error) = parse("f", text) {
            let _ = error.to_string();
        }
    });
}

#[test]
fn metadata() {
    never_panics(
        &["policy=virtiofsd", "policy=a,key=00ff00ff"],
        &["=", ",", "policy=", "key=", "é", " "],
        |text| {
            if let Err(error) = text.parse::<Metadata>() {
                let _ = error.to_string();
            }
        },
    );
}

#[test]
fn states() {
    let crun = r#"{ "ociVersion": "0.2.0", "fds": [ "seccompFd" ], "pid": 4664, "metadata": "m", "state": { "ociVersion": "0.2.0", "id": "c1", "status": "creating", "pid": 4664, "bundle": "/b" } }"#;
    let runc = r#"{"ociVersion":"1.0.2-dev","fds":["seccompFd"],"pid":9,"metadata":"m","state":{"ociVersion":"1.0.2-dev","id":"c1","status":"running","pid":7,"bundle":"/b","annotations":{"a":"b"}}}"#;
    never_panics(&[crun, runc], JSON, |text| match State::parse(text) {
        Ok(state) => drop(state.first_process()),
        Err(error) => drop(error.to_string()),
    });
}

#[test]
fn profiles() {
    let base = r#"{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],"syscalls":[{"names":["read","open_by_handle_at"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":8}],"includes":{"caps":["CAP_BPF"],"arches":["amd64"],"minKernel":"4.8"},"excludes":{"arches":["s390"]}},{"name":"a","action":"SCMP_ACT_KILL"}]}"#;
    let policy = builtin().remove(0);
    for runtime in [Runtime::Crun, Runtime::Runc, Runtime::Podman] {
        never_panics(&[base], JSON, |text| match merge(text, &policy, runtime, "/s") {
            Ok(profile) => assert_eq!(profile["listenerPath"], "/s"),
            Err(error) => drop(error.to_string()),
        });
    }
}
