//! Listeners that are not ours, in the program's table or in force for it.

use crate::common::{Ground, lifelines, locum, until};
use crate::yard::{Yard, must_be_right};

/// As a container engine has those of its containers.
#[test]
fn a_program_that_holds_the_listener_of_another_is_attached_by_its_own() {
    let yard = Yard::new();
    let busy = yard.start("holder");
    let (good, told) = yard.attach(&busy);
    let own = format!("process {}: attached\n", busy.process.pid());
    // The child, whose listener it is, is left as it is.
    assert!(!good && told.contains(&own) && told.contains("1 attached, 1 left as they are"), "{told}");
    yard.await_calls();
    let told = must_be_right(busy);
    assert!(told["served"].as_u64() > Some(0), "{told}");
}

#[test]
fn a_listener_of_another_kind_that_is_in_force_is_named() {
    let yard = Yard::new();
    let (served, busy) = (yard.start("reckon"), yard.start("engine"));
    assert!(yard.attach(&served).0);
    let (good, told) = yard.attach(&busy);
    let holder = format!(" {} (caller)", busy.process.pid());
    assert!(!good && told.contains("not one of this keeper's") && told.contains(&holder), "{told}");
    let told = must_be_right(busy);
    assert_eq!(told["served"], 0, "{told}");
    must_be_right(served);
}

#[test]
fn what_another_locum_serves_is_left_to_it() {
    let (yard, other) = (Yard::new(), Yard::new());
    let (busy, own) = (other.start("fork"), yard.start("reckon"));
    for (yard, busy) in [(&other, &busy), (&yard, &own)] {
        let (good, told) = yard.attach(busy);
        assert!(good && told.contains(": attached\n"), "{told}");
    }
    let (good, told) = yard.attach(&busy);
    assert!(!good && told.contains("that of another locum"), "{told}");
    for (yard, busy) in [(&other, &busy), (&yard, &own)] {
        let (good, told) = yard.attach(busy);
        assert!(good && told.contains("is served already"), "{told}");
        yard.await_calls();
    }
    must_be_right(busy);
    must_be_right(own);
}

/// Keeper, monitor and all that they wrote down are lost: the workload has its lifeline, and nobody knows of it.
#[test]
fn a_lifeline_that_nobody_knows_of_is_taken_back() {
    let ground = Ground::new();
    let (mut keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "120"]);
    // No call is answered before.
    until("a lifeline", || traffic.number("calls") > 0);
    let workload = lifelines(traffic.run.pid())[0].0;
    keeper.kill();
    monitor.kill();
    std::fs::remove_dir_all(ground.runtime.path().join("sessions")).unwrap();
    let _parts = (ground.keeper(), ground.monitor());
    let mut attach = locum(&["attach", "--runtime-dir", ground.path(), "--pid", &workload.to_string()]);
    let out = attach.output().unwrap();
    let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    let wanted = format!("process {workload}: attached, with a listener that it still had\n");
    assert!(out.status.success() && told.contains(&wanted), "{told}");
    // Calls that were being made when all was lost may wait for ever: docs/total-loss.md.
    until("the session", || !ground.status()["sessions"].as_array().unwrap().is_empty());
    let status = ground.status();
    let pid = serde_json::json!(workload);
    assert_eq!(
        (&status["sessions"][0]["pid"], &status["sessions"][0]["listeners"]),
        (&pid, &1.into()),
        "{status}"
    );
}
