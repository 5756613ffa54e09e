//! Scenarios as scripts: what a client does and what the store answers, side by side, in `src/testscripts/*`.
//!
//! Each script runs on RocksDB and on the in-memory engine at once ([`Mirror`]), so it also shows that the two agree. After
//! an intended change, `UPDATE_GOLDENFILES=1 cargo test -p tenure-storage scripts` writes the answers anew; read the diff.
//!
//! Commands, with the tenant as prefix (`acme: put a 1`; none = `default`); a range is `a`, `a..c` or `a..`:
//!
//! ```text
//! put KEY VALUE [lease=N] [prev=true] [ignore_value=true] [ignore_lease=true]
//! delete RANGE [prev=true]            get RANGE [rev=N] [limit=N] [count_only=true] [keys_only=true] [sort=-mod]
//!                                         [min_mod=N] [max_mod=N] [min_create=N] [max_create=N]
//! txn "COMPARE"… then "OP"… else "OP"…    COMPARE: version(a) = 0, mod(a..c) > 3; OP: put a 1 [LEASE], delete a..c, get a, txn OP; OP
//! compact REV    reclaim [ROWS]           grant ID TTL, revoke ID, leases
//! alarm KIND on|off                       quota BYTES
//! tenants, forget ID, tenant limit NAME [VALUE] | label NAME [VALUE] | suspend | read-only | resume | delete
//!                          | revoke SERIAL | revoke-before MS
//! state, hash [rev=N], rows [FAMILY]      restart
//! watch NAME RANGE [id=N] [from=N] [prev=true] [no_put=true] [no_delete=true] [notify=true], cancel NAME ID,
//!     progress NAME, tick NAME, unwatch NAME, events
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use goldenscript::{ArgumentConsumer, Command as Line, Context};

use crate::engine::mirror::Mirror;
use crate::engine::{Cursor, Engine as _, Family, MemoryEngine, Reader, RocksEngine, RocksOptions};
use crate::key_value::KeyValue;
use crate::watch::{EventKind, WatchMessage, WatchSpec, WatchStream};
use crate::{
    AlarmKind, Command, Compare, CompareResult, CompareTarget, DeleteRangeRequest, Envelope, KeyRange, LeaseId, Limit,
    NoObserver, PutRequest, RangeReply, RangeRequest, ReadError, Reply, SortOrder, SortTarget, StateMachine,
    TenantCommand, TenantId, TenantPhase, TenantReader, TxnOp, TxnOpReply, TxnReply, TxnRequest,
};

type Engine = Mirror<RocksEngine, MemoryEngine>;
type Answer = Result<String, Box<dyn Error>>;

/// The member that proposes everything here.
const MEMBER_ID: u64 = 1;

