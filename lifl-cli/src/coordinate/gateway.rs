//! The gateway of a run's job: opened before any worker starts, if some reach their parents through it.

use std::net::SocketAddr;

use anyhow::{Context, anyhow};
use lifl_common::client::Client;
use lifl_common::config::{JobSpec, Transport, WorkerSpec};
use lifl_common::control::RemoteWorker;
use lifl_common::session::reach::Reach;
use lifl_common::session::{JobToken, Secret};
use lifl_common::update::Schema;

use super::report::Reporter;
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::exposure;
use crate::memory;

/// How a run's workers get in.
pub(super) struct Gateway {
    /// The job's token, from which each worker's secret comes; `None` where nobody needs it.
    token: Option<JobToken>,
    p2p: Option<SocketAddr>,
    mqtt: Option<String>,
    insecure: bool,
}

/// Refuses a job whose models would go unencrypted beyond private networks, unless that was allowed, and warns of one whose
/// models leave this machine.
///
/// # Errors
/// If it is refused. A name that leads nowhere is an error later.
pub(super) async fn check_reach(job: &JobSpec, insecure: bool, reporter: &Reporter) -> Outcome {
    for mut exposure in exposure::of(job) {
        let found = tokio::net::lookup_host(&exposure.address).await;
        for address in found.into_iter().flatten() {
            exposure.reach = exposure.reach.max(Some(Reach::of(address.ip())));
        }
        if exposure.reach == Some(Reach::Loopback) {
            continue;
        }
        if exposure.reach == Some(Reach::Public) && !insecure {
            return Err(Failure::new(Cause::Machine, anyhow!("{}", exposure.refusal())));
        }
        reporter.say(&format!("WARNING: {exposure}"));
    }
    Ok(())
}

impl Gateway {
    /// Has the daemon open it, if the job needs it.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub(super) async fn open(
        job: &JobSpec,
        schema: &Schema,
        client: &mut Client,
        insecure: bool,
    ) -> Outcome<Self> {
        let remote: Vec<RemoteWorker> = job
            .workers
            .iter()
            .filter(|worker| worker.is_remote())
            .map(|WorkerSpec { name, role, .. }| RemoteWorker {
                name: name.clone(),
                role: role.clone(),
            })
            .collect();
        if remote.is_empty() {
            return Ok(Self {
                token: None,
                p2p: None,
                mqtt: None,
                insecure,
            });
        }
        let uses = |transport| job.workers.iter().any(|worker| worker.transport == transport);
        let p2p = match &job.brokers.p2p {
            Some(address) if uses(Transport::P2p) => Some(resolve(address).await?),
            _ => None,
        };
        let mqtt = job.brokers.mqtt.clone().filter(|_| uses(Transport::Mqtt));
        let opened = client
            .open_gateway(p2p, mqtt.clone(), memory::object_bytes(schema))
            .await;
        let (token, p2p) = opened.because(Cause::Machine)?;
        client.expect_workers(&remote).await.because(Cause::Machine)?;
        Ok(Self {
            token: Some(token),
            p2p,
            mqtt,
            insecure,
        })
    }

    /// Whether workers may connect beyond private networks.
    pub(super) fn is_insecure(&self) -> bool {
        self.insecure
    }

    /// What a worker needs to get in: the address of gateway or broker, and its own secret. `None` for one that does not come
    /// through it.
    pub(super) fn access(&self, worker: &WorkerSpec) -> Option<(String, Secret)> {
        let address = match worker.transport {
            Transport::Shm => None,
            Transport::P2p => self.p2p.map(|address| address.to_string()),
            Transport::Mqtt => self.mqtt.clone(),
        };
        Some((address?, self.token?.participant(&worker.name)))
    }
}

/// The address that `host:port` stands for, one of the older kind if there is one.
async fn resolve(address: &str) -> Outcome<SocketAddr> {
    let found = tokio::net::lookup_host(address).await;
    let found =
        found.with_context(|| format!("the gateway's address {address} (brokers, sort p2p) is not known"));
    let mut found: Vec<SocketAddr> = found.because(Cause::Machine)?.collect();
    found.sort_by_key(SocketAddr::is_ipv6);
    found.into_iter().next().ok_or_else(|| {
        Failure::new(
            Cause::Machine,
            anyhow!("the gateway's address {address} (brokers, sort p2p) is none"),
        )
    })
}
