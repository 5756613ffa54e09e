//! Moves the requests of many simulated clients over a few connections, and records what came back and when.
//!
//! One thread does it all: a task per connection reads, lets the clients look at what came, collects their next requests and
//! writes them with one call. Nothing is woken per request, so the generator takes a few microseconds of CPU per operation,
//! which it states ([`Measured::client_cpu_us_per_unit`]).
//!
//! Closed loop: each client sends its next request when it has its answer. Open loop (a rate): requests fall due at fixed
//! times whatever the server does, and latency is counted from when a request was due, so that a server that stalls is seen
//! to keep everybody waiting, not just those it was answering.
//!
//! A run prepares (keys, watches), warms up, measures. What ends within the measured time counts; of an open loop, the latency of what fell
//! due in it counts however late its answer is. Then what is still on its way is waited for, so that the next run finds the keys at rest.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::{Buf, BytesMut};
use hdrhistogram::Histogram;
use rustls::pki_types::ServerName;
use tenure_etcd_shim::proto::etcdserverpb::watch_request::RequestUnion;
use tenure_etcd_shim::proto::etcdserverpb::{WatchCreateRequest, WatchProgressRequest, WatchRequest};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

use crate::client::{Client, Keyspace, Next, Request, STAMP_BYTES, Workload};
use crate::fields::{integer, submessages};
use crate::http2::{CallId, Http2, Incoming};
use crate::process;

/// Where a server is, and what is known of it.
#[derive(Clone)]
pub struct Target {
    pub name: String,
    /// `host:port` by tenant; the last one serves all further tenants.
    pub addresses: Vec<String>,
    /// By tenant, as `addresses`. Empty: cleartext.
    pub tls: Vec<Arc<rustls::ClientConfig>>,
    /// `host:port` of every member, if the server is a cell of several: connections are spread over them, and `addresses` is one of
    /// them. Of one tenant's.
    pub members: Vec<String>,
    /// The server's processes, for their CPU time and memory.
    pub pids: Vec<u32>,
}

impl Target {
    /// CPU time and bytes written of all processes; `None` if none is known.
    fn usage(&self) -> anyhow::Result<Option<process::Usage>> {
        let mut all = process::Usage::default();
        for pid in &self.pids {
            let usage = process::usage(*pid)?;
            all.cpu += usage.cpu;
            all.written_bytes += usage.written_bytes;
        }
        Ok((!self.pids.is_empty()).then_some(all))
    }

    /// Peak memory of all processes together; `None` if none is known.
    fn peak_rss_bytes(&self) -> Option<u64> {
        let peaks = self.pids.iter().map(|pid| process::peak_rss_bytes(*pid));
        (!self.pids.is_empty()).then(|| peaks.sum())
    }
}

/// One run.
#[derive(Clone, Debug)]
pub struct Load {
    pub workload: Workload,
    pub clients: u64,
    /// Per tenant that is used.
    pub connections: usize,
    pub keys: u64,
    pub value_bytes: usize,
    pub page_keys: i64,
    /// Operations per second, of all clients together; `None` = closed loop.
    pub rate: Option<f64>,
    pub tenants: usize,
    pub zipf: f64,
    /// Beside the clients, for [`Workload::Watch`] and [`Workload::Mixed`].
    pub watchers: u64,
    pub warm_up: Duration,
    pub duration: Duration,
    /// Start of all keys.
    pub prefix: String,
    /// Once it is set, measuring ends early.
    pub cut: Option<Arc<AtomicBool>>,
}

/// What a run gave. Latencies are in microseconds.
#[derive(Clone, Debug)]
pub struct Measured {
    pub seconds: f64,
    pub operations: u64,
    /// Keys, events or operations: what the workload is about.
    pub units: u64,
    pub errors: u64,
    /// The first error's text.
    pub error: Option<String>,
    pub latency_us: Histogram<u64>,
    /// From put to event, and from asking for progress to being told.
    pub event_latency_us: Histogram<u64>,
    pub progress_latency_us: Histogram<u64>,
    pub server_cpu: Option<Duration>,
    pub client_cpu: Duration,
    pub peak_rss_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
}

impl Measured {
    pub fn units_per_second(&self) -> f64 {
        self.units as f64 / self.seconds
    }

