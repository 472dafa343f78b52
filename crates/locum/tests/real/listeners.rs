//! Containers of each runtime come to the front door: with more than one listener, and while no monitor runs.

use std::process::Stdio;

use serde_json::Value;

use crate::common::{Process, until};
use crate::container::{Container, Runtime, Site};
use crate::service::{Service, Victim, while_killing};

#[test]
fn exec_in_crun() {
    exec(Runtime::Crun);
}

#[test]
fn exec_in_runc() {
    exec(Runtime::Runc);
}

#[test]
fn exec_in_podman() {
    exec(Runtime::Podman);
}

#[test]
fn crun_before_the_monitor() {
    before_the_monitor(Runtime::Crun);
}

#[test]
fn runc_before_the_monitor() {
    before_the_monitor(Runtime::Runc);
}

#[test]
fn podman_before_the_monitor() {
    before_the_monitor(Runtime::Podman);
}

/// What a command `exec`uted in a running container asks is answered as well, in the same session.
fn exec(runtime: Runtime) {
    let service = Service::new(runtime);
    let _serve = service.serve();
    let site = Site::new(runtime, &service.seccomp());
    let container = site.start("mkdir /share/one /share/two && touch /run/ready && exec cat");
    until("the container", || site.at("run/ready").exists());
    let ((), kills, _) = while_killing(&service, Victim::Monitor, || {
        let traffic = traffic("two", "--seconds=4");
        let mut second = container.exec(&["sh", "-c", &traffic]);
        let mut second = Process(second.stdout(Stdio::piped()).spawn().unwrap());
        until("calls of the second listener", || service.counted().calls > 0);
        let status = service.status();
        assert_eq!(status["sessions"].as_array().unwrap().len(), 1, "{status}");
        assert_eq!(status["sessions"][0]["listeners"], 2, "{status}");
        let mut said = String::new();
        std::io::Read::read_to_string(&mut second.0.stdout.take().unwrap(), &mut said).unwrap();
        assert!(second.0.wait().unwrap().success(), "{said}");
        assert_clean(&said);
    });
    // The end of the second is not the end of the session.
    until("one listener", || service.counted().listeners == 1);
    let counted = service.counted();
    assert!(kills >= 5 && counted.calls > 1000 && counted.recovered >= 1, "{kills} kills, {counted:?}");
    container.finish();
    until("no session", || service.status()["sessions"].as_array().unwrap().is_empty());
}

/// A container starts without a monitor, its calls wait, and the first monitor answers them.
fn before_the_monitor(runtime: Runtime) {
    let service = Service::new(runtime);
    let _keeper = service.keeper();
    let site = Site::new(runtime, &service.seccomp());
    let script = format!("touch /run/ready && {}", traffic("", "--calls=2000"));
    let container: Container<'_> = site.start(&script);
    until("the container", || site.at("run/ready").exists());
    until("its session", || service.counted().listeners == 1);
    assert!(service.status()["monitor"].is_null());
    let _monitor = service.monitor();
    assert_clean(&container.finish());
}

fn traffic(folder: &str, extent: &str) -> String {
    format!("locum traffic --json --threads=4 --dir=/share/{folder} {extent}")
}

/// By its last word, all that came back was right.
fn assert_clean(said: &str) {
    let report: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert!(report["done"] == true && report["wrong"] == 0 && report["failed"] == 0, "{report}");
    assert!(report["calls"].as_u64().unwrap() > 1000, "{report}");
}
