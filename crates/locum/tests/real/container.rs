//! Containers of three runtimes with the same root file system, user 1000 in them, and a share.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::Process;
use crate::components::{self, run};

/// The user, on this machine, whose podman it is: `cargo xtask setup` makes it.
const ROOTLESS: &str = "locum-test";

/// The user in each container.
pub(crate) const INSIDE: u32 = 1000;

/// What a root that may become somebody else has.
const CHANGES_IDS: [&str; 2] = ["CAP_SETUID", "CAP_SETGID"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    Crun,
    Runc,
    /// Rootless, with crun below it.
    Podman,
}

impl Runtime {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Podman => "podman",
        }
    }

    /// Whose front door it comes to.
    pub(crate) fn user(self) -> u32 {
        match self {
            Self::Crun | Self::Runc => 0,
            Self::Podman => run(Command::new("id").args(["-u", ROOTLESS])).trim().parse().unwrap(),
        }
    }

    /// Who user 1000 in a container is outside.
    pub(crate) fn outside(self) -> u32 {
        match self {
            Self::Crun | Self::Runc => INSIDE,
            Self::Podman => {
                let ranges = fs::read_to_string("/etc/subuid").unwrap();
                let range =
                    ranges.lines().find_map(|line| line.strip_prefix(&format!("{ROOTLESS}:"))).unwrap();
                let first: u32 = range.split(':').next().unwrap().parse().unwrap();
                // 0 inside is the user itself, 1 the first of its range.
                first + INSIDE - 1
            }
        }
    }
}

/// A folder with all that containers of one runtime need: root file system, share, and where it keeps its state.
pub(crate) struct Site {
    runtime: Runtime,
    folder: TempDir,
    /// Of its containers.
    pub(crate) annotations: Value,
    /// How crun sees to control groups.
    control_groups: &'static str,
}

impl Site {
    /// `seccomp` is the profile, as the runtime wants it; null for none.
    pub(crate) fn new(runtime: Runtime, seccomp: &Value) -> Self {
        let site = Self {
            runtime,
            folder: components::folder(),
            annotations: json!({}),
            control_groups: "disabled",
        };
        root_file_system(&site.at("root"));
        for name in ["share", "run"] {
            fs::create_dir(site.at(name)).unwrap();
            chown(site.at(name), Some(runtime.outside()), Some(runtime.outside())).unwrap();
        }
        fs::write(site.at("seccomp.json"), seccomp.to_string()).unwrap();
        if runtime == Runtime::Podman {
            for name in ["home", "xdg"] {
                fs::create_dir(site.at(name)).unwrap();
                fs::set_permissions(site.at(name), fs::Permissions::from_mode(0o700)).unwrap();
                chown(site.at(name), Some(runtime.user()), Some(runtime.user())).unwrap();
            }
            run(Command::new("tar").arg("-C").arg(site.at("root")).arg("-cf").arg(site.at("image")).arg("."));
            run(site.command().arg("import").arg(site.at("image")).arg("localhost/locum-test"));
        }
        site
    }

    /// Has crun give each container a control group of its own, as runc does.
    pub(crate) fn with_control_group(mut self) -> Self {
        self.control_groups = "cgroupfs";
        self
    }

    /// Makes a folder in the share, for the containers' user.
    pub(crate) fn share(&self, name: &str) {
        let folder = self.at("share").join(name);
        fs::create_dir(&folder).unwrap();
        chown(folder, Some(self.runtime.outside()), Some(self.runtime.outside())).unwrap();
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a container with a shell script in it. Its standard input is the container's.
    pub(crate) fn start(&self, script: &str) -> Container<'_> {
        self.start_as(INSIDE, script)
    }

    /// The same as another user; root may change its ids. Not for podman.
    pub(crate) fn start_as(&self, user: u32, script: &str) -> Container<'_> {
        // runc names a control group of this machine by it.
        let folder = self.folder.path().file_name().unwrap().to_string_lossy();
        let name = &format!("locum{folder}");
        let mut command = self.command();
        match self.runtime {
            Runtime::Crun | Runtime::Runc => {
                let bundle = self.at(name);
                fs::create_dir(&bundle).unwrap();
                fs::write(bundle.join("config.json"), self.configuration(user, script).to_string()).unwrap();
                command.arg("run").arg("--bundle").arg(bundle).arg(name);
            }
            Runtime::Podman => {
                let profile = format!("seccomp={}", self.at("seccomp.json").display());
                command.args(["run", "--rm", "--interactive", "--network=none", "--name", name]);
                command.args([
                    "--cap-drop=all",
                    "--security-opt=no-new-privileges",
                    "--security-opt",
                    &profile,
                ]);
                command.args(["--user", &format!("{INSIDE}:{INSIDE}")]);
                for name in ["share", "run"] {
                    command.arg("--volume").arg(format!("{}:/{name}", self.at(name).display()));
                }
                command.args(["localhost/locum-test", "/bin/sh", "-c", script]);
            }
        }
        let mut process = Process(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let input = process.0.stdin.take();
        Container { site: self, name: name.to_owned(), process, input }
    }

