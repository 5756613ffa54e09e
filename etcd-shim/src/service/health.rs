//! `grpc.health.v1.Health`: whether this server answers. One service is known, the unnamed one, and it always serves: a
//! server that does not is not listening. A learner refuses here too (contract 1.1).

use std::collections::HashMap;
use std::pin::Pin;

use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::proto::grpc::health::v1::health_check_response::ServingStatus;
use crate::proto::grpc::health::v1::health_server::Health;
use crate::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use crate::service::Context;

/// The name under which the server as a whole is asked for.
const WHOLE_SERVER: &str = "";

/// The health service.
#[derive(Clone)]
pub struct HealthService {
    context: Context,
}

impl HealthService {
    pub fn new(context: Context) -> Self {
        HealthService { context }
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        self.context.check_voter()?;
        if request.get_ref().service == WHOLE_SERVER {
            Ok(Response::new(response(ServingStatus::Serving)))
        } else {
            Err(Status::not_found("unknown service"))
        }
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        self.context.check_voter()?;
        let statuses = HashMap::from([(WHOLE_SERVER.to_string(), response(ServingStatus::Serving))]);
        Ok(Response::new(HealthListResponse { statuses }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// The status once; it does not change until the connection ends.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.context.check_voter()?;
        let status = if request.get_ref().service == WHOLE_SERVER {
            ServingStatus::Serving
        } else {
            ServingStatus::ServiceUnknown
        };
        let stream = tokio_stream::once(Ok(response(status))).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }
}
