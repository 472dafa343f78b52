//! What depends on the processor. A port is a second version of this file.

use std::arch::x86_64::__cpuid_count;
use std::mem::offset_of;
use std::sync::OnceLock;

use crate::notify::Notification;
use crate::stack::Room;

/// The `AUDIT_ARCH_*` value that seccomp reports for native 64-bit calls (`linux/audit.h`).
pub const AUDIT_ARCH: u32 = 0xc000_003e;

/// The calls that locum knows, by name and number.
pub const CALLS: &[(&str, i32)] = &[("name_to_handle_at", 303), ("open_by_handle_at", 304)];

/// sync(2): a call without arguments, for measuring a round trip that does nothing.
pub const SYNC: i32 = 162;

/// `NT_X86_XSTATE` (`linux/elf.h`): the register set of the floating point and vector unit.
pub(crate) const NT_EXTENDED_STATE: libc::c_int = 0x202;

/// The code segment of 64-bit programs, and the data segment (`asm/segment.h`).
const CODE_64: u64 = 0x33;
const DATA: u64 = 0x2b;
/// Bytes below the stack pointer that belong to the program (System V ABI).
const RED_ZONE: u64 = 128;
/// `ERESTARTSYS` and `ERESTARTNOINTR` (`linux/errno.h`): the call is to be made anew.
const MADE_ANEW: [i64; 2] = [-512, -513];
/// `ERESTART_RESTARTBLOCK`.
const RESTART_BLOCK: i64 = -516;

/// The general registers of a thread.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Registers(libc::user_regs_struct);

impl Registers {
    /// Whether the thread stands at the end of `call`, which the kernel is about to make anew.
    pub fn are_at_the_end_of(&self, call: &Notification) -> bool {
        let own = &self.0;
        own.cs == CODE_64
            && own.orig_rax == u64::from(call.nr.cast_unsigned())
            && MADE_ANEW.contains(&own.rax.cast_signed())
            && own.rip == call.instruction_pointer
            && [own.rdi, own.rsi, own.rdx, own.r10, own.r8, own.r9] == call.args
    }

    /// Whether they are a 64-bit program's.
    pub(crate) fn are_wide(&self) -> bool {
        self.0.cs == CODE_64
    }

    /// Where the stack points.
    pub(crate) fn stack_pointer(&self) -> u64 {
        self.0.rsp
    }

    /// Below this address nothing on the stack is the program's. `None`: it points to no stack.
    pub(crate) fn free_below(&self) -> Option<u64> {
        self.0.rsp.checked_sub(RED_ZONE)
    }

    /// What the thread's own variables are found by.
    pub(crate) fn thread_pointer(&self) -> u64 {
        self.0.fs_base
    }

    /// The call that the thread is in or has just made, and its result.
    pub(crate) fn call(&self) -> (i64, i64) {
        (self.0.orig_rax.cast_signed(), self.0.rax.cast_signed())
    }

    /// Whether the thread is about to make, or has just made, the call of that number with these arguments.
    pub(crate) fn are_about(&self, (nr, args): (libc::c_long, [u64; 3])) -> bool {
        self.call().0 == nr && [self.0.rdi, self.0.rsi, self.0.rdx] == args
    }

    /// Whether the kernel is about to go on with a call that it remembers, such as nanosleep(2): rt_sigreturn(2) makes it forget,
    /// and the call fails with EINTR.
    pub(crate) fn are_in_remembered_call(&self) -> bool {
        self.call().0 >= 0 && self.call().1 == RESTART_BLOCK
    }

    /// What they are once the kernel has seen to a call that is to be made anew.
    fn resumed(&self) -> Self {
        let own = self.0;
        let again = |rax| Self(libc::user_regs_struct { rip: own.rip - 2, rax, ..own });
        match self.call() {
            (0.., -514..=-512) => again(own.orig_rax),
            (0.., RESTART_BLOCK) => again(libc::SYS_restart_syscall.cast_unsigned()),
            _ => *self,
        }
    }

    /// The same, with the call over and `result` its result.
    #[must_use]
    pub fn with_result(&self, result: i64) -> Self {
        Self(libc::user_regs_struct { rax: result.cast_unsigned(), orig_rax: u64::MAX, ..self.0 })
    }
}

/// Two pieces of code that every program has which was linked with a libc, whichever it is: their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gadgets {
    /// `syscall; ret`.
    pub call: u64,
    /// What a signal handler returns to: rt_sigreturn(2).
    pub sigreturn: u64,
}

