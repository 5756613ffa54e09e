//! `tenurectl`: tenants of one cell or several, from the command line.
//!
//! Ends with 0, with 1 and one line on the error output that says what to do next, or with 2 for a command line that is none. A list that
//! lacks what a cell did not say is printed, and ends with 1.

mod top;

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use futures::future::join_all;
use serde_json::{Value, json};
use tenure_admin_api::v1::{self as api, State};
use tenure_provisioner::advice;
use tenure_provisioner::cell_init::{self, Member, Start};
use tenure_provisioner::cells::{Cell, Cells, CellsError, ENDPOINT_DEFAULT, Reached, find, place};
use tenure_provisioner::connect::TlsFiles;
use tenure_provisioner::credentials::{self, Credentials};
use tenure_provisioner::limits::{self, Setting};
use tenure_provisioner::output::{self, Format, TENANT_HEAD, tenant_row};

/// Tenants of Tenure cells: each is an etcd of its own for one control plane.
#[derive(Parser)]
#[command(name = "tenurectl", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    at: At,
    /// How to print what was asked for.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// Which cell, and how it is reached.
#[derive(Args, Clone)]
struct At {
    /// One of the cells of `tenurectl cell list`. Default: all of them, the least loaded one for a new tenant.
    #[arg(long, global = true)]
    cell: Option<String>,
    /// A member's admin API, unix:PATH or https://HOST:PORT, instead of a known cell; may be given again for other members. Default:
    /// TENURECTL_ENDPOINT, unless --cell is given.
    #[arg(long, global = true, value_delimiter = ',')]
    endpoint: Vec<String>,
    /// The CA of the cell, PEM.
    #[arg(long, global = true, env = "TENURECTL_CACERT")]
    cacert: Option<PathBuf>,
    /// An administrator's certificate (URI tenure://admin), PEM.
    #[arg(long, global = true, env = "TENURECTL_CERT")]
    cert: Option<PathBuf>,
    /// Its key, PEM.
    #[arg(long, global = true, env = "TENURECTL_KEY")]
    key: Option<PathBuf>,
    /// The file of known cells.
    #[arg(long, global = true, env = "TENURECTL_CONFIG")]
    config: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Cells: make certificates for a new one, say which there are.
    #[command(subcommand)]
    Cell(CellCommand),
    /// Tenants.
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Who does what, live.
    Top(top::Options),
    /// Prints what completes this command in a shell.
    Completion { shell: clap_complete::Shell },
}