    pub fn operations_per_second(&self) -> f64 {
        self.operations as f64 / self.seconds
    }

    pub fn server_cpu_us_per_unit(&self) -> Option<f64> {
        self.server_cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / self.units.max(1) as f64)
    }

    pub fn client_cpu_us_per_unit(&self) -> f64 {
        self.client_cpu.as_secs_f64() * 1e6 / self.units.max(1) as f64
    }
}

/// How far a run has come: told a few times a second.
pub type Progress<'a> = &'a dyn Fn(Stage, f64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Preparing,
    WarmingUp,
    Measuring,
}

/// Latencies up to two minutes, to three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 120_000_000, 3).expect("fixed bounds")
}

struct Recorder {
    measuring: bool,
    /// The measured time is over, and what fell due in it is still waited for.
    ended: Option<Instant>,
    operations: u64,
    units: u64,
    errors: u64,
    error: Option<String>,
    latency_us: Histogram<u64>,
    event_latency_us: Histogram<u64>,
    progress_latency_us: Histogram<u64>,
}

impl Recorder {
    fn new() -> Self {
        Recorder {
            measuring: false,
            ended: None,
            operations: 0,
            units: 0,
            errors: 0,
            error: None,
            latency_us: histogram(),
            event_latency_us: histogram(),
            progress_latency_us: histogram(),
        }
    }

    fn error(&mut self, text: impl FnOnce() -> String) {
        self.errors += 1;
        if self.error.is_none() {
            self.error = Some(text());
        }
    }
}

/// A client with what is on its way for it.
struct Slot {
    client: Client,
    /// When its request was due, while that is on its way.
    due: Option<Instant>,
    /// Its keep-alive stream, which is on the connection that all its requests take.
    stream: Option<CallId>,
}

/// A stream of watches, on a connection.
#[derive(Default)]
struct Watching {
    created: u64,
    call: Option<CallId>,
    connection: usize,
    asked: Option<Instant>,
}

struct Connection {
    http2: RefCell<Http2>,
    waker: RefCell<Option<Waker>>,
}

impl Connection {
    fn wake(&self) {
        if let Some(waker) = self.waker.borrow_mut().take() {
            waker.wake();
        }
    }
}

/// Tags from here on are watch streams.
const WATCH_TAGS: u32 = 1 << 30;

/// Watches on one stream.
const WATCHES_PER_STREAM: u64 = 10;

struct Run {
    load: Load,
    space: Rc<Keyspace>,
    started: Instant,
    /// `load.connections` for each tenant, tenant by tenant.
    connections: Vec<Connection>,
    slots: RefCell<Vec<Slot>>,
    watching: RefCell<Vec<Watching>>,
    recorder: RefCell<Recorder>,
    /// Requests that were due when no client was free.
    overdue: RefCell<VecDeque<Instant>>,
    free: RefCell<Vec<u32>>,
    finished: Cell<u64>,
    stopping: Cell<bool>,
    failed: RefCell<Option<String>>,
    /// What a socket is read into.
    scratch: RefCell<Vec<u8>>,
}

const SCRATCH_BYTES: usize = 256 << 10;

/// How long a run waits for what is on its way at its end.
const REST_MAX: Duration = Duration::from_secs(10);

/// How long a load that can be cut waits for its watches to open.
const NOISE_PATIENCE: Duration = Duration::from_secs(15);

/// Runs a load against a server, keys and all.
///
/// # Errors
/// If the server cannot be reached, or ends a connection. What it answers wrongly is counted instead.
pub async fn run(target: &Target, load: &Load, progress: Progress<'_>) -> anyhow::Result<Measured> {
    if load.workload.needs_keys() {
        fill(target, load, progress).await?;
    }
    run_filled(target, load, progress).await
}

/// As [`run`], on keys that [`fill`] has put there before.
///
/// # Errors
/// As [`run`].
pub async fn run_filled(target: &Target, load: &Load, progress: Progress<'_>) -> anyhow::Result<Measured> {
    let session = Session::open(target, load, load.workload).await?;
    let measured = session.measure(target, progress).await;
    session.close().await;
    measured
}

