//! The audit log of the admin API: one line for each call, and one for each connection that was refused.
//!
//! A line says who called, what was asked, and what came of it; when is the line's own time. It goes where the log goes, under the
//! target [`AUDIT`], which no level turns off.
//!
//! Life of a line: begun when a call's headers are in, before anything of it is looked at ([`Line::begin`]); the method notes what
//! was asked as soon as it has the message, and what it gave ([`Call`]); written when there is an answer. If there never is one,
//! because the client went away or the member stops, the line is written when the call is dropped, with the result `unknown`: what
//! was asked may be done all the same. So there is exactly one, also of a message that is none and of a method that does not exist.
//!
//! Never in it: keys, certificates, signing requests. What a caller may choose is cut at [`TEXT_BYTES_MAX`].

use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;

use http::HeaderMap;
use parking_lot::Mutex;
use tenure_admin_api::v1 as api;
use tonic::{Code, Status};

use crate::admin::{hex, limits_of};
use crate::logging::AUDIT;
use crate::tenant::PeerCertificate;

/// Longest text of one field of a line, in bytes. All labels that a tenant may have fit.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// What stands before the method in a path.
const SERVICE: &str = "/tenure.admin.v1.Admin/";

/// Who calls, and from where.
#[derive(Clone, Debug, Default)]
pub struct Caller(Arc<Shown>);

#[derive(Debug, Default)]
struct Shown {
    who: Option<String>,
    /// The serial number of the certificate, in hexadecimal.
    certificate: Option<String>,
    from: Option<String>,
}

impl Caller {
    /// Whoever is at the other end: with the name in the certificate, or as a user of this machine.
    pub fn new(certificate: Option<&PeerCertificate>, user: Option<u32>, from: Option<SocketAddr>) -> Self {
        let by_name = |certificate: &PeerCertificate| certificate.common_name.clone();
        let named =
            certificate.and_then(|certificate| by_name(certificate).or_else(|| certificate.uris.first().cloned()));
        Caller(Arc::new(Shown {
            who: named.or_else(|| user.map(|user| format!("uid {user}"))),
            certificate: certificate.map(|certificate| hex(&certificate.serial)),
            from: from.map(|from| from.to_string()),
        }))
    }

    /// Writes that a connection of theirs was refused; `left_out`: how many lines before it were not written.
    pub fn refused(&self, code: Code, reason: impl fmt::Display, left_out: u64) {
        let status = Status::new(code, reason.to_string());
        let asked = if left_out > 0 { format!("{left_out} more before it") } else { String::new() };
        write(self, "connect", &Said { asked, ..Said::default() }, Some(Err(&status)));
    }
}

/// What is noted of a call while it runs. Travels in the extensions of its request.
#[derive(Clone, Debug, Default)]
pub struct Call(Arc<Mutex<Said>>);

#[derive(Debug, Default)]
struct Said {
    tenant: String,
    asked: String,
    answered: String,
}

impl Call {
    pub fn note_asked(&self, message: &impl Asked) {
        let mut said = self.0.lock();
        said.tenant = cut(message.tenant()).to_string();
        said.asked = words(|words| message.asked(words));
    }

    pub fn note_answered(&self, message: &impl Answered) {
        self.0.lock().answered = words(|words| message.answered(words));
    }
}

/// The line of one call; written when it is dropped.
#[derive(Debug)]
pub struct Line {
    caller: Caller,
    what: String,
    call: Call,
    ended: Option<Result<(), Status>>,
}

impl Line {
    /// `path` is the call's.
    pub fn begin(caller: Caller, path: &str) -> Self {
        let what = cut(path.strip_prefix(SERVICE).unwrap_or(path)).to_string();
        Line { caller, what, call: Call::default(), ended: None }
    }

    pub fn call(&self) -> Call {
        self.call.clone()
    }

