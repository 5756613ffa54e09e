//! `etcdserverpb.Cluster`: who is in the cell, and changes of that (contract 1.4).
//!
//! The members are the cell's, the same for every tenant; each tenant is told where its own clients connect. Changing them is an
//! operator's business: only the tenant `default` may, the others are refused.

use tenure_storage::Member as CellMember;
use tonic::{Request, Response, Status};

use crate::cell::Tenant;
use crate::proto::etcdserverpb::cluster_server::Cluster;
use crate::proto::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse, MemberPromoteRequest,
    MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse, MemberUpdateRequest, MemberUpdateResponse,
};
use crate::service::{Context, header};

/// The Cluster service.
#[derive(Clone)]
pub struct ClusterService {
    context: Context,
}

impl ClusterService {
    pub fn new(context: Context) -> Self {
        ClusterService { context }
    }

    /// All members, by id, as a tenant's clients see them.
    fn members(&self, tenant: &Tenant) -> Vec<Member> {
        self.context.cell.membership().members.iter().map(|member| as_seen_by(tenant.name(), member)).collect()
    }
}

fn as_seen_by(tenant: &str, member: &CellMember) -> Member {
    let own = member.tenant_urls.iter().filter(|(of, _)| of == tenant).map(|(_, url)| url.clone());
    let own: Vec<String> = own.collect();
    Member {
        id: member.id,
        name: member.name.clone(),
        peer_ur_ls: member.peer_urls.clone(),
        client_ur_ls: if own.is_empty() { member.client_urls.clone() } else { own },
        is_learner: member.is_learner,
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    // Headers of this service carry no revision.

    async fn member_list(&self, request: Request<MemberListRequest>) -> Result<Response<MemberListResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        if request.into_inner().linearizable {
            tenant.read_barrier().await?;
        }
        Ok(Response::new(MemberListResponse { header: Some(header(&tenant, 0)), members: self.members(&tenant) }))
    }

    async fn member_add(&self, request: Request<MemberAddRequest>) -> Result<Response<MemberAddResponse>, Status> {
        let tenant = self.context.operator_of(&request)?;
        let MemberAddRequest { peer_ur_ls, is_learner } = request.into_inner();
        let id = self.context.cell.add_member(peer_ur_ls, is_learner).await?;
        self.context.cell.wait_for_membership(|now| now.member(id).is_some()).await;
        let members = self.members(&tenant);
        let member = members.iter().find(|member| member.id == id).cloned();
        Ok(Response::new(MemberAddResponse { header: Some(header(&tenant, 0)), member, members }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let tenant = self.context.operator_of(&request)?;
        let id = request.into_inner().id;
        self.context.cell.remove_member(id).await?;
        // A member that removed itself hears nothing from the others any more.
        if id != tenant.member_id() {
            self.context.cell.wait_for_membership(|now| now.member(id).is_none()).await;
        }
        let members = self.members(&tenant).into_iter().filter(|member| member.id != id).collect();
        Ok(Response::new(MemberRemoveResponse { header: Some(header(&tenant, 0)), members }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let tenant = self.context.operator_of(&request)?;
        let MemberUpdateRequest { id, peer_ur_ls } = request.into_inner();
        self.context.cell.set_peer_urls(id, peer_ur_ls).await?;
        Ok(Response::new(MemberUpdateResponse { header: Some(header(&tenant, 0)), members: self.members(&tenant) }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        let tenant = self.context.operator_of(&request)?;
        let id = request.into_inner().id;
        self.context.cell.promote_member(id).await?;
        self.context.cell.wait_for_membership(|now| now.member(id).is_none_or(|member| !member.is_learner)).await;
        Ok(Response::new(MemberPromoteResponse { header: Some(header(&tenant, 0)), members: self.members(&tenant) }))
    }
}
