//! What is refused, and why.

use std::process::Command;
use std::sync::mpsc;

use locum_kernel::ptrace::Seized;

use crate::common::{Process, locum};
use crate::yard::{Busy, Yard, must_be_right};

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