#[derive(Subcommand)]
enum CellCommand {
    /// Makes a CA, certificates for members and for an administrator, and prints how members are started.
    Init {
        /// Where the files go.
        #[arg(long)]
        out: PathBuf,
        /// What stands behind a tenant's name in server names, NAME.DOMAIN. Default: nothing, certificates say who a client is.
        #[arg(long)]
        domain: Option<String>,
        /// NAME=HOST[,HOST]…, for each member.
        #[arg(long = "member", required = true)]
        members: Vec<String>,
        /// Signs for further members with the CA that is there; for members that it has signed for, anew.
        #[arg(long, conflicts_with = "force")]
        add_members: bool,
        /// Makes everything anew, also the CA.
        #[arg(long)]
        force: bool,
    },
    /// Adds a cell to those that are known, if it answers at --endpoint.
    Add { name: String },
    /// Forgets a cell; it goes on.
    Remove { name: String },
    /// The known cells, and how full they are.
    List,
    /// Members and load of one cell.
    Status,
    /// A certificate of an administrator, signed by the cell: in place of one that ends or was revoked, or for one more person.
    AdminCredentials {
        /// Directory of admin.crt and admin.key, and of the cell's ca.crt if there is none yet.
        #[arg(long)]
        out: PathBuf,
        /// Who it is for, as the audit log says it. Default: admin.
        #[arg(long, default_value = "")]
        user: String,
        /// How long it is valid.
        #[arg(long, default_value_t = 365)]
        days: u64,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
    /// Changes the limits of tenants that have none of their own; without any, prints them.
    Limits {
        #[command(flatten)]
        limits: LimitArgs,
    },
}

#[derive(Args, Default)]
struct LimitArgs {
    /// Numbers take K, M, G or Ki, Mi, Gi; none: no limit; default: the cell's.
    #[arg(long, value_name = "BYTES")]
    stored_bytes: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    requests_per_second: Option<String>,
    #[arg(long, value_name = "BYTES")]
    request_bytes_per_second: Option<String>,
    #[arg(long, value_name = "BYTES")]
    response_bytes_in_flight: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    watchers: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    streams: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    connections: Option<String>,
    #[arg(long, value_name = "NUMBER")]
    leases: Option<String>,
    #[arg(long, value_name = "BYTES")]
    request_bytes: Option<String>,
    #[arg(long, value_name = "BYTES")]
    response_bytes_per_second: Option<String>,
}

impl LimitArgs {
    fn given(&self) -> [(&'static str, &Option<String>); 10] {
        [
            ("stored_bytes", &self.stored_bytes),
            ("requests_per_second", &self.requests_per_second),
            ("request_bytes_per_second", &self.request_bytes_per_second),
            ("response_bytes_in_flight", &self.response_bytes_in_flight),
            ("watchers", &self.watchers),
            ("streams", &self.streams),
            ("connections", &self.connections),
            ("leases", &self.leases),
            ("request_bytes", &self.request_bytes),
            ("response_bytes_per_second", &self.response_bytes_per_second),
        ]
    }

    /// What is to be set, and what goes back to the default.
    fn read(&self) -> anyhow::Result<(api::Limits, Vec<String>)> {
        let (mut set, mut reset) = (api::Limits::default(), Vec::new());
        for (name, text) in self.given() {
            let Some(text) = text else { continue };
            let setting =
                limits::parse(text).map_err(|error| anyhow::anyhow!("--{}: {error}", name.replace('_', "-")))?;
            match setting {
                Setting::To(value) => {
                    if let Some(of) = limits::place(&mut set, name) {
                        *of = Some(value);
                    }
                }
                Setting::Default => reset.push(name.to_string()),
            }
        }
        Ok((set, reset))
    }
}

/// Where credentials go.
#[derive(Args, Clone)]
struct Out {
    /// Directory of ca.crt, client.crt, client.key and apiserver-flags.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Prints a Secret and a JSON patch of a kube-apiserver's Deployment instead: it adds to the arguments, mounts and volumes that
    /// its first container has.
    #[arg(long, value_parser = ["kubernetes"])]
    format: Option<String>,
    /// Of the Secret.
    #[arg(long, default_value = "default")]
    namespace: String,
    /// Default: TENANT-etcd.
    #[arg(long)]
    secret_name: Option<String>,
    /// The user inside the tenant. Default: the tenant's name.
    #[arg(long, default_value = "")]
    user: String,
    /// How long they are valid.
    #[arg(long, default_value_t = 365)]
    days: u64,
}

#[derive(Subcommand)]
enum TenantCommand {
    /// Makes a tenant, or finds the one that is there.
    Create {
        name: String,
        #[command(flatten)]
        limits: LimitArgs,
        /// NAME=VALUE; may be given again.
        #[arg(long = "label")]
        labels: Vec<String>,
    },
    Get {
        name: String,
    },
    /// All tenants of all cells.
    List {
        /// NAME=VALUE: only tenants that have it; may be given again.
        #[arg(long = "label")]
        labels: Vec<String>,
        /// Also those whose space is still being given back.
        #[arg(long)]
        deleting: bool,
    },
    /// Changes limits; without any, prints them.
    Limits {
        name: String,
        #[command(flatten)]
        limits: LimitArgs,
    },
    /// Changes labels.
    Labels {
        name: String,
        /// NAME=VALUE, or NAME- to take one away.
        #[arg(required = true)]
        labels: Vec<String>,
    },
    /// Closes its connections and lets nobody in; its leases do not end meanwhile.
    Suspend {
        name: String,
    },
    /// Ends a suspension, or being read-only.
    Resume {
        name: String,
    },
    /// Refuses what makes it grow.
    ReadOnly {
        name: String,
    },
    /// Deletes it with all its data.
    Delete {
        name: String,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
    },
    /// What it holds, by Kubernetes resource (the first two parts of its keys): reads all of them.
    Usage {
        name: String,
    },
    /// A key made here and a certificate for it, with the flags of a kube-apiserver.
    Credentials {
        name: String,
        #[command(flatten)]
        to: Out,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
    /// New credentials in place of those in --out.
    Rotate {
        name: String,
        #[command(flatten)]
        to: Out,
        /// Revokes the certificate that was there, once the new one is written to --out. Not with --format: nothing has the Secret yet.
        #[arg(long)]
        revoke_old: bool,
    },
    /// Refuses certificates and closes their connections.
    Revoke {
        name: String,
        /// One certificate, by its number.
        #[arg(long, required_unless_present = "all")]
        serial: Option<String>,
        /// All that were issued before now.
        #[arg(long, conflicts_with = "serial")]
        all: bool,
        /// All that were issued before that moment (2026-01-31T12:00:00Z): to repeat the command, and spare those issued since.
        #[arg(long, value_name = "TIME", requires = "all")]
        before: Option<String>,
    },
    /// Has a CA of its own sign its clients' certificates, or the cell's again. Connections are closed and made anew.
    TrustedCa {
        name: String,
        /// Its CA's certificate, or several, in PEM.
        #[arg(long, required_unless_present = "of_cell")]
        file: Option<PathBuf>,
        /// The cell's.
        #[arg(long, conflicts_with = "file")]
        of_cell: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("tenurectl: {}", format!("{error:#}").replace('\n', " "));
    ExitCode::FAILURE
}

fn print(text: &str) -> anyhow::Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes()).context("print")
}

impl At {
    fn cells(&self) -> anyhow::Result<Cells> {
        let path = match &self.config {
            Some(path) => path.clone(),
            None => {
                let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config"));
                let base = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home);
                base.context("no home directory: say where the file of cells is with --config")?
                    .join("tenure/cells.json")
            }
        };
        Ok(Cells::read(&path)?)
    }

