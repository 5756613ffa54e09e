//! What one tenant uses of this member, and the limits on that: requests and bytes per second either way, requests and connections open.
//!
//! Rates are token buckets that may go into debt. A request takes its token when it comes in: if there is none it waits until
//! its turn has come, as long as that is within [`WAIT_MAX`], and is refused otherwise, with nothing taken: after that time, so that who
//! asks again at once does not make a flood of refusals instead. Bytes are
//! taken as they arrive, when it is too late to refuse them: whoever is in debt has to wait before it is read on, so a tenant that
//! sends faster than it may is slowed down at its own sockets and holds nothing here but what is in the air. What it is sent is
//! slowed down there too ([`crate::send_rate`]). Messages on streams
//! (keep-alives, watch requests) count as requests too, and slow their stream down.
//!
//! Everything here is of one member and of no other tenant. A limit that is not set costs a look at the tenant's profile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tenure_storage::{Limit, Profile, TenantId};
use tokio::time::Instant;

use crate::cell_error::CellError;
use crate::turns::{QUIET_SLOTS, Recent};

/// Longest wait for a rate; then the client is told to try again.
pub const WAIT_MAX: Duration = Duration::from_secs(1);

/// Requests of one tenant that wait for nothing but their refusal. Further ones hear it at once.
const REFUSALS_HELD_MAX: usize = 1_000;

/// Requests that a tenant may have open at a time, if nobody says otherwise.
const OPEN_REQUESTS_MAX: u64 = 20_000;

/// What a bucket holds when it was not used for a while: one second's worth.
const BURST_SECONDS: f64 = 1.0;

/// A limit of which nobody said anything, of the tenant or of the cell. 0: none.
pub fn default_limit(limit: Limit) -> u64 {
    match limit {
        // The cell's, which is replicated: see `Tenant::quota_bytes`.
        Limit::StoredBytes => 0,
        Limit::ResponseBytesInFlight => crate::inflight::TENANT_BYTES_MAX as u64,
        Limit::Watchers => tenure_storage::limits::WATCHERS_PER_TENANT_MAX as u64,
        // Each costs ten KiB, whatever is asked and answered.
        Limit::Streams => OPEN_REQUESTS_MAX,
        // But see [`TenantUse::connect`].
        Limit::RequestsPerSecond
        | Limit::RequestBytesPerSecond
        | Limit::Connections
        | Limit::Leases
        | Limit::RequestBytes
        | Limit::ResponseBytesPerSecond => 0,
    }
}

/// The limit that holds for a tenant; `None`: there is none.
pub fn limit_of(profile: &Profile, limit: Limit) -> Option<u64> {
    in_force(limit, profile.limit(limit))
}

/// What holds of a limit of which this is said.
pub fn in_force(limit: Limit, said: Option<u64>) -> Option<u64> {
    let value = said.unwrap_or_else(|| default_limit(limit));
    (value > 0).then_some(value)
}

/// Tokens that come back at a rate.
#[derive(Debug, Default)]
pub(crate) struct Bucket {
    state: Mutex<Option<Level>>,
}

#[derive(Clone, Copy, Debug)]
struct Level {
    /// Below zero: owed.
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// Takes so many tokens; they may be owed. Answers how long it takes until nothing is owed.
    pub(crate) fn take(&self, amount: u64, per_second: u64, now: Instant) -> Duration {
        let mut state = self.state.lock();
        let level = Level::at(*state, per_second, now);
        let tokens = level - amount as f64;
        *state = Some(Level { tokens, at: now });
        owed_for(tokens, per_second)
    }

    /// As [`Bucket::take`], unless nothing would be owed only after `longest`: then nothing is taken.
    pub(crate) fn try_take(&self, amount: u64, per_second: u64, longest: Duration, now: Instant) -> Option<Duration> {
        let mut state = self.state.lock();
        let tokens = Level::at(*state, per_second, now) - amount as f64;
        let wait = owed_for(tokens, per_second);
        if wait > longest {
            return None;
        }
        *state = Some(Level { tokens, at: now });
        Some(wait)
    }
}

