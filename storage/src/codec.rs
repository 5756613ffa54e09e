//! The byte writer and checked reader under commands and row values: LEB128 numbers, length-prefixed strings.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::error::Fault;

pub(crate) struct Writer(BytesMut);

impl Writer {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Writer(BytesMut::with_capacity(bytes))
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.put_u8(value);
    }

    pub(crate) fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.put_u8((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.put_u8((value & 0x7f) as u8);
    }

    /// Zigzag, so that small negative numbers stay short.
    pub(crate) fn i64(&mut self, value: i64) {
        self.varint(((value << 1) ^ (value >> 63)).cast_unsigned());
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.varint(value.len() as u64);
        self.0.put_slice(value);
    }

    pub(crate) fn strings(&mut self, values: &[String]) {
        self.varint(values.len() as u64);
        for value in values {
            self.bytes(value.as_bytes());
        }
    }

    /// The rest of the buffer, without a length: the last field of a row.
    pub(crate) fn tail(&mut self, value: &[u8]) {
        self.0.put_slice(value);
    }

    pub(crate) fn finish(self) -> Bytes {
        self.0.freeze()
    }
}

/// Reads what [`Writer`] wrote; every shortfall is a [`Fault::Corrupt`] that names `what`.
pub(crate) struct Reader {
    rest: Bytes,
    what: &'static str,
}

impl Reader {
    pub(crate) fn new(bytes: Bytes, what: &'static str) -> Self {
        Reader { rest: bytes, what }
    }

    pub(crate) fn corrupt(&self, detail: &'static str) -> Fault {
        tracing::error!(what = self.what, detail, "undecodable bytes");
        Fault::Corrupt { what: detail, key: self.rest.slice(..self.rest.len().min(32)).to_vec() }
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Fault> {
        if self.rest.is_empty() {
            return Err(self.corrupt(self.what));
        }
        Ok(self.rest.get_u8())
    }

    pub(crate) fn bool(&mut self) -> Result<bool, Fault> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.corrupt("boolean")),
        }
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            if shift == 63 && byte > 1 {
                return Err(self.corrupt("number"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.corrupt("number"))
    }

    pub(crate) fn varint_u32(&mut self) -> Result<u32, Fault> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_| self.corrupt("32-bit number"))
    }

    pub(crate) fn i64(&mut self) -> Result<i64, Fault> {
        let value = self.varint()?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    pub(crate) fn bytes(&mut self) -> Result<Bytes, Fault> {
        let length = self.varint()?;
        match usize::try_from(length) {
            Ok(length) if length <= self.rest.len() => Ok(self.rest.split_to(length)),
            _ => Err(self.corrupt("length")),
        }
    }

    pub(crate) fn string(&mut self) -> Result<String, Fault> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.corrupt("text"))
    }

    /// A counted list. The count is believed only as far as bytes follow.
    pub(crate) fn list<T>(&mut self, mut element: impl FnMut(&mut Self) -> Result<T, Fault>) -> Result<Vec<T>, Fault> {
        let count = self.varint()?;
        if count > self.rest.len() as u64 {
            return Err(self.corrupt("count"));
        }
        (0..count).map(|_| element(self)).collect()
    }

    pub(crate) fn tail(&mut self) -> Bytes {
        std::mem::take(&mut self.rest)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), Fault> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.corrupt("trailing bytes")) }
    }
}