    fn tls(&self) -> TlsFiles {
        TlsFiles { cacert: self.cacert.clone(), cert: self.cert.clone(), key: self.key.clone() }
    }

    /// Endpoints that were given. Who says a cell does not mean those that happen to be in the environment.
    fn endpoints(&self) -> Vec<String> {
        if !self.endpoint.is_empty() || self.cell.is_some() {
            return self.endpoint.clone();
        }
        let text = std::env::var("TENURECTL_ENDPOINT").unwrap_or_default();
        text.split(',').filter(|endpoint| !endpoint.is_empty()).map(str::to_string).collect()
    }

    /// The cells that a command is about.
    fn chosen(&self) -> anyhow::Result<Vec<Cell>> {
        let endpoints = self.endpoints();
        if !endpoints.is_empty() {
            let name = self.cell.clone().unwrap_or_else(|| endpoints.join(","));
            return Ok(vec![Cell { name, endpoints, tls: self.tls() }]);
        }
        let known = self.cells()?;
        Ok(match &self.cell {
            Some(name) => vec![known.named(name)?.clone()],
            None if known.cells.is_empty() => {
                let (name, endpoints) = ("local".to_string(), vec![ENDPOINT_DEFAULT.to_string()]);
                vec![Cell { name, endpoints, tls: TlsFiles::default() }]
            }
            None => known.cells,
        })
    }

    /// The one that is meant, where one has to be.
    async fn only_cell(&self) -> anyhow::Result<Reached> {
        // Of those that are chosen, not of those that answer: another one must not take its place.
        let [cell] = &self.chosen()?[..] else {
            bail!("which one? --cell NAME; tenurectl cell list shows them all");
        };
        Ok(cell.reach().await?)
    }

    /// Those of them that answer.
    async fn reached(&self) -> anyhow::Result<Answering> {
        reach_all(&self.chosen()?).await
    }

    /// As [`At::reached`], but every endpoint of each cell by itself.
    async fn reached_members(&self) -> anyhow::Result<Answering> {
        let of = |cell: Cell| {
            let one = |endpoint: &String| Cell { endpoints: vec![endpoint.clone()], ..cell.clone() };
            cell.endpoints.iter().map(one).collect::<Vec<_>>()
        };
        reach_all(&self.chosen()?.into_iter().flat_map(of).collect::<Vec<_>>()).await
    }

    /// All of them: one that does not answer may have the tenant that is meant.
    async fn reached_for(&self, tenant: &str) -> anyhow::Result<Vec<Reached>> {
        let (chosen, mut reached) = (self.chosen()?, Vec::new());
        for (cell, answer) in chosen.iter().zip(join_all(chosen.iter().map(Cell::reach)).await) {
            match answer {
                Ok(cell) => reached.push(cell),
                Err(error) if chosen.len() == 1 => return Err(error.into()),
                Err(error) => {
                    let (tenant, cell, error) = (tenant.to_string(), cell.name.clone(), Box::new(error));
                    return Err(CellsError::NotAsked { tenant, cell, error }.into());
                }
            }
        }
        Ok(reached)
    }

