//! What depends on the processor. A port is a second version of this file.

/// The `AUDIT_ARCH_*` value that seccomp reports for native 64-bit calls (`linux/audit.h`).
pub const AUDIT_ARCH: u32 = 0xc000_003e;

/// The calls that locum knows, by name and number.
pub const CALLS: &[(&str, i32)] = &[("name_to_handle_at", 303), ("open_by_handle_at", 304)];

/// sync(2): a call without arguments, for measuring a round trip that does nothing.
pub const SYNC: i32 = 162;
