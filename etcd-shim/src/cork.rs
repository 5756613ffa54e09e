//! What a connection writes in one turn goes to the system together.
//!
//! The HTTP/2 library hands on what it has collected before each frame of a KiB and more, and hands such a frame on in two parts. Each is
//! a system call and a packet: three of each for one object of some KiB. So writes up to [`HELD_BYTES_MAX`] are held here until the task
//! of the connection has been polled ([`Uncork::around`]), or until a larger one comes, which takes them along. A flush by the library means
//! nothing here, because it comes after each such frame too.
//!
//! What must hold: all that is held is written before the task sleeps, or the task is woken when the system takes more. So all reads
//! and writes of the connection have to happen within that task. A shutdown writes what is held first.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Most that is held. To write a larger piece at once costs no more than to copy it.
const HELD_BYTES_MAX: usize = 8 << 10;

/// What a connection that is idle may keep of its buffer.
const KEPT_BYTES_MAX: usize = 1 << 10;

/// The side of the HTTP library.
pub(crate) struct Cork<S>(Arc<Mutex<Corked<S>>>);

/// The side of the connection's task.
pub(crate) struct Uncork<S>(Arc<Mutex<Corked<S>>>);

struct Corked<S> {
    stream: S,
    held: Vec<u8>,
    /// Something was written since the stream was flushed.
    is_written: bool,
}

/// Both sides of a connection.
pub(crate) fn cork<S>(stream: S) -> (Cork<S>, Uncork<S>) {
    let corked = Arc::new(Mutex::new(Corked { stream, held: Vec::new(), is_written: false }));
    (Cork(Arc::clone(&corked)), Uncork(corked))
}

impl<S: AsyncWrite + Unpin> Corked<S> {
    /// Writes what is held, and of `bytes` what is taken with it: answers how much of these.
    fn poll_write_with(&mut self, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let slices = [IoSlice::new(&self.held), IoSlice::new(bytes)];
            let stream = Pin::new(&mut self.stream);
            let written = match (self.held.is_empty(), bytes.is_empty()) {
                (true, _) => ready!(stream.poll_write(task, bytes))?,
                (false, true) => ready!(stream.poll_write(task, &self.held))?,
                (false, false) => ready!(stream.poll_write_vectored(task, &slices))?,
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.is_written = true;
            let of_held = written.min(self.held.len());
            self.held.drain(..of_held);
            if self.held.is_empty() && (written > of_held || bytes.is_empty()) {
                return Poll::Ready(Ok(written - of_held));
            }
        }
    }

    fn poll_write(&mut self, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.held.len() + bytes.len() > HELD_BYTES_MAX {
            return self.poll_write_with(task, bytes);
        }
        self.held.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_uncork(&mut self, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.held.is_empty() {
            ready!(self.poll_write_with(task, &[]))?;
        }
        if self.held.capacity() > KEPT_BYTES_MAX {
            self.held = Vec::new();
        }
        if self.is_written {
            ready!(Pin::new(&mut self.stream).poll_flush(task))?;
            self.is_written = false;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cork<S> {
    fn poll_read(self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().stream).poll_read(task, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cork<S> {
    fn poll_write(self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().poll_write(task, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut corked = self.0.lock();
        ready!(corked.poll_uncork(task))?;
        Pin::new(&mut corked.stream).poll_shutdown(task)
    }
}

impl<S: AsyncWrite + Unpin> Uncork<S> {
    /// Runs what reads from and writes to the other side.
    ///
    /// # Errors
    /// What was held could not be written: the connection is broken.
    pub(crate) async fn around<F: Future>(self, connection: F) -> io::Result<F::Output> {
        let mut connection = std::pin::pin!(connection);
        std::future::poll_fn(|task| {
            let polled = connection.as_mut().poll(task);
            match (polled, self.0.lock().poll_uncork(task)) {
                (Poll::Ready(ended), _) => Poll::Ready(Ok(ended)),
                (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
                (Poll::Pending, Poll::Ready(Ok(())) | Poll::Pending) => Poll::Pending,
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Notes what each write brings, and takes so many bytes before it is full.
    struct Noted {
        writes: Arc<Mutex<Vec<usize>>>,
        room: usize,
    }

    impl AsyncWrite for Noted {
        fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            if self.room == 0 {
                self.room = usize::MAX;
                task.waker().wake_by_ref();
                return Poll::Pending;
            }
            let written = bytes.len().min(self.room);
            self.room -= written;
            self.writes.lock().push(written);
            Poll::Ready(Ok(written))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            task: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.poll_write(task, &slices.iter().flat_map(|slice| slice.iter().copied()).collect::<Vec<_>>())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    async fn noted(room: usize, pieces: &[usize]) -> Vec<usize> {
        let writes = Arc::default();
        let (mut cork, uncork) = cork(Noted { writes: Arc::clone(&writes), room });
        let connection = async {
            for bytes in pieces {
                cork.write_all(&vec![b'.'; *bytes]).await.unwrap();
                cork.flush().await.unwrap();
            }
            // What comes next comes in another turn.
            tokio::task::yield_now().await;
            cork.write_all(b"more").await.unwrap();
        };
        uncork.around(connection).await.unwrap();
        writes.lock().clone()
    }

    #[tokio::test]
    async fn small_writes_of_a_turn_are_one() {
        assert_eq!(noted(usize::MAX, &[10, 1_000, 3_000, 20]).await, [4_030, 4]);
        let large = HELD_BYTES_MAX + 1;
        assert_eq!(noted(usize::MAX, &[100, large, large, 10]).await, [100 + large, large, 10, 4]);
        assert_eq!(noted(usize::MAX, &[HELD_BYTES_MAX, 1]).await, [HELD_BYTES_MAX + 1, 4]);
    }

    #[tokio::test]
    async fn nothing_is_lost_or_changed_when_the_system_takes_a_part() {
        for room in [1, 150, 5_000, 9_000] {
            let written = noted(room, &[100, 8_100, 10_000]).await;
            assert_eq!((written[0], written.iter().sum::<usize>()), (room.min(written[0]), 18_204), "{written:?}");
        }
        let (client, server) = tokio::io::duplex(700);
        let (mut cork, uncork) = cork(server);
        let all: Vec<u8> = (0..100_000_u32).map(|number| (number % 251) as u8).collect();
        let writing = uncork.around(async {
            for (piece, bytes) in all.chunks(3_333).enumerate() {
                cork.write_all(bytes).await.unwrap();
                if piece % 5 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            cork.shutdown().await.unwrap();
        });
        let reading = async {
            let mut read = Vec::new();
            let mut client = client;
            client.read_to_end(&mut read).await.unwrap();
            read
        };
        let (ended, read) = tokio::join!(writing, reading);
        ended.unwrap();
        assert!(read == all);
    }

    #[tokio::test]
    async fn a_connection_that_cannot_be_written_to_ends() {
        let (client, server) = tokio::io::duplex(700);
        drop(client);
        let (mut cork, uncork) = cork(server);
        let connection = async {
            cork.write_all(b"an answer").await.unwrap();
            std::future::pending::<()>().await;
        };
        assert_eq!(uncork.around(connection).await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