/// Puts the keys there that a workload reads.
///
/// # Errors
/// As [`run`]; and if not all keys could be written.
pub async fn fill(target: &Target, load: &Load, progress: Progress<'_>) -> anyhow::Result<()> {
    // Each client has a key of its own to update.
    let keys = if load.workload.updates() { load.keys.max(load.clients) } else { load.keys };
    let filling = Load { clients: load.clients.clamp(1, 16), keys, rate: None, watchers: 0, ..load.clone() };
    let session = Session::open(target, &filling, Workload::Fill).await?;
    let filled = session.drain(progress).await;
    session.close().await;
    filled
}

/// Connections and their tasks.
struct Session {
    run: Rc<Run>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Session {
    async fn open(target: &Target, load: &Load, workload: Workload) -> anyhow::Result<Session> {
        let space =
            Rc::new(Keyspace::new(&load.prefix, load.keys, load.value_bytes, load.page_keys, load.tenants, load.zipf));
        let mut sockets = Vec::new();
        let mut connections = Vec::new();
        for tenant in 0..load.tenants {
            let at = |all: usize| tenant.min(all - 1);
            let tls = (!target.tls.is_empty()).then(|| Arc::clone(&target.tls[at(target.tls.len())]));
            for connection in 0..load.connections {
                let address = match target.members.get(connection % target.members.len().max(1)) {
                    Some(member) => member,
                    None => &target.addresses[at(target.addresses.len())],
                };
                let scheme = if tls.is_some() { "https" } else { "http" };
                sockets.push(connect(address, tls.clone()).await.with_context(|| format!("connect to {address}"))?);
                connections
                    .push(Connection { http2: RefCell::new(Http2::new(scheme, address)), waker: RefCell::new(None) });
            }
        }
        let started = Instant::now();
        let now_ns: Rc<dyn Fn() -> u64> = Rc::new(move || nanos_since(started));
        let slots = (0..load.clients).map(|number| Slot {
            client: Client::new(workload, number, load.clients, Rc::clone(&space), Rc::clone(&now_ns)),
            due: None,
            stream: None,
        });
        let slots: Vec<Slot> = slots.collect();
        let free = (0..u32::try_from(slots.len())?).rev().collect();
        let run = Rc::new(Run {
            load: load.clone(),
            space,
            started,
            connections,
            slots: RefCell::new(slots),
            watching: RefCell::default(),
            recorder: RefCell::new(Recorder::new()),
            overdue: RefCell::default(),
            free: RefCell::new(free),
            finished: Cell::new(0),
            stopping: Cell::new(false),
            failed: RefCell::new(None),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES]),
        });
        let tasks = sockets.into_iter().enumerate().map(|(number, socket)| {
            let run = Rc::clone(&run);
            tokio::task::spawn_local(async move {
                if let Err(error) = run.connection(number, socket).await {
                    run.failed.borrow_mut().get_or_insert_with(|| error.to_string());
                }
            })
        });
        let tasks = tasks.collect();
        Ok(Session { run, tasks })
    }

    async fn close(self) {
        self.run.stopping.set(true);
        for task in self.tasks {
            task.abort();
            let _ = task.await;
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        match &*self.run.failed.borrow() {
            Some(error) => bail!("{error}"),
            None => Ok(()),
        }
    }

    /// Lets the clients go on until none has anything left to do.
    async fn drain(&self, progress: Progress<'_>) -> anyhow::Result<()> {
        let run = &self.run;
        run.recorder.borrow_mut().measuring = true;
        run.start_all();
        let all = run.load.keys * run.load.tenants as u64;
        while run.finished.get() < run.load.clients {
            self.check()?;
            progress(Stage::Preparing, run.recorder.borrow().units as f64 / all as f64);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let recorder = run.recorder.borrow();
        if let Some(error) = &recorder.error {
            bail!("filling: {error}");
        }
        if recorder.units != all {
            bail!("filled {} keys of {all}", recorder.units);
        }
        Ok(())
    }

    async fn measure(&self, target: &Target, progress: Progress<'_>) -> anyhow::Result<Measured> {
        let run = &self.run;
        self.watch().await?;
        let pace = run.load.rate.map(|rate| {
            let run = Rc::clone(run);
            tokio::task::spawn_local(async move { run.pace(rate).await })
        });
        if pace.is_none() {
            run.start_all();
        }
        self.wait(Stage::WarmingUp, run.load.warm_up, progress).await?;
        target.pids.iter().for_each(|pid| process::reset_peak(*pid));
        run.recorder.replace(Recorder { measuring: true, ..Recorder::new() });
        let server_before = target.usage()?;
        let client_before = process::thread_cpu();
        let from = Instant::now();
        self.wait(Stage::Measuring, run.load.duration, progress).await?;
        let seconds = from.elapsed().as_secs_f64();
        let client_cpu = process::thread_cpu() - client_before;
        let server_after = target.usage()?;
        let is_paced = pace.is_some();
        if let Some(pace) = pace {
            pace.abort();
        }
        run.stopping.set(true);
        run.recorder.borrow_mut().ended = is_paced.then(Instant::now);
        self.rest().await?;
        let mut recorder = run.recorder.replace(Recorder::new());
        // Those that nobody was free to ask for have waited for so long at least.
        for due in run.overdue.borrow_mut().drain(..) {
            recorder.latency_us.saturating_record(micros(due.elapsed()));
        }
        let used = server_before.zip(server_after);
        Ok(Measured {
            seconds,
            operations: recorder.operations,
            units: recorder.units,
            errors: recorder.errors,
            error: recorder.error,
            latency_us: recorder.latency_us,
            event_latency_us: recorder.event_latency_us,
            progress_latency_us: recorder.progress_latency_us,
            server_cpu: used.map(|(before, after)| after.cpu.saturating_sub(before.cpu)),
            client_cpu,
            peak_rss_bytes: target.peak_rss_bytes(),
            written_bytes: used.map(|(before, after)| after.written_bytes.saturating_sub(before.written_bytes)),
        })
    }

    /// Waits until nothing is on its way any more, within bounds.
    async fn rest(&self) -> anyhow::Result<()> {
        let from = Instant::now();
        while from.elapsed() < REST_MAX && self.run.slots.borrow().iter().any(|slot| slot.due.is_some()) {
            self.check()?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut recorder = self.run.recorder.borrow_mut();
        let ended = recorder.ended;
        for due in self.run.slots.borrow().iter().filter_map(|slot| slot.due) {
            if ended.is_some_and(|ended| due <= ended) {
                recorder.latency_us.saturating_record(micros(due.elapsed()));
            }
        }
        Ok(())
    }

    async fn wait(&self, stage: Stage, duration: Duration, progress: Progress<'_>) -> anyhow::Result<()> {
        let from = Instant::now();
        let is_cut = || self.run.load.cut.as_ref().is_some_and(|cut| cut.load(Ordering::Relaxed));
        while from.elapsed() < duration && !is_cut() {
            self.check()?;
            progress(stage, from.elapsed().as_secs_f64() / duration.as_secs_f64());
            let left = duration.saturating_sub(from.elapsed());
            tokio::time::sleep(left.min(Duration::from_millis(100))).await;
            self.run.ask_progress();
        }
        self.check()
    }

    /// Opens the watches and waits until the server has confirmed each.
    async fn watch(&self) -> anyhow::Result<()> {
        let run = &self.run;
        if !matches!(run.load.workload, Workload::Watch | Workload::Mixed) {
            return Ok(());
        }
        run.open_watches();
        // What is only noise goes on with those that it got: a tenant with limits may open them for minutes.
        let patience = run.load.cut.is_some().then(|| Instant::now() + NOISE_PATIENCE);
        while run.watching.borrow().iter().map(|stream| stream.created).sum::<u64>() < run.load.watchers {
            if patience.is_some_and(|patience| Instant::now() > patience) {
                break;
            }
            self.check()?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

fn nanos_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}

impl Run {
    /// The loop of one connection: write what there is, read what comes.
    async fn connection(&self, number: usize, mut socket: Pin<Box<dyn Socket>>) -> anyhow::Result<()> {
        let mut input = BytesMut::with_capacity(256 << 10);
        let mut flushed = true;
        loop {
            let read = poll_fn(|context| self.poll(number, &mut socket, &mut input, &mut flushed, context)).await?;
            if read == 0 {
                bail!("the server closed a connection");
            }
            self.on_input(number, &mut input)?;
        }
    }

    fn poll(
        &self,
        number: usize,
        socket: &mut Pin<Box<dyn Socket>>,
        input: &mut BytesMut,
        flushed: &mut bool,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let connection = &self.connections[number];
        let mut http2 = connection.http2.borrow_mut();
        let output = http2.output();
        while !output.is_empty() {
            match socket.as_mut().poll_write(context, output) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => output.advance(written),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => break,
            }
            *flushed = false;
        }
        if !*flushed {
            match socket.as_mut().poll_flush(context) {
                Poll::Ready(Ok(())) => *flushed = true,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {}
            }
        }
        *connection.waker.borrow_mut() = Some(context.waker().clone());
        let mut scratch = self.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        socket.as_mut().poll_read(context, &mut buffer).map_ok(|()| {
            input.extend_from_slice(buffer.filled());
            buffer.filled().len()
        })
    }

    fn on_input(&self, number: usize, input: &mut BytesMut) -> anyhow::Result<()> {
        let mut again: Vec<u32> = Vec::new();
        {
            let mut http2 = self.connections[number].http2.borrow_mut();
            let mut slots = self.slots.borrow_mut();
            let mut recorder = self.recorder.borrow_mut();
            http2.receive(input, |incoming| match incoming {
                Incoming::Message { tag, message } if tag >= WATCH_TAGS => self.on_watch(tag, message, &mut recorder),
                Incoming::End { tag, status } if tag >= WATCH_TAGS => {
                    recorder.error(|| format!("a watch ended: {}", status.message));
                }
                Incoming::Message { tag, message } => {
                    let slot = &mut slots[tag as usize];
                    slot.client.message(message);
                    if slot.stream.is_some() {
                        self.finish(slot, &mut recorder);
                        again.push(tag);
                    }
                }
                Incoming::End { tag, status } => {
                    let slot = &mut slots[tag as usize];
                    if slot.stream.take().is_some() || status.code != 0 {
                        slot.due = None;
                        recorder.error(|| format!("code {}: {}", status.code, status.message));
                    } else {
                        self.finish(slot, &mut recorder);
                    }
                    again.push(tag);
                }
            })?;
        }
        for tag in again {
            self.free(tag);
        }
        Ok(())
    }

    fn finish(&self, slot: &mut Slot, recorder: &mut Recorder) {
        let done = slot.client.done();
        let Some(due) = slot.due.take().filter(|_| recorder.measuring) else { return };
        if let Some(ended) = recorder.ended {
            if due <= ended {
                recorder.latency_us.saturating_record(micros(due.elapsed()));
            }
            return;
        }
        recorder.operations += 1;
        // Of watches, the events count.
        if self.load.workload != Workload::Watch {
            recorder.units += done.units;
        }
        recorder.latency_us.saturating_record(micros(due.elapsed()));
        if done.wrong {
            recorder.error(|| "an answer without what it must hold".to_string());
        }
    }

    /// A client has nothing on its way: it goes on at once, or when something is due.
    fn free(&self, tag: u32) {
        if self.load.rate.is_none() {
            return self.start(tag, Instant::now());
        }
        let due = self.overdue.borrow_mut().pop_front();
        match due {
            Some(due) => self.start(tag, due),
            None => self.free.borrow_mut().push(tag),
        }
    }

    fn start_all(&self) {
        let tags: Vec<u32> = self.free.borrow_mut().drain(..).collect();
        tags.into_iter().for_each(|tag| self.start(tag, Instant::now()));
    }

    fn start(&self, tag: u32, due: Instant) {
        if self.stopping.get() {
            return;
        }
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[tag as usize];
        let Some(Next { tenant, request }) = slot.client.next_request() else {
            self.finished.set(self.finished.get() + 1);
            return;
        };
        slot.due = Some(due);
        let number = tenant * self.load.connections + tag as usize % self.load.connections;
        let connection = &self.connections[number];
        let mut http2 = connection.http2.borrow_mut();
        match &request {
            Request::Put(put) => http2.open("/etcdserverpb.KV/Put", tag, put, true),
            Request::Txn(txn) => http2.open("/etcdserverpb.KV/Txn", tag, txn, true),
            Request::Range(range) => http2.open("/etcdserverpb.KV/Range", tag, range, true),
            Request::RangeStream(range) => http2.open("/etcdserverpb.KV/RangeStream", tag, range, true),
            Request::LeaseGrant(grant) => http2.open("/etcdserverpb.Lease/LeaseGrant", tag, grant, true),
            Request::LeaseKeepAlive(keep_alive) => match slot.stream {
                Some(call) => {
                    http2.send(call, keep_alive, false);
                    call
                }
                None => {
                    let call = http2.open("/etcdserverpb.Lease/LeaseKeepAlive", tag, keep_alive, false);
                    slot.stream = Some(call);
                    call
                }
            },
        };
        connection.wake();
    }

    /// Lets requests fall due at a steady rate.
    async fn pace(&self, rate: f64) {
        let timer = Timer::new();
        let from = Instant::now();
        for number in 0u64.. {
            let due = from + Duration::from_secs_f64(number as f64 / rate);
            if due > Instant::now() {
                timer.wait_until(due).await;
            }
            let free = self.free.borrow_mut().pop();
            match free {
                Some(tag) => self.start(tag, due),
                None => self.overdue.borrow_mut().push_back(due),
            }
        }
    }

    fn open_watches(&self) {
        let streams = self.load.watchers.div_ceil(WATCHES_PER_STREAM);
        let mut watching = self.watching.borrow_mut();
        for stream in 0..streams {
            let tenant = usize::try_from(stream).unwrap_or(0) % self.load.tenants;
            let within = usize::try_from(stream).unwrap_or(0) / self.load.tenants % self.load.connections;
            let number = tenant * self.load.connections + within;
            let range = self.space.range(tenant);
            let create = WatchRequest {
                request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
                    key: range.key,
                    range_end: range.range_end,
                    ..WatchCreateRequest::default()
                })),
            };
            let watches = WATCHES_PER_STREAM.min(self.load.watchers - stream * WATCHES_PER_STREAM);
            let tag = WATCH_TAGS + u32::try_from(stream).expect("fewer streams than tags");
            let mut http2 = self.connections[number].http2.borrow_mut();
            let call = http2.open("/etcdserverpb.Watch/Watch", tag, &create, false);
            for _ in 1..watches {
                http2.send(call, &create, false);
            }
            self.connections[number].wake();
            watching.push(Watching { call: Some(call), connection: number, ..Watching::default() });
        }
    }

    fn on_watch(&self, tag: u32, message: &[u8], recorder: &mut Recorder) {
        let stream = (tag - WATCH_TAGS) as usize;
        if integer(message, 3) == 1 {
            self.watching.borrow_mut()[stream].created += 1;
            return;
        }
        let mut events = 0;
        for event in submessages(message, 11) {
            events += 1;
            let value = submessages(event, 2).flat_map(|kv| submessages(kv, 5)).next();
            let stamp = value.and_then(|value| value.first_chunk::<STAMP_BYTES>());
            if self.load.workload == Workload::Watch
                && let Some(stamp) = stamp
                && recorder.measuring
            {
                let took_ns = nanos_since(self.started).saturating_sub(u64::from_be_bytes(*stamp));
                recorder.event_latency_us.saturating_record((took_ns / 1000).max(1));
            }
        }
        if recorder.measuring && self.load.workload == Workload::Watch {
            recorder.units += events;
        }
        if events == 0
            && let Some(asked) = self.watching.borrow_mut()[stream].asked.take()
            && recorder.measuring
        {
            recorder.progress_latency_us.saturating_record(micros(asked.elapsed()));
        }
    }

    /// Asks one stream how far it is, as kube-apiserver does, and again if the server stayed silent.
    fn ask_progress(&self) {
        let mut watching = self.watching.borrow_mut();
        if let Some(stream) = watching.first_mut()
            && let Some(call) = stream.call
        {
            stream.asked.get_or_insert_with(Instant::now);
            let ask = WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) };
            let connection = &self.connections[stream.connection];
            connection.http2.borrow_mut().send(call, &ask, false);
            connection.wake();
        }
    }
}

