//! A keeper, monitors and workloads as real processes: this very test binary, started again in one of the roles below.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs::File;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use locum_keeper::client::{self, ClientError, Connection, Event, Hello, Park};
use locum_keeper::protocol::{Delivery, ListenerId, Overlap, Report};
use locum_keeper::{RuntimeDir, Sockets};
use locum_kernel::filter::{Filter, Wait};
use locum_kernel::notify::Listener;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tempfile::TempDir;

/// A rootless user.
pub(crate) const USER: u32 = 1500;

const PIDFD: &str = "anon_inode:[pidfd]";

/// getppid(2): a call that does no harm, for filters that nobody answers.
const HARMLESS: i32 = 110;

/// Waits until `done`, and fails if that takes longer than ten seconds.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What this binary does when it is started by [`role`]; nothing when the test runner calls it.
pub(crate) fn play() {
    let Ok(role) = std::env::var("LOCUM_TEST_ROLE") else { return };
    let argument = std::env::var("LOCUM_TEST_ARGUMENT").unwrap();
    match role.as_str() {
        "keeper" => keep(Path::new(&argument)),
        "monitor" | "successor" | "reliever" => monitor(Path::new(&argument), &role),
        "workload" => workload(),
        "runtime" => runtime(Path::new(&argument)),
        "flood" => flood(Path::new(&argument)),
        "say" => say(Path::new(&argument)),
        other => panic!("no role {other}"),
    }
    std::process::exit(0);
}

fn keep(dir: &Path) {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let sockets = Sockets::bind(&RuntimeDir::new(dir), &[USER]).unwrap();
    // It ends when its standard input does.
    locum_keeper::run(sockets, std::io::stdin(), None).unwrap();
}

/// Takes what it is leased, and parks something for each; a reliever relieves whoever else has the first.
fn monitor(dir: &Path, role: &str) {
    let overlap = if role == "monitor" { Overlap::Able } else { Overlap::Relieves };
    let hello = Hello { overlap, ..hello(None) };
    let (connection, _) = Connection::open(&RuntimeDir::new(dir), &hello).unwrap();
    println!("\nCONNECTED");
    let mut relieves = role == "reliever";
    loop {
        match connection.receive() {
            Ok(Event::Lease { delivery, .. }) => {
                connection.park(delivery.listener, &park(3, b"parked")).unwrap();
                println!("\nLEASED {}", delivery.listener.0);
                if std::mem::take(&mut relieves) {
                    connection.relieve().unwrap();
                }
            }
            Ok(Event::Relieving) => println!("\nRELIEVING"),
            Ok(Event::Relieved) => println!("\nRELIEVED"),
            _ => return,
        }
    }
}

/// Installs a filter and hands its listener to standard input; lives until that ends.
fn workload() {
    rustix::thread::set_no_new_privs(true).unwrap();
    let listener = Filter::notify(&[HARMLESS]).install(Wait::Interruptible).unwrap();
    let socket = std::io::stdin();
    send(&socket, b"x", &[listener.as_fd()]);
    drop(listener);
    let _ = socket.lock().read(&mut [0]);
}

/// A workload that brings its listener to a door itself.
fn runtime(door: &Path) {
    let stream = UnixStream::connect(door).unwrap();
    rustix::thread::set_no_new_privs(true).unwrap();
    let listener = Filter::notify(&[HARMLESS]).install(Wait::Interruptible).unwrap();
    send(&stream, state("rootless", "creating").as_bytes(), &[listener.as_fd()]);
    drop(listener);
    println!("\nDELIVERED");
    let _ = std::io::stdin().read(&mut [0]);
}

/// Connects a hundred times, begins a state each time and brings a hundred descriptors.
fn flood(door: &Path) {
    let null = File::open("/dev/null").unwrap();
    let many = vec![null.as_fd(); 100];
    let all: Vec<_> = (0..100).filter_map(|_| UnixStream::connect(door).ok()).collect();
    for stream in &all {
        let _ = try_send(stream, b"{", &many);
    }
    println!("\nFLOODED");
    let _ = std::io::stdin().read(&mut [0]);
}

/// Connects, and tells how that ended.
fn say(socket: &Path) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let end = stream.read(&mut [0]);
    println!("\nEND {}", matches!(end, Ok(0)));
}

