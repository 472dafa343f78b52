//! Checked traffic: what a workload does in `locum demo` and in the tests.
//!
//! Threads name files of known content by handle and open them again, without pause, and look at everything that comes
//! back. Whatever the kernel would not have returned counts as wrong (a result) or failed (an error).

mod counters;
mod files;
mod lane;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use locum_kernel::signal::{self, Restart};

use counters::Counters;
pub(crate) use counters::Report;
use files::Files;

/// Calls name_to_handle_at and open_by_handle_at from several threads and checks every result.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where the files are, or are to be made.
    #[arg(long)]
    dir: PathBuf,
    #[arg(long, default_value_t = 8)]
    threads: usize,
    /// How long.
    #[arg(long, required_unless_present = "calls", conflicts_with = "calls")]
    seconds: Option<f64>,
    /// How many calls.
    #[arg(long)]
    calls: Option<u64>,
    /// Sends the threads so many signals a second, all of them together.
    #[arg(long)]
    signals: Option<f64>,
    /// Nothing is delegated: handles are the kernel's own, and forged ones are not tried.
    #[arg(long)]
    native: bool,
    /// Also cuts empty files to nothing (O_TRUNC), which cannot be repeated: EINTR, then, is no failure, and counted apart.
    #[arg(long)]
    truncate: bool,
    /// Where the random choices begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A JSON object a line, one every `tell_ms`; the last has `"done":true`.
    #[arg(long)]
    json: bool,
    /// In milliseconds.
    #[arg(long, default_value_t = 100)]
    tell_ms: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let files = Files::prepare(&args.dir).with_context(|| format!("preparing {}", args.dir.display()))?;
    if args.signals.is_some() {
        signal::handle(Restart::Yes)?;
    }
    let before = files::own_descriptors()?;
    let counters = Counters::new(args.threads, args.calls, &before);
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let (end, ended) = mpsc::channel();
        for index in 0..args.threads {
            let (files, counters, end) = (&files, &counters, end.clone());
            let seed = args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64 + 1);
            std::thread::Builder::new().spawn_scoped(scope, move || {
                lane::Lane::new(files, counters, index, seed, args).run();
                drop(end);
            })?;
        }
        drop(end);
        if let Some(rate) = args.signals {
            let counters = &counters;
            std::thread::Builder::new().spawn_scoped(scope, move || send_signals(counters, rate))?;
        }
        watch(args, &counters, &ended);
        Ok(())
    })?;
    let leaked = files::own_descriptors()?.difference(&before).count();
    let report = Report { leaked: leaked as u64, done: true, ..counters.report() };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "{} calls, {} wrong, {} failed, {} descriptors leaked, longest {} us",
            report.calls, report.wrong, report.failed, report.leaked, report.longest_us
        );
    }
    Ok(ExitCode::from(u8::from(!report.is_clean())))
}

/// Tells how it goes until all threads have ended, and ends them in time.
fn watch(args: &Args, counters: &Counters, ended: &mpsc::Receiver<()>) {
    let start = Instant::now();
    while ended.recv_timeout(Duration::from_millis(args.tell_ms)) == Err(RecvTimeoutError::Timeout) {
        if args.seconds.is_some_and(|seconds| start.elapsed().as_secs_f64() >= seconds) {
            counters.end.store(true, Ordering::Relaxed);
        }
        if args.json {
            // Whoever listened may have gone; that is no reason to stop.
            if let Ok(line) = serde_json::to_string(&counters.report()) {
                use std::io::Write as _;
                let _ = writeln!(std::io::stdout(), "{line}");
            }
        }
    }
    counters.end.store(true, Ordering::Relaxed);
}

fn send_signals(counters: &Counters, rate: f64) {
    let pause = Duration::from_secs_f64(1.0 / rate.max(1.0));
    let mut next = Instant::now();
    for lane in counters.lanes.iter().cycle() {
        if counters.end.load(Ordering::Relaxed) {
            break;
        }
        let tid = lane.tid.load(Ordering::Relaxed);
        if tid != 0 && signal::interrupt(tid).is_ok() {
            counters.signals.fetch_add(1, Ordering::Relaxed);
        }
        next += pause;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
