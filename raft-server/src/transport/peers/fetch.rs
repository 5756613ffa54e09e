//! Snapshots over the network: the member that is behind asks for files, piece by piece.
//!
//! ```text
//! request:  term u64 le, index u64 le, offset u64 le, name (the rest, UTF-8)
//! answer:   without a name, at offset 0, one chunk: the list of files, each: length u64 le, name length u32 le, name
//!           without a name, at offset 1 (all of it is there) or 2 (given up), nothing: for the sender's metrics
//!           with a name, the file from the offset on, in chunks
//! chunk:    check u32 le (CRC-32 of the rest), bytes
//! ```
//! Each chunk is checked before it is written. A fetch that is cut off goes on where the file ends that it has; so a link that
//! breaks costs what was under way. The sender holds its pace to a rate, and keeps the snapshot for as long as a fetch
//! holds it. What is complete is synced before raft hears of it.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt as _};
use http::uri::PathAndQuery;
use tokio::fs::{File, OpenOptions};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};
use tonic::{Code, Status};

use super::client::{CallError, FETCH, connect, named, ready};
use super::codec::RawCodec;
use super::link::Link;
use super::{Inner, SnapshotStats};
use crate::log::Position;
use crate::snapshot::{OutgoingSnapshot, SnapshotOffer, bytes_in};
use crate::transport::Local;

/// Bytes of a file in one chunk.
const CHUNK_BYTES: usize = 256 << 10;

/// Attempts that bring nothing new before a fetch is given up; the leader offers again.
const ATTEMPTS_MAX: u32 = 20;

/// Offsets without a name.
const LIST: u64 = 0;
const COMPLETE: u64 = 1;
const GIVEN_UP: u64 = 2;

/// A link that brings nothing for so long is given up: nobody else would notice that it hangs.
const CHUNK_WITHIN: Duration = Duration::from_secs(10);

/// Bytes of the disk that a fetch leaves alone: members write their log there, and stop when they cannot.
const LEFT_BYTES: u64 = 256 << 20;

/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(250);

pub(super) type Chunks = Pin<Box<dyn Stream<Item = Result<Bytes, Status>> + Send>>;

fn chunk(bytes: &[u8]) -> Bytes {
    let mut chunk = BytesMut::with_capacity(4 + bytes.len());
    chunk.put_u32_le(crc32fast::hash(bytes));
    chunk.put_slice(bytes);
    chunk.freeze()
}

/// Why an attempt brought no snapshot.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("the member has no such snapshot any more")]
    Gone,
    #[error(
        "the disk has no room: {missing_bytes} bytes are missing, {free_bytes} free, of which {LEFT_BYTES} are kept"
    )]
    NoRoom { missing_bytes: u64, free_bytes: u64 },
    /// Another attempt goes on where this one ended.
    #[error("{0}")]
    CutOff(String),
}

impl AttemptError {
    fn write(error: std::io::Error) -> Self {
        AttemptError::CutOff(format!("write a snapshot: {error}"))
    }
}

impl From<CallError> for AttemptError {
    fn from(error: CallError) -> Self {
        AttemptError::CutOff(error.to_string())
    }
}

impl From<Status> for AttemptError {
    fn from(status: Status) -> Self {
        if status.code() == Code::NotFound { AttemptError::Gone } else { AttemptError::CutOff(status.to_string()) }
    }
}

fn unchunk(mut chunk: Bytes) -> Result<Bytes, AttemptError> {
    match chunk.try_get_u32_le() {
        Ok(check) if crc32fast::hash(&chunk) == check => Ok(chunk),
        Ok(_) | Err(_) => Err(AttemptError::CutOff("a chunk of a snapshot is damaged".to_owned())),
    }
}

