//! Ranks on GPUs: NCCL, loaded when needed, like CUDA's other libraries.
//!
//! In: a part of a stage, and its GPU. Out: a [`Collective`] whose exchanges stay in the memory of GPUs. Exchanges have their
//! own stream, so that gradients are summed during the backward pass: an exchange waits for earlier work of the device's
//! stream, and that stream waits for the exchange when it is ended. The ranks meet in NCCL's way: the first creates an id,
//! and the others fetch it from the address in the environment.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};
use libloading::os::unix::Library;
use retort_abi::Part;
use retort_engine::collective::{Collective, Rendezvous, WaitClock, patience_within};
use retort_engine::error::{Error, Result};

use crate::cuda::tensor::{Raw, pointer, to_host};
use crate::cuda::{Cuda, libraries};
use crate::failed;

/// NCCL's constants: f32, a sum, and "still in progress".
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// How often a rank polls whether the others have arrived and whether an exchange has finished.
const LOOK: Duration = Duration::from_millis(20);
const POLL: Duration = Duration::from_micros(50);
/// The greeting that a rank sends before it receives the id, and the maximum length of the rendezvous name that follows.
const GREETING: &[u8] = b"retort-nccl";
const LONGEST_NAME: usize = 256;

/// NCCL's id of a new communicator.
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
            let symbol = symbol.map_err(|_| Error::Backend(format!(
                    "the NCCL library has no function `{name}`; expected NCCL 2 (`pip install nvidia-nccl-cu13` installs it)"
                )))?;
            Ok(*symbol)
        }
        let library = libraries::nccl().map_err(Error::Backend)?;
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
        "worker {} lost contact with another one, or timed out waiting for it: NCCL: {why}",
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
    /// The device's stream, and that of exchanges.
    computing: Arc<CudaStream>,
    exchanging: Arc<CudaStream>,
    /// How long an exchange may wait, at most.
    patience: Duration,
    /// The same for exchanges at the moment, in milliseconds.
    patience_now: AtomicU64,
    lost: AtomicBool,
}

// SAFETY: NCCL's communicators may be used from any thread, one at a time; the engine orders the calls.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

/// Connects to the other parts of a stage, on this part's GPU.
///
/// # Errors
/// NCCL is not there, the environment does not say where ranks meet, or they have not all come.
pub fn meet(backend: &Cuda, part: Part) -> Result<Box<dyn Collective>> {
    let rendezvous = Rendezvous::read(part, |name| std::env::var(name).ok())?;
    Ok(Box::new(Nccl::meet_at(&rendezvous, backend, part)?))
}