#[test]
fn scripts() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/src/testscripts");
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "there are scripts in {dir}");
    for path in paths {
        goldenscript::run(&mut Script::new(), &path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

struct Script {
    /// RocksDB's files; removed with the script.
    _dir: tempfile::TempDir,
    engine: Arc<Engine>,
    machine: StateMachine<Engine>,
    index: u64,
    watches: BTreeMap<String, (TenantId, WatchStream<Engine>)>,
}

impl Script {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = Arc::new(Mirror(open_rocks(&dir), MemoryEngine::new()));
        let machine = StateMachine::open(Arc::clone(&engine), Arc::new(NoObserver)).unwrap();
        Script { _dir: dir, engine, machine, index: 0, watches: BTreeMap::new() }
    }

    /// Applies one command as the raft entry of its own that it is here.
    fn apply(&mut self, tenant: TenantId, command: Command) -> Result<(i64, Reply), Box<dyn Error>> {
        self.index += 1;
        let entry = Envelope { tenant, member_id: MEMBER_ID, command }.encode();
        let mut outcomes = self.machine.apply(vec![(self.index, vec![entry])])?;
        let outcome = outcomes.pop().and_then(|mut outcomes| outcomes.pop()).ok_or("one outcome per command")?;
        Ok((outcome.revision, outcome.result?))
    }

    /// The tenant of a line, created when it is first named.
    fn tenant(&mut self, context: &Context) -> Result<TenantId, Box<dyn Error>> {
        let name = context.prefix.clone().unwrap_or_else(|| "default".to_owned());
        if let Some(id) = self.machine.store().tenant_id(&name) {
            return Ok(id);
        }
        match self.apply(TenantId(0), Command::Tenant(TenantCommand::create(name)))? {
            (_, Reply::Tenant { id, .. }) => Ok(id),
            (_, other) => Err(format!("{other:?}").into()),
        }
    }

    fn change_tenant(&mut self, tenant: TenantId, args: &mut ArgumentConsumer<'_>) -> Answer {
        let number = |text: &str| text.parse::<i64>().map_err(|error| format!("{text}: {error}"));
        let value = |text: &str| text.parse::<u64>().map_err(|error| format!("{text}: {error}"));
        let command = match args.next_pos().ok_or("what to do")? {
            "limit" => {
                let name = args.next_pos().ok_or("a limit")?;
                let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name).ok_or("no such limit")?;
                TenantCommand::Update { limits: vec![(limit, args.next_pos().map(value).transpose()?)], labels: vec![] }
            }
            "label" => {
                let name = args.next_pos().ok_or("a label")?.to_owned();
                TenantCommand::Update { limits: vec![], labels: vec![(name, args.next_pos().map(str::to_owned))] }
            }
            "resume" => TenantCommand::SetPhase(TenantPhase::Active),
            "read-only" => TenantCommand::SetPhase(TenantPhase::ReadOnly),
            "suspend" => TenantCommand::SetPhase(TenantPhase::Suspended),
            "revoke" => {
                let serial = latin1(args.next_pos().ok_or("a serial")?);
                TenantCommand::RevokeSerial { serial, ends_at_ms: 1_000, now_ms: 0 }
            }
            "revoke-before" => {
                TenantCommand::RevokeBefore { valid_from_ms: number(args.next_pos().ok_or("a moment")?)? }
            }
            "trust" => {
                let certificates = std::iter::from_fn(|| args.next_pos()).map(latin1).collect();
                TenantCommand::SetTrustedCa { certificates }
            }
            "delete" => TenantCommand::Delete,
            other => return Err(format!("tenant {other}").into()),
        };
        self.apply(tenant, Command::Tenant(command))?;
        Ok(String::new())
    }

    fn tenants(&self) -> String {
        let store = self.machine.store();
        let mut out = String::new();
        for (id, name) in store.tenants() {
            let profile = store.reader(id).map(|reader| reader.profile()).unwrap_or_default();
            let limits: Vec<_> =
                profile.limits.iter().map(|(limit, value)| format!("{}={value}", limit.name())).collect();
            let (phase, labels, from) = (profile.phase, &profile.labels, profile.credentials_valid_from_ms);
            let revoked = profile.revoked.len();
            let trusts =
                profile.trusted_ca.iter().map(|ca| format!(" trusts {}", ca.escape_ascii())).collect::<String>();
            let _ = writeln!(out, "{id} {name} {phase:?} {limits:?} {labels:?} from {from} revoked {revoked}{trusts}");
        }
        for (id, name) in store.deleted_tenants() {
            let _ = writeln!(out, "{id} {name} deleted");
        }
        out
    }

    fn reader(&self, tenant: TenantId) -> Result<TenantReader<Engine>, Box<dyn Error>> {
        Ok(self.machine.store().reader(tenant).ok_or("no such tenant")?)
    }

    fn write(&mut self, tenant: TenantId, command: Command) -> Answer {
        let (revision, reply) = self.apply(tenant, command)?;
        let mut out = format!("revision {revision}\n");
        match reply {
            Reply::Put { prev_kv } => prev_kv.iter().try_for_each(|kv| writeln!(out, "  was {}", show(kv)))?,
            Reply::DeleteRange { deleted, prev_kvs } => {
                writeln!(out, "  deleted {deleted}")?;
                prev_kvs.iter().try_for_each(|kv| writeln!(out, "  was {}", show(kv)))?;
            }
            Reply::Txn(reply) => show_txn(&mut out, &reply, 1)?,
            Reply::Reclaim { more } => writeln!(out, "  more to reclaim: {more}")?,
            Reply::LeaseGrant { id, ttl_seconds } => writeln!(out, "  lease {} for {ttl_seconds} s", id.0)?,
            Reply::Alarm { alarms } => writeln!(out, "  alarms {alarms:?}")?,
            Reply::Tenant { .. } | Reply::Configure | Reply::Members | Reply::Compact | Reply::LeaseRevoke => {}
        }
        Ok(out)
    }

    fn get(&self, tenant: TenantId, request: &RangeRequest) -> Answer {
        let mut out = String::new();
        let summary = self.reader(tenant)?.range(request, &mut |kv: &[u8]| {
            let _ = writeln!(out, "{}", show(kv));
            ControlFlow::Continue(())
        });
        match summary {
            Ok(summary) => {
                let more = if summary.more { ", more" } else { "" };
                writeln!(out, "revision {}, count {}{more}", summary.revision, summary.count)?;
                Ok(out)
            }
            Err(ReadError::Refused(refusal)) => Err(refusal.into()),
            Err(ReadError::Fault(fault)) => Err(fault.into()),
        }
    }

    fn state(&self, tenant: TenantId) -> Answer {
        let state = self.reader(tenant)?.state();
        let usage = state.usage;
        Ok(format!(
            "revision {}, compacted {}, reclaimed {}\n{} keys, {} versions, {} of {} bytes live, {} leases\nalarms {:?}\n",
            state.revision,
            state.compact_revision,
            state.reclaimed_revision,
            usage.live_keys,
            usage.versions,
            usage.live_bytes,
            usage.total_bytes,
            usage.leases,
            state.alarms,
        ))
    }

    fn leases(&self, tenant: TenantId) -> Answer {
        let reader = self.reader(tenant)?;
        let mut out = String::new();
        for (id, ttl_seconds) in reader.leases()? {
            let keys: Vec<String> = reader.lease_keys(id)?.iter().map(|key| key.escape_ascii().to_string()).collect();
            writeln!(out, "lease {} for {ttl_seconds} s: [{}]", id.0, keys.join(" "))?;
        }
        Ok(out)
    }

    /// The rows on disk, as they are: the format that later releases must still read.
    fn rows(&self, only: Option<&str>) -> Answer {
        let view = self.engine.view();
        let mut out = String::new();
        for family in Family::ALL.into_iter().filter(|family| only.is_none_or(|name| name == family.name())) {
            let mut cursor = view.cursor(family, &[], &[0xff; 9])?;
            while let Some((key, value)) = cursor.entry() {
                writeln!(out, "{} {} = {}", family.name(), key.escape_ascii(), value.escape_ascii())?;
                cursor.advance()?;
            }
        }
        Ok(out)
    }

    fn watch(&mut self, tenant: TenantId, name: &str, spec: WatchSpec) -> Result<(), Box<dyn Error>> {
        let reader = self.reader(tenant)?;
        let (_, stream) =
            self.watches.entry(name.to_owned()).or_insert_with(|| (tenant, reader.watch_stream(Arc::new(|| {}))));
        stream.create(spec);
        Ok(())
    }

    /// What all watch streams have to say, after every replay that is due.
    fn events(&mut self) -> Answer {
        let mut out = String::new();
        for (name, (_, stream)) in &self.watches {
            loop {
                while let Some(message) = stream.pop() {
                    write!(out, "{name}: ")?;
                    show_message(&mut out, &message)?;
                }
                if !stream.needs_replay() {
                    break;
                }
                stream.replay_step()?;
            }
        }
        Ok(out)
    }

    /// Stops and starts on what is on disk: watches end, nothing else may change.
    fn restart(&mut self) -> Result<(), Box<dyn Error>> {
        self.watches.clear();
        self.machine.flush()?;
        self.machine = StateMachine::open(Arc::clone(&self.engine), Arc::new(NoObserver))?;
        Ok(())
    }
}