impl Level {
    /// What has come back since.
    fn at(before: Option<Level>, per_second: u64, now: Instant) -> f64 {
        let most = per_second as f64 * BURST_SECONDS;
        match before {
            None => most,
            Some(Level { tokens, at }) => {
                let since = now.saturating_duration_since(at).as_secs_f64();
                (tokens + since * per_second as f64).min(most)
            }
        }
    }
}

fn owed_for(tokens: f64, per_second: u64) -> Duration {
    if tokens >= 0.0 || per_second == 0 {
        return Duration::ZERO;
    }
    // Somebody who owes for years waits for years: the bound is the caller's.
    Duration::try_from_secs_f64(-tokens / per_second as f64).unwrap_or(Duration::MAX)
}

/// Why a request had to wait or was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Requests,
    Bytes,
    Streams,
    Connections,
    ResponseBytes,
}

impl Reason {
    pub(crate) const ALL: [Reason; 5] =
        [Reason::Requests, Reason::Bytes, Reason::Streams, Reason::Connections, Reason::ResponseBytes];

    /// As a label of the metric.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Reason::Requests => "requests",
            Reason::Bytes => "bytes",
            Reason::Streams => "streams",
            Reason::Connections => "connections",
            Reason::ResponseBytes => "response_bytes",
        }
    }
}

/// What a tenant uses of this member now, and how often it was held back.
#[derive(Debug, Default)]
pub struct TenantUse {
    requests: Bucket,
    bytes: Bucket,
    response_bytes: Bucket,
    open_requests: AtomicUsize,
    refusals_held: AtomicUsize,
    connections: AtomicUsize,
    held_back: [AtomicU64; Reason::ALL.len()],
    cpu_ns: AtomicU64,
    recent: Recent,
    slot: usize,
}

/// See [`TenantUse::slot`].
pub(crate) fn slot_of(tenant: TenantId) -> usize {
    tenant.0 as usize % QUIET_SLOTS
}

impl TenantUse {
    /// Nothing yet, of this tenant.
    pub(crate) fn of(tenant: TenantId) -> Self {
        TenantUse { slot: slot_of(tenant), ..TenantUse::default() }
    }

    /// Which of [`QUIET_SLOTS`] the tenant is in.
    pub(crate) fn slot(&self) -> usize {
        self.slot
    }

    /// Lets one request in, after a wait if need be. What it gives counts as an open request for as long as it lives.
    ///
    /// # Errors
    /// [`CellError::TooManyRequests`].
    pub async fn begin_request(self: &Arc<Self>, profile: &Profile) -> Result<OpenCount, CellError> {
        let most = limit_of(profile, Limit::Streams).and_then(|most| usize::try_from(most).ok());
        let open = match self.open(most.unwrap_or(usize::MAX), |of| &of.open_requests) {
            Some(open) => open,
            None => return Err(self.refuse(Reason::Streams)),
        };
        if let Some(per_second) = limit_of(profile, Limit::RequestsPerSecond) {
            match self.requests.try_take(1, per_second, WAIT_MAX, Instant::now()) {
                None => {
                    drop(open);
                    return Err(self.refuse_later(Reason::Requests).await);
                }
                Some(Duration::ZERO) => {}
                Some(wait) => {
                    self.count(Reason::Requests);
                    tokio::time::sleep(wait).await;
                }
            }
        }
        if let Some(per_second) = limit_of(profile, Limit::RequestBytesPerSecond) {
            match self.bytes.try_take(0, per_second, WAIT_MAX, Instant::now()) {
                None => {
                    drop(open);
                    return Err(self.refuse_later(Reason::Bytes).await);
                }
                Some(Duration::ZERO) => {}
                Some(wait) => {
                    self.count(Reason::Bytes);
                    tokio::time::sleep(wait).await;
                }
            }
        }
        Ok(open)
    }