    async fn tenant(&self, name: &str) -> anyhow::Result<(Reached, api::Tenant)> {
        Ok(find(self.reached_for(name).await?, name).await?)
    }
}

/// Cells or members that answer.
struct Answering {
    reached: Vec<Reached>,
    /// How many did not.
    missing: usize,
}

/// For when what those say that answer is printed.
///
/// # Errors
/// If it is not all.
fn complete(missing: usize) -> anyhow::Result<()> {
    match missing {
        0 => Ok(()),
        some => bail!("what is printed is not all: {some} of those asked did not answer"),
    }
}

/// A warning for each that does not answer, an error if none does.
async fn reach_all(chosen: &[Cell]) -> anyhow::Result<Answering> {
    let answers = join_all(chosen.iter().map(Cell::reach)).await;
    let (mut reached, mut last, mut missing) = (Vec::new(), None, 0);
    let alone = answers.len() == 1;
    for answer in answers {
        match answer {
            Ok(cell) => reached.push(cell),
            Err(error) => {
                if !alone {
                    eprintln!("tenurectl: warning: {error}");
                }
                missing += 1;
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if reached.is_empty() => Err(error.into()),
        _ => Ok(Answering { reached, missing }),
    }
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    let Cli { at, output, command } = cli;
    match command {
        Command::Cell(command) => cell(&at, output, command).await,
        Command::Tenant(command) => tenant(&at, output, command).await,
        Command::Top(options) => {
            let Answering { reached, missing } = at.reached_members().await?;
            top::run(reached, &options, output).await?;
            complete(missing)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tenurectl", &mut std::io::stdout());
            Ok(())
        }
    }
}

async fn cell(at: &At, format: Format, command: CellCommand) -> anyhow::Result<()> {
    match command {
        CellCommand::Init { out, domain, members, add_members, force } => {
            let start = match (add_members, force) {
                (true, _) => Start::AddMembers,
                (false, true) => Start::Force,
                (false, false) => Start::New,
            };
            let members = members.iter().map(|text| Member::parse(text)).collect::<Result<Vec<_>, _>>()?;
            cell_init::init(&out, domain.as_deref(), &members, start)?;
            if start != Start::AddMembers {
                let commands =
                    members.iter().map(|member| cell_init::command(&out, domain.as_deref(), &members, member));
                print(&(commands.collect::<Vec<_>>().join("\n") + "\n"))?;
            }
            Ok(())
        }
        CellCommand::Add { name } => {
            if at.endpoint.is_empty() {
                bail!("where is it? --endpoint https://HOST:2382, with --cacert, --cert and --key");
            }
            let absolute = |path: &Option<PathBuf>| path.as_deref().map(std::path::absolute).transpose();
            let tls = TlsFiles { cacert: absolute(&at.cacert)?, cert: absolute(&at.cert)?, key: absolute(&at.key)? };
            let cell = Cell { name, endpoints: at.endpoint.clone(), tls };
            cell.reach().await?;
            Ok(at.cells()?.add(cell)?)
        }
        CellCommand::Remove { name } => Ok(at.cells()?.remove(&name)?),
        CellCommand::List => {
            let cells = at.cells()?.cells;
            let answers = join_all(cells.iter().map(Cell::reach)).await;
            let (mut rows, mut all) = (Vec::new(), Vec::new());
            let missing = answers.iter().filter(|answer| answer.is_err()).count();
            for (cell, answer) in cells.iter().zip(answers) {
                let endpoints = cell.endpoints.join(",");
                match answer {
                    Ok(Reached { status, .. }) => {
                        let tenants = format!("{}/{}", status.tenants, status.tenants_max);
                        let (stored, free) =
                            (output::bytes(status.stored_bytes), output::bytes(status.disk_free_bytes));
                        let members = status.members.len().to_string();
                        rows.push(vec![cell.name.clone(), endpoints, members, tenants, stored, free, String::new()]);
                        all.push(cell_data(cell, &status));
                    }
                    Err(error) => {
                        let blank = String::new;
                        rows.push(vec![
                            cell.name.clone(),
                            endpoints,
                            blank(),
                            blank(),
                            blank(),
                            blank(),
                            error.to_string(),
                        ]);
                        all.push(json!({ "name": cell.name, "endpoints": cell.endpoints, "error": error.to_string() }));
                    }
                }
            }
            let head = ["NAME", "ENDPOINTS", "MEMBERS", "TENANTS", "STORED", "DISK FREE", "PROBLEM"];
            print(&match format {
                Format::Table => output::table(&head, &rows),
                Format::Json | Format::Yaml => output::data(format, &Value::Array(all)),
            })?;
            complete(missing)
        }
        CellCommand::Status => {
            let Reached { cell, status, .. } = at.only_cell().await?;
            let row = |member: &api::get_cell_response::Member| {
                let role = match (member.is_leader, member.is_learner) {
                    (true, _) => "leader",
                    (false, true) => "learner",
                    (false, false) => "follower",
                };
                vec![member.name.clone(), format!("{:x}", member.id), role.to_string(), member.client_urls.join(",")]
            };
            let rows: Vec<_> = status.members.iter().map(row).collect();
            print(&match format {
                Format::Table => output::table(&["MEMBER", "ID", "ROLE", "CLIENT URLS"], &rows),
                Format::Json | Format::Yaml => output::data(format, &cell_data(&cell, &status)),
            })
        }
        CellCommand::AdminCredentials { out, user, days, force } => {
            let mut reached = at.only_cell().await?;
            credentials::check_free(&out, &credentials::ADMIN_FILES, force)?;
            let issued = credentials::issue_admin(&mut reached, &user, days.saturating_mul(24 * 3600)).await?;
            issued.write_admin(&out)?;
            let (dir, until) = (out.display(), output::moment(issued.not_after_ms));
            eprintln!(
                "tenurectl: administrator's certificate {} of cell {:?} in {dir}, valid until {until}",
                issued.serial, issued.cell
            );
            if format != Format::Table {
                let data = json!({ "cell": issued.cell, "dir": out, "serial": issued.serial, "not_after": until });
                print(&output::data(format, &data))?;
            }
            Ok(())
        }
        CellCommand::Limits { limits } => {
            let mut reached = at.only_cell().await?;
            let (set, reset) = limits.read()?;
            let request = api::UpdateCellRequest { default_limits: Some(set), reset_limits: reset };
            let answer = reached.client.update_cell(request).await.map_err(|status| reached.cell.call_error(status))?;
            let limits = output::limits(&answer.into_inner().default_limits.unwrap_or_default());
            let row = |name: &&str| vec![name.to_string(), limit_text(&limits, name)];
            print(&match format {
                Format::Table => output::table(&["LIMIT", "VALUE"], &limits::NAMES.iter().map(row).collect::<Vec<_>>()),
                Format::Json | Format::Yaml => {
                    output::data(format, &json!({ "cell": reached.cell.name, "default_limits": limits }))
                }
            })
        }
    }
}

fn limit_text(limits: &Value, name: &str) -> String {
    match limits.get(name).and_then(Value::as_u64) {
        None | Some(0) => "none".to_string(),
        Some(value) => value.to_string(),
    }
}

fn cell_data(cell: &Cell, status: &api::GetCellResponse) -> Value {
    let members = status.members.iter().map(|member| {
        json!({
            "name": member.name,
            "id": format!("{:x}", member.id),
            "is_leader": member.is_leader,
            "is_learner": member.is_learner,
            "client_urls": member.client_urls,
        })
    });
    json!({
        "name": cell.name,
        "endpoints": cell.endpoints,
        "cluster_id": format!("{:x}", status.cluster_id),
        "members": members.collect::<Vec<_>>(),
        "tenants": status.tenants,
        "tenants_max": status.tenants_max,
        "stored_bytes": status.stored_bytes,
        "disk_free_bytes": status.disk_free_bytes,
        "version": status.version,
        "issues_credentials": status.issues_credentials,
        "default_limits": output::limits(&status.default_limits.unwrap_or_default()),
    })
}

/// `NAME=VALUE` pairs.
fn labels(given: &[String]) -> anyhow::Result<impl Iterator<Item = (String, String)> + use<>> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').with_context(|| format!("label {text:?}: want NAME=VALUE"))?;
        Ok::<_, anyhow::Error>((name.to_string(), value.to_string()))
    };
    Ok(given.iter().map(pair).collect::<anyhow::Result<Vec<_>>>()?.into_iter())
}

async fn tenant(at: &At, format: Format, command: TenantCommand) -> anyhow::Result<()> {
    match command {
        TenantCommand::Create { name, limits, labels: given } => {
            let (limits, _) = limits.read()?;
            let labels = labels(&given)?.collect();
            let request = api::CreateTenantRequest { name: name.clone(), limits: Some(limits), labels };
            let mut cell = home_of_new(at, &name).await?;
            let answer = cell.client.create_tenant(request).await.map_err(|status| cell.cell.call_error(status))?;
            let api::CreateTenantResponse { tenant, created } = answer.into_inner();
            if !created {
                eprintln!("tenurectl: tenant {name:?} was there already, and is as it was");
            }
            show(format, &cell.cell, tenant)
        }
        TenantCommand::Get { name } => {
            let (cell, tenant) = at.tenant(&name).await?;
            show(format, &cell.cell, Some(tenant))
        }
        TenantCommand::List { labels: given, deleting } => list(at, format, &given, deleting).await,
        TenantCommand::Limits { name, limits } => {
            let (mut cell, mut tenant) = at.tenant(&name).await?;
            let (set, reset) = limits.read()?;
            if set != api::Limits::default() || !reset.is_empty() {
                let request =
                    api::UpdateTenantRequest { name, limits: Some(set), reset_limits: reset, ..Default::default() };
                let changed =
                    cell.client.update_tenant(request).await.map_err(|status| cell.cell.call_error(status))?;
                tenant = changed.into_inner().tenant.unwrap_or_default();
            }
            let effective = output::limits(&tenant.effective_limits.unwrap_or_default());
            let own = output::limits(&tenant.limits.unwrap_or_default());
            let row = |name: &&str| {
                let source = if own.get(name).is_some() { "tenant" } else { "cell" };
                vec![name.to_string(), limit_text(&effective, name), source.to_string()]
            };
            print(&match format {
                Format::Table => {
                    output::table(&["LIMIT", "VALUE", "SET BY"], &limits::NAMES.iter().map(row).collect::<Vec<_>>())
                }
                Format::Json | Format::Yaml => {
                    let data = json!({
                        "cell": cell.cell.name,
                        "tenant": tenant.name,
                        "limits": own,
                        "effective_limits": effective,
                    });
                    output::data(format, &data)
                }
            })
        }
        TenantCommand::Labels { name, labels: given } => {
            let (gone, kept): (Vec<String>, Vec<String>) =
                given.into_iter().partition(|label| label.ends_with('-') && !label.contains('='));
            let remove_labels = gone.iter().map(|label| label.trim_end_matches('-').to_string()).collect();
            let labels = labels(&kept)?.collect();
            let (mut cell, _) = at.tenant(&name).await?;
            let request = api::UpdateTenantRequest { name, labels, remove_labels, ..Default::default() };
            let changed = cell.client.update_tenant(request).await.map_err(|status| cell.cell.call_error(status))?;
            show(format, &cell.cell, changed.into_inner().tenant)
        }
        TenantCommand::Suspend { name } => set_state(at, format, name, State::Suspended).await,
        TenantCommand::Resume { name } => set_state(at, format, name, State::Active).await,
        TenantCommand::ReadOnly { name } => set_state(at, format, name, State::ReadOnly).await,
        TenantCommand::Delete { name, yes } => delete(at, format, name, yes).await,
        TenantCommand::Usage { name } => usage(at, format, name).await,
        TenantCommand::Credentials { name, to, force } => {
            let (mut cell, _) = at.tenant(&name).await?;
            let issued = issue(&mut cell, &name, &to).await?;
            deliver(format, &issued, &to, if force { Deliver::Replacing } else { Deliver::First })
        }
        TenantCommand::Rotate { name, to, revoke_old } => {
            let dir = to.out.as_deref().context("--out DIR: where are the credentials that are to be renewed?")?;
            let credentials::Current { serial: old, user } = credentials::of_tenant_in(dir, &name)?;
            if revoke_old && to.format.is_some() {
                bail!(
                    "--revoke-old would refuse the certificate that pods have until the Secret is applied: leave it out, apply, then \
                     tenurectl tenant revoke {name} --serial {old}"
                );
            }
            let to = match to.user.is_empty() {
                true => Out { user: user.unwrap_or_default(), ..to.clone() },
                false => to.clone(),
            };
            let (mut cell, _) = at.tenant(&name).await?;
            let issued = issue(&mut cell, &name, &to).await?;
            deliver(format, &issued, &to, Deliver::Renewed)?;
            if revoke_old {
                // Nothing else knows its number any more.
                let undone = || {
                    format!(
                        "the new credentials are in place, certificate {old} may NOT be revoked: \
                         tenurectl tenant revoke {name} --serial {old}"
                    )
                };
                revoke_in(&mut cell, name.clone(), old.clone()).await.with_context(undone)?;
                eprintln!("tenurectl: certificate {old} is revoked");
                return Ok(());
            }
            eprintln!(
                "tenurectl: when nobody uses the old one any more: tenurectl tenant revoke {name} --serial {old}"
            );
            Ok(())
        }
        TenantCommand::Revoke { name, serial, all: _, before } => {
            let (cell, tenant) = match serial {
                Some(serial) => revoke_one(at, name, serial).await?,
                None => revoke_all(at, name, before.as_deref()).await?,
            };
            show(format, &cell, tenant)
        }
        TenantCommand::TrustedCa { name, file, of_cell: _ } => trust(at, format, name, file.as_deref()).await,
    }
}

/// The cell that has it, or the least loaded one.
async fn home_of_new(at: &At, name: &str) -> anyhow::Result<Reached> {
    match &at.cell {
        Some(wanted) if at.endpoint.is_empty() => home_in(at, wanted, name).await,
        Some(_) | None => home_in_any(at, name).await,
    }
}

/// Names are one fleet's, so all cells are asked; one that does not answer may have it.
async fn home_in_any(at: &At, name: &str) -> anyhow::Result<Reached> {
    let reached = at.reached_for(name).await?;
    match find(reached.clone(), name).await {
        Ok((cell, _)) => Ok(cell),
        Err(CellsError::NoTenant(_)) => Ok(place(reached)?),
        Err(error) => Err(error.into()),
    }
}

/// Whoever says the cell may go on without those that do not answer.
async fn home_in(at: &At, wanted: &str, name: &str) -> anyhow::Result<Reached> {
    let own = at.only_cell().await?;
    let others = at.cells()?.cells;
    let others: Vec<_> = others.into_iter().filter(|cell| cell.name != wanted).collect();
    let mut reached = Vec::new();
    for answer in join_all(others.iter().map(Cell::reach)).await {
        match answer {
            Ok(cell) => reached.push(cell),
            Err(error) => eprintln!("tenurectl: warning: {error}"),
        }
    }
    match find(reached, name).await {
        Ok((cell, _)) => Err(CellsError::TenantElsewhere { tenant: name.to_string(), cell: cell.cell.name }.into()),
        Err(CellsError::NoTenant(_)) => Ok(own),
        Err(error) => Err(error.into()),
    }
}

fn show(format: Format, cell: &Cell, tenant: Option<api::Tenant>) -> anyhow::Result<()> {
    let tenant = tenant.context("the cell answered without a tenant")?;
    print(&match format {
        Format::Table => output::table(&TENANT_HEAD, &[tenant_row(&cell.name, &tenant)]),
        Format::Json | Format::Yaml => output::data(format, &output::tenant(&cell.name, &tenant)),
    })
}

async fn list(at: &At, format: Format, given: &[String], deleting: bool) -> anyhow::Result<()> {
    let wanted: std::collections::HashMap<String, String> = labels(given)?.collect();
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    let Answering { reached, missing } = at.reached().await?;
    for mut cell in reached {
        let mut page_token = String::new();
        loop {
            let request = api::ListTenantsRequest { page_size: 0, page_token, labels: wanted.clone(), deleting };
            let answer = cell.client.list_tenants(request).await.map_err(|status| cell.cell.call_error(status))?;
            let api::ListTenantsResponse { tenants, next_page_token } = answer.into_inner();
            for tenant in &tenants {
                rows.push(tenant_row(&cell.cell.name, tenant));
                all.push(output::tenant(&cell.cell.name, tenant));
            }
            if next_page_token.is_empty() {
                break;
            }
            page_token = next_page_token;
        }
    }
    print(&match format {
        Format::Table => output::table(&TENANT_HEAD, &rows),
        Format::Json | Format::Yaml => output::data(format, &Value::Array(all)),
    })?;
    complete(missing)
}

async fn set_state(at: &At, format: Format, name: String, state: State) -> anyhow::Result<()> {
    let (mut cell, _) = at.tenant(&name).await?;
    let request = api::SetTenantStateRequest { name, state: state.into() };
    let changed = cell.client.set_tenant_state(request).await.map_err(|status| cell.cell.call_error(status))?;
    show(format, &cell.cell, changed.into_inner().tenant)
}

async fn delete(at: &At, format: Format, name: String, yes: bool) -> anyhow::Result<()> {
    let (mut cell, mut tenant) = match find(at.reached_for(&name).await?, &name).await {
        Ok(found) => found,
        // Whoever had no answer says it again.
        Err(CellsError::NoTenant(_)) => {
            eprintln!("tenurectl: there is no tenant {name:?}: nothing to delete");
            return match format {
                Format::Table => Ok(()),
                Format::Json | Format::Yaml => print(&output::data(format, &json!({ "name": name, "state": "gone" }))),
            };
        }
        Err(error) => return Err(error.into()),
    };
    if !yes {
        if !std::io::stdin().is_terminal() {
            bail!("tenant {name:?} would be deleted with all its data: say --yes");
        }
        let keys = tenant.usage.as_ref().map_or(0, |usage| usage.keys);
        eprint!("Delete tenant {name:?} of cell {:?} with {keys} keys? Type its name: ", cell.cell.name);
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer).context("read the answer")?;
        if answer.trim() != name {
            bail!("nothing was deleted");
        }
    }
    let request = api::DeleteTenantRequest { name, id: Some(tenant.id) };
    cell.client.delete_tenant(request).await.map_err(|status| cell.cell.call_error(status))?;
    tenant.set_state(State::Deleting);
    show(format, &cell.cell, Some(tenant))
}

