//! Ranks on GPUs: NCCL, found when it is needed as the other libraries of CUDA are.
//!
//! In: a part of a stage, and its GPU. Out: a [`Collective`] whose exchanges stay in the memory of GPUs. They have a stream of
//! their own: it waits for what the device's stream had to do before, and that one for them when they are ended, so that
//! gradients are added up while the backward pass goes on. The ranks meet as NCCL wants it: the first one makes an id, and the
//! others fetch it where the environment says that they meet.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};
use libloading::os::unix::Library;
use retort_abi::Part;
use retort_engine::collective::{Collective, Meeting};
use retort_engine::error::{Error, Result};

use crate::cuda::tensor::{Raw, pointer, to_host};
use crate::cuda::{Cuda, libraries};
use crate::failed;

/// What NCCL calls its numbers: f32, a sum, and that something is still under way.
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// How often a rank looks whether the others have come, and whether an exchange is over.
const LOOK: Duration = Duration::from_millis(20);
const POLL: Duration = Duration::from_micros(50);
/// What a rank says before it is given the id, and the longest name of a meeting that follows.
const GREETING: &[u8] = b"retort-nccl";
const LONGEST_NAME: usize = 256;

/// NCCL's name for a communicator that is about to be made.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

type Communicator = *mut c_void;
type Stream = *mut c_void;

/// The functions of the library.
struct Functions {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    join: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Communicator,
        Stream,
    ) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Communicator,
        Stream,
    ) -> c_int,
    state: unsafe extern "C" fn(Communicator, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Communicator) -> c_int,
    destroy: unsafe extern "C" fn(Communicator) -> c_int,
    describe: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Never unloaded.
    _library: std::mem::ManuallyDrop<Library>,
}

impl Functions {
    fn load() -> Result<Self> {
        fn found<T: Copy>(library: &Library, name: &str) -> Result<T> {
            // SAFETY: each function has the type of the field that it goes to, in all versions of NCCL 2.
            let symbol = unsafe { library.get::<T>(name.as_bytes()) };
            let symbol = symbol.map_err(|_| Error::Rank(format!("this NCCL has no {name}")))?;
            Ok(*symbol)
        }
        let library = libraries::nccl().map_err(Error::Rank)?;
        Ok(Self {
            unique_id: found(&library, "ncclGetUniqueId")?,
            join: found(&library, "ncclCommInitRank")?,
            all_reduce: found(&library, "ncclAllReduce")?,
            broadcast: found(&library, "ncclBroadcast")?,
            state: found(&library, "ncclCommGetAsyncError")?,
            abort: found(&library, "ncclCommAbort")?,
            destroy: found(&library, "ncclCommDestroy")?,
            describe: found(&library, "ncclGetErrorString")?,
            _library: std::mem::ManuallyDrop::new(library),
        })
    }

    fn check(&self, rank: usize, code: c_int) -> Result<()> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: NCCL returns a constant C string for any code.
        let text = unsafe { CStr::from_ptr((self.describe)(code)) }.to_string_lossy();
        Err(lost(rank, &text))
    }
}

fn lost(rank: usize, why: &str) -> Error {
    Error::Rank(format!(
        "worker {} has lost another one, or waited for it in vain: NCCL: {why}",
        rank + 1
    ))
}

/// Ranks that have met.
pub struct Nccl {
    functions: Functions,
    communicator: Communicator,
    rank: usize,
    size: usize,
    device: Device,
    /// The device's, and that of exchanges.
    computing: Arc<CudaStream>,
    exchanging: Arc<CudaStream>,
    patience: Duration,
    lost: AtomicBool,
}

// SAFETY: NCCL's communicators may be used from any thread, by one at a time: calls have one order, which is the engine's
// affair.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// Meets the other parts of a stage, on the GPU of this one.
///
/// # Errors
/// NCCL is not there, the environment does not say where ranks meet, or they have not all come.
pub fn meet(backend: &Cuda, part: Part) -> Result<Box<dyn Collective>> {
    let meeting = Meeting::read(part, |name| std::env::var(name).ok())?;
    Ok(Box::new(Nccl::meet_at(&meeting, backend, part)?))
}

