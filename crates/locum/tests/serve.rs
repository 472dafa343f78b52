//! `locum serve`, `keeper` and `status`: starting, dying and ending of the parts.

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Ground, Process, is_alive, locum, until};

/// A `locum serve` that is ready.
struct Serve {
    ground: Ground,
    serve: Process,
}

impl Serve {
    fn start() -> Self {
        let ground = Ground::new();
        Self { serve: Self::ready(&ground), ground }
    }

    fn ready(ground: &Ground) -> Process {
        let mut child = Self::command(ground).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, format!("serving at {}/oci.sock\n", ground.path()), "{}", ground.log_tail());
        Process(child)
    }

    /// Kills it, and waits until keeper and monitor have followed.
    fn kill(&mut self) {
        let children = [self.pid("keeper").unwrap(), self.pid("monitor").unwrap()];
        self.serve.kill();
        until("keeper and monitor to follow", || !children.into_iter().any(is_alive));
    }

    fn command(ground: &Ground) -> Command {
        let keys = ground.runtime.path().join("keys");
        let mut command = locum(&["serve", "--runtime-dir", ground.path(), "--keys", keys.to_str().unwrap()]);
        command.stderr(std::fs::File::options().create(true).append(true).open(&ground.log).unwrap());
        command
    }

    fn pid(&self, of: &str) -> Option<u32> {
        self.ground.status()[of]["pid"].as_u64().map(|pid| u32::try_from(pid).unwrap())
    }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn wait_with_output(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn whatever_dies_is_replaced_and_the_door_stays_open() {
    let serve = Serve::start();
    let done = AtomicBool::new(false);
    let door = serve.ground.runtime.path().join("oci.sock");
    std::thread::scope(|scope| {
        let visitor = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                UnixStream::connect(&door).expect("the door is shut");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        for _ in 0..5 {
            let (keeper, monitor) = (serve.pid("keeper").unwrap(), serve.pid("monitor").unwrap());
            signal(keeper, rustix::process::Signal::KILL);
            until("another keeper with the same monitor", || {
                serve.pid("keeper") != Some(keeper) && serve.pid("monitor") == Some(monitor)
            });
            signal(monitor, rustix::process::Signal::KILL);
            until("another monitor", || serve.pid("monitor").is_some_and(|pid| pid != monitor));
        }
        done.store(true, Ordering::Relaxed);
        visitor.join().unwrap();
    });
    let status = serve.ground.status();
    assert_eq!(status["monitor"]["generation"], 6, "{status}");
}

#[test]
fn it_ends_in_order_and_takes_its_sockets_along() {
    for ending in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut serve = Serve::start();
        let children = [serve.pid("keeper").unwrap(), serve.pid("monitor").unwrap()];
        signal(serve.serve.pid(), ending);
        assert_eq!(serve.serve.0.wait().unwrap().code(), Some(0));
        assert!(!children.into_iter().any(is_alive));
        let left = common::list(serve.ground.runtime.path());
        assert!(!left.iter().any(|name| name.contains(".sock")), "{left:?}");
    }
}

#[test]
fn nothing_survives_its_death() {
    let mut serve = Serve::start();
    serve.kill();
    // What it left behind is in nobody's way.
    drop(Serve::ready(&serve.ground));
}

#[test]
fn it_is_started_again_at_once_after_its_death() {
    let mut serve = Serve::start();
    for _ in 0..20 {
        serve.serve.kill();
        serve.serve = Serve::ready(&serve.ground);
    }
}