async fn usage(at: &At, format: Format, name: String) -> anyhow::Result<()> {
    let (mut cell, tenant) = at.tenant(&name).await?;
    let answer = cell.client.get_usage(api::GetUsageRequest { name }).await;
    let mut prefixes = answer.map_err(|status| cell.cell.call_error(status))?.into_inner().prefixes;
    prefixes.sort_by_key(|row| std::cmp::Reverse(row.bytes));
    let of = &cell.cell.name;
    let row =
        |prefix: &str, keys: u64, bytes| vec![of.clone(), prefix.to_string(), keys.to_string(), output::bytes(bytes)];
    let sum = |of: fn(&api::get_usage_response::Prefix) -> u64| prefixes.iter().map(of).sum();
    let total = row("total", sum(|row| row.keys), sum(|row| row.bytes));
    print(&match format {
        Format::Table => {
            let rows = prefixes.iter().map(|of| row(&of.prefix, of.keys, of.bytes));
            output::table(&["CELL", "PREFIX", "KEYS", "BYTES"], &rows.chain([total]).collect::<Vec<_>>())
        }
        Format::Json | Format::Yaml => {
            let rows = prefixes.iter().map(|row| json!({ "prefix": row.prefix, "keys": row.keys, "bytes": row.bytes }));
            let data = json!({ "cell": of, "tenant": tenant.name, "prefixes": rows.collect::<Vec<_>>() });
            output::data(format, &data)
        }
    })
}

