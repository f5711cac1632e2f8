//! What a job's maker asks of the gateway, judged before the gateway does it.

use std::net::SocketAddr;
use std::sync::Arc;

use lifl_common::arena::Layout;
use lifl_common::control::{ErrorCode, Message, RemoteWorker, Reply};
use lifl_common::id::JobId;
use lifl_common::session::Broker;
use lifl_common::session::reach::Reach;
use lifl_common::session::{MAX_NAME_BYTES as MAX_REMOTE_NAME_BYTES, Traffic};

use super::{Answer, ConnId, Denial, HELLO_FIRST, Outgoing, Registry, check_name, deny};
use crate::gateway::{OpenRequest, Opened};

impl Registry {
    /// Has the gateway opened; [`gateway_opened`](Self::gateway_opened) answers.
    pub(super) fn open_gateway(
        &mut self,
        id: ConnId,
        p2p: Option<SocketAddr>,
        mqtt: Option<String>,
        object_bytes: u64,
    ) -> Result<(), Denial> {
        let job_id = self.made_by(id)?;
        if let Some(address) = p2p
            && !self.gateway_options.admits(address.ip())
        {
            let ip = address.ip();
            let message = format!(
                "the gateway may listen on loopback addresses only, not on {ip}: give the broker of sort p2p such a \
                 host, or start lifl-daemon with --gateway-listen {ip}"
            );
            return deny(ErrorCode::Denied, message);
        }
        let insecure = self.gateway_options.insecure;
        if let Some(Err(exposed)) = p2p.map(|address| Reach::permit(address.ip(), insecure)) {
            return deny(ErrorCode::Denied, format!("{exposed} to lifl-daemon"));
        }
        let mqtt = match mqtt {
            None => None,
            Some(broker) => match Broker::parse(&broker) {
                Some(broker) if self.gateway_options.admits_broker(&broker) => Some(broker),
                Some(broker) => {
                    // Before anything is looked up or connected: what is there is nobody's business.
                    let message = format!(
                        "the gateway connects with those MQTT brokers only that the administrator allows, and {broker} \
                         is none of them: start lifl-daemon with --gateway-broker {broker}"
                    );
                    return deny(ErrorCode::Denied, message);
                }
                None => {
                    let message = format!("{broker:?} is no broker: give host:port");
                    return deny(ErrorCode::BadRequest, message);
                }
            },
        };
        if p2p.is_none() && mqtt.is_none() {
            return deny(ErrorCode::BadRequest, "a gateway needs an address or a broker");
        }
        if Layout::for_objects(1, object_bytes).is_none() {
            return deny(ErrorCode::BadRequest, format!("no slot has {object_bytes} bytes"));
        }
        let Some(job) = self.jobs.get_mut(&job_id).filter(|job| !job.ended) else {
            return deny(ErrorCode::NotFound, format!("there is no job {job_id}"));
        };
        if job.traffic.is_some() {
            return deny(ErrorCode::BadRequest, "the gateway is open for this job already");
        }
        let uid = job.uid;
        let traffic = Arc::new(Traffic::default());
        job.traffic = Some(Arc::clone(&traffic));
        self.gateway.open(OpenRequest {
            conn: id,
            job: job_id,
            uid,
            p2p,
            mqtt,
            object_bytes,
            traffic,
        });
        Ok(())
    }

    /// The gateway is open for a job, or cannot be.
    pub(crate) fn gateway_opened(&mut self, opened: Opened) {
        let Opened { conn, job, reply } = opened;
        if let Reply::Error { message, .. } = &reply {
            tracing::warn!(%job, "no gateway: {message}");
            if let Some(job) = self.jobs.get_mut(&job) {
                job.traffic = None;
            }
        }
        // A job that ended meanwhile was not open yet when it was to be closed.
        if self.jobs.get(&job).is_none_or(|job| job.ended) {
            self.gateway.close(job);
        }
        self.outbox.push(Outgoing {
            to: conn,
            message: Arc::new(Message::Reply(reply)),
            fd: None,
        });
    }

    pub(super) fn expect_workers(&mut self, id: ConnId, workers: Vec<RemoteWorker>) -> Answer {
        let job = self.made_with_gateway(id)?;
        for RemoteWorker { name, role } in &workers {
            check_name("role", role)?;
            check_name("worker", name)?;
            if name.len() > MAX_REMOTE_NAME_BYTES {
                let message = format!("a remote worker's name has at most {MAX_REMOTE_NAME_BYTES} bytes");
                return deny(ErrorCode::BadRequest, message);
            }
        }
        let account = self.known(id)?.peer.account;
        let most = self.quotas.of(account).workers.min(self.facts.max_workers) as usize;
        let of_user = self.jobs.values().filter(|job| job.account == account);
        let expected: usize = of_user.map(|job| job.expected.len()).sum();
        let Some(entry) = self.jobs.get_mut(&job) else {
            return deny(ErrorCode::NotFound, format!("there is no job {job}"));
        };
        let new = workers
            .iter()
            .filter(|worker| !entry.expected.contains(worker.name.as_str()));
        if expected + new.count() > most {
            let message = format!(
                "{expected} workers are expected at the gateway already, and a user may have {most} workers: expect fewer, or ask \
                 the administrator to raise quota.workers"
            );
            return deny(ErrorCode::Full, message);
        }
        let names = workers.iter().map(|worker| worker.name.clone().into_boxed_str());
        entry.expected.extend(names);
        self.gateway.expect(job, workers);
        Ok((Reply::Done {}, None))
    }

    pub(super) fn drop_worker(&mut self, id: ConnId, name: String) -> Answer {
        let job = self.made_with_gateway(id)?;
        check_name("worker", &name)?;
        self.gateway.drop_worker(job, name);
        Ok((Reply::Done {}, None))
    }

    fn made_with_gateway(&self, id: ConnId) -> Result<JobId, Denial> {
        let job = self.made_by(id)?;
        if self.jobs.get(&job).is_some_and(|job| job.traffic.is_some()) {
            return Ok(job);
        }
        deny(ErrorCode::BadRequest, "the gateway is not open for this job")
    }

    /// The job that a connection made.
    fn made_by(&self, id: ConnId) -> Result<JobId, Denial> {
        let conn = self.known(id)?;
        if !conn.hello {
            return deny(ErrorCode::BadRequest, HELLO_FIRST);
        }
        match conn.job {
            Some(job) => Ok(job),
            None => deny(
                ErrorCode::Denied,
                "only the connection that made a job opens its gateway",
            ),
        }
    }
}
