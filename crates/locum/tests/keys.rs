//! Keys that come, go and go bad while a monitor runs, and the commands that see to them.

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{ChildStdout, Output, Stdio};

use common::{Ground, Process, USER, locum, mount_of, until};
use serde_json::Value;

const NOT_SUPPORTED: &str = "-95";
const STALE: i64 = -116;

/// A ground with a directory of keys, and a policy with one scope for all.
struct Yard {
    ground: Ground,
}

impl Yard {
    fn new() -> Self {
        let ground = Ground::new();
        fs::set_permissions(ground.files.path(), PermissionsExt::from_mode(0o755)).unwrap();
        common::copy_caller(&ground.files.path().join("caller"));
        fs::write(ground.files.path().join("file"), "file").unwrap();
        let policy = format!("[mine]\nexports = [{:?}]\nscope = \"mine\"\n", mount_of(ground.files.path()));
        fs::write(ground.files.path().join("policy.toml"), policy).unwrap();
        Self { ground }
    }

    fn directory(&self) -> PathBuf {
        self.ground.runtime.path().join("keys")
    }

    fn file(&self, id: &str) -> PathBuf {
        self.directory().join(format!("{id}.key"))
    }

    fn keys(&self, args: &[&str]) -> Output {
        let mut command = locum(&["keys"]);
        command.args(args).arg("--keys").arg(self.directory());
        if matches!(args[0], "list" | "retire") {
            command.args(["--runtime-dir", self.ground.path()]);
        }
        command.output().unwrap()
    }

    fn create(&self) -> String {
        let out = self.keys(&["create"]);
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        text(&out.stdout).trim().to_owned()
    }

    /// The key `id` as `locum keys list` knows it.
    fn listed(&self, id: &str) -> Option<Value> {
        let listed: Value = serde_json::from_slice(&self.keys(&["list", "--json"]).stdout).unwrap();
        listed["keys"].as_array().unwrap().iter().find(|key| key["id"] == id).cloned()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.ground.log).unwrap()
    }

    /// A workload that asks for a handle whenever it is told to.
    fn workload(&self) -> Workload {
        let files = self.ground.files.path();
        let mut run = locum(&["run", "--runtime-dir", self.ground.path(), "--user", &USER.to_string()]);
        run.arg("--policy").arg(files.join("policy.toml")).arg("--").arg(files.join("caller"));
        run.args(["as-is", "keyed"]).arg(files);
        let mut run = Process(run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let answers = BufReader::new(run.0.stdout.take().unwrap());
        Workload { run, answers }
    }
}

struct Workload {
    run: Process,
    answers: BufReader<ChildStdout>,
}

impl Workload {
    /// Its handle of the file or the error, and what opening its first handle gives.
    fn ask(&mut self) -> (String, i64) {
        self.run.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        let (named, opened) = answer.trim().split_once(' ').unwrap();
        (named.to_owned(), opened.parse().unwrap())
    }
}