impl Nccl {
    /// See [`meet`].
    ///
    /// # Errors
    /// As there.
    pub fn meet_at(rendezvous: &Rendezvous, backend: &Cuda, part: Part) -> Result<Self> {
        let functions = Functions::load()?;
        let Device::Cuda(gpu) = &backend.device else {
            return Err(Error::Internal(
                "expected a CUDA device, got the host".into(),
            ));
        };
        let computing = gpu.cuda_stream();
        let exchanging = computing.context().new_stream().map_err(refused)?;
        let mut id = UniqueId([0; 128]);
        if part.index == 0 {
            // SAFETY: the place for the answer outlives the call.
            functions.check(0, unsafe { (functions.unique_id)(&mut id) })?;
        }
        share(rendezvous, part, &mut id.0)?;
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
            patience: rendezvous.patience,
            patience_now: AtomicU64::new(milliseconds(rendezvous.patience)),
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
                "ranks exchange contiguous tensors of f32; got another".into(),
            ));
        }
        if self.lost.load(Ordering::Relaxed) {
            return Err(lost(
                self.rank,
                "an earlier exchange failed, so no further one is possible",
            ));
        }
        self.exchanging.join(&self.computing).map_err(refused)?;
        let (count, stream) = (x.elem_count(), self.exchanging.cu_stream().cast());
        let at = pointer(x)? as *mut c_void;
        // SAFETY: this many f32 values stay there until the exchange is ended; NCCL allows the same address for input and
        // output.
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
        self.functions
            .check(self.rank, code)
            .inspect_err(|_| self.abort())
    }

    /// Aborts the communicator: pending operations end, and it is not used again.
    fn abort(&self) {
        if !self.lost.swap(true, Ordering::Relaxed) {
            // SAFETY: the communicator is valid, and from now on nobody uses it.
            unsafe { (self.functions.abort)(self.communicator) };
        }
    }

    /// Ends the exchange: waits until it is finished, and checks whether another rank is gone.
    ///
    /// # Errors
    /// [`Error::Rank`].
    pub fn end(&self) -> Result<()> {
        let over = self.exchanging.record_event(None).map_err(refused)?;
        let patience = Duration::from_millis(self.patience_now.load(Ordering::Relaxed));
        let mut clock = WaitClock::start();
        while !over.try_is_complete().map_err(refused)? {
            let mut code = SUCCESS;
            // SAFETY: the communicator is there, and so is the place for the answer.
            let asked = unsafe { (self.functions.state)(self.communicator, &mut code) };
            let state = self.functions.check(self.rank, asked.max(code));
            let late = clock.waited() > patience;
            if late || state.is_err() {
                self.abort();
                state?;
                let seconds = patience.as_secs_f64();
                let why = format!(
                    "an exchange took longer than {seconds} s (a larger RETORT_RANK_TIMEOUT allows more)"
                );
                return Err(lost(self.rank, &why));
            }
            std::thread::sleep(POLL);
        }
        self.computing.wait(&over).map_err(refused)
    }

    /// Exchanges values in host memory through the GPU.
    fn through_device(&self, values: &mut [f32], root: Option<usize>) -> Result<()> {
        let x = Raw::from_slice(values, values.len(), &self.device).map_err(failed)?;
        self.begin(&x, root)?;
        self.end()?;
        values.copy_from_slice(&to_host::<f32>(&x)?);
        Ok(())
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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

    fn set_patience(&self, patience: Option<Duration>) {
        let patience = milliseconds(patience_within(self.patience, patience));
        self.patience_now.store(patience, Ordering::Relaxed);
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

/// Passes the id from the first rank to the others.
fn share(rendezvous: &Rendezvous, part: Part, id: &mut [u8; 128]) -> Result<()> {
    // If torchrun itself listens on the port, the next port is used.
    let port = match rendezvous.held {
        true => rendezvous.port.wrapping_add(1),
        false => rendezvous.port,
    };
    let at = format!("{}:{port}", rendezvous.host);
    let wrong = |error: std::io::Error| {
        Error::Rank(format!(
            "worker {} of {} cannot meet the others at {at}: {error}",
            part.index + 1,
            part.of
        ))
    };
    let until = Instant::now() + rendezvous.patience;
    let place = (rendezvous.host.as_str(), port);
    match part.index {
        0 => give(place, part, &rendezvous.name, id, until).map_err(wrong),
        _ => fetch(place, part, &rendezvous.name, id, until).map_err(wrong),
    }
}

fn late() -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "not all workers came in time (RETORT_RANK_TIMEOUT sets how many seconds)",
    )
}

/// How a rank identifies itself.
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
                // Other connections are rejected.
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
        let rendezvous = Rendezvous {
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
                let rendezvous = &rendezvous;
                scope.spawn(move || {
                    let mut id = if index == 0 { given } else { [0; 128] };
                    share(rendezvous, Part { index, of: size }, &mut id).unwrap();
                    assert_eq!(id, given);
                });
            }
            scope.spawn(|| {
                let other = Rendezvous {
                    name: "b".into(),
                    patience: Duration::ZERO,
                    ..rendezvous.clone()
                };
                let part = Part { index: 1, of: size };
                assert!(share(&other, part, &mut [0; 128]).is_err());
            });
        });
        let late = Rendezvous {
            patience: Duration::from_millis(50),
            ..rendezvous
        };
        let error = share(&late, Part { index: 0, of: 2 }, &mut [0; 128]).unwrap_err();
        assert!(
            error.to_string().contains(
                "not all workers came in time (RETORT_RANK_TIMEOUT sets how many seconds)"
            ),
            "{error}"
        );
    }
}