async fn issue(cell: &mut Reached, name: &str, to: &Out) -> anyhow::Result<Credentials> {
    if to.out.is_none() && to.format.is_none() {
        bail!("where to? --out DIR, or --format kubernetes");
    }
    Ok(credentials::issue(cell, name, &to.user, to.days.saturating_mul(24 * 3600)).await?)
}

/// What is there before.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deliver {
    /// Nothing; files that are there are in the way.
    First,
    /// Files that may be replaced.
    Replacing,
    /// Credentials whose place these take: whoever uses them has the flags already.
    Renewed,
}

fn deliver(format: Format, issued: &Credentials, to: &Out, before: Deliver) -> anyhow::Result<()> {
    if let Some(dir) = &to.out {
        issued.write(dir, before != Deliver::First)?;
        told(issued, dir);
        if to.format.is_none() && format != Format::Table {
            let data = json!({
                "cell": issued.cell,
                "tenant": issued.tenant,
                "dir": dir,
                "serial": issued.serial,
                "not_after": output::moment(issued.not_after_ms),
                "endpoints": issued.endpoints,
            });
            print(&output::data(format, &data))?;
        }
    }
    if to.format.is_some() {
        let secret = to.secret_name.clone().unwrap_or_else(|| format!("{}-etcd", issued.tenant));
        let [secret, patch] = issued.kubernetes(&to.namespace, &secret);
        print(&match format {
            Format::Json if before == Deliver::Renewed => {
                output::data(format, &json!({ "cell": issued.cell, "secret": secret }))
            }
            Format::Table | Format::Yaml if before == Deliver::Renewed => output::data(Format::Yaml, &secret),
            Format::Json => output::data(format, &json!({ "cell": issued.cell, "secret": secret, "patch": patch })),
            Format::Table | Format::Yaml => {
                let (secret, patch) = (output::data(Format::Yaml, &secret), output::data(Format::Yaml, &patch));
                format!(
                    "{secret}---\n# kubectl patch deployment NAME --type json --patch-file FILE, with what follows\n{patch}"
                )
            }
        })?;
    }
    Ok(())
}

