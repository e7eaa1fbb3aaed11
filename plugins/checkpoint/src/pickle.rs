//! Pickles as data: a machine that builds a graph of plain values and does nothing else.
//!
//! Python's pickles are programs whose instructions import and call functions. This machine records calls as [`Node::Call`]
//! and makes none; readers of the graph recognise the few calls that stand for tensors. Only calls that make dictionaries are
//! interpreted here, because later instructions fill them.
//!
//! In: bytes from the beginning of a pickle. Out: the graph and where the pickle ends. The graph may have cycles and shared
//! parts. Everything that grows is charged to one budget, so a small file cannot demand much memory.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Index of a node.
pub(crate) type Id = u32;

/// The most bytes of pickle that are read.
pub(crate) const MOST_BYTES: u64 = 64 << 20;
/// The longest text that is read: longer ones are not names.
const NAME: usize = 256;
/// The most nodes, elements, stack and memo entries together; 10 000 tensors with their optimiser state take a tenth.
const BUDGET: u64 = 4_000_000;

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float,
    /// UTF-8, a range of the pickle.
    Text(Range<u32>),
    /// Bytes, or an integer of more than 64 bits (little-endian); a range of the pickle.
    Bytes(Range<u32>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// Keys and values, in order; a key may come twice.
    Dict(Vec<(Id, Id)>),
    /// Something that Python would import.
    Global {
        module: Range<u32>,
        name: Range<u32>,
    },
    /// Something that Python would call with arguments.
    Call {
        callable: Id,
        arguments: Id,
    },
    /// An array or type of NumPy that Python would make by a call and give a state.
    Built {
        callable: Id,
        arguments: Id,
        state: Id,
    },
    /// Something outside the pickle.
    Persistent(Id),
}

/// What a pickle holds.
#[derive(Debug)]
pub(crate) struct Pickle {
    bytes: Arc<[u8]>,
    nodes: Vec<Node>,
    /// The value of the whole.
    pub root: Id,
    /// Position after the pickle.
    pub end: usize,
}

impl Pickle {
    /// Reads the pickle that begins at a position.
    pub fn read(bytes: Arc<[u8]>, start: usize) -> Result<Self> {
        let mut machine = Machine {
            input: Input {
                bytes: &bytes,
                position: start,
            },
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            left: BUDGET,
        };
        let root = machine.run()?;
        let (nodes, end) = (machine.nodes, machine.input.position);
        Ok(Self {
            bytes,
            nodes,
            root,
            end,
        })
    }

    /// The node of an id from this pickle.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter()
    }

    /// The text of a node, if it is a text that is not too long for a name.
    pub fn text(&self, id: Id) -> Option<&str> {
        match self.node(id) {
            Node::Text(range) => self.str(range),
            _ => None,
        }
    }

    /// A node's range as text, if it is not too long for a name.
    fn str(&self, range: &Range<u32>) -> Option<&str> {
        let bytes = self.raw(range);
        if bytes.len() > NAME {
            return None;
        }
        std::str::from_utf8(bytes).ok()
    }

    /// The bytes of a node's range.
    pub fn raw(&self, range: &Range<u32>) -> &[u8] {
        &self.bytes[range.start as usize..range.end as usize]
    }

    /// Module and name of a node, if it is an import.
    pub fn global(&self, id: Id) -> Option<(&str, &str)> {
        match self.node(id) {
            Node::Global { module, name } => Some((self.str(module)?, self.str(name)?)),
            _ => None,
        }
    }

    /// The elements of a tuple or list.
    pub fn elements(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple(elements) | Node::List(elements) => Some(elements),
            _ => None,
        }
    }

    /// A number that counts something.
    pub fn count(&self, id: Id) -> Option<u64> {
        match self.node(id) {
            Node::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }
}

struct Input<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let left = &self.bytes[self.position..];
        if n > left.len() as u64 {
            return Err(Error::format(format!(
                "the pickle is cut off: {n} bytes expected at byte {}, {} left",
                self.position,
                left.len()
            )));
        }
        self.position += n as usize;
        Ok(&left[..n as usize])
    }

    fn range(&mut self, n: u64) -> Result<Range<u32>> {
        let taken = self.take(n)?;
        let end = self.position;
        let place = |at: usize| {
            u32::try_from(at).map_err(|_| Error::Limit {
                what: "bytes of pickle",
                limit: u64::from(u32::MAX),
            })
        };
        Ok(place(end - taken.len())?..place(end)?)
    }

    fn line(&mut self) -> Result<Range<u32>> {
        let left = &self.bytes[self.position..];
        let n = left
            .iter()
            .position(|&b| b == b'\n')
            .ok_or_else(|| Error::format("the pickle is cut off within a name"))?;
        let range = self.range(n as u64)?;
        self.take(1)?;
        Ok(range)
    }

    /// A little-endian number of 1 to 8 bytes.
    fn number(&mut self, width: u64) -> Result<u64> {
        let bytes = self.take(width)?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
    }
}

