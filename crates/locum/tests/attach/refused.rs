//! What is refused, and why.

use std::process::{Command, Stdio};
use std::sync::mpsc;

use locum_kernel::ptrace::Seized;

use crate::common::{Process, locum, until};
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

#[test]
fn what_a_filter_of_its_own_forbids_is_named() {
    let yard = Yard::new();
    for (kind, why) in [
        ("forbids open_by_handle_at errno", "already has open_by_handle_at fail or be killed for (Errno)"),
        ("forbids open_by_handle_at kill", "already has open_by_handle_at fail or be killed for (Kill)"),
        ("forbids seccomp kill", "does not let it make seccomp"),
        ("forbids prctl kill", "does not let it make prctl"),
        ("forbids close kill", "does not let it make close"),
        ("forbids rt_sigreturn errno", "does not let it make rt_sigreturn"),
        ("forbids rt_sigreturn kill", "does not let it make rt_sigreturn"),
        ("diverged", "a thread of it is under a filter that the others are not under"),
    ] {
        let busy = yard.start(kind);
        let (good, told) = yard.attach(&busy);
        assert!(!good && told.contains(why) && told.contains("0 attached, 1 left"), "{kind}: {told}");
        let told = must_be_right(busy);
        assert_eq!(told["served"], 0, "{kind}: {told}");
    }
}

#[test]
fn a_program_in_a_debugger_is_left_to_it() {
    let yard = Yard::new();
    let busy = yard.start("reckon");
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-q", "-p", &busy.process.pid().to_string()]).stdin(Stdio::piped());
    let mut gdb = Process(gdb.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let tracer = format!("\nTracerPid:\t{}\n", gdb.pid());
    let status = || std::fs::read_to_string(format!("/proc/{}/status", busy.process.pid())).unwrap();
    until("the debugger", || status().contains(&tracer));
    for more in [&["--dry-run"][..], &[]] {
        let out = yard.command("attach", &busy, more).output().unwrap();
        let told = String::from_utf8_lossy(&out.stdout);
        let why = format!("process {} traces it", gdb.pid());
        assert!(!out.status.success() && told.contains(&why), "{told}");
    }
    // At the end of its input it lets go.
    drop(gdb.0.stdin.take());
    assert!(gdb.0.wait().unwrap().success());
    let (good, told) = yard.attach(&busy);
    assert!(good && told.contains(": attached"), "{told}");
    yard.await_calls();
    must_be_right(busy);
}

/// Programs without a libc: the promise, then nothing.
#[test]
fn programs_that_are_not_understood_are_left_as_they_are() {
    let yard = Yard::new();
    let folder = yard.ground.files.path();
    let wide = "mov $157, %eax; mov $38, %edi; mov $1, %esi; xor %edx, %edx; xor %r10d, %r10d; xor %r8d, %r8d; \
        syscall; 1: mov $34, %eax; syscall; jmp 1b";
    let narrow = "mov $172, %eax; mov $38, %ebx; mov $1, %ecx; xor %edx, %edx; xor %esi, %esi; xor %edi, %edi; \
        int $0x80; 1: mov $29, %eax; int $0x80; jmp 1b";
    for (name, code, assembler, linker, why) in [
        ("wide", wide, "--64", "elf_x86_64", "no `syscall; ret`"),
        ("narrow", narrow, "--32", "elf_i386", "it is a 32-bit program"),
    ] {
        let at = |end: &str| folder.join(format!("{name}{end}"));
        std::fs::write(at(".s"), format!(".globl _start\n_start: {code}\n")).unwrap();
        let done = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
        done(Command::new("as").arg(assembler).arg("-o").arg(at(".o")).arg(at(".s")));
        done(Command::new("ld").args(["-m", linker, "-o"]).arg(at("")).arg(at(".o")));
        let program = Process(Command::new(at("")).spawn().unwrap());
        let status = || std::fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap();
        until("the promise", || status().contains("NoNewPrivs:\t1"));
        let mut attach = locum(&["attach", "--runtime-dir", yard.ground.path(), "--pid"]);
        let out = attach.arg(program.pid().to_string()).output().unwrap();
        let told = String::from_utf8_lossy(&out.stdout);
        assert!(!out.status.success() && told.contains(why), "{name}: {told}");
        assert!(status().contains("Seccomp:\t0"), "{}", status());
    }
}
