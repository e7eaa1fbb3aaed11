//! Ranks through libtorch's c10d (`collective.cpp`): Gloo in the host's memory, NCCL between GPUs.
//!
//! The environment says where they meet, with the variables of `torchrun`.

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::time::Duration;

use retort_abi::Part;
use retort_engine::collective::{Collective, Rendezvous, patience_within};
use retort_engine::error::{Error, Result};
use tch::Device;

use crate::Libtorch;

unsafe extern "C" {
    fn retort_ranks_meet(
        address: *const RendezvousAddress,
        rank: c_int,
        size: c_int,
        timeout: i64,
        gpu: c_int,
        out: *mut *mut c_void,
    ) -> *const c_char;
    fn retort_ranks_set_patience(ranks: *mut c_void, milliseconds: i64);
    fn retort_ranks_all_reduce(ranks: *mut c_void, values: *mut f32, count: i64) -> *const c_char;
    fn retort_ranks_broadcast(
        ranks: *mut c_void,
        values: *mut f32,
        count: i64,
        root: c_int,
    ) -> *const c_char;
    fn retort_ranks_barrier(ranks: *mut c_void) -> *const c_char;
    fn retort_ranks_begin(ranks: *mut c_void, tensor: *const c_void, root: c_int) -> *const c_char;
    fn retort_ranks_end(ranks: *mut c_void) -> *const c_char;
    fn retort_ranks_part(ranks: *mut c_void);
}

/// [`Rendezvous`] for `collective.cpp`.
#[repr(C)]
struct RendezvousAddress {
    host: *const c_char,
    port: u16,
    held: bool,
    name: *const c_char,
}

/// Ranks that have met.
pub(crate) struct Ranks {
    ranks: *mut c_void,
    rank: usize,
    size: usize,
    on_gpu: bool,
    /// How long an exchange may wait, at most.
    patience: Duration,
}

// SAFETY: c10d's groups may be used from any thread; the engine orders the calls.
unsafe impl Send for Ranks {}
// SAFETY: as above; c10d takes a lock of its own around its queue of work.
unsafe impl Sync for Ranks {}

/// Connects to the other parts of a stage, on this part's device.
///
/// # Errors
/// The environment does not say where, or they have not all come.
pub fn meet(backend: &Libtorch, part: Part) -> Result<Box<dyn Collective>> {
    meet_at(
        &Rendezvous::read(part, |name| std::env::var(name).ok())?,
        backend.device,
        part,
    )
}

/// The same with an explicit rendezvous.
///
/// # Errors
/// They have not all come.
pub fn meet_at(rendezvous: &Rendezvous, device: Device, part: Part) -> Result<Box<dyn Collective>> {
    let text = |text: &str| {
        let wrong = |_| Error::Backend(format!("{text:?} is not a valid rendezvous address"));
        CString::new(text).map_err(wrong)
    };
    let (host, name) = (text(&rendezvous.host)?, text(&rendezvous.name)?);
    let address = RendezvousAddress {
        host: host.as_ptr(),
        port: rendezvous.port,
        held: rendezvous.held,
        name: name.as_ptr(),
    };
    let gpu = match device {
        Device::Cuda(index) => c_int::try_from(index).unwrap_or(c_int::MAX),
        _ => -1,
    };
    let (rank, size) = (part.index as c_int, part.of as c_int);
    let timeout = milliseconds(rendezvous.patience);
    let mut ranks = std::ptr::null_mut();
    // SAFETY: the address, its strings and the place for the answer outlive the call.
    let said = unsafe { retort_ranks_meet(&address, rank, size, timeout, gpu, &mut ranks) };
    check(part.index, said)?;
    Ok(Box::new(Ranks {
        ranks,
        rank: part.index,
        size: part.of,
        on_gpu: gpu >= 0,
        patience: rendezvous.patience,
    }))
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

impl Ranks {
    /// Begins to sum a tensor of a GPU over all ranks, or with `root` to take it from that one.
    pub(crate) fn begin(&self, x: &tch::Tensor, root: Option<usize>) -> Result<()> {
        let root = root.map_or(-1, |root| root as c_int);
        // SAFETY: the handle of a tensor; c10d keeps a reference of its own until it is done.
        check(self.rank, unsafe {
            retort_ranks_begin(self.ranks, x.as_ptr().cast(), root)
        })
    }

    /// Ends all that was begun.
    pub(crate) fn end(&self) -> Result<()> {
        // SAFETY: the group lives as long as this does.
        check(self.rank, unsafe { retort_ranks_end(self.ranks) })
    }
}

fn check(rank: usize, message: *const c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: `collective.cpp` returns a C string that lives until this thread's next call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let text = text.lines().next().unwrap_or_default().trim();
    Err(Error::Rank(format!(
        "worker {} lost contact with another one, or timed out waiting for it: {text}",
        rank + 1
    )))
}

impl Collective for Ranks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        let (first, count) = (values.as_mut_ptr(), values.len() as i64);
        // SAFETY: the group lives as long as this does, and the call is over when it returns.
        check(self.rank, unsafe {
            retort_ranks_all_reduce(self.ranks, first, count)
        })
    }

    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<()> {
        let (first, count) = (values.as_mut_ptr(), values.len() as i64);
        // SAFETY: as above.
        check(self.rank, unsafe {
            retort_ranks_broadcast(self.ranks, first, count, root as c_int)
        })
    }

    fn set_patience(&self, patience: Option<Duration>) {
        let patience = patience_within(self.patience, patience);
        // SAFETY: the group lives as long as this does; the time is kept in an atomic number.
        unsafe { retort_ranks_set_patience(self.ranks, milliseconds(patience)) }
    }

    fn on_device(&self) -> Option<&dyn Any> {
        self.on_gpu.then_some(self)
    }

    fn barrier(&self) -> Result<()> {
        // SAFETY: as above.
        check(self.rank, unsafe { retort_ranks_barrier(self.ranks) })
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // SAFETY: nobody else has the group, and it was made by `retort_ranks_meet`.
        unsafe { retort_ranks_part(self.ranks) }
    }
}
