//! What a tenant costs that does nothing.

use std::path::PathBuf;

use anyhow::Context as _;
use futures::StreamExt as _;
use tenure_etcd_shim::Tenure;

use crate::process;

/// Tenants made at the same time.
const AT_ONCE: usize = 64;

/// Makes a member in this process with so many tenants that hold a key each; answers what resident memory grew by, divided by
/// them. The first tenth is made before counting begins: what grows with them is not what starts up.
///
/// # Errors
/// If the member does not start or a write fails.
pub async fn rss_bytes_per_tenant(dir: PathBuf, tenants: usize) -> anyhow::Result<u64> {
    let tenure = Tenure::builder().data_dir(dir).start().await?;
    let make = |from: usize, to: usize| {
        let tenure = &tenure;
        async move {
            let one = async |number: usize| -> anyhow::Result<()> {
                let name = crate::server::tenant_name(number);
                tenure.cell().create_tenant(&name).await?;
                tenure.client(&name).context("the tenant was made")?.put("key", "value").await?;
                Ok(())
            };
            let mut made = futures::stream::iter(from..to).map(one).buffer_unordered(AT_ONCE);
            while let Some(one) = made.next().await {
                one?;
            }
            anyhow::Ok(())
        }
    };
    let first = tenants / 10;
    make(0, first).await?;
    let before = process::rss_bytes(std::process::id());
    make(first, tenants).await?;
    let grown = process::rss_bytes(std::process::id()).saturating_sub(before);
    tenure.stop().await;
    Ok(grown / (tenants - first).max(1) as u64)
}