/// Makes one call, whose last message is the answer. For what prepares or disturbs a measurement.
///
/// # Errors
/// If the call is not answered with OK.
pub async fn call(target: &Target, path: &'static str, request: &impl prost::Message) -> anyhow::Result<Vec<u8>> {
    let address = target.addresses.last().context("an address")?;
    let scheme = if target.tls.is_empty() { "http" } else { "https" };
    let mut socket = connect(address, target.tls.last().cloned()).await?;
    let mut http2 = Http2::new(scheme, address);
    http2.open(path, 0, request, true);
    let (mut input, mut answer, mut ended) = (BytesMut::new(), Vec::new(), None);
    while ended.is_none() {
        let output = http2.output().split();
        socket.write_all(&output).await?;
        socket.flush().await?;
        if socket.read_buf(&mut input).await? == 0 {
            bail!("the server closed the connection");
        }
        http2.receive(&mut input, |incoming| match incoming {
            Incoming::Message { message, .. } => answer = message.to_vec(),
            Incoming::End { status, .. } => ended = Some(status.clone()),
        })?;
    }
    match ended {
        Some(status) if status.code == 0 => Ok(answer),
        status => bail!("{path}: {status:?}"),
    }
}

/// Connections with a watch each, held open until the server closes them.
pub struct Held(Vec<Pin<Box<dyn Socket>>>);

