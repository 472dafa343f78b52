//! `locum serve` for one test, with a directory of its own, and whoever kills its monitor.

use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Process, locum, until};
use crate::components;
use crate::container::Runtime;

/// A runtime directory and what is in it for containers of one runtime.
pub(crate) struct Service {
    runtime: Runtime,
    folder: TempDir,
}

/// What the sessions of a service have counted together.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    pub(crate) listeners: u64,
    pub(crate) calls: u64,
    pub(crate) refused: u64,
    pub(crate) recovered: u64,
}

impl Counted {
    fn of(status: &Value) -> Self {
        let sum =
            |name| status["sessions"].as_array().unwrap().iter().map(|one| one[name].as_u64().unwrap()).sum();
        Self {
            listeners: sum("listeners"),
            calls: sum("calls"),
            refused: sum("refused"),
            recovered: sum("recovered"),
        }
    }
}

impl Service {
    pub(crate) fn new(runtime: Runtime) -> Self {
        let service = Self { runtime, folder: components::folder_in("/dev/shm") };
        let policy = format!(
            r#"[rootless]
calls = ["name_to_handle_at", "open_by_handle_at"]
peers = [{}]
exports = ["/share"]
scope = "{{container}}"
trusted = ["container"]
o_path = "fast"
"#,
            runtime.user()
        );
        fs::write(service.at("policy.toml"), policy).unwrap();
        fs::create_dir(service.at("keys")).unwrap();
        fs::set_permissions(service.at("keys"), fs::Permissions::from_mode(0o700)).unwrap();
        service
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts keeper and monitor, each started again when it dies.
    pub(crate) fn serve(&self) -> Process {
        self.start("serve", true, true)
    }

    pub(crate) fn keeper(&self) -> Process {
        self.start("keeper", true, false)
    }

    pub(crate) fn monitor(&self) -> Process {
        self.start("monitor", false, true)
    }

    fn start(&self, part: &str, keeps: bool, monitors: bool) -> Process {
        let log = fs::File::options().create(true).append(true).open(self.at("log")).unwrap();
        let mut command = locum(&[part, "--runtime-dir"]);
        command.arg(self.at("runtime"));
        if keeps && self.runtime.user() != 0 {
            command.args(["--door", &self.runtime.user().to_string()]);
        }
        if monitors {
            command.arg("--keys").arg(self.at("keys")).arg("--policy").arg(self.at("policy.toml"));
        }
        let process = Process(command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap());
        if keeps {
            // It is bound after the doors.
            let control = self.at("runtime/keeper.sock");
            until("the keeper", || std::os::unix::net::UnixStream::connect(&control).is_ok());
        }
        process
    }

    /// The seccomp profile of the containers, made from the runtime's default one.
    pub(crate) fn seccomp(&self) -> Value {
        match self.runtime.user() {
            0 => self.profile(&["virtiofsd"]),
            user => self.profile(&["--door", &user.to_string(), self.at("policy.toml").to_str().unwrap()]),
        }
    }

    pub(crate) fn profile(&self, policy: &[&str]) -> Value {
        let mut profile = locum(&["profile", "--runtime", self.runtime.name(), "--runtime-dir"]);
        profile.arg(self.at("runtime")).args(policy);
        serde_json::from_str(&components::run(&mut profile)).unwrap()
    }

    pub(crate) fn status(&self) -> Value {
        let output = locum(&["status", "--json", "--runtime-dir"]).arg(self.at("runtime")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub(crate) fn counted(&self) -> Counted {
        Counted::of(&self.status())
    }

    /// All that keepers and monitors said.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.at("log")).unwrap()).into_owned()
    }

    /// What keepers and monitors complained of, for whoever has to find out why a test failed.
    fn complaints(&self) -> String {
        let said = self.said();
        // Forged handles are part of the traffic, and kills of the test.
        let expected =
            |line: &str| [" INFO ", " refused: ", "SIGKILL"].iter().any(|word| line.contains(word));
        let lines: Vec<_> = said.lines().filter(|line| !expected(line)).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("locum complained:\n{}", self.complaints());
        }
    }
}

/// Who is killed while a guest works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Victim {
    Monitor,
    /// Keeper and monitor, at once.
    Everything,
}

/// Does `work` while `victim` is killed every 50 to 300 ms; how often that was, and what had been counted when it was last done.
/// A session may not outlive the process that holds its lifeline.
pub(crate) fn while_killing<T>(
    service: &Service,
    victim: Victim,
    work: impl FnOnce() -> T,
) -> (T, u32, Counted) {
    while_killing_every(50..=300, service, victim, work)
}

/// The same with other pauses, in milliseconds.
pub(crate) fn while_killing_every<T>(
    pauses: RangeInclusive<u64>,
    service: &Service,
    victim: Victim,
    work: impl FnOnce() -> T,
) -> (T, u32, Counted) {
    thread::scope(|scope| {
        // Dropped when the work ends, by a panic too.
        let (working, worked) = mpsc::channel::<()>();
        let killer = scope.spawn(move || {
            let (mut kills, mut counted) = (0, Counted::default());
            while worked.recv_timeout(pause(&pauses)) == Err(RecvTimeoutError::Timeout) {
                let status = service.status();
                // Between two monitors there is none.
                let kill = |who: &str| {
                    let pid = status[who]["pid"].as_i64();
                    let pid = pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).unwrap()));
                    pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
                };
                // Before its first call a workload has no lifeline.
                let sessions = status["sessions"].as_array().unwrap();
                let has_calls = !sessions.is_empty() && sessions.iter().all(|one| one["calls"] != 0);
                if has_calls {
                    counted = Counted::of(&status);
                }
                let keeper_too = victim == Victim::Everything && has_calls;
                kills += u32::from(kill("monitor") && (!keeper_too || kill("keeper")));
            }
            (kills, counted)
        });
        let result = work();
        drop(working);
        let (kills, counted) = killer.join().unwrap();
        (result, kills, counted)
    })
}

fn pause(within: &RangeInclusive<u64>) -> Duration {
    let mut random = [0; 2];
    getrandom(&mut random, GetRandomFlags::empty()).unwrap();
    let span = within.end() - within.start() + 1;
    Duration::from_millis(within.start() + u64::from(u16::from_le_bytes(random)) % span)
}
