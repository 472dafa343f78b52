//! Faults on demand, so that tests see what one does. Not in release builds.

/// Crashes, panics or stalls if a call's path asks for it.
pub(crate) fn inject(path: &std::ffi::CStr) {
    match path.to_bytes() {
        b"locum-fault-panic" => panic!("asked to"),
        b"locum-fault-crash" => std::process::abort(),
        b"locum-fault-stall" => {
            // A signal, as the watch sends it, ends this as it would end a system call.
            let _ = rustix::thread::nanosleep(&rustix::time::Timespec { tv_sec: 3600, tv_nsec: 0 });
        }
        _ => {}
    }
}