    /// The runtime, with its state in this folder.
    fn command(&self) -> Command {
        // crun refuses the hybrid layout of control groups as long as it sees the second tree; without one, that is no loss.
        let hidden = "umount /sys/fs/cgroup/unified 2>/dev/null; mount --make-rshared /; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", hidden, "sh"]);
        let state = self.at("state");
        match self.runtime {
            Runtime::Crun => {
                let manager = format!("--cgroup-manager={}", self.control_groups);
                command.args(["crun", &manager, "--root"]).arg(state);
            }
            Runtime::Runc => {
                command = Command::new("runc");
                command.arg("--root").arg(state);
            }
            Runtime::Podman => {
                command.args(["runuser", "-u", ROOTLESS, "--", "env", "-i"]);
                command.arg(format!("XDG_RUNTIME_DIR={}", self.at("xdg").display()));
                command.arg(format!("HOME={}", self.at("home").display()));
                command.args(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "podman"]);
            }
        }
        command.current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Without new privileges, and without capabilities unless it is for root.
    fn configuration(&self, user: u32, script: &str) -> Value {
        let rights: &[&str] = if user == 0 { &CHANGES_IDS } else { &[] };
        let seccomp: Value = serde_json::from_slice(&fs::read(self.at("seccomp.json")).unwrap()).unwrap();
        let bind = |name: &str| json!({"destination": format!("/{name}"), "type": "bind", "source": self.at(name), "options": ["rbind", "rw"]});
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                // Groups as `su` gives them.
                "user": {"uid": user, "gid": user, "additionalGids": [user]},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {"bounding": rights, "effective": rights, "inheritable": [], "permitted": rights, "ambient": []},
            },
            "root": {"path": self.at("root"), "readonly": true},
            "hostname": "locum-test",
            "annotations": self.annotations,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                bind("share"),
                bind("run"),
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
                "seccomp": seccomp,
            },
        })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // The process that keeps the user's namespaces for podman outlives its containers.
        let pause = fs::read_to_string(self.at("xdg/libpod/tmp/pause.pid")).unwrap_or_default();
        if let Some(pid) = pause.trim().parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// A running container.
pub(crate) struct Container<'a> {
    site: &'a Site,
    name: String,
    process: Process,
    input: Option<ChildStdin>,
}

impl Container<'_> {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// One more command in it.
    pub(crate) fn exec(&self, args: &[&str]) -> Command {
        self.exec_as(INSIDE, args)
    }

    /// The same as another user; root may change its ids.
    pub(crate) fn exec_as(&self, user: u32, args: &[&str]) -> Command {
        let mut command = self.site.command();
        command.args(["exec", "--user", &format!("{user}:{user}")]);
        if user == 0 {
            command.args(CHANGES_IDS.iter().flat_map(|right| ["--cap", right]));
        }
        if self.site.runtime != Runtime::Podman {
            // podman takes it from the container.
            command.arg("--no-new-privs");
        }
        command.arg(&self.name).args(args);
        command
    }

    /// Ends its standard input, for which it waits, and returns what it said once it has ended well.
    pub(crate) fn finish(mut self) -> String {
        drop(self.input.take());
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.process.0.stdout.take().unwrap(), &mut said).unwrap();
        let status = self.process.0.wait().unwrap();
        assert!(status.success(), "{} run: {status}: {said}", self.site.runtime.name());
        said
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Nothing is left to delete after a good end.
        let delete = match self.site.runtime {
            Runtime::Crun | Runtime::Runc => ["delete", "--force"],
            Runtime::Podman => ["rm", "--force"],
        };
        let _ = self.site.command().args(delete).arg(&self.name).stderr(Stdio::null()).output();
    }
}

/// Busybox, virtiofsd and locum, with the libraries of the two.
fn root_file_system(root: &Path) {
    for name in ["proc", "dev", "tmp", "sys", "share", "run"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    components::commands(&root.join("bin"));
    for program in [components::virtiofsd(), PathBuf::from(env!("CARGO_BIN_EXE_locum"))] {
        let libraries = run(Command::new("ldd").arg(&program));
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            let copy = root.join(&library[1..]);
            fs::create_dir_all(copy.parent().unwrap()).unwrap();
            fs::copy(library, copy).unwrap();
        }
        components::copy_program(&program, &root.join("bin"));
    }
}
