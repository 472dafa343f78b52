//! `locum attach` and what puts lost listeners back, on programs that run: each goes on to its own checked result.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc;

use common::{Ground, Process, locum, until};
use locum_kernel::ptrace::Seized;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A keeper, a monitor with a policy for attached programs, and the programs' own program.
struct Yard {
    ground: Ground,
    caller: PathBuf,
    keeper: Process,
    monitor: Process,
}

/// A program of `caller … state` that runs until it is told to end.
struct Busy {
    process: Process,
    input: ChildStdin,
}

impl Yard {
    fn new() -> Self {
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

    fn monitor(ground: &Ground) -> Process {
        let at = |name| ground.runtime.path().join(name).to_str().unwrap().to_owned();
        ground.start(&["monitor", "--keys", &at("keys"), "--policy", &at("policy.toml")])
    }

    fn start(&self, kind: &str) -> Busy {
        let mut command = Command::new(&self.caller);
        command.args(["own", "state"]).arg(self.ground.files.path()).arg(kind);
        let mut process = Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let input = process.0.stdin.take().unwrap();
        let threads = format!("/proc/{}/task", process.pid());
        let filtered = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
            status.contains("Seccomp_filters:\t1")
        };
        until("the program's threads", || {
            filtered() && (kind == "vfork" || common::list(threads.as_ref()).len() >= 5)
        });
        Busy { process, input }
    }

    fn command(&self, name: &str, busy: &Busy, more: &[&str]) -> Command {
        let mut command = locum(&[name, "--runtime-dir", self.ground.path()]);
        command.args(["--pid", &busy.process.pid().to_string()]).args(more);
        command
    }

    /// What `locum attach` said, and whether it was content.
    fn attach(&self, busy: &Busy) -> (bool, String) {
        let out = self.command("attach", busy, &["--policy", "attached"]).output().unwrap();
        let told = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        (out.status.success(), told)
    }

    fn calls(&self) -> u64 {
        let status = self.ground.status();
        status["sessions"].as_array().unwrap().iter().map(|one| one["calls"].as_u64().unwrap()).sum()
    }

    /// Waits until calls are served that were made from now on.
    fn await_calls(&self) {
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
    fn finish(mut self) -> Value {
        drop(self.input);
        let out = std::io::read_to_string(self.process.0.stdout.take().unwrap()).unwrap();
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out:?}"))
    }
}

fn must_be_right(busy: Busy) -> Value {
    let told = busy.finish();
    assert_eq!(told["wrong"], 0, "{told}");
    told
}

#[test]
fn programs_in_each_state_are_attached() {
    let yard = Yard::new();
    for kind in ["reckon", "sleep", "fork", "leader gone"] {
        let busy = yard.start(kind);
        let (good, told) = yard.attach(&busy);
        assert!(good && told.contains(": attached"), "{kind}: {told}");
        yard.await_calls();
        let told = must_be_right(busy);
        assert!(told["served"].as_u64() > Some(0), "{kind}: {told}");
        until("no session", || yard.ground.status()["sessions"].as_array().unwrap().is_empty());
    }
}

#[test]
fn a_stopped_program_is_attached_and_stays_stopped() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    let pid = Pid::from_raw(busy.process.pid().cast_signed()).unwrap();
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", busy.process.pid())).unwrap();
        stat.rsplit_once(')').unwrap().1.trim().chars().next().unwrap()
    };
    kill_process(pid, Signal::STOP).unwrap();
    until("a stopped program", || state() == 'T');
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains(": attached"), "{told}");
    until("a stopped program", || state() == 'T');
    kill_process(pid, Signal::CONT).unwrap();
    yard.await_calls();
    must_be_right(busy);
}

