//! `locum bench-caller`: the workload that is measured, and that measures.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::time::Instant;

use anyhow::Context as _;
use locum_kernel::handle::{Handle, name_to_handle_at, open_by_handle_at};
use rustix::fs::{AtFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};

/// A symbolic link in the folder.
pub(crate) const LINK: &std::ffi::CStr = c"link";

/// For `locum bench`: makes calls and says how long they took.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The folder that is named and opened.
    #[arg(long)]
    pub(crate) dir: PathBuf,
    /// Calls of each kind in each thread.
    #[arg(long)]
    pub(crate) calls: usize,
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: usize,
    /// Where to hand the listener of a filter of its own; without it, calls go wherever they go.
    #[arg(long)]
    pub(crate) floor: Option<PathBuf>,
    /// Calls for ever, each one's end noted in this file.
    #[arg(long)]
    pub(crate) pulse: Option<PathBuf>,
}

/// How long calls took, in nanoseconds for each.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Times {
    /// sync(2), which a floor answers at once; empty without a floor.
    pub(crate) round_trip: Vec<u64>,
    pub(crate) name: Vec<u64>,
    pub(crate) open: Vec<u64>,
    /// open_by_handle_at(2) of a symbolic link, `O_PATH`; empty with a floor, which cannot hand one over.
    pub(crate) path: Vec<u64>,
    /// Calls a second of all threads together.
    pub(crate) name_rate: f64,
    pub(crate) open_rate: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(path) = &args.floor {
        let sock = UnixStream::connect(path)?;
        super::floor::hand_over(&sock)?;
    }
    if let Some(path) = &args.pulse {
        super::recovery::beat(&args.dir, path)?;
    }
    let times = measure(args)?;
    serde_json::to_writer(std::io::stdout(), &times)?;
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &Args) -> anyhow::Result<Times> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&args.dir, flags, Mode::empty())
        .with_context(|| format!("cannot open {}", args.dir.display()))?;
    let handle =
        name_to_handle_at(dir.as_fd(), c"", AtFlags::EMPTY_PATH).context("name_to_handle_at")?.handle;
    drop(open_by_handle_at(dir.as_fd(), &handle, 0).context("open_by_handle_at")?);
    let mut times = Times::default();
    if args.floor.is_some() {
        times.round_trip = timed(args.calls, || {
            rustix::fs::sync();
            Ok(())
        })?;
    }
    let name =
        || name_to_handle_at(dir.as_fd(), c"", AtFlags::EMPTY_PATH).map(drop).context("name_to_handle_at");
    let open = || open(&dir, &handle);
    if args.floor.is_none() {
        let link =
            name_to_handle_at(dir.as_fd(), LINK, AtFlags::empty()).context("name_to_handle_at")?.handle;
        let path = OFlags::PATH.bits().cast_signed();
        times.path = timed(args.calls, || {
            open_by_handle_at(dir.as_fd(), &link, path).map(drop).context("open_by_handle_at with O_PATH")
        })?;
    }
    (times.name, times.name_rate) = by_threads(args, &name)?;
    (times.open, times.open_rate) = by_threads(args, &open)?;
    Ok(times)
}

fn open(dir: &std::os::fd::OwnedFd, handle: &Handle) -> anyhow::Result<()> {
    open_by_handle_at(dir.as_fd(), handle, 0).map(drop).context("open_by_handle_at")
}

fn by_threads(
    args: &Args,
    work: &(dyn Fn() -> anyhow::Result<()> + Sync),
) -> anyhow::Result<(Vec<u64>, f64)> {
    let ready = Barrier::new(args.threads);
    let start = Instant::now();
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads)
            .map(|_| {
                scope.spawn(|| {
                    ready.wait();
                    timed(args.calls, work)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
            .collect::<anyhow::Result<Vec<_>>>()
    })?;
    let all = all.concat();
    let rate = all.len() as f64 / start.elapsed().as_secs_f64();
    Ok((all, rate))
}

fn timed(calls: usize, work: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<Vec<u64>> {
    (0..calls)
        .map(|_| {
            let start = Instant::now();
            work()?;
            Ok(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX))
        })
        .collect()
}
