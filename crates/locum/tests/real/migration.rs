//! A guest migrates to another QEMU with another virtiofsd, container and locum, on the same share, and keeps what it had open.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::common::{Process, children, until, until_within};
use crate::components;
use crate::container::{Container, Runtime, Site};
use crate::machine;
use crate::qmp::Qmp;
use crate::service::{Service, Victim, while_killing, while_killing_every};
use crate::tree;

/// For what a guest without KVM does, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(90);

/// Gives up a file that cannot be opened, and nothing else: virtiofsd lists what the guest deletes until it has read the guest's
/// FORGET, and the guest may move between the two.
const HANDLES: &str = "--migration-mode=file-handles --migration-on-error=guest-error";
/// Gives up everything if one file cannot be opened.
const HANDLES_OR_NOTHING: &str = "--migration-mode=file-handles";
/// The target checks that each file's handle is what the source says: it must have signed with the same key.
const PATHS: &str = "--migration-mode=find-paths --migration-verify-handles";

const POLICY: &str = r#"[guest]
exports = ["/share"]
scope = "{annotation:guest}"
trusted = ["annotation:guest"]
o_path = "fast"
"#;

#[test]
fn file_handles() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("one", Key::Only));
    Migration::begin(&source, &target, HANDLES).complete();
}

#[test]
fn find_paths_and_verify_handles() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("one", Key::Only));
    Migration::begin(&source, &target, PATHS).complete();
}

#[test]
fn file_handles_after_rotation() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("one", Key::Rotated));
    Migration::begin(&source, &target, HANDLES).complete();
}

#[test]
fn find_paths_after_rotation() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("one", Key::Rotated));
    Migration::begin(&source, &target, PATHS).complete();
}

#[test]
fn while_both_monitors_are_killed() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("one", Key::Only));
    let migration = Migration::begin(&source, &target, HANDLES);
    // Loading is a matter of milliseconds.
    let (((), at_source, source_counted), at_target, counted) =
        while_killing_every(5..=20, &target.service, Victim::Monitor, || {
            while_killing(&source.service, Victim::Monitor, || migration.complete())
        });
    println!("{at_source} kills at the source, {source_counted:?}; {at_target} at the target, {counted:?}");
    assert!(at_source >= 5 && at_target >= 20, "{at_source}, {at_target} kills");
    assert!(counted.recovered >= 1, "{counted:?}");
}

/// The load is given up, and the guest goes on where it was.
#[test]
fn another_guests_handles() {
    let (source, target) = (Side::new("one", Key::Only), Side::new("other", Key::Only));
    let mut migration = Migration::begin(&source, &target, HANDLES_OR_NOTHING);
    let (result, ..) = migration.migrate(&[]);
    assert_eq!(result["status"], "failed", "{result}");
    target.assert_refused(1);
    until("the guest to go on", || is_running(&mut migration.qmp));
    migration.await_lines();
    migration.finish(&source);
}

#[test]
fn another_guests_handles_one_by_one() {
    refused_one_by_one(&Side::new("other", Key::Only));
}

#[test]
fn without_the_sources_key() {
    refused_one_by_one(&Side::new("one", Key::Another));
}

/// A virtiofsd that goes on after each refusal has not one of the files in the end.
fn refused_one_by_one(target: &Side) {
    let source = Side::new("one", Key::Only);
    let mut migration = Migration::begin(&source, target, HANDLES);
    // Loaded, and not begun: the guest would not get far.
    let (result, _qemu, _qmp) = migration.migrate(&["-S"]);
    assert_eq!(result["status"], "completed", "{result}");
    target.assert_refused(10);
    let [at_source, at_target] = migration.containers.each_ref().map(files_of_share);
    assert!(at_source.len() >= 5 && at_target.is_empty(), "{at_source:?} {at_target:?}");
}

/// What is in a side's key directory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    Only,
    /// A newer one too; the workload's metadata names the older.
    Rotated,
    /// Instead of the source's.
    Another,
}

/// A host: its locum, and a container for virtiofsd.
struct Side {
    service: Service,
    _serve: Process,
    site: Site,
}

impl Side {
    fn new(guest: &str, key: Key) -> Self {
        let service = Service::new(Runtime::Crun);
        fs::write(service.at("policy.toml"), POLICY).unwrap();
        if key != Key::Another {
            put_key(&service, "0000aaaa", SystemTime::now() - Duration::from_secs(3600));
        }
        if key != Key::Only {
            put_key(&service, "0000bbbb", SystemTime::now());
        }
        let serve = service.serve();
        let mut profile = service.profile(&[service.at("policy.toml").to_str().unwrap()]);
        if key == Key::Rotated {
            profile["listenerMetadata"] = "policy=guest,key=0000aaaa".into();
        }
        let mut site = Site::new(Runtime::Crun, &profile);
        site.annotations = json!({"guest": guest});
        Self { service, _serve: serve, site }
    }