/// One process in a role; it ends with this.
pub(crate) struct Process {
    pub(crate) child: Child,
    said: Option<mpsc::Receiver<String>>,
}

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Waits until it says `word`, and returns what it says with it.
    pub(crate) fn hear(&self, word: &str) -> String {
        let said = self.said.as_ref().unwrap();
        loop {
            let line = said.recv_timeout(Duration::from_secs(10)).expect(word);
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn role(role: &str, argument: &Path, uid: u32, stdin: Stdio, stderr: Stdio) -> Process {
    // By this path, it can be executed whoever may look into its folder.
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "child", "--nocapture"]);
    command.env("LOCUM_TEST_ROLE", role).env("LOCUM_TEST_ARGUMENT", argument);
    let mut child =
        command.uid(uid).gid(uid).stdin(stdin).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
    let (tell, said) = mpsc::channel();
    let out = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    Process { child, said: Some(said) }
}

/// A process that brings things to `path` as user `uid`.
pub(crate) fn stranger(name: &str, path: &Path, uid: u32) -> Process {
    role(name, path, uid, Stdio::piped(), Stdio::inherit())
}

/// A keeper in a directory of its own.
pub(crate) struct Ground {
    pub(crate) dir: RuntimeDir,
    keeper: Option<Process>,
    quiet: usize,
    temporary: TempDir,
}

