//! What the router shows.

use std::ops::Bound;

use lifl_common::control::{FlamePage, FlameWorkerStatus};
use lifl_common::flame::Address;
use lifl_common::plane::PlaneKind;

use super::Router;
use crate::clock::idle_ns;
use crate::flame::rules::show_id;

/// Workers on one page of a status: a page must fit into a packet.
const STATUS_PAGE: usize = 128;

impl Router {
    /// Tells whoever reads the log which workers this daemon leaves: Flame's SDK takes the end of its connection for an
    /// empty message, again and again.
    pub(in crate::flame) fn name_left(&self) {
        for (address, conn) in &self.workers {
            let Some(worker) = self.conns.get(conn).and_then(|conn| conn.worker.as_ref()) else {
                continue;
            };
            tracing::warn!(
                id = show_id(address.id),
                uid = address.uid,
                pid = worker.process.pid,
                name = worker.process.name,
                "Flame worker left without a daemon: its SDK reads the closed connection without a pause and never \
                 connects again; end it with `kill {}` and start its job again once a daemon is there",
                worker.process.pid
            );
        }
    }

    /// A page of the workers that a user may see, after that one.
    pub(in crate::flame) fn status(&self, uid: u32, after: Option<(u32, u32)>) -> FlamePage {
        let may_see = |address: &Address| uid == 0 || uid == address.uid;
        let start = after.map(|(uid, id)| Address { uid, id });
        let mut shown: Vec<FlameWorkerStatus> = Vec::new();
        let mut more = false;
        let after = start.map_or(Bound::Unbounded, Bound::Excluded);
        let later = self.workers.range((after, Bound::Unbounded));
        for (address, conn) in later.filter(|(address, _)| may_see(address)) {
            let Some(conn) = self.conns.get(conn) else {
                continue;
            };
            let Some(worker) = conn.worker.as_ref().filter(|worker| worker.joined) else {
                continue;
            };
            if shown.len() == STATUS_PAGE {
                more = true;
                break;
            }
            let in_kernel = self
                .kernel
                .as_ref()
                .and_then(|kernel| kernel.counters(*address).ok());
            let (kernel, relayed) = (in_kernel.unwrap_or_default(), conn.relayed);
            let last_ns = kernel.last_ns.max(relayed.last_ns);
            shown.push(FlameWorkerStatus {
                uid: address.uid,
                id: address.id,
                taskid: show_id(address.id),
                pid: worker.process.pid,
                name: worker.process.name.clone(),
                sent: kernel.sent + relayed.sent,
                held: kernel.held + relayed.held,
                refused: kernel.refused + relayed.refused,
                last_ns,
                idle_ns: idle_ns(last_ns),
            });
        }
        let held = self.held.iter().filter(|(address, _)| may_see(address));
        FlamePage {
            plane: match self.kernel {
                Some(_) => PlaneKind::Sockmap,
                None => PlaneKind::Relay,
            },
            skmsg: self.local.to_string(),
            connections: self
                .conns
                .values()
                .filter(|conn| uid == 0 || uid == conn.uid)
                .count() as u32,
            held: held.map(|(_, held)| held.len() as u32).sum(),
            workers: shown,
            more,
        }
    }
}