    /// Bytes have come in that complete so many messages behind a request's first. Answers how long not to read on.
    pub fn received(&self, profile: &Profile, bytes: usize, messages: u64) -> Duration {
        let now = Instant::now();
        let for_bytes = limit_of(profile, Limit::RequestBytesPerSecond)
            .map_or(Duration::ZERO, |per_second| self.bytes.take(bytes as u64, per_second, now));
        let for_messages = match limit_of(profile, Limit::RequestsPerSecond) {
            Some(per_second) if messages > 0 => self.requests.take(messages, per_second, now),
            Some(_) | None => Duration::ZERO,
        };
        if for_bytes > Duration::ZERO {
            self.count(Reason::Bytes);
        }
        if for_messages > Duration::ZERO {
            self.count(Reason::Requests);
        }
        for_bytes.max(for_messages)
    }

    /// How long not to read on, by the limits that hold now, if nothing more comes in.
    pub(crate) fn owes(&self, profile: &Profile) -> Duration {
        let now = Instant::now();
        let owed = |bucket: &Bucket, limit| {
            limit_of(profile, limit).map_or(Duration::ZERO, |per_second| bucket.take(0, per_second, now))
        };
        owed(&self.bytes, Limit::RequestBytesPerSecond).max(owed(&self.requests, Limit::RequestsPerSecond))
    }

    /// Whether what the tenant is sent is limited.
    pub(crate) fn limits_sending(&self, profile: &Profile) -> bool {
        limit_of(profile, Limit::ResponseBytesPerSecond).is_some()
    }

    /// Bytes were sent to the tenant. Answers how long not to send on.
    pub(crate) fn sent(&self, profile: &Profile, bytes: usize, now: Instant) -> Duration {
        let Some(per_second) = limit_of(profile, Limit::ResponseBytesPerSecond) else { return Duration::ZERO };
        let wait = self.response_bytes.take(bytes as u64, per_second, now);
        if !wait.is_zero() {
            self.count(Reason::ResponseBytes);
        }
        wait
    }