impl goldenscript::Runner for Script {
    type Command = Line;

    fn run(&mut self, line: &Line, context: &Context) -> Answer {
        let tenant = self.tenant(context)?;
        let mut args = line.consume_args();
        let out = match line.name.as_str() {
            "put" => {
                let put = PutRequest {
                    key: bytes(&mut args)?,
                    value: args.next_pos().map(latin1).unwrap_or_default(),
                    lease: LeaseId(number(&mut args, "lease")?),
                    prev_kv: flag(&mut args, "prev")?,
                    ignore_value: flag(&mut args, "ignore_value")?,
                    ignore_lease: flag(&mut args, "ignore_lease")?,
                };
                self.write(tenant, Command::Put(put))?
            }
            "delete" => {
                let delete = DeleteRangeRequest { range: range(&mut args)?, prev_kv: flag(&mut args, "prev")? };
                self.write(tenant, Command::DeleteRange(delete))?
            }
            "get" => {
                let request = range_request(&mut args)?;
                self.get(tenant, &request)?
            }
            "txn" => {
                let txn = txn(&mut args)?;
                self.write(tenant, Command::Txn(txn))?
            }
            "compact" => {
                let revision = args.next_pos().ok_or("a revision")?.parse()?;
                self.write(tenant, Command::Compact { revision })?
            }
            "rules" => {
                let number = args.next_pos().ok_or("a number")?.parse()?;
                self.apply(TenantId(0), Command::RaiseRules { number, members: Vec::new() })?;
                format!("rules {}\n", self.machine.store().rules().number())
            }
            "reclaim" => {
                let rows_max = args.next_pos().map_or(Ok(1000), str::parse)?;
                self.write(tenant, Command::Reclaim { rows_max })?
            }
            "grant" => {
                let id = LeaseId(args.next_pos().ok_or("an id")?.parse()?);
                let ttl_seconds = args.next_pos().ok_or("a ttl")?.parse()?;
                self.write(tenant, Command::LeaseGrant { id, ttl_seconds })?
            }
            "revoke" => {
                let id = LeaseId(args.next_pos().ok_or("an id")?.parse()?);
                self.write(tenant, Command::LeaseRevoke { id })?
            }
            "alarm" => {
                let kind = match args.next_pos() {
                    Some("nospace") => AlarmKind::NOSPACE,
                    Some("corrupt") => AlarmKind::CORRUPT,
                    other => return Err(format!("alarm {other:?}").into()),
                };
                let activate = args.next_pos() == Some("on");
                self.write(tenant, Command::Alarm { activate, member_id: MEMBER_ID, kind })?
            }
            "tenant" => self.change_tenant(tenant, &mut args)?,
            "tenants" => self.tenants(),
            "forget" => {
                let id = args.next_pos().ok_or("an id")?.parse()?;
                self.apply(TenantId(id), Command::Tenant(TenantCommand::Forget))?;
                String::new()
            }
            "quota" => {
                let quota_bytes = args.next_pos().ok_or("bytes")?.parse()?;
                self.write(tenant, Command::Configure { quota_bytes })?;
                String::new()
            }
            "default" => {
                let name = args.next_pos().ok_or("a limit")?;
                let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name).ok_or("no such limit")?;
                let value = args.next_pos().map(str::parse).transpose()?;
                self.write(tenant, Command::SetDefaults { limits: vec![(limit, value)] })?;
                String::new()
            }
            "state" => self.state(tenant)?,
            "leases" => self.leases(tenant)?,
            "hash" => {
                let hash = self.reader(tenant)?.hash_kv(number(&mut args, "rev")?)?;
                format!("{:08x} at {}, compacted {}\n", hash.hash, hash.hash_revision, hash.compact_revision)
            }
            "rows" => self.rows(args.next_pos())?,
            "restart" => {
                self.restart()?;
                String::new()
            }
            "watch" => {
                let name = args.next_pos().ok_or("a name")?;
                let spec = WatchSpec {
                    range: range(&mut args)?,
                    start_revision: number(&mut args, "from")?,
                    prev_kv: flag(&mut args, "prev")?,
                    no_put: flag(&mut args, "no_put")?,
                    no_delete: flag(&mut args, "no_delete")?,
                    progress_notify: flag(&mut args, "notify")?,
                    fragment: false,
                    watch_id: number(&mut args, "id")?,
                };
                self.watch(tenant, name, spec)?;
                String::new()
            }
            "cancel" => {
                let stream = self.watches.get(args.next_pos().ok_or("a name")?).ok_or("no such watch")?;
                stream.1.cancel(args.next_pos().ok_or("a watch id")?.parse()?);
                String::new()
            }
            "progress" => {
                self.watches.get(args.next_pos().ok_or("a name")?).ok_or("no such watch")?.1.request_progress();
                String::new()
            }
            "tick" => {
                self.watches.get(args.next_pos().ok_or("a name")?).ok_or("no such watch")?.1.tick_progress();
                String::new()
            }
            "unwatch" => {
                self.watches.remove(args.next_pos().ok_or("a name")?).ok_or("no such watch")?;
                String::new()
            }
            "events" => self.events()?,
            other => return Err(format!("no command {other}").into()),
        };
        args.reject_next()?;
        Ok(out)
    }
}

