//! What the tests work with: keeper, monitor, and a program that runs.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};

use serde_json::Value;

use crate::common::{self, Ground, Process, locum, until};

/// A keeper, a monitor with a policy for attached programs, and the programs' own program.
pub(crate) struct Yard {
    pub(crate) ground: Ground,
    pub(crate) caller: PathBuf,
    pub(crate) keeper: Process,
    pub(crate) monitor: Process,
}

/// A program of `caller … state` that runs until it is told to end.
pub(crate) struct Busy {
    pub(crate) process: Process,
    pub(crate) input: ChildStdin,
}

impl Yard {
    pub(crate) fn new() -> Self {
        let ground = Ground::new();
        std::fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let caller = ground.files.path().join("caller");
        common::copy_caller(&caller);
        // Without a lifeline, so that what is lost is lost.
        let mount = common::mount_of(ground.files.path());
        let policy = format!("[attached]\nexports = [{mount:?}]\nlifeline = false\n");
        std::fs::write(ground.runtime.path().join("policy.toml"), policy).unwrap();
        let (keeper, monitor) = (ground.keeper(), Self::monitor(&ground));
        Self { ground, caller, keeper, monitor }
    }

    pub(crate) fn monitor(ground: &Ground) -> Process {
        let at = |name| ground.runtime.path().join(name).to_str().unwrap().to_owned();
        ground.start(&["monitor", "--keys", &at("keys"), "--policy", &at("policy.toml")])
    }

    pub(crate) fn start(&self, kind: &str) -> Busy {
        let mut command = Command::new(&self.caller);
        command.args(["own", "state"]).arg(self.ground.files.path()).arg(kind);
        let mut process = Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let input = process.0.stdin.take().unwrap();
        let threads = format!("/proc/{}/task", process.pid());
        let filtered = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
            status.contains(if kind == "engine" { "Seccomp_filters:\t2" } else { "Seccomp_filters:\t1" })
        };
        until("the program's threads", || {
            filtered() && (["vfork", "storm"].contains(&kind) || common::list(threads.as_ref()).len() >= 5)
        });
        Busy { process, input }
    }

    pub(crate) fn command(&self, name: &str, busy: &Busy, more: &[&str]) -> Command {
        let mut command = locum(&[name, "--runtime-dir", self.ground.path()]);
        command.args(["--pid", &busy.process.pid().to_string()]).args(more);
        command
    }

    /// What `locum attach` said, and whether it was content.
    pub(crate) fn attach(&self, busy: &Busy) -> (bool, String) {
        let out = self.command("attach", busy, &["--policy", "attached"]).output().unwrap();
        let told = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        (out.status.success(), told)
    }

    pub(crate) fn calls(&self) -> u64 {
        let status = self.ground.status();
        status["sessions"].as_array().unwrap().iter().map(|one| one["calls"].as_u64().unwrap()).sum()
    }

    /// Waits until calls are served that were made from now on.
    pub(crate) fn await_calls(&self) {
        let before = self.calls();
        until("calls that are served", || self.calls() > before + 20);
    }
}

impl Drop for Yard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.ground.log_tail());
        }
    }
}

impl Busy {
    pub(crate) fn finish(mut self) -> Value {
        drop(self.input);
        let out = std::io::read_to_string(self.process.0.stdout.take().unwrap()).unwrap();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out:?}"))
    }
}

pub(crate) fn must_be_right(busy: Busy) -> Value {
    let told = busy.finish();
    assert_eq!(told["wrong"], 0, "{told}");
    told
}
