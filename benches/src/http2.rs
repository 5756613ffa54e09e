//! The client half of gRPC over HTTP/2, without any input or output of its own, for one connection of a load generator.
//!
//! A load generator that shares its machine with the server measures itself unless it is far cheaper than what it drives.
//! A general client spends 15 to 40 µs of CPU per call on tasks, header maps and bodies; this one spends a few, because
//! it knows its calls in advance: their header blocks are bytes prepared once, answers are looked at where they were
//! received, and nothing is woken per call.
//!
//! Life of a call: [`Http2::open`] appends HEADERS and DATA frames to [`Http2::output`]; the owner writes those bytes to
//! the socket and gives what it reads to [`Http2::receive`], which calls back with each message and with the end of each call.
//!
//! Like the usual clients, it lets the server remember its headers (a call's headers are eight bytes from the second on). It
//! forbids the server to do the same, so that equal header blocks mean equal headers and are decoded once.
//!
//! Left out: server push (refused), priorities (ignored), continuation of header blocks beyond a frame, TLS (the owner's).

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, BytesMut};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;
/// What a peer takes in one frame unless it says otherwise; it never has to be asked for more.
const FRAME_BYTES_MAX: usize = 16_384;
const WINDOW_BYTES_DEFAULT: i64 = 65_535;
/// What the server may send ahead of being read. The generator reads everything at once, so this is no bound on its memory
/// but keeps window updates rare.
const RECEIVE_WINDOW_BYTES: u32 = 1 << 30;
/// A gRPC message starts with a flag and four bytes of length.
const PREFIX_BYTES: usize = 5;
/// Different header blocks remembered; a server that makes more is decoded each time.
const BLOCKS_MAX: usize = 64;

mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
}

mod flag {
    pub(super) const END_STREAM: u8 = 1;
    pub(super) const ACK: u8 = 1;
    pub(super) const END_HEADERS: u8 = 4;
    pub(super) const PADDED: u8 = 8;
    pub(super) const PRIORITY: u8 = 0x20;
}

/// A call, as its connection numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallId(u32);

/// What came in for a call. `tag` is what it was opened with.
#[derive(Debug)]
pub enum Incoming<'a> {
    Message {
        tag: u32,
        message: &'a [u8],
    },
    /// The call is over; nothing more comes for it.
    End {
        tag: u32,
        status: &'a CallStatus,
    },
}

/// How a call ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallStatus {
    /// gRPC's code; 0 = OK.
    pub code: i32,
    pub message: String,
}

/// The connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("the server ended the connection: HTTP/2 error {0}")]
    GoAway(u32),
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
}

/// See the module's essay.
pub struct Http2 {
    output: BytesMut,
    headers: RequestHeaders,
    decoder: loona_hpack::Decoder<'static>,
    /// What a header block says of the call, if it says how it ended.
    blocks: HashMap<Vec<u8>, CallStatus>,
    next_id: u32,
    calls: HashMap<u32, Call>,
    send_window: i64,
    /// Of a new call.
    initial_window: i64,
    /// Calls with bytes that wait for the connection's window, oldest first.
    blocked: VecDeque<u32>,
    unacknowledged: u32,
}

struct Call {
    tag: u32,
    send_window: i64,
    /// What a window holds back; almost always empty.
    unsent: BytesMut,
    closing: bool,
    closed: bool,
    /// A message of which a part has come.
    partial: BytesMut,
    unacknowledged: u32,
}

impl Http2 {
    /// A connection on which nothing has been sent. `authority` is `host:port`.
    pub fn new(scheme: &str, authority: &str) -> Self {
        let mut output = BytesMut::with_capacity(1 << 16);
        output.extend_from_slice(PREFACE);
        frame(&mut output, kind::SETTINGS, 0, 0, 18);
        for (id, value) in [(1u16, 0u32), (2, 0), (4, RECEIVE_WINDOW_BYTES)] {
            output.extend_from_slice(&id.to_be_bytes());
            output.extend_from_slice(&value.to_be_bytes());
        }
        window_update(&mut output, 0, RECEIVE_WINDOW_BYTES);
        Http2 {
            output,
            headers: RequestHeaders::new(scheme, authority),
            decoder: loona_hpack::Decoder::new(),
            blocks: HashMap::new(),
            next_id: 1,
            calls: HashMap::new(),
            send_window: WINDOW_BYTES_DEFAULT,
            initial_window: WINDOW_BYTES_DEFAULT,
            blocked: VecDeque::new(),
            unacknowledged: 0,
        }
    }

