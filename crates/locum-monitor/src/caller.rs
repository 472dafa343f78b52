//! The threads that call, held and remembered.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use locum_journal::Left;
use locum_kernel::Errno;
use locum_kernel::arch::Gadgets;
use locum_kernel::hand_over::{self, Parcel, Unfit};
use locum_kernel::memory::AddressSpace;
use locum_kernel::notify::CallId;
use locum_kernel::process::{Ids, Status, Thread};
use locum_kernel::table::Mark;

use crate::session::lock;
use crate::watch::Watch;

/// Threads that one session remembers; each costs four descriptors.
const REMEMBERED: usize = 128;

/// A thread that waits for its call.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) thread: Thread,
    /// Where results are written; opened before the call is found to be still waiting.
    pub(crate) memory: AddressSpace,
    /// When the thread started, in clock ticks since boot.
    pub(crate) started: u64,
    status: Status,
    /// Held by the worker that is about a call of this thread. A thread waits for one call at a time, so whoever finds it
    /// held has been given a call made anew, and must not begin before the other knows that its own was withdrawn.
    busy: Mutex<()>,
    /// The one in which a descriptor was last handed to the thread, empty again once it makes another call.
    parcel: Mutex<Option<Parcel>>,
    /// What handing over an `O_PATH` descriptor needs of its program.
    program: OnceLock<Result<Gadgets, Unfit>>,
}

/// Held by a worker while it is about a call of a thread.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    _busy: MutexGuard<'a, ()>,
    watch: Arc<Watch>,
}

impl Turn<'_> {
    /// The call is about to have its answer; only tidying up is left. Said before, since the caller may be faster than its worker.
    pub(crate) fn answered(&self) {
        self.watch.answered();
    }
}

impl Caller {
    fn meet(tid: u32) -> Result<Self, Errno> {
        let thread = Thread::hold(tid)?;
        let memory = AddressSpace::open(thread.proc())?;
        let (status, started) = (thread.status()?, thread.start_time()?);
        Ok(Self {
            thread,
            memory,
            started,
            status,
            busy: Mutex::default(),
            parcel: Mutex::default(),
            program: OnceLock::new(),
        })
    }

    /// Waits until no other worker is about a call of this thread.
    pub(crate) fn turn(&self, watch: &Arc<Watch>) -> Turn<'_> {
        Turn { _busy: lock(&self.busy), watch: Arc::clone(watch) }
    }

    /// The ids with which the thread opens files now.
    pub(crate) fn ids(&self) -> Result<std::borrow::Cow<'_, Ids>, Errno> {
        if self.status.ids_fixed {
            return Ok(std::borrow::Cow::Borrowed(&self.status.ids));
        }
        self.thread.status().map(|status| std::borrow::Cow::Owned(status.ids))
    }

    /// A parcel with `file` for the call `id`.
    pub(crate) fn parcel(&self, id: CallId, file: &OwnedFd, mark: Mark) -> Result<Parcel, Errno> {
        if let Some(parcel) = lock(&self.parcel).take()
            && parcel.pack(id, file.as_fd(), mark).is_ok()
        {
            return Ok(parcel);
        }
        let parcel = Parcel::new()?;
        parcel.pack(id, file.as_fd(), mark).map(|()| parcel)
    }

    /// Keeps a parcel that was taken in: making one takes long.
    pub(crate) fn keep_parcel(&self, parcel: Parcel) {
        *lock(&self.parcel) = Some(parcel);
    }

    /// The process that the thread is of.
    pub(crate) fn process(&self) -> u32 {
        self.status.process
    }

    /// Whether there is still a process of that id.
    pub(crate) fn process_lives(&self) -> bool {
        let pid = rustix::process::Pid::from_raw(self.status.process.cast_signed());
        // EPERM, without CAP_KILL, says that there is one.
        pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(Errno::SRCH))
    }

    /// Whether the thread can be remembered: not one that may leave its address space to another process by exec, as the
    /// child of a vfork does. Remaining race: one that shares it with a process that is not its parent. It would have its
    /// results written where it was before, which is memory of the same workload.
    fn lasts(&self) -> bool {
        self.status.parent == 0 || self.thread.shares_memory_with(self.status.parent) == Ok(false)
    }
}

/// The callers that a session remembers.
#[derive(Debug, Default)]
pub(crate) struct Callers {
    threads: Mutex<HashMap<u32, Arc<Caller>>>,
    /// By process id. What is found there is looked at before it is used.
    programs: Mutex<HashMap<u32, Gadgets>>,
}

impl Callers {
    /// Whoever has the id `tid` now. ENOENT or ESRCH: nobody.
    pub(crate) fn meet(&self, tid: u32) -> Result<Arc<Caller>, Errno> {
        let known = lock(&self.threads).get(&tid).cloned();
        if let Some(caller) = known {
            if caller.thread.lives() {
                return Ok(caller);
            }
            self.forget(tid);
        }
        let caller = Arc::new(Caller::meet(tid)?);
        if caller.lasts() {
            let mut known = lock(&self.threads);
            if known.len() >= REMEMBERED {
                known.retain(|_, caller| caller.thread.lives());
            }
            if known.len() < REMEMBERED {
                // Another worker may have met it meanwhile; what both use must be one.
                return Ok(Arc::clone(known.entry(tid).or_insert(caller)));
            }
        }
        Ok(caller)
    }

    /// The thread that made a call which a dead monitor left, if it is still there.
    pub(crate) fn who_made(&self, left: &Left) -> Option<Arc<Caller>> {
        self.meet(left.call.tid).ok().filter(|caller| caller.started == left.caller_started)
    }

    /// Has the thread `tid` looked at anew the next time: it changed its address space.
    pub(crate) fn forget(&self, tid: u32) {
        lock(&self.threads).remove(&tid);
    }

    /// Whether `caller` can be handed an `O_PATH` descriptor, as far as its program goes.
    pub(crate) fn takes_path(&self, caller: &Caller) -> bool {
        self.find_program(caller).is_ok()
    }

    /// What handing over an `O_PATH` descriptor to `caller` needs of its program.
    pub(crate) fn program(&self, caller: &Caller) -> Result<Gadgets, Unfit> {
        let found = self.find_program(caller).clone()?;
        if hand_over::still_there(&caller.thread, found) {
            return Ok(found);
        }
        // It has executed another program since it was remembered.
        self.forget(caller.thread.tid());
        hand_over::prepare(&caller.thread)
    }

    /// To search all the code takes a millisecond, so what was found for another thread of the process is tried first.
    fn find_program<'a>(&self, caller: &'a Caller) -> &'a Result<Gadgets, Unfit> {
        caller.program.get_or_init(|| {
            let mut programs = lock(&self.programs);
            let known = programs.get(&caller.process()).copied();
            if let Some(known) = known.filter(|known| hand_over::still_there(&caller.thread, *known)) {
                return Ok(known);
            }
            let found = hand_over::prepare(&caller.thread)?;
            if programs.len() >= REMEMBERED {
                programs.clear();
            }
            programs.insert(caller.process(), found);
            Ok(found)
        })
    }
}