impl Gadgets {
    /// The code of [`Self::call`].
    pub const CALL: &[u8] = b"\x0f\x05\xc3";
    /// The code of [`Self::sigreturn`], as glibc has it and as musl has it: `mov $15, %rax` or `%eax`, then `syscall`.
    pub const SIGRETURN: [&[u8]; 2] = [b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05"];
}

/// What a thread is to do in place of its call, by itself, once its registers are [`Self::registers`]: receive the descriptor
/// that waits in a socket of its own, close the socket, and return from the call with the descriptor's number, everything else
/// as it was. If nothing can be received, the call fails with EMFILE.
///
/// It is a chain of signal frames below the red zone. Each return from one runs a system call with all signals blocked:
///
/// 1. recvmsg(2): the control message lands on the last frame, its header on rbx and rdx, the descriptor on the lower half of
///    rax, which held -EMFILE. Its `msghdr` lies in frame 3, so that the length of what came, 24 or 0, is that frame's rdx.
/// 2. recvmsg(2) of the second message, [`Self::mend`]: it puts rbx and rdx right, and the rax of frame 3, which got the flags.
/// 3. read(2) of as many bytes as step 1 said: if a descriptor came, the third message, four zeros, is the upper half of rax.
/// 4. close(2) of the socket.
/// 5. rt_sigreturn(2) to where the thread was, with its own registers, vector unit and signal mask.
#[derive(Debug)]
pub struct Chain {
    /// What to write where.
    pub memory: [(u64, Vec<u8>); 2],
    /// From where the thread is to go on.
    pub registers: Registers,
    /// The second message in the socket.
    pub mend: [u8; 24],
}

/// The third message in the socket.
pub const UPPER_HALF: [u8; 4] = [0; 4];
/// What the first message must begin with: if step 1 is refused, it is what step 3 reads, and the call fails.
pub const FIRST: [u8; 4] = [0xff; 4];

/// The state of a stopped thread.
#[derive(Debug)]
pub struct State<'a> {
    /// Its general registers.
    pub registers: &'a Registers,
    /// The signals that it blocks.
    pub signal_mask: u64,
    /// Its vector unit.
    pub extended: &'a [u8],
}

impl Chain {
    /// For a thread that was found stopped in `state`, in `room`. `None`: that is too little, or the kernel lays out the vector unit
    /// in a way that is not known here.
    pub fn take_in(
        state: &State<'_>,
        room: Room,
        gadgets: Gadgets,
        socket: i32,
        close_on_exec: bool,
    ) -> Option<Self> {
        let extended = frame_of(state.extended)?;
        let own = state.registers.0;
        let (base, top) = room.hold(size_of::<Image>(), extended.len())?;
        let at = |offset: usize| base + offset as u64;
        let frame = |index: usize| at(offset_of!(Image, frames) + index * size_of::<Frame>());
        let socket = u64::from(socket.cast_unsigned());
        let flags = libc::MSG_DONTWAIT | if close_on_exec { libc::MSG_CMSG_CLOEXEC } else { 0 };
        let (landing, upper_half) =
            (frame(4) + offset_of!(Frame, rbx) as u64, frame(4) + offset_of!(Frame, rax) as u64 + 4);
        let call = |nr, args, next| Frame::call(gadgets, nr, args, next);
        let receive = |header: u64, flags: libc::c_int, next: u64| {
            call(libc::SYS_recvmsg, [socket, header, u64::from(flags.cast_unsigned())], next)
        };
        let image = Image {
            frames: [
                receive(frame(2) + offset_of!(Frame, r15) as u64, flags, frame(1)),
                receive(at(offset_of!(Image, mend)), libc::MSG_DONTWAIT, frame(2)),
                // As a `msghdr` from r15 on: no name; of the socket's number bytes; an unused vector, of 0 elements; the
                // control message, of 24 bytes at most; the flags.
                Frame { rbp: 0, rbx: landing, ..call(libc::SYS_read, [socket, upper_half, 24], frame(3)) },
                call(libc::SYS_close, [socket, 0, 0], frame(4)),
                Frame {
                    rax: i64::from(-libc::EMFILE).cast_unsigned(),
                    ..Frame::back(gadgets, state, own, top)
                },
            ],
            mend: MessageHeader {
                vector: at(offset_of!(Image, vector)),
                vector_len: 2,
                ..MessageHeader::default()
            },
            vector: [landing, 16, frame(2) + offset_of!(Frame, rax) as u64, 8],
        };
        let mut mend = [0; 24];
        for (piece, word) in mend.chunks_mut(8).zip([own.rbx, own.rdx, libc::SYS_read.cast_unsigned()]) {
            piece.copy_from_slice(&word.to_ne_bytes());
        }
        Some(Self {
            memory: [(base, image.words()), (top, extended)],
            registers: head(own, gadgets, frame(0)),
            mend,
        })
    }
}

