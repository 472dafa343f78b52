//! Death on demand, so that tests see what each step of a hand-over leaves behind. Does nothing in release builds.

/// Ends this process by SIGKILL if `LOCUM_DIE_AT` is `step`, the first `LOCUM_DIE_AFTER` times excepted; or stops it by SIGSTOP, if
/// it is `LOCUM_STOP_AT` that is.
pub fn die_at(step: u32) {
    #[cfg(debug_assertions)]
    {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU32, Ordering};
        fn number(name: &str) -> Option<u32> {
            std::env::var(name).ok()?.parse().ok()
        }
        static WHERE: LazyLock<Option<(u32, libc::c_int)>> = LazyLock::new(|| {
            let die = number("LOCUM_DIE_AT").map(|step| (step, libc::SIGKILL));
            die.or_else(|| number("LOCUM_STOP_AT").map(|step| (step, libc::SIGSTOP)))
        });
        static AFTER: LazyLock<u32> = LazyLock::new(|| number("LOCUM_DIE_AFTER").unwrap_or(0));
        static REACHED: AtomicU32 = AtomicU32::new(0);
        if let Some((at, signal)) = *WHERE
            && at == step
            && REACHED.fetch_add(1, Ordering::Relaxed) == *AFTER
        {
            // SAFETY: raise takes a number alone. This thread gets it, and goes not one instruction further.
            unsafe { libc::raise(signal) };
        }
    }
    let _ = step;
}
