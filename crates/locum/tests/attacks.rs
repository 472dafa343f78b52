//! What a workload that means harm tries, from inside, and a rootless user at the door that is his own.
//! Descriptors that are no listeners are sent to the doors in locum-keeper's tests.

mod common;

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Ground, USER, locum, mount_of};
use rustix::fs::AtFlags;
use tempfile::TempDir;

/// The caller program where any user reaches it, with files to work on beside it.
struct Yard(TempDir);

impl Yard {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root: run it with cargo xtask test");
        let base = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(base.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let yard = Self(base);
        common::copy_caller(&yard.path("caller"));
        std::fs::create_dir(yard.path("files")).unwrap();
        for name in ["file", "theirs", "secret"] {
            std::fs::write(yard.path("files").join(name), name).unwrap();
        }
        std::fs::set_permissions(yard.path("files/secret"), PermissionsExt::from_mode(0o600)).unwrap();
        chown(yard.path("files"), Some(USER), Some(USER)).unwrap();
        yard
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The caller's command line.
    fn attack(&self, attack: &str, args: &[&str]) -> Vec<String> {
        let own = [self.text("caller"), "as-is".into(), attack.into(), self.text("files")];
        own.into_iter().chain(args.iter().map(|arg| (*arg).to_owned())).collect()
    }

    /// Under `locum run` with options; what it printed.
    fn run(&self, options: &[&str], attack: &str, args: &[&str]) -> String {
        let mut command = locum(&["run", "--user", "65534"]);
        command.args(options);
        if !options.contains(&"--export") && !options.contains(&"--policy") {
            command.args(["--export", &self.text("files")]);
        }
        must(command.arg("--").args(self.attack(attack, args)))
    }
}

fn must(command: &mut Command) -> String {
    let out = command.env("LOCUM_LOG", "warn").output().unwrap();
    let (told, log) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{told}\n{log}", out.status);
    told.trim().to_owned()
}

const STALE: &str = "-116";

#[test]
fn a_forged_handle_opens_nothing() {
    let yard = Yard::new();
    let secret = common_handle(&yard.path("files/secret"));
    yard.run(&[], "forge", &[&secret]);
}

/// The monitor that looks a path up is not the process that asks, and holds descriptors on every export.
#[test]
fn magic_links_do_not_lead_into_the_monitor() {
    let yard = Yard::new();
    yard.run(&[], "magic-links", &[]);
}

/// The kernel's own handle, as bytes in hex.
fn common_handle(path: &Path) -> String {
    use std::fmt::Write as _;
    let file = rustix::fs::open(path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let named =
        locum_kernel::handle::name_to_handle_at(std::os::fd::AsFd::as_fd(&file), c"", AtFlags::EMPTY_PATH);
    let handle = named.unwrap().handle;
    let len = u32::try_from(handle.bytes().len()).unwrap();
    let all = [&len.to_ne_bytes()[..], &handle.kind.to_ne_bytes(), handle.bytes()].concat();
    all.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn a_handle_of_another_scope_opens_nothing() {
    let (yard, ground) = (Yard::new(), Ground::new());
    let (_keeper, _monitor) = (ground.keeper(), ground.monitor());
    let here = ["--runtime-dir", ground.path()];
    // Each run is a scope of its own.
    let handle = yard.run(&here, "print", &["file"]);
    yard.run(&here, "open-one", &[&handle, STALE]);
    assert_ne!(yard.run(&here, "print", &["file"]), handle);
    // With the same scope, it opens; with that scope and another key, it does not.
    let policy = yard.path("policy.toml");
    std::fs::write(&policy, format!("[mine]\ncalls = [\"name_to_handle_at\", \"open_by_handle_at\"]\nexports = [{:?}]\nscope = \"mine\"\n", mount_of(&yard.path("files")))).unwrap();
    let policy = ["--policy", policy.to_str().unwrap()];
    let handle = yard.run(&[&here[..], &policy].concat(), "print", &["file"]);
    yard.run(&[&here[..], &policy].concat(), "open-one", &[&handle, "0"]);
    yard.run(&policy, "open-one", &[&handle, STALE]);
}

#[test]
fn a_handle_of_another_export_opens_nothing() {
    struct Mounts(Vec<String>);
    impl Drop for Mounts {
        fn drop(&mut self) {
            for mount in &self.0 {
                let _ = Command::new("umount").args(["--lazy", mount]).status();
            }
        }
    }
    let yard = Yard::new();
    let mut mounts = Mounts(Vec::new());
    for name in ["one", "two"] {
        std::fs::create_dir(yard.path(name)).unwrap();
        must(Command::new("mount").args(["--bind", &yard.text("files"), &yard.text(name)]));
        mounts.0.push(yard.text(name));
    }
    yard.run(&["--export", &yard.text("one"), "--export", &yard.text("two")], "exports", &[]);
}

#[test]
fn memory_may_change_during_the_call() {
    Yard::new().run(&[], "rewrite", &[]);
}

#[test]
fn a_full_table_costs_only_its_owner() {
    Yard::new().run(&[], "full", &[]);
}

#[test]
fn a_thousand_at_once_are_answered() {
    Yard::new().run(&[], "thousand", &[]);
}

#[test]
fn the_dead_are_not_answered_in_anothers_memory() {
    let yard = Yard::new();
    // So few process ids that they are used again all the time.
    let script = "echo 350 >/proc/sys/kernel/pid_max && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]);
    command.arg(env!("CARGO_BIN_EXE_locum")).args([
        "run",
        "--user",
        "65534",
        "--export",
        &yard.text("files"),
        "--",
    ]);
    must(command.args(yard.attack("deaths", &[])));
}

#[test]
fn other_ways_into_the_kernel_are_not_served() {
    Yard::new().run(&[], "other-arch", &[]);
}

/// Faults are there to be asked for in debug builds alone.
#[cfg(debug_assertions)]
mod faults {
    use super::*;

    #[test]
    fn a_handler_that_panics_answers() {
        Yard::new().run(&[], "fault", &["panic"]);
    }

    #[test]
    fn a_call_that_kills_monitors_is_answered_by_the_third() {
        Yard::new().run(&[], "fault", &["crash"]);
    }

    #[test]
    fn a_handler_that_stalls_is_cut_short() {
        let yard = Yard::new();
        let policy = yard.path("policy.toml");
        let text = format!(
            "[hasty]\ncalls = [\"name_to_handle_at\", \"open_by_handle_at\"]\nexports = [{:?}]\nscope = \"x\"\n[hasty.limits]\ndeadline_ms = 1500\n",
            mount_of(&yard.path("files"))
        );
        std::fs::write(&policy, text).unwrap();
        yard.run(&["--policy", policy.to_str().unwrap()], "fault", &["stall"]);
    }
}

/// A workload that the user `uid` started himself, as a rootless runtime does, at the door that is his.
fn rootless(ground: &Ground, yard: &Yard, uid: u32, policy: &str, attack: &[String]) -> Command {
    let door = ground.runtime.path().join(format!("oci-{uid}.sock"));
    let mut command = Command::new("setpriv");
    // He has what it takes to become himself, and is told apart by the peer's uid.
    let user = uid.to_string();
    let rights = "+setuid,+setgid,+setpcap";
    command.args([
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
        "--inh-caps",
        rights,
        "--ambient-caps",
        rights,
    ]);
    command.arg(yard.path("locum")).arg("confined").arg("--door").arg(door);
    command.args(["--id", "same", "--policy", policy, "--calls", "name_to_handle_at,open_by_handle_at"]);
    command
        .args(["--uid", &user, "--gid", &user, "--parent", &std::process::id().to_string(), "--"])
        .args(attack);
    command
}

#[test]
fn a_rootless_user_gets_what_his_door_gives() {
    let (yard, ground) = (Yard::new(), Ground::new());
    common::copy_program(env!("CARGO_BIN_EXE_locum").as_ref(), &yard.path("locum"));
    std::fs::set_permissions(ground.runtime.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let policies = ground.runtime.path().join("policies");
    std::fs::create_dir_all(&policies).unwrap();
    let calls = "calls = [\"name_to_handle_at\", \"open_by_handle_at\"]";
    for (name, peers) in [("theirs", "[1001, 1002]"), ("roots", "[0]")] {
        let text = format!(
            "[{name}]\n{calls}\npeers = {peers}\nexports = [{:?}]\nscope = \"{{container}}\"\ntrusted = [\"container\"]\n",
            mount_of(&yard.path("files"))
        );
        std::fs::write(policies.join(format!("{name}.toml")), text).unwrap();
    }
    let _keeper = ground.start(&["keeper", "--door", "1001", "--door", "1002"]);
    common::until("the keeper", || ground.try_status().is_ok());
    let _monitor = ground.monitor();
    let at = |uid, policy: &str, attack: &str, args: &[&str]| {
        must(&mut rootless(&ground, &yard, uid, policy, &yard.attack(attack, args)))
    };
    let handle = at(1001, "theirs", "print", &["file"]);
    at(1001, "theirs", "open-one", &[&handle, "0"]);
    // The same container's name, of another user.
    at(1002, "theirs", "open-one", &[&handle, STALE]);
    assert_ne!(at(1002, "theirs", "print", &["file"]), handle);
    // Policies that are not his to choose.
    for policy in ["roots", "virtiofsd", "nowhere"] {
        at(1001, policy, "unserved", &[]);
    }
    // A process that is not his.
    let door = ground.runtime.path().join("oci-1001.sock");
    let mut foreign = Command::new("setpriv");
    foreign.args(["--reuid", "1001", "--regid", "1001", "--clear-groups", "--no-new-privs"]);
    must(foreign.args(yard.attack("foreign-pid", &[door.to_str().unwrap()])));
    let log = std::fs::read_to_string(&ground.log).unwrap();
    assert!(log.contains("the runtime named a process that is not its peer's"), "{log}");
    // Another's door.
    let door = ground.runtime.path().join("oci-1002.sock");
    let refused = Command::new("setpriv")
        .args(["--reuid", "1001", "--regid", "1001", "--clear-groups", "test", "-w"])
        .arg(door)
        .status()
        .unwrap();
    assert!(!refused.success(), "the door of another user can be written to");
}
