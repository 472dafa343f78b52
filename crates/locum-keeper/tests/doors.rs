//! What comes in at a front door, from good senders and bad ones.

mod common;

use std::fs::File;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{
    Ground, USER, Workload, await_close, next_end, next_lease, padded_state, send, state, stranger, try_send,
    until,
};
use locum_keeper::client::Event;
use locum_keeper::protocol::Door;
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, Signal, kill_process};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn child() {
    common::play();
}

#[test]
fn a_listener_is_delivered_leased_and_ends() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let workload = ground.container("c/1");
    let (delivery, _listener, parks) = next_lease(&monitor);
    assert_eq!(delivery.state, state("c/1", "creating"));
    assert_eq!((delivery.door, delivery.peer.uid, delivery.peer.pid), (Door::Root, 0, std::process::id()));
    assert!(delivery.session.to_string().starts_with("c_1-"), "{}", delivery.session);
    assert_eq!(parks.len(), 0);
    let status = ground.status();
    assert_eq!(status.keeper.pid, ground.keeper_pid());
    assert_eq!(status.monitor.unwrap().pid, std::process::id());
    let [session] = status.sessions.as_slice() else { panic!("{:?}", status.sessions) };
    assert_eq!((session.id.clone(), session.container.as_str()), (delivery.session, "c/1"));
    assert_eq!((session.metadata.as_deref(), session.pid), (Some("policy=virtiofsd"), 4242));
    assert_eq!(session.listeners, 1);
    // Copies of the listener here and in the keeper do not keep it alive.
    drop(workload);
    assert_eq!(next_end(&monitor), delivery.listener);
    drop(monitor);
    ground.must_be_quiet();
}

#[test]
fn what_comes_while_no_monitor_runs_is_held() {
    let ground = Ground::new();
    let workloads = ["one", "two"].map(|id| ground.container(id));
    until("both sessions", || ground.status().sessions.len() == 2);
    assert_eq!(ground.status().monitor, None);
    let monitor = ground.monitor();
    let mut sessions = [0, 1].map(|_| next_lease(&monitor).0.session.to_string()[..3].to_owned());
    sessions.sort();
    assert_eq!(sessions, ["one", "two"]);
    drop((workloads, monitor));
    ground.must_be_quiet();
}

