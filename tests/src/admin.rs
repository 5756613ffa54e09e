//! A client of the admin API.

use std::path::Path;

use hyper_util::rt::TokioIo;
use tenure_admin_api::v1::admin_client::AdminClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Connects to a member's admin socket when it is first asked something.
pub fn connect(socket: &Path) -> AdminClient<Channel> {
    let socket = socket.to_path_buf();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    AdminClient::new(Endpoint::from_static("http://admin").connect_with_connector_lazy(connector))
}
