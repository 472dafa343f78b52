//! The units in `systemd/`, under a real systemd that is the first process of a container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{self, Process, Traffic, USER, until};
use crate::components;

/// What the system that nspawn sets up for its containers refuses, and keeper, monitor or workload need.
const CALLS: &str = "--system-call-filter=open_by_handle_at pidfd_getfd @debug";
const SERVICES: [&str; 2] = ["locum-keeper.service", "locum-monitor.service"];

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd").canonicalize().unwrap()
}

/// What stands apart under a heading of `docs/operations.md`: commands, and lines for units.
fn blocks(heading: &str) -> Vec<String> {
    let text = fs::read_to_string(units().join("../docs/operations.md")).unwrap();
    let section = text.split(&format!("# {heading}\n")).nth(1).unwrap().split("\n##").next().unwrap();
    section.split("```\n").skip(1).step_by(2).map(str::to_owned).collect()
}

/// A running system with locum installed.
struct System {
    /// The first process in there.
    leader: u32,
    nspawn: Process,
    log: TempDir,
    _files: TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// One at a time: they have one control group.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for System {
    fn drop(&mut self) {
        // nspawn cleans up behind it, and would leave it alive if it were killed itself.
        let leader = Pid::from_raw(self.leader.cast_signed()).unwrap();
        let _ = rustix::process::kill_process(leader, Signal::KILL);
        let _ = self.nspawn.0.wait();
        // The groups that nspawn leaves to a unit that there is not.
        let empty = "find /sys/fs/cgroup/*/payload -depth -type d -exec rmdir {} + 2>/dev/null";
        let _ = Command::new("sh").args(["-c", empty]).status();
    }
}