struct Machine<'a> {
    input: Input<'a>,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    left: u64,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<Id> {
        loop {
            let at = self.input.position;
            let instruction = self.input.number(1)? as u8;
            if instruction == b'.' {
                return self.pop();
            }
            let known = self.structure(instruction)?
                || self.constant(instruction)?
                || self.container(instruction)?
                || self.memory(instruction)?
                || self.object(instruction, at)?;
            if !known {
                return Err(Error::format(format!(
                    "pickle instruction 0x{instruction:02x} at byte {at}: damaged, or not written by torch"
                )));
            }
        }
    }

    /// Executes an instruction about the pickle, the stack or its marks; returns whether it was one.
    fn structure(&mut self, instruction: u8) -> Result<bool> {
        match instruction {
            b'\x80' => {
                let protocol = self.input.number(1)?;
                if !(2..=5).contains(&protocol) {
                    return Err(Error::format(format!(
                        "a pickle of protocol {protocol}; torch writes 2 to 5"
                    )));
                }
            }
            b'\x95' => drop(self.input.take(8)?), // FRAME
            b'(' => {
                self.pay(1)?;
                self.marks.push(self.stack.len());
            }
            b'0' => {
                // POP takes a mark when there is nothing above it.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.push_id(top)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The same for an instruction that pushes a value.
    fn constant(&mut self, instruction: u8) -> Result<bool> {
        match instruction {
            b'N' => self.push(Node::None)?,
            b'\x88' => self.push(Node::Bool(true))?,
            b'\x89' => self.push(Node::Bool(false))?,
            b'K' => self.integer(1)?,
            b'M' => self.integer(2)?,
            b'J' => {
                let n = self.input.number(4)? as u32 as i32;
                self.push(Node::Int(i64::from(n)))?;
            }
            b'\x8a' => self.long(1)?,
            b'\x8b' => self.long(4)?,
            b'G' => {
                self.input.take(8)?;
                self.push(Node::Float)?;
            }
            b'\x8c' => self.text(1)?,
            b'X' => self.text(4)?,
            b'\x8d' => self.text(8)?,
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            b'\x8e' | b'\x96' => self.bytes(8)?,
            b'U' => self.string(1)?,
            b'T' => self.string(4)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The same for an instruction that makes or fills a tuple, list, set or dictionary.
    fn container(&mut self, instruction: u8) -> Result<bool> {
        match instruction {
            b')' => self.push(Node::Tuple(Vec::new()))?,
            b'\x85' => self.tuple(1)?,
            b'\x86' => self.tuple(2)?,
            b'\x87' => self.tuple(3)?,
            b't' => {
                let elements = self.pop_mark()?;
                self.push(Node::Tuple(elements))?;
            }
            b']' | b'\x8f' => self.push(Node::List(Vec::new()))?, // a set is as good as a list
            b'l' | b'\x91' => {
                let elements = self.pop_mark()?;
                self.push(Node::List(elements))?;
            }
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b'd' => {
                let elements = self.pop_mark()?;
                self.push(Node::Dict(pairs(&elements)?))?;
            }
            b'a' => {
                let element = self.pop()?;
                self.append(&[element])?;
            }
            b'e' | b'\x90' => {
                let elements = self.pop_mark()?;
                self.append(&elements)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![(key, value)])?;
            }
            b'u' => {
                let elements = self.pop_mark()?;
                self.set_items(pairs(&elements)?)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The same for an instruction that stores a value in the memo or fetches one from it.
    fn memory(&mut self, instruction: u8) -> Result<bool> {
        match instruction {
            b'q' => self.remember(1)?,
            b'r' => self.remember(4)?,
            b'\x94' => {
                let key = self.memo.len() as u32;
                self.remember_as(key)?;
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The same for an instruction, at this byte, by which Python would import, call or fill something.
    fn object(&mut self, instruction: u8, at: usize) -> Result<bool> {
        match instruction {
            b'c' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                self.push(Node::Global { module, name })?;
            }
            b'\x93' => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Text(module), Node::Text(name)) = (self.node(module), self.node(name))
                else {
                    return Err(Error::format(format!("no name to import at byte {at}")));
                };
                let (module, name) = (module.clone(), name.clone());
                self.push(Node::Global { module, name })?;
            }
            b'R' | b'\x81' => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments)?;
            }
            b'\x92' => {
                let (_keywords, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, arguments)?;
            }
            b'b' => {
                let state = self.pop()?;
                let object = self.top()?;
                self.build(object, state);
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn pay(&mut self, n: usize) -> Result<()> {
        self.left = self.left.checked_sub(n as u64).ok_or(Error::Limit {
            what: "values in a pickle",
            limit: BUDGET,
        })?;
        Ok(())
    }

    fn node(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }

    fn push(&mut self, node: Node) -> Result<()> {
        self.pay(1)?;
        let id = self.nodes.len() as Id;
        self.nodes.push(node);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Result<()> {
        self.pay(1)?;
        self.stack.push(id);
        Ok(())
    }

    /// Height of the stack below which nothing may be taken.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id> {
        let empty = || Error::format("the pickle takes more from its stack than is there");
        if self.stack.len() <= self.floor() {
            return Err(empty());
        }
        self.stack.pop().ok_or_else(empty)
    }

    fn top(&mut self) -> Result<Id> {
        let top = self.pop()?;
        self.stack.push(top);
        Ok(top)
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self
            .marks
            .pop()
            .ok_or_else(|| Error::format("the pickle ends a group that never began"))?;
        let elements = self.stack.split_off(mark);
        self.pay(elements.len())?;
        Ok(elements)
    }

    fn integer(&mut self, width: u64) -> Result<()> {
        let n = self.input.number(width)?;
        self.push(Node::Int(n as i64))
    }

    fn long(&mut self, width: u64) -> Result<()> {
        let n = self.input.number(width)?;
        let range = self.input.range(n)?;
        let bytes = &self.input.bytes[range.start as usize..range.end as usize];
        if bytes.len() > 8 {
            return self.push(Node::Bytes(range));
        }
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(wide)))
    }

    fn text(&mut self, width: u64) -> Result<()> {
        let n = self.input.number(width)?;
        let at = self.input.position;
        let range = self.input.range(n)?;
        if std::str::from_utf8(&self.input.bytes[at..self.input.position]).is_err() {
            return Err(Error::format(format!("text at byte {at} is not UTF-8")));
        }
        self.push(Node::Text(range))
    }

    fn bytes(&mut self, width: u64) -> Result<()> {
        let n = self.input.number(width)?;
        let range = self.input.range(n)?;
        self.push(Node::Bytes(range))
    }

    /// A string of Python 2: text where it can be.
    fn string(&mut self, width: u64) -> Result<()> {
        let n = self.input.number(width)?;
        let at = self.input.position;
        let range = self.input.range(n)?;
        let is_text = std::str::from_utf8(&self.input.bytes[at..self.input.position]).is_ok();
        self.push(if is_text {
            Node::Text(range)
        } else {
            Node::Bytes(range)
        })
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let mut elements = (0..n).map(|_| self.pop()).collect::<Result<Vec<Id>>>()?;
        elements.reverse();
        self.pay(n)?;
        self.push(Node::Tuple(elements))
    }

    /// Appends to the list on top; an object that is filled like a list becomes one.
    fn append(&mut self, elements: &[Id]) -> Result<()> {
        self.pay(elements.len())?;
        let top = self.top()?;
        let node = &mut self.nodes[top as usize];
        if let Node::Call { .. } = node {
            *node = Node::List(Vec::new());
        }
        let Node::List(list) = node else {
            return Err(Error::format(
                "the pickle appends to a value that is not a list",
            ));
        };
        list.extend_from_slice(elements);
        Ok(())
    }

    /// Fills the dictionary on top; an object that is filled like a dictionary becomes one.
    fn set_items(&mut self, items: Vec<(Id, Id)>) -> Result<()> {
        self.pay(2 * items.len())?;
        let top = self.top()?;
        let node = &mut self.nodes[top as usize];
        if let Node::Call { .. } = node {
            *node = Node::Dict(Vec::new());
        }
        let Node::Dict(dict) = node else {
            return Err(Error::format(
                "the pickle sets items of a value that is not a dictionary",
            ));
        };
        dict.extend(items);
        Ok(())
    }

    fn remember(&mut self, width: u64) -> Result<()> {
        let key = self.input.number(width)? as u32;
        self.remember_as(key)
    }

    fn remember_as(&mut self, key: u32) -> Result<()> {
        self.pay(1)?;
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, width: u64) -> Result<()> {
        let key = self.input.number(width)? as u32;
        let id = self.memo.get(&key).copied().ok_or_else(|| {
            Error::format(format!("the pickle reads memo {key} before writing it"))
        })?;
        self.push_id(id)
    }

    /// BUILD would set an object's attributes. NumPy's arrays keep their elements there; nothing else there contains weights.
    fn build(&mut self, object: Id, state: Id) {
        let &Node::Call {
            callable,
            arguments,
        } = self.node(object)
        else {
            return;
        };
        let of_numpy = match self.node(callable) {
            Node::Global { module, .. } => {
                self.input.bytes[module.start as usize..module.end as usize].starts_with(b"numpy")
            }
            _ => false,
        };
        if of_numpy {
            self.nodes[object as usize] = Node::Built {
                callable,
                arguments,
                state,
            };
        }
    }

    fn call(&mut self, callable: Id, arguments: Id) -> Result<()> {
        let is_dictionary = match self.node(callable) {
            Node::Global { module, name } => {
                let part = |r: &Range<u32>| &self.input.bytes[r.start as usize..r.end as usize];
                matches!(
                    (part(module), part(name)),
                    (b"collections", b"OrderedDict" | b"defaultdict" | b"Counter")
                        | (b"builtins" | b"__builtin__", b"dict")
                )
            }
            _ => false,
        };
        if !is_dictionary {
            return self.push(Node::Call {
                callable,
                arguments,
            });
        }
        // `OrderedDict([(key, value), ..])`; the list may be empty or left out.
        let list = self.elements(arguments).and_then(|all| all.last());
        let list = list.and_then(|&list| self.elements(list)).unwrap_or(&[]);
        let pair = |&id: &Id| match self.elements(id)? {
            &[key, value] => Some((key, value)),
            _ => None,
        };
        let cost = 2 * list.len();
        let items = list.iter().filter_map(pair).collect();
        self.pay(cost)?;
        self.push(Node::Dict(items))
    }

    fn elements(&self, id: Id) -> Option<&[Id]> {
        match self.node(id) {
            Node::Tuple(elements) | Node::List(elements) => Some(elements),
            _ => None,
        }
    }
}

fn pairs(elements: &[Id]) -> Result<Vec<(Id, Id)>> {
    let (pairs, []) = elements.as_chunks::<2>() else {
        return Err(Error::format("the pickle has a key without a value"));
    };
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Pickle> {
        Pickle::read(bytes.into(), 0)
    }

    #[test]
    fn numbers_keep_their_sign() {
        let check = |bytes: &[u8], expected: i64| {
            let pickle = read(bytes).unwrap();
            assert_eq!(pickle.node(pickle.root), &Node::Int(expected));
        };
        check(b"\x80\x02K\xff.", 255);
        check(b"\x80\x02M\x00\x01.", 256);
        check(b"\x80\x02J\xff\xff\xff\xff.", -1);
        check(b"\x80\x02\x8a\x00.", 0);
        check(b"\x80\x02\x8a\x01\xff.", -1);
        check(b"\x80\x02\x8a\x03\x00\x00\x01.", 65536);
    }

    #[test]
    fn calls_are_recorded_and_filled_objects_are_dictionaries() {
        let pickle = read(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.").unwrap();
        let Node::Call { callable, .. } = pickle.node(pickle.root) else {
            panic!("{pickle:?}")
        };
        assert_eq!(pickle.global(*callable), Some(("os", "system")));
        let pickle = read(b"\x80\x02cx\nY\n)\x81K\x01K\x02s.").unwrap();
        assert!(matches!(pickle.node(pickle.root), Node::Dict(items) if items.len() == 1));
    }

    #[test]
    fn what_asks_for_much_memory_is_refused() {
        let check = |instruction: &[u8]| {
            let bytes = [b"\x80\x02N".as_slice(), &instruction.repeat(5_000_000)].concat();
            let error = read(&bytes).unwrap_err();
            assert!(matches!(error, Error::Limit { .. }), "{error}");
        };
        check(b"2"); // DUP
        check(b"(");
        check(b"]");
        check(b"q\x01");
    }

    #[test]
    fn broken_pickles_are_errors() {
        let check = |bytes: &[u8], expected: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(b"", "cut off");
        check(b"\x80\x02X\xff\xff\xff\x7fab", "cut off");
        check(b"\x80\x02.", "more from its stack");
        check(b"\x80\x02h\x07.", "reads memo 7 before writing it");
        check(b"\x80\x02I1\n.", "not written by torch");
        check(b"\x80\x02(K\x01d.", "without a value");
        check(b"\x80\x02e.", "never began");
        check(b"\x80\x09.", "protocol 9");
    }
}
