//! `locum run`: what its command gets, how it ends, and that nothing stays behind.

mod common;

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::{Ground, Process, USER, is_alive, lifelines, list, locum, until};
use rustix::process::{Pid, Signal};

/// `locum run` with a keeper and a monitor of its own.
fn run(options: &[&str], cmd: &[&str]) -> Command {
    let mut command = locum(&["run", "--user", "65534"]);
    command.args(options).arg("--").args(cmd).env("LOCUM_LOG", "warn");
    command
}

fn shell(script: &str) -> Output {
    run(&[], &["/bin/sh", "-c", script]).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The directories that runs on this machine have made now.
fn own_directories() -> Vec<PathBuf> {
    let places = ["/run", "/dev/shm"].map(PathBuf::from);
    let in_place = |place: &PathBuf| {
        let names = list(place).into_iter().filter(|name| name.starts_with("locum-"));
        names.map(|name| place.join(name)).collect::<Vec<_>>()
    };
    places.iter().flat_map(in_place).collect()
}

#[test]
fn exits_as_the_command_does() {
    assert_eq!(shell("exit 0").status.code(), Some(0));
    assert_eq!(shell("exit 37").status.code(), Some(37));
    assert_eq!(shell("kill -TERM $$").status.code(), Some(128 + 15));
    let not_found = run(&[], &["/nowhere/at/all"]).output().unwrap();
    assert_eq!(not_found.status.code(), Some(127));
    assert!(text(&not_found.stderr).contains("cannot run /nowhere/at/all"), "{}", text(&not_found.stderr));
    assert_eq!(run(&[], &["no-such-command"]).output().unwrap().status.code(), Some(127));
    assert_eq!(run(&[], &["/etc/passwd"]).output().unwrap().status.code(), Some(126));
}

#[test]
fn errors_say_what_was_wanted() {
    for (options, wanted) in [
        (&["--export", "/nowhere"][..], "cannot export /nowhere"),
        (&["--export", "/etc/passwd"], "wanted a directory"),
        (&["--policy", "virtiofs"], "the built-in ones are: virtiofsd"),
        (&["--policy", "/nowhere.toml"], "/nowhere.toml"),
        (&["--user", "0"], "--user"),
    ] {
        let mut command = locum(&["run"]);
        let out = command.args(options).args(["--", "true"]).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{options:?}");
        assert!(text(&out.stderr).contains(wanted), "{options:?}: {}", text(&out.stderr));
    }
    assert_eq!(locum(&["run", "--user", "x", "--", "true"]).output().unwrap().status.code(), Some(2));
    assert_eq!(locum(&["run"]).output().unwrap().status.code(), Some(2));
}

/// A workload has one lifeline, close-on-exec, unless its policy refuses it.
#[test]
fn a_policy_can_refuse_the_lifeline() {
    for (line, wanted) in [("", &[true][..]), ("lifeline = true", &[true]), ("lifeline = false", &[])] {
        let ground = Ground::new();
        let policy = ground.runtime.path().join("own.toml");
        std::fs::write(&policy, format!("[own]\n{line}\n")).unwrap();
        let policy = policy.to_str().unwrap();
        let _keeper = ground.keeper();
        let keys = ground.runtime.path().join("keys");
        let _monitor = ground.start(&["monitor", "--keys", keys.to_str().unwrap(), "--policy", policy]);
        let mut traffic = ground.traffic(&["--policy", policy], &["--threads", "2", "--seconds", "60"]);
        until("calls", || traffic.number("calls") > 100);
        let found: Vec<bool> = lifelines(traffic.run.pid()).iter().map(|held| held.2).collect();
        assert_eq!(found, wanted, "{line}: {}", ground.log_tail());
        traffic.run.kill();
    }
}

#[test]
fn the_command_has_no_rights() {
    let out = locum(&["run", "--user", "1234:4321", "--", "cat", "/proc/self/status"]).output().unwrap();
    let status = text(&out.stdout);
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.unwrap_or_else(|| panic!("{name} of {status:?}, {}", text(&out.stderr))).trim().to_owned()
    };
    assert_eq!(field("Uid"), "1234\t1234\t1234\t1234");
    assert_eq!(field("Gid"), "4321\t4321\t4321\t4321");
    assert_eq!(field("Groups"), "");
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
}

#[test]
fn the_command_runs_as_who_ran_sudo_or_nobody() {
    let who = |variables: &[(&str, &str)]| {
        let mut command = locum(&["run", "--", "sh", "-c", "echo $(id -u):$(id -g)"]);
        command.env_remove("SUDO_UID").env_remove("SUDO_GID").envs(variables.iter().copied());
        text(&command.output().unwrap().stdout).trim().to_owned()
    };
    assert_eq!(who(&[]), "65534:65534");
    assert_eq!(who(&[("SUDO_UID", "1234"), ("SUDO_GID", "99")]), "1234:99");
    assert_eq!(who(&[("SUDO_UID", "0"), ("SUDO_GID", "0")]), "65534:65534");
}

#[test]
fn the_command_keeps_environment_and_directory_and_gets_no_descriptor() {
    let inherited = File::open("/etc/hostname").unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let mut command = run(&[], &["sh", "-c", "echo $MARK; pwd; cd /proc/self/fd; echo *"]);
    let out = command.env("MARK", "here").current_dir("/usr").output().unwrap();
    drop(inherited);
    // The last is the folder that the shell's pattern was read through.
    let lines: Vec<_> = text(&out.stdout).lines().map(str::to_owned).collect();
    assert_eq!(lines[..2], ["here", "/usr"], "{}", text(&out.stderr));
    assert!(lines[2] == "0 1 2" || lines[2] == "0 1 2 3", "descriptors {}", lines[2]);
}

