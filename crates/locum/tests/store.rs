//! What a keeper has stored by systemd, and what it makes of what it finds there. The service manager here is this test.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileExt as _, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;

use common::{Filtered, Ground, Process, until};
use rustix::io::FdFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

/// A manager with a store, and a keeper of it.
struct Managed {
    ground: Ground,
    notified: UnixDatagram,
    sockets: [UnixListener; 2],
    store: Vec<(String, OwnedFd)>,
}

impl Managed {
    fn new() -> Self {
        let ground = Ground::new();
        let at = |name: &str| ground.runtime.path().join(name);
        let sockets = ["oci.sock", "keeper.sock"].map(|name| UnixListener::bind(at(name)).unwrap());
        let notified = UnixDatagram::bind(at("notify")).unwrap();
        notified.set_nonblocking(true).unwrap();
        // As systemd's.
        std::fs::set_permissions(at("notify"), PermissionsExt::from_mode(0o777)).unwrap();
        Self { sockets, notified, store: Vec::new(), ground }
    }

    /// Starts a keeper with all that is stored, and waits until it answers.
    fn keeper(&self) -> Process {
        let sockets = self.sockets.iter().map(|socket| socket.as_fd());
        let all = sockets.chain(self.store.iter().map(|(_, fd)| fd.as_fd()));
        // Copies at numbers that those from 3 on do not overwrite.
        let copies: Vec<_> = all.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 500).unwrap()).collect();
        let redirect = |(index, copy): (usize, &OwnedFd)| {
            rustix::io::fcntl_setfd(copy, FdFlags::empty()).unwrap();
            format!("{}<&{}", index + 3, copy.as_raw_fd())
        };
        let moves = copies.iter().enumerate().map(redirect).collect::<Vec<_>>().join(" ");
        let names = self.store.iter().map(|(name, _)| name.as_str());
        let names = ["oci", "keeper"].into_iter().chain(names).collect::<Vec<_>>().join(":");
        let script = format!("exec {moves}; export LISTEN_PID=$$; exec \"$@\"");
        let mut command = Command::new("bash");
        command.args([
            "-c",
            &script,
            "bash",
            env!("CARGO_BIN_EXE_locum"),
            "keeper",
            "--runtime-dir",
            self.ground.path(),
        ]);
        command.env("NOTIFY_SOCKET", self.ground.runtime.path().join("notify"));
        command.env("LISTEN_FDS", copies.len().to_string()).env("LISTEN_FDNAMES", names);
        let log = File::options().create(true).append(true).open(&self.ground.log).unwrap();
        let keeper = Process(command.stderr(log).spawn().unwrap());
        drop(copies);
        until("the keeper", || {
            self.ground.try_status().is_ok_and(|status| status["keeper"]["pid"] == keeper.pid())
        });
        keeper
    }

    /// Does what the keeper has asked for.
    fn obey(&mut self) {
        let mut bytes = [0; 1024];
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut part = [IoSliceMut::new(&mut bytes)];
            let Ok(got) =
                rustix::net::recvmsg(&self.notified, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC)
            else {
                return;
            };
            let brought = control.drain().flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
                _ => Vec::new(),
            });
            let brought: Vec<_> = brought.collect();
            let text = std::str::from_utf8(&bytes[..got.bytes]).unwrap();
            let said: BTreeMap<_, _> = text.lines().map(|line| line.split_once('=').unwrap()).collect();
            if said.contains_key("FDSTORE") {
                assert_eq!(said["FDPOLL"], "0");
                self.store.extend(brought.into_iter().map(|fd| (said["FDNAME"].to_owned(), fd)));
            } else if said.contains_key("FDSTOREREMOVE") {
                self.store.retain(|(name, _)| name != said["FDNAME"]);
            }
        }
    }

    fn await_store(&mut self, count: usize) {
        until("the store", || {
            self.obey();
            self.store.len() == count
        });
    }

    fn deliver(&self, container: &str) -> Filtered {
        let filtered = Filtered::new();
        let door = UnixStream::connect(self.ground.runtime.path().join("oci.sock")).unwrap();
        let state = common::state(container);
        locum_kernel::socket::send_with(&door, state.as_bytes(), filtered.listener.as_fd()).unwrap();
        filtered
    }

    fn containers(&self) -> Vec<String> {
        let status = self.ground.status();
        let mut all: Vec<_> = status["sessions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["container"].as_str().unwrap().to_owned())
            .collect();
        all.sort();
        all
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.ground.log).unwrap()
    }
}

fn memfd(bytes: &[u8]) -> OwnedFd {
    let made = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    File::from(made.try_clone().unwrap()).write_all(bytes).unwrap();
    made
}