/// The id of the key in a signed handle, given in hex.
fn key_of(handle: &str) -> &str {
    &handle[handle.len() - 40..][..8]
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_key_is_rotated_under_traffic_and_retired() {
    let yard = Yard::new();
    let ground = &yard.ground;
    let old = yard.create();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let traffic = ground.traffic(&[], &["--threads", "4", "--seconds", "120"]);
    let mut before = yard.workload();
    let (first, opened) = before.ask();
    assert_eq!((key_of(&first), opened), (&old[..], 0));
    until("calls", || traffic.number("calls") > 100);

    let new = yard.create();
    let mut after = yard.workload();
    let (second, opened) = after.ask();
    assert_eq!((key_of(&second), opened), (&new[..], 0), "{}", ground.log_tail());
    assert_eq!(before.ask(), (first.clone(), 0), "a session keeps its key");
    monitor.kill();
    let _monitor = ground.monitor();
    assert_eq!(before.ask(), (first.clone(), 0), "a session keeps its key");
    assert_eq!(after.ask(), (second.clone(), 0));
    let calls = traffic.number("calls");
    until("calls", || traffic.number("calls") > calls + 100);
    assert_eq!((traffic.number("failed"), traffic.number("wrong")), (0, 0), "{}", ground.log_tail());

    let sessions = |id: &str| yard.listed(id).unwrap()["sessions"].as_array().unwrap().clone();
    assert_eq!((sessions(&old).len(), sessions(&new).len()), (2, 1));
    assert_eq!(yard.listed(&new).unwrap()["newest"], true);
    assert_eq!(yard.listed(&old).unwrap()["newest"], false);
    let out = yard.keys(&["retire", &old]);
    assert_eq!(out.status.code(), Some(1));
    for session in sessions(&old) {
        assert!(text(&out.stdout).contains(session.as_str().unwrap()), "{out:?}");
    }
    assert!(text(&out.stderr).contains("2 session(s)") && text(&out.stderr).contains("--force"), "{out:?}");
    assert_eq!(before.ask(), (first, 0));

    drop(traffic);
    assert!(yard.keys(&["retire", &old, "--force"]).status.success());
    until("the end of the old key", || before.ask() == (NOT_SUPPORTED.to_owned(), STALE));
    assert_eq!(after.ask(), (second, 0));
    assert!(yard.listed(&old).is_none());
    let out = yard.keys(&["retire", &old]);
    assert!(text(&out.stderr).contains(&yard.file(&old).display().to_string()), "{out:?}");
    drop(after);
    until("the end of its session", || sessions(&new).is_empty());
    let out = yard.keys(&["retire", &new]);
    assert!(!out.status.success() && text(&out.stderr).contains("the last key"), "{out:?}");
}

type Act<'a> = &'a dyn Fn();

/// The next monitor does as this one does, whatever is wrong with the key; and what is right again is used again.
#[test]
fn a_session_whose_key_goes_bad_is_refused_and_never_signed_with_another() {
    let yard = Yard::new();
    let ground = &yard.ground;
    let old = yard.create();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let mut workload = yard.workload();
    let good = workload.ask();
    assert_eq!((key_of(&good.0), good.1), (&old[..], 0));
    let other = yard.create();
    let (path, bytes) = (yard.file(&old), fs::read(yard.file(&old)).unwrap());
    let aside = ground.runtime.path().join("aside");
    let is_refused = (NOT_SUPPORTED.to_owned(), STALE);
    let restore = || {
        fs::write(&path, &bytes).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    };
    let bad: [(&str, Act<'_>); 5] = [
        ("wanted 32 bytes, found 5", &|| fs::write(&path, &bytes[..5]).unwrap()),
        ("8 zeros in a row", &|| fs::write(&path, [0; 32]).unwrap()),
        ("mode 0644", &|| fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap()),
        ("cannot open", &|| {
            fs::rename(&path, &aside).unwrap();
            std::os::unix::fs::symlink(&aside, &path).unwrap();
        }),
        ("", &|| fs::remove_file(&path).unwrap()),
    ];
    for (said, spoil) in bad {
        spoil();
        until("a refusal", || workload.ask() == is_refused);
        if said.is_empty() {
            until("a word about it", || {
                yard.log().contains(&format!("a key is gone, what it signed verifies no more; sessions that sign with it get EOPNOTSUPP for names key={old}"))
            });
        } else {
            until("a word about it", || {
                yard.log().lines().any(|line| line.contains(path.to_str().unwrap()) && line.contains(said))
            });
            let out = yard.keys(&["check"]);
            assert_eq!(out.status.code(), Some(1));
            let told = text(&out.stdout);
            assert!(
                told.contains("NOT in order") && told.contains(path.to_str().unwrap()) && told.contains(said),
                "{told}"
            );
            assert!(told.contains(&format!("in order      {}", yard.file(&other).display())), "{told}");
        }
        monitor.kill();
        monitor = ground.monitor();
        assert_eq!(workload.ask(), is_refused, "{said}: {}", ground.log_tail());
        // A new session signs with what is in order.
        assert_eq!(key_of(&yard.workload().ask().0), other);
        let _ = fs::remove_file(&path);
        restore();
        until("the same handle as before", || workload.ask() == good);
    }
    assert!(yard.keys(&["check"]).status.success());
}

#[test]
fn without_any_key_in_order_a_session_is_refused_for_good() {
    let yard = Yard::new();
    let ground = &yard.ground;
    fs::create_dir(yard.directory()).unwrap();
    fs::write(yard.file("0011aaff"), "half").unwrap();
    fs::set_permissions(yard.file("0011aaff"), PermissionsExt::from_mode(0o600)).unwrap();
    let (_keeper, mut monitor) = (ground.keeper(), ground.monitor());
    let mut workload = yard.workload();
    let is_refused = (NOT_SUPPORTED.to_owned(), STALE);
    assert_eq!(workload.ask(), is_refused);
    let key = yard.create();
    assert_eq!(key_of(&yard.workload().ask().0), key);
    assert_eq!(workload.ask(), is_refused);
    monitor.kill();
    let _monitor = ground.monitor();
    assert_eq!(workload.ask(), is_refused, "a session's key is chosen when it begins");
}

#[test]
fn a_file_that_is_being_copied_is_used_once_it_is_whole() {
    let yard = Yard::new();
    let ground = &yard.ground;
    let first = yard.create();
    let (_keeper, _monitor) = (ground.keeper(), ground.monitor());
    let path = yard.file("0011aaff");
    let mut file = fs::File::create_new(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    for _ in 0..4 {
        assert_eq!(key_of(&yard.workload().ask().0), first);
        file.write_all(&[7; 8]).unwrap();
    }
    assert_eq!(key_of(&yard.workload().ask().0), "0011aaff");
    until("a word about it", || yard.log().contains("0011aaff.key: wanted 32 bytes, found "));
}