/// What a thread is to do, by itself, to put a filter of its own in force for all its threads, and then go on where it was.
#[derive(Debug)]
pub struct Installation {
    /// What to write where.
    pub memory: [(u64, Vec<u8>); 2],
    /// From where the thread is to go on.
    pub registers: Registers,
    /// Where the number of the descriptor is to be written that it closes last; as it is, none.
    pub close: u64,
    /// The calls that it is to make even if the thread's own filters refuse them, and their arguments.
    pub past_filters: [(libc::c_long, [u64; 3]); 2],
}

impl Installation {
    /// Of the filter `program`, with these flags of seccomp(2), `no_new_privs` set before if asked for. `None`: as of
    /// [`Chain::take_in`].
    pub fn of(
        state: &State<'_>,
        room: Room,
        gadgets: Gadgets,
        program: &[libc::sock_filter],
        flags: libc::c_ulong,
        no_new_privs: bool,
    ) -> Option<Self> {
        const PROLOGUE: usize = 2;
        let extended = frame_of(state.extended)?;
        let own = state.registers.resumed().0;
        let length = 4 * size_of::<Frame>() + PROLOGUE * 8 + program.len() * 8;
        let (base, top) = room.hold(length, extended.len())?;
        let frame = |index: usize| base + (index * size_of::<Frame>()) as u64;
        let set = [libc::PR_SET_NO_NEW_PRIVS, 1, 0].map(|word| u64::from(word.cast_unsigned()));
        // Without the wish, it asks what the flag is: a call that changes nothing.
        let ask = [u64::from(libc::PR_GET_NO_NEW_PRIVS.cast_unsigned()), 0, 0];
        let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        let past_filters = [
            (libc::SYS_prctl, if no_new_privs { set } else { ask }),
            (libc::SYS_seccomp, [mode, flags, frame(4)]),
        ];
        let [privileges, filter] = past_filters;
        let frames = [
            Frame::call(gadgets, privileges.0, privileges.1, frame(1)),
            Frame::call(gadgets, filter.0, filter.1, frame(2)),
            Frame::call(gadgets, libc::SYS_close, [u64::MAX, 0, 0], frame(3)),
            Frame::back(gadgets, state, own, top),
        ];
        let mut image: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        // `struct sock_fprog`, and the instructions behind it.
        image.extend_from_slice(&(program.len() as u64).to_ne_bytes());
        image.extend_from_slice(&(frame(4) + 8 * PROLOGUE as u64).to_ne_bytes());
        for step in program {
            image.extend_from_slice(&step.code.to_ne_bytes());
            image.extend_from_slice(&[step.jt, step.jf]);
            image.extend_from_slice(&step.k.to_ne_bytes());
        }
        let close = frame(2) + offset_of!(Frame, rdi) as u64;
        Some(Self {
            memory: [(base, image), (top, extended)],
            registers: head(state.registers.0, gadgets, frame(0)),
            close,
            past_filters,
        })
    }
}

impl Room {
    /// Where `image` bytes, and behind them `extended` bytes of a vector unit's state, lie at its far end, each where a signal
    /// frame wants it.
    fn hold(self, image: usize, extended: usize) -> Option<(u64, u64)> {
        let top = self.to.checked_sub(extended as u64)? & !63;
        let base = top.checked_sub(image as u64)? & !63;
        (base >= self.from).then_some((base, top))
    }
}

/// The registers of a thread that is to return from the signal frame at `frame`: rt_sigreturn(2) looks for it 8 bytes below the
/// stack pointer, since a handler's return has taken the address there.
fn head(own: libc::user_regs_struct, gadgets: Gadgets, frame: u64) -> Registers {
    Registers(libc::user_regs_struct { orig_rax: u64::MAX, rip: gadgets.sigreturn, rsp: frame + 8, ..own })
}

impl Frame {
    /// The call `nr`, made with all signals blocked, and after it the frame at `next`.
    fn call(gadgets: Gadgets, nr: libc::c_long, args: [u64; 3], next: u64) -> Self {
        Self {
            sigreturn: gadgets.sigreturn,
            flags: KEEP_STACK_SEGMENT,
            stack_flags: NO_STACK,
            rax: nr.cast_unsigned(),
            rdi: args[0],
            rsi: args[1],
            rdx: args[2],
            rip: gadgets.call,
            rsp: next,
            eflags: PLAIN_FLAGS,
            segments: CODE_64 | DATA << 48,
            mask: u64::MAX,
            ..Self::default()
        }
    }

