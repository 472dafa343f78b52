//! What a guest would wait: the same virtiofsd privileged with native handles, and in a container under locum, in one
//! run, by turns. `cargo xtask bench-virtiofs` sets it up.

#![forbid(unsafe_code)]
#![allow(dead_code, unused_imports, reason = "the tests' helpers, of which this uses a part")]

mod client;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/real/components.rs"]
mod components;
#[path = "../../tests/real/container.rs"]
mod container;
#[path = "../../tests/real/service.rs"]
mod service;

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result};

use client::{Client, Opcode, words};
use common::{Process, until};
use container::{Runtime, Site};
use service::Service;

/// In whose name the requests come; it owns both shares.
const USER: u32 = 1000;

/// By turns, so many rounds of so many of each operation.
const ROUNDS: usize = 20;
const EACH: usize = 200;

const OPERATIONS: [&str; 4] = ["MKNOD", "LOOKUP", "OPEN+RELEASE", "UNLINK"];

/// All that each operation took, in microseconds.
type Times = [Vec<f64>; 4];

fn main() -> Result<()> {
    let native = components::folder();
    let at = |name| native.path().join(name);
    std::fs::create_dir(at("share"))?;
    std::os::unix::fs::chown(at("share"), Some(USER), Some(USER))?;
    let mut virtiofsd = Command::new(components::virtiofsd());
    virtiofsd.args(["--sandbox=none", "--inode-file-handles=mandatory", "--modcaps=+dac_read_search"]);
    virtiofsd.arg("--shared-dir").arg(at("share")).arg("--socket-path").arg(at("socket"));
    let _virtiofsd = Process(virtiofsd.stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
    until("virtiofsd's socket", || at("socket").exists());
    let mut native = Client::connect(&at("socket")).context("the privileged virtiofsd")?;

    let service = Service::new(Runtime::Crun);
    let _serve = service.serve();
    let site = Site::new(Runtime::Crun, &service.seccomp());
    let container = site.start(
        "exec virtiofsd --sandbox=none --inode-file-handles=prefer --shared-dir /share --socket-path /run/socket \
         2>/run/said </dev/null",
    );
    until("virtiofsd's socket in the container", || site.at("run/socket").exists());
    let mut delegated = Client::connect(&site.at("run/socket")).context("the virtiofsd in the container")?;

    let (mut natively, mut with_locum) = (Times::default(), Times::default());
    // One round to warm up.
    round(&mut native, &mut Times::default())?;
    round(&mut delegated, &mut Times::default())?;
    for _ in 0..ROUNDS {
        round(&mut native, &mut natively)?;
        round(&mut delegated, &mut with_locum)?;
    }
    let counted = service.counted();
    drop(delegated);
    container.finish();

    println!("{:<14} {:>12} {:>12} {:>7}", "median, us", "privileged", "with locum", "ratio");
    for (operation, (native, delegated)) in OPERATIONS.iter().zip(natively.iter_mut().zip(&mut with_locum)) {
        let (native, delegated) = (median(native), median(delegated));
        println!("{operation:<14} {native:>12.1} {delegated:>12.1} {:>7.2}", delegated / native);
    }
    println!(
        "{ROUNDS} rounds by turns, {EACH} of each operation a round; {} calls made by locum",
        counted.calls
    );
    Ok(())
}

/// Makes files, looks them up, opens and removes them.
fn round(client: &mut Client, times: &mut Times) -> Result<()> {
    const ROOT: u64 = 1;
    let names: Vec<Vec<u8>> = (0..EACH).map(|index| format!("file{index}\0").into_bytes()).collect();
    let mut nodes = Vec::new();
    for name in &names {
        let mknod = [words(&[0o100_644, 0, 0, 0]), name.clone()].concat();
        let entry = timed(&mut times[0], || client.ask(Opcode::Mknod, ROOT, &mknod, 128)).context("MKNOD")?;
        nodes.push(first(&entry)?);
    }
    for name in &names {
        timed(&mut times[1], || client.ask(Opcode::Lookup, ROOT, name, 128)).context("LOOKUP")?;
    }
    for node in &nodes {
        timed(&mut times[2], || {
            let opened = client.ask(Opcode::Open, *node, &words(&[2, 0]), 16).context("OPEN")?;
            let release = [first(&opened)?.to_le_bytes().to_vec(), vec![0; 16]].concat();
            client.ask(Opcode::Release, *node, &release, 16).context("RELEASE")
        })?;
    }
    for name in &names {
        timed(&mut times[3], || client.ask(Opcode::Unlink, ROOT, name, 16)).context("UNLINK")?;
    }
    for node in nodes {
        // MKNOD and LOOKUP each count as one.
        client.ask(Opcode::Forget, node, &2_u64.to_le_bytes(), 0).context("FORGET")?;
    }
    Ok(())
}

fn timed<T>(times: &mut Vec<f64>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work();
    times.push(start.elapsed().as_secs_f64() * 1e6);
    result
}

/// The node, or the file, that an answer begins with.
fn first(answer: &[u8]) -> Result<u64> {
    let first = answer.first_chunk().context("an answer that is too short")?;
    Ok(u64::from_le_bytes(*first))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