    /// Bytes for the socket; the owner takes off what it has written.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Calls that have not ended.
    pub fn open_calls(&self) -> usize {
        self.calls.len()
    }

    /// Starts a call with its first message. `last`: there is no other message.
    pub fn open(&mut self, path: &'static str, tag: u32, message: &impl prost::Message, last: bool) -> CallId {
        let id = self.next_id;
        self.next_id += 2;
        let start = self.output.len();
        frame(&mut self.output, kind::HEADERS, flag::END_HEADERS, id, 0);
        self.headers.encode(path, &mut self.output);
        let length = self.output.len() - start - FRAME_HEADER_BYTES;
        set_frame_length(&mut self.output, start, length);
        self.calls.insert(
            id,
            Call {
                tag,
                send_window: self.initial_window,
                unsent: BytesMut::new(),
                closing: false,
                closed: false,
                partial: BytesMut::new(),
                unacknowledged: 0,
            },
        );
        self.send(CallId(id), message, last);
        CallId(id)
    }

    /// Sends one more message. Nothing happens if the call has ended.
    pub fn send(&mut self, id: CallId, message: &impl prost::Message, last: bool) {
        let Some(call) = self.calls.get_mut(&id.0) else { return };
        let length = message.encoded_len();
        let total = PREFIX_BYTES + length;
        let window = call.send_window.min(self.send_window);
        let fits = i64::try_from(total).is_ok_and(|total| total <= window) && total <= FRAME_BYTES_MAX;
        let held = !call.unsent.is_empty() || !fits;
        let out = if held { &mut call.unsent } else { &mut self.output };
        if !held {
            let flags = if last { flag::END_STREAM } else { 0 };
            frame(out, kind::DATA, flags, id.0, total);
            call.closed = last;
            call.send_window -= as_window(total);
            self.send_window -= as_window(total);
        }
        out.extend_from_slice(&[0]);
        out.extend_from_slice(&u32::try_from(length).expect("a request is below 4 GiB").to_be_bytes());
        message.encode_raw(out);
        if held {
            call.closing = last;
            self.release(id.0);
        }
    }

    /// Tells the server that the call is not wanted any more. Nothing more comes for it.
    pub fn reset(&mut self, id: CallId) {
        if self.calls.remove(&id.0).is_some() {
            frame(&mut self.output, kind::RST_STREAM, 0, id.0, 4);
            self.output.extend_from_slice(&8u32.to_be_bytes());
        }
    }

