//! `locum bench`.

mod again;
pub(crate) mod caller;
mod floor;
mod recovery;

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use locum_policy::Policy;
use serde::Serialize;

use self::caller::Times;
use self::recovery::Loss;
use super::run::{Place, Workload, choose_policy, default_user, mount_of};

/// Latency and throughput against this machine's floor, in the same run.
///
/// The floor is the same caller answered by the fewest system calls that can do it: no policy, no signature, no journal. Each
/// round measures the floor, then locum; a ratio is the median over the rounds.
#[derive(clap::Args)]
#[command(after_help = "Example: sudo locum bench --json")]
pub(crate) struct Args {
    /// Calls of each kind in a round.
    #[arg(long, default_value_t = 5000)]
    calls: usize,
    /// Rounds.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How often the monitor is killed to measure recovery.
    #[arg(long, default_value_t = 25)]
    kills: usize,
    /// The folder whose file system is measured; a private one is made there.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: std::path::PathBuf,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// All of it; microseconds unless a name says otherwise.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    processors: usize,
    native_us: Pair,
    floor_us: Floor,
    delegated_us: Pair,
    /// Delegated over floor: the median of the rounds' ratios.
    ratio: Pair,
    /// The same for open_by_handle_at less what the floor does not do at all: journal, mark, second step.
    ratio_of_open_less_parts: f64,
    percentiles_us: Percentiles,
    /// A true `O_PATH` descriptor, of a symbolic link.
    exact_o_path_us: Exact,
    /// What single parts cost, measured apart in each round.
    parts_us: Parts,
    calls_a_second: Vec<Throughput>,
    recovery_ms: Recovery,
    /// The same when keeper and monitor are killed at once, and the listener comes back from the workload.
    total_loss_ms: Recovery,
    /// The same when the journal is lost too, and the call in the making is asked again.
    total_loss_without_journal_ms: Recovery,
    /// The same without a lifeline, when another listener is put in.
    reattach_ms: Recovery,
    ask_again_us: AskAgain,
}

#[derive(Debug, Serialize)]
struct AskAgain {
    /// Finding out whose a call is.
    caller_found: Spread,
    /// How long that thread is held.
    caller_held: Spread,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    name_to_handle_at: f64,
    open_by_handle_at: f64,
}

#[derive(Debug, Serialize)]
struct Floor {
    round_trip: f64,
    #[serde(flatten)]
    calls: Pair,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    name_to_handle_at: Spread,
    open_by_handle_at: Spread,
}

#[derive(Debug, Serialize)]
struct Exact {
    native: f64,
    #[serde(flatten)]
    delegated: Spread,
}

#[derive(Debug, Serialize)]
struct Spread {
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct Parts {
    journal: f64,
    signature: f64,
    mark: f64,
    /// Of opens that cut the file to nothing alone.
    parked_copy: f64,
    second_step_of_open: f64,
}

#[derive(Debug, Serialize)]
struct Throughput {
    threads: usize,
    #[serde(flatten)]
    calls: Pair,
}

#[derive(Debug, Serialize)]
struct Recovery {
    kills: usize,
    median: f64,
    max: f64,
}

impl Recovery {
    fn of(gaps: &[Duration]) -> Self {
        let ms = |gap: &Duration| gap.as_secs_f64() * 1e3;
        Self {
            kills: gaps.len(),
            median: median(gaps.iter().map(ms)),
            max: gaps.iter().map(ms).fold(0.0, f64::max),
        }
    }
}

/// A place, a workload and a folder for it.
struct Setup {
    place: Place,
    workload: Workload,
    /// The same without a lifeline.
    bare: Workload,
    export: tempfile::TempDir,
    program: std::path::PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "locum bench starts a monitor: wanted user 0; use sudo"
    );
    anyhow::ensure!(args.rounds > 0 && args.calls > 0, "wanted at least one round of one call");
    let setup = Setup::make(&args.dir)?;
    let report = measure(args, &setup)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(ExitCode::SUCCESS)
}

impl Setup {
    fn make(dir: &Path) -> anyhow::Result<Self> {
        let export = tempfile::Builder::new().prefix("locum-bench-").tempdir_in(dir)?;
        std::fs::set_permissions(export.path(), PermissionsExt::from_mode(0o755))?;
        // Most of what a workload names is its own.
        let (uid, gid) = default_user();
        std::os::unix::fs::chown(export.path(), Some(uid), Some(gid))?;
        rustix::fs::symlinkat("nowhere", rustix::fs::CWD, export.path().join(caller::LINK.to_str()?))?;
        // The caller, an ordinary user, may not be able to reach this program where it is.
        let program = export.path().join("locum");
        std::fs::copy("/proc/self/exe", &program)?;
        let place = Place::start()?;
        let exports = vec![mount_of(export.path())?];
        let policy = choose_policy("virtiofsd")?;
        let without = Policy { lifeline: false, ..policy.clone() };
        let workload = Workload::prepare(&place, policy, exports.clone(), default_user())?;
        let bare = Workload::prepare(&place, without, exports, default_user())?;
        Ok(Self { place, workload, bare, export, program })
    }

