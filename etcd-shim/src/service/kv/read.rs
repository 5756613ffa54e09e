//! Reading a range into an answer, within the budget of bytes in flight.
//!
//! A single key is read where the request is handled: it costs less than handing it to another thread. Everything else
//! goes to the reading threads. What does not fit the budget is dropped, and read again when there is room.

use std::ops::ControlFlow;
use std::time::Instant;

use tenure_storage::{Engine, KeyRange, RangeRequest, RangeSummary, ReadError, Sink, TenantReader};

use crate::cell::Tenant;
use crate::cell_error::CellError;
use crate::inflight::{InFlight, Reservation};
use crate::priority::GaveWay;
use crate::wire::KvRope;

/// Whether the number of keys in the range is wanted too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    Exact,
    Unwanted,
}

/// A range read, with the bytes reserved for it.
pub(super) struct Read {
    pub(super) summary: RangeSummary,
    pub(super) kvs: KvRope,
    pub(super) reservation: Reservation,
}

/// How much is read between two looks at whether to let other threads in: some hundredths of a millisecond's work.
const LOOK_BYTES: usize = 16 << 10;

enum Attempt {
    Done(Read),
    /// The answer had reached this many bytes when there was no room for more.
    NoRoom(Reservation, usize),
}

/// Reads a range in the state this member has now.
///
/// # Errors
/// What the read refuses, and [`CellError::TimeoutRead`] if there was no room for the answer for too long.
pub(super) async fn read_range(
    in_flight: &InFlight,
    tenant: &Tenant,
    request: RangeRequest,
    counting: Counting,
) -> Result<Read, CellError> {
    let reservation = in_flight.of(tenant);
    let mut attempt = match &request.range {
        KeyRange::Single(_) => tenant.answered(try_read(tenant.reader(), &request, counting, reservation))?,
        KeyRange::HalfOpen { .. } | KeyRange::From(_) => {
            try_read_elsewhere(tenant, request.clone(), counting, reservation).await?
        }
    };
    loop {
        match attempt {
            Attempt::Done(read) => return Ok(read),
            Attempt::NoRoom(mut reservation, bytes) => {
                reservation.wait_for_room(bytes).await?;
                attempt = try_read_elsewhere(tenant, request.clone(), counting, reservation).await?;
            }
        }
    }
}

async fn try_read_elsewhere(
    tenant: &Tenant,
    request: RangeRequest,
    counting: Counting,
    reservation: Reservation,
) -> Result<Attempt, CellError> {
    tenant.answered(tenant.read(move |reader| try_read(reader, &request, counting, reservation)).await?)
}

fn try_read<E: Engine>(
    reader: &TenantReader<E>,
    request: &RangeRequest,
    counting: Counting,
    reservation: Reservation,
) -> Result<Attempt, ReadError> {
    let mut sink = Reserving {
        kvs: KvRope::default(),
        reservation,
        collected_bytes: 0,
        fits: true,
        gave_way: GaveWay::NEVER,
        look_at_bytes: LOOK_BYTES,
    };
    let summary = match counting {
        Counting::Exact => reader.range(request, &mut sink)?,
        Counting::Unwanted => reader.range_uncounted(request, &mut sink)?,
    };
    let bytes = sink.bytes();
    let Reserving { kvs, mut reservation, fits, .. } = sink;
    if !fits {
        return Ok(Attempt::NoRoom(reservation, bytes));
    }
    reservation.settle(kvs.len_bytes());
    Ok(Attempt::Done(Read { summary, kvs, reservation }))
}

/// An answer that grows as far as its reservation does.
struct Reserving {
    kvs: KvRope,
    reservation: Reservation,
    /// In memory until the read has sorted them.
    collected_bytes: usize,
    fits: bool,
    gave_way: GaveWay,
    look_at_bytes: usize,
}

impl Reserving {
    fn bytes(&self) -> usize {
        self.kvs.len_bytes() + self.collected_bytes
    }

    fn grew(&mut self) -> ControlFlow<()> {
        let bytes = self.bytes();
        if bytes >= self.look_at_bytes {
            self.gave_way = self.gave_way.again(Instant::now());
            self.look_at_bytes = bytes + LOOK_BYTES;
        }
        self.fits = self.reservation.try_reach(bytes);
        if self.fits { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

impl Sink for Reserving {
    fn take(&mut self, stored: &[u8]) -> ControlFlow<()> {
        // What is collected goes as it is handed out.
        self.collected_bytes = self.collected_bytes.saturating_sub(stored.len());
        self.kvs.push(stored);
        self.grew()
    }

    fn collected(&mut self, bytes: usize) -> ControlFlow<()> {
        self.collected_bytes = bytes;
        self.grew()
    }
}
