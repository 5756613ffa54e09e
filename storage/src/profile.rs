//! What is said of a tenant beside its data: whether it may be used, how much of everything, whose credentials are refused.
//!
//! A profile changes by a [`TenantCommand`](crate::command::TenantCommand), so it is equal on all members; what concerns
//! replicated state (stored bytes, leases, whether writes are taken) `apply` enforces, the rest is the edge's. It has a row of its
//! own beside the tenant's counters: those are written with every batch, this when an operator changes something.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::codec::{Reader, Writer};
use crate::error::{Fault, Refusal};
use crate::limits::{LABELS_MAX, REVOKED_SERIALS_MAX};

/// The second has CAs of the tenant's own. Who has none is written in the first, which older members read too.
const PROFILE_VERSIONS: [u8; 2] = [1, 2];

/// Whether a tenant may be used. The numbers are persisted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TenantPhase {
    #[default]
    Active,
    /// Nothing that makes it grow.
    ReadOnly,
    /// Nothing at all; its leases do not end meanwhile.
    Suspended,
}

impl TenantPhase {
    fn number(self) -> u8 {
        match self {
            TenantPhase::Active => 1,
            TenantPhase::ReadOnly => 2,
            TenantPhase::Suspended => 3,
        }
    }

    fn of_number(number: u8) -> Option<Self> {
        [TenantPhase::Active, TenantPhase::ReadOnly, TenantPhase::Suspended]
            .into_iter()
            .find(|phase| phase.number() == number)
    }

    pub(crate) fn encode(self, w: &mut Writer) {
        w.u8(self.number());
    }

    pub(crate) fn decode(r: &mut Reader) -> Result<Self, Fault> {
        TenantPhase::of_number(r.u8()?).ok_or_else(|| r.corrupt("tenant phase"))
    }
}

/// What can be limited. The order is that of the persisted numbers, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// Every version kept counts. Enforced by `apply`.
    StoredBytes,
    RequestsPerSecond,
    RequestBytesPerSecond,
    ResponseBytesInFlight,
    Watchers,
    /// Requests open at a time, streams among them.
    Streams,
    Connections,
    /// Enforced by `apply`.
    Leases,
    RequestBytes,
    ResponseBytesPerSecond,
}

impl Limit {
    pub const ALL: [Limit; 10] = [
        Limit::StoredBytes,
        Limit::RequestsPerSecond,
        Limit::RequestBytesPerSecond,
        Limit::ResponseBytesInFlight,
        Limit::Watchers,
        Limit::Streams,
        Limit::Connections,
        Limit::Leases,
        Limit::RequestBytes,
        Limit::ResponseBytesPerSecond,
    ];

    /// As operators write it.
    pub fn name(self) -> &'static str {
        match self {
            Limit::StoredBytes => "stored_bytes",
            Limit::RequestsPerSecond => "requests_per_second",
            Limit::RequestBytesPerSecond => "request_bytes_per_second",
            Limit::ResponseBytesInFlight => "response_bytes_in_flight",
            Limit::Watchers => "watchers",
            Limit::Streams => "streams",
            Limit::Connections => "connections",
            Limit::Leases => "leases",
            Limit::RequestBytes => "request_bytes",
            Limit::ResponseBytesPerSecond => "response_bytes_per_second",
        }
    }

    fn number(self) -> u8 {
        self as u8 + 1
    }

    pub(crate) fn encode(self, w: &mut Writer) {
        w.u8(self.number());
    }

    pub(crate) fn decode(r: &mut Reader) -> Result<Self, Fault> {
        let number = r.u8()?;
        Limit::ALL.into_iter().find(|limit| limit.number() == number).ok_or_else(|| r.corrupt("limit"))
    }
}

/// The limits of one tenant, or the cell's for all. One that is not set is the cell's, or what the program has; 0 is none at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TenantLimits(BTreeMap<Limit, u64>);

impl TenantLimits {
    /// As it was set; `None`: the cell's default.
    pub fn get(&self, limit: Limit) -> Option<u64> {
        self.0.get(&limit).copied()
    }

    /// Sets one, or with `None` takes it back to the cell's default.
    pub fn set(&mut self, limit: Limit, value: Option<u64>) {
        match value {
            Some(value) => self.0.insert(limit, value),
            None => self.0.remove(&limit),
        };
    }

