//! Watch streams over a cell, against what etcd 3.7 answered (contract 1.2).

use tenure_storage::limits::{WATCH_CLOSE_STEP, WATCH_QUEUE_RESPONSES_MAX};
use tenure_storage::{Command, DeleteRangeRequest, LeaseId, PutRequest};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::*;
use crate::inflight::{Budget, FEW_REQUESTS, OpenRequests};
use crate::proto::etcdserverpb::WatchProgressRequest;
use crate::service::testing::TestCell;

/// A client's end of a watch stream.
struct Client {
    requests: Option<mpsc::UnboundedSender<Result<WatchRequest, Status>>>,
    responses: Responses<UnboundedReceiverStream<Result<WatchRequest, Status>>>,
}

impl Client {
    fn connect(tenant: &Tenant) -> Client {
        Client::with_options(tenant, PROGRESS_PERIOD_DEFAULT, 2 << 20)
    }

    fn with_options(tenant: &Tenant, progress_period: Duration, response_bytes_max: usize) -> Client {
        let in_flight = InFlight::new(Budget::default(), OpenRequests::default());
        Client::with_all_options(
            tenant,
            Options { progress_period, response_bytes_max, wants_leader: false, in_flight },
        )
    }

    fn within(tenant: &Tenant, in_flight: &InFlight) -> Client {
        let (progress_period, response_bytes_max) = (PROGRESS_PERIOD_DEFAULT, 2 << 20);
        let in_flight = in_flight.clone();
        Client::with_all_options(
            tenant,
            Options { progress_period, response_bytes_max, wants_leader: false, in_flight },
        )
    }

    fn with_all_options(tenant: &Tenant, options: Options) -> Client {
        let (sender, receiver) = mpsc::unbounded_channel();
        let responses = Responses::new(tenant.clone(), UnboundedReceiverStream::new(receiver), options);
        Client { requests: Some(sender), responses }
    }

    fn send(&self, request: RequestUnion) {
        let request = WatchRequest { request_union: Some(request) };
        self.requests.as_ref().unwrap().send(Ok(request)).unwrap();
    }

    fn create(&self, request: WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(request));
    }

    fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
    }

    fn request_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }

    async fn next(&mut self) -> WatchResponse {
        self.responses.next().await.unwrap().unwrap()
    }

    /// Nothing is waiting, and everything sent has been handled: the answer to a cancel of a new watcher comes first.
    async fn assert_quiet(&mut self) {
        let id = 1_000_000;
        self.create(WatchCreateRequest { watch_id: id, ..of("never/") });
        let created = self.next().await;
        assert_eq!((created.created, created.watch_id), (true, id), "{created:?}");
        self.cancel(id);
        assert_eq!(self.next().await.watch_id, id);
    }
}

/// Watches everything that starts with `prefix`, which ends in a slash.
fn of(prefix: &'static str) -> WatchCreateRequest {
    let range_end = Bytes::from(prefix.replace('/', "0"));
    WatchCreateRequest { key: prefix.into(), range_end, ..Default::default() }
}

async fn put(tenant: &Tenant, key: &str, value: impl Into<Bytes>) -> i64 {
    let request = PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: value.into(),
        lease: LeaseId::NONE,
        prev_kv: false,
        ignore_value: false,
        ignore_lease: false,
    };
    let outcome = tenant.propose(Command::Put(request)).await.unwrap();
    outcome.result.unwrap();
    outcome.revision
}

async fn delete(tenant: &Tenant, key: &'static str) -> i64 {
    let request = DeleteRangeRequest { range: KeyRange::Single(key.into()), prev_kv: false };
    tenant.propose(Command::DeleteRange(request)).await.unwrap().revision
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.unwrap().revision
}