impl Nccl {
    /// See [`meet`].
    ///
    /// # Errors
    /// As there.
    pub fn meet_at(meeting: &Meeting, backend: &Cuda, part: Part) -> Result<Self> {
        let functions = Functions::load()?;
        let Device::Cuda(gpu) = &backend.device else {
            return Err(Error::Internal("the backend of GPUs is on none".into()));
        };
        let computing = gpu.cuda_stream();
        let exchanging = computing.context().new_stream().map_err(refused)?;
        let mut id = UniqueId([0; 128]);
        if part.index == 0 {
            // SAFETY: the place for the answer outlives the call.
            functions.check(0, unsafe { (functions.unique_id)(&mut id) })?;
        }
        share(meeting, part, &mut id.0)?;
        let mut communicator = std::ptr::null_mut();
        let (size, rank) = (part.of as c_int, part.index as c_int);
        computing.context().bind_to_thread().map_err(refused)?;
        // SAFETY: the place for the answer outlives the call, and the device is this thread's.
        let code = unsafe { (functions.join)(&mut communicator, size, id, rank) };
        functions.check(part.index, code)?;
        Ok(Self {
            functions,
            communicator,
            rank: part.index,
            size: part.of,
            device: backend.device.clone(),
            computing,
            exchanging,
            patience: meeting.patience,
            lost: AtomicBool::new(false),
        })
    }

    /// Begins to sum a tensor over all ranks, or with `root` to take it from that one.
    ///
    /// # Errors
    /// [`Error::Rank`].
    pub fn begin(&self, x: &Raw, root: Option<usize>) -> Result<()> {
        if !x.is_contiguous() || x.dtype() != candle_core::DType::F32 {
            return Err(Error::Internal(
                "ranks exchange whole tensors of f32".into(),
            ));
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(lost(self.rank, "the communicator was ended"));
        }
        self.exchanging.join(&self.computing).map_err(refused)?;
        let (count, stream) = (x.elem_count(), self.exchanging.cu_stream().cast());
        let at = pointer(x)? as *mut c_void;
        // SAFETY: so many values of f32 lie there until the exchange is ended; NCCL takes the same place for both sides.
        let code = unsafe {
            match root {
                None => (self.functions.all_reduce)(
                    at,
                    at,
                    count,
                    FLOAT32,
                    SUM,
                    self.communicator,
                    stream,
                ),
                Some(root) => (self.functions.broadcast)(
                    at,
                    at,
                    count,
                    FLOAT32,
                    root as c_int,
                    self.communicator,
                    stream,
                ),
            }
        };
        self.functions.check(self.rank, code)
    }

    /// Ends what was begun: waits until it is over, and looks whether another rank is gone meanwhile.
    ///
    /// # Errors
    /// [`Error::Rank`].
    pub fn end(&self) -> Result<()> {
        let over = self.exchanging.record_event(None).map_err(refused)?;
        let began = Instant::now();
        while !over.try_is_complete().map_err(refused)? {
            let mut code = SUCCESS;
            // SAFETY: the communicator is there, and so is the place for the answer.
            let asked = unsafe { (self.functions.state)(self.communicator, &mut code) };
            let state = self.functions.check(self.rank, asked.max(code));
            let late = began.elapsed() > self.patience;
            if late || state.is_err() {
                if !self.lost.swap(true, Ordering::Relaxed) {
                    // SAFETY: it is used no more: what waits in it ends.
                    unsafe { (self.functions.abort)(self.communicator) };
                }
                state?;
                return Err(lost(self.rank, "an exchange takes too long"));
            }
            std::thread::sleep(POLL);
        }
        self.computing.wait(&over).map_err(refused)
    }

    /// Exchanges values of the host by way of the GPU.
    fn through_device(&self, values: &mut [f32], root: Option<usize>) -> Result<()> {
        let x = Raw::from_slice(values, values.len(), &self.device).map_err(failed)?;
        self.begin(&x, root)?;
        self.end()?;
        values.copy_from_slice(&to_host::<f32>(&x)?);
        Ok(())
    }
}

fn refused(error: DriverError) -> Error {
    failed(candle_core::Error::wrap(error))
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        self.through_device(values, None)
    }

    fn broadcast(&self, values: &mut [f32], root: usize) -> Result<()> {
        self.through_device(values, Some(root))
    }

    fn barrier(&self) -> Result<()> {
        self.through_device(&mut [0.0], None)
    }

    fn on_device(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if !self.lost.load(Ordering::Relaxed) {
            // SAFETY: nobody else has the communicator.
            unsafe { (self.functions.destroy)(self.communicator) };
        }
    }
}

