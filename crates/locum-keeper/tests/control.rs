//! Keeper and monitors: leases, parks, and either of them dying.

mod common;

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{
    Ground, USER, Workload, await_close, frame, next, next_end, next_lease, park, parked, state, stranger,
    until,
};
use locum_keeper::client::Event;
use locum_keeper::protocol::{Delivery, Door, ListenerId, Peer};
use locum_keeper::{SocketError, Sockets};
use rustix::fs::{CWD, Mode};

#[test]
fn child() {
    common::play();
}

#[test]
fn the_keeper_has_no_privilege_left_in_any_thread() {
    let ground = Ground::new();
    let threads = std::fs::read_dir(format!("/proc/{}/task", ground.keeper_pid())).unwrap();
    let mut looked_at = 0;
    for thread in threads {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        // The test runner's own main thread waits for the one that is the keeper here.
        if field("Name:") == "child" || field("Name:") == "discard" {
            assert_eq!(field("Uid:"), "64998\t64998\t64998\t64998");
            assert_eq!(field("Gid:"), "64998\t64998\t64998\t64998");
            assert_eq!(field("Groups:"), "");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                assert_eq!(field(set), "0000000000000000", "{set}");
            }
            assert_eq!(field("NoNewPrivs:"), "1");
            looked_at += 1;
        }
    }
    assert_eq!(looked_at, 3, "the loop, and a thread for each door");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", ground.keeper_pid())).unwrap();
    let files: Vec<_> =
        limits.lines().find(|line| line.starts_with("Max open files")).unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4], "soft and hard");
}

