//! What `build.rs` generates from `proto/`: message types and the service traits, one module per protobuf package.
//!
//! Three messages are not here but in [`crate::wire`], which writes them from stored bytes.

#![allow(clippy::all, clippy::pedantic, unreachable_pub, reason = "generated")]

pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

pub mod authpb {
    tonic::include_proto!("authpb");
}

pub mod v3lockpb {
    tonic::include_proto!("v3lockpb");
}

pub mod v3electionpb {
    tonic::include_proto!("v3electionpb");
}

/// Between members.
pub mod cell {
    tonic::include_proto!("tenure.cell.v1");
}

pub mod grpc {
    pub mod health {
        pub mod v1 {
            tonic::include_proto!("grpc.health.v1");
        }
    }
}