    /// Sends what the windows now allow of a call's unsent bytes.
    fn release(&mut self, id: u32) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        while !call.unsent.is_empty() {
            let window = usize::try_from(call.send_window.min(self.send_window)).unwrap_or(0);
            let length = call.unsent.len().min(window).min(FRAME_BYTES_MAX);
            if length == 0 {
                if self.send_window <= 0 && !self.blocked.contains(&id) {
                    self.blocked.push_back(id);
                }
                return;
            }
            let last = call.closing && length == call.unsent.len();
            frame(&mut self.output, kind::DATA, if last { flag::END_STREAM } else { 0 }, id, length);
            self.output.extend_from_slice(&call.unsent[..length]);
            call.unsent.advance(length);
            call.closed = last;
            call.send_window -= as_window(length);
            self.send_window -= as_window(length);
        }
    }

    /// Takes whole frames off what the socket gave, and tells what they mean. The callback may not open calls itself; it
    /// notes what to do and the owner does it afterwards.
    ///
    /// # Errors
    /// [`ConnectionError`].
    pub fn receive(&mut self, input: &mut BytesMut, mut told: impl FnMut(Incoming<'_>)) -> Result<(), ConnectionError> {
        loop {
            let Some(header) = input.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(()) };
            let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = *header;
            let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
            let id = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
            if input.len() < FRAME_HEADER_BYTES + length {
                input.reserve(FRAME_HEADER_BYTES + length - input.len());
                return Ok(());
            }
            let payload = &input[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + length];
            match kind {
                kind::DATA => self.on_data(id, flags, payload, &mut told)?,
                kind::HEADERS => self.on_headers(id, flags, payload, &mut told)?,
                kind::RST_STREAM => {
                    if let Some(call) = self.calls.remove(&id) {
                        let code = payload.first_chunk().map_or(0, |code| u32::from_be_bytes(*code));
                        let status =
                            CallStatus { code: 14, message: format!("reset by the server: HTTP/2 error {code}") };
                        told(Incoming::End { tag: call.tag, status: &status });
                    }
                }
                kind::SETTINGS if flags & flag::ACK == 0 => self.on_settings(payload)?,
                kind::PING if flags & flag::ACK == 0 => {
                    frame(&mut self.output, kind::PING, flag::ACK, 0, length);
                    self.output.extend_from_slice(payload);
                }
                kind::GOAWAY => {
                    let code =
                        payload.get(4..8).and_then(|code| code.first_chunk()).map_or(0, |c| u32::from_be_bytes(*c));
                    return Err(ConnectionError::GoAway(code));
                }
                kind::WINDOW_UPDATE => self.on_window_update(id, payload)?,
                _ => {}
            }
            input.advance(FRAME_HEADER_BYTES + length);
        }
    }

    fn on_data(
        &mut self,
        id: u32,
        flags: u8,
        payload: &[u8],
        told: &mut impl FnMut(Incoming<'_>),
    ) -> Result<(), ConnectionError> {
        let received = u32::try_from(payload.len()).expect("a frame is below 16 MiB");
        self.unacknowledged += received;
        if self.unacknowledged > RECEIVE_WINDOW_BYTES / 4 {
            window_update(&mut self.output, 0, std::mem::take(&mut self.unacknowledged));
        }
        let Some(call) = self.calls.get_mut(&id) else { return Ok(()) };
        call.unacknowledged += received;
        if call.unacknowledged > RECEIVE_WINDOW_BYTES / 4 {
            window_update(&mut self.output, id, std::mem::take(&mut call.unacknowledged));
        }
        let data = unpadded(flags & !flag::PRIORITY, payload)?;
        let tag = call.tag;
        if call.partial.is_empty() {
            let rest = messages(data, |message| told(Incoming::Message { tag, message }));
            call.partial.extend_from_slice(rest);
        } else {
            call.partial.extend_from_slice(data);
            let before = call.partial.len();
            let left = messages(&call.partial, |message| told(Incoming::Message { tag, message })).len();
            call.partial.advance(before - left);
        }
        if flags & flag::END_STREAM != 0 {
            self.calls.remove(&id);
            let status = CallStatus { code: 13, message: "ended without a status".to_string() };
            told(Incoming::End { tag, status: &status });
        }
        Ok(())
    }

    fn on_headers(
        &mut self,
        id: u32,
        flags: u8,
        payload: &[u8],
        told: &mut impl FnMut(Incoming<'_>),
    ) -> Result<(), ConnectionError> {
        if flags & flag::END_HEADERS == 0 {
            return Err(ConnectionError::Protocol("a header block in several frames"));
        }
        let block = unpadded(flags, payload)?;
        if !self.blocks.contains_key(block) {
            let headers = self.decoder.decode(block).map_err(|_| ConnectionError::Protocol("a header block"))?;
            if self.blocks.len() >= BLOCKS_MAX {
                self.blocks.clear();
            }
            self.blocks.insert(block.to_vec(), status_in(&headers));
        }
        if flags & flag::END_STREAM == 0 {
            return Ok(());
        }
        let Some(call) = self.calls.remove(&id) else { return Ok(()) };
        if !call.closed {
            // The server needs no more of the request.
            frame(&mut self.output, kind::RST_STREAM, 0, id, 4);
            self.output.extend_from_slice(&0u32.to_be_bytes());
        }
        told(Incoming::End { tag: call.tag, status: &self.blocks[block] });
        Ok(())
    }

    fn on_settings(&mut self, payload: &[u8]) -> Result<(), ConnectionError> {
        for setting in payload.chunks_exact(6) {
            let id = u16::from_be_bytes([setting[0], setting[1]]);
            let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
            // The others allow more than is used here, except a smaller header table.
            if id == 1 && value < RequestHeaders::TABLE_BYTES {
                return Err(ConnectionError::Protocol("a header table too small for this client"));
            }
            if id == 4 {
                let difference = i64::from(value) - self.initial_window;
                self.initial_window = i64::from(value);
                for call in self.calls.values_mut() {
                    call.send_window += difference;
                }
            }
        }
        frame(&mut self.output, kind::SETTINGS, flag::ACK, 0, 0);
        let ids: Vec<u32> = self.calls.iter().filter(|(_, call)| !call.unsent.is_empty()).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.release(id));
        Ok(())
    }

    fn on_window_update(&mut self, id: u32, payload: &[u8]) -> Result<(), ConnectionError> {
        let more = payload.first_chunk().ok_or(ConnectionError::Protocol("a window update"))?;
        let more = i64::from(u32::from_be_bytes(*more) & 0x7fff_ffff);
        if id != 0 {
            if let Some(call) = self.calls.get_mut(&id) {
                call.send_window += more;
                self.release(id);
            }
            return Ok(());
        }
        self.send_window += more;
        for _ in 0..self.blocked.len() {
            if let Some(id) = self.blocked.pop_front() {
                self.release(id);
            }
        }
        Ok(())
    }
}

