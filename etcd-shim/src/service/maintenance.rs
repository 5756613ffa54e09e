//! `etcdserverpb.Maintenance`: Alarm, Status, Defragment, HashKV.
//!
//! Everything is per tenant: sizes are what the tenant stores, alarms are its own, and the raft indexes of Status are its
//! revision, because those of the log count the writes of all tenants. Hash, Snapshot and Downgrade are not
//! built.

use tenure_storage::{Alarm, AlarmKind, Command, Reply};
use tokio_stream::Pending;
use tonic::{Request, Response, Status};

use crate::cell::{DEFAULT_TENANT, Tenant};
use crate::cell_error::CellError;
use crate::check::CheckError;
use crate::convert::to_proto;
use crate::proto::etcdserverpb::alarm_request::AlarmAction;
use crate::proto::etcdserverpb::maintenance_server::Maintenance;
use crate::proto::etcdserverpb::{
    AlarmRequest, AlarmResponse, DefragmentRequest, DefragmentResponse, DowngradeInfo, DowngradeRequest,
    DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest, HashResponse, MoveLeaderRequest, MoveLeaderResponse,
    SnapshotRequest, SnapshotResponse, StatusRequest, StatusResponse,
};
use crate::service::{Context, ETCD_VERSION, STORAGE_VERSION, header, write};
use crate::status::{mismatched_reply, not_built};

/// The Maintenance service.
#[derive(Clone)]
pub struct MaintenanceService {
    context: Context,
}

impl MaintenanceService {
    pub fn new(context: Context) -> Self {
        MaintenanceService { context }
    }
}

/// The alarms a request affected or asked for, with the header.
async fn alarms(tenant: &Tenant, request: AlarmRequest) -> Result<AlarmResponse, Status> {
    let action = AlarmAction::try_from(request.action).map_err(|_| CheckError::UnknownAlarmAction)?;
    let kind = AlarmKind(request.alarm);
    let activate = match action {
        AlarmAction::Get => return alarms_of(tenant, kind).await,
        AlarmAction::Activate => true,
        AlarmAction::Deactivate => false,
    };
    if kind == AlarmKind::NONE {
        let header = header(tenant, tenant.reader().revision());
        return Ok(AlarmResponse { header: Some(header), alarms: vec![] });
    }
    let (header, reply) = write(tenant, Command::Alarm { activate, member_id: request.member_id, kind }).await?;
    let Reply::Alarm { alarms } = reply else { return Err(mismatched_reply("Alarm")) };
    Ok(AlarmResponse { header: Some(header), alarms: alarms.iter().map(to_proto::alarm).collect() })
}

/// Active alarms of a kind, of whatever member; all of them for [`AlarmKind::NONE`].
async fn alarms_of(tenant: &Tenant, kind: AlarmKind) -> Result<AlarmResponse, Status> {
    // In etcd this call goes through the log, and fails like a write.
    tenant.read_barrier().await.map_err(|error| match error {
        CellError::TimeoutRead => CellError::TimeoutWrite,
        CellError::Refused(_)
        | CellError::NoLeader
        | CellError::LeaderChanged
        | CellError::TimeoutWrite
        | CellError::TimeoutApply
        | CellError::TooManyRequests
        | CellError::TooLarge
        | CellError::Membership(_)
        | CellError::Stopped
        | CellError::Fault(_) => error,
    })?;
    let state = tenant.reader().state();
    let wanted = |alarm: &&Alarm| kind == AlarmKind::NONE || alarm.kind == kind;
    Ok(AlarmResponse {
        header: Some(header(tenant, state.revision)),
        alarms: state.alarms.iter().filter(wanted).map(to_proto::alarm).collect(),
    })
}

/// An alarm as Status words it.
fn alarm_text(alarm: &Alarm) -> String {
    let kind = match alarm.kind {
        AlarmKind::NOSPACE => "NOSPACE".to_string(),
        AlarmKind::CORRUPT => "CORRUPT".to_string(),
        AlarmKind(number) => number.to_string(),
    };
    format!("memberID:{} alarm:{kind}", alarm.member_id)
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        alarms(&tenant, request.into_inner()).await.map(Response::new)
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let tenant = self.context.tenant_of_any(&request)?;
        let state = tenant.reader().state();
        let leader = tenant.leader_id();
        let mut errors = Vec::new();
        if leader == 0 {
            errors.push("etcdserver: no leader".to_string());
        }
        if tenant.is_disk_full() {
            errors.push("etcdserver: the disk of this member is full".to_string());
        }
        errors.extend(state.alarms.iter().map(alarm_text));
        let index = state.revision.unsigned_abs();
        Ok(Response::new(StatusResponse {
            header: Some(header(&tenant, state.revision)),
            version: ETCD_VERSION.to_string(),
            db_size: to_proto::count(state.db_size_bytes()),
            leader,
            raft_index: index,
            raft_term: tenant.raft_term(),
            raft_applied_index: index,
            errors,
            db_size_in_use: to_proto::count(state.db_in_use_bytes()),
            is_learner: tenant.is_learner(),
            storage_version: STORAGE_VERSION.to_string(),
            db_size_quota: tenant.quota_bytes(),
            downgrade_info: Some(DowngradeInfo::default()),
        }))
    }

    async fn defragment(&self, request: Request<DefragmentRequest>) -> Result<Response<DefragmentResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        // Files are everybody's: others than the operator's tenant must not have them rewritten as often as they like, and gain nothing
        // by it, because what is compacted does not count against their quota.
        if tenant.name() == DEFAULT_TENANT {
            tenant.defragment().await?;
        }
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn hash(&self, _: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        Err(not_built("Hash"))
    }

    async fn hash_kv(&self, request: Request<HashKvRequest>) -> Result<Response<HashKvResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let HashKvRequest { revision } = request.into_inner();
        let hash = tenant.answered(tenant.read(move |reader| reader.hash_kv(revision)).await?)?;
        Ok(Response::new(HashKvResponse {
            header: Some(header(&tenant, hash.revision)),
            hash: hash.hash,
            compact_revision: hash.compact_revision,
            hash_revision: hash.hash_revision,
        }))
    }

    type SnapshotStream = Pending<Result<SnapshotResponse, Status>>;

    async fn snapshot(&self, _: Request<SnapshotRequest>) -> Result<Response<Self::SnapshotStream>, Status> {
        Err(not_built("Snapshot"))
    }

    async fn move_leader(&self, request: Request<MoveLeaderRequest>) -> Result<Response<MoveLeaderResponse>, Status> {
        let tenant = self.context.operator_of(&request)?;
        tracing::info!(tenant = tenant.name(), "move the leader");
        self.context.cell.move_leader(request.into_inner().target_id).await?;
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn downgrade(&self, _: Request<DowngradeRequest>) -> Result<Response<DowngradeResponse>, Status> {
        Err(not_built("Downgrade"))
    }
}