    /// Those that are set.
    pub fn iter(&self) -> impl Iterator<Item = (Limit, u64)> + '_ {
        self.0.iter().map(|(limit, value)| (*limit, *value))
    }

    /// Sets several, as [`TenantLimits::set`] does.
    pub(crate) fn change(&mut self, limits: Vec<(Limit, Option<u64>)>) {
        for (limit, value) in limits {
            self.set(limit, value);
        }
    }

    pub(crate) fn encode(&self, w: &mut Writer) {
        w.varint(self.0.len() as u64);
        for (limit, value) in &self.0 {
            limit.encode(w);
            w.varint(*value);
        }
    }

    pub(crate) fn decode(r: &mut Reader) -> Result<Self, Fault> {
        let limits = r.list(|r| Ok((Limit::decode(r)?, r.varint()?)))?;
        Ok(TenantLimits(limits.into_iter().collect()))
    }
}

/// Free words of the operator's, by name.
pub type Labels = BTreeMap<String, String>;

pub(crate) fn encode_labels(w: &mut Writer, labels: &Labels) {
    w.varint(labels.len() as u64);
    for (name, value) in labels {
        w.bytes(name.as_bytes());
        w.bytes(value.as_bytes());
    }
}

pub(crate) fn decode_labels(r: &mut Reader) -> Result<Labels, Fault> {
    Ok(r.list(|r| Ok((r.string()?, r.string()?)))?.into_iter().collect())
}

pub(crate) fn encode_certificates(w: &mut Writer, certificates: &[Bytes]) {
    w.varint(certificates.len() as u64);
    for certificate in certificates {
        w.bytes(certificate);
    }
}

/// Copies: they outlive the entry that they came in.
pub(crate) fn decode_certificates(r: &mut Reader) -> Result<Vec<Bytes>, Fault> {
    r.list(|r| Ok(Bytes::copy_from_slice(&r.bytes()?)))
}

/// See the module's essay. The default is what a tenant has that nobody said anything of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    pub phase: TenantPhase,
    pub limits: TenantLimits,
    pub labels: Labels,
    /// Milliseconds since 1970, by the clock of whoever made it; 0: not known.
    pub created_at_ms: i64,
    /// Certificates that were valid before this moment are refused; 0: none is for that.
    pub credentials_valid_from_ms: i64,
    /// Serial numbers of certificates that are refused, and when they end by themselves.
    pub revoked: BTreeMap<Bytes, i64>,
    /// Who signs its clients' certificates, as certificates in DER; empty: whoever signs for the cell.
    pub trusted_ca: Vec<Bytes>,
    /// The cell's limits, as they are shown to readers along with the tenant's own. Not part of what is stored of it.
    pub(crate) defaults: Arc<TenantLimits>,
}

impl Profile {
    /// What holds for the tenant, by its own limits or the cell's; `None`: nobody said anything.
    pub fn limit(&self, limit: Limit) -> Option<u64> {
        self.limits.get(limit).or_else(|| self.defaults.get(limit))
    }

    /// As readers see it, with the cell's limits.
    pub(crate) fn shown_with(self: &Arc<Self>, defaults: &Arc<TenantLimits>) -> Arc<Profile> {
        match *self.defaults == **defaults {
            true => Arc::clone(self),
            false => Arc::new(Profile { defaults: Arc::clone(defaults), ..Profile::clone(self) }),
        }
    }

    /// Whether a certificate of this tenant is refused. `not_before_ms` is when it began to be valid.
    pub fn is_revoked(&self, serial: &[u8], not_before_ms: i64) -> bool {
        not_before_ms < self.credentials_valid_from_ms || self.revoked.contains_key(serial)
    }

    /// Adds and removes labels.
    ///
    /// # Errors
    /// [`Refusal::TooManyLabels`]; nothing was changed.
    pub(crate) fn change_labels(&mut self, changes: Vec<(String, Option<String>)>) -> Result<(), Refusal> {
        let mut labels = self.labels.clone();
        for (name, value) in changes {
            match value {
                Some(value) => labels.insert(name, value),
                None => labels.remove(&name),
            };
        }
        if labels.len() > LABELS_MAX {
            return Err(Refusal::TooManyLabels);
        }
        self.labels = labels;
        Ok(())
    }