fn as_window(bytes: usize) -> i64 {
    i64::try_from(bytes).expect("a frame is below 16 MiB")
}

/// Calls back with each whole message; returns what is behind the last one.
fn messages(mut data: &[u8], mut told: impl FnMut(&[u8])) -> &[u8] {
    while let Some(prefix) = data.first_chunk::<PREFIX_BYTES>() {
        let [_, length @ ..] = *prefix;
        let length = u32::from_be_bytes(length) as usize;
        let Some(message) = data.get(PREFIX_BYTES..PREFIX_BYTES + length) else { break };
        told(message);
        data = &data[PREFIX_BYTES + length..];
    }
    data
}

fn unpadded(flags: u8, payload: &[u8]) -> Result<&[u8], ConnectionError> {
    let mut inner = payload;
    let mut padding = 0;
    if flags & flag::PADDED != 0 {
        let (first, rest) = inner.split_first().ok_or(ConnectionError::Protocol("a padded frame"))?;
        (padding, inner) = (usize::from(*first), rest);
    }
    if flags & flag::PRIORITY != 0 {
        inner = inner.get(5..).ok_or(ConnectionError::Protocol("a frame with a priority"))?;
    }
    let length = inner.len().checked_sub(padding).ok_or(ConnectionError::Protocol("a padded frame"))?;
    Ok(&inner[..length])
}

fn frame(out: &mut BytesMut, kind: u8, flags: u8, id: u32, length: usize) {
    let start = out.len();
    out.extend_from_slice(&[0, 0, 0, kind, flags]);
    out.extend_from_slice(&id.to_be_bytes());
    set_frame_length(out, start, length);
}

fn set_frame_length(out: &mut BytesMut, start: usize, length: usize) {
    let length = u32::try_from(length).expect("a frame is below 16 MiB").to_be_bytes();
    out[start..start + 3].copy_from_slice(&length[1..]);
}

fn window_update(out: &mut BytesMut, id: u32, more: u32) {
    frame(out, kind::WINDOW_UPDATE, 0, id, 4);
    out.extend_from_slice(&more.to_be_bytes());
}

fn status_in(headers: &[(Vec<u8>, Vec<u8>)]) -> CallStatus {
    let value = |name: &[u8]| {
        headers.iter().find(|(at, _)| at == name).map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    };
    match value(b"grpc-status") {
        Some(code) => {
            CallStatus { code: code.parse().unwrap_or(2), message: value(b"grpc-message").unwrap_or_default() }
        }
        None => CallStatus { code: 2, message: format!("HTTP status {}", value(b":status").unwrap_or_default()) },
    }
}