fn told(issued: &Credentials, dir: &Path) {
    let (dir, until) = (dir.display(), output::moment(issued.not_after_ms));
    eprintln!(
        "tenurectl: certificate {} of cell {:?} in {dir}, valid until {until}: kube-apiserver $(cat {dir}/apiserver-flags) …",
        issued.serial, issued.cell
    );
}

async fn trust(at: &At, format: Format, name: String, file: Option<&Path>) -> anyhow::Result<()> {
    let ca_pem = match file {
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?,
        None => String::new(),
    };
    if file.is_some() && ca_pem.trim().is_empty() {
        anyhow::bail!("no certificate in the file: name one in PEM, or say --of-cell for the cell's CA");
    }
    let (mut cell, _) = at.tenant(&name).await?;
    let request = api::SetTrustedCaRequest { tenant: name, ca_pem };
    let answer = cell.client.set_trusted_ca(request).await.map_err(|status| cell.cell.call_error(status))?;
    show(format, &cell.cell, answer.into_inner().tenant)
}

async fn revoke_one(at: &At, name: String, serial: String) -> anyhow::Result<(Cell, Option<api::Tenant>)> {
    let (mut cell, _) = at.tenant(&name).await?;
    let tenant = revoke_in(&mut cell, name, serial).await?;
    Ok((cell.cell, tenant))
}

