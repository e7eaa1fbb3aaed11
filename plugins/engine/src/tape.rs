//! Reverse-mode differentiation over a [`Backend`]: written once, so that backends need no gradients of their own.
//!
//! A [`Variable`] is a value and, if it depends on a trainable parameter, the node that propagates its gradient. Model code
//! is the same for training and inference: without trainable parameters no nodes are created and nothing is kept. Nodes are
//! numbered on creation, so descending numbers are a topological order and [`backward`] is one loop over a heap. A node is
//! dropped as soon as it has passed on its gradient, so memory is freed during the backward pass. Deliberately absent: second
//! derivatives.

mod gradient;
mod operations;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Backend, Binary, Tensors};
use crate::error::{Error, Result};
use crate::tape::gradient::{Gradient, merged, whole};

/// Computes the gradients of a node's parents, in their order, from its own, and from what is known of the first parent's if
/// it adds to that ([`Node::adds`]).
type Vjp<T> = Box<dyn FnOnce(&T, Option<&T>) -> Result<Vec<Option<Gradient<T>>>> + Send + Sync>;

struct Node<T> {
    id: u64,
    parents: Vec<Option<Arc<Node<T>>>>,
    vjp: Option<Vjp<T>>,
    /// Whether `vjp` adds the first parent's gradient to what other uses of that parent have given, in the same pass over
    /// memory. Otherwise the tape adds them.
    adds: bool,
}

/// A tensor that may want a gradient. Cheap to clone.
pub struct Variable<B: Backend> {
    value: B::Tensor,
    node: Option<Arc<Node<B::Tensor>>>,
}

impl<B: Backend> Clone for Variable<B> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            node: self.node.clone(),
        }
    }
}

impl<B: Backend> std::fmt::Debug for Variable<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Variable({:?}, {})",
            self.shape(),
            if self.node.is_some() {
                "with gradient"
            } else {
                "constant"
            }
        )
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Gradients of a scalar for some of the parameters it depends on.
///
/// Fails if the scalar does not depend on a parameter: a silent zero would hide a broken model.
pub fn backward<B: Backend>(
    loss: Variable<B>,
    params: &[(String, Variable<B>)],
) -> Result<Vec<B::Tensor>> {
    let mut leaves = leaves(params);
    let (value, node) = (loss.value, loss.node);
    if let Some(node) = node {
        send_back::<B>(node, seed::<B>(value)?, &mut leaves, None)?;
    }
    collected(params, leaves)
}

/// The same; `ready` gets each parameter's number and gradient as soon as the gradient is complete, during the pass. The
/// order depends only on the graph.
pub fn backward_as_ready<B: Backend>(
    loss: Variable<B>,
    params: &[(String, Variable<B>)],
    ready: &mut dyn FnMut(usize, B::Tensor) -> Result<()>,
) -> Result<()> {
    let mut leaves = leaves(params);
    let mut is_known = vec![false; params.len()];
    let (value, node) = (loss.value, loss.node);
    if let Some(node) = node {
        let numbers = params.iter().enumerate();
        let numbers = numbers.filter_map(|(i, (_, p))| Some((p.node.as_ref()?.id, i)));
        let numbers: BTreeMap<u64, usize> = numbers.collect();
        let mut watch = GradientHook {
            open: uses::<B>(&node, &leaves),
            ready: &mut |id, gradient| match numbers.get(&id) {
                Some(&number) => {
                    is_known[number] = true;
                    ready(number, gradient)
                }
                None => Ok(()),
            },
        };
        send_back::<B>(node, seed::<B>(value)?, &mut leaves, Some(&mut watch))?;
    }
    match is_known.iter().position(|known| !known) {
        None => Ok(()),
        Some(number) => Err(no_gradient(&params[number].0)),
    }
}

fn no_gradient(name: &str) -> Error {
    Error::Internal(format!(
        "the parameter {name} had no part in the loss: no gradient"
    ))
}

/// Gradients by leaf number, as far as they are known.
type Leaves<B> = BTreeMap<u64, Option<<B as Tensors>::Tensor>>;

fn leaves<B: Backend>(params: &[(String, Variable<B>)]) -> Leaves<B> {
    let ids = params.iter().filter_map(|(_, p)| Some(p.node.as_ref()?.id));
    ids.map(|id| (id, None)).collect()
}

fn seed<B: Backend>(value: B::Tensor) -> Result<B::Tensor> {
    B::of(&value).floats(&[1.0], &B::shape(&value))
}

fn collected<B: Backend>(
    params: &[(String, Variable<B>)],
    mut leaves: Leaves<B>,
) -> Result<Vec<B::Tensor>> {
    params
        .iter()
        .map(|(name, p)| {
            p.node
                .as_ref()
                .and_then(|n| leaves.remove(&n.id).flatten())
                .ok_or_else(|| no_gradient(name))
        })
        .collect()
}

/// The callback for complete gradients of leaves.
struct GradientHook<'a, T> {
    /// Unprocessed uses of each leaf.
    open: BTreeMap<u64, usize>,
    ready: &'a mut dyn FnMut(u64, T) -> Result<()>,
}