impl Held {
    /// Opens them, for the first tenant of the target; each watch was confirmed on return.
    ///
    /// # Errors
    /// If the server does not let one in.
    pub async fn open(target: &Target, number: usize) -> anyhow::Result<Held> {
        let address = target.addresses.first().context("an address")?;
        let scheme = if target.tls.is_empty() { "http" } else { "https" };
        let range = WatchCreateRequest { key: "held".into(), ..WatchCreateRequest::default() };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(range)) };
        let mut held = Vec::new();
        for _ in 0..number {
            let mut socket = connect(address, target.tls.first().cloned()).await?;
            let mut http2 = Http2::new(scheme, address);
            http2.open("/etcdserverpb.Watch/Watch", 0, &create, false);
            let (mut input, mut confirmed) = (BytesMut::new(), false);
            while !confirmed {
                let output = http2.output().split();
                socket.write_all(&output).await?;
                socket.flush().await?;
                if socket.read_buf(&mut input).await? == 0 {
                    bail!("the server closed the connection");
                }
                let mut ended = false;
                http2.receive(&mut input, |incoming| match incoming {
                    Incoming::Message { .. } => confirmed = true,
                    Incoming::End { .. } => ended = true,
                })?;
                if ended {
                    bail!("the server ended the watch");
                }
            }
            held.push(socket);
        }
        Ok(Held(held))
    }

    /// Waits until the server has closed all of them.
    pub async fn closed(self) {
        let mut closing: futures::stream::FuturesUnordered<_> = self
            .0
            .into_iter()
            .map(|mut socket| async move {
                let mut rest = BytesMut::new();
                // However it ends, it has ended.
                while socket.read_buf(&mut rest).await.is_ok_and(|read| read > 0) {
                    rest.clear();
                }
            })
            .collect();
        while futures::StreamExt::next(&mut closing).await.is_some() {}
    }
}

