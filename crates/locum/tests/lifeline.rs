//! The copy of the listener in the workload is put back whenever it is gone, and what stands on disk of it is not believed blindly.

mod common;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use common::{Ground, Process, USER, lifelines, locum, until};

/// A workload that gets rid of its lifeline in the way `kind` whenever it is told to; each time another one is there soon, good
/// enough to survive the loss of everything.
fn shed(kind: &str) {
    let ground = Ground::new();
    std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = ground.files.path().join("caller");
    let built = Path::new(env!("CARGO_BIN_EXE_locum")).with_file_name("examples").join("caller");
    std::fs::copy(&built, &program).expect("cargo build -p locum-kernel --examples, or cargo xtask test");
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let files = ground.files.path().to_str().unwrap();
    let mut run =
        locum(&["run", "--runtime-dir", ground.path(), "--export", files, "--user", &USER.to_string()]);
    run.arg("--").arg(&program).args(["as-is", "shed", files, kind]);
    let mut run = Process(run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    // Numbers are random: another lifeline may have the same.
    let put = || std::fs::read_to_string(&ground.log).unwrap().matches("a lifeline was put").count();
    for round in 0..20 {
        until("another lifeline", || put() == round + 1);
        assert_eq!(lifelines(run.pid()).len(), 1, "{}", ground.log_tail());
        run.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        until("another lifeline", || put() == round + 2);
        keeper.kill();
        monitor.kill();
        (keeper, monitor) = (ground.keeper(), ground.monitor());
        let calls = || ground.status()["sessions"][0]["calls"].as_u64().unwrap_or(0);
        let before = calls();
        until("calls", || calls() > before);
    }
    drop(run.0.stdin.take());
    let told = std::io::read_to_string(run.0.stdout.take().unwrap()).unwrap();
    assert_eq!(told.trim(), "0", "failed calls; {}", ground.log_tail());
}

#[test]
fn put_back_after_close() {
    shed("close");
}

#[test]
fn put_back_after_exec() {
    shed("exec");
}

#[test]
fn put_back_after_the_end_of_who_held_it() {
    shed("end");
}

#[test]
fn what_is_on_disk_is_not_believed() {
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "60"]);
    until("calls", || traffic.number("calls") > 100);
    let sessions = ground.runtime.path().join("sessions");
    let own = sessions.join(ground.status()["sessions"][0]["id"].as_str().unwrap());
    let file = |end: &str| {
        let found = common::list(&own).into_iter().find(|name| name.ends_with(end));
        own.join(found.unwrap_or_else(|| panic!("no {end}")))
    };
    let good = std::fs::read_to_string(file("lifeline")).unwrap();
    keeper.kill();
    monitor.kill();
    let stranger = std::process::id().to_string();
    let change = |from: &str, to: &str| {
        assert!(good.contains(from), "{from} in {good}");
        good.replacen(from, to, 1)
    };
    let value = |name: &str| {
        let line = good.lines().find(|line| line.contains(&format!("{name:?}:"))).unwrap();
        line.trim().trim_end_matches(',').to_owned()
    };
    let bad = [
        ("garbage", "not at all".to_owned()),
        ("empty", String::new()),
        ("newer", change(&value("version"), "\"version\": 99")),
        ("boot", change(&value("boot"), "\"boot\": \"another\"")),
        ("stranger", change(&value("pid"), &format!("\"pid\": {stranger}"))),
        ("number", change(&value("descriptor"), "\"descriptor\": 0")),
        ("negative", change(&value("descriptor"), "\"descriptor\": -1")),
    ];
    for (name, text) in &bad {
        let folder = sessions.join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("0000000000000001.lifeline"), text).unwrap();
        // One that names the right session, and lies about the rest, beside the good one.
        std::fs::write(own.join(format!("{name}.lifeline")), text).unwrap();
    }
    (keeper, monitor) = (ground.keeper(), ground.monitor());
    let before = traffic.number("calls");
    until("calls after the loss", || traffic.number("calls") > before + 100);
    assert_eq!((traffic.number("failed"), traffic.number("wrong")), (0, 0), "{}", ground.log_tail());
    for (name, text) in bad {
        let left = std::fs::read_to_string(sessions.join(name).join("0000000000000001.lifeline")).unwrap();
        assert_eq!(left, text, "{name} was touched");
    }
    drop((traffic, monitor, keeper));
}
