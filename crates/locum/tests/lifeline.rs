//! The copy of the listener in the workload is put back whenever it is gone, and what stands on disk of it is not believed blindly.

mod common;

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;

use common::{Ground, Process, Traffic, USER, lifelines, locum, until};
use locum_kernel::socket::{receive_with, send_with};
use rustix::net::RecvFlags;
use serde_json::Value;

/// A workload that gets rid of its lifeline in the way `kind` whenever it is told to; each time another one is there soon, good
/// enough to survive the loss of everything.
fn shed(kind: &str) {
    let ground = Ground::new();
    std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = ground.files.path().join("caller");
    common::copy_caller(&program);
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
    let file = common::list(&own).into_iter().find(|name| name.ends_with(".lifeline")).unwrap();
    let good: Value = serde_json::from_slice(&std::fs::read(own.join(&file)).unwrap()).unwrap();
    keeper.kill();
    monitor.kill();
    let with = |place: &str, value: Value| {
        let mut changed = good.clone();
        *changed.pointer_mut(place).unwrap() = value;
        changed.to_string()
    };
    let form = " is not a lifeline's record of version 1 for this session: ";
    let (version, name) = (format!("{form}its version is 99"), format!("{form}it names the session "));
    let gone = ": the listener cannot be taken back from the workload: ";
    // Each with what is said of it where it names the right session; nothing of what is of another boot.
    let bad = [
        ("garbage", "not at all".to_owned(), Some(form)),
        ("empty", String::new(), Some(form)),
        ("newer", r#"{"version": 99, "more": 1}"#.to_owned(), Some(&version[..])),
        ("name", with("/delivery/session", "another-01234567".into()), Some(&name)),
        ("boot", with("/boot", "another".into()), None),
        ("stranger", with("/process/pid", std::process::id().into()), Some(gone)),
        ("number", with("/descriptor", 0.into()), Some(gone)),
        ("negative", with("/descriptor", (-1).into()), Some(gone)),
    ];
    let places = bad.each_ref().map(|(name, text, _)| {
        let folder = sessions.join(name);
        std::fs::create_dir(&folder).unwrap();
        // In a folder of its own it names another session; beside the good one it lies about the rest.
        let places = [folder.join(&file), own.join(format!("{name}.lifeline"))];
        for place in &places {
            std::fs::write(place, text).unwrap();
        }
        places
    });
    (keeper, monitor) = (ground.keeper(), ground.monitor());
    let before = traffic.number("calls");
    until("calls after the loss", || traffic.number("calls") > before + 100);
    assert_eq!((traffic.number("failed"), traffic.number("wrong")), (0, 0), "{}", ground.log_tail());
    let log = std::fs::read_to_string(&ground.log).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    for ((name, text, said), places) in bad.iter().zip(&places) {
        let is_said = said.is_none_or(|said| log.contains(&format!("{}{said}", places[1].display())));
        assert!(is_said, "nothing is said of {name}: {}", ground.log_tail());
        for place in places {
            assert_eq!(std::fs::read_to_string(place).unwrap(), *text, "{} was touched", place.display());
        }
    }
    drop((traffic, monitor, keeper));
}

/// Of another release, it stays what it is while its session is served, although there is no lifeline then.
#[test]
fn a_newer_record_is_left_untouched() {
    let ground = Ground::new();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "60"]);
    until("calls", || traffic.number("calls") > 100);
    let own =
        ground.runtime.path().join("sessions").join(ground.status()["sessions"][0]["id"].as_str().unwrap());
    let file = common::list(&own).into_iter().find(|name| name.ends_with(".lifeline")).unwrap();
    monitor.kill();
    let newer = r#"{"version": 99, "more": 1}"#;
    std::fs::write(own.join(&file), newer).unwrap();
    let _monitor = ground.monitor();
    let said = format!(
        "no lifeline, if keeper and monitor are lost at once this workload's calls fail: {}",
        own.join(&file).display()
    );
    until("a word about it", || std::fs::read_to_string(&ground.log).unwrap().contains(&said));
    let before = traffic.number("calls");
    until("calls", || traffic.number("calls") > before + 100);
    assert_eq!(std::fs::read_to_string(own.join(&file)).unwrap(), newer);
    assert_eq!((traffic.number("failed"), traffic.number("wrong")), (0, 0), "{}", ground.log_tail());
}

/// One that was executed in a container beside its first process has a listener of its own, and so a lifeline of its own. The monitor
/// that takes them back dies between the two, with the first already in the keeper's hands.
#[test]
#[cfg(debug_assertions)]
fn each_listener_of_a_session_is_taken_back() {
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let policies = ground.runtime.path().join("policies");
    std::fs::create_dir_all(&policies).unwrap();
    let policy = format!("[two]\nexports = [{:?}]\n", common::mount_of(ground.files.path()));
    std::fs::write(policies.join("two.toml"), policy).unwrap();
    let files = ground.files.path().to_str().unwrap();
    let door = ground.runtime.path().join("oci.sock");
    let start = |door: &Path| {
        let user = USER.to_string();
        let mut command = locum(&["confined", "--id", "two", "--policy", "two", "--door"]);
        command.arg(door).args(["--calls", "name_to_handle_at,open_by_handle_at"]);
        command.args(["--uid", &user, "--gid", &user, "--parent", &std::process::id().to_string(), "--"]);
        command.args(["/proc/self/exe", "traffic", "--json", "--dir", files]);
        Traffic::start({
            command.args(["--threads", "2", "--seconds", "120"]);
            command
        })
    };
    let sessions = ground.runtime.path().join("sessions");
    let lifelines = || {
        let folders = std::fs::read_dir(&sessions).into_iter().flatten().flatten();
        let counts = folders.map(|folder| {
            common::list(&folder.path()).iter().filter(|name| name.ends_with(".lifeline")).count()
        });
        counts.collect::<Vec<_>>()
    };
    let first = start(&door);
    until("its lifeline", || lifelines() == [1]);
    // As a runtime says it of what is executed in a container that runs.
    let relay = ground.runtime.path().join("relay.sock");
    let relayed = UnixListener::bind(&relay).unwrap();
    let second = start(&relay);
    let (mut message, from) = (vec![0; 4096], relayed.accept().unwrap().0);
    let (length, listener) = receive_with(&from, &mut message, RecvFlags::empty()).unwrap();
    let message = String::from_utf8_lossy(&message[..length]).replace("creating", "running");
    send_with(UnixStream::connect(&door).unwrap(), message.as_bytes(), listener.unwrap().as_fd()).unwrap();
    let both = [first, second];
    until("a lifeline for each of two listeners of one session", || lifelines() == [2]);
    for _ in 0..5 {
        keeper.kill();
        monitor.kill();
        keeper = ground.keeper();
        let mut command = locum(&["monitor", "--runtime-dir", ground.path(), "--keys"]);
        command.arg(ground.runtime.path().join("keys")).env("LOCUM_DIE_AT", "41");
        let mut dying = Process(command.stderr(Stdio::null()).spawn().unwrap());
        until("its death", || dying.0.try_wait().unwrap().is_some());
        monitor = ground.monitor();
        let before = both.each_ref().map(|traffic| traffic.number("calls"));
        until("calls of both", || {
            both.iter().zip(before).all(|(traffic, before)| traffic.number("calls") > before + 50)
        });
        // Served first, then handed over.
        until("both with the keeper", || ground.status()["sessions"][0]["listeners"] == 2);
    }
    for traffic in &both {
        assert_eq!((traffic.number("failed"), traffic.number("wrong")), (0, 0), "{}", ground.log_tail());
    }
    drop((both, monitor, keeper));
}