/// Answers a request for a snapshot.
pub(super) async fn send(
    local: &dyn Local,
    mut request: Bytes,
    bytes_per_second: u64,
    stats: &SnapshotStats,
) -> Result<Chunks, Status> {
    let mut number = || request.try_get_u64_le().map_err(|_| Status::invalid_argument("no request for a snapshot"));
    let (term, index, offset) = (number()?, number()?, number()?);
    if request.is_empty() && offset != LIST {
        stats.end(offset == COMPLETE);
        return Ok(Box::pin(futures::stream::empty()));
    }
    let snapshot = local.outgoing_snapshot(Position { index, term });
    let snapshot = snapshot.ok_or_else(|| Status::not_found("there is no such snapshot (any more)"))?;
    let failed = |error: std::io::Error| Status::internal(format!("read a snapshot: {error}"));
    let name = std::str::from_utf8(&request).unwrap_or_default();
    if name.is_empty() {
        stats.begin();
        let list = list(&snapshot.path).await.map_err(failed)?;
        return Ok(Box::pin(futures::stream::once(async move { Ok(chunk(&list)) })));
    }
    if !is_file_name(name) {
        return Err(Status::invalid_argument("no name of a file"));
    }
    let mut file = File::open(snapshot.path.join(name)).await.map_err(failed)?;
    file.seek(std::io::SeekFrom::Start(offset)).await.map_err(failed)?;
    Ok(Box::pin(chunks(file, snapshot, bytes_per_second)))
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

async fn list(dir: &Path) -> std::io::Result<Bytes> {
    let mut list = BytesMut::new();
    let mut files = tokio::fs::read_dir(dir).await?;
    while let Some(file) = files.next_entry().await? {
        let name = file.file_name();
        if let Some(name) = name.to_str() {
            list.put_u64_le(file.metadata().await?.len());
            list.put_u32_le(u32::try_from(name.len()).map_err(std::io::Error::other)?);
            list.put_slice(name.as_bytes());
        }
    }
    Ok(list.freeze())
}

/// The rest of a file, at a pace. Holds the snapshot.
fn chunks(
    file: File,
    snapshot: Arc<OutgoingSnapshot>,
    bytes_per_second: u64,
) -> impl Stream<Item = Result<Bytes, Status>> + Send {
    let buffer = vec![0; CHUNK_BYTES];
    futures::stream::unfold((file, snapshot, buffer), move |(mut file, snapshot, mut buffer)| async move {
        let began = tokio::time::Instant::now();
        let read = match file.read(&mut buffer).await {
            Ok(0) => return None,
            Ok(read) => read,
            Err(error) => {
                return Some((Err(Status::internal(format!("read a snapshot: {error}"))), (file, snapshot, buffer)));
            }
        };
        let chunk = chunk(&buffer[..read]);
        let pace = Duration::from_secs_f64(read as f64 / bytes_per_second.max(1) as f64);
        tokio::time::sleep_until(began + pace).await;
        Some((Ok(chunk), (file, snapshot, buffer)))
    })
}

/// Fetches what is offered and tells the member how that ended.
pub(super) async fn run(inner: Weak<Inner>, offer: SnapshotOffer, urls: Vec<String>) {
    let mut attempts = 0;
    let mut had_bytes = 0;
    let from = format!("{:x}", offer.from);
    let stats = inner.upgrade().and_then(|inner| inner.stats_of(offer.from)).unwrap_or_default();
    stats.received_snapshots.begin();
    let complete = loop {
        let Some(inner) = inner.upgrade() else { return };
        let url = urls.get(attempts as usize % urls.len().max(1)).cloned().unwrap_or_default();
        match attempt(&inner, &offer, &url).await {
            Ok(()) => break true,
            Err(AttemptError::Gone) => break false,
            Err(error @ AttemptError::NoRoom { .. }) => {
                tracing::warn!(from, %error, "fetch a snapshot");
                // Whatever there is of it is needed more.
                if let Err(error) = tokio::fs::remove_dir_all(&offer.path).await {
                    tracing::warn!(path = %offer.path.display(), %error, "remove a part of a snapshot");
                }
                break false;
            }
            Err(error @ AttemptError::CutOff(_)) => {
                tracing::debug!(from, %error, "fetch a snapshot");
                if attempts + 1 == ATTEMPTS_MAX {
                    tracing::warn!(from, %error, "fetch a snapshot");
                }
                let has_bytes = bytes_in(&offer.path);
                attempts = if has_bytes > had_bytes { 0 } else { attempts + 1 };
                had_bytes = has_bytes;
            }
        }
        if attempts >= ATTEMPTS_MAX {
            break false;
        }
        drop(inner);
        tokio::time::sleep(PAUSE).await;
    };
    stats.received_snapshots.end(complete);
    let Some(inner) = inner.upgrade() else { return };
    let Some(local) = inner.local().cloned() else { return };
    // It may wait for room in the member's queue.
    let _ = tokio::task::spawn_blocking({
        let offer = offer.clone();
        move || local.snapshot_fetched(offer, complete)
    })
    .await;
    let url = urls.get(attempts as usize % urls.len().max(1)).cloned().unwrap_or_default();
    if let Err(error) = tell(&inner, &offer, &url, complete).await {
        tracing::debug!(from, %error, "tell how fetching a snapshot ended");
    }
}

fn parse_list(mut list: Bytes) -> Result<Vec<(String, u64)>, AttemptError> {
    let damaged = || AttemptError::CutOff("the list of a snapshot's files is damaged".to_owned());
    let mut files = Vec::new();
    while list.has_remaining() {
        let length = list.try_get_u64_le().map_err(|_| damaged())?;
        let name_length = list.try_get_u32_le().map_err(|_| damaged())? as usize;
        if list.len() < name_length {
            return Err(damaged());
        }
        let name = String::from_utf8(list.split_to(name_length).to_vec()).map_err(|_| damaged())?;
        if !is_file_name(&name) {
            return Err(damaged());
        }
        files.push((name, length));
    }
    Ok(files)
}

/// Says how it ended.
async fn tell(inner: &Inner, offer: &SnapshotOffer, url: &str, complete: bool) -> Result<(), AttemptError> {
    let mut source = Source { grpc: ready(connect(&inner.config, url).await?).await?, inner, offer };
    source.ask(if complete { COMPLETE } else { GIVEN_UP }, "").await.map(drop)
}

async fn attempt(inner: &Inner, offer: &SnapshotOffer, url: &str) -> Result<(), AttemptError> {
    let own = AttemptError::write;
    let mut source = Source { grpc: ready(connect(&inner.config, url).await?).await?, inner, offer };
    tokio::fs::create_dir_all(&offer.path).await.map_err(own)?;
    let mut chunks = source.ask(LIST, "").await?;
    let files = parse_list(next_chunk(&mut chunks).await?)?;
    check_room(&offer.path, files.iter().map(|(_, length)| length).sum())?;
    for (name, length) in &files {
        let mut file = OpenOptions::new().create(true).append(true).open(offer.path.join(name)).await.map_err(own)?;
        let mut have = file.metadata().await.map_err(own)?.len();
        if have < *length {
            let copied = copy_rest(&mut source, name, &mut file, &mut have, *length).await;
            // Also of one that is cut off, which goes on where the file ends: no write may be under way then.
            file.flush().await.map_err(own)?;
            copied?;
        }
        let is_whole = have == *length && file.metadata().await.map_err(own)?.len() == *length;
        if !is_whole {
            // Of another snapshot: it is fetched anew.
            tokio::fs::remove_file(offer.path.join(name)).await.map_err(own)?;
            return Err(AttemptError::CutOff("a file is longer than it is offered".to_owned()));
        }
        file.sync_all().await.map_err(own)?;
    }
    let directory = File::open(&offer.path).await.map_err(own)?;
    directory.sync_all().await.map_err(own)
}

/// Appends to a file that has `have` bytes what there is of it up to `length`.
async fn copy_rest(
    source: &mut Source<'_>,
    name: &str,
    file: &mut File,
    have: &mut u64,
    length: u64,
) -> Result<(), AttemptError> {
    let mut chunks = source.ask(*have, name).await?;
    while *have < length {
        let bytes = next_chunk(&mut chunks).await?;
        file.write_all(&bytes).await.map_err(AttemptError::write)?;
        *have += bytes.len() as u64;
    }
    Ok(())
}

/// Whether the disk has room for a directory of so many bytes, and for what it is for besides.
///
/// # Errors
/// [`AttemptError::NoRoom`].
fn check_room(dir: &Path, bytes: u64) -> Result<(), AttemptError> {
    let missing_bytes = bytes.saturating_sub(bytes_in(dir));
    let Ok(disk) = rustix::fs::statvfs(dir) else { return Ok(()) };
    let free_bytes = disk.f_bavail.saturating_mul(disk.f_frsize);
    if missing_bytes == 0 || missing_bytes.saturating_add(LEFT_BYTES) <= free_bytes {
        return Ok(());
    }
    Err(AttemptError::NoRoom { missing_bytes, free_bytes })
}

async fn next_chunk(chunks: &mut tonic::Streaming<Bytes>) -> Result<Bytes, AttemptError> {
    let cut_off = |text: &str| AttemptError::CutOff(text.to_owned());
    let next = tokio::time::timeout(CHUNK_WITHIN, chunks.next()).await.map_err(|_| cut_off("nothing comes"))?;
    unchunk(next.ok_or_else(|| cut_off("it ended early"))??)
}

struct Source<'a> {
    grpc: tonic::client::Grpc<Link>,
    inner: &'a Inner,
    offer: &'a SnapshotOffer,
}