    /// One more connection, if the tenant may have it: as many as its limit says, or `most` if there is none.
    pub fn connect(self: &Arc<Self>, profile: &Profile, most: usize) -> Option<OpenCount> {
        let limit = limit_of(profile, Limit::Connections);
        let most = limit.map_or(most, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let open = self.open(most, |of| &of.connections);
        if open.is_none() {
            self.count(Reason::Connections);
        }
        open
    }

    fn open(self: &Arc<Self>, most: usize, counter: fn(&TenantUse) -> &AtomicUsize) -> Option<OpenCount> {
        let added = counter(self).fetch_add(1, Ordering::Relaxed);
        let open = OpenCount { of: Arc::clone(self), counter };
        (added < most).then_some(open)
    }

    async fn refuse_later(self: &Arc<Self>, reason: Reason) -> CellError {
        let held = self.refusals_held.fetch_add(1, Ordering::Relaxed);
        let _held = OpenCount { of: Arc::clone(self), counter: |of| &of.refusals_held };
        if held < REFUSALS_HELD_MAX {
            tokio::time::sleep(WAIT_MAX).await;
        }
        self.refuse(reason)
    }

    fn refuse(&self, reason: Reason) -> CellError {
        self.count(reason);
        CellError::TooManyRequests
    }

    pub(crate) fn count(&self, reason: Reason) {
        self.held_back[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A thread was at work for the tenant for so long, until now.
    pub(crate) fn spent(&self, time: Duration, now: std::time::Instant) {
        self.cpu_ns.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.recent.charge(time, now);
    }

    pub(crate) fn recent(&self) -> &Recent {
        &self.recent
    }

    /// Time that threads which serve connections were at work for the tenant.
    pub fn cpu(&self) -> Duration {
        Duration::from_nanos(self.cpu_ns.load(Ordering::Relaxed))
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// How often something had to wait or was refused.
    pub(crate) fn held_back(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        Reason::ALL.into_iter().map(|reason| (reason, self.held_back[reason as usize].load(Ordering::Relaxed)))
    }
}

/// One open request or connection; over when it is dropped.
pub struct OpenCount {
    of: Arc<TenantUse>,
    counter: fn(&TenantUse) -> &AtomicUsize,
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        (self.counter)(&self.of).fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for OpenCount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OpenCount")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(limits: &[(Limit, u64)]) -> Profile {
        let mut profile = Profile::default();
        for (limit, value) in limits {
            profile.limits.set(*limit, Some(*value));
        }
        profile
    }

    #[test]
    fn tokens_come_back_at_their_rate() {
        let (bucket, zero) = (Bucket::default(), Instant::now());
        let at = |milliseconds| zero + Duration::from_millis(milliseconds);
        assert_eq!(bucket.take(10, 10, at(0)), Duration::ZERO, "a second's worth at once");
        assert_eq!(bucket.take(1, 10, at(0)), Duration::from_millis(100));
        assert_eq!(bucket.try_take(1, 10, Duration::from_millis(150), at(0)), None);
        assert_eq!(bucket.try_take(1, 10, Duration::from_millis(150), at(100)), Some(Duration::from_millis(100)));
        assert_eq!(bucket.take(10, 10, at(10_000)), Duration::ZERO, "no more than a second's worth is kept");
        assert_eq!(bucket.take(5, 10, at(10_000)), Duration::from_millis(500));
    }

    #[tokio::test]
    async fn requests_wait_and_then_are_refused() {
        let (used, profile) = (Arc::new(TenantUse::default()), limited(&[(Limit::RequestsPerSecond, 2)]));
        let begun = Instant::now();
        for _ in 0..4 {
            drop(used.begin_request(&profile).await.unwrap());
        }
        assert!(begun.elapsed() > Duration::from_millis(900), "two at once, then two a second");
        used.requests.take(1_000, 2, Instant::now());
        let begun = Instant::now();
        assert!(matches!(used.begin_request(&profile).await, Err(CellError::TooManyRequests)));
        assert!(begun.elapsed() >= WAIT_MAX, "who asks again at once is slowed down");
        used.refusals_held.store(REFUSALS_HELD_MAX, Ordering::Relaxed);
        assert!(matches!(used.begin_request(&profile).await, Err(CellError::TooManyRequests)));
        let held_back: Vec<_> = used.held_back().filter(|(_, times)| *times > 0).collect();
        assert_eq!(held_back, [(Reason::Requests, 4)]);
        assert_eq!(used.open_requests.load(Ordering::Relaxed), 0);
        assert_eq!(used.refusals_held.load(Ordering::Relaxed), REFUSALS_HELD_MAX);
    }

    #[tokio::test]
    async fn what_is_open_is_counted() {
        let (used, profile) =
            (Arc::new(TenantUse::default()), limited(&[(Limit::Streams, 1), (Limit::Connections, 2)]));
        let open = used.begin_request(&profile).await.unwrap();
        assert!(used.begin_request(&profile).await.is_err());
        drop(open);
        assert!(used.begin_request(&profile).await.is_ok());
        let connections = [(); 3].map(|()| used.connect(&profile, 1));
        assert_eq!(connections.iter().flatten().count(), 2, "its limit, whatever others may");
        drop(connections);
        let connections = [(); 3].map(|()| used.connect(&Profile::default(), 1));
        assert_eq!(connections.iter().flatten().count(), 1);
        drop(connections);
        assert_eq!(used.connections(), 0);
    }

    #[test]
    fn bytes_are_owed() {
        let (used, profile) = (TenantUse::default(), limited(&[(Limit::RequestBytesPerSecond, 1_000)]));
        assert_eq!(used.received(&profile, 1_000, 1), Duration::ZERO);
        let wait = used.received(&profile, 500, 0);
        assert!(wait > Duration::from_millis(400) && wait <= Duration::from_millis(500), "{wait:?}");
        assert_eq!(used.received(&Profile::default(), 1 << 30, 1 << 30), Duration::ZERO);
    }
}
