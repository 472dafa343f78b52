//! Death on demand, so that tests see what each step of a hand-over leaves behind. Does nothing in release builds.

/// Ends this process by SIGKILL if `LOCUM_DIE_AT` is `step`, the first `LOCUM_DIE_AFTER` times excepted.
pub fn die_at(step: u32) {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU32, Ordering};
        fn number(name: &str) -> Option<u32> {
            std::env::var(name).ok()?.parse().ok()
        }
        static WHERE: LazyLock<Option<u32>> = LazyLock::new(|| number("LOCUM_DIE_AT"));
        static AFTER: LazyLock<u32> = LazyLock::new(|| number("LOCUM_DIE_AFTER").unwrap_or(0));
        static REACHED: AtomicU32 = AtomicU32::new(0);
        if *WHERE == Some(step) && REACHED.fetch_add(1, Ordering::Relaxed) == *AFTER {
            // It cannot fail, and does not return.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        }
    }
    let _ = step;
}