    /// There is an answer, with these headers. One that is no error says so in its trailers, and nothing but its message comes
    /// before them.
    pub fn end(mut self, headers: &HeaderMap) {
        self.ended = Some(match Status::from_header_map(headers) {
            Some(status) if status.code() != Code::Ok => Err(status),
            Some(_) | None => Ok(()),
        });
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let ended = self.ended.as_ref().map(|ended| ended.as_ref().copied());
        write(&self.caller, &self.what, &self.call.0.lock(), ended);
    }
}

fn write(caller: &Caller, what: &str, said: &Said, ended: Option<Result<(), &Status>>) {
    let Shown { who, certificate, from } = &*caller.0;
    let who = who.as_deref().map_or("nobody", cut);
    let (certificate, from) = (certificate.as_deref().map(cut), from.as_deref());
    let some = |text| Some(text).filter(|text: &&str| !text.is_empty());
    let (tenant, asked, answered) = (some(&said.tenant), some(&said.asked), some(&said.answered));
    let (result, error) = match ended {
        Some(Ok(())) => {
            let result = "OK";
            return tracing::info!(
                target: AUDIT, who, certificate, from, what, tenant, asked, answered, result, "administration"
            );
        }
        Some(Err(status)) => (format!("{:?}", status.code()), some(cut(status.message()))),
        None => ("unknown".to_string(), Some("nobody waited for the answer: it may be done")),
    };
    tracing::warn!(
        target: AUDIT, who, certificate, from, what, tenant, asked, answered, result, error, "administration"
    );
}

fn cut(text: &str) -> &str {
    let whole = |at: &usize| text.is_char_boundary(*at);
    &text[..(0..=TEXT_BYTES_MAX.min(text.len())).rev().find(whole).unwrap_or(0)]
}

/// `name=value` after `name=value`.
#[derive(Default)]
pub struct Words(String);

fn words(say: impl FnOnce(&mut Words)) -> String {
    let mut words = Words::default();
    say(&mut words);
    match cut(&words.0) {
        all if all.len() == words.0.len() => words.0,
        part => format!("{part}…"),
    }
}

impl Words {
    fn add(&mut self, name: &str, value: impl fmt::Display) {
        // Past the bound nothing of it will be seen.
        if self.0.len() <= TEXT_BYTES_MAX {
            let blank = if self.0.is_empty() { "" } else { " " };
            // A string takes everything.
            let _ = write!(self.0, "{blank}{name}={value}");
        }
    }

    /// A text that a caller chose.
    fn add_text(&mut self, name: &str, value: &str) {
        self.add(name, format_args!("{:?}", cut(value)));
    }

    fn add_limits(&mut self, limits: Option<api::Limits>, reset: &[String]) {
        for (limit, value) in limits_of(limits) {
            self.add(limit.name(), value);
        }
        for name in reset {
            self.add_text("reset", name);
        }
    }

    fn add_labels<'a>(&mut self, labels: impl IntoIterator<Item = (&'a String, &'a String)>) {
        let mut labels: Vec<_> = labels.into_iter().collect();
        labels.sort();
        for (name, value) in labels {
            self.add("label", format_args!("{:?}:{:?}", cut(name), cut(value)));
        }
    }
}

/// What a request asks for, as far as it is no secret.
pub trait Asked {
    /// Empty if it is about none.
    fn tenant(&self) -> &str;
    fn asked(&self, words: &mut Words);
}

/// What an answer gives that the request does not say, as far as it is no secret.
pub trait Answered {
    fn answered(&self, _words: &mut Words) {}
}

impl Asked for api::CreateTenantRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, words: &mut Words) {
        words.add_limits(self.limits, &[]);
        words.add_labels(&self.labels);
    }
}

impl Answered for api::CreateTenantResponse {
    fn answered(&self, words: &mut Words) {
        words.add("created", self.created);
        words.add("id", self.tenant.as_ref().map_or(0, |tenant| tenant.id));
    }
}

impl Asked for api::GetTenantRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, _: &mut Words) {}
}

impl Answered for api::GetTenantResponse {}

impl Asked for api::ListTenantsRequest {
    fn tenant(&self) -> &str {
        ""
    }

