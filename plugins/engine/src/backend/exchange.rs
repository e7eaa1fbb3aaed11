//! Exchanges of tensors between ranks, in device memory.

use std::any::Any;

use crate::backend::tensor::Tensors;
use crate::error::{Error, Result};

/// Sums and broadcasts over the ranks of a training. Only backends whose collective has a handle
/// ([`Collective::on_device`](crate::collective::Collective::on_device)) implement it; for the others exchanges go through
/// host memory.
pub trait Exchange: Tensors {
    /// Begins an exchange in place: a whole f32 tensor becomes the sum over all ranks or, with `root`, that rank's tensor.
    /// `ranks` is the handle from their collective ([`Collective::on_device`](crate::collective::Collective::on_device)). The
    /// tensor must live until the end.
    fn begin_exchange_(x: &Self::Tensor, root: Option<usize>, ranks: &dyn Any) -> Result<()> {
        let _ = (x, root, ranks);
        let message = "this backend cannot exchange tensors in device memory";
        Err(Error::Internal(message.into()))
    }

    /// Ends all exchanges: later operations see the values of all ranks.
    fn end_exchanges(ranks: &dyn Any) -> Result<()> {
        let _ = ranks;
        Ok(())
    }
}