    /// Back to `own`, with the vector unit as it lies at `extended`.
    fn back(gadgets: Gadgets, state: &State<'_>, own: libc::user_regs_struct, extended: u64) -> Self {
        Self {
            sigreturn: gadgets.sigreturn,
            flags: KEEP_STACK_SEGMENT | HAS_EXTENDED_STATE,
            stack_flags: NO_STACK,
            r8: own.r8,
            r9: own.r9,
            r10: own.r10,
            r11: own.r11,
            r12: own.r12,
            r13: own.r13,
            r14: own.r14,
            r15: own.r15,
            rdi: own.rdi,
            rsi: own.rsi,
            rbp: own.rbp,
            rbx: own.rbx,
            rdx: own.rdx,
            rax: own.rax,
            rcx: own.rcx,
            rsp: own.rsp,
            rip: own.rip,
            eflags: own.eflags,
            segments: CODE_64 | DATA << 48,
            extended,
            mask: state.signal_mask,
            ..Self::default()
        }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: a frame is made of 64-bit words alone, without gaps, so all its bytes are initialised.
        let words: [u64; size_of::<Self>() / 8] = unsafe { std::mem::transmute(*self) };
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// `UC_FP_XSTATE`, and `UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS` (`asm/ucontext.h`).
const HAS_EXTENDED_STATE: u64 = 1;
const KEEP_STACK_SEGMENT: u64 = 2 | 4;
/// No flag that sigaltstack(2) knows: rt_sigreturn leaves the alternate stack alone.
const NO_STACK: u64 = 7;
/// Interrupts on, and the bit that is always on.
const PLAIN_FLAGS: u64 = 0x202;

/// `struct rt_sigframe` without its `siginfo`, which rt_sigreturn does not read (`asm/sigframe.h`).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Frame {
    sigreturn: u64,
    flags: u64,
    link: u64,
    stack: u64,
    stack_flags: u64,
    stack_size: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rax: u64,
    rcx: u64,
    rsp: u64,
    rip: u64,
    eflags: u64,
    /// cs, gs, fs and ss, 16 bits each.
    segments: u64,
    error: u64,
    trap: u64,
    old_mask: u64,
    fault_address: u64,
    extended: u64,
    reserved: [u64; 8],
    mask: u64,
}

/// `struct msghdr`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct MessageHeader {
    name: u64,
    name_len: u64,
    vector: u64,
    vector_len: u64,
    control: u64,
    control_len: u64,
    flags: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Image {
    frames: [Frame; 5],
    mend: MessageHeader,
    vector: [u64; 4],
}

impl Image {
    fn words(&self) -> Vec<u8> {
        // SAFETY: an image is made of 64-bit words alone, without gaps, so all its bytes are initialised.
        let words: [u64; size_of::<Self>() / 8] = unsafe { std::mem::transmute(*self) };
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }
}

/// `FP_XSTATE_MAGIC1` and `FP_XSTATE_MAGIC2` (`asm/sigcontext.h`).
const MAGIC_1: u32 = 0x4650_5853;
const MAGIC_2: u32 = 0x4650_5845;
/// Where in the area its description for a signal frame lies; in a register set, the first word there says which parts the
/// kernel uses.
const DESCRIPTION: usize = 464;
/// Where the area says which parts of it hold anything (`XSTATE_BV`).
const IN_USE: usize = 512;
/// Parts that only a thread has which asked for them (AMX tile data).
const ON_REQUEST: u64 = 1 << 18;
/// Bytes of the area without any part beyond the first two.
const LEGACY: usize = 576;

/// The vector unit's state as a signal frame holds it, from what ptrace(2) gives.
fn frame_of(state: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u64::from_ne_bytes(state.get(at..at + 8)?.try_into().ok()?));
    let parts = word(DESCRIPTION)? & !ON_REQUEST | word(IN_USE)?;
    let length = (2..63).filter(|part| parts & 1 << part != 0).map(end_of).max().unwrap_or(LEGACY);
    let mut area = state.get(..length)?.to_vec();
    let short = u32::try_from(length).ok()?;
    area[DESCRIPTION..IN_USE].fill(0);
    area[DESCRIPTION..][..4].copy_from_slice(&MAGIC_1.to_ne_bytes());
    area[DESCRIPTION + 4..][..4].copy_from_slice(&(short + 4).to_ne_bytes());
    area[DESCRIPTION + 8..][..8].copy_from_slice(&parts.to_ne_bytes());
    area[DESCRIPTION + 16..][..4].copy_from_slice(&short.to_ne_bytes());
    area.extend_from_slice(&MAGIC_2.to_ne_bytes());
    Some(area)
}

/// Where a part of the area ends (CPUID leaf 0xd).
fn end_of(part: u32) -> usize {
    static ENDS: OnceLock<[usize; 64]> = OnceLock::new();
    let ends = ENDS.get_or_init(|| {
        std::array::from_fn(|part| {
            #[allow(unused_unsafe, reason = "safe from Rust 1.90 on")]
            // SAFETY: the leaf is there on every processor on which the kernel reports a part of this area.
            let told = unsafe { __cpuid_count(0xd, u32::try_from(part).unwrap_or(0)) };
            told.eax as usize + told.ebx as usize
        })
    });
    ends[part as usize]
}