    fn start_caller(
        &self,
        workload: &Workload,
        calls: usize,
        threads: usize,
        more: &[OsString],
    ) -> anyhow::Result<Child> {
        let calls: [OsString; 4] =
            ["--calls".into(), calls.to_string().into(), "--threads".into(), threads.to_string().into()];
        let mut cmd = vec![
            self.program.clone().into(),
            "bench-caller".into(),
            "--dir".into(),
            self.export.path().into(),
        ];
        cmd.extend(calls);
        cmd.extend_from_slice(more);
        workload.start(&cmd, false, |command: &mut Command| {
            command.stdout(Stdio::piped());
        })
    }

    fn delegated(&self, calls: usize, threads: usize) -> anyhow::Result<Times> {
        let output = self.start_caller(&self.workload, calls, threads, &[])?.wait_with_output()?;
        serde_json::from_slice(&output.stdout).context("the caller under locum failed")
    }

    fn native(&self, calls: usize) -> anyhow::Result<Times> {
        let mut command = Command::new(&self.program);
        command
            .arg("bench-caller")
            .arg("--dir")
            .arg(self.export.path())
            .args(["--calls", &calls.to_string()]);
        let output = command.output()?;
        serde_json::from_slice(&output.stdout).context("the caller without a filter failed")
    }
}

fn measure(args: &Args, setup: &Setup) -> anyhow::Result<Report> {
    let native = setup.native(args.calls)?;
    // Once for nothing, so that neither pays for what is only cold.
    setup.delegated(args.calls.min(500), 1)?;
    let (mut floors, mut served, mut apart) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        floors.push(floor::round(setup.export.path(), setup.place.runtime_dir.path(), args.calls)?);
        served.push(setup.delegated(args.calls, 1)?);
        apart.push(parts(setup, args.calls)?);
    }
    let pair = |times: &[Times]| Pair {
        name_to_handle_at: median(times.iter().map(|times| median_us(&times.name))),
        open_by_handle_at: median(times.iter().map(|times| median_us(&times.open))),
    };
    let ratio = |of: fn(&Times) -> &[u64], less: fn(&Parts) -> f64| {
        let rounds = served.iter().zip(&floors).zip(&apart);
        median(
            rounds
                .map(|((served, floor), apart)| (median_us(of(served)) - less(apart)) / median_us(of(floor))),
        )
    };
    let part = |of: fn(&Parts) -> f64| median(apart.iter().map(of));
    let all = |of: fn(&Times) -> &[u64]| served.iter().flat_map(of).copied().collect::<Vec<_>>();
    let throughput = |threads| {
        let times = setup.delegated(args.calls, threads)?;
        let calls = Pair { name_to_handle_at: times.name_rate, open_by_handle_at: times.open_rate };
        Ok(Throughput { threads, calls })
    };
    let recovery =
        |workload, loss| recovery::measure(setup, workload, args.kills, loss).map(|gaps| Recovery::of(&gaps));
    let again = again::measure(setup.export.path(), setup.place.runtime_dir.path(), args.kills * 10)?;
    let again = |index: usize| {
        spread(again.iter().map(|both| u64::try_from(both[index].as_nanos()).unwrap_or(u64::MAX)).collect())
    };
    Ok(Report {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        processors: std::thread::available_parallelism()?.get(),
        exact_o_path_us: Exact {
            native: median_us(&native.path),
            delegated: spread(all(|times| &times.path)),
        },
        native_us: pair(&[native]),
        floor_us: Floor {
            round_trip: median(floors.iter().map(|times| median_us(&times.round_trip))),
            calls: pair(&floors),
        },
        delegated_us: pair(&served),
        ratio: Pair {
            name_to_handle_at: ratio(|times| &times.name, |_| 0.0),
            open_by_handle_at: ratio(|times| &times.open, |_| 0.0),
        },
        ratio_of_open_less_parts: ratio(
            |times| &times.open,
            |parts| parts.journal + parts.mark + parts.second_step_of_open,
        ),
        percentiles_us: Percentiles {
            name_to_handle_at: spread(all(|times| &times.name)),
            open_by_handle_at: spread(all(|times| &times.open)),
        },
        parts_us: Parts {
            journal: part(|parts| parts.journal),
            signature: part(|parts| parts.signature),
            mark: part(|parts| parts.mark),
            parked_copy: part(|parts| parts.parked_copy),
            second_step_of_open: part(|parts| parts.second_step_of_open),
        },
        calls_a_second: [1, 2, 8].into_iter().map(throughput).collect::<anyhow::Result<_>>()?,
        recovery_ms: recovery(&setup.workload, Loss::Monitor)?,
        total_loss_ms: recovery(&setup.workload, Loss::Both)?,
        total_loss_without_journal_ms: recovery(&setup.workload, Loss::Journal)?,
        reattach_ms: recovery(&setup.bare, Loss::Listener)?,
        ask_again_us: AskAgain { caller_found: again(0), caller_held: again(1) },
    })
}

