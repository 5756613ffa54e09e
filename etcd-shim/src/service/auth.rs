//! `etcdserverpb.Auth`: not built. A tenant's clients are told apart from other tenants' by their connection; within a
//! tenant everybody may do everything.
//!
//! Two methods answer all the same, because what they say is true of a server without authentication: `AuthStatus` that it
//! is off, at the auth revision of a fresh store, and `Authenticate` that it is not enabled, at which clients go on
//! without a token.

use tonic::{Request, Response, Status};

use crate::proto::etcdserverpb as pb;
use crate::proto::etcdserverpb::auth_server::Auth;
use crate::service::{Context, header};
use crate::status::{auth_not_enabled, not_built};

/// The auth revision of a store in which nothing about users was ever changed.
const FRESH_AUTH_REVISION: u64 = 1;

/// The Auth service.
#[derive(Clone)]
pub struct AuthService {
    context: Context,
}

impl AuthService {
    pub fn new(context: Context) -> Self {
        AuthService { context }
    }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_status(
        &self,
        request: Request<pb::AuthStatusRequest>,
    ) -> Result<Response<pb::AuthStatusResponse>, Status> {
        let tenant = self.context.tenant_of(&request)?;
        let header = header(&tenant, tenant.reader().revision());
        Ok(Response::new(pb::AuthStatusResponse {
            header: Some(header),
            enabled: false,
            auth_revision: FRESH_AUTH_REVISION,
        }))
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        self.context.tenant_of(&request)?;
        Err(auth_not_enabled())
    }

    async fn auth_enable(&self, _: Request<pb::AuthEnableRequest>) -> Result<Response<pb::AuthEnableResponse>, Status> {
        Err(not_built("AuthEnable"))
    }

    async fn auth_disable(
        &self,
        _: Request<pb::AuthDisableRequest>,
    ) -> Result<Response<pb::AuthDisableResponse>, Status> {
        Err(not_built("AuthDisable"))
    }

    async fn user_add(&self, _: Request<pb::AuthUserAddRequest>) -> Result<Response<pb::AuthUserAddResponse>, Status> {
        Err(not_built("UserAdd"))
    }

    async fn user_get(&self, _: Request<pb::AuthUserGetRequest>) -> Result<Response<pb::AuthUserGetResponse>, Status> {
        Err(not_built("UserGet"))
    }

    async fn user_list(
        &self,
        _: Request<pb::AuthUserListRequest>,
    ) -> Result<Response<pb::AuthUserListResponse>, Status> {
        Err(not_built("UserList"))
    }

    async fn user_delete(
        &self,
        _: Request<pb::AuthUserDeleteRequest>,
    ) -> Result<Response<pb::AuthUserDeleteResponse>, Status> {
        Err(not_built("UserDelete"))
    }

    async fn user_change_password(
        &self,
        _: Request<pb::AuthUserChangePasswordRequest>,
    ) -> Result<Response<pb::AuthUserChangePasswordResponse>, Status> {
        Err(not_built("UserChangePassword"))
    }

    async fn user_grant_role(
        &self,
        _: Request<pb::AuthUserGrantRoleRequest>,
    ) -> Result<Response<pb::AuthUserGrantRoleResponse>, Status> {
        Err(not_built("UserGrantRole"))
    }

    async fn user_revoke_role(
        &self,
        _: Request<pb::AuthUserRevokeRoleRequest>,
    ) -> Result<Response<pb::AuthUserRevokeRoleResponse>, Status> {
        Err(not_built("UserRevokeRole"))
    }

    async fn role_add(&self, _: Request<pb::AuthRoleAddRequest>) -> Result<Response<pb::AuthRoleAddResponse>, Status> {
        Err(not_built("RoleAdd"))
    }

    async fn role_get(&self, _: Request<pb::AuthRoleGetRequest>) -> Result<Response<pb::AuthRoleGetResponse>, Status> {
        Err(not_built("RoleGet"))
    }

    async fn role_list(
        &self,
        _: Request<pb::AuthRoleListRequest>,
    ) -> Result<Response<pb::AuthRoleListResponse>, Status> {
        Err(not_built("RoleList"))
    }

    async fn role_delete(
        &self,
        _: Request<pb::AuthRoleDeleteRequest>,
    ) -> Result<Response<pb::AuthRoleDeleteResponse>, Status> {
        Err(not_built("RoleDelete"))
    }

    async fn role_grant_permission(
        &self,
        _: Request<pb::AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<pb::AuthRoleGrantPermissionResponse>, Status> {
        Err(not_built("RoleGrantPermission"))
    }

    async fn role_revoke_permission(
        &self,
        _: Request<pb::AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<pb::AuthRoleRevokePermissionResponse>, Status> {
        Err(not_built("RoleRevokePermission"))
    }
}
