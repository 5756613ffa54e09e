//! The admin API, `tenure.admin.v1`: tenants come, change and go (the calls are described in its `.proto`).
//!
//! Served on listeners of its own, to administrators: whoever has a certificate that says [`ADMIN_URI`](crate::tenant::ADMIN_URI),
//! or may open the member's admin socket. Life of a call: who it is was decided when the connection was accepted; the request is
//! checked, turned into commands of the [`Cell`], answered from what is applied; then one line goes to the audit log, whatever
//! came of it ([`crate::audit`]).
//!
//! What must hold: a call that is repeated does nothing new and answers what there is, but for a certificate, of which each call makes
//! another; nothing here reaches a tenant's data but by its prefixes and sizes; no key is ever seen by the server.
//!
//! Bounds: requests are a few kilobytes; `GetUsage` reads all keys of a tenant on the reading threads, as a list of that tenant's
//! own would, and counts at most [`PREFIXES_MAX`] prefixes.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tenure_admin_api::v1::admin_server::Admin;
use tenure_admin_api::v1::{self as api, get_cell_response, get_usage_response, top_response};
use tenure_storage::key_value::KeyValue;
use tenure_storage::limits::{TENANTS_MAX, TRUSTED_CA_BYTES_MAX};
use tenure_storage::{AlarmKind, KeyRange, Labels, Limit, Profile, RangeRequest, TenantLimits, TenantPhase};
use tokio::time::sleep;
use tonic::{Request, Response, Status};

use crate::audit::{Answered, Asked, Call};
use crate::authorities::verifier_of;
use crate::cell::{Cell, CreateTenantError, Tenant, TenantUpdate, may_be_deleted, now_ms};
use crate::cell_error::CellError;
use crate::issuer::{IssueError, IssuerFiles, Subject, TTL_DEFAULT, TTL_MAX};
use crate::rpc_metrics::{RpcMetrics, TenantTraffic};
use crate::throttle::default_limit;
use crate::tls::{InUse, certificates_of};

/// Prefixes that are told apart. Keys of further ones count as "other".
pub const PREFIXES_MAX: usize = 1_000;

/// Longest prefix that is counted by itself: what a tenant chooses must not fill the answer.
pub const PREFIX_BYTES_MAX: usize = 128;

/// Tenants of one page of a list.
const PAGE_MAX: usize = 1_000;

/// Tenants of `Top` if nothing is said.
const TOP_DEFAULT: usize = 100;

/// Longest name and value of a label, in bytes.
const LABEL_BYTES_MAX: usize = 253;

/// Longest name of a user in a certificate, in bytes: X.509's own bound.
const USER_BYTES_MAX: usize = 64;

/// Longest serial number of a certificate, in bytes: X.509's own bound.
const SERIAL_BYTES_MAX: usize = 20;

/// Longest wait for a certificate that is valid after the last revocation: they tell whole seconds.
const SECOND: Duration = Duration::from_secs(2);

/// The service. Cheap to clone.
#[derive(Clone)]
pub struct AdminService(Arc<Inner>);

struct Inner {
    cell: Cell,
    rpc_metrics: RpcMetrics,
    issuer: Option<IssuerFiles>,
    started_at_ms: i64,
    _in_use: InUse,
}

impl AdminService {
    /// Without an issuer it signs no certificates.
    pub fn new(cell: Cell, rpc_metrics: RpcMetrics, issuer: Option<IssuerFiles>) -> Self {
        let in_use = InUse::new(issuer.iter().map(|issuer| &issuer.cert_file));
        AdminService(Arc::new(Inner { cell, rpc_metrics, issuer, started_at_ms: now_ms(), _in_use: in_use }))
    }
}

/// Answers a call, and notes for the audit log what was asked and what it gave.
async fn audited<Q: Asked, A: Answered>(
    request: Request<Q>,
    answer: impl AsyncFnOnce(Q) -> Result<A, Status>,
) -> Result<Response<A>, Status> {
    let call = request.extensions().get::<Call>().cloned().unwrap_or_default();
    let message = request.into_inner();
    call.note_asked(&message);
    let answered = answer(message).await?;
    call.note_answered(&answered);
    Ok(Response::new(answered))
}

