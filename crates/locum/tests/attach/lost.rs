//! Listeners that are lost, and put back.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::{Process, list, locum, until};
use crate::yard::{Busy, Yard, must_be_right};

/// Promise 8, without a lifeline: calls fail until locum is back, and no longer.
#[test]
fn a_lost_listener_is_put_back_again_and_again() {
    let mut yard = Yard::new();
    let busy = yard.start("reckon");
    let (good, told) = yard.attach(&busy);
    assert!(good, "{told}");
    yard.await_calls();
    let mut left = u64::MAX;
    for _ in 0..25 {
        lose_all(&mut yard);
        (yard.keeper, yard.monitor) = (yard.ground.keeper(), Yard::monitor(&yard.ground));
        let room = filters_left(&yard);
        assert!(room < left, "{room} after {left}");
        left = room;
        yard.await_calls();
    }
    // Each of ours takes 13 instructions and the kernel's four; the program's own first one takes 8.
    assert_eq!(left, (32768 - 8 - 26 * 17) / 17, "{}", yard.ground.status());
    let told = must_be_right(busy);
    assert!(told["served"].as_u64() > Some(0), "{told}");
}

fn filters_left(yard: &Yard) -> u64 {
    // The record is there before the first call is served.
    until("a served session", || yard.ground.status()["sessions"][0]["calls"].as_u64() > Some(0));
    yard.ground.status()["sessions"][0]["filters_left"].as_u64().unwrap()
}

fn lose_all(yard: &mut Yard) {
    yard.keeper.kill();
    yard.monitor.kill();
}

fn only_folder(yard: &Yard) -> PathBuf {
    let sessions = yard.ground.runtime.path().join("sessions");
    let [folder] = &list(&sessions)[..] else { panic!("{:?}", list(&sessions)) };
    sessions.join(folder)
}

/// What the surgeon said.
fn put_back(yard: &Yard) -> String {
    let out = locum(&["attach", "--lost", "--runtime-dir", yard.ground.path()]).output().unwrap();
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// A program whose listener is lost; a keeper is there, and no monitor.
fn lost(yard: &mut Yard) -> Busy {
    let busy = yard.start("reckon");
    assert!(yard.attach(&busy).0);
    yard.await_calls();
    lose_all(yard);
    yard.keeper = yard.ground.keeper();
    busy
}

#[test]
fn no_other_process_is_taken_for_the_one_that_lost_its_listener() {
    let mut yard = Yard::new();
    let busy = lost(&mut yard);
    let path = only_folder(&yard).join("record.json");
    let record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let nobody = "surgeon: 0 attached, 0 left as they are";
    for (field, value, wanted) in [
        ("boot", json!("another"), nobody),
        ("namespace", json!(1), nobody),
        ("process", json!({"pid": busy.process.pid(), "start_time": 1}), nobody),
        (
            "process",
            json!({"pid": std::process::id(), "start_time": record["process"]["start_time"]}),
            nobody,
        ),
        (
            "filters",
            json!({"count": 2, "instructions": 1, "newest": "00"}),
            "it is not under the filter that it had",
        ),
    ] {
        let mut other = record.clone();
        other[field] = value;
        fs::write(&path, other.to_string()).unwrap();
        let told = put_back(&yard);
        assert!(told.contains(wanted), "{field}: {told}");
    }
    // As 0.1.0 wrote it.
    let mut old = record.clone();
    for field in ["namespace", "filters"] {
        old.as_object_mut().unwrap().remove(field);
    }
    fs::write(&path, old.to_string()).unwrap();
    let told = put_back(&yard);
    assert!(told.contains("1 attached, 0 left as they are"), "{told}");
    yard.monitor = Yard::monitor(&yard.ground);
    yard.await_calls();
    must_be_right(busy);
}

#[test]
fn whose_calls_ran_unhelped_stays_so() {
    let mut yard = Yard::new();
    let busy = yard.start("reckon");
    assert!(yard.attach(&busy).0);
    yard.await_calls();
    assert!(yard.command("detach", &busy, &[]).status().unwrap().success());
    let before = only_folder(&yard);
    lose_all(&mut yard);
    (yard.keeper, yard.monitor) = (yard.ground.keeper(), Yard::monitor(&yard.ground));
    until("another session", || {
        !yard.ground.status()["sessions"].as_array().unwrap().is_empty() && !before.exists()
    });
    assert!(only_folder(&yard).join("detached").exists());
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains("attached again"), "{told}");
    yard.await_calls();
    must_be_right(busy);
}

/// Else a rootless user could keep root's workload without help, by a name.
#[test]
fn a_session_of_the_same_name_at_another_door_is_another() {
    const USER: &str = "1001";
    let mut yard = Yard::new();
    let busy = lost(&mut yard);
    let path = only_folder(&yard).join("record.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["container"] = json!("foreign");
    fs::write(&path, record.to_string()).unwrap();
    yard.keeper.kill();
    yard.keeper = yard.ground.start(&["keeper", "--door", USER]);
    let door = yard.ground.runtime.path().join(format!("oci-{USER}.sock"));
    until("the keeper", || yard.ground.try_status().is_ok());
    let mut foreign = Command::new("setpriv");
    foreign.args(["--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs"]).arg(&yard.caller);
    foreign.args(["as-is", "foreign-pid"]).arg(yard.ground.files.path()).arg(&door);
    // Its call waits, since there is no monitor.
    let _foreign = Process(foreign.stdin(Stdio::null()).spawn().unwrap());
    until("the user's session", || yard.ground.status()["sessions"][0]["container"] == "foreign");
    let told = put_back(&yard);
    assert!(told.contains("1 attached, 0 left as they are"), "{told}");
    must_be_right(busy);
}