#[test]
fn the_command_is_served() {
    let files = common::files();
    let path = files.path().to_str().unwrap();
    let traffic = ["/proc/self/exe", "traffic", "--json", "--dir", path, "--threads", "2", "--calls", "500"];
    let out = run(&["--export", path], &traffic).output().unwrap();
    let last = text(&out.stdout).lines().last().unwrap_or_default().to_owned();
    assert!(out.status.success(), "{last} {}", text(&out.stderr));
    let report: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert_eq!((&report["calls"], &report["done"]), (&500.into(), &true.into()));
}

#[test]
fn a_policy_file_counts_even_with_a_built_in_name() {
    let files = common::files();
    let path = files.path().to_str().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let policy = policies.path().join("policy.toml");
    std::fs::write(&policy, format!("[virtiofsd]\nexports = [{path:?}]\nscope = \"mine\"\n")).unwrap();
    let traffic = ["/proc/self/exe", "traffic", "--dir", path, "--threads", "1", "--calls", "100"];
    let out = run(&["--policy", policy.to_str().unwrap()], &traffic).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
}

#[test]
fn a_living_keeper_is_used_and_left_alone() {
    let ground = Ground::new();
    let keeper = ground.keeper();
    let monitor = ground.monitor();
    let (status, report) = ground.traffic(&[], &["--threads", "2", "--calls", "300"]).finish();
    assert!(status.success() && report["calls"] == 300, "{status}: {report}");
    until("the policy's removal", || list(&ground.runtime.path().join("policies")).is_empty());
    assert!(is_alive(keeper.pid()) && is_alive(monitor.pid()));
}

#[test]
fn signals_reach_the_command() {
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP")] {
        let script =
            format!("trap 'echo got {name}; exit 5' {name}; echo ready; while :; do sleep 0.02; done");
        let mut child = Process(run(&[], &["sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap());
        let mut out = child.0.stdout.take().unwrap();
        let mut ready = [0; 6];
        out.read_exact(&mut ready).unwrap();
        rustix::process::kill_process(Pid::from_child(&child.0), signal).unwrap();
        assert_eq!(child.0.wait().unwrap().code(), Some(5));
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("got {name}\n"));
    }
}

/// Every process and directory of a run is gone soon after it, whichever way it ends.
#[test]
fn nothing_stays_behind() {
    for end in ["of itself", "TERM", "KILL"] {
        let script = if end == "of itself" { "echo ready" } else { "echo ready; exec sleep 1000" };
        let mut child = Process(run(&[], &["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap());
        // Read to its end only later: it is closed when nobody of ours holds it any more.
        let mut out = child.0.stdout.take().unwrap();
        let mut ready = [0; 6];
        out.read_exact(&mut ready).unwrap();
        let family = descendants(child.pid());
        let handles: Vec<OwnedFd> = family.iter().filter_map(|pid| hold(*pid)).collect();
        let directories: Vec<_> =
            own_directories().into_iter().filter(|path| family.iter().any(|pid| names(*pid, path))).collect();
        let pid = Pid::from_child(&child.0);
        match end {
            "TERM" => rustix::process::kill_process(pid, Signal::TERM).unwrap(),
            "KILL" => rustix::process::kill_process(pid, Signal::KILL).unwrap(),
            _ => {}
        }
        let status = child.0.wait().unwrap();
        match end {
            "TERM" => assert_eq!(status.code(), Some(128 + 15)),
            "KILL" => assert_eq!(status.signal(), Some(9)),
            _ => assert_eq!(status.code(), Some(0)),
        }
        if end != "of itself" {
            // Otherwise all of it may be gone before we look.
            assert!(handles.len() >= 4, "{family:?}");
            assert_eq!(directories.len(), 1, "{family:?}");
        }
        for handle in &handles {
            let mut poll = [rustix::event::PollFd::new(handle, rustix::event::PollFlags::IN)];
            let patience = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
            let ended = rustix::event::poll(&mut poll, Some(&patience)).unwrap();
            assert_eq!(ended, 1, "{end}: a process of the run lives on; descriptor {}", handle.as_raw_fd());
        }
        until("the end of the directory", || directories.iter().all(|path| !path.exists()));
    }
}

fn descendants(pid: u32) -> Vec<u32> {
    let own = common::children(pid);
    own.iter().flat_map(|child| descendants(*child)).chain(own.clone()).collect()
}

fn hold(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(pid.cast_signed())?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

/// Whether `path` is on the command line of `pid`.
fn names(pid: u32, path: &std::path::Path) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text(&line).split('\0').any(|word| word.contains(path.to_str().unwrap()))
}

#[test]
fn a_keeper_that_takes_nothing_does_not_hang_it() {
    // A front door that nobody answers, with a full queue.
    let ground = Ground::new();
    let door =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    let address = rustix::net::SocketAddrUnix::new(ground.runtime.path().join("oci.sock")).unwrap();
    rustix::net::bind(&door, &address).unwrap();
    rustix::net::listen(&door, 8).unwrap();
    let user = USER.to_string();
    let mut command =
        locum(&["run", "--runtime-dir", ground.path(), "--user", &user, "--", "sh", "-c", "exit 3"]);
    // Delivered into a queue that nobody empties, which is all that the runtime's part is.
    assert_eq!(command.output().unwrap().status.code(), Some(3));
}
