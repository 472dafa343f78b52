//! A keeper goes on in another program: under traffic and deliveries, with programs that are no good, and killed on the way.

mod common;

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use common::{Filtered, Ground, Process, Random, is_alive, locum, until};
use locum_kernel::notify::Listener;
use locum_kernel::socket;
use serde_json::{Value, json};

/// What is upgraded, and programs for that.
struct Stage {
    ground: Ground,
    keeper: Process,
    programs: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let ground = Ground::new();
        let programs = tempfile::tempdir().unwrap();
        Self { keeper: ground.keeper(), ground, programs }
    }

    /// A locum of its own.
    fn program(&self, name: &str) -> PathBuf {
        let path = self.programs.path().join(name);
        common::copy_program(Path::new(env!("CARGO_BIN_EXE_locum")), &path);
        path
    }

    /// A program in which no keeper should go on.
    fn successor(&self, name: &str) -> PathBuf {
        let built = Path::new(env!("CARGO_BIN_EXE_locum")).with_file_name("examples").join("successor");
        assert!(
            built.exists(),
            "no {}: cargo build -p locum-keeper --examples, or cargo xtask test",
            built.display()
        );
        let path = self.programs.path().join(name);
        common::copy_program(&built, &path);
        path
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = locum(&["keeper", "--upgrade", "--runtime-dir", self.ground.path(), "--program"]);
        command.arg(program);
        command
    }

    fn upgrade(&self, program: &Path) -> Output {
        self.command(program).output().unwrap()
    }

    fn must_upgrade(&self, program: &Path) {
        let output = self.upgrade(program);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}\n{}", self.ground.log_tail());
        assert!(said.contains(&format!("(pid {}) was locum", self.keeper.pid())), "{said}");
        assert_eq!(self.runs(), program);
    }

    /// What the keeper executes.
    fn runs(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/exe", self.keeper.pid())).unwrap()
    }

    /// How many descriptors the keeper has when there is nothing for it to hold, once it has forgotten who asked last.
    fn quiet(&self) -> usize {
        let mut last = 0;
        until("a keeper that rests", || {
            std::thread::sleep(Duration::from_millis(50));
            std::mem::replace(&mut last, self.keeper.descriptors()) == last
        });
        last
    }

    fn must_be(&self, quiet: usize) {
        let left = || std::fs::read_dir(format!("/proc/{}/fd", self.keeper.pid())).unwrap();
        let left = || left().map(|fd| std::fs::read_link(fd.unwrap().path())).collect::<Vec<_>>();
        let start = std::time::Instant::now();
        while self.keeper.descriptors() != quiet {
            assert!(start.elapsed() < Duration::from_secs(10), "{quiet} wanted: {:?}", left());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.ground.log).unwrap()
    }

    fn sessions(&self, prefix: &str) -> usize {
        let status = self.ground.status();
        let sessions = status["sessions"].as_array().unwrap();
        sessions.iter().filter(|one| one["container"].as_str().unwrap().starts_with(prefix)).count()
    }

    /// Delivers `listener` as a runtime would, in pieces, and waits until the keeper has closed its end.
    fn deliver(&self, container: &str, listener: &Listener, random: &mut Random) {
        let state = common::state(container).replace("[ ", r#"[ "other", "#);
        let door = UnixStream::connect(self.ground.runtime.path().join("oci.sock")).unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        let bytes = state.as_bytes();
        for (index, piece) in bytes.chunks(bytes.len().div_ceil(5)).enumerate() {
            let sent = match index {
                1 => socket::send_with(&door, piece, other.as_fd()),
                3 => socket::send_with(&door, piece, listener.as_fd()),
                _ => rustix::io::write(&door, piece),
            };
            assert_eq!(sent, Ok(piece.len()));
            std::thread::sleep(random.micros(100, 30_000));
        }
        assert_eq!(rustix::io::read(&door, &mut [0; 1]), Ok(0), "the keeper says nothing, and closes");
    }
}

