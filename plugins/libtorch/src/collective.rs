//! Ranks through libtorch's c10d (`collective.cpp`): Gloo, over buffers in the host's memory.
//!
//! Where they meet the environment says, by the names that `torchrun` gives it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use retort_abi::Part;
use retort_engine::collective::Collective;
use retort_engine::error::{Error, Result};

/// How long a rank is waited for, in seconds, where the environment does not say.
const PATIENCE: u64 = 600;
/// The variable that says so.
const PATIENCE_VARIABLE: &str = "RETORT_RANK_TIMEOUT";

unsafe extern "C" {
    fn retort_ranks_meet(
        host: *const c_char,
        port: u16,
        rank: c_int,
        size: c_int,
        timeout: i64,
        out: *mut *mut c_void,
    ) -> *const c_char;
    fn retort_ranks_all_reduce(ranks: *mut c_void, values: *mut f32, count: i64) -> *const c_char;
    fn retort_ranks_broadcast(
        ranks: *mut c_void,
        values: *mut f32,
        count: i64,
        root: c_int,
    ) -> *const c_char;
    fn retort_ranks_barrier(ranks: *mut c_void) -> *const c_char;
    fn retort_ranks_part(ranks: *mut c_void);
}

/// Ranks that have met.
struct Gloo {
    ranks: *mut c_void,
    rank: usize,
    size: usize,
}

// SAFETY: c10d's groups may be used from any thread; that calls have one order is the engine's affair.
unsafe impl Send for Gloo {}
// SAFETY: as above; c10d takes a lock of its own around its queue of work.
unsafe impl Sync for Gloo {}

/// Meets the other parts of a stage at `MASTER_ADDR` and `MASTER_PORT`.
///
/// # Errors
/// The environment does not say where, or they have not all come.
pub(crate) fn meet(part: Part) -> Result<Box<dyn Collective>> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let missing = |name: &str| {
        Error::Rank(format!(
            "worker {} of {} does not know where the others are: {name} is not set or makes no sense",
            part.index + 1,
            part.of
        ))
    };
    let host = variable("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?;
    let port = variable("MASTER_PORT").and_then(|port| port.parse().ok());
    let port = port.ok_or_else(|| missing("MASTER_PORT"))?;
    let seconds = match variable(PATIENCE_VARIABLE) {
        Some(value) => value.parse().map_err(|_| missing(PATIENCE_VARIABLE))?,
        None => PATIENCE,
    };
    let host = CString::new(host).map_err(|_| missing("MASTER_ADDR"))?;
    let (rank, size) = (part.index as c_int, part.of as c_int);
    let timeout = i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
    let mut ranks = std::ptr::null_mut();
    // SAFETY: the string and the place for the answer outlive the call.
    let said = unsafe { retort_ranks_meet(host.as_ptr(), port, rank, size, timeout, &mut ranks) };
    check(part.index, said)?;
    Ok(Box::new(Gloo {
        ranks,
        rank: part.index,
        size: part.of,
    }))
}

fn check(rank: usize, message: *const c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: `collective.cpp` returns a C string that lives until this thread's next call.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let text = text.lines().next().unwrap_or_default().trim();
    Err(Error::Rank(format!(
        "worker {} has lost another one, or waited for it in vain: {text}",
        rank + 1
    )))
}

impl Collective for Gloo {
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

    fn barrier(&self) -> Result<()> {
        // SAFETY: as above.
        check(self.rank, unsafe { retort_ranks_barrier(self.ranks) })
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // SAFETY: nobody else has the group, and it was made by `retort_ranks_meet`.
        unsafe { retort_ranks_part(self.ranks) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_add_up_and_one_that_is_gone_is_an_error() {
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| Ok(listener.local_addr()?.port()))
            .unwrap();
        // SAFETY: the only test of this crate that reads or writes these variables.
        unsafe {
            std::env::set_var("MASTER_ADDR", "127.0.0.1");
            std::env::set_var("MASTER_PORT", port.to_string());
            std::env::set_var(PATIENCE_VARIABLE, "20");
        }
        let size = 3;
        let ranks = (0..size).map(|index| {
            std::thread::spawn(move || {
                let ranks = meet(Part { index, of: size }).unwrap();
                let mut values = vec![0.1 * (index + 1) as f32; 1000];
                ranks.all_reduce(&mut values).unwrap();
                let mut of_one = [index as f32, -1.0];
                ranks.broadcast(&mut of_one, 2).unwrap();
                assert_eq!(of_one, [2.0, -1.0]);
                ranks.barrier().unwrap();
                if index == 1 {
                    return values;
                }
                let began = std::time::Instant::now();
                let error = ranks.all_reduce(&mut [1.0]).unwrap_err();
                assert!(matches!(error, Error::Rank(_)), "{error:?}");
                assert!(began.elapsed().as_secs() < 10);
                values
            })
        });
        let ranks: Vec<_> = ranks.collect();
        let all: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        assert!((all[0][0] - 0.6).abs() < 1e-6);
        assert!(all.iter().all(|values| values == &all[0]), "the same bits");
    }
}
