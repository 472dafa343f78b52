//! A real Go program, whose goroutines run on small stacks of their own and change threads as they like: podman's service.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::{Process, locum, until};
use crate::yard::Yard;

const ROUNDS: usize = 50;

fn service(folder: &Path) -> Process {
    let at = |name: &str| folder.join(name);
    let mut podman = Command::new("podman");
    for (option, place) in [
        ("--root", "root"),
        ("--runroot", "run"),
        ("--tmpdir", "tmp"),
        ("--volumepath", "volumes"),
        ("--network-config-dir", "networks"),
    ] {
        podman.arg(option).arg(at(place));
    }
    podman.args([
        "--storage-driver",
        "vfs",
        "--cgroup-manager",
        "cgroupfs",
        "system",
        "service",
        "--time",
        "0",
    ]);
    podman.arg(format!("unix://{}", at("socket").display())).env("HOME", folder);
    // By default, its locks are in /dev/shm, and stay there.
    std::fs::write(at("containers.conf"), "[engine]\nlock_type = \"file\"\n").unwrap();
    podman.env("CONTAINERS_CONF", at("containers.conf"));
    let log = std::fs::File::create(at("log")).unwrap();
    Process(podman.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
}

/// Whether what it answers is right.
fn asks(socket: &Path, path: &str, wanted: &str) -> Result<(), String> {
    let mut answer = String::new();
    UnixStream::connect(socket)
        .and_then(|mut stream| {
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut answer)
        })
        .map_err(|error| error.to_string())?;
    let good = answer.starts_with("HTTP/1.0 200 OK") && answer.contains(wanted);
    if good { Ok(()) } else { Err(format!("{path}: {answer:?}")) }
}

#[test]
fn a_go_program_answers_while_it_is_attached_and_detached() {
    let yard = Yard::new();
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let podman = service(folder.path());
    let socket = folder.path().join("socket");
    let ping = || asks(&socket, "/_ping", "OK");
    until("podman's service", || ping().is_ok());
    let (done, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let pid = podman.pid().to_string();
    let change = |how: &str, more: &[&str]| {
        let mut command = locum(&[how, "--runtime-dir", yard.ground.path(), "--pid", &pid]);
        let out = command.args(more).output().unwrap();
        let told = [out.stdout, out.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(out.status.success(), "{how}: {told}");
    };
    let wrong = std::thread::scope(|scope| {
        let ask = |(path, wanted): (&'static str, &'static str)| {
            let (socket, done, answers) = (&socket, &done, &answers);
            move || {
                while !done.load(Ordering::Relaxed) {
                    asks(socket, path, wanted)?;
                    answers.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<(), String>(())
            }
        };
        let questions =
            [("/_ping", "OK"), ("/v4.0.0/libpod/info", "rootless"), ("/version", "Podman Engine")];
        let clients = questions.map(|question| scope.spawn(ask(question)));
        // Ends the clients also if a round fails.
        let rounds = scope.spawn(|| {
            for _ in 0..ROUNDS {
                change("attach", &["--policy", "attached", "--set-no-new-privs"]);
                change("detach", &[]);
            }
        });
        let rounds = rounds.join();
        let during = answers.load(Ordering::Relaxed);
        let settled = std::time::Instant::now();
        while answers.load(Ordering::Relaxed) < during + 100 && settled.elapsed().as_secs() < 10 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        done.store(true, Ordering::Relaxed);
        let wrong: Vec<String> =
            clients.into_iter().filter_map(|client| client.join().unwrap().err()).collect();
        assert!(rounds.is_ok() && answers.load(Ordering::Relaxed) >= during + 100, "{wrong:?}");
        wrong
    });
    println!("{ROUNDS} rounds, {} answers", answers.load(Ordering::Relaxed));
    assert!(wrong.is_empty(), "{wrong:?}\n{}", std::fs::read_to_string(folder.path().join("log")).unwrap());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Seccomp_filters:\t1"), "{status}");
}