impl<T> GradientHook<'_, T> {
    /// Marks a use of a node as processed; returns whether it was the last use of a leaf.
    fn is_last_use(&mut self, id: u64) -> bool {
        let Some(open) = self.open.get_mut(&id) else {
            return false;
        };
        *open -= 1;
        *open == 0
    }
}

/// How often each leaf is used in the graph of a node.
fn uses<B: Backend>(node: &Arc<Node<B::Tensor>>, leaves: &Leaves<B>) -> BTreeMap<u64, usize> {
    let (mut uses, mut seen, mut open) = (BTreeMap::new(), BTreeSet::new(), vec![node]);
    while let Some(node) = open.pop() {
        for parent in node.parents.iter().flatten() {
            if leaves.contains_key(&parent.id) {
                *uses.entry(parent.id).or_default() += 1;
            } else if seen.insert(parent.id) {
                open.push(parent);
            }
        }
    }
    uses
}

/// Propagates a gradient from a node back to the leaves, which accumulate it.
fn send_back<B: Backend>(
    from: Arc<Node<B::Tensor>>,
    gradient: B::Tensor,
    leaves: &mut Leaves<B>,
    mut watch: Option<&mut GradientHook<'_, B::Tensor>>,
) -> Result<()> {
    let mut open = BTreeMap::from([(from.id, (from, Gradient::Whole(gradient)))]);
    while let Some((id, (node, gradient))) = open.pop_last() {
        let gradient = whole::<B>(gradient)?;
        if let Some(slot) = leaves.get_mut(&id) {
            match &mut watch {
                // It has not been reported yet: it is the loss itself, or some of its uses had no gradient.
                Some(watch) => (watch.ready)(id, gradient)?,
                None => *slot = Some(gradient),
            }
            continue;
        }
        // Every consumer has a higher number and has been dropped, unless the caller still holds the value.
        let Ok(node) = Arc::try_unwrap(node) else {
            return Err(Error::Internal(
                "backward: a tensor of the graph is still held; drop it or detach it".into(),
            ));
        };
        let Some(vjp) = node.vjp else { continue };
        let known = match node.parents.first() {
            Some(Some(parent)) if node.adds => open.remove(&parent.id),
            _ => None,
        };
        let known = known.map(|(_, known)| whole::<B>(known)).transpose()?;
        let gradients = vjp(&gradient, known.as_ref())?;
        for (parent, gradient) in node.parents.into_iter().zip(gradients) {
            let Some(parent) = parent else { continue };
            let id = parent.id;
            if let Some(gradient) = gradient {
                let sum = match open.remove(&id) {
                    Some((_, known)) => merged::<B>(known, gradient)?,
                    None => gradient,
                };
                open.insert(id, (parent, sum));
            }
            if let Some(watch) = &mut watch
                && watch.is_last_use(id)
                && let Some((_, gradient)) = open.remove(&id)
            {
                (watch.ready)(id, whole::<B>(gradient)?)?;
            }
        }
    }
    Ok(())
}

/// The nodes older than a number on which a node depends directly, or through nodes that are not older.
fn made_before<T>(node: &Arc<Node<T>>, first: u64) -> BTreeMap<u64, Arc<Node<T>>> {
    let (mut found, mut seen) = (BTreeMap::new(), BTreeSet::new());
    let mut open = vec![node];
    while let Some(node) = open.pop() {
        if node.id < first {
            found.insert(node.id, Arc::clone(node));
        } else if seen.insert(node.id) {
            open.extend(node.parents.iter().flatten());
        }
    }
    found
}

impl<B: Backend> Variable<B> {
    /// A value without a gradient.
    pub fn constant(value: B::Tensor) -> Self {
        Self { value, node: None }
    }

    /// A leaf with a gradient.
    pub fn parameter(value: B::Tensor) -> Self {
        Self {
            value,
            node: Some(Arc::new(Node {
                id: next_id(),
                parents: Vec::new(),
                vjp: None,
                adds: false,
            })),
        }
    }

    /// A part of a network. With `recompute` none of its activations are kept: the backward pass recomputes them from the
    /// part's inputs (activation checkpointing). That costs a forward pass; memory then holds the activations of one such
    /// part at a time. Gradients are bit-identical if no operation outside the part shares an input with more than one
    /// operation inside.
    pub fn segment(
        recompute: bool,
        part: impl Fn() -> Result<Self> + Send + Sync + 'static,
    ) -> Result<Self> {
        if !recompute {
            return part();
        }
        let first = next_id();
        let Self { value, node } = part()?;
        let Some(node) = node else {
            return Ok(Self::constant(value));
        };
        let parents = made_before(&node, first);
        // Here the activations are dropped.
        drop(node);
        let ids: Vec<u64> = parents.keys().copied().collect();
        let vjp = move |g: &B::Tensor, _: Option<&B::Tensor>| {
            let mut leaves: Leaves<B> = ids.iter().map(|&id| (id, None)).collect();
            if let Some(node) = part()?.node {
                send_back::<B>(node, g.clone(), &mut leaves, None)?;
            }
            Ok(wholes(leaves.into_values()))
        };
        Ok(Self {
            value,
            node: Some(Arc::new(Node {
                id: next_id(),
                parents: parents.into_values().map(Some).collect(),
                vjp: Some(Box::new(vjp)),
                adds: false,
            })),
        })
    }

