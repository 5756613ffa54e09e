//! `etcdserverpb.Cluster`: MemberList. Membership does not change yet, so the methods that change it are not built.

use tonic::{Request, Response, Status};

use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
};
use crate::service::{Context, header};
use crate::status::not_built;

/// The Cluster service.
#[derive(Clone)]
pub struct ClusterService {
    context: Context,
}

impl ClusterService {
    pub fn new(context: Context) -> Self {
        ClusterService { context }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        if request.into_inner().linearizable {
            tenant.read_barrier().await?;
        }
        let names = &self.context.member;
        let member = Member {
            id: tenant.member_id(),
            name: names.name.clone(),
            peer_ur_ls: names.peer_urls.clone(),
            client_ur_ls: names.client_urls_of(tenant.name()).to_vec(),
            is_learner: false,
        };
        // Headers of this service carry no revision.
        Ok(Response::new(MemberListResponse { header: Some(header(&tenant, 0)), members: vec![member] }))
    }

    async fn member_add(&self, _: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        Err(not_built("MemberAdd"))
    }

    async fn member_remove(&self, _: Request<MemberRemoveRequest>) -> Result<Response<MemberRemoveResponse>, Status> {
        Err(not_built("MemberRemove"))
    }

    async fn member_update(&self, _: Request<MemberUpdateRequest>) -> Result<Response<MemberUpdateResponse>, Status> {
        Err(not_built("MemberUpdate"))
    }

    async fn member_promote(
        &self,
        _: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        Err(not_built("MemberPromote"))
    }
}
