//! Tenants come and go through here: create a tenant, get its credentials and the exact flags for its apiserver, rotate,
//! suspend, delete. Not built yet; the admin API it will speak does not exist either.