#[test]
fn what_is_stored_comes_back_with_all_that_was_known_of_it() {
    let mut managed = Managed::new();
    let mut keeper = managed.keeper();
    let (one, two) = (managed.deliver("one"), managed.deliver("two"));
    managed.await_store(4);
    let before = managed.ground.status()["sessions"].clone();
    keeper.kill();
    let mut keeper = managed.keeper();
    assert_eq!(managed.ground.status()["sessions"], before);
    // A monitor is given them, and the store knows who has them.
    let mut monitor = managed.ground.monitor();
    managed.await_store(5);
    until("the monitor", || managed.log().matches("serving session=").count() == 2);
    let holders = |managed: &Managed| -> Vec<u64> {
        let notes = managed.store.iter().filter_map(|(_, fd)| {
            let mut header = [0; 16];
            File::from(fd.try_clone().unwrap()).read_exact_at(&mut header, 0).ok()?;
            Some(u64::from_le_bytes(*header.last_chunk().unwrap()))
        });
        notes.collect()
    };
    until("notes that name it", || holders(&managed) == [1, 1]);
    // One more keeper, twice: the monitor keeps what it has, in its generation.
    for _ in 0..2 {
        keeper.kill();
        keeper = managed.keeper();
        until("the monitor", || managed.ground.status()["monitor"]["version"] != "unknown");
        let status = managed.ground.status();
        assert_eq!((&status["sessions"], &status["monitor"]["generation"]), (&before, &1.into()));
        managed.obey();
        assert_eq!((managed.store.len(), holders(&managed)), (5, vec![1, 1]));
    }
    // Both are killed; and what ended meanwhile is over.
    keeper.kill();
    monitor.kill();
    drop(one);
    let keeper = managed.keeper();
    managed.await_store(2);
    assert_eq!(managed.containers(), ["two"]);
    until("a note that names nobody", || holders(&managed) == [0]);
    // An upgrade tells the store nothing anew.
    let upgrade =
        common::locum(&["keeper", "--upgrade", "--runtime-dir", managed.ground.path()]).output().unwrap();
    assert!(upgrade.status.success(), "{upgrade:?}\n{}", managed.ground.log_tail());
    let three = managed.deliver("three");
    managed.await_store(4);
    let mut names: Vec<_> = managed.store.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    assert_eq!(names.len(), 2, "{names:?}");
    drop((two, three));
    managed.await_store(0);
    assert!(!managed.log().contains("left untouched"), "{}", managed.ground.log_tail());
    drop(keeper);
}

#[test]
fn what_cannot_be_understood_is_said_and_left_untouched() {
    let mut managed = Managed::new();
    let (foreign, good) = (Filtered::new(), Filtered::new());
    let listener = |of: &Filtered| OwnedFd::from(of.listener.try_clone().unwrap());
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let note = |version: u64, delivery: &Value| {
        memfd(&[&version.to_le_bytes()[..], &7u64.to_le_bytes(), delivery.to_string().as_bytes()].concat())
    };
    let delivery = json!({
        "session": "good-00000001", "listener": 5, "door": "root", "peer": {"uid": 0, "gid": 0, "pid": 1},
        "state": common::state("good"), "sequence": 3,
    });
    let stateless = json!({
        "session": "bad-00000001", "listener": 6, "door": "root", "peer": {"uid": 0, "gid": 0, "pid": 1},
        "state": "none", "sequence": 3,
    });
    let mut store = |name: &str, descriptors: Vec<OwnedFd>| {
        managed.store.extend(descriptors.into_iter().map(|fd| (name.to_owned(), fd)));
    };
    store("strange", vec![null()]);
    store("-1", vec![listener(&foreign), note(1, &delivery)]);
    store("monitor-1-2", vec![null()]);
    store("0", vec![listener(&foreign)]);
    store("1", vec![listener(&foreign), null(), null()]);
    store("2", vec![null(), note(1, &delivery)]);
    store("3", vec![listener(&foreign), memfd(b"short")]);
    store("4", vec![listener(&foreign), note(2, &delivery)]);
    store("5", vec![listener(&foreign), note(1, &json!({"more": 1}))]);
    store("6", vec![listener(&foreign), note(1, &stateless)]);
    store("7", vec![listener(&foreign), listener(&foreign)]);
    store("70000000000", vec![listener(&foreign), note(1, &delivery)]);
    // The order does not matter, and neither does a monitor that is not there.
    store("8", vec![note(1, &delivery), listener(&good)]);
    store("9", vec![listener(&good), note(1, &delivery)]);
    let count = managed.store.len();
    let _keeper = managed.keeper();
    assert_eq!(managed.containers(), ["good"]);
    let log = managed.log();
    for line in [
        r#""strange", which systemd stored for a keeper, is left untouched: nothing of this release has such a name"#,
        r#""-1", which"#,
        r#""monitor-1-2", which"#,
        r#""0", which systemd stored for a keeper, is left untouched: wanted a listener and a note, found 1 descriptors"#,
        r#""1", which systemd stored for a keeper, is left untouched: wanted a listener and a note, found 3 descriptors"#,
        r#""2", which systemd stored for a keeper, is left untouched: wanted a seccomp listener"#,
        r#""3", which systemd stored for a keeper, is left untouched: its note is of 5 bytes"#,
        r#""4", which systemd stored for a keeper, is left untouched: wanted a note of version 1, found 2"#,
        r#""5", which systemd stored for a keeper, is left untouched: its note cannot be read: missing field"#,
        r#""6", which systemd stored for a keeper, is left untouched: its note cannot be read: expected"#,
        r#""7", which systemd stored for a keeper, is left untouched: its note cannot be read: "#,
        r#""70000000000", which"#,
        r#""9", which systemd stored for a keeper, is left untouched: its listener is there by another name"#,
    ] {
        assert!(log.contains(line), "{line}\n{log}");
    }
    managed.obey();
    assert_eq!(managed.store.len(), count, "nothing is taken out");
    // Nor is a name used that is theirs.
    let _next = managed.deliver("next");
    managed.await_store(count + 2);
    let name = managed.store.last().unwrap().0.clone();
    assert_eq!(managed.store.iter().filter(|(other, _)| *other == name).count(), 2, "{name}");
    drop(good);
    managed.await_store(count);
}