/// Writes request headers, using the server's header table (RFC 7541) for what it has seen.
struct RequestHeaders {
    scheme_index: u8,
    authority: String,
    /// What the server has in its table, in the order it was put there.
    in_table: Vec<(&'static str, Option<&'static str>)>,
}

/// The headers of each call, beside its method, scheme and path. `None` stands for the authority.
const FIXED_HEADERS: [(&str, Option<&str>); 4] = [
    (":authority", None),
    ("content-type", Some("application/grpc")),
    ("te", Some("trailers")),
    ("user-agent", Some("tenure-bench")),
];

impl RequestHeaders {
    /// Far more than this client puts there.
    const TABLE_BYTES: u32 = 2048;
    const STATIC_ENTRIES: usize = 61;

    fn new(scheme: &str, authority: &str) -> Self {
        let scheme_index = if scheme == "https" { 7 } else { 6 };
        RequestHeaders { scheme_index, authority: authority.to_string(), in_table: Vec::new() }
    }

    fn encode(&mut self, path: &'static str, out: &mut BytesMut) {
        // `:method: POST` and the scheme are in everybody's table.
        out.extend_from_slice(&[0x80 | 3, 0x80 | self.scheme_index]);
        self.header(":path", Some(path), out);
        for (name, value) in FIXED_HEADERS {
            self.header(name, value, out);
        }
    }

    fn header(&mut self, name: &'static str, value: Option<&'static str>, out: &mut BytesMut) {
        if let Some(at) = self.in_table.iter().rposition(|known| *known == (name, value)) {
            let index = Self::STATIC_ENTRIES + self.in_table.len() - at;
            assert!(index < 127, "an index in one byte: this client makes a handful of calls");
            out.extend_from_slice(&[0x80 | u8::try_from(index).expect("below 127")]);
            return;
        }
        // Literal, to be remembered, with its name.
        out.extend_from_slice(&[0x40]);
        string(name, out);
        string(value.unwrap_or(&self.authority), out);
        self.in_table.push((name, value));
    }
}

fn string(text: &str, out: &mut BytesMut) {
    let length = u8::try_from(text.len()).expect("a header is short");
    if length < 127 {
        out.extend_from_slice(&[length]);
    } else {
        out.extend_from_slice(&[127, length - 127]);
    }
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_remembered_and_read_back() {
        let mut headers = RequestHeaders::new("http", "127.0.0.1:2379");
        let mut decoder = loona_hpack::Decoder::new();
        for path in ["/a/One", "/a/Two", "/a/One", "/a/Two"] {
            let mut block = BytesMut::new();
            headers.encode(path, &mut block);
            let read = decoder.decode(&block).unwrap();
            let value = |name: &str| read.iter().find(|(at, _)| at == name.as_bytes()).map(|(_, value)| value.clone());
            assert_eq!(value(":path").unwrap(), path.as_bytes());
            assert_eq!(value(":authority").unwrap(), b"127.0.0.1:2379");
            assert_eq!(value("te").unwrap(), b"trailers");
        }
        let mut block = BytesMut::new();
        headers.encode("/a/One", &mut block);
        assert_eq!(block.len(), 7, "all of it by index");
    }

    #[test]
    fn messages_are_cut_out_whatever_the_frames() {
        let stream = [&[0, 0, 0, 0, 2, 7, 8][..], &[0, 0, 0, 0, 0], &[0, 0, 0, 0, 1, 9]].concat();
        for cut in 0..stream.len() {
            let mut seen = Vec::new();
            let rest = messages(&stream[..cut], |message| seen.push(message.to_vec())).to_vec();
            let rest =
                messages(&[rest, stream[cut..].to_vec()].concat(), |message| seen.push(message.to_vec())).to_vec();
            assert_eq!(seen, [vec![7, 8], vec![], vec![9]]);
            assert!(rest.is_empty());
        }
    }
}
