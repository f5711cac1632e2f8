//! Where a job's models go unencrypted beyond this machine: nothing of what goes through the gateway or a broker is
//! encrypted.

use std::fmt;

use lifl_common::config::{JobSpec, Transport};
use lifl_common::session::reach::Reach;

/// An address by which models leave this machine, or may.
#[derive(Clone, Debug)]
pub(crate) struct Exposure {
    transport: Transport,
    /// `host:port`, as the job names it.
    pub(crate) address: String,
    /// Workers whose models go that way.
    workers: usize,
    /// `None` for a name that was not looked up.
    pub(crate) reach: Option<Reach>,
}

/// All addresses that a job's workers use and that are not known to be on the loopback. No name is looked up.
pub(crate) fn of(job: &JobSpec) -> Vec<Exposure> {
    let named = [
        (Transport::P2p, &job.brokers.p2p),
        (Transport::Mqtt, &job.brokers.mqtt),
    ];
    let used = named.into_iter().filter_map(|(transport, address)| {
        let workers = job.workers.iter().filter(|worker| worker.transport == transport);
        let address = address.clone()?;
        let exposure = Exposure {
            transport,
            reach: Reach::of_host(&address),
            address,
            workers: workers.count(),
        };
        (exposure.workers > 0 && exposure.reach != Some(Reach::Loopback)).then_some(exposure)
    });
    used.collect()
}

/// What is to be said of them before a job runs.
pub(crate) fn warnings(job: &JobSpec) -> impl Iterator<Item = String> {
    of(job).into_iter().map(|exposure| match exposure.reach {
        Some(Reach::Public) => format!("WARNING: {exposure}; `lifl run` refuses that without --insecure"),
        Some(_) => format!("WARNING: {exposure}"),
        None => format!("WARNING: {exposure}; if that is beyond private networks, `lifl run` refuses it without --insecure"),
    })
}

impl Exposure {
    /// Why the job is not run.
    pub(crate) fn refusal(&self) -> String {
        let address = &self.address;
        let and = match self.transport {
            Transport::Mqtt => {
                format!("and lifl-daemon, where one is used, needs --gateway-broker {address} --insecure")
            }
            _ => {
                let host = address.rsplit_once(':').map_or(&address[..], |(host, _)| host);
                format!("and lifl-daemon needs --gateway-listen {host} --insecure")
            }
        };
        format!(
            "{self}: give a host on the loopback or in a private network, or pass --insecure to `lifl run` ({and})"
        )
    }
}

impl fmt::Display for Exposure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.transport {
            Transport::Mqtt => "the MQTT broker",
            _ => "the gateway",
        };
        let (workers, address) = (self.workers, &self.address);
        write!(
            f,
            "models of {workers} workers go UNENCRYPTED by way of {way} at {address}"
        )?;
        match self.reach {
            Some(reach) => write!(f, ", {reach}"),
            None => Ok(()),
        }
    }
}
