//! Event files as TensorBoard reads them: records of protocol buffers.
//!
//! In: scalars and PNG pictures. Out: bytes, as they come. A record is its length (u64), the masked CRC-32C of that, the
//! data and the masked CRC-32C of these, all little-endian (TensorFlow's `core/lib/io/record_writer.h`). The data is an
//! `Event` (`core/util/event.proto`), of which we write four fields and, of the summaries in it, scalars and images: too
//! little for a library and its code generator.

use std::io::{self, Write};

/// The CRC of records.
static CRC: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// An event file being written.
#[derive(Debug)]
pub struct EventFile<W> {
    to: W,
}

impl<W: Write> EventFile<W> {
    /// A file of events that happened from `time` on, in seconds since 1970.
    ///
    /// # Errors
    /// It cannot be written; so of all of these.
    pub fn new(to: W, time: f64) -> io::Result<Self> {
        let mut file = Self { to };
        let mut event = Message::event(time, 0);
        event.text(3, "brain.Event:2");
        file.record(&event.0)?;
        Ok(file)
    }

    /// Adds a point of a series. TensorBoard keeps 32-bit floats.
    pub fn scalar(&mut self, tag: &str, step: i64, time: f64, value: f64) -> io::Result<()> {
        let mut content = Message::default();
        content.text(1, tag);
        content.float(2, value as f32);
        self.value(step, time, &content)
    }

    /// Adds a PNG picture.
    pub fn image(
        &mut self,
        tag: &str,
        step: i64,
        time: f64,
        size: (u32, u32),
        png: &[u8],
    ) -> io::Result<()> {
        let mut image = Message::default();
        image.integer(1, size.1.into());
        image.integer(2, size.0.into());
        // RGB.
        image.integer(3, 3);
        image.bytes(4, png);
        let mut content = Message::default();
        content.text(1, tag);
        content.bytes(4, &image.0);
        self.value(step, time, &content)
    }

    /// What it was written to, with all of it.
    pub fn finish(mut self) -> io::Result<W> {
        self.to.flush()?;
        Ok(self.to)
    }

    fn value(&mut self, step: i64, time: f64, content: &Message) -> io::Result<()> {
        let mut summary = Message::default();
        summary.bytes(1, &content.0);
        let mut event = Message::event(time, step);
        event.bytes(5, &summary.0);
        self.record(&event.0)
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        self.to.write_all(&length)?;
        self.to.write_all(&masked_crc(&length))?;
        self.to.write_all(data)?;
        self.to.write_all(&masked_crc(data))
    }
}

/// Width and height of a PNG picture; none when the bytes are no PNG.
pub fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let rest = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n")?;
    let number = |at: usize| Some(u32::from_be_bytes(*rest.get(at..)?.first_chunk()?));
    (rest.get(4..8)? == b"IHDR").then_some((number(8)?, number(12)?))
}

fn masked_crc(data: &[u8]) -> [u8; 4] {
    let crc = CRC.checksum(data);
    crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A protocol buffer: fields one after the other, each behind its number and type.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn event(time: f64, step: i64) -> Self {
        let mut event = Self::default();
        event.key(1, 1);
        event.0.extend_from_slice(&time.to_le_bytes());
        event.integer(2, step.cast_unsigned());
        event
    }

    fn text(&mut self, field: u32, text: &str) {
        self.bytes(field, text.as_bytes());
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn float(&mut self, field: u32, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn integer(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn key(&mut self, field: u32, kind: u32) {
        self.varint(u64::from(field << 3 | kind));
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_as_tensorflow_writes_it() {
        // Written by tensorboard 2.21's own EventFileWriter for `Event(wall_time=1.5, step=7)` of a scalar 0.25.
        let mut file = EventFile::new(Vec::new(), 1.5).unwrap();
        let first = file.to.len();
        file.scalar("a", 7, 1.5, 0.25).unwrap();
        let bytes = file.finish().unwrap();
        let record = &bytes[first..];
        assert_eq!(record[..8], 23_u64.to_le_bytes());
        let data = &record[12..record.len() - 4];
        let expected = b"\x09\0\0\0\0\0\0\xf8\x3f\x10\x07\x2a\x0a\x0a\x08\x0a\x01a\x15\0\0\x80\x3e";
        assert_eq!(data, expected);
        // The check value of CRC-32C, masked.
        let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(b"123456789"), masked.to_le_bytes());
    }

    #[test]
    fn the_size_of_a_picture_is_read_from_its_header() {
        let png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x03\0\0\x01\0rest";
        assert_eq!(png_size(png), Some((3, 256)));
        assert_eq!(png_size(b"GIF89a"), None);
        assert_eq!(png_size(&png[..20]), None);
    }
}
