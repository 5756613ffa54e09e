//! How a served store ends: what runs may end, what does not end is cut, and nothing is lost that was acknowledged.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use prost::Message as _;
use tenure_etcd_shim::Tenure;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::proto::etcdserverpb::{PutRequest, WatchCreateRequest, WatchRequest};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longer than etcd lets requests run on: who waits this long waits for ever.
const PATIENCE: Duration = Duration::from_secs(180);

async fn connect(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    requests
}

fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::from(&[0u8][..]);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}

async fn call(
    requests: &SendRequest<Bytes>,
    path: &str,
    message: &[u8],
    end: bool,
) -> Result<(ResponseFuture, h2::SendStream<Bytes>), h2::Error> {
    let request = Request::post(format!("http://localhost{path}")).header("content-type", "application/grpc");
    let request = request.header("te", "trailers").body(()).unwrap();
    let (response, mut body) = requests.clone().ready().await?.send_request(request, false)?;
    body.send_data(framed(message), end)?;
    Ok((response, body))
}

/// Opens a watch and waits until the server has said that it is there.
async fn open_watch(requests: &SendRequest<Bytes>) -> (h2::SendStream<Bytes>, h2::RecvStream) {
    let create = WatchCreateRequest { key: "k".into(), ..WatchCreateRequest::default() };
    let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    let (response, body) = call(requests, "/etcdserverpb.Watch/Watch", &request.encode_to_vec(), false).await.unwrap();
    let mut answers = response.await.unwrap().into_body();
    answers.data().await.unwrap().unwrap();
    (body, answers)
}

/// Puts until the server takes no more; answers how many it acknowledged.
async fn put_on(requests: SendRequest<Bytes>) -> i64 {
    let message = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() }.encode_to_vec();
    let mut acknowledged = 0;
    loop {
        let put = async {
            let (response, _body) = call(&requests, "/etcdserverpb.KV/Put", &message, true).await?;
            let mut answer = response.await?.into_body();
            while let Some(data) = answer.data().await {
                data?;
            }
            answer.trailers().await
        };
        match put.await {
            Ok(Some(trailers)) if trailers.get("grpc-status").is_some_and(|status| status == "0") => acknowledged += 1,
            Ok(_) | Err(_) => return acknowledged,
        }
    }
}

async fn start(dir: &std::path::Path) -> Tenure {
    // The longer the election timeout, the longer requests wait for a disk that is busy.
    let builder = Tenure::builder().timing(Duration::from_millis(100), Duration::from_secs(50));
    builder.data_dir(dir).listen("http://127.0.0.1:0").start().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_watch_is_cut_and_the_data_directory_is_free_again() {
    let dir = tempfile::tempdir().unwrap();
    let tenure = start(dir.path()).await;
    let requests = connect(tenure.addresses()[0]).await;
    let (_body, mut answers) = open_watch(&requests).await;
    timeout(PATIENCE, tenure.stop()).await.expect("a stream that nobody ends does not hold up the stop");
    let ended = timeout(PATIENCE, answers.data()).await.expect("the client is told");
    assert!(ended.is_none_or(|data| data.is_err()));
    start(dir.path()).await.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_while_it_stopped_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let tenure = start(dir.path()).await;
    let address = tenure.addresses()[0];
    let writers: Vec<_> = futures::future::join_all((0..4).map(|_| connect(address)))
        .await
        .into_iter()
        .map(|requests| tokio::spawn(put_on(requests)))
        .collect();
    let default = tenure.cell().tenant("default").unwrap();
    while default.reader().revision() < 100 {
        tokio::task::yield_now().await;
    }
    drop(default);
    tenure.stop_hurried_by(async {}).await;
    let mut acknowledged = 0;
    for writer in writers {
        acknowledged += timeout(PATIENCE, writer).await.expect("no request is left hanging").unwrap();
    }
    let tenure = start(dir.path()).await;
    let revision = tenure.cell().tenant("default").unwrap().reader().revision();
    // Revision 1 is the empty store. A write may be there whose answer was cut.
    assert!(revision > acknowledged && acknowledged >= 90, "{acknowledged} acknowledged, revision {revision}");
    tenure.stop().await;
}