fn open_rocks(dir: &tempfile::TempDir) -> RocksEngine {
    let options = RocksOptions { block_cache_bytes: 1 << 20, write_buffer_bytes: 1 << 20, background_threads: 1 };
    RocksEngine::open(dir.path(), &options).unwrap()
}

fn bytes(args: &mut ArgumentConsumer<'_>) -> Result<Bytes, Box<dyn Error>> {
    Ok(latin1(args.next_pos().ok_or("a key")?))
}

/// One byte per character, so that scripts can name every byte.
fn latin1(text: &str) -> Bytes {
    text.chars().map(|character| u8::try_from(character).unwrap()).collect()
}

fn number<N: std::str::FromStr + Default>(args: &mut ArgumentConsumer<'_>, name: &str) -> Result<N, Box<dyn Error>>
where
    N::Err: Error + 'static,
{
    Ok(args.take_key(name).map(str::parse).transpose()?.unwrap_or_default())
}

fn flag(args: &mut ArgumentConsumer<'_>, name: &str) -> Result<bool, Box<dyn Error>> {
    number(args, name)
}

fn range(args: &mut ArgumentConsumer<'_>) -> Result<KeyRange, Box<dyn Error>> {
    Ok(parse_range(args.next_pos().ok_or("a range")?))
}

fn parse_range(text: &str) -> KeyRange {
    match text.split_once("..") {
        None => KeyRange::Single(latin1(text)),
        Some((start, "")) => KeyRange::From(latin1(start)),
        Some((start, end)) => KeyRange::HalfOpen { start: latin1(start), end: latin1(end) },
    }
}

fn range_request(args: &mut ArgumentConsumer<'_>) -> Result<RangeRequest, Box<dyn Error>> {
    let mut request = RangeRequest::new(range(args)?);
    request.revision = args.take_key("rev").map(str::parse).transpose()?;
    request.limit = number(args, "limit")?;
    request.count_only = flag(args, "count_only")?;
    request.keys_only = flag(args, "keys_only")?;
    request.min_mod_revision = number(args, "min_mod")?;
    request.max_mod_revision = number(args, "max_mod")?;
    request.min_create_revision = number(args, "min_create")?;
    request.max_create_revision = number(args, "max_create")?;
    if let Some(sort) = args.take_key("sort") {
        request.order = match sort.chars().next() {
            Some('-') => SortOrder::Descend,
            Some('~') => SortOrder::None,
            Some(_) | None => SortOrder::Ascend,
        };
        request.target = match sort.trim_start_matches(['-', '~']) {
            "key" => SortTarget::Key,
            "version" => SortTarget::Version,
            "create" => SortTarget::Create,
            "mod" => SortTarget::Mod,
            "value" => SortTarget::Value,
            other => return Err(format!("sort by {other}").into()),
        };
    }
    Ok(request)
}

fn txn(args: &mut ArgumentConsumer<'_>) -> Result<TxnRequest, Box<dyn Error>> {
    let mut txn = TxnRequest::default();
    let mut branch = None;
    while let Some(part) = args.next_pos() {
        match (part, branch) {
            ("then" | "else", _) => branch = Some(part),
            (compare, None) => txn.compares.push(parse_compare(compare)?),
            (op, Some("then")) => txn.success.push(parse_op(op)?),
            (op, Some(_)) => txn.failure.push(parse_op(op)?),
        }
    }
    Ok(txn)
}

/// `mod(a..c) > 3`.
fn parse_compare(text: &str) -> Result<Compare, Box<dyn Error>> {
    let [subject, result, operand] = text.split_whitespace().collect::<Vec<_>>()[..] else {
        return Err(format!("compare {text}").into());
    };
    let (target, range) = subject.trim_end_matches(')').split_once('(').ok_or("target(range)")?;
    let result = match result {
        "=" => CompareResult::Equal,
        "!=" => CompareResult::NotEqual,
        ">" => CompareResult::Greater,
        "<" => CompareResult::Less,
        other => return Err(format!("compare with {other}").into()),
    };
    let target = match target {
        "version" => CompareTarget::Version(operand.parse()?),
        "create" => CompareTarget::Create(operand.parse()?),
        "mod" => CompareTarget::Mod(operand.parse()?),
        "lease" => CompareTarget::Lease(operand.parse()?),
        "value" => CompareTarget::Value(latin1(operand)),
        other => return Err(format!("compare {other}").into()),
    };
    Ok(Compare { range: parse_range(range), result, target })
}

/// `put a 1 [lease]`, `delete a..c`, `get a`, `txn put a 1; put b 2`.
fn parse_op(text: &str) -> Result<TxnOp, Box<dyn Error>> {
    let (name, rest) = text.split_once(' ').unwrap_or((text, ""));
    let mut words = rest.split_whitespace();
    Ok(match name {
        "put" => TxnOp::Put(PutRequest {
            key: latin1(words.next().ok_or("a key")?),
            value: latin1(words.next().unwrap_or("")),
            lease: LeaseId(words.next().map_or(Ok(0), str::parse)?),
            prev_kv: true,
            ignore_value: false,
            ignore_lease: false,
        }),
        "delete" => TxnOp::DeleteRange(DeleteRangeRequest { range: parse_range(rest), prev_kv: true }),
        "get" => TxnOp::Range(RangeRequest::new(parse_range(rest))),
        "txn" => {
            let success = rest.split("; ").filter(|op| !op.is_empty()).map(parse_op).collect::<Result<_, _>>()?;
            TxnOp::Txn(TxnRequest { compares: Vec::new(), success, failure: Vec::new() })
        }
        other => return Err(format!("operation {other}").into()),
    })
}

/// `a = 1 created 2 modified 3 version 2 lease 7`, from the stored bytes.
fn show(stored: &[u8]) -> String {
    let kv = KeyValue::decode(stored).unwrap();
    let lease = if kv.lease == 0 { String::new() } else { format!(" lease {}", kv.lease) };
    format!(
        "{} = {} created {} modified {} version {}{lease}",
        kv.key.escape_ascii(),
        kv.value.escape_ascii(),
        kv.create_revision,
        kv.mod_revision,
        kv.version,
    )
}

fn show_txn(out: &mut String, reply: &TxnReply, depth: usize) -> std::fmt::Result {
    let pad = "  ".repeat(depth);
    writeln!(out, "{pad}succeeded {}", reply.succeeded)?;
    for response in &reply.responses {
        match response {
            TxnOpReply::Range { revision, reply: RangeReply { kvs, more, count } } => {
                writeln!(out, "{pad}get at {revision}: count {count}, more {more}")?;
                kvs.iter().try_for_each(|kv| writeln!(out, "{pad}  {}", show(kv)))?;
            }
            TxnOpReply::Put { revision, prev_kv } => {
                let was = prev_kv.as_ref().map(|kv| format!(", was {}", show(kv))).unwrap_or_default();
                writeln!(out, "{pad}put at {revision}{was}")?;
            }
            TxnOpReply::DeleteRange { revision, deleted, prev_kvs } => {
                writeln!(out, "{pad}delete at {revision}: {deleted}")?;
                prev_kvs.iter().try_for_each(|kv| writeln!(out, "{pad}  was {}", show(kv)))?;
            }
            TxnOpReply::Txn(nested) => show_txn(out, nested, depth + 1)?,
        }
    }
    Ok(())
}

fn show_message(out: &mut String, message: &WatchMessage) -> std::fmt::Result {
    match message {
        WatchMessage::Created { watch_id, revision } => writeln!(out, "watch {watch_id} created at {revision}"),
        WatchMessage::Refused { reason, revision } => writeln!(out, "refused at {revision}: {reason:?}"),
        WatchMessage::Canceled { watch_id, revision } => writeln!(out, "watch {watch_id} canceled at {revision}"),
        WatchMessage::Compacted { watch_id, compact_revision } => {
            writeln!(out, "watch {watch_id} ended, compacted {compact_revision}")
        }
        WatchMessage::Progress { watch_id, revision } => writeln!(out, "watch {watch_id} progress to {revision}"),
        WatchMessage::Events { watch_id, revision, batch, .. } => {
            writeln!(out, "watch {watch_id} at {revision}")?;
            for event in &batch.events {
                let kind = match event.kind {
                    EventKind::Put => "put",
                    EventKind::Delete => "delete",
                };
                let was = event.prev_kv.as_ref().map(|kv| format!(", was {}", show(kv))).unwrap_or_default();
                writeln!(out, "  {kind} {}{was}", show(&event.kv))?;
            }
            Ok(())
        }
    }
}