fn no_tenant(name: &str) -> Status {
    Status::not_found(format!("there is no tenant {name:?}: see the list of tenants"))
}

impl From<CreateTenantError> for Status {
    fn from(error: CreateTenantError) -> Self {
        match error {
            CreateTenantError::Name(error) => Status::invalid_argument(format!("name: {error}")),
            CreateTenantError::Cell(error) => error.into(),
        }
    }
}

impl From<IssueError> for Status {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::Request(_) => Status::invalid_argument(error.to_string()),
            IssueError::File(..) | IssueError::Authority(..) | IssueError::Sign(_) => {
                tracing::error!(%error, "issue a certificate");
                Status::failed_precondition(error.to_string())
            }
        }
    }
}

/// The limits that a message sets.
pub(crate) fn limits_of(limits: Option<api::Limits>) -> impl Iterator<Item = (Limit, u64)> {
    let limits = limits.unwrap_or_default();
    let of = move |limit| match limit {
        Limit::StoredBytes => limits.stored_bytes,
        Limit::RequestsPerSecond => limits.requests_per_second,
        Limit::RequestBytesPerSecond => limits.request_bytes_per_second,
        Limit::ResponseBytesInFlight => limits.response_bytes_in_flight,
        Limit::Watchers => limits.watchers,
        Limit::Streams => limits.streams,
        Limit::Connections => limits.connections,
        Limit::Leases => limits.leases,
        Limit::RequestBytes => limits.request_bytes,
        Limit::ResponseBytesPerSecond => limits.response_bytes_per_second,
    };
    Limit::ALL.into_iter().filter_map(move |limit| Some((limit, of(limit)?)))
}

fn to_limits(of: impl Fn(Limit) -> Option<u64>) -> api::Limits {
    api::Limits {
        stored_bytes: of(Limit::StoredBytes),
        requests_per_second: of(Limit::RequestsPerSecond),
        request_bytes_per_second: of(Limit::RequestBytesPerSecond),
        response_bytes_in_flight: of(Limit::ResponseBytesInFlight),
        watchers: of(Limit::Watchers),
        streams: of(Limit::Streams),
        connections: of(Limit::Connections),
        leases: of(Limit::Leases),
        request_bytes: of(Limit::RequestBytes),
        response_bytes_per_second: of(Limit::ResponseBytesPerSecond),
    }
}

fn limit_named(name: &str) -> Result<Limit, Status> {
    Limit::ALL.into_iter().find(|limit| limit.name() == name).ok_or_else(|| {
        let names: Vec<&str> = Limit::ALL.into_iter().map(Limit::name).collect();
        Status::invalid_argument(format!("reset_limits: {name:?}: want one of {}", names.join(", ")))
    })
}

/// What a message takes back and sets.
fn limit_changes(reset: &[String], set: Option<api::Limits>) -> Result<Vec<(Limit, Option<u64>)>, Status> {
    let reset: Vec<Limit> = reset.iter().map(|name| limit_named(name)).collect::<Result<_, _>>()?;
    let set = limits_of(set).map(|(limit, value)| (limit, Some(value)));
    Ok(reset.into_iter().map(|limit| (limit, None)).chain(set).collect())
}

fn check_labels<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Result<(), Status> {
    let fits = |text: &String| text.len() <= LABEL_BYTES_MAX && !text.contains(char::is_control);
    match labels.into_iter().find(|(name, value)| name.is_empty() || !fits(name) || !fits(value)) {
        Some((name, _)) => Err(Status::invalid_argument(format!(
            "labels: {name:?}: want names of 1 to {LABEL_BYTES_MAX} bytes and values of up to that, without control characters"
        ))),
        None => Ok(()),
    }
}