    /// Refuses one certificate until it ends. Those that have ended need no word any more.
    ///
    /// # Errors
    /// [`Refusal::TooManyRevoked`]; nothing was changed.
    pub(crate) fn revoke(&mut self, serial: Bytes, ends_at_ms: i64, now_ms: i64) -> Result<(), Refusal> {
        self.revoked.retain(|_, ends_at_ms| *ends_at_ms > now_ms);
        if self.revoked.len() >= REVOKED_SERIALS_MAX && !self.revoked.contains_key(&serial) {
            return Err(Refusal::TooManyRevoked);
        }
        self.revoked.insert(serial, ends_at_ms);
        Ok(())
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(64);
        w.u8(PROFILE_VERSIONS[usize::from(!self.trusted_ca.is_empty())]);
        self.phase.encode(&mut w);
        self.limits.encode(&mut w);
        encode_labels(&mut w, &self.labels);
        w.i64(self.created_at_ms);
        w.i64(self.credentials_valid_from_ms);
        w.varint(self.revoked.len() as u64);
        for (serial, ends_at_ms) in &self.revoked {
            w.bytes(serial);
            w.i64(*ends_at_ms);
        }
        if !self.trusted_ca.is_empty() {
            encode_certificates(&mut w, &self.trusted_ca);
        }
        w.finish()
    }

    pub(crate) fn decode(stored: Bytes) -> Result<Self, Fault> {
        let mut r = Reader::new(stored, "tenant profile");
        let version = r.u8()?;
        if !PROFILE_VERSIONS.contains(&version) {
            return Err(r.corrupt("tenant profile version"));
        }
        let profile = Profile {
            phase: TenantPhase::decode(&mut r)?,
            limits: TenantLimits::decode(&mut r)?,
            labels: decode_labels(&mut r)?,
            created_at_ms: r.i64()?,
            credentials_valid_from_ms: r.i64()?,
            revoked: r.list(|r| Ok((Bytes::copy_from_slice(&r.bytes()?), r.i64()?)))?.into_iter().collect(),
            trusted_ca: if version == PROFILE_VERSIONS[1] { decode_certificates(&mut r)? } else { Vec::new() },
            defaults: Arc::default(),
        };
        r.end()?;
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_as_it_was_written() {
        let mut profile = Profile {
            phase: TenantPhase::Suspended,
            labels: Labels::from([("team".to_string(), "a".to_string())]),
            created_at_ms: 1_700_000_000_000,
            credentials_valid_from_ms: 5,
            ..Profile::default()
        };
        for (number, limit) in Limit::ALL.into_iter().enumerate() {
            profile.limits.set(limit, Some(number as u64));
        }
        profile.revoke(Bytes::from_static(&[1, 2]), 10, 0).unwrap();
        assert_eq!(Profile::decode(profile.encode()).unwrap(), profile);
        assert_eq!(profile.encode()[0], 1, "what older members read");
        profile.trusted_ca = vec![Bytes::from_static(b"first"), Bytes::from_static(b"second")];
        assert_eq!(profile.encode()[0], 2);
        assert_eq!(Profile::decode(profile.encode()).unwrap(), profile);
        assert_eq!(Profile::decode(Profile::default().encode()).unwrap(), Profile::default());
        let mut longer = profile.encode().to_vec();
        longer.push(0);
        assert!(Profile::decode(longer.into()).is_err());
    }

    #[test]
    fn certificates_are_refused_one_by_one_or_by_their_age() {
        let mut profile = Profile { credentials_valid_from_ms: 100, ..Profile::default() };
        profile.revoke(Bytes::from_static(b"a"), 1_000, 0).unwrap();
        assert!(profile.is_revoked(b"a", 200) && profile.is_revoked(b"b", 99) && !profile.is_revoked(b"b", 100));
        // What has ended makes room.
        for number in 1..REVOKED_SERIALS_MAX {
            profile.revoke(Bytes::from(number.to_be_bytes().to_vec()), 2_000, 0).unwrap();
        }
        assert_eq!(profile.revoke(Bytes::from_static(b"b"), 2_000, 0), Err(Refusal::TooManyRevoked));
        profile.revoke(Bytes::from_static(b"b"), 2_000, 1_000).unwrap();
        assert!(!profile.revoked.contains_key(&b"a"[..]));
    }

    #[test]
    fn labels_have_a_bound() {
        let mut profile = Profile::default();
        let label = |number: usize| (number.to_string(), Some(String::new()));
        profile.change_labels((0..LABELS_MAX).map(label).collect()).unwrap();
        assert_eq!(profile.change_labels(vec![label(LABELS_MAX)]), Err(Refusal::TooManyLabels));
        profile.change_labels(vec![("0".to_string(), None), label(LABELS_MAX)]).unwrap();
        assert_eq!(profile.labels.len(), LABELS_MAX);
    }
}
