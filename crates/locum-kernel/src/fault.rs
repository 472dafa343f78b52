//! Death on demand, so that tests see what each step of a hand-over leaves behind. Does nothing in release builds.

/// Ends this process by SIGKILL if `LOCUM_DIE_AT` is `step`, after some calls that were spared.
pub fn die_at(step: u32) {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU32, Ordering};
        static WHERE: LazyLock<Option<u32>> =
            LazyLock::new(|| std::env::var("LOCUM_DIE_AT").ok()?.parse().ok());
        static REACHED: AtomicU32 = AtomicU32::new(0);
        if *WHERE == Some(step) && REACHED.fetch_add(1, Ordering::Relaxed) == std::process::id() % 5 {
            // It cannot fail, and does not return.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
    let _ = step;
}
