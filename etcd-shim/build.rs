//! Generates the server side of the etcd v3 API from `proto/`, without protoc.

/// Every file under `proto/` that holds a service, and the messages between members; what they import comes along.
const PROTOS: [&str; 5] = ["rpc.proto", "v3lock.proto", "v3election.proto", "health.proto", "cell.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_transport(false)
        // Byte fields of a request share the buffer it was received in.
        .bytes(".")
        .codec_path("crate::codec::WireCodec")
        // Answers made of stored bytes: see wire.rs.
        .extern_path(".mvccpb.KeyValue", "crate::wire::StoredKeyValue")
        .extern_path(".etcdserverpb.RangeResponse", "crate::wire::RangeResponse")
        .extern_path(".etcdserverpb.WatchResponse", "crate::wire::WatchResponse")
        .compile_fds(files)?;
    Ok(())
}