/// Gives the id of the first rank to the others.
fn share(meeting: &Meeting, part: Part, id: &mut [u8; 128]) -> Result<()> {
    // Where torchrun itself listens, the next port is free for this.
    let port = match meeting.held {
        true => meeting.port.wrapping_add(1),
        false => meeting.port,
    };
    let at = format!("{}:{port}", meeting.host);
    let wrong = |error: std::io::Error| {
        Error::Rank(format!(
            "worker {} of {} cannot meet the others at {at}: {error}",
            part.index + 1,
            part.of
        ))
    };
    let until = Instant::now() + meeting.patience;
    let place = (meeting.host.as_str(), port);
    match part.index {
        0 => give(place, part, &meeting.name, id, until).map_err(wrong),
        _ => fetch(place, part, &meeting.name, id, until).map_err(wrong),
    }
}

fn late() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::TimedOut, "not all have come in time")
}

/// What a rank says of itself.
fn greeting(rank: usize, name: &str) -> Vec<u8> {
    let name = &name.as_bytes()[..name.len().min(LONGEST_NAME)];
    [GREETING, &(rank as u32).to_le_bytes(), name].concat()
}

fn give(
    place: (&str, u16),
    part: Part,
    name: &str,
    id: &[u8],
    until: Instant,
) -> std::io::Result<()> {
    let listener = TcpListener::bind(place)?;
    listener.set_nonblocking(true)?;
    let mut waits: Vec<usize> = (1..part.of).collect();
    while !waits.is_empty() {
        match listener.accept() {
            Ok((mut stream, _)) => {
                // Whoever else comes here is sent away.
                if let Ok(rank) = greeted(&mut stream, name, &waits)
                    && stream.write_all(id).is_ok()
                {
                    waits.retain(|&other| other != rank);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if Instant::now() > until {
                    return Err(late());
                }
                std::thread::sleep(LOOK);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The rank that calls.
fn greeted(stream: &mut TcpStream, name: &str, waits: &[usize]) -> std::io::Result<usize> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut said = vec![0; greeting(0, name).len()];
    stream.read_exact(&mut said)?;
    let known = waits.iter().find(|&&rank| said == greeting(rank, name));
    known.copied().ok_or_else(late)
}

fn fetch(
    place: (&str, u16),
    part: Part,
    name: &str,
    id: &mut [u8],
    until: Instant,
) -> std::io::Result<()> {
    let once = |id: &mut [u8]| -> std::io::Result<()> {
        let mut addresses = place.to_socket_addrs()?;
        let address = addresses.next().ok_or_else(late)?;
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.write_all(&greeting(part.index, name))?;
        stream.read_exact(id)
    };
    loop {
        match once(id) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > until => return Err(error),
            // It may not be there yet.
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_the_first_reaches_all_and_strangers_get_nothing() {
        let port = TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| Ok(listener.local_addr()?.port()))
            .unwrap();
        let meeting = Meeting {
            host: "127.0.0.1".into(),
            port,
            name: "a".into(),
            held: false,
            patience: Duration::from_secs(20),
        };
        let size = 3;
        let given = [7; 128];
        std::thread::scope(|scope| {
            for index in 0..size {
                let meeting = &meeting;
                scope.spawn(move || {
                    let mut id = if index == 0 { given } else { [0; 128] };
                    share(meeting, Part { index, of: size }, &mut id).unwrap();
                    assert_eq!(id, given);
                });
            }
            scope.spawn(|| {
                let other = Meeting {
                    name: "b".into(),
                    patience: Duration::ZERO,
                    ..meeting.clone()
                };
                let part = Part { index: 1, of: size };
                assert!(share(&other, part, &mut [0; 128]).is_err());
            });
        });
        let late = Meeting {
            patience: Duration::from_millis(50),
            ..meeting
        };
        let error = share(&late, Part { index: 0, of: 2 }, &mut [0; 128]).unwrap_err();
        assert!(
            error.to_string().contains("not all have come in time"),
            "{error}"
        );
    }
}