#[tokio::test]
async fn a_watcher_lives_from_create_to_cancel() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::connect(&tenant);
    client.create(WatchCreateRequest { prev_kv: true, ..of("a/") });
    let created = client.next().await;
    assert_eq!((created.created, created.watch_id, revision(&created)), (true, 0, 1));
    assert_eq!(created.header.unwrap().cluster_id, tenant.cluster_id());

    put(&tenant, "b/1", "not watched").await;
    let at = put(&tenant, "a/1", "x").await;
    let event = client.next().await;
    assert_eq!((event.watch_id, revision(&event), event.event_count()), (0, at, 1));
    let at = delete(&tenant, "a/1").await;
    assert_eq!(revision(&client.next().await), at);

    client.request_progress();
    let progress = client.next().await;
    assert_eq!((progress.watch_id, revision(&progress), progress.events.len()), (-1, at, 0));

    client.cancel(0);
    let canceled = client.next().await;
    assert_eq!((canceled.canceled, canceled.watch_id, revision(&canceled)), (true, 0, at));
    assert_eq!(canceled.cancel_reason, "");
    client.cancel(0);
    client.request_progress();
    client.assert_quiet().await;
}

/// A stream may have a million watchers; who ends it does not hold up what else its thread has to do.
#[tokio::test]
async fn a_stream_of_many_watchers_ends_in_steps() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::connect(&tenant);
    let watchers = 3 * WATCH_CLOSE_STEP;
    for _ in 0..watchers {
        client.create(of("a/"));
        client.next().await;
    }
    drop(client);
    let mut left = Vec::new();
    while tenant.reader().watch_counts().1 > 0 {
        left.push(tenant.reader().watch_counts());
        tokio::task::yield_now().await;
    }
    assert_eq!(left, [(0, watchers - WATCH_CLOSE_STEP), (0, watchers - 2 * WATCH_CLOSE_STEP)]);
}

#[tokio::test]
async fn tenants_do_not_see_each_other() {
    let cell = TestCell::open().await;
    let mut client = Client::connect(&cell.tenant("other"));
    client.create(of("a/"));
    client.next().await;
    put(&cell.tenant("default"), "a/1", "x").await;
    client.assert_quiet().await;
}

#[tokio::test]
async fn refusals_have_etcds_texts() {
    let cell = TestCell::open().await;
    let mut client = Client::connect(&cell.tenant("default"));
    client.create(WatchCreateRequest { watch_id: 3, ..of("a/") });
    client.next().await;
    let cases = [
        (WatchCreateRequest { watch_id: 3, ..of("b/") }, "mvcc: duplicate watch ID provided on the WatchStream"),
        (WatchCreateRequest { range_end: "a".into(), ..of("b/") }, "mvcc: watcher range is empty"),
        (
            WatchCreateRequest { start_revision: -1, watch_id: 3, ..of("b/") },
            "etcdserver: mvcc: required revision has been compacted",
        ),
    ];
    for (request, reason) in cases {
        client.create(request);
        let refused = client.next().await;
        assert_eq!((refused.created, refused.canceled, refused.watch_id), (true, true, -1));
        assert_eq!((refused.cancel_reason.as_str(), refused.compact_revision), (reason, 0));
    }
    client.requests.as_ref().unwrap().send(Ok(WatchRequest { request_union: None })).unwrap();
    client.assert_quiet().await;
}

#[tokio::test]
async fn an_empty_key_is_the_smallest_one() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::connect(&tenant);
    client.create(WatchCreateRequest::default());
    client.next().await;
    put(&tenant, "a", "not watched").await;
    let at = put(&tenant, "\0", "x").await;
    assert_eq!(revision(&client.next().await), at);
    client.create(WatchCreateRequest { range_end: "\0".into(), ..Default::default() });
    client.next().await;
    let at = put(&tenant, "a", "x").await;
    let event = client.next().await;
    assert_eq!((event.watch_id, revision(&event)), (1, at));
}

#[tokio::test]
async fn history_that_is_gone_cancels_without_a_revision() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    for value in ["1", "2", "3", "4"] {
        put(&tenant, "a/1", value).await;
    }
    tenant.propose(Command::Compact { revision: 4 }).await.unwrap().result.unwrap();
    let mut client = Client::connect(&tenant);
    client.create(WatchCreateRequest { start_revision: 3, ..of("a/") });
    assert!(client.next().await.created);
    let compacted = client.next().await;
    assert_eq!((compacted.canceled, compacted.compact_revision, revision(&compacted)), (true, 4, 0));
    assert_eq!((compacted.watch_id, compacted.cancel_reason.as_str()), (0, ""));
    client.cancel(0);
    assert!(client.next().await.canceled, "an ordinary one follows");

    client.create(WatchCreateRequest { start_revision: 4, ..of("a/") });
    assert!(client.next().await.created);
    let history = client.next().await;
    assert_eq!((history.event_count(), revision(&history)), (2, 5));
}