impl System {
    fn boot() -> Self {
        let alone = alone();
        let (files, log) = (common::files(), tempfile::tempdir().unwrap());
        let mut nspawn = Command::new("systemd-nspawn");
        nspawn.arg("-D").arg(components::systemd()).args([
            "--volatile=overlay",
            "--register=no",
            "--keep-unit",
            "--boot",
            "--console=pipe",
            "--private-network",
            "--capability=all",
            CALLS,
        ]);
        nspawn.arg(format!("--machine=locum-{}", std::process::id()));
        nspawn.arg(format!("--bind={}:/share", files.path().display()));
        nspawn.arg(format!("--bind-ro={}:/source/target/release/locum", env!("CARGO_BIN_EXE_locum")));
        nspawn.arg(format!("--bind-ro={}:/source/systemd", units().display()));
        let said = fs::File::create(log.path().join("log")).unwrap();
        nspawn.stdin(Stdio::null()).stderr(said.try_clone().unwrap()).stdout(said);
        let nspawn = Process(nspawn.spawn().unwrap());
        // Before it there is another, which sets it up.
        let is_first = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
        };
        let first = || common::children(nspawn.pid()).into_iter().find(is_first);
        until("the first process", || first().is_some());
        let system = Self { leader: first().unwrap(), nspawn, log, _files: files, _alone: alone };
        until("a running system", || {
            let state = system.inside("systemctl", &["is-system-running"]).output().unwrap();
            state.stdout == b"running\n"
        });
        system.carry_out("Install");
        system.settle([None, None]);
        system
    }

    /// Does what stands first under `heading`, as it stands there.
    fn carry_out(&self, heading: &str) {
        self.carry_out_block(&blocks(heading)[0]);
    }

    fn carry_out_block(&self, commands: &str) {
        for step in commands.lines().map(|line| line.strip_prefix("# ").unwrap()) {
            let output = self.inside("sh", &["-c", &format!("cd /source && {step}")]).output().unwrap();
            assert!(output.status.success(), "{step}: {output:?}\n{}", self.journal());
        }
    }

    /// `systemctl edit` at a terminal, by someone who writes `lines`.
    fn edit(&self, unit: &str, lines: &str) {
        self.sh(&format!("cat >/lines <<'END'\n{lines}END\n"));
        self.sh(&format!("SYSTEMD_EDITOR='cp /lines' script -qec 'systemctl edit {unit}' /dev/null"));
        let edited = self.systemctl(&["cat", unit]);
        assert!(edited.contains(lines.trim()), "{edited}");
    }

    fn sh(&self, line: &str) {
        components::run(&mut self.inside("sh", &["-c", line]));
    }

    /// A command in there.
    fn inside(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.leader.to_string(), "-m", "-p", "-u", "-i", "-n", "-C", program]);
        command.args(args).stdin(Stdio::null()).env_remove("LOCUM_RUNTIME_DIR");
        command
    }

    fn systemctl(&self, args: &[&str]) -> String {
        let output = self.inside("systemctl", args).output().unwrap();
        assert!(output.status.success(), "systemctl {args:?}: {output:?}\n{}", self.journal());
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// What the services said, without what the traffic's forged handles are to bring about.
    fn journal(&self) -> String {
        let journal = self.inside("journalctl", &["--no-pager", "-u", "locum-*"]).output().unwrap();
        let console = fs::read_to_string(self.log.path().join("log")).unwrap_or_default();
        let journal = String::from_utf8_lossy(&journal.stdout).into_owned();
        let lines = console.lines().chain(journal.lines().filter(|line| !line.contains("WARN refused")));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The main process of each service that is active, as it is numbered in there.
    fn mains(&self) -> [Option<u32>; 2] {
        SERVICES.map(|service| {
            let shown = self.systemctl(&["show", service, "--property=ActiveState,MainPID", "--value"]);
            let (pid, state) = shown.split_once('\n').unwrap();
            (state == "active").then(|| pid.parse().unwrap())
        })
    }

    fn traffic(&self, seconds: &str) -> Traffic {
        self.traffic_under("virtiofsd", seconds)
    }

    /// The same under another policy: a name, or a file in there.
    fn traffic_under(&self, policy: &str, seconds: &str) -> Traffic {
        let user = USER.to_string();
        // With an export, it has a policy of its own in the runtime directory.
        let run = ["run", "--policy", policy, "--user", &user, "--"];
        let traffic = ["/proc/self/exe", "traffic", "--json", "--dir", "/share"];
        let traffic = [&traffic[..], &["--threads", "4", "--seconds", seconds]].concat();
        Traffic::start(self.inside("locum", &[&run[..], &traffic].concat()))
    }

    /// Ends the only session, of which nothing must be stored then.
    fn ends(&self) {
        let pid = self.status().unwrap()["sessions"][0]["pid"].to_string();
        components::run(&mut self.inside("sh", &["-c", &format!("kill -KILL {pid}")]));
        until("nothing to be stored but the monitor", || self.stored() == 1);
    }

    /// How many descriptors systemd keeps for the keeper.
    fn stored(&self) -> u32 {
        let stored = self.systemctl(&["show", SERVICES[0], "--property=NFileDescriptorStore", "--value"]);
        stored.parse().unwrap()
    }

    fn status(&self) -> Option<Value> {
        let output = self.inside("locum", &["status", "--json"]).output().unwrap();
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// Waits until both have taken up their work, in processes of which those in `before` are none.
    fn settle(&self, before: [Option<u32>; 2]) {
        until("both services", || {
            let mains = self.mains();
            let is_there = |index: usize| mains[index].is_some_and(|_| mains[index] != before[index]);
            (before[0].is_none() || is_there(0))
                && (before[1].is_none() || is_there(1))
                && mains.iter().all(Option::is_some)
                && self.status().is_some_and(|status| status["monitor"]["pid"] == mains[1].unwrap())
        });
    }
}

/// Kills and restarts everything under traffic.
fn nothing_is_lost(system: &System, traffic: &Traffic) {
    until("calls", || traffic.number("calls") > 100);
    let [keeper, monitor] = SERVICES;
    let kill = |of: &[&'static str]| [&["kill", "--signal=KILL"], of].concat();
    let restart = |of: &[&'static str]| [&["restart"], of].concat();
    for (act, which) in [
        (kill(&[monitor]), [false, true]),
        (kill(&[keeper]), [true, false]),
        (kill(&[keeper, monitor]), [true, true]),
        (restart(&[monitor]), [false, true]),
        (restart(&[keeper]), [true, false]),
        (restart(&[keeper, monitor]), [true, true]),
        (kill(&[keeper, monitor]), [true, true]),
    ] {
        let mains = system.mains();
        let before = std::array::from_fn(|index| mains[index].filter(|_| which[index]));
        system.systemctl(&act);
        system.settle(before);
        goes_on(system, traffic, &format!("{act:?}"));
    }
}

/// Waits for calls; none of them may have failed.
fn goes_on(system: &System, traffic: &Traffic, after: &str) {
    let (calls, start) = (traffic.number("calls"), Instant::now());
    while traffic.number("calls") < calls + 1000 {
        let waits = start.elapsed() < Duration::from_secs(10);
        assert!(waits, "{after}: no calls: {}\n{}", traffic.report(), system.journal());
        std::thread::sleep(Duration::from_millis(2));
    }
    let report = traffic.report();
    let lost = (&report["failed"], &report["wrong"]);
    assert_eq!(lost, (&0.into(), &0.into()), "{after}: {report}\n{}", system.journal());
}

#[test]
fn nothing_is_lost_whatever_becomes_of_the_services() {
    let system = System::boot();
    nothing_is_lost(&system, &system.traffic("120"));
}

/// Nothing of a listener is left but what systemd stores.
#[test]
fn nothing_is_lost_without_a_lifeline() {
    let system = System::boot();
    let policy = "printf '[bare]\\nexports = [\"/share\"]\\nlifeline = false\\n' >/policy.toml";
    components::run(&mut system.inside("sh", &["-c", policy]));
    let traffic = system.traffic_under("/policy.toml", "120");
    nothing_is_lost(&system, &traffic);
    assert!(!system.journal().contains("a lifeline was put"), "{}", system.journal());
    // The listener, its note and the monitor.
    assert_eq!(system.stored(), 3, "{}", system.journal());
    let both = ["kill", "--signal=KILL", SERVICES[0], SERVICES[1]];
    for _ in 0..5 {
        let mains = system.mains();
        system.systemctl(&both);
        system.settle(mains);
        goes_on(&system, &traffic, "killed");
    }
    system.ends();
}

#[test]
fn a_reload_upgrades_the_keeper_and_a_bad_program_does_not() {
    let system = System::boot();
    let traffic = system.traffic("120");
    until("calls", || traffic.number("calls") > 100);
    let mains = system.mains();
    let runs = || {
        let exe = format!("/proc/{}/exe", mains[0].unwrap());
        components::run(&mut system.inside("stat", &["-L", "-c", "%i", &exe]))
    };
    for _ in 0..5 {
        let before = runs();
        let again = "install -m 755 /source/target/release/locum /usr/bin/locum";
        components::run(&mut system.inside("sh", &["-c", again]));
        system.systemctl(&["reload", SERVICES[0]]);
        assert_ne!(runs(), before, "{}", system.journal());
        assert_eq!(system.mains(), mains, "{}", system.journal());
        goes_on(&system, &traffic, "reload");
    }
    let before = runs();
    components::run(
        &mut system.inside("install", &["-m", "700", "/source/target/release/locum", "/usr/bin/locum"]),
    );
    let reload = system.inside("systemctl", &["reload", SERVICES[0]]).output().unwrap();
    assert!(!reload.status.success(), "{reload:?}");
    assert!(system.journal().contains("it must be executable for every user"), "{}", system.journal());
    assert_eq!((system.mains(), runs()), (mains, before));
    goes_on(&system, &traffic, "a reload that failed");
    // What was stored before the upgrades is known after them.
    components::run(&mut system.inside("chmod", &["755", "/usr/bin/locum"]));
    system.systemctl(&["kill", "--signal=KILL", SERVICES[0], SERVICES[1]]);
    system.settle(mains);
    goes_on(&system, &traffic, "killed");
    system.ends();
}

#[test]
fn a_reload_upgrades_the_monitor_and_a_bad_program_does_not() {
    let system = System::boot();
    let folder = format!("/etc/systemd/system/{}.d", SERVICES[1]);
    system.sh(&format!("mkdir {folder} && printf '[Service]\\nWatchdogSec=3\\n' >{folder}/shorter.conf"));
    system.systemctl(&["daemon-reload"]);
    system.systemctl(&["restart", SERVICES[1]]);
    system.settle([None, None]);
    let traffic = system.traffic("120");
    until("calls", || traffic.number("calls") > 100);
    let exe = || {
        let exe = format!("/proc/{}/exe", system.mains()[1].unwrap());
        components::run(&mut system.inside("stat", &["-L", "-c", "%i", &exe]))
    };
    for _ in 0..5 {
        let (mains, before) = (system.mains(), exe());
        system.sh("install -m 755 /source/target/release/locum /usr/bin/locum");
        system.systemctl(&["reload", SERVICES[1]]);
        system.settle([None, mains[1]]);
        assert!(system.mains()[0] == mains[0] && exe() != before, "{}", system.journal());
        let mut old = system.inside("test", &["-e", &format!("/proc/{}", mains[1].unwrap())]);
        until("the old one's end", || !old.status().unwrap().success());
        goes_on(&system, &traffic, "reload");
    }
    // The new one is the service: it is watched, and what becomes of it matters.
    let heard =
        || system.systemctl(&["show", SERVICES[1], "--property=WatchdogTimestampMonotonic", "--value"]);
    let before = heard();
    until("a sign of life", || heard() != before);
    // One that hangs is not waited for any longer than it may take.
    let mains = system.mains();
    system.sh(&format!("kill -STOP {}", mains[1].unwrap()));
    system.systemctl(&["reload", SERVICES[1]]);
    system.settle([None, mains[1]]);
    goes_on(&system, &traffic, "an old one that hung");
    let mains = system.mains();
    // A program that is no good, and one that cannot serve what the old one does.
    let good = "install -m 755 /source/target/release/locum /usr/bin/locum";
    for bad in [
        "install -m 755 /bin/false /usr/bin/locum",
        "printf '[Service]\\nEnvironment=\"LOCUM_MONITOR=--policy /nowhere\"\\n' >/etc/systemd/system/locum-monitor.service.d/bad.conf; systemctl daemon-reload",
    ] {
        system.sh(bad);
        let reload = system.inside("systemctl", &["reload", SERVICES[1]]).output().unwrap();
        assert!(!reload.status.success(), "{bad}: {reload:?}");
        system.sh(good);
        assert_eq!(system.mains(), mains, "{bad}\n{}", system.journal());
        goes_on(&system, &traffic, bad);
    }
    assert!(system.journal().contains("cannot read the policy file /nowhere"), "{}", system.journal());
    system.sh(&format!("rm {folder}/bad.conf; systemctl daemon-reload"));
    system.systemctl(&["kill", "--signal=STOP", SERVICES[1]]);
    system.settle([None, mains[1]]);
    goes_on(&system, &traffic, "a new one that hung");
}

#[test]
fn an_upgrade_and_a_roll_back_go_as_they_are_written() {
    let system = System::boot();
    let traffic = system.traffic("120");
    until("calls", || traffic.number("calls") > 100);
    let exe = |index: usize| {
        let exe = format!("/proc/{}/exe", system.mains()[index].unwrap());
        components::run(&mut system.inside("stat", &["-L", "-c", "%i", &exe]))
    };
    for heading in ["Upgrade", "Roll back"] {
        let (mains, before) = (system.mains(), [exe(0), exe(1)]);
        system.carry_out(heading);
        system.settle([None, mains[1]]);
        assert_eq!(system.mains()[0], mains[0], "the same keeper\n{}", system.journal());
        assert!(exe(0) != before[0] && exe(1) != before[1] && exe(0) == exe(1), "{heading}");
        goes_on(&system, &traffic, heading);
    }
}

#[test]
fn what_is_gone_costs_no_call() {
    let system = System::boot();
    let traffic = system.traffic("300");
    until("calls", || traffic.number("calls") > 100);
    let pid = system.status().unwrap()["sessions"][0]["pid"].to_string();
    for lost in ["sessions/*/journal", "sessions/*/record.json", "sessions/*/*.lifeline"] {
        for victims in [&SERVICES[1..], &SERVICES[..]] {
            let mains = system.mains();
            system.sh(&format!("rm -r /run/locum/{lost}"));
            system.systemctl(&[&["kill", "--signal=KILL"], victims].concat());
            system.settle([mains[0].filter(|_| victims.len() == 2), mains[1]]);
            goes_on(&system, &traffic, lost);
        }
    }
    // What is stopped for good is not stored: there is the lifeline alone.
    system.systemctl(&["stop", SERVICES[1], SERVICES[0]]);
    assert_eq!((system.mains(), system.stored()), ([None, None], 0));
    system.systemctl(&["start", SERVICES[0], SERVICES[1]]);
    system.settle([None, None]);
    goes_on(&system, &traffic, "stopped");
    let mains = system.mains();
    system.sh("rm -rf /run/locum");
    goes_on(&system, &traffic, "nobody reaches them");
    // Frozen when its calls have been answered.
    let stopped = "for stat in /proc/{}/task/*/stat; do grep -q ') T ' $stat || exit 1; done";
    system.sh(&format!("kill -STOP {pid}"));
    let stopped = stopped.replace("{}", &pid);
    until("a frozen workload", || system.inside("sh", &["-c", &stopped]).status().unwrap().success());
    system.carry_out("The runtime directory is gone");
    system.settle(mains);
    system.sh(&format!("kill -CONT {pid}"));
    goes_on(&system, &traffic, "the runtime directory");
    assert_eq!(system.status().unwrap()["sessions"].as_array().unwrap().len(), 1);
}

#[test]
fn a_rootless_user_has_a_door_of_his_own() {
    let system = System::boot();
    system.sh("useradd -u 1000 tester");
    let blocks = blocks("Install");
    let [edit, steps] = &blocks[2..] else { panic!("{blocks:?}") };
    system.edit(SERVICES[0], edit);
    system.carry_out_block(steps);
    let door = components::run(&mut system.inside("stat", &["-c", "%u %a", "/run/locum/oci-1000.sock"]));
    assert_eq!(door.trim(), "1000 600");
    assert!(system.journal().contains("the keeper is ready doors=2"), "{}", system.journal());
}

#[test]
fn a_monitor_has_policies_of_ones_own() {
    let system = System::boot();
    system.sh("printf '[mine]\\nexports = [\"/share\"]\\n' >/etc/locum/policy.toml");
    system.edit(SERVICES[1], &blocks("Install")[1]);
    let mains = system.mains();
    system.systemctl(&["reload", SERVICES[1]]);
    system.settle([None, mains[1]]);
    let line = components::run(
        &mut system.inside("cat", &[&format!("/proc/{}/cmdline", system.mains()[1].unwrap())]),
    );
    assert!(line.contains("--policy\0/etc/locum/policy.toml"), "{line:?}");
}

#[test]
fn a_monitor_that_hangs_is_killed_and_replaced() {
    let system = System::boot();
    for service in SERVICES {
        let folder = format!("/etc/systemd/system/{service}.d");
        let shorter =
            format!("mkdir -p {folder} && printf '[Service]\\nWatchdogSec=3\\n' >{folder}/shorter.conf");
        components::run(&mut system.inside("sh", &["-c", &shorter]));
    }
    system.systemctl(&["daemon-reload"]);
    system.systemctl(&["restart", SERVICES[0], SERVICES[1]]);
    system.settle([None, None]);
    let traffic = system.traffic("120");
    until("calls", || traffic.number("calls") > 100);
    let mains = system.mains();
    for service in SERVICES {
        let heard =
            || system.systemctl(&["show", service, "--property=WatchdogTimestampMonotonic", "--value"]);
        let before = heard();
        until("a sign of life", || heard() != before);
    }
    assert_eq!(system.mains(), mains, "they live, and are left alone\n{}", system.journal());
    for index in [1, 0] {
        let mains = system.mains();
        system.systemctl(&["kill", "--signal=STOP", SERVICES[index]]);
        let before = std::array::from_fn(|other| mains[other].filter(|_| other == index));
        system.settle(before);
        let calls = traffic.number("calls");
        until("calls", || traffic.number("calls") > calls + 1000);
    }
    let report = traffic.report();
    assert_eq!((&report["failed"], &report["wrong"]), (&0.into(), &0.into()), "{}", system.journal());
}

#[test]
fn the_services_have_no_more_than_they_need() {
    let exposure = |service| {
        let unit = units().join(service);
        let said =
            components::run(Command::new("systemd-analyze").args(["security", "--offline=true"]).arg(unit));
        let line = said.lines().last().unwrap().to_owned();
        let number = line.split_once(": ").unwrap().1.split_whitespace().next().unwrap();
        number.parse::<f64>().unwrap_or_else(|_| panic!("{line}"))
    };
    assert!(exposure(SERVICES[0]) <= 2.0, "{}", exposure(SERVICES[0]));
    let system = System::boot();
    let status = |pid: u32| components::run(&mut system.inside("cat", &[&format!("/proc/{pid}/status")]));
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().to_owned()
    };
    let [keeper, monitor] = system.mains().map(|pid| status(pid.unwrap()));
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(&keeper, set), "0000000000000000", "the keeper's {set}");
    }
    assert_eq!(field(&keeper, "NoNewPrivs:"), "1");
    // The filter is the one that the container's first process is under: the surgeon could not work under one of the unit's.
    assert_eq!(field(&monitor, "Seccomp_filters:"), field(&status(1), "Seccomp_filters:"));
    assert_eq!(field(&monitor, "CapBnd:"), "0000000000000000");
}