impl Ground {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root: run it with cargo xtask test");
        let temporary = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::new(temporary.path());
        let mut ground = Self { dir, keeper: None, quiet: 0, temporary };
        ground.start_keeper();
        ground
    }

    pub(crate) fn start_keeper(&mut self) {
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        self.keeper = Some(role("keeper", self.temporary.path(), 0, Stdio::piped(), log.into()));
        until("the keeper", || client::status(&self.dir, false).is_ok());
        until("its last question to be forgotten", || {
            self.quiet = self.descriptors();
            std::thread::sleep(Duration::from_millis(20));
            self.quiet == self.descriptors()
        });
    }

    pub(crate) fn kill_keeper(&mut self) {
        self.keeper = None;
    }

    pub(crate) fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().pid()
    }

    /// How many the keeper has, but for those of monitors, which may be this very process.
    pub(crate) fn descriptors(&self) -> usize {
        self.links().iter().filter(|link| *link != PIDFD).count()
    }

    /// How many monitors the keeper watches.
    pub(crate) fn monitors(&self) -> usize {
        self.links().iter().filter(|link| *link == PIDFD).count()
    }

    fn links(&self) -> Vec<String> {
        let all = std::fs::read_dir(format!("/proc/{}/fd", self.keeper_pid())).unwrap();
        // One that is closed meanwhile has no link.
        let links = all.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        links.map(|link| link.to_string_lossy().into_owned()).collect()
    }

    fn log_path(&self) -> PathBuf {
        self.temporary.path().join("log")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    pub(crate) fn await_log(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < Duration::from_secs(10), "not in the log: {text}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn status(&self) -> Report {
        client::status(&self.dir, false).unwrap()
    }

    pub(crate) fn door(&self) -> UnixStream {
        UnixStream::connect(self.dir.front_door()).unwrap()
    }

    /// Delivers what a runtime would, in one piece.
    pub(crate) fn deliver(&self, state: &str, listener: &impl AsFd) {
        send(&self.door(), state.as_bytes(), &[listener.as_fd()]);
    }

    /// A start with a workload of its own.
    pub(crate) fn container(&self, id: &str) -> Workload {
        let (workload, listener) = Workload::new();
        self.deliver(&state(id, "creating"), &listener);
        workload
    }

    pub(crate) fn monitor(&self) -> Arc<Connection> {
        self.monitor_of(None).0
    }

    pub(crate) fn monitor_of(&self, generation: Option<u64>) -> (Arc<Connection>, u64) {
        let (connection, keeper) = Connection::open(&self.dir, &hello(generation)).unwrap();
        assert_eq!(keeper.pid, self.keeper_pid());
        (Arc::new(connection), keeper.generation)
    }

    /// One that is to relieve all others.
    pub(crate) fn successor(&self) -> Result<Arc<Connection>, ClientError> {
        let hello = Hello { overlap: Overlap::Relieves, ..hello(None) };
        let (connection, keeper) = Connection::open(&self.dir, &hello)?;
        assert_eq!(keeper.overlap, Overlap::Relieves);
        Ok(Arc::new(connection))
    }

    /// A monitor that can be killed.
    pub(crate) fn mortal_monitor(&self) -> Process {
        self.mortal("monitor")
    }

    /// A monitor that can be killed, in one of the roles that there are.
    pub(crate) fn mortal(&self, name: &str) -> Process {
        let monitor = role(name, self.temporary.path(), 0, Stdio::null(), Stdio::inherit());
        monitor.hear("CONNECTED");
        monitor
    }

    /// Fails if the keeper holds anything that it did not hold at first.
    pub(crate) fn must_be_quiet(&self) {
        let start = Instant::now();
        while self.descriptors() != self.quiet {
            let is_early = start.elapsed() < Duration::from_secs(10);
            assert!(is_early, "{} descriptors at first, now {:?}\n{}", self.quiet, self.links(), self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(self.status().sessions, []);
    }
}

/// Someone with a filter.
pub(crate) struct Workload(Process);

impl Workload {
    pub(crate) fn new() -> (Self, Listener) {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        let process = role("workload", Path::new(""), 0, theirs.into(), Stdio::inherit());
        let (_, mut descriptors) = receive(&ours);
        // Standard input ends when this is over.
        std::mem::forget(ours);
        (Self(process), Listener::try_from(descriptors.remove(0)).unwrap())
    }
}

fn hello(generation: Option<u64>) -> Hello {
    let overlap = Overlap::Able;
    // Only an order is wanted.
    let started = u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap();
    Hello { pid: std::process::id(), version: "0.0.0".into(), generation, overlap, started }
}

/// The next thing that the keeper tells this monitor.
pub(crate) fn next(connection: &Arc<Connection>) -> Event {
    let connection = Arc::clone(connection);
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(connection.receive().unwrap()));
    told.recv_timeout(Duration::from_secs(10)).expect("the keeper tells nothing")
}

pub(crate) fn next_lease(connection: &Arc<Connection>) -> (Delivery, Listener, Vec<Park>) {
    match next(connection) {
        Event::Lease { delivery, listener, parks } => (delivery, listener, parks),
        other => panic!("wanted a lease, found {other:?}"),
    }
}

pub(crate) fn next_end(connection: &Arc<Connection>) -> ListenerId {
    match next(connection) {
        Event::Ended { listener } => listener,
        other => panic!("wanted an end, found {other:?}"),
    }
}

/// A park in which `bytes` wait.
pub(crate) fn park(slot: u32, bytes: &[u8]) -> Park {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (near, far) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::io::write(&near, bytes).unwrap();
    Park { slot, near, far }
}

/// What waits in a park.
pub(crate) fn parked(park: &Park) -> Vec<u8> {
    let mut bytes = [0; 64];
    let got = rustix::io::read(&park.far, &mut bytes).unwrap();
    bytes[..got].to_vec()
}

/// As crun and runc say it.
pub(crate) fn state(id: &str, status: &str) -> String {
    padded_state(id, status, 0)
}

pub(crate) fn padded_state(id: &str, status: &str, padding: usize) -> String {
    let (pid, padding) = (if status == "running" { 0 } else { 4242 }, "x".repeat(padding));
    format!(
        r#"{{ "ociVersion": "0.2.0", "fds": [ "seccompFd" ], "pid": {pid}, "metadata": "policy=virtiofsd",
            "state": {{ "ociVersion": "0.2.0", "id": "{id}", "status": "{status}", "pid": {pid}, "bundle": ".",
            "annotations": {{ "a}}\"": "{padding}" }} }} }}"#
    )
}

pub(crate) fn send(socket: &impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    assert_eq!(try_send(socket, bytes, descriptors), Ok(bytes.len()));
}

pub(crate) fn try_send(
    socket: &impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<usize, rustix::io::Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

fn receive(socket: &OwnedFd) -> (usize, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 16];
    let mut part = [std::io::IoSliceMut::new(&mut bytes)];
    let got = rustix::net::recvmsg(socket, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    (got.bytes, descriptors.collect())
}

/// Waits until the keeper has closed its end.
pub(crate) fn await_close(stream: &UnixStream, patience: Duration) {
    stream.set_read_timeout(Some(patience)).unwrap();
    match (&mut &*stream).read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("wanted the end, found {other:?}"),
    }
}

/// A frame of the control protocol.
pub(crate) fn frame(json: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(json.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.write_all(json.as_bytes()).unwrap();
    bytes
}
