//! What the tests of `run`, `demo` and chaos share: a keeper, monitors and workloads of their own, as real processes.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod chaos;

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use locum_kernel::filter::{Filter, Wait};
use locum_kernel::notify::Listener;
use serde_json::Value;
use tempfile::TempDir;

/// Who workloads run as.
pub(crate) const USER: u32 = 65534;

pub(crate) fn locum(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_locum"));
    command.args(args).env_remove("LOCUM_RUNTIME_DIR").stdin(Stdio::null());
    command
}

/// Copies a program. Another process does it: one that a test beside this starts meanwhile would have the copy open for writing
/// too, and it could not be executed (ETXTBSY).
pub(crate) fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

/// Copies the program that makes the tests' calls, an example of locum-kernel.
pub(crate) fn copy_caller(to: &Path) {
    let built = Path::new(env!("CARGO_BIN_EXE_locum")).with_file_name("examples").join("caller");
    assert!(
        built.exists(),
        "no {}: cargo build -p locum-kernel --examples, or cargo xtask test",
        built.display()
    );
    copy_program(&built, to);
}

/// Waits until `done`, and fails if that takes longer than ten seconds.
pub(crate) fn until(what: &str, done: impl FnMut() -> bool) {
    until_within(Duration::from_secs(10), what, done);
}

/// The same with another limit.
pub(crate) fn until_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// xorshift64*: only variety is wanted, and the same again for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = std::env::var("LOCUM_CHAOS_SEED").map_or_else(
            |_| u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos()) | 1,
            |text| text.parse().unwrap(),
        );
        println!("LOCUM_CHAOS_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn micros(&mut self, from: u64, to: u64) -> Duration {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let random = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        Duration::from_micros(from + random % (to - from))
    }

    /// Another one, for another thread.
    pub(crate) fn split(&mut self) -> Self {
        Self(u64::try_from(self.micros(0, u64::from(u32::MAX)).as_micros()).unwrap() | 1)
    }
}

/// A process that ends with its owner.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A runtime directory, files to work with, and a log of what keeper and monitors said.
pub(crate) struct Ground {
    pub(crate) runtime: TempDir,
    pub(crate) files: TempDir,
    pub(crate) log: PathBuf,
}

impl Ground {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root: run it with cargo xtask test");
        let runtime = tempfile::tempdir_in("/dev/shm").unwrap();
        Self { log: runtime.path().join("log"), runtime, files: files() }
    }

    pub(crate) fn path(&self) -> &str {
        self.runtime.path().to_str().unwrap()
    }

    pub(crate) fn start(&self, args: &[&str]) -> Process {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        Process(locum(args).args(["--runtime-dir", self.path()]).stderr(log).spawn().unwrap())
    }

    pub(crate) fn keeper(&self) -> Process {
        let keeper = self.start(&["keeper"]);
        until("the keeper's sockets", || {
            let open = |name| UnixStream::connect(self.runtime.path().join(name)).is_ok();
            open("oci.sock") && open("keeper.sock")
        });
        keeper
    }

    pub(crate) fn monitor(&self) -> Process {
        let keys = self.runtime.path().join("keys");
        self.start(&["monitor", "--keys", keys.to_str().unwrap()])
    }

    /// A monitor that dies at `step` (`locum_kernel::fault::die_at`), the first `after` times excepted. In debug builds only.
    pub(crate) fn mortal_monitor(&self, step: u32, after: u32) -> Process {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = locum(&["monitor", "--runtime-dir", self.path(), "--keys"]);
        command.arg(self.runtime.path().join("keys")).stderr(log);
        command.env("LOCUM_DIE_AT", step.to_string()).env("LOCUM_DIE_AFTER", after.to_string());
        Process(command.spawn().unwrap())
    }

    /// A monitor that relieves the one that there is, once it serves.
    pub(crate) fn successor(&self) -> Process {
        let mut successor = self.start_successor();
        let mut said = String::new();
        BufReader::new(successor.0.stdout.take().unwrap()).read_line(&mut said).unwrap();
        assert_eq!(said, "serving\n", "{}", self.log_tail());
        successor
    }

    /// The same, without waiting.
    pub(crate) fn start_successor(&self) -> Process {
        let keys = self.runtime.path().join("keys");
        let mut command = locum(&["monitor", "--replace", "--tell", "--keys", keys.to_str().unwrap()]);
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        command.args(["--runtime-dir", self.path()]).stdout(Stdio::piped()).stderr(log);
        Process(command.spawn().unwrap())
    }

    /// `locum run` here, with the traffic as its command.
    pub(crate) fn traffic(&self, run: &[&str], traffic: &[&str]) -> Traffic {
        let files = self.files.path().to_str().unwrap();
        let user = USER.to_string();
        let mut command = locum(&["run", "--runtime-dir", self.path(), "--export", files, "--user", &user]);
        // Reachable as this whoever the user is: it is what the confined process runs before.
        command.args(run).args(["--", "/proc/self/exe", "traffic", "--json", "--dir", files]).args(traffic);
        Traffic::start(command)
    }

    pub(crate) fn status(&self) -> Value {
        self.try_status().unwrap()
    }

    /// What the keeper says, if there is one.
    pub(crate) fn try_status(&self) -> Result<Value, String> {
        let out = locum(&["status", "--json", "--runtime-dir", self.path()]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        out.status.success().then(|| serde_json::from_slice(&out.stdout).unwrap()).ok_or(said)
    }

    pub(crate) fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// A folder on a file system with handles, owned by the user of the workloads.
pub(crate) fn files() -> TempDir {
    let files = tempfile::tempdir_in("/var/tmp").unwrap();
    std::os::unix::fs::chown(files.path(), Some(USER), Some(USER)).unwrap();
    files
}

/// getppid(2).
const HARMLESS: i32 = 110;

/// A thread under a filter, and its listener. The filter's last user is gone when this is dropped.
pub(crate) struct Filtered {
    pub(crate) listener: Listener,
    _lives: mpsc::Sender<()>,
}

impl Filtered {
    pub(crate) fn new() -> Self {
        let (lives, over) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            tell.send(Filter::notify(&[HARMLESS]).install(Wait::Interruptible).unwrap()).unwrap();
            let _ = over.recv();
        });
        Self { listener: told.recv().unwrap(), _lives: lives }
    }
}