fn state_of(phase: TenantPhase) -> api::State {
    match phase {
        TenantPhase::Active => api::State::Active,
        TenantPhase::ReadOnly => api::State::ReadOnly,
        TenantPhase::Suspended => api::State::Suspended,
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: String = text.chars().filter(|c| !matches!(c, ':' | ' ')).collect();
    let digits = if digits.len() % 2 == 1 { format!("0{digits}") } else { digits };
    let byte = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
    let bytes: Vec<u8> = bytes?.into_iter().skip_while(|byte| *byte == 0).collect();
    (!bytes.is_empty()).then_some(bytes)
}

impl Inner {
    /// The tenant of that name: also one that another member has just acknowledged.
    async fn tenant(&self, name: &str) -> Result<Tenant, Status> {
        self.cell.read_barrier().await?;
        self.cell.tenant(name).ok_or_else(|| no_tenant(name))
    }

    fn describe(&self, tenant: &Tenant) -> api::Tenant {
        let profile = tenant.profile();
        let quota_bytes = u64::try_from(tenant.quota_bytes()).unwrap_or(0);
        let effective = |limit| {
            let own = || profile.limit(limit).unwrap_or_else(|| default_limit(limit));
            Some(if limit == Limit::StoredBytes { quota_bytes } else { own() })
        };
        api::Tenant {
            name: tenant.name().to_string(),
            id: tenant.id().0,
            cluster_id: tenant.cluster_id(),
            state: state_of(profile.phase).into(),
            limits: Some(to_limits(|limit| profile.limits.get(limit))),
            effective_limits: Some(to_limits(effective)),
            labels: profile.labels.clone().into_iter().collect(),
            created_at_ms: profile.created_at_ms,
            usage: Some(self.usage(tenant)),
            credentials_valid_from_ms: profile.credentials_valid_from_ms,
            revoked_serials: profile.revoked.keys().map(|serial| hex(serial)).collect(),
            trusted_ca_pem: profile.trusted_ca.iter().map(|der| certificate_pem(der)).collect(),
        }
    }

    fn usage(&self, tenant: &Tenant) -> api::Usage {
        let state = tenant.reader().state();
        let name_of = |kind| match kind {
            AlarmKind::NOSPACE => "NOSPACE".to_string(),
            AlarmKind::CORRUPT => "CORRUPT".to_string(),
            AlarmKind(number) => number.to_string(),
        };
        let mut alarms: Vec<String> = state.alarms.iter().map(|alarm| name_of(alarm.kind)).collect();
        alarms.dedup();
        api::Usage {
            keys: state.usage.live_keys,
            stored_bytes: state.db_size_bytes(),
            live_bytes: state.db_in_use_bytes(),
            versions: state.usage.versions,
            leases: state.usage.leases,
            revision: state.revision,
            compact_revision: state.compact_revision,
            alarms,
            watchers: tenant.reader().watch_counts().1 as u64,
            connections: self.traffic(tenant).map_or(0, |traffic| traffic.used.connections() as u64),
        }
    }

    fn traffic(&self, tenant: &Tenant) -> Option<TenantTraffic> {
        self.rpc_metrics.traffic(tenant.id())
    }

    async fn create(&self, request: api::CreateTenantRequest) -> Result<api::CreateTenantResponse, Status> {
        check_labels(&request.labels)?;
        let mut limits = TenantLimits::default();
        for (limit, value) in limits_of(request.limits) {
            limits.set(limit, Some(value));
        }
        let labels: Labels = request.labels.into_iter().collect();
        let (tenant, created) = self.cell.create_tenant_with(&request.name, limits, labels).await?;
        Ok(api::CreateTenantResponse { tenant: Some(self.describe(&tenant)), created })
    }

    async fn list(&self, request: api::ListTenantsRequest) -> Result<api::ListTenantsResponse, Status> {
        self.cell.read_barrier().await?;
        let page = match usize::try_from(request.page_size).unwrap_or(PAGE_MAX) {
            0 => PAGE_MAX,
            page => page.min(PAGE_MAX),
        };
        let mut names = self.cell.tenant_names();
        names.sort_unstable();
        let wanted = |profile: &Profile| {
            request.labels.iter().all(|(name, value)| profile.labels.get(name).is_some_and(|of| of == value))
        };
        let mut tenants = Vec::new();
        let mut next_page_token = String::new();
        for name in names.into_iter().filter(|name| *name > request.page_token) {
            let Some(tenant) = self.cell.tenant(&name).filter(|tenant| wanted(&tenant.profile())) else { continue };
            if tenants.len() == page {
                next_page_token = tenants.last().map_or_else(String::new, |last: &api::Tenant| last.name.clone());
                break;
            }
            tenants.push(self.describe(&tenant));
        }
        if request.deleting && next_page_token.is_empty() && request.labels.is_empty() {
            let deleted = self.cell.deleted_tenants().into_iter();
            tenants.extend(deleted.map(|(id, name)| api::Tenant {
                name,
                id: id.0,
                state: api::State::Deleting.into(),
                ..api::Tenant::default()
            }));
        }
        Ok(api::ListTenantsResponse { tenants, next_page_token })
    }

    async fn update(&self, request: api::UpdateTenantRequest) -> Result<api::UpdateTenantResponse, Status> {
        check_labels(&request.labels)?;
        let limits = limit_changes(&request.reset_limits, request.limits)?;
        let mut update = TenantUpdate { limits, ..TenantUpdate::default() };
        update.labels.extend(request.remove_labels.into_iter().map(|name| (name, None)));
        update.labels.extend(request.labels.into_iter().map(|(name, value)| (name, Some(value))));
        // Of the same request, in the same order on every try.
        update.labels.sort();
        let tenant = self.tenant(&request.name).await?;
        self.cell.update_tenant(&tenant, update).await?;
        Ok(api::UpdateTenantResponse { tenant: Some(self.describe(&tenant)) })
    }

    async fn set_state(&self, request: api::SetTenantStateRequest) -> Result<api::SetTenantStateResponse, Status> {
        let phase = match request.state() {
            api::State::Active => TenantPhase::Active,
            api::State::ReadOnly => TenantPhase::ReadOnly,
            api::State::Suspended => TenantPhase::Suspended,
            api::State::Deleting | api::State::Unspecified => {
                return Err(Status::invalid_argument("state: want ACTIVE, READ_ONLY or SUSPENDED"));
            }
        };
        let tenant = self.tenant(&request.name).await?;
        self.cell.set_tenant_phase(&tenant, phase).await?;
        Ok(api::SetTenantStateResponse { tenant: Some(self.describe(&tenant)) })
    }

    async fn delete(&self, request: api::DeleteTenantRequest) -> Result<api::DeleteTenantResponse, Status> {
        if !may_be_deleted(&request.name) {
            let text = format!("tenant {:?} belongs to the cell: suspend it instead", request.name);
            return Err(Status::failed_precondition(text));
        }
        // So that a repeated call does not find a tenant that this member does not know to be gone.
        self.cell.read_barrier().await?;
        let tenant = self.cell.tenant(&request.name);
        let Some(tenant) = tenant.filter(|tenant| request.id.is_none_or(|id| id == tenant.id().0)) else {
            return Ok(api::DeleteTenantResponse { deleted: false });
        };
        match self.cell.delete_tenant(&tenant).await {
            Ok(()) => Ok(api::DeleteTenantResponse { deleted: true }),
            Err(CellError::Refused(tenure_storage::Refusal::TenantNotFound)) => {
                Ok(api::DeleteTenantResponse { deleted: false })
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn prefixes(&self, request: api::GetUsageRequest) -> Result<api::GetUsageResponse, Status> {
        let tenant = self.tenant(&request.name).await?;
        let prefixes = tenant
            .read(|reader| {
                let mut prefixes = BTreeMap::<Bytes, (u64, u64)>::new();
                let mut other = (0, 0);
                let everything = RangeRequest::new(KeyRange::From(Bytes::from_static(b"\0")));
                let mut bad = None;
                reader.range_uncounted(&everything, &mut |stored: &[u8]| {
                    let KeyValue { key, value, .. } = match KeyValue::decode(stored) {
                        Ok(kv) => kv,
                        Err(fault) => {
                            bad = Some(fault);
                            return ControlFlow::Break(());
                        }
                    };
                    let bytes = (key.len() + value.len()) as u64;
                    let prefix = &key[..prefix_len(key)];
                    let is_kept = prefixes.len() < PREFIXES_MAX && prefix.len() <= PREFIX_BYTES_MAX;
                    if is_kept && !prefixes.contains_key(prefix) {
                        prefixes.insert(Bytes::copy_from_slice(prefix), (0, 0));
                    }
                    let count = prefixes.get_mut(prefix).unwrap_or(&mut other);
                    *count = (count.0 + 1, count.1 + bytes);
                    ControlFlow::Continue(())
                })?;
                match bad {
                    Some(fault) => Err(fault.into()),
                    None => Ok::<_, tenure_storage::ReadError>((prefixes, other)),
                }
            })
            .await?;
        let (prefixes, other) = tenant.answered(prefixes)?;
        let row = |prefix: &[u8], (keys, bytes)| get_usage_response::Prefix {
            prefix: String::from_utf8_lossy(prefix).into_owned(),
            keys,
            bytes,
        };
        let mut rows: Vec<_> = prefixes.iter().map(|(prefix, count)| row(prefix, *count)).collect();
        if other.0 > 0 {
            rows.push(row(b"other", other));
        }
        Ok(api::GetUsageResponse { usage: Some(self.usage(&tenant)), prefixes: rows })
    }

    fn top(&self, request: api::TopRequest) -> api::TopResponse {
        let limit = match usize::try_from(request.limit).unwrap_or(TOP_DEFAULT) {
            0 => TOP_DEFAULT,
            limit => limit,
        };
        let names = self.cell.tenant_names();
        let tenants = names.iter().filter_map(|name| self.cell.tenant(name));
        let mut rows: Vec<top_response::Row> = tenants.map(|tenant| self.row(&tenant)).collect();
        rows.sort_by(|a, b| b.requests.cmp(&a.requests).then_with(|| a.tenant.cmp(&b.tenant)));
        rows.truncate(limit);
        let own = self.cell.member_id();
        let name = self.cell.membership().member(own).map(|member| member.name.clone());
        api::TopResponse {
            rows,
            member: name.unwrap_or_else(|| format!("{own:x}")),
            since_ms: self.started_at_ms,
            now_ms: now_ms(),
        }
    }

    fn row(&self, tenant: &Tenant) -> top_response::Row {
        let state = tenant.reader().state();
        let traffic = self.traffic(tenant);
        let used = traffic.as_ref().map(|traffic| &traffic.used);
        let cpu = used.map_or(Duration::ZERO, |used| used.cpu()) + tenant.read_time();
        top_response::Row {
            tenant: tenant.name().to_string(),
            requests: traffic.as_ref().map_or(0, TenantTraffic::requests),
            received_bytes: traffic.as_ref().map_or(0, |traffic| traffic.received_bytes),
            sent_bytes: traffic.as_ref().map_or(0, |traffic| traffic.sent_bytes),
            throttled: used.map_or(0, |used| used.held_back().map(|(_, times)| times).sum()),
            cpu_us: u64::try_from(cpu.as_micros()).unwrap_or(u64::MAX),
            watchers: tenant.reader().watch_counts().1 as u64,
            connections: used.map_or(0, |used| used.connections() as u64),
            keys: state.usage.live_keys,
            stored_bytes: state.db_size_bytes(),
            state: state_of(tenant.profile().phase).into(),
        }
    }

    async fn issue(&self, request: api::IssueCredentialsRequest) -> Result<api::IssueCredentialsResponse, Status> {
        let Some(issuer) = self.issuer.clone() else {
            return Err(Status::failed_precondition(
                "this member has no CA to sign with: start it with --issuer-cert-file and --issuer-key-file, or let \
                 another CA of --trusted-ca-file sign a certificate with the URI SAN tenure://tenant/<name>",
            ));
        };
        let api::IssueCredentialsRequest { tenant: name, csr_der, user, ttl_seconds, admin } = request;
        let ttl = if ttl_seconds == 0 { TTL_DEFAULT } else { Duration::from_secs(ttl_seconds) };
        let or = |user: String, default: &str| if user.is_empty() { default.to_string() } else { user };
        if user.len() > USER_BYTES_MAX || user.contains(char::is_control) {
            return Err(Status::invalid_argument(format!(
                "user: want up to {USER_BYTES_MAX} bytes, no control characters"
            )));
        }
        let (user, endpoints) = match (admin, name.as_str()) {
            (true, "") => (or(user, "admin"), Vec::new()),
            (true, _) => {
                return Err(Status::invalid_argument("tenant: want none for a certificate of an administrator"));
            }
            (false, name) => {
                let tenant = self.tenant(name).await?;
                if !tenant.profile().trusted_ca.is_empty() {
                    return Err(Status::failed_precondition(format!(
                        "tenant {name:?} trusts a CA of its own: let that sign a certificate with the URI SAN \
                         tenure://tenant/{name}, or set the tenant back to the cell's CA"
                    )));
                }
                wait_for_second(tenant.profile().credentials_valid_from_ms).await?;
                (or(user, name), self.endpoints(name))
            }
        };
        let signed = tokio::task::spawn_blocking(move || {
            let subject = match admin {
                true => Subject::Admin { user: &user },
                false => Subject::Tenant { name: &name, user: &user },
            };
            Ok::<_, IssueError>((issuer.issue(&csr_der, subject, ttl)?, issuer.ca_pem()?))
        });
        let (issued, ca_pem) = signed.await.map_err(|_| Status::internal("signing failed"))??;
        Ok(api::IssueCredentialsResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem,
            serial: hex(&issued.serial),
            not_after_ms: issued.not_after_ms,
            endpoints,
        })
    }

    /// Where clients of a tenant connect, on every member.
    fn endpoints(&self, tenant: &str) -> Vec<String> {
        let membership = self.cell.membership();
        let of = |member: &tenure_storage::Member| {
            let own = member.tenant_urls.iter().filter(|(of, _)| of == tenant).map(|(_, url)| url.clone());
            let own: Vec<String> = own.collect();
            if own.is_empty() { member.client_urls.clone() } else { own }
        };
        let mut urls: Vec<String> =
            membership.members.iter().filter(|member| !member.is_learner).flat_map(of).collect();
        urls.sort_unstable();
        urls.dedup();
        urls
    }

    async fn revoke(&self, request: api::RevokeCredentialsRequest) -> Result<api::RevokeCredentialsResponse, Status> {
        let tenant = self.tenant(&request.tenant).await?;
        let before_ms = match request.before_ms {
            0 => now_ms(),
            moment if moment > 0 && request.all => moment,
            _ => return Err(Status::invalid_argument("before_ms: want milliseconds since 1970, together with all")),
        };
        match (request.serial.as_str(), request.all) {
            ("", true) => self.cell.revoke_before(&tenant, before_ms).await?,
            (serial, false) if !serial.is_empty() => {
                let Some(serial) = from_hex(serial).filter(|serial| serial.len() <= SERIAL_BYTES_MAX) else {
                    let text = format!("serial: {serial:?}: want the hexadecimal number of a certificate");
                    return Err(Status::invalid_argument(text));
                };
                // Nobody here knows when it ends; no certificate of ours lives longer.
                let ends_at_ms = now_ms().saturating_add(i64::try_from(TTL_MAX.as_millis()).unwrap_or(i64::MAX));
                self.cell.revoke_serial(&tenant, serial.into(), ends_at_ms).await?;
            }
            (_, _) => return Err(Status::invalid_argument("want either a serial or all")),
        }
        Ok(api::RevokeCredentialsResponse { tenant: Some(self.describe(&tenant)) })
    }

    async fn trust(&self, request: api::SetTrustedCaRequest) -> Result<api::SetTrustedCaResponse, Status> {
        let tenant = self.tenant(&request.tenant).await?;
        let certificates = trusted_ca(&request.ca_pem)?;
        if tenant.profile().trusted_ca != certificates {
            self.cell.set_trusted_ca(&tenant, certificates).await?;
        }
        Ok(api::SetTrustedCaResponse { tenant: Some(self.describe(&tenant)) })
    }

    async fn update_cell(&self, request: api::UpdateCellRequest) -> Result<api::GetCellResponse, Status> {
        let limits = limit_changes(&request.reset_limits, request.default_limits)?;
        if !limits.is_empty() {
            self.cell.update_defaults(limits).await?;
        }
        Ok(self.cell())
    }

    fn cell(&self) -> api::GetCellResponse {
        let leader = self.cell.leader_id();
        let membership = self.cell.membership();
        let members = membership.members.iter().map(|member| get_cell_response::Member {
            id: member.id,
            name: member.name.clone(),
            client_urls: member.client_urls.clone(),
            is_leader: member.id == leader,
            is_learner: member.is_learner,
        });
        let names = self.cell.tenant_names();
        let sizes = names.iter().filter_map(|name| Some(self.cell.tenant(name)?.reader().db_size_bytes()));
        let (defaults, quota_bytes) = (self.cell.store().defaults(), self.cell.store().quota_bytes());
        let quota_bytes = u64::try_from(quota_bytes).unwrap_or(0);
        let or = |limit| if limit == Limit::StoredBytes { quota_bytes } else { default_limit(limit) };
        let default = |limit| Some(defaults.get(limit).unwrap_or_else(|| or(limit)));
        api::GetCellResponse {
            cluster_id: self.cell.cluster_id(),
            members: members.collect(),
            tenants: names.len() as u64,
            tenants_max: TENANTS_MAX as u64,
            stored_bytes: sizes.sum(),
            disk_free_bytes: self.cell.disk().free_bytes(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            ca_pem: self.issuer.as_ref().and_then(|issuer| issuer.ca_pem().ok()).unwrap_or_default(),
            issues_credentials: self.issuer.is_some(),
            default_limits: Some(to_limits(default)),
            now_ms: now_ms(),
        }
    }
}

/// What a tenant is to trust, as certificates in DER.
fn trusted_ca(pem: &str) -> Result<Vec<Bytes>, Status> {
    let wrong = |what: String| Status::invalid_argument(format!("ca_pem: {what}"));
    let certificates = certificates_of(pem).map_err(|error| wrong(error.to_string()))?;
    let certificates: Vec<Bytes> = certificates.into_iter().map(|der| Bytes::copy_from_slice(&der)).collect();
    if certificates.is_empty() && !pem.trim().is_empty() {
        return Err(wrong("want certificates in PEM, or nothing for the cell's CA".to_string()));
    }
    if certificates.iter().map(Bytes::len).sum::<usize>() > TRUSTED_CA_BYTES_MAX {
        return Err(wrong(format!("want up to {TRUSTED_CA_BYTES_MAX} bytes of certificates")));
    }
    let is_ca = |der: &Bytes| {
        let parsed = x509_parser::parse_x509_certificate(der).ok();
        let constraints = parsed.and_then(|(_, of)| Some(of.basic_constraints().ok()??.value.ca));
        constraints == Some(true)
    };
    if !certificates.iter().all(is_ca) {
        return Err(wrong("want certificates of CAs (basic constraints CA:TRUE)".to_string()));
    }
    if !certificates.is_empty() {
        verifier_of(&certificates).map_err(|error| wrong(error.to_string()))?;
    }
    Ok(certificates)
}

fn certificate_pem(der: &[u8]) -> String {
    let lines = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), lines)
}

/// Certificates tell whole seconds: waits until one that is made now is not taken for an older one.
///
/// # Errors
/// `FailedPrecondition`: this member's clock is behind that of the one that revoked.
async fn wait_for_second(valid_from_ms: i64) -> Result<(), Status> {
    let left = || u64::try_from(valid_from_ms.saturating_sub(now_ms())).map_or(Duration::ZERO, Duration::from_millis);
    // Clocks differ by up to a second.
    let first = left();
    if !first.is_zero() {
        sleep(first.min(2 * SECOND) + Duration::from_millis(1)).await;
    }
    if left().is_zero() {
        return Ok(());
    }
    let text =
        "this member's clock is behind: what it signed now would count as revoked; set it, or ask another member";
    Err(Status::failed_precondition(text))
}

/// "/registry/pods/" of "/registry/pods/default/a": up to and including the third slash, or the last there is before it.
fn prefix_len(key: &[u8]) -> usize {
    let slashes = key.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at + 1);
    slashes.take(3).last().unwrap_or(0)
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn create_tenant(
        &self,
        request: Request<api::CreateTenantRequest>,
    ) -> Result<Response<api::CreateTenantResponse>, Status> {
        audited(request, async |request| self.0.create(request).await).await
    }

    async fn get_tenant(
        &self,
        request: Request<api::GetTenantRequest>,
    ) -> Result<Response<api::GetTenantResponse>, Status> {
        audited(request, async |request: api::GetTenantRequest| {
            let tenant = self.0.tenant(&request.name).await?;
            Ok(api::GetTenantResponse { tenant: Some(self.0.describe(&tenant)) })
        })
        .await
    }

    async fn list_tenants(
        &self,
        request: Request<api::ListTenantsRequest>,
    ) -> Result<Response<api::ListTenantsResponse>, Status> {
        audited(request, async |request| self.0.list(request).await).await
    }

    async fn update_tenant(
        &self,
        request: Request<api::UpdateTenantRequest>,
    ) -> Result<Response<api::UpdateTenantResponse>, Status> {
        audited(request, async |request| self.0.update(request).await).await
    }

    async fn set_tenant_state(
        &self,
        request: Request<api::SetTenantStateRequest>,
    ) -> Result<Response<api::SetTenantStateResponse>, Status> {
        audited(request, async |request| self.0.set_state(request).await).await
    }

    async fn delete_tenant(
        &self,
        request: Request<api::DeleteTenantRequest>,
    ) -> Result<Response<api::DeleteTenantResponse>, Status> {
        audited(request, async |request| self.0.delete(request).await).await
    }

    async fn get_usage(
        &self,
        request: Request<api::GetUsageRequest>,
    ) -> Result<Response<api::GetUsageResponse>, Status> {
        audited(request, async |request| self.0.prefixes(request).await).await
    }

    async fn top(&self, request: Request<api::TopRequest>) -> Result<Response<api::TopResponse>, Status> {
        audited(request, async |request| Ok(self.0.top(request))).await
    }

    async fn issue_credentials(
        &self,
        request: Request<api::IssueCredentialsRequest>,
    ) -> Result<Response<api::IssueCredentialsResponse>, Status> {
        audited(request, async |request| self.0.issue(request).await).await
    }

    async fn revoke_credentials(
        &self,
        request: Request<api::RevokeCredentialsRequest>,
    ) -> Result<Response<api::RevokeCredentialsResponse>, Status> {
        audited(request, async |request| self.0.revoke(request).await).await
    }

    async fn set_trusted_ca(
        &self,
        request: Request<api::SetTrustedCaRequest>,
    ) -> Result<Response<api::SetTrustedCaResponse>, Status> {
        audited(request, async |request| self.0.trust(request).await).await
    }

    async fn update_cell(
        &self,
        request: Request<api::UpdateCellRequest>,
    ) -> Result<Response<api::GetCellResponse>, Status> {
        audited(request, async |request| self.0.update_cell(request).await).await
    }

    async fn get_cell(&self, request: Request<api::GetCellRequest>) -> Result<Response<api::GetCellResponse>, Status> {
        audited(request, async |_| {
            self.0.cell.read_barrier().await?;
            Ok(self.0.cell())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_told_apart_as_kubernetes_does() {
        for (key, prefix) in [
            ("/registry/pods/default/a", "/registry/pods/"),
            ("/registry/pods", "/registry/"),
            ("compact_rev_key", ""),
            ("a/b", "a/"),
            ("", ""),
        ] {
            assert_eq!(&key[..prefix_len(key.as_bytes())], prefix, "{key}");
        }
    }

    #[test]
    fn serials_are_read_as_tools_write_them() {
        assert_eq!(from_hex("00AB:cd"), Some(vec![0xab, 0xcd]));
        assert_eq!(from_hex("abc"), Some(vec![0x0a, 0xbc]));
        assert_eq!(from_hex(&hex(&[1, 2, 255])), Some(vec![1, 2, 255]));
        for bad in ["", "0", "xy", "é", "aé"] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn limits_are_what_is_set() {
        let message = api::Limits { leases: Some(0), watchers: Some(7), ..api::Limits::default() };
        let set: Vec<_> = limits_of(Some(message)).collect();
        assert_eq!(set, [(Limit::Watchers, 7), (Limit::Leases, 0)]);
        let of = |limit| set.iter().find(|(of, _)| *of == limit).map(|(_, value)| *value);
        assert_eq!(to_limits(of), message);
        assert_eq!(limits_of(None).count(), 0);
    }
}