#[tokio::test]
async fn a_client_that_half_closes_goes_on_receiving() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::connect(&tenant);
    client.create(of("a/"));
    client.next().await;
    client.requests = None;
    let at = put(&tenant, "a/1", "x").await;
    assert_eq!(revision(&client.next().await), at);
}

/// Several times what the queue holds: the rest is replayed, in order and without gaps, and what is sent last is live again.
#[tokio::test]
async fn a_client_that_does_not_read_catches_up() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::connect(&tenant);
    client.create(WatchCreateRequest { prev_kv: true, ..of("a/") });
    client.next().await;
    let total = 5 * WATCH_QUEUE_RESPONSES_MAX;
    for _ in 0..total {
        put(&tenant, "a/1", "x").await;
    }
    let mut seen = 0;
    let mut batches = 0;
    while seen < total {
        seen += client.next().await.event_count();
        batches += 1;
    }
    assert_eq!(seen, total);
    assert!(batches < total, "some came together");
    client.assert_quiet().await;
    let at = put(&tenant, "a/1", "x").await;
    assert_eq!(revision(&client.next().await), at);
}

/// Room for so many MiB.
fn room_for(mib: usize) -> InFlight {
    let (tenant_bytes, process_bytes) = (mib << 20, mib << 20);
    let budget = Budget { tenant_bytes, process_bytes, tenant_floor_bytes: 0, wait_max: Duration::from_secs(5) };
    InFlight::new(budget, OpenRequests::default())
}

/// A tenant may have thousands of streams that start in the past, of clients that do not read.
#[tokio::test]
async fn the_past_is_not_read_before_there_is_room_for_it() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    for _ in 0..8 {
        put(&tenant, "a/1", vec![b'x'; 300 << 10]).await;
    }
    let in_flight = room_for(2);
    let answers = in_flight.hold(tenant.id(), 2 << 20).unwrap();
    let mut client = Client::within(&tenant, &in_flight);
    client.create(WatchCreateRequest { start_revision: 2, ..of("a/") });
    assert!(client.next().await.created);
    while in_flight.waiting(tenant.id()) == 0 {
        assert!(futures::poll!(std::pin::pin!(client.next())).is_pending());
        tokio::task::yield_now().await;
    }
    assert_eq!(client.responses.watchers.next_bytes(), None, "nothing was read that would have to wait");
    drop(answers);
    let mut seen = 0;
    while seen < 8 {
        let response = client.next().await;
        let count = response.event_count();
        assert!(in_flight.bytes() > count * (300 << 10) && in_flight.bytes() <= 2 << 20, "what is on its way counts");
        seen += count;
    }
    client.assert_quiet().await;
    assert_eq!(in_flight.bytes(), 0);
}

/// A stream whose client takes nothing is not polled. What its replay has taken, a turn or room, would be kept from all others.
#[tokio::test]
async fn replays_of_streams_that_nobody_polls_hold_up_no_other() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    put(&tenant, "a/1", "v").await;
    let mut stuck = Vec::new();
    for _ in 0..40 {
        let mut client = Client::connect(&tenant);
        client.create(WatchCreateRequest { start_revision: 2, ..of("a/") });
        assert!(client.next().await.created);
        assert!(futures::poll!(std::pin::pin!(client.next())).is_pending(), "its replay has begun");
        stuck.push(client);
    }
    let mut client = Client::connect(&tenant);
    client.create(WatchCreateRequest { start_revision: 2, ..of("a/") });
    let events = async {
        assert!(client.next().await.created);
        client.next().await
    };
    let events = tokio::time::timeout(Duration::from_secs(20), events).await.expect("it has its turn");
    assert_eq!(events.event_count(), 1);
}

