//! The functions of `aten.cpp`, which tch does not bind.

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use retort_engine::error::{Error, Result};
use tch::Tensor;

use crate::failure;

/// An `at::Tensor` on the C++ side.
type Handle = *const c_void;
type Out = *mut c_void;

unsafe extern "C" {
    fn retort_library() -> *const c_char;
    fn retort_no_tf32() -> *const c_char;
    fn retort_each(
        count: i64,
        task: extern "C" fn(*const c_void, i64),
        context: *const c_void,
    ) -> *const c_char;
    fn retort_conv2d_backward(
        x: Handle,
        w: Handle,
        grad: Handle,
        stride: i64,
        padding_h: i64,
        padding_w: i64,
        want_x: bool,
        want_w: bool,
        dx: *mut Out,
        dw: *mut Out,
    ) -> *const c_char;
    fn retort_layer_norm_backward(x: Handle, grad: Handle, eps: f64, dx: *mut Out)
    -> *const c_char;
    fn retort_group_norm_backward(
        x: Handle,
        groups: i64,
        w: Handle,
        grad: Handle,
        eps: f64,
        dx: *mut Out,
        dw: *mut Out,
        db: *mut Out,
    ) -> *const c_char;
}

/// The file of the libtorch that is loaded: its CPU half.
pub(crate) fn library() -> &'static Path {
    // SAFETY: returns a C string that is never freed.
    let path = unsafe { CStr::from_ptr(retort_library()) };
    Path::new(OsStr::from_bytes(path.to_bytes()))
}

/// Makes GPUs compute f32 products without rounding operands.
pub(crate) fn no_tf32() -> Result<()> {
    // SAFETY: sets two flags of the process.
    check(unsafe { retort_no_tf32() })
}

/// Runs a task with each number below `count` on libtorch's threads.
pub(crate) fn each(count: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
    type Task<'t> = &'t (dyn Fn(usize) + Sync);
    /// A panic in a task ends the process, as no frame of C++ may be unwound.
    extern "C" fn call(context: *const c_void, i: i64) {
        // SAFETY: `each` passes a task that outlives the loop, and any thread may call it.
        let task = unsafe { *context.cast::<Task<'_>>() };
        task(i as usize);
    }
    // SAFETY: the context is what `call` takes it for, and the loop is over when this returns.
    check(unsafe { retort_each(count as i64, call, (&raw const task).cast()) })
}

/// Gradients of a cross-correlation for input and kernel.
pub(crate) fn conv2d_backward(
    x: &Tensor,
    w: &Tensor,
    grad: &Tensor,
    stride: usize,
    padding: [usize; 2],
    want: (bool, bool),
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let [mut dx, mut dw] = [std::ptr::null_mut(); 2];
    // SAFETY: the handles are borrowed from living tensors, and the outputs point to variables of this function.
    check(unsafe {
        retort_conv2d_backward(
            handle(x),
            handle(w),
            handle(grad),
            stride as i64,
            padding[0] as i64,
            padding[1] as i64,
            want.0,
            want.1,
            &mut dx,
            &mut dw,
        )
    })?;
    let taken = |wanted: bool, out: Out| wanted.then(|| take(out)).transpose();
    Ok((taken(want.0, dx)?, taken(want.1, dw)?))
}

/// Gradient of a layer norm over the last dimension.
pub(crate) fn layer_norm_backward(x: &Tensor, grad: &Tensor, eps: f64) -> Result<Tensor> {
    let mut dx = std::ptr::null_mut();
    // SAFETY: as above.
    check(unsafe { retort_layer_norm_backward(handle(x), handle(grad), eps, &mut dx) })?;
    take(dx)
}

/// Gradients of a group norm for input, scale and shift.
pub(crate) fn group_norm_backward(
    x: &Tensor,
    groups: usize,
    w: &Tensor,
    grad: &Tensor,
    eps: f64,
) -> Result<[Tensor; 3]> {
    let [mut dx, mut dw, mut db] = [std::ptr::null_mut(); 3];
    // SAFETY: as above.
    check(unsafe {
        retort_group_norm_backward(
            handle(x),
            groups as i64,
            handle(w),
            handle(grad),
            eps,
            &mut dx,
            &mut dw,
            &mut db,
        )
    })?;
    Ok([take(dx)?, take(dw)?, take(db)?])
}

fn handle(x: &Tensor) -> Handle {
    x.as_ptr().cast()
}

fn check(message: *const c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: `aten.cpp` returns a C string that lives until this thread's next call.
    let text = unsafe { CStr::from_ptr(message) };
    Err(failure(&text.to_string_lossy()))
}

fn take(out: Out) -> Result<Tensor> {
    if out.is_null() {
        return Err(Error::Internal("libtorch gave no tensor".into()));
    }
    // SAFETY: `aten.cpp` made this handle with `new`, as tch's own functions do, and nobody else has it.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}