/// What crun says when it starts `container`, which gets nothing.
pub(crate) fn state(container: &str) -> String {
    format!(
        r#"{{ "ociVersion": "0.2.0", "fds": [ "seccompFd" ], "pid": 0, "metadata": "policy=none",
            "state": {{ "ociVersion": "0.2.0", "id": "{container}", "status": "creating", "pid": 0, "bundle": "." }} }}"#
    )
}

/// Checked traffic under `locum run`.
pub(crate) struct Traffic {
    pub(crate) run: Process,
    heard: Arc<Mutex<Value>>,
    listener: std::thread::JoinHandle<()>,
}

impl Traffic {
    pub(crate) fn start(mut command: Command) -> Self {
        let mut run = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(run.stdout.take().unwrap()).lines();
        let heard = Arc::new(Mutex::new(serde_json::json!({"calls": 0, "waiting_us": 0, "done": false})));
        let told = Arc::clone(&heard);
        let listener = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                *told.lock().unwrap() = serde_json::from_str(&line).unwrap();
            }
        });
        Self { run: Process(run), heard, listener }
    }

    /// What it told last.
    pub(crate) fn report(&self) -> Value {
        self.heard.lock().unwrap().clone()
    }

    pub(crate) fn number(&self, name: &str) -> u64 {
        self.report()[name].as_u64().unwrap()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.listener.is_finished()
    }

    /// How it ended, and its last word.
    pub(crate) fn finish(mut self) -> (ExitStatus, Value) {
        let status = self.run.0.wait().unwrap();
        self.listener.join().unwrap();
        let report = self.heard.lock().unwrap().clone();
        (status, report)
    }
}

/// The children of `pid`, whichever of its threads started them.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    // It may end at any moment.
    let threads = std::fs::read_dir(&tasks).into_iter().flatten().flatten();
    let of_thread = |thread: std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("children")).unwrap_or_default()
    };
    let text: Vec<_> = threads.map(of_thread).collect();
    text.iter().flat_map(|text| text.split_whitespace()).map(|pid| pid.parse().unwrap()).collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    // A zombie is not.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

/// What `path` holds, below.
pub(crate) fn list(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The mount on which `path` lies.
pub(crate) fn mount_of(path: &Path) -> String {
    let out = Command::new("findmnt").args(["-n", "-o", "TARGET", "--target"]).arg(path).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// Every process below `pid` that holds a listener, the number there, and whether it is closed on exec.
pub(crate) fn lifelines(pid: u32) -> Vec<(u32, String, bool)> {
    let (mut found, mut below) = (Vec::new(), children(pid));
    while let Some(pid) = below.pop() {
        below.extend(children(pid));
        let table = format!("/proc/{pid}/fd");
        // It may end meanwhile, or close what was there.
        let entries = std::fs::read_dir(&table).into_iter().flatten().flatten();
        for fd in entries.map(|entry| entry.file_name().into_string().unwrap()) {
            let target = std::fs::read_link(format!("{table}/{fd}"));
            let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            if let Some(flags) = flags
                && target.is_ok_and(|target| target.as_os_str() == "anon_inode:seccomp notify")
            {
                found.push((pid, fd, u32::from_str_radix(flags.trim(), 8).unwrap() & 0o2_000_000 != 0));
            }
        }
    }
    found
}
