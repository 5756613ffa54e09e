//! Every bound of this crate, with its unit and its reason.

/// Deepest nesting of txns that is encoded. The edge refuses more; etcd itself stops at protobuf's own recursion limit.
pub const TXN_DEPTH_MAX: usize = 64;

/// Bytes one txn may answer. Its reads are collected whole on the apply thread, so without a bound a request of some
/// kilobytes, made of nested ranges over a large key space, would be an answer of gigabytes on every member and again at
/// every replay. A txn that exceeds it is refused and changes nothing.
pub const TXN_REPLY_BYTES_MAX: usize = 64 << 20;

/// What one key of an answer costs beside its bytes.
pub const TXN_REPLY_KEY_BYTES: usize = 64;

/// Rows a txn may have visited when it starts another operation or condition: about a second of apply time. One range
/// over more rows is answered; many of them are refused, because all tenants would wait for them.
pub const TXN_ROWS_MAX: u64 = 2_000_000;

/// So many bytes of a row are as much work as another row: a few thousand large values may be all that a tenant has.
pub const ROW_WORK_BYTES: u64 = 1_024;

/// Keys that one command may delete: each is a kibibyte of memory while the revision is written. A delete of more is refused and deletes
/// nothing; alone it could be all the keys that a tenant's quota has room for, gigabytes on every member and again at every replay.
pub const DELETED_KEYS_MAX: usize = 250_000;

/// Keys attached to one lease. They go in one revision when it ends, and nobody is there to be refused then: so a further one is refused
/// when it is put. A kube-apiserver attaches a thousand.
pub const LEASE_KEYS_MAX: u64 = 20_000;

/// Bytes that the puts of one txn may store. What they carry is bounded by the request's size; what they keep of the old value
/// (`ignore_value`) could be all the bytes that a tenant has.
pub const TXN_STORED_BYTES_MAX: usize = 64 << 20;

/// Leases of a tenant whose limit says nothing else: each is kept in the memory of every member.
pub const LEASES_MAX: u64 = 1_000_000;

/// Alarms of one tenant that clients may set; they choose member ids and kinds as they like. What trips the quota sets its
/// own all the same.
pub const ALARMS_MAX: usize = 1_000;

/// Bytes that a command keeps of what its events replaced, for watchers that want to see it. Behind that they read it from the
/// engine: a delete may replace everything that a tenant has.
pub const EVENT_PREV_BYTES_MAX: usize = 4 << 20;

/// Watchers of a stream that is closed which go in one turn of the hub's lock.
pub const WATCH_CLOSE_STEP: usize = 256;

/// Pairs of an event and a group of watchers that `apply` looks for in one revision. Where there are more, all watchers of the tenant
/// replay the revision from the engine.
pub const WATCH_MATCHES_MAX: usize = 65_536;

/// Rows of history one reclaim step visits. A step is about a millisecond of apply time, which is what a write may have to wait
/// behind it; a log entry a step is what that costs (decision 0003).
pub const RECLAIM_ROWS_MAX: u32 = 200;

/// Responses waiting in one watch stream. At the bound its watchers turn unsynced and replay from the engine later, so
/// a slow client costs this much and not its lag. etcd's own number.
pub const WATCH_QUEUE_RESPONSES_MAX: usize = 128;

/// Bytes of events waiting in one watch stream; the same consequence. One response may exceed it alone.
pub const WATCH_QUEUE_BYTES_MAX: usize = 4 << 20;

/// Watchers of one revision that `apply` serves itself. Where there are more they get it in steps behind it, so that a tenant of
/// very many watchers does not hold up the writes of all.
pub const WATCH_DIRECT_MAX: usize = 256;

/// Watchers that one step serves, before another tenant's turn: some tens of microseconds.
pub const WATCH_DELIVERY_STEP: usize = 256;

/// Revisions of one tenant that wait to be delivered in steps, and bytes of their events. At either bound the backlog is dropped, and
/// its watchers turn unsynced and replay it from the engine.
pub const WATCH_BACKLOG_REVISIONS_MAX: usize = 1_024;
pub const WATCH_BACKLOG_BYTES_MAX: usize = 4 << 20;

/// What an event counts beside the bytes it tells: itself, its key and its allocations. Without it queues of small events would be
/// several times as large as they look.
pub const WATCH_EVENT_OVERHEAD_BYTES: usize = 200;

/// Distinct revisions in one replayed watch response: etcd's own number.
pub const WATCH_REPLAY_REVISIONS_MAX: usize = 1_000;

/// Bytes of events in one replayed watch response; a response ends behind the revision that passes it.
pub const WATCH_REPLAY_BYTES_MAX: usize = 2 << 20;

/// Rows of history one replay step reads before it gives the thread back.
pub const WATCH_REPLAY_ROWS_MAX: usize = 20_000;

/// Watchers of one tenant, over all its streams. At the bound a create is refused; nothing else changes.
pub const WATCHERS_PER_TENANT_MAX: usize = 1_000_000;

/// Tenants of one cell.
pub const TENANTS_MAX: usize = 100_000;

/// Labels of one tenant.
pub const LABELS_MAX: usize = 64;

/// Certificates of one tenant that are refused one by one. At the bound all older ones have to be refused together.
pub const REVOKED_SERIALS_MAX: usize = 1_000;

/// Certificates of a tenant's own CAs, all together, in DER.
pub const TRUSTED_CA_BYTES_MAX: usize = 32 << 10;

/// Longest tenant name in bytes: a DNS label, so that a name can be part of a host name.
pub const TENANT_NAME_BYTES_MAX: usize = 63;

/// What a version costs beside its key and value: its rows in three families. Counted so that a tenant cannot fill the
/// disk with tiny keys under a quota that sees none of their overhead.
pub const VERSION_OVERHEAD_BYTES: u64 = 64;

/// What an empty tenant reports as its size, so that tools which divide by it work.
pub const EMPTY_TENANT_BYTES: u64 = 20 << 10;

/// Pages whose remaining count is remembered, over all tenants. The oldest goes; its next page counts again.
pub const PAGE_COUNTS_MAX: usize = 4_096;

/// Keys that a count must have been of for its range to be worth a counter.
pub const COUNTED_ROWS_MIN: u64 = 32;

/// Ranges that were counted once, over all tenants: if they are counted again while they are among these they get a counter. The
/// oldest goes.
pub const COUNTING_RANGES_MAX: usize = 256;

/// Counters of ranges of one tenant. At the bound one that was not used for a while makes room; its range is counted by reading.
/// A kube-apiserver needs one for each resource.
pub const COUNTERS_PER_TENANT_MAX: usize = 512;

/// Counters of all tenants; the same consequence.
pub const COUNTERS_MAX: usize = 16_384;

/// Pairs of a changed key and a counter that `apply` moves in one revision. Where there are more, the tenant's counters are dropped,
/// and made anew when their ranges are counted again.
pub const COUNTER_MATCHES_MAX: usize = 65_536;

/// Longest range that is remembered, in the bytes of both its ends: those of clients' requests may have megabytes. Longer ones are
/// counted by reading.
pub const REMEMBERED_RANGE_BYTES_MAX: usize = 4 << 10;

/// Newest changes that a counter keeps, for reads whose view is a little older. A view that is older counts by reading.
pub const COUNTER_CHANGES_MAX: usize = 64;

const _: () = assert!(WATCH_REPLAY_BYTES_MAX <= WATCH_QUEUE_BYTES_MAX, "a replayed response fits the queue");
