//! What single parts of a call cost, apart from the rest: for `locum bench`.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use locum_journal::{Journal, Slot};
use locum_kernel::credentials::{Rights, Worker};
use locum_kernel::handle::{Handle, name_to_handle_at, open_by_handle_at};
use locum_kernel::notify::CallId;
use locum_kernel::process::Ids;
use locum_kernel::table::Mark;
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::key_ring::KeyRing;
use crate::park::Park;
use crate::signature::{Purpose, Signer};

/// What each part adds to one call.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// A slot's life: every note that a hand-over makes in the journal.
    pub journal: Duration,
    /// One HMAC: signing a handle, or verifying it.
    pub signature: Duration,
    /// Marking an open file and taking the mark off again.
    pub mark: Duration,
    /// Parking an open file and taking it out again: if it is cut to nothing as it is opened.
    pub park: Duration,
    /// Opening a handle in two steps, with the changes of rights, less opening it in one.
    pub second_step: Duration,
}

/// Measures with `calls` repetitions each, in `folder`, a private one on a file system with handles. Changes the rights of
/// the calling thread for good: to be called in a thread of its own, as root.
pub fn measure(folder: &Path, calls: u32) -> Result<Parts, Box<dyn std::error::Error + Send + Sync>> {
    let each = |work: &mut dyn FnMut() -> Result<(), rustix::io::Errno>| {
        let start = Instant::now();
        for _ in 0..calls {
            work()?;
        }
        Ok::<_, rustix::io::Errno>(start.elapsed() / calls.max(1))
    };
    let journal = Journal::open(&folder.join("parts"))?;
    let slot = Slot::take(&journal, |_| false).ok_or("a new journal has no free slot")?;
    let ring = Arc::new(KeyRing::open(&folder.join("parts-keys"))?);
    let signer = Signer::new(&ring, ring.current().newest(), "scope", "/share");
    let handle = Handle::new(1, &[7; 8]).ok_or("eight bytes are no handle")?;
    let park = Park::new()?;
    let mount = rustix::fs::open(folder, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let real = name_to_handle_at(mount.as_fd(), c"", AtFlags::EMPTY_PATH)?.handle;
    let own = rustix::fs::open(c"/proc/self/fd", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let ids = Ids { user: 0, group: 0, groups: Vec::new() };
    let mut worker = Worker::start()?;

    let one_step = each(&mut || {
        drop(open_by_handle_at(mount.as_fd(), &real, OFlags::CLOEXEC.bits().cast_signed())?);
        Ok(())
    })?;
    let two_steps = each(&mut || {
        worker.have(Rights::Decode)?;
        let path_only = (OFlags::PATH | OFlags::CLOEXEC).bits().cast_signed();
        let found = open_by_handle_at(mount.as_fd(), &real, path_only)?;
        rustix::fs::fstat(&found)?;
        worker.act_as(&ids)?;
        let name = std::os::fd::AsRawFd::as_raw_fd(&found).to_string();
        drop(rustix::fs::openat(&own, name, OFlags::CLOEXEC, Mode::empty())?);
        worker.have(Rights::Full)
    })?;
    Ok(Parts {
        journal: each(&mut || {
            slot.begin(1);
            slot.performing(1, 1);
            slot.installed(3);
            slot.sending();
            slot.settle();
            Ok(())
        })?,
        signature: each(&mut || {
            std::hint::black_box(signer.sign(std::hint::black_box(&handle), Purpose::Open));
            Ok(())
        })?,
        mark: each(&mut || {
            Mark::new(1).put(mount.as_fd())?;
            Mark::remove(mount.as_fd())
        })?,
        park: each(&mut || {
            park.put(CallId(1), mount.as_fd())?;
            park.take();
            Ok(())
        })?,
        second_step: two_steps.saturating_sub(one_step),
    })
}