    fn virtiofsd(&self, mode: &str) -> Container<'_> {
        let container = self.site.start(&format!(
            "virtiofsd --sandbox=none --inode-file-handles=mandatory {mode} --xattr --shared-dir /share --socket-path /run/socket \
             2>/run/said </dev/null; cat"
        ));
        until("virtiofsd's socket", || self.site.at("run/socket").exists());
        container
    }

    /// At least this many handles; the first ones are in the log.
    fn assert_refused(&self, least: u64) {
        let (counted, said) = (self.service.counted(), self.service.said());
        assert!(counted.refused >= least, "{counted:?}");
        assert!(said.contains("refused: a handle that this session was not given for this export"), "{said}");
    }

    fn qemu(&self, environment: &str, more: &[&str]) -> (Process, Qmp) {
        let monitor = self.site.at("qmp");
        let monitor_option = format!("unix:{},server=on,wait=off", monitor.display());
        let more = [&["-qmp", &monitor_option], more].concat();
        let qemu = machine::start(self.site.path(), &self.site.at("run/socket"), environment, &more);
        (qemu, Qmp::connect(&monitor))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        if thread::panicking() {
            let said = fs::read_to_string(self.site.at("run/said")).unwrap_or_default();
            let lines: Vec<_> = said.lines().collect();
            let said = lines[lines.len().saturating_sub(30)..].join("\n");
            eprintln!("virtiofsd said:\n{said}\nthe guest said:\n{}", machine::said(self.site.path()));
        }
    }
}

fn put_key(service: &Service, id: &str, made: SystemTime) {
    let path = service.at("keys").join(id).with_extension("key");
    fs::write(&path, id.repeat(4)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::File::open(&path).unwrap().set_modified(made).unwrap();
}

/// A guest at work at its source, and where it is to go.
struct Migration<'a> {
    source: &'a Side,
    target: &'a Side,
    containers: [Container<'a>; 2],
    qemu: Process,
    qmp: Qmp,
    environment: String,
}

impl<'a> Migration<'a> {
    fn begin(source: &'a Side, target: &'a Side, mode: &str) -> Self {
        components::commands(&source.site.at("commands"));
        fs::write(source.site.at("tar"), "").unwrap();
        machine::initramfs(source.site.path(), &source.site.at("tar"));
        fs::copy(source.site.at("initrd"), target.site.at("initrd")).unwrap();
        fs::remove_dir(target.site.at("share")).unwrap();
        symlink(source.site.at("share"), target.site.at("share")).unwrap();
        let containers = [source.virtiofsd(mode), target.virtiofsd(mode)];
        let environment = format!("work=migrate.sh deletes={}", mode != PATHS);
        let (qemu, qmp) = source.qemu(&environment, &[]);
        until_within(PATIENCE, "the guest", || machine::said(source.site.path()).contains("guest: ready"));
        let migration = Self { source, target, containers, qemu, qmp, environment };
        migration.await_lines();
        migration
    }

    /// Waits until the guest has written more.
    fn await_lines(&self) {
        let lines = self.source.site.at("share/lines");
        let written = || fs::metadata(&lines).map_or(0, |lines| lines.len());
        let before = written();
        until_within(PATIENCE, "lines of the guest", || written() > before + 500);
    }

    /// Moves the guest, or fails to: QEMU's last word on it, and the QEMU at the target.
    fn migrate(&mut self, more: &[&str]) -> (Value, Process, Qmp) {
        let socket = format!("unix:{}", self.target.site.at("migration").display());
        let more = [&["-incoming", &socket], more].concat();
        let (qemu, mut qmp) = self.target.qemu(&self.environment, &more);
        // Without return-path the source believes in a load that failed.
        let capabilities = json!({"capabilities": [{"capability": "return-path", "state": true}]});
        for qmp in [&mut self.qmp, &mut qmp] {
            qmp.execute("migrate-set-capabilities", &capabilities);
        }
        self.qmp.execute("migrate", &json!({"uri": socket}));
        let mut result = Value::Null;
        until_within(PATIENCE, "the end of the migration", || {
            result = self.qmp.execute("query-migrate", &json!({}));
            ["completed", "failed", "cancelled"].iter().any(|end| result["status"] == *end)
        });
        (result, qemu, qmp)
    }

    fn complete(mut self) {
        let (result, qemu, mut qmp) = self.migrate(&[]);
        assert_eq!(result["status"], "completed", "{result}");
        let given_up =
            fs::read_to_string(self.target.site.at("run/said")).unwrap().matches("Invalid inode").count();
        println!(
            "{} ms in all, {} ms down, {given_up} deleted files given up",
            result["total-time"], result["downtime"]
        );
        until("the guest at the target", || is_running(&mut qmp));
        self.qmp.execute("quit", &json!({}));
        assert!(self.qemu.0.wait().unwrap().success());
        self.qemu = qemu;
        self.await_lines();
        let target = self.target;
        self.finish(target);
        for side in [self.source, target] {
            let counted = side.service.counted();
            assert!(counted.calls > 100 && counted.refused == 0, "{counted:?}");
        }
    }

    /// The guest, which is at `side`, checks what it has; the share is what it saw.
    fn finish(&mut self, side: &Side) {
        fs::write(self.source.site.at("share/stop"), "").unwrap();
        let listing = machine::finish(&mut self.qemu, side.site.path());
        let share = tree::list(&self.source.site.at("commands"), &self.source.site.at("share"));
        tree::assert_same("the guest's tree", &listing, &share);
    }
}

fn is_running(qmp: &mut Qmp) -> bool {
    qmp.execute("query-status", &json!({}))["running"] == true
}

/// What the processes of a container have open of the share.
fn files_of_share(container: &Container<'_>) -> Vec<PathBuf> {
    let (mut found, mut below) = (Vec::new(), children(container.pid()));
    while let Some(pid) = below.pop() {
        below.extend(children(pid));
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        found.extend(descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()));
    }
    found.retain(|path| path.starts_with("/share") && path != Path::new("/share"));
    found
}
