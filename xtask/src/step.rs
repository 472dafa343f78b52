//! A step: a command whose noise goes to a log, and one line that says how it went.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

/// The checkout.
pub(crate) fn root() -> &'static Path {
    // xtask is a folder of the workspace.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// What the tests are given: real components and logs. `LOCUM_REAL` in the tests.
pub(crate) fn real() -> PathBuf {
    root().join("target/real")
}

/// A command in the checkout.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// Where the noise of the step `name` goes.
pub(crate) fn log(name: &str) -> Result<PathBuf> {
    let folder = real().join("log");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder.join(name.replace(' ', "-")))
}

/// Does `work` and says in one line what it was, how it went and how long it took.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("{name:<24} ");
    std::io::stdout().flush()?;
    let start = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("{verdict:<6} {:7.1} s", start.elapsed().as_secs_f64());
    result
}

/// A step that is one command, which must succeed.
pub(crate) fn run(name: &str, command: &mut Command) -> Result<()> {
    step(name, || quietly(&log(name)?, command))
}

/// Runs `command` with all that it says in `log`.
pub(crate) fn quietly(log: &Path, command: &mut Command) -> Result<()> {
    let file = File::create(log).with_context(|| format!("create {}", log.display()))?;
    command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file);
    let status = command.status().with_context(|| format!("start {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{}: {status}; {} ends with:\n{}", command.get_program().display(), log.display(), tail(log));
    }
    Ok(())
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