trait Socket: AsyncRead + AsyncWrite {}
impl<S: AsyncRead + AsyncWrite> Socket for S {}

async fn connect(address: &str, tls: Option<Arc<rustls::ClientConfig>>) -> anyhow::Result<Pin<Box<dyn Socket>>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::pin(stream)) };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_string())?;
    Ok(Box::pin(tokio_rustls::TlsConnector::from(tls).connect(name, stream).await?))
}

/// The runtime's own timers count whole milliseconds; a rate of thousands needs finer ones.
struct Timer(tokio::io::unix::AsyncFd<std::os::fd::OwnedFd>);

impl Timer {
    fn new() -> Self {
        use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC);
        // SAFETY: the descriptor is owned by what it is registered for, stays the same, and is closed after being deregistered.
        let registered = unsafe { tokio::io::unix::AsyncFd::register(fd.expect("a timer")) };
        Timer(registered.expect("a runtime"))
    }

    async fn wait_until(&self, due: Instant) {
        use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};
        let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once).expect("a timer that was made");
        let mut ready = self.0.readable().await.expect("the runtime's");
        let mut count = [0; 8];
        let _ = rustix::io::read(self.0.get_ref(), &mut count);
        ready.clear_ready();
    }
}

/// Runs a future that drives loads on this thread.
///
/// # Panics
/// If the operating system gives no event loop.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("an event loop");
    tokio::task::LocalSet::new().block_on(&runtime, future)
}