#[test]
fn two_hundred_upgrades_cost_no_call_and_no_delivery() {
    let stage = Stage::new();
    let quiet = stage.quiet();
    let mut monitor = stage.ground.monitor();
    let programs = [stage.program("one"), stage.program("other")];
    let traffic = stage.ground.traffic(&[], &["--threads", "4", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let (delivered, done) = (AtomicU32::new(0), AtomicBool::new(false));
    let mut random = Random::new();
    std::thread::scope(|scope| {
        for runtime in 0..3 {
            let (stage, delivered, done, mut random) = (&stage, &delivered, &done, random.split());
            scope.spawn(move || {
                // The one before is still held when the next is delivered.
                let mut held = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let filtered = Filtered::new();
                    let number = delivered.fetch_add(1, Ordering::Relaxed);
                    stage.deliver(&format!("slow-{runtime}-{number}"), &filtered.listener, &mut random);
                    held.push(filtered);
                    held.drain(..held.len() - 1);
                }
                assert!(stage.sessions(&format!("slow-{runtime}-")) >= 1);
            });
        }
        for round in 0..200 {
            stage.must_upgrade(&programs[round % 2]);
            std::thread::sleep(random.micros(100, 20_000));
        }
        done.store(true, Ordering::Relaxed);
    });
    until("all deliveries to be over", || stage.sessions("slow-") == 0);
    let (log, delivered) = (stage.log(), delivered.into_inner());
    let count = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    // The traffic is one more.
    assert_eq!(count("delivered at oci.sock"), 1 + delivered as usize, "{}", stage.ground.log_tail());
    assert_eq!((count("refused at"), count("the keeper is gone")), (0, 0), "{}", stage.ground.log_tail());
    assert!(delivered > 50, "only {delivered} deliveries");
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    let report = traffic.report();
    for what in ["wrong", "failed"] {
        assert_eq!(report[what], 0, "{what}: {report}\n{}", stage.ground.log_tail());
    }
    println!("{delivered} deliveries, {report}");
    assert_eq!(stage.ground.status()["monitor"]["generation"], 1);
    // The listener and the lease are real ones: the next monitor serves on.
    monitor.kill();
    monitor = stage.ground.monitor();
    let calls = traffic.number("calls");
    until("calls by the next monitor", || traffic.number("calls") > calls + 100);
    drop((traffic, monitor));
    stage.must_be(quiet);
}

#[test]
fn what_cannot_go_on_leaves_the_keeper_as_it_is() {
    let stage = Stage::new();
    let quiet = stage.quiet();
    let monitor = stage.ground.monitor();
    let traffic = stage.ground.traffic(&[], &["--threads", "2", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let runs = stage.runs();
    let script = stage.programs.path().join("script");
    std::fs::write(&script, "#!/bin/sh\nexit 0\n").unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let (cut, denied) = (stage.program("cut"), stage.program("denied"));
    std::fs::File::options().write(true).open(&cut).unwrap().set_len(100_000).unwrap();
    std::fs::set_permissions(&denied, PermissionsExt::from_mode(0o700)).unwrap();
    for (program, wanted) in [
        (script, "cannot be executed: No such file or directory (os error 2); it is a script"),
        ("/bin/true".into(), "the rehearsal ended (exit status 0) and did not say that it is a keeper"),
        ("/etc/passwd".into(), "cannot be executed: Permission denied"),
        ("/etc".into(), "cannot be executed: Permission denied"),
        (denied, "cannot be executed: Permission denied (os error 13); it must be executable for every user"),
        (cut, "the rehearsal ended (signal 11"),
        (stage.successor("crashes"), "the rehearsal ended (signal 6"),
        (stage.successor("babbles"), "did not say that it is a keeper"),
        (stage.successor("gives-up"), "the rehearsal refused: locum 9.9.9 reads snapshots of version 9"),
        (stage.successor("forgets"), "the rehearsal, of locum 9.9.9, took 1 descriptors of "),
        (stage.successor("hangs"), "the rehearsal did not end within 10 s"),
    ] {
        let output = stage.upgrade(&program);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{}: {said}", program.display());
        assert!(
            said.contains("serves on as it is") && said.contains(wanted),
            "{}: {said}",
            program.display()
        );
        assert_eq!(stage.runs(), runs, "{}", program.display());
        until("the rehearsal to be gone", || common::children(stage.keeper.pid()).is_empty());
    }
    let missing = stage.upgrade(Path::new("/nowhere/locum"));
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(!missing.status.success() && said.contains("cannot open the program /nowhere/locum"), "{said}");
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    let report = traffic.report();
    assert_eq!((&report["wrong"], &report["failed"]), (&0.into(), &0.into()), "{report}");
    drop((traffic, monitor));
    stage.must_be(quiet);
    // And it can be upgraded.
    stage.must_upgrade(&stage.program("good"));
    stage.must_be(quiet);
}

#[test]
fn a_program_that_cannot_be_executed_after_its_rehearsal_changes_nothing() {
    let stage = Stage::new();
    let _monitor = stage.ground.monitor();
    let traffic = stage.ground.traffic(&[], &["--threads", "2", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let (runs, program) = (stage.runs(), stage.successor("vanishes"));
    let upgrade = stage.command(&program).stderr(Stdio::piped()).spawn().unwrap();
    let rehearses =
        |pid: &u32| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    until("the rehearsal", || common::children(stage.keeper.pid()).iter().any(rehearses));
    // Meanwhile there can be no other.
    let other = stage.upgrade(&stage.program("other"));
    assert!(String::from_utf8_lossy(&other.stderr).contains("another upgrade is on its way"), "{other:?}");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o644)).unwrap();
    let output = upgrade.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("cannot be executed: Permission denied"), "{said}\n{}", stage.ground.log_tail());
    assert!(stage.log().contains("has rehearsed it"));
    assert_eq!(stage.runs(), runs);
    // Nothing is handed to the next program but what should be.
    stage.must_upgrade(&stage.program("good"));
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    assert_eq!(traffic.report()["failed"], 0);
}

#[test]
fn whoever_is_killed_on_the_way_nothing_is_lost() {
    let mut stage = Stage::new();
    let _monitor = stage.ground.monitor();
    let programs = [stage.program("one"), stage.program("other")];
    let traffic = stage.ground.traffic(&[], &["--threads", "4", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let mut random = Random::new();
    let (mut rehearsals, mut refused) = (0, 0);
    for round in 0..60 {
        let mut upgrade =
            stage.command(&programs[round % 2]).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(random.micros(100, 40_000));
        if round % 3 == 0 {
            stage.keeper.kill();
            let _ = upgrade.wait().unwrap();
            stage.keeper = stage.ground.keeper();
            // A rehearsal that dies with its keeper may have copies of the old sockets until then.
            let is_filled = |status: Value| status["sessions"].as_array().is_some_and(|all| all.len() == 1);
            until("a filled keeper", || stage.ground.try_status().is_ok_and(is_filled));
        } else {
            let children = common::children(stage.keeper.pid());
            for child in &children {
                let pid = rustix::process::Pid::from_raw(child.cast_signed()).unwrap();
                // Still our keeper's child, or a zombie: it is waited for by the keeper alone.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            rehearsals += children.len();
            refused += u32::from(!upgrade.wait().unwrap().success());
            let status = stage.ground.try_status();
            let pid = status.map(|status| status["keeper"]["pid"].as_u64());
            assert_eq!(pid, Ok(Some(stage.keeper.pid().into())), "{}", stage.ground.log_tail());
        }
    }
    println!("{rehearsals} rehearsals killed, {refused} upgrades refused");
    assert!(refused > 0, "no rehearsal was hit");
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    let report = traffic.report();
    assert_eq!((&report["wrong"], &report["failed"]), (&0.into(), &0.into()), "{report}");
}

/// Two monitors serve one session, and one of them may die, while the keeper goes on in another program.
#[test]
fn keeper_and_monitor_are_upgraded_at_once() {
    let stage = Stage::new();
    let quiet = stage.quiet();
    let mut monitor = stage.ground.monitor();
    let programs = [stage.program("one"), stage.program("other")];
    let traffic = stage.ground.traffic(&[], &["--threads", "8", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let mut random = Random::new();
    for round in 0..60 {
        let upgrade = stage.command(&programs[round % 2]).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(random.micros(0, 40_000));
        let mut new = stage.ground.start_successor();
        if round % 3 == 2 {
            std::thread::sleep(random.micros(0, 40_000));
            if round % 2 == 0 {
                monitor.kill();
            } else {
                new.kill();
                new = stage.ground.successor();
            }
        }
        assert!(upgrade.wait_with_output().unwrap().status.success(), "{}", stage.ground.log_tail());
        let is_first = || stage.ground.status()["monitor"]["pid"] == new.pid();
        until("the old one to end", || !is_alive(monitor.pid()));
        until("the new one's turn", is_first);
        monitor = new;
        let report = traffic.report();
        let lost = (&report["wrong"], &report["failed"]);
        assert_eq!(lost, (&0.into(), &0.into()), "{report}\n{}", stage.ground.log_tail());
    }
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    assert_eq!(stage.sessions(""), 1);
    drop((traffic, monitor));
    stage.must_be(quiet);
}

#[test]
fn an_upgraded_keeper_is_still_its_starters_and_without_rights() {
    let ground = Ground::new();
    let keys = ground.runtime.path().join("keys");
    let mut serve = ground.start(&["serve", "--keys", keys.to_str().unwrap()]);
    let pid = || Some(u32::try_from(ground.try_status().ok()?["keeper"]["pid"].as_u64()?).unwrap());
    until("a keeper", || pid().is_some());
    let keeper = pid().unwrap();
    let output = locum(&["keeper", "--upgrade", "--runtime-dir", ground.path()]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(pid(), Some(keeper));
    let status = std::fs::read_to_string(format!("/proc/{keeper}/status")).unwrap();
    for line in
        ["Name:\tlocum", "Uid:\t64998\t64998\t64998\t64998", "NoNewPrivs:\t1", "CapPrm:\t0000000000000000"]
    {
        assert!(status.contains(line), "{line} in {status}");
    }
    // What nobody may trace is root's.
    let owner =
        std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(format!("/proc/{keeper}/environ")).unwrap());
    assert_eq!(owner, 0);
    serve.kill();
    until("the keeper to follow", || !is_alive(keeper));
}

#[test]
fn what_comes_through_a_door_and_cannot_be_closed_delays_an_upgrade_and_nobody() {
    let stage = Stage::new();
    // A connection that lingers when its last descriptor is closed: nobody reads what it has sent.
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
    stream.set_nonblocking(true).unwrap();
    while (&stream).write(&[0; 1 << 12]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(600))).unwrap();
    // It has not closed it before we have.
    let keeper = rustix::process::Pid::from_raw(stage.keeper.pid().cast_signed()).unwrap();
    rustix::process::kill_process(keeper, rustix::process::Signal::STOP).unwrap();
    let door = UnixStream::connect(stage.ground.runtime.path().join("oci.sock")).unwrap();
    socket::send_with(&door, b"{", stream.as_fd()).unwrap();
    drop(stream);
    rustix::process::kill_process(keeper, rustix::process::Signal::CONT).unwrap();
    let program = stage.program("one");
    let output = stage.upgrade(&program);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("it takes long to close what came through oci.sock"), "{said}");
    // The other end goes away, and with it the wait.
    drop(server);
    until("an upgrade", || stage.upgrade(&program).status.success());
    drop(door);
}

#[test]
fn serve_upgrades_on_sighup_and_starts_the_new_program_from_then_on() {
    let ground = Ground::new();
    let programs = tempfile::tempdir().unwrap();
    let at = |name: &str| programs.path().join(name);
    let install = |mode| {
        common::copy_program(Path::new(env!("CARGO_BIN_EXE_locum")), &at("new"));
        std::fs::set_permissions(at("new"), PermissionsExt::from_mode(mode)).unwrap();
        std::fs::rename(at("new"), at("locum")).unwrap();
    };
    install(0o755);
    let keys = ground.runtime.path().join("keys");
    let mut serve = Command::new(at("locum"));
    let policy = at("policy.toml");
    std::fs::write(&policy, "[mine]\nexports = [\"/share\"]\n").unwrap();
    serve.args(["serve", "--runtime-dir", ground.path(), "--keys"]).arg(&keys).arg("--policy").arg(&policy);
    let serve = Process(serve.stderr(std::fs::File::create(&ground.log).unwrap()).spawn().unwrap());
    let pid = |of| Some(u32::try_from(ground.try_status().ok()?[of]["pid"].as_u64()?).unwrap());
    until("a monitor", || pid("monitor").is_some());
    let traffic = ground.traffic(&[], &["--threads", "2", "--seconds", "600"]);
    until("calls", || traffic.number("calls") > 100);
    let is_installed = |pid: u32| {
        // One that has just been started may not have executed anything yet.
        let id = |path: &Path| {
            std::fs::metadata(path).map(|found| std::os::unix::fs::MetadataExt::ino(&found)).ok()
        };
        id(format!("/proc/{pid}/exe").as_ref()) == id(&at("locum"))
    };
    let hang_up = || {
        let serve = rustix::process::Pid::from_raw(serve.pid().cast_signed()).unwrap();
        rustix::process::kill_process(serve, rustix::process::Signal::HUP).unwrap();
    };
    let keeper = pid("keeper").unwrap();
    for _ in 0..3 {
        install(0o755);
        assert!(!is_installed(keeper));
        hang_up();
        until("an upgrade", || is_installed(keeper) && pid("monitor").is_some_and(is_installed));
        assert_eq!(pid("keeper"), Some(keeper));
    }
    // What is no good is said, and changes nothing.
    install(0o700);
    hang_up();
    let log = || std::fs::read_to_string(&ground.log).unwrap();
    until("a refusal", || log().contains("not upgraded to ") && log().contains("executable for every user"));
    // A monitor that cannot start leaves the one that serves in its place.
    install(0o755);
    let monitor = pid("monitor");
    std::fs::write(&policy, "[mine").unwrap();
    hang_up();
    until("a refusal", || {
        log().contains("the keeper is, the monitor is not: the new monitor does not serve")
    });
    assert!(is_installed(keeper) && pid("monitor") == monitor, "{}", ground.log_tail());
    std::fs::write(&policy, "").unwrap();
    hang_up();
    until("an upgrade", || pid("monitor").is_some_and(is_installed));
    for of in ["keeper", "monitor"] {
        let before = pid(of).unwrap();
        let killed = rustix::process::Pid::from_raw(before.cast_signed()).unwrap();
        rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
        until("another", || pid(of).is_some_and(|pid| pid != before && is_installed(pid)));
    }
    let calls = traffic.number("calls");
    until("more calls", || traffic.number("calls") > calls + 100);
    let report = traffic.report();
    assert_eq!((&report["wrong"], &report["failed"]), (&0.into(), &0.into()), "{report}");
}

/// A message of the control protocol (docs/protocol.md).
fn framed(message: &Value) -> Vec<u8> {
    let text = message.to_string();
    [&u32::try_from(text.len()).unwrap().to_le_bytes()[..], &[0; 4], text.as_bytes()].concat()
}

/// The next message, without its descriptors.
fn next(mut stream: &UnixStream) -> Value {
    let mut header = [0; 8];
    stream.read_exact(&mut header).unwrap();
    let mut text = vec![0; u32::from_le_bytes(*header.first_chunk().unwrap()) as usize];
    stream.read_exact(&mut text).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn what_is_half_said_when_the_keeper_is_upgraded_is_said_whole() {
    let stage = Stage::new();
    let program = stage.program("one");
    let monitor = UnixStream::connect(stage.ground.runtime.path().join("keeper.sock")).unwrap();
    monitor.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let hello = json!({"hello": {
        "protocol": 1, "role": "monitor", "pid": std::process::id(), "version": "0.1.0", "generation": null,
    }});
    let hello = framed(&hello);
    (&monitor).write_all(&hello[..20]).unwrap();
    stage.must_upgrade(&program);
    (&monitor).write_all(&hello[20..]).unwrap();
    assert_eq!(next(&monitor)["hello"]["generation"], 1);
    // More than the socket holds, and nobody reads.
    let names = ["one", "two", "three"];
    let text = |name| {
        common::state(name).replace(r#""bundle": ".""#, &format!(r#""bundle": "{}""#, "x".repeat(900_000)))
    };
    let filtered = names.map(|name| {
        let filtered = Filtered::new();
        let mut door = UnixStream::connect(stage.ground.runtime.path().join("oci.sock")).unwrap();
        let said = text(name);
        let sent = socket::send_with(&door, said.as_bytes(), filtered.listener.as_fd()).unwrap();
        door.write_all(&said.as_bytes()[sent..]).unwrap();
        until("the delivery", || stage.sessions(name) == 1);
        filtered
    });
    stage.must_upgrade(&program);
    stage.must_upgrade(&program);
    for name in names {
        let lease = next(&monitor);
        assert!(lease["lease"]["delivery"]["state"] == text(name), "{name}: another lease");
    }
    (&monitor).write_all(&framed(&json!({"status": {"when_monitored": false}}))).unwrap();
    assert_eq!(next(&monitor)["status"]["sessions"].as_array().unwrap().len(), 3);
    drop(filtered);
    for _ in names {
        assert!(next(&monitor)["ended"]["listener"].is_u64());
    }
}