    fn asked(&self, words: &mut Words) {
        words.add_labels(&self.labels);
        if self.deleting {
            words.add("deleting", true);
        }
    }
}

impl Answered for api::ListTenantsResponse {}

impl Asked for api::UpdateTenantRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, words: &mut Words) {
        words.add_limits(self.limits, &self.reset_limits);
        words.add_labels(&self.labels);
        for name in &self.remove_labels {
            words.add_text("remove_label", name);
        }
    }
}

impl Answered for api::UpdateTenantResponse {}

impl Asked for api::SetTenantStateRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, words: &mut Words) {
        match api::State::try_from(self.state) {
            Ok(state) => words.add("state", state.as_str_name()),
            Err(_) => words.add("state", self.state),
        }
    }
}

impl Answered for api::SetTenantStateResponse {}

impl Asked for api::DeleteTenantRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, words: &mut Words) {
        if let Some(id) = self.id {
            words.add("id", id);
        }
    }
}

impl Answered for api::DeleteTenantResponse {
    fn answered(&self, words: &mut Words) {
        words.add("deleted", self.deleted);
    }
}

impl Asked for api::GetUsageRequest {
    fn tenant(&self) -> &str {
        &self.name
    }

    fn asked(&self, _: &mut Words) {}
}

impl Answered for api::GetUsageResponse {}

impl Asked for api::TopRequest {
    fn tenant(&self) -> &str {
        ""
    }

    fn asked(&self, _: &mut Words) {}
}

impl Answered for api::TopResponse {}

impl Asked for api::IssueCredentialsRequest {
    fn tenant(&self) -> &str {
        &self.tenant
    }

    fn asked(&self, words: &mut Words) {
        words.add_text("user", &self.user);
        words.add("ttl_seconds", self.ttl_seconds);
        words.add("admin", self.admin);
    }
}

impl Answered for api::IssueCredentialsResponse {
    fn answered(&self, words: &mut Words) {
        words.add("serial", &self.serial);
        words.add("not_after_ms", self.not_after_ms);
    }
}

impl Asked for api::RevokeCredentialsRequest {
    fn tenant(&self) -> &str {
        &self.tenant
    }

    fn asked(&self, words: &mut Words) {
        if !self.serial.is_empty() {
            words.add_text("serial", &self.serial);
        }
        if self.all {
            words.add("all", true);
        }
        if self.before_ms != 0 {
            words.add("before_ms", self.before_ms);
        }
    }
}

impl Answered for api::RevokeCredentialsResponse {}

impl Asked for api::SetTrustedCaRequest {
    fn tenant(&self) -> &str {
        &self.tenant
    }

    fn asked(&self, words: &mut Words) {
        words.add("trusted_ca", if self.ca_pem.trim().is_empty() { "removed" } else { "set" });
    }
}

impl Answered for api::SetTrustedCaResponse {}

impl Asked for api::GetCellRequest {
    fn tenant(&self) -> &str {
        ""
    }

    fn asked(&self, _: &mut Words) {}
}

impl Asked for api::UpdateCellRequest {
    fn tenant(&self) -> &str {
        ""
    }

    fn asked(&self, words: &mut Words) {
        words.add_limits(self.default_limits, &self.reset_limits);
    }
}

impl Answered for api::GetCellResponse {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_bounded_and_cannot_look_like_something_else() {
        let labels = [("a\" all=true".to_string(), "é".repeat(TEXT_BYTES_MAX))].into();
        let asked = words(|words| api::ListTenantsRequest { labels, ..Default::default() }.asked(words));
        assert!(asked.starts_with(r#"label="a\" all=true":"é"#), "{}", &asked[..40]);
        assert!(asked.ends_with('…') && asked.len() <= TEXT_BYTES_MAX + '…'.len_utf8(), "{}", asked.len());
        assert_eq!(
            words(|words| api::SetTenantStateRequest { state: 77, ..Default::default() }.asked(words)),
            "state=77"
        );
    }
}