#[test]
fn the_next_in_line_gets_everything_when_the_holder_dies() {
    let ground = Ground::new();
    let mut holder = ground.mortal_monitor();
    let standby = ground.monitor();
    let quiet = ground.descriptors();
    let workloads = ["a", "b"].map(|id| ground.container(id));
    holder.hear("LEASED");
    holder.hear("LEASED");
    until("the parks", || ground.descriptors() >= quiet + 6);
    assert_eq!(ground.status().monitor.unwrap().pid, holder.pid());
    let start = Instant::now();
    holder.kill();
    let mut sessions = Vec::new();
    for _ in 0..2 {
        let (delivery, _, parks) = next_lease(&standby);
        let [park] = parks.as_slice() else { panic!("{parks:?}") };
        assert_eq!((park.slot, parked(park)), (3, b"parked".to_vec()));
        sessions.push(delivery.session);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_ne!(sessions[0], sessions[1]);
    let status = ground.status();
    let monitor = status.monitor.unwrap();
    assert_eq!((monitor.pid, monitor.generation), (std::process::id(), 2));
    assert_eq!(ground.monitors(), 1, "the dead one is forgotten");
    drop((workloads, standby));
    ground.must_be_quiet();
}

#[test]
fn a_monitor_that_lives_keeps_its_leases_without_a_connection() {
    let ground = Ground::new();
    let holder = ground.monitor();
    let workload = ground.container("c");
    let (delivery, ..) = next_lease(&holder);
    let standby = ground.mortal_monitor();
    drop(holder);
    // Had the standby got it, it would serve what this process may still be at.
    until("the old connection's end", || ground.status().monitor.unwrap().pid == std::process::id());
    let again = ground.monitor();
    assert_eq!(next_lease(&again).0, delivery, "told anew");
    // The same process, whether or not its old connection is closed yet.
    let newest = ground.monitor();
    assert_eq!(next_lease(&newest).0, delivery);
    drop(again);
    let second = ground.container("d");
    next_lease(&newest);
    drop((workload, second, standby, newest));
    ground.must_be_quiet();
}

#[test]
fn a_new_keeper_is_filled_by_a_living_monitor() {
    let mut ground = Ground::new();
    let (first, generation) = ground.monitor_of(None);
    assert_eq!(generation, 1);
    let workload = ground.container("c");
    let (delivery, listener, _) = next_lease(&first);
    ground.kill_keeper();
    assert!(matches!(next(&first), Event::Lost));
    ground.start_keeper();
    assert_eq!(ground.status().sessions, []);
    let (second, generation) = ground.monitor_of(Some(7));
    assert_eq!(generation, 7);
    // More parks than descriptors fit into one message.
    let parks: Vec<_> = (0..200).map(|slot| park(slot, &slot.to_le_bytes())).collect();
    second.fill(&delivery, &listener, &parks).unwrap();
    drop(parks);
    until("the fill", || ground.status().sessions.len() == 1);
    // An exec finds the session that began with the old keeper.
    let (exec, exec_listener) = Workload::new();
    ground.deliver(&state("c", "running"), &exec_listener);
    drop(exec_listener);
    let (joined, ..) = next_lease(&second);
    assert_eq!(joined.session, delivery.session);
    assert!(joined.sequence > delivery.sequence);
    // This process lives, so it is told all that the keeper has.
    drop(second);
    let (third, _) = ground.monitor_of(Some(7));
    let mut leases = [next_lease(&third), next_lease(&third)];
    leases.sort_by_key(|(delivery, ..)| delivery.sequence);
    let [(first, _, parks), (second, ..)] = leases;
    assert_eq!((&first, &second), (&delivery, &joined));
    assert_eq!(parks.len(), 200);
    for park in &parks {
        assert_eq!(parked(park), park.slot.to_le_bytes());
    }
    drop((workload, exec, parks));
    let mut ended = [next_end(&third), next_end(&third)];
    ended.sort();
    let mut wanted = [delivery.listener, joined.listener];
    wanted.sort();
    assert_eq!(ended, wanted);
    drop((listener, third));
    assert_eq!(ground.monitor_of(None).1, 8);
}

#[test]
fn what_another_holds_cannot_be_taken_by_filling() {
    let ground = Ground::new();
    let holder = ground.mortal_monitor();
    let (workload, listener) = Workload::new();
    ground.deliver(&state("c", "creating"), &listener);
    let id = ListenerId(holder.hear("LEASED").parse().unwrap());
    let delivery = Delivery {
        session: ground.status().sessions[0].id.clone(),
        listener: id,
        door: Door::Root,
        peer: Peer { uid: 0, gid: 0, pid: 0 },
        state: state("c", "creating"),
        sequence: 1,
    };
    let other = ground.monitor();
    other.park(id, &park(0, b"")).unwrap();
    ground.await_log("a park for what another monitor holds is not taken");
    other.fill(&delivery, &listener, &[]).unwrap();
    ground.await_log("a fill of what another monitor holds is not taken");
    assert!(matches!(next(&other), Event::Relieved), "two that serve one session: one has to leave");
    assert_eq!(ground.status().monitor.unwrap().pid, holder.pid());
    drop((listener, workload, holder, other));
    ground.must_be_quiet();
}

/// Promise 6.
#[test]
fn a_successor_serves_beside_the_holder_and_then_relieves_it() {
    let ground = Ground::new();
    let holder = ground.mortal_monitor();
    let first = ground.container("a");
    holder.hear("LEASED");
    let successor = ground.successor().unwrap();
    let (delivery, ..) = next_lease(&successor);
    let second = ground.container("b");
    holder.hear("LEASED");
    next_lease(&successor);
    assert_eq!(ground.status().monitor.unwrap().pid, holder.pid());
    // Each in slots of its own: both parks are kept.
    successor.park(delivery.listener, &park(9, b"mine")).unwrap();
    successor.relieve().unwrap();
    // What has changed hands is told again.
    let again = [next_lease(&successor), next_lease(&successor)];
    let parks = &again.iter().find(|(known, ..)| *known == delivery).unwrap().2;
    assert_eq!(parks.iter().map(|park| park.slot).collect::<Vec<_>>(), [3, 9]);
    assert!(matches!(next(&successor), Event::Relieving));
    holder.hear("RELIEVED");
    assert_eq!(ground.status().monitor.unwrap().pid, std::process::id());
    // From here on sessions begin at the successor's alone; what ends, too.
    let third = ground.container("c");
    next_lease(&successor);
    drop(third);
    next_end(&successor);
    drop(again);
    // What the holder left when it ended is looked for by the successor.
    drop(holder);
    let (one, other) = (next_lease(&successor), next_lease(&successor));
    assert_eq!(ground.monitors(), 1);
    drop((first, second, one, other, successor));
    ground.must_be_quiet();
}

#[test]
fn a_successor_that_dies_before_it_relieved_anyone_leaves_all_to_the_holder() {
    let ground = Ground::new();
    let mut first = ground.mortal_monitor();
    let workload = ground.container("a");
    first.hear("LEASED");
    let second = ground.successor().unwrap();
    next_lease(&second);
    second.relieve().unwrap();
    next_lease(&second);
    assert!(matches!(next(&second), Event::Relieving));
    first.hear("RELIEVED");
    // Whoever was relieved stays as long as it is not gone, and is better than nobody.
    let third = ground.mortal("successor");
    third.hear("LEASED");
    first.kill();
    next_lease(&second);
    drop(third);
    let (delivery, ..) = next_lease(&second);
    drop(workload);
    assert_eq!(next_end(&second), delivery.listener);
    drop(second);
    ground.must_be_quiet();
}

#[test]
fn the_relieved_take_over_again_if_the_successor_dies() {
    let ground = Ground::new();
    let first = ground.monitor();
    let workload = ground.container("a");
    let (delivery, ..) = next_lease(&first);
    let mut second = ground.mortal("reliever");
    second.hear("RELIEVING");
    assert!(matches!(next(&first), Event::Relieved));
    second.kill();
    assert_eq!(next_lease(&first).0, delivery);
    drop(workload);
    next_end(&first);
    drop(first);
    ground.must_be_quiet();
}

#[test]
fn a_monitor_of_a_release_that_cannot_be_relieved_is_named() {
    let ground = Ground::new();
    let mut old = UnixStream::connect(ground.dir.control()).unwrap();
    let hello = r#"{"hello":{"protocol":1,"role":"monitor","pid":1,"version":"0.1.0","generation":null}}"#;
    old.write_all(&frame(hello)).unwrap();
    until("the monitor", || ground.status().monitor.is_some());
    let refused = ground.successor().unwrap_err().to_string();
    assert!(refused.contains("locum 0.1.0) is of a release that cannot be relieved"), "{refused}");
    assert!(ground.status().monitor.is_some());
    drop(old);
    ground.must_be_quiet();
}

#[test]
fn a_bad_client_costs_only_its_own_connection() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let control = || UnixStream::connect(ground.dir.control()).unwrap();
    let say = |bytes: &[u8]| {
        let stream = control();
        (&stream).write_all(bytes).unwrap();
        stream
    };
    let patience = Duration::from_secs(5);
    await_close(&say(&[0xff; 8]), patience);
    ground.await_log("a message of 4294967295 bytes");
    await_close(&say(&frame("no json")), patience);
    await_close(&say(&frame(r#"{"status":{"when_monitored":false}}"#)), patience);
    let hello = r#"{"hello":{"protocol":1,"role":"observer","pid":1,"version":"","generation":null}}"#;
    let observer = say(&[frame(hello), frame(r#"{"park":{"listener":1,"slot":1}}"#)].concat());
    let mut answer = Vec::new();
    observer.set_read_timeout(Some(patience)).unwrap();
    let _ = std::io::Read::read_to_end(&mut &observer, &mut answer);
    ground.await_log("its first message is no hello, or a later one is");
    // Half a message, and silence, in the meantime.
    let half = say(&frame(hello)[..20]);
    let workload = ground.container("c");
    let (delivery, ..) = next_lease(&monitor);
    drop(workload);
    assert_eq!(next_end(&monitor), delivery.listener);
    drop((half, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_newer_protocol_is_refused_in_words() {
    let ground = Ground::new();
    let mut stream = UnixStream::connect(ground.dir.control()).unwrap();
    stream.write_all(&frame(r#"{"hello":{"protocol":2,"role":"something new"}}"#)).unwrap();
    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut stream, &mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[8..]);
    assert!(
        answer.contains("speaks protocol 1 and was addressed in 2; upgrade the keeper first"),
        "{answer}"
    );
    ground.must_be_quiet();
}

/// A monitor of 0.1.0, as the bytes that it sent: it is served beside one that speaks what no release does yet.
#[test]
fn a_monitor_of_0_1_0_is_served() {
    let ground = Ground::new();
    let said = include_str!("../src/frozen/0.1.0.jsonl").lines();
    let said: Vec<_> = said
        .filter_map(|line| line.strip_prefix(r#"{"to_keeper":"#)?.strip_suffix('}'))
        .filter(|message| message.contains(r#""role":"monitor""#) || message.contains("when_monitored"))
        .map(frame)
        .collect();
    let mut monitor = UnixStream::connect(ground.dir.control()).unwrap();
    monitor.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    monitor.write_all(&said[0]).unwrap();
    let answer = || {
        let (mut header, mut json) = ([0; 8], Vec::new());
        std::io::Read::read_exact(&mut &monitor, &mut header).unwrap();
        json.resize(u32::from_le_bytes(*header.first_chunk().unwrap()) as usize, 0);
        std::io::Read::read_exact(&mut &monitor, &mut json).unwrap();
        serde_json::from_slice::<serde_json::Value>(&json).unwrap()
    };
    let welcome = answer();
    assert_eq!((&welcome["hello"]["protocol"], &welcome["hello"]["generation"]), (&1.into(), &1.into()));
    let workload = ground.container("c");
    let lease = answer();
    assert_eq!(lease["lease"]["delivery"]["door"], "root");
    assert_eq!(lease["lease"]["slots"], serde_json::json!([]));
    let mut newer = UnixStream::connect(ground.dir.control()).unwrap();
    newer.write_all(&frame(r#"{"hello":{"protocol":99}}"#)).unwrap();
    std::io::Read::read_to_end(&mut newer, &mut Vec::new()).unwrap();
    (&monitor).write_all(&said[2]).unwrap();
    let status = answer();
    assert_eq!(status["status"]["monitor"]["version"], "0.1.0");
    drop(workload);
    let ended = answer();
    assert_eq!(ended["ended"]["listener"], lease["lease"]["delivery"]["listener"]);
    drop(monitor);
    ground.must_be_quiet();
}

#[test]
fn the_control_socket_is_for_root() {
    let ground = Ground::new();
    // Even if its mode were lost.
    rustix::fs::chmodat(CWD, ground.dir.control(), Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty())
        .unwrap();
    let other = stranger("say", &ground.dir.control(), USER);
    other.hear("END true");
    ground.await_log("refused at keeper.sock: not root");
    ground.must_be_quiet();
}

#[test]
fn two_keepers_never_have_one_directory() {
    let ground = Ground::new();
    let second = Sockets::bind(&ground.dir, &[]);
    assert!(matches!(second, Err(SocketError::Locked(_))), "{second:?}");
    assert!(second.unwrap_err().to_string().contains("a keeper is running in"));
    // And its sockets are still there.
    ground.status();
}

#[test]
fn who_waits_for_a_monitor_is_answered_when_it_comes() {
    let ground = Ground::new();
    let dir = ground.dir.clone();
    let waiting = std::thread::spawn(move || locum_keeper::client::status(&dir, true).unwrap());
    let monitor: Arc<_> = ground.monitor();
    assert_eq!(waiting.join().unwrap().monitor.unwrap().generation, 1);
    drop(monitor);
    ground.must_be_quiet();
}

#[test]
fn a_directory_in_which_others_can_write_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let refused = |mode, owner| {
        let fresh = temporary.path().join("dir");
        std::fs::create_dir(&fresh).unwrap();
        std::fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&fresh, Some(owner), None).unwrap();
        let bound = Sockets::bind(&locum_keeper::RuntimeDir::new(&fresh), &[]);
        std::fs::remove_dir_all(&fresh).unwrap();
        bound.err().map(|error| error.to_string())
    };
    assert_eq!(refused(0o700, 0), None);
    for (mode, owner) in [(0o1777, 0), (0o775, 0), (0o755, USER)] {
        let error = refused(mode, owner).unwrap();
        assert!(error.contains("that no other may write to, found one of user"), "{error}");
    }
}