#[test]
fn an_exec_joins_its_session_and_a_start_begins_another() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let deliver = |id, status| {
        let (workload, listener) = Workload::new();
        ground.deliver(&state(id, status), &listener);
        (workload, next_lease(&monitor).0.session)
    };
    let (first, session) = deliver("c", "creating");
    let (exec, joined) = deliver("c", "running");
    assert_eq!(session, joined);
    let (other, other_session) = deliver("d", "running");
    assert_ne!(session, other_session);
    assert_eq!(ground.status().sessions.iter().find(|known| known.id == session).unwrap().listeners, 2);
    let (again, begun) = deliver("c", "creating");
    assert_ne!(session, begun);
    let (late, joined) = deliver("c", "running");
    assert_eq!(begun, joined, "the newest of two with one name");
    // A session is over with its last listener.
    drop(first);
    next_end(&monitor);
    assert!(ground.status().sessions.iter().any(|known| known.id == session && known.listeners == 1));
    drop(exec);
    next_end(&monitor);
    assert!(!ground.status().sessions.iter().any(|known| known.id == session));
    drop((other, again, late, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_large_state_in_a_thousand_pieces_delays_nobody() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let empty = padded_state("large", "creating", 0).len();
    let large = padded_state("large", "creating", (1 << 20) - empty);
    assert_eq!(large.len(), 1 << 20);
    let (workload, listener) = Workload::new();
    let door = ground.door();
    let mut others = Vec::new();
    for (index, piece) in large.as_bytes().chunks(large.len().div_ceil(1000)).enumerate() {
        let with = if index == 500 { vec![listener.as_fd()] } else { Vec::new() };
        send(&door, piece, &with);
        if index % 250 == 100 {
            others.push(ground.container("small"));
            assert!(next_lease(&monitor).0.session.to_string().starts_with("small"));
        }
    }
    let (delivery, ..) = next_lease(&monitor);
    assert_eq!(delivery.state, large);
    // The runtime has not closed its end yet.
    drop((door, workload, others, monitor, listener));
    ground.must_be_quiet();
}

#[test]
fn a_state_that_is_too_large_is_refused() {
    let ground = Ground::new();
    let (_workload, listener) = Workload::new();
    let large = padded_state("large", "creating", 1 << 20);
    let door = ground.door();
    let _ = try_send(&door, b" ", &[listener.as_fd()]);
    // Cut off in the middle.
    let _ = (&door).write_all(large.as_bytes());
    await_close(&door, SOON);
    ground.await_log("a state of more than 1048576 bytes");
    ground.must_be_quiet();
}

#[test]
fn of_two_hundred_descriptors_the_named_one_is_kept() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let (workload, listener) = Workload::new();
    let null = File::open("/dev/null").unwrap();
    let mut descriptors = vec![null.as_fd(); 200];
    // A second listener that nobody names is not kept either.
    (descriptors[150], descriptors[151]) = (listener.as_fd(), listener.as_fd());
    let mut names = vec!["other"; 200];
    names[150] = "seccompFd";
    let names = serde_json::to_string(&names).unwrap();
    let before = ground.descriptors();
    let text = state("many", "creating").replace(r#"[ "seccompFd" ]"#, &names);
    send(&ground.door(), text.as_bytes(), &descriptors);
    next_lease(&monitor);
    until("all others to be closed", || ground.descriptors() == before + 1);
    drop((workload, monitor));
    ground.must_be_quiet();
}

#[test]
fn two_listeners_in_one_message_are_one_session() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let ((one, first), (two, second)) = (Workload::new(), Workload::new());
    let text = state("both", "creating").replace(r#"[ "seccompFd" ]"#, r#"[ "seccompFd", "seccompFd" ]"#);
    send(&ground.door(), text.as_bytes(), &[first.as_fd(), second.as_fd()]);
    let deliveries = [next_lease(&monitor).0, next_lease(&monitor).0];
    assert_eq!(deliveries[0].session, deliveries[1].session);
    assert_ne!(deliveries[0].listener, deliveries[1].listener);
    drop((one, first));
    next_end(&monitor);
    assert_eq!(ground.status().sessions[0].listeners, 1);
    drop((two, second, monitor));
    ground.must_be_quiet();
}

#[test]
fn names_of_a_megabyte_do_not_break_the_status() {
    let ground = Ground::new();
    let (workload, listener) = Workload::new();
    let long = "\u{1f40c}".repeat(200_000);
    for _ in 0..12 {
        let door = ground.door();
        send(&door, b" ", &[listener.as_fd()]);
        (&door).write_all(state(&long, "creating").as_bytes()).unwrap();
    }
    until("all of them", || ground.status().sessions.len() == 12);
    assert!(long.starts_with(&ground.status().sessions[0].container));
    drop((workload, listener));
    ground.must_be_quiet();
}

#[test]
fn a_bad_sender_costs_only_its_own_connection() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let (workload, listener) = Workload::new();
    let null = File::open("/dev/null").unwrap();
    let good = state("bad", "creating");
    let two = good.replace(r#"[ "seccompFd" ]"#, r#"[ "other", "seccompFd" ]"#);
    let (listeners, files) = ([listener.as_fd()], [null.as_fd()]);
    let cases: [(&[u8], &[BorrowedFd<'_>], &str); 8] = [
        (b"hello", &listeners, "wanted a JSON object, found the byte 0x68 first"),
        (b"{\"fds\":5}", &listeners, "the state cannot be read"),
        (b"{\"fds\":[],\"\xff\":1}", &listeners, "the state is no UTF-8"),
        (good.as_bytes(), &[], "the state names descriptor 0 as seccompFd, and 0 came"),
        (good.as_bytes(), &files, "wanted a seccomp listener (anon_inode:seccomp notify), found /dev/null"),
        (two.as_bytes(), &listeners, "the state names descriptor 1 as seccompFd, and 1 came"),
        (b"{\"state\":{\"id\":\"x\"}}", &listeners, "the state's `fds` name no seccompFd"),
        (b"{\"fds\":[\"seccompFd\"]}", &listeners, "missing field `state`"),
    ];
    for (bytes, descriptors, complaint) in cases {
        let door = ground.door();
        send(&door, bytes, descriptors);
        await_close(&door, SOON);
        ground.await_log(complaint);
    }
    // Silent ones, and one that leaves in the middle.
    let silent = [0; 10].map(|_| ground.door());
    send(&ground.door(), &good.as_bytes()[..50], &[listener.as_fd()]);
    ground.await_log("it was closed after 50 bytes of an unfinished state");
    ground.deliver(&good, &listener);
    next_lease(&monitor);
    drop((silent, workload, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_second_state_on_one_connection_is_refused_clearly() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let (workload, listener) = Workload::new();
    let text = state("first", "creating") + "\n" + &state("second", "creating");
    send(&ground.door(), text.as_bytes(), &[listener.as_fd()]);
    assert!(next_lease(&monitor).0.session.to_string().starts_with("first"));
    ground.await_log("more came behind the state on one connection and is refused");
    drop((workload, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_slow_sender_is_given_up_and_a_silent_one_is_not() {
    let ground = Ground::new();
    let silent = ground.door();
    let slow = ground.door();
    send(&slow, b"{", &[]);
    await_close(&slow, Duration::from_secs(20));
    ground.await_log("a state took longer than 10 s");
    // crun connects at `create` and speaks at `start`.
    let (workload, listener) = Workload::new();
    send(&silent, state("late", "creating").as_bytes(), &[listener.as_fd()]);
    until("the late one", || ground.status().sessions.len() == 1);
    drop(workload);
    ground.must_be_quiet();
}

#[test]
fn a_door_is_for_its_user_alone() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let door = ground.dir.user_door(USER);
    let rootless = stranger("runtime", &door, USER);
    rootless.hear("DELIVERED");
    let (delivery, ..) = next_lease(&monitor);
    assert_eq!((delivery.door, delivery.peer.uid), (Door::User(USER), USER));
    assert_eq!(delivery.peer.pid, rootless.pid());
    // Root could be tricked into coming here, and would be believed.
    await_close(&UnixStream::connect(&door).unwrap(), SOON);
    ground.await_log("only uid 1500 may come here");
    let mode = |path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap()) & 0o777;
    assert_eq!(
        (mode(door), mode(ground.dir.front_door()), mode(ground.dir.control())),
        (0o600, 0o600, 0o600)
    );
    assert_eq!((mode(ground.dir.sessions()), mode(ground.dir.policies())), (0o700, 0o700));
    drop((rootless, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_rootless_user_cannot_use_up_the_keeper() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    let flood = stranger("flood", &ground.dir.user_door(USER), USER);
    flood.hear("FLOODED");
    until("the limit", || ground.status().keeper.turned_away >= 36);
    assert!(ground.log().contains("this user has all of its"), "{}", ground.log());
    let start = Instant::now();
    let workload = ground.container("root");
    next_lease(&monitor);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    drop((flood, workload, monitor));
    ground.must_be_quiet();
}

#[test]
fn a_descriptor_that_does_not_close_delays_nobody() {
    let ground = Ground::new();
    let monitor = ground.monitor();
    // Closing the last copy waits for what is not sent, and that waits for a reader.
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    let reader = server.accept().unwrap();
    set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 4096]).is_ok() {}
    // The keeper's must be the last copy: closed before it, ours would wait.
    let keeper = Pid::from_raw(ground.keeper_pid().cast_signed()).unwrap();
    kill_process(keeper, Signal::STOP).unwrap();
    send(&ground.door(), state("lingers", "creating").as_bytes(), &[socket.as_fd()]);
    drop(socket);
    kill_process(keeper, Signal::CONT).unwrap();
    ground.await_log("found socket:");
    let workload = ground.container("next");
    assert!(matches!(common::next(&monitor), Event::Lease { .. }));
    drop((workload, monitor, reader));
    ground.must_be_quiet();
}