async fn revoke_in(cell: &mut Reached, name: String, serial: String) -> anyhow::Result<Option<api::Tenant>> {
    let request = api::RevokeCredentialsRequest { tenant: name, serial, ..Default::default() };
    let answer = cell.client.revoke_credentials(request).await.map_err(|status| cell.cell.call_error(status))?;
    Ok(answer.into_inner().tenant)
}

/// Of the cell's clock: that of this machine may be another.
async fn revoke_all(at: &At, name: String, before: Option<&str>) -> anyhow::Result<(Cell, Option<api::Tenant>)> {
    let wanted = |text: &str| format!("--before {text:?}: want a moment such as 2026-01-31T12:00:00Z");
    let before = before.map(|text| output::milliseconds(text).with_context(|| wanted(text))).transpose()?;
    let (mut cell, _) = at.tenant(&name).await?;
    let before_ms = before.unwrap_or(cell.status.now_ms);
    let request = api::RevokeCredentialsRequest { tenant: name, all: true, before_ms, ..Default::default() };
    match cell.client.revoke_credentials(request).await {
        Ok(answer) => Ok((cell.cell, answer.into_inner().tenant)),
        Err(status) => {
            // A member of a release before this one says no moment: it takes its own each time.
            let moment = Some(output::moment(before_ms)).filter(|moment| !moment.is_empty());
            let again = moment.and_then(|moment| advice::revoke_again(&status, &moment));
            let error = cell.cell.call_error(status);
            Err(again.map_or_else(|| anyhow::anyhow!("{error}"), |again| anyhow::anyhow!("{error}, {again}")))
        }
    }
}