/// A delete may replace all that a tenant has; a watcher that has to read that is told where it can go on, and not in the middle of it.
#[tokio::test]
async fn a_revision_that_never_has_room_is_as_one_that_was_compacted() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    for number in 0..8 {
        put(&tenant, &format!("a/{number}"), vec![b'x'; 300 << 10]).await;
    }
    let range = KeyRange::HalfOpen { start: "a/".into(), end: "a0".into() };
    let delete = Command::DeleteRange(DeleteRangeRequest { range, prev_kv: false });
    let at = tenant.propose(delete).await.unwrap().revision;
    let in_flight = room_for(1);
    let mut client = Client::within(&tenant, &in_flight);
    client.create(WatchCreateRequest { start_revision: at, prev_kv: true, ..of("a/") });
    assert!(client.next().await.created);
    let gone = client.next().await;
    assert_eq!((gone.canceled, gone.watch_id, gone.compact_revision), (true, 0, at + 1));
    client.create(WatchCreateRequest { start_revision: at, ..of("a/") });
    assert!(client.next().await.created);
    assert_eq!(client.next().await.event_count(), 8, "without what was there it fits");
    client.create(WatchCreateRequest { start_revision: at + 1, prev_kv: true, ..of("a/") });
    assert!(client.next().await.created);
    put(&tenant, "a/1", "x").await;
    let mut told = [client.next().await.watch_id, client.next().await.watch_id];
    told.sort_unstable();
    assert_eq!(told, [1, 2]);
}

/// The encoder collects small responses until there are none, or they are enough.
#[tokio::test]
async fn small_responses_are_counted_until_they_have_left() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let in_flight = room_for(8);
    let _many: Vec<_> = (0..=FEW_REQUESTS).map(|_| in_flight.open_requests().open(tenant.id())).collect();
    let mut client = Client::within(&tenant, &in_flight);
    client.create(of("a/"));
    assert!(client.next().await.created);
    let event_bytes = 10 << 10;
    for _ in 0..5 {
        put(&tenant, "a/1", vec![b'x'; event_bytes]).await;
    }
    let mut counted = Vec::new();
    for _ in 0..5 {
        client.next().await;
        counted.push(in_flight.bytes() / event_bytes);
    }
    assert_eq!(counted, [1, 2, 3, 4, 1], "after four it has enough");
    assert!(futures::poll!(std::pin::pin!(client.next())).is_pending());
    assert!(in_flight.bytes() > event_bytes, "it may hand that on only now");
    assert!(futures::poll!(std::pin::pin!(client.next())).is_pending());
    assert_eq!(in_flight.bytes(), 0);
}

#[tokio::test]
async fn a_large_response_goes_in_pieces_to_those_who_can_put_them_together() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    for _ in 0..10 {
        put(&tenant, "a/1", vec![b'x'; 1_000]).await;
    }
    let limit = 2_500;
    let mut client = Client::with_options(&tenant, PROGRESS_PERIOD_DEFAULT, limit);
    client.create(WatchCreateRequest { start_revision: 2, fragment: true, ..of("a/") });
    assert!(client.next().await.created);
    let mut events = 0;
    loop {
        let piece = client.next().await;
        assert!(piece.encoded_len() < limit, "{piece:?}");
        events += piece.event_count();
        if !piece.fragment {
            break;
        }
    }
    assert_eq!(events, 10);
    client.create(WatchCreateRequest { start_revision: 2, ..of("a/") });
    assert!(client.next().await.created);
    let whole = client.next().await;
    assert_eq!((whole.event_count(), whole.fragment), (10, false));
}

#[tokio::test]
async fn periodic_progress_goes_to_those_who_asked() {
    let cell = TestCell::open().await;
    let tenant = cell.tenant("default");
    let mut client = Client::with_options(&tenant, PROGRESS_PERIOD_MIN, 2 << 20);
    client.create(of("a/"));
    client.create(WatchCreateRequest { progress_notify: true, ..of("b/") });
    client.next().await;
    client.next().await;
    let at = put(&tenant, "c/1", "x").await;
    let mut told_of_it = 0;
    while told_of_it < 2 {
        let progress = client.next().await;
        assert_eq!((progress.watch_id, progress.events.len()), (1, 0));
        // If the put took longer than a period, the first is of before it.
        assert!(revision(&progress) == at || (revision(&progress) == 1 && told_of_it == 0), "{progress:?}");
        told_of_it += usize::from(revision(&progress) == at);
    }
}
