//! A virtio-fs client without a guest: a vhost-user frontend with one request in flight.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _,
};
use vmm_sys_util::eventfd::EventFd;

/// Where the memory that both sides see lies for the device, and how large it is.
const BASE: GuestAddress = GuestAddress(0x1000_0000);
const SIZE: u64 = 4 << 20;

/// Of the request, and of the answer, in it.
const QUESTION: u64 = 0x10_0000;
const ANSWER: u64 = 0x20_0000;

/// Descriptors in a queue.
const LENGTH: u16 = 64;

/// virtio's feature bit for a modern device.
const VERSION_1: u64 = 1 << 32;

/// One more descriptor follows; the device writes to this one.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A queue's three parts, and the events that go with it.
struct Queue {
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    kick: EventFd,
    call: EventFd,
}

/// A mounted share.
pub(crate) struct Client {
    memory: GuestMemoryMmap,
    queue: Queue,
    // Requests so far. The device counts them in 16 bits.
    requests: u16,
    _priority: Queue,
    _frontend: Frontend,
}

/// FUSE's numbers for requests.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Opcode {
    Lookup = 1,
    Forget = 2,
    Mknod = 8,
    Unlink = 10,
    Open = 14,
    Release = 18,
    Init = 26,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let mut frontend = Frontend::connect(socket, 2).context("connect")?;
        frontend.set_owner()?;
        let features =
            frontend.get_features()? & (VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        frontend.set_features(features)?;
        let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = frontend.get_protocol_features()? & protocol;
        frontend.set_protocol_features(protocol)?;

        let file = File::from(memfd_create("share", MemfdFlags::CLOEXEC)?);
        ftruncate(&file, SIZE)?;
        let range = (BASE, usize::try_from(SIZE)?, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).context("map the memory")?;
        let region = memory.iter().next().context("no memory")?;
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(region)?])?;

        let priority = Queue::enable(&mut frontend, &memory, 0)?;
        let queue = Queue::enable(&mut frontend, &memory, 1)?;
        let mut client = Self { memory, queue, requests: 0, _priority: priority, _frontend: frontend };
        // Version 7.38, 64 KiB to read ahead, no flags.
        let mut init = words(&[7, 38, 65536, 0]);
        init.extend([0; 48]);
        client.ask(Opcode::Init, 0, &init, 64).context("FUSE_INIT")?;
        Ok(client)
    }

    /// Sends a request about `node` and returns the answer, of `room` bytes at most. Without room there is none.
    pub(crate) fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> Result<Vec<u8>> {
        let unique = u64::from(self.requests) + 1;
        let length = u32::try_from(40 + body.len())?;
        let mut question = words(&[length, opcode as u32]);
        question.extend(unique.to_le_bytes());
        question.extend(node.to_le_bytes());
        question.extend(words(&[super::USER, super::USER, 0, 0]));
        question.extend(body);
        self.memory.write_slice(&question, at(QUESTION))?;

        let has_answer = room > 0;
        self.describe(0, QUESTION, length, if has_answer { NEXT } else { 0 }, 1)?;
        self.describe(1, ANSWER, 16 + room, WRITE, 0)?;
        let slot = u64::from(self.requests % LENGTH);
        self.memory.write_obj(0_u16, beyond(self.queue.available, 4 + 2 * slot))?;
        self.requests = self.requests.wrapping_add(1);
        self.memory.store(self.requests, beyond(self.queue.available, 2), Ordering::SeqCst)?;
        self.queue.kick.write(1)?;
        while self.memory.load::<u16>(beyond(self.queue.used, 2), Ordering::SeqCst)? != self.requests {
            self.queue.call.read()?;
        }
        if !has_answer {
            return Ok(Vec::new());
        }

        let length: u32 = self.memory.read_obj(at(ANSWER))?;
        let error: i32 = self.memory.read_obj(at(ANSWER + 4))?;
        let about: u64 = self.memory.read_obj(at(ANSWER + 8))?;
        ensure!(about == unique, "wanted the answer to {unique}, found that to {about}");
        ensure!(error == 0, "{}", std::io::Error::from_raw_os_error(-error));
        let mut answer = vec![0; usize::try_from(length)?.saturating_sub(16)];
        self.memory.read_slice(&mut answer, at(ANSWER + 16))?;
        Ok(answer)
    }

    fn describe(&self, index: u64, place: u64, length: u32, flags: u16, next: u16) -> Result<()> {
        let mut descriptor = at(place).0.to_le_bytes().to_vec();
        descriptor.extend(length.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend(next.to_le_bytes());
        Ok(self.memory.write_slice(&descriptor, beyond(self.queue.descriptors, 16 * index))?)
    }
}

impl Queue {
    fn enable(frontend: &mut Frontend, memory: &GuestMemoryMmap, index: usize) -> Result<Self> {
        let place = at(0x4000 * u64::try_from(index)?);
        let [descriptors, available, used] = [0, 0x1000, 0x2000].map(|offset| beyond(place, offset));
        // The device is told our own addresses of them.
        let own = |address| Ok::<_, anyhow::Error>(memory.get_host_address(address)? as u64);
        frontend.set_vring_num(index, LENGTH)?;
        frontend.set_vring_base(index, 0)?;
        let addresses = VringConfigData {
            queue_max_size: LENGTH,
            queue_size: LENGTH,
            flags: 0,
            desc_table_addr: own(descriptors)?,
            used_ring_addr: own(used)?,
            avail_ring_addr: own(available)?,
            log_addr: None,
        };
        frontend.set_vring_addr(index, &addresses)?;
        let (kick, call) = (EventFd::new(0)?, EventFd::new(0)?);
        frontend.set_vring_call(index, &call)?;
        frontend.set_vring_kick(index, &kick)?;
        frontend.set_vring_enable(index, true)?;
        Ok(Self { descriptors, available, used, kick, call })
    }
}

/// As FUSE has them in its structures.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn at(offset: u64) -> GuestAddress {
    beyond(BASE, offset)
}

fn beyond(address: GuestAddress, offset: u64) -> GuestAddress {
    GuestAddress(address.0 + offset)
}