impl Source<'_> {
    async fn ask(&mut self, offset: u64, name: &str) -> Result<tonic::Streaming<Bytes>, AttemptError> {
        let mut request = BytesMut::new();
        for number in [self.offer.at.term, self.offer.at.index, offset] {
            request.put_u64_le(number);
        }
        request.put_slice(name.as_bytes());
        let request = named(self.inner.config.identity, self.offer.from, request.freeze());
        self.grpc.ready().await.map_err(|error| AttemptError::CutOff(error.to_string()))?;
        let answer = self.grpc.server_streaming(request, PathAndQuery::from_static(FETCH), RawCodec).await?;
        Ok(answer.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Conf;

    // The disk and the network of the sender are the clients' too.
    #[tokio::test(start_paused = true)]
    async fn a_snapshot_is_sent_at_its_pace() {
        const BYTES_PER_SECOND: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::create_dir(&path).unwrap();
        let bytes: Vec<u8> = (0..5 * CHUNK_BYTES / 2).map(|at| (at / 1_000) as u8).collect();
        std::fs::write(path.join("file"), &bytes).unwrap();
        let file = File::open(path.join("file")).await.unwrap();
        let snapshot = OutgoingSnapshot { at: Position { index: 7, term: 1 }, conf: Conf::default(), path, bytes: 0 };

        let began = tokio::time::Instant::now();
        let mut sent = Box::pin(chunks(file, Arc::new(snapshot), BYTES_PER_SECOND));
        let mut received = Vec::new();
        while let Some(chunk) = sent.next().await {
            received.extend(unchunk(chunk.unwrap()).unwrap());
            let least = Duration::from_secs_f64(received.len() as f64 / BYTES_PER_SECOND as f64);
            assert!(began.elapsed() >= least, "{} bytes after {:?}", received.len(), began.elapsed());
        }
        assert!(received == bytes, "all of it, in order");
        assert!(began.elapsed() < Duration::from_secs_f64(1.1 * bytes.len() as f64 / BYTES_PER_SECOND as f64));
    }
}
