//! Two users under one filter: the lesser of them never gets the listener, with which it could answer the other's calls.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::process::Stdio;

use serde_json::Value;

use crate::common::{Process, lifelines, until};
use crate::container::{INSIDE, Runtime, Site};
use crate::service::Service;

const OTHER: u32 = 1001;

/// Why there is no lifeline, in the log.
const WHY: &str = "no lifeline, if keeper and monitor are lost at once this workload's calls fail: the caller, or the filter's first \
                   process, can change its ids or may once have been able to, or they differ";

#[test]
fn root_stays_in_crun() {
    beside_root(Runtime::Crun, false);
}

#[test]
fn root_stays_in_runc() {
    beside_root(Runtime::Runc, false);
}

#[test]
fn root_drops_its_rights_in_crun() {
    beside_root(Runtime::Crun, true);
}

#[test]
fn root_drops_its_rights_in_runc() {
    beside_root(Runtime::Runc, true);
}

#[test]
fn exec_in_crun() {
    exec(Runtime::Crun);
}

#[test]
fn exec_in_runc() {
    exec(Runtime::Runc);
}

/// A site where everybody has a folder and an output, and the user a name.
fn site(runtime: Runtime, service: &Service) -> Site {
    let site = Site::new(runtime, &service.seccomp());
    fs::create_dir_all(site.at("root/etc")).unwrap();
    let users = format!("root:x:0:0::/:/bin/sh\nuser:x:{INSIDE}:{INSIDE}::/:/bin/sh\n");
    fs::write(site.at("root/etc/passwd"), users).unwrap();
    for (who, uid) in [("root", 0), ("user", INSIDE), ("second", INSIDE), ("other", OTHER)] {
        let (folder, output) = (site.at("share").join(who), site.at("run").join(who));
        fs::create_dir(&folder).unwrap();
        fs::write(&output, "").unwrap();
        for path in [folder, output] {
            chown(path, Some(uid), Some(uid)).unwrap();
        }
    }
    site
}

/// Traffic that tells in /run how it goes.
fn traffic(who: &str) -> String {
    format!("locum traffic --json --threads=2 --seconds=60 --dir=/share/{who} >/run/{who}")
}

/// Waits until traffic has made calls.
fn await_calls(site: &Site, who: &str) {
    let calls = || {
        let told = fs::read_to_string(site.at("run").join(who)).unwrap_or_default();
        // The last whole line.
        let last = told.rsplit('\n').nth(1);
        last.and_then(|line| serde_json::from_str::<Value>(line).unwrap()["calls"].as_u64())
    };
    let before = calls().unwrap_or_default();
    until("calls", || calls() > Some(before + 100));
}

/// The container's first process is root, and stays it or becomes the user; another root is beside the user in any case.
fn beside_root(runtime: Runtime, drops: bool) {
    let service = Service::new(runtime);
    let _serve = service.serve();
    let site = site(runtime, &service);
    let (root, user) = (traffic("root"), traffic("user"));
    let container = site.start_as(
        0,
        &if drops {
            format!("{root} & exec su user -c '{user} & exec cat'")
        } else {
            format!("{root} & su user -c '{user}' & exec cat")
        },
    );
    // Time enough for many looks.
    await_calls(&site, "user");
    await_calls(&site, "root");
    await_calls(&site, "user");
    assert_eq!(holders(container.pid()), [0; 0]);
    let said = service.said();
    assert!(said.contains(WHY), "{said}");
    container.finish();
}

/// The container has one user, and its lifeline. What is `exec`uted in it as another user has one of its own, if the runtime
/// says which process that is; what is `exec`uted as root and becomes the user has none.
fn exec(runtime: Runtime) {
    let service = Service::new(runtime);
    let _serve = service.serve();
    let site = site(runtime, &service);
    let container = site.start(&format!("{} & exec cat", traffic("user")));
    await_calls(&site, "user");
    assert_eq!(holders(container.pid()), [INSIDE]);
    let becomes_user = format!("{} & exec su user -c '{}'", traffic("root"), traffic("second"));
    let named: &[u32] = if runtime == Runtime::Runc { &[OTHER] } else { &[] };
    for (user, script, who, wanted) in
        [(OTHER, traffic("other"), &["other"][..], named), (0, becomes_user, &["root", "second"], &[])]
    {
        let mut command = container.exec_as(user, &["sh", "-c", &script]);
        let second = Process(command.stdout(Stdio::null()).spawn().unwrap());
        for who in who.iter().chain(who) {
            await_calls(&site, who);
        }
        assert_eq!(holders(second.pid()), wanted, "{who:?}");
        assert_eq!(holders(container.pid()), [INSIDE]);
    }
}

/// Who the processes below `pid` are that hold a listener.
fn holders(pid: u32) -> Vec<u32> {
    lifelines(pid).iter().map(|(pid, ..)| fs::metadata(format!("/proc/{pid}")).unwrap().uid()).collect()
}