    /// A scalar that is a sum over pieces of the first dimension, of at most `most` entries each. `of` computes a piece's
    /// term, which may depend on no other parameter. The gradient is computed together with the value, piece by piece: memory
    /// holds the activations of one piece, and nothing is computed twice.
    pub fn sum_of_pieces(
        &self,
        most: usize,
        mut of: impl FnMut(&Self, Range<usize>) -> Result<Self>,
    ) -> Result<Self> {
        let shape = self.shape();
        let (mut sum, mut gradients) = (None, Vec::new());
        for start in (0..shape[0]).step_by(most.max(1)) {
            let len = most.max(1).min(shape[0] - start);
            let piece = B::narrow(&self.value, 0, start, len)?;
            let leaf = match self.wants() {
                true => Self::parameter(piece),
                false => Self::constant(piece),
            };
            let part = of(&leaf, start..start + len)?;
            sum = Some(match sum {
                Some(sum) => B::binary(&sum, &part.value, Binary::Add)?,
                None => part.value.clone(),
            });
            if self.wants() {
                gradients.extend(backward(part, &[(String::new(), leaf)])?);
            }
        }
        let sum = sum.ok_or_else(|| Error::Internal("a sum of no pieces".into()))?;
        Ok(Self::from_op(sum, &[self], move |g| {
            let whole = B::cat(&gradients.iter().collect::<Vec<_>>(), 0)?;
            let g = B::reshape(g, &vec![1; shape.len()])?;
            Ok(vec![Some(B::binary(&whole, &g, Binary::Mul)?)])
        }))
    }

    /// A scalar function of this value, whose `value` and gradient are already known.
    pub fn known(&self, value: B::Tensor, gradient: B::Tensor) -> Self {
        let dims = self.shape().len();
        Self::from_op(value, &[self], move |g| {
            let g = B::reshape(g, &vec![1; dims])?;
            Ok(vec![Some(B::binary(&gradient, &g, Binary::Mul)?)])
        })
    }

    /// The tensor.
    pub fn value(&self) -> &B::Tensor {
        &self.value
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> Vec<usize> {
        B::shape(&self.value)
    }

    /// The same value, detached from the graph.
    pub fn detach(&self) -> Self {
        Self::constant(self.value.clone())
    }

    /// Whether a gradient flows through it.
    pub fn wants_gradient(&self) -> bool {
        self.node.is_some()
    }

    /// A result of parents, with its backward function.
    fn from_op(
        value: B::Tensor,
        parents: &[&Variable<B>],
        vjp: impl FnOnce(&B::Tensor) -> Result<Vec<Option<B::Tensor>>> + Send + Sync + 'static,
    ) -> Self {
        let vjp = move |g: &B::Tensor, _: Option<&B::Tensor>| Ok(wholes(vjp(g)?));
        Self::made(value, parents, Box::new(vjp), false)
    }

    /// The same; `vjp` also gets what is known of the first parent's gradient, and adds that parent's gradient to it.
    fn from_adding_op(
        value: B::Tensor,
        parents: &[&Variable<B>],
        vjp: impl FnOnce(&B::Tensor, Option<&B::Tensor>) -> Result<Vec<Option<B::Tensor>>>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        let vjp = move |g: &B::Tensor, known: Option<&B::Tensor>| Ok(wholes(vjp(g, known)?));
        Self::made(value, parents, Box::new(vjp), true)
    }

    fn made(value: B::Tensor, parents: &[&Variable<B>], vjp: Vjp<B::Tensor>, adds: bool) -> Self {
        if parents.iter().all(|p| p.node.is_none()) {
            return Self::constant(value);
        }
        let parents = parents.iter().map(|p| p.node.clone()).collect();
        Self {
            value,
            node: Some(Arc::new(Node {
                id: next_id(),
                parents,
                vjp: Some(vjp),
                adds,
            })),
        }
    }

    fn wants(&self) -> bool {
        self.node.is_some()
    }
}

/// Gradients that are known as a whole.
fn wholes<T>(gradients: impl IntoIterator<Item = Option<T>>) -> Vec<Option<Gradient<T>>> {
    let gradients = gradients.into_iter();
    gradients.map(|g| g.map(Gradient::Whole)).collect()
}

/// The value of a tensor with one element.
pub fn scalar<B: Backend>(x: &B::Tensor) -> Result<f64> {
    let values = B::to_floats(x)?;
    values
        .first()
        .map(|&x| f64::from(x))
        .ok_or_else(|| Error::Internal("an empty scalar".into()))
}