fn parts(setup: &Setup, calls: usize) -> anyhow::Result<Parts> {
    let folder = tempfile::tempdir_in(setup.export.path())?;
    let calls = u32::try_from(calls)?;
    // In a thread of its own: it gives up rights.
    let measured = std::thread::scope(|scope| {
        scope.spawn(|| locum_monitor::parts::measure(folder.path(), calls)).join()
    });
    let parts = measured
        .map_err(|_| anyhow::anyhow!("measuring the parts panicked"))?
        .map_err(anyhow::Error::from_boxed)?;
    let us = |part: Duration| part.as_secs_f64() * 1e6;
    Ok(Parts {
        journal: us(parts.journal),
        signature: us(parts.signature),
        mark: us(parts.mark),
        parked_copy: us(parts.park),
        second_step_of_open: us(parts.second_step),
    })
}

fn median_us(times: &[u64]) -> f64 {
    median(times.iter().map(|time| *time as f64 / 1e3))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn spread(mut times: Vec<u64>) -> Spread {
    times.sort_unstable();
    let at = |thousandths: usize| {
        let index = (times.len() * thousandths / 1000).min(times.len().saturating_sub(1));
        times.get(index).map_or(f64::NAN, |time| *time as f64 / 1e3)
    };
    Spread { p50: at(500), p90: at(900), p99: at(990), p999: at(999), max: at(1000) }
}

fn print(report: &Report) {
    let pair = |title: &str, pair: &Pair| {
        println!("{title:<34} {:>18.2} {:>18.2}", pair.name_to_handle_at, pair.open_by_handle_at);
    };
    println!("Linux {}, {} processors\n", report.kernel, report.processors);
    println!("{:<34} {:>18} {:>18}", "", "name_to_handle_at", "open_by_handle_at");
    pair("native, us", &report.native_us);
    pair("floor, us", &report.floor_us.calls);
    pair("delegated, us", &report.delegated_us);
    pair("delegated / floor", &report.ratio);
    println!("{:<34} {:>18} {:>18.2}", "the same less its own parts", "", report.ratio_of_open_less_parts);
    for Throughput { threads, calls } in &report.calls_a_second {
        pair(&format!("calls a second, {threads} threads"), calls);
    }
    let (name, open) = (&report.percentiles_us.name_to_handle_at, &report.percentiles_us.open_by_handle_at);
    for (title, name, open) in [
        ("p50, us", name.p50, open.p50),
        ("p99, us", name.p99, open.p99),
        ("p99.9, us", name.p999, open.p999),
    ] {
        println!("{title:<34} {name:>18.2} {open:>18.2}");
    }
    let parts = &report.parts_us;
    let exact = &report.exact_o_path_us;
    println!(
        "\nan exact O_PATH descriptor: {:.2} us, p99 {:.2} us (native {:.2} us)",
        exact.delegated.p50, exact.delegated.p99, exact.native
    );
    println!("an empty round trip: {:.2} us", report.floor_us.round_trip);
    println!(
        "parts of a call: journal {:.2}, signature {:.2}, mark {:.2}, second step of an open {:.2}, parked copy (O_TRUNC) {:.2} us",
        parts.journal, parts.signature, parts.mark, parts.second_step_of_open, parts.parked_copy
    );
    for (title, recovery) in [
        ("of the monitor", &report.recovery_ms),
        ("of everything", &report.total_loss_ms),
        ("of everything, with the journal lost", &report.total_loss_without_journal_ms),
        ("of everything, without a lifeline", &report.reattach_ms),
    ] {
        println!(
            "from SIGKILL {title} to the next answer: median {:.2} ms, longest {:.2} ms of {}",
            recovery.median, recovery.max, recovery.kills
        );
    }
    let AskAgain { caller_found, caller_held } = &report.ask_again_us;
    println!(
        "a call asked again: its caller found in {:.2} us, held for {:.2} us, longest {:.2} us",
        caller_found.p50, caller_held.p50, caller_held.max
    );
}