#[test]
fn what_cannot_be_attached_is_left_as_it_is() {
    let yard = Yard::new();
    let refused = |busy: &Busy, why: &str| {
        let (good, told) = yard.attach(busy);
        assert!(!good && told.contains(why), "{told}");
    };
    let busy = yard.start("vfork");
    refused(&busy, "none of its threads stops");
    must_be_right(busy);

    let busy = yard.start("reckon");
    let pid = busy.process.pid();
    std::thread::scope(|scope| {
        let ((tell, traced), (end, ended)) = (mpsc::channel(), mpsc::channel::<()>());
        scope.spawn(move || {
            // It is let go when this thread ends, with the test's success or failure.
            let _seized = Seized::seize(pid, 0).unwrap();
            tell.send(()).unwrap();
            ended.recv()
        });
        traced.recv().unwrap();
        refused(&busy, &format!("process {} traces it", std::process::id()));
        drop(end);
    });
    must_be_right(busy);

    // One that could be attached, and comes from each process that may not be named.
    let bystander = yard.start("reckon");
    let (parent, keeper) = (std::process::id().to_string(), yard.keeper.pid().to_string());
    for (pid, why) in [
        (keeper.as_str(), "keeper or monitor"),
        (parent.as_str(), "was started by"),
        ("1", "first process"),
        ("2", "thread of the kernel"),
        ("4194305", "there is no process"),
    ] {
        let mut command = locum(&["attach", "--runtime-dir", yard.ground.path(), "--pid", pid]);
        let out = command.output().unwrap();
        let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        // Where the tests run in a pid namespace of their own, there are no threads of the kernel.
        let absent = told.contains("there is no process") || told.contains("never touched");
        assert!(!out.status.success() && (told.contains(why) || absent), "{pid}: {told}");
    }
    // Who once was attached can be detached by whoever it started.
    let out = locum(&["detach", "--runtime-dir", yard.ground.path(), "--pid", &parent]).output().unwrap();
    let told = String::from_utf8_lossy(&out.stderr);
    assert!(told.contains("wanted a workload that is served"), "{told}");
    let sessions = yard.ground.status();
    assert_eq!(sessions["sessions"].as_array().unwrap().len(), 0, "{sessions}");
    let told = must_be_right(bystander);
    assert_eq!(told["served"], 0, "{told}");
    let mut privileged = Command::new("sleep");
    let privileged = Process(privileged.arg("60").spawn().unwrap());
    let mut command = locum(&["attach", "--runtime-dir", yard.ground.path(), "--pid"]);
    let out = command.arg(privileged.pid().to_string()).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(!out.status.success() && told.contains("--set-no-new-privs"), "{told}");
}

#[test]
fn a_dry_run_changes_nothing() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    let out = yard.command("attach", &busy, &["--dry-run"]).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.contains("would get a filter"), "{told}");
    let told = must_be_right(busy);
    assert_eq!(told["served"], 0, "{told}");
}

#[test]
fn two_hundred_rounds_of_attach_and_detach_leave_a_program_right() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    for round in 0..200 {
        let (good, told) = yard.attach(&busy);
        assert!(good, "round {round}: {told}");
        let out = yard.command("detach", &busy, &[]).output().unwrap();
        assert!(out.status.success(), "round {round}: {}", String::from_utf8_lossy(&out.stderr));
    }
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains("attached again"), "{told}");
    yard.await_calls();
    must_be_right(busy);
}

/// Promise 8, without a lifeline: calls fail until locum is back, and no longer.
#[test]
fn a_lost_listener_is_put_back_again_and_again() {
    let mut yard = Yard::new();
    let busy = yard.start("reckon");
    let (good, told) = yard.attach(&busy);
    assert!(good, "{told}");
    yard.await_calls();
    for _ in 0..50 {
        yard.keeper.kill();
        yard.monitor.kill();
        (yard.keeper, yard.monitor) = (yard.ground.keeper(), Yard::monitor(&yard.ground));
        until("a session", || !yard.ground.status()["sessions"].as_array().unwrap().is_empty());
        yard.await_calls();
    }
    let told = must_be_right(busy);
    assert!(told["served"].as_u64() > Some(0), "{told}");
}

/// Debug builds only, which can be told where to die.
#[cfg(debug_assertions)]
#[test]
fn attaching_is_killed_at_every_step() {
    let yard = Yard::new();
    let rounds = std::env::var("LOCUM_CHAOS_SECONDS").map_or(20, |text| text.parse().unwrap());
    for round in 0..rounds {
        let kind = ["reckon", "sleep", "fork"][round % 3];
        for step in 21..=26 {
            let busy = yard.start(kind);
            let mut killed = yard.command("attach", &busy, &["--policy", "attached"]);
            let out = killed.env("LOCUM_DIE_AT", step.to_string()).output().unwrap();
            assert!(out.status.code().is_none(), "step {step}: {}", String::from_utf8_lossy(&out.stdout));
            let (good, told) = yard.attach(&busy);
            assert!(good, "after step {step}, {kind}: {told}");
            yard.await_calls();
            must_be_right(busy);
        }
    }
}