/// All of locum on a machine is lost again and again, with everything that it holds.
#[test]
fn its_death_under_traffic_costs_no_call() {
    let mut serve = Serve::start();
    let traffic = serve.ground.traffic(&[], &["--threads", "8", "--seconds", "5"]);
    let mut deaths = 0;
    loop {
        // Before its first calls a workload has no lifeline; what it tells comes ten times a second.
        let before = traffic.number("calls");
        until("calls", || traffic.has_ended() || traffic.number("calls") > before);
        if traffic.has_ended() {
            break;
        }
        serve.kill();
        serve.serve = Serve::ready(&serve.ground);
        deaths += 1;
    }
    let (status, report) = traffic.finish();
    let said = || format!("{deaths} deaths, {status}: {report}\n{}", serve.ground.log_tail());
    assert!(status.success() && report["done"] == true && deaths >= 5, "{}", said());
    for what in ["wrong", "failed", "leaked"] {
        assert_eq!(report[what], 0, "{what}: {}", said());
    }
}

#[test]
fn a_second_one_is_refused() {
    let serve = Serve::start();
    let (code, said) =
        wait_with_output(Serve::command(&serve.ground).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(code, Some(1));
    assert!(said.contains("already") && said.contains(serve.ground.path()), "{said}");
    let keeper = locum(&["keeper", "--runtime-dir", serve.ground.path()]).stderr(Stdio::piped()).spawn();
    let (code, said) = wait_with_output(keeper.unwrap());
    assert_eq!(code, Some(1));
    assert!(said.contains("already"), "{said}");
    serve.ground.status();
}

#[test]
fn a_monitor_that_cannot_start_is_an_error_and_no_loop() {
    let ground = Ground::new();
    let mut command = Serve::command(&ground);
    let (code, said) = wait_with_output(
        command.args(["--policy", "/nowhere/policy.toml"]).stderr(Stdio::piped()).spawn().unwrap(),
    );
    assert_eq!(code, Some(1));
    assert!(said.contains("/nowhere/policy.toml"), "{said}");
    assert!(said.contains("the monitor ended right after its start"), "{said}");
}

#[test]
fn systemd_is_told_when_it_serves() {
    let ground = Ground::new();
    let path = ground.runtime.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let serve = Serve::command(&ground).env("NOTIFY_SOCKET", &path).stdout(Stdio::null()).spawn().unwrap();
    let serve = Process(serve);
    let mut bytes = [0; 64];
    let got = socket.recv(&mut bytes).unwrap();
    assert_eq!(std::str::from_utf8(&bytes[..got]).unwrap().trim(), "READY=1");
    assert!(ground.status()["monitor"]["pid"].is_u64());
    drop(serve);
}

#[test]
fn a_keeper_takes_the_sockets_that_systemd_bound() {
    let ground = Ground::new();
    let path = |name| format!("{}/{name}.sock", ground.path());
    let mut command = Command::new("systemd-socket-activate");
    for name in ["oci", "oci-1500", "keeper"] {
        command.args(["--listen", &path(name)]);
    }
    command.args(["--fdname", "oci:oci-1500:keeper", env!("CARGO_BIN_EXE_locum")]);
    command.args(["keeper", "--runtime-dir", ground.path()]);
    let log = std::fs::File::create(&ground.log).unwrap();
    let keeper = Process(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
    until("the sockets", || UnixStream::connect(path("keeper")).is_ok());
    let status = ground.status();
    assert_eq!(status["keeper"]["pid"], keeper.pid(), "{}", ground.log_tail());
    // Both doors are served: what is no state is refused.
    for name in ["oci", "oci-1500"] {
        let mut door = UnixStream::connect(path(name)).unwrap();
        // The second one lets only its user in: root's connection may be closed before a word is said.
        let end = std::io::Write::write_all(&mut door, b"x").and_then(|()| door.read(&mut [0]));
        let is_over = |error: &std::io::Error| {
            use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
            matches!(error.kind(), ConnectionReset | BrokenPipe)
        };
        assert!(matches!(&end, Ok(0)) || end.as_ref().is_err_and(is_over), "{end:?}");
    }
}

#[test]
fn status_where_nothing_runs_says_so() {
    let ground = Ground::new();
    let out = locum(&["status", "--runtime-dir", ground.path()]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("cannot ask the keeper") && said.contains("locum serve"), "{said}");
}
