//! What a plane makes of the pinned maps that it finds: who is alive in them, and whose socket somebody hands over.
//!
//! A worker's socket is in the map for as long as somebody has it open, whatever becomes of the daemon, and leaves it
//! when it closes. So a socket that is there, and whose connection is a worker's, is that worker's.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use aya::maps::{Map, MapData, MapError, SockHash};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{
    Connection, MAP_COUNTERS, MAP_CREDITS, MAP_MEMBERS, MAP_SENDERS, MAP_SOCKETS, Member, Receiver, Sender,
};
use zerocopy::transmute;

use super::pins::PinError;
use super::socket::Found;
use super::sockmap::{ConnectionBytes, ReceiverBytes, Registered, SenderBytes, Sockmap, failed};
use super::{PlaneError, SocketError};
use crate::ebpf::unless_missing;

/// What the last daemon left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last worker's number.
    pub last_worker: WorkerId,
    /// The last job's number.
    pub last_job: JobId,
    /// The ceiling under which the arenas were made.
    pub pool_bytes: u64,
    /// Workers whose sockets are open.
    pub members: BTreeMap<WorkerId, Member>,
}

/// Whether a pinned map of sockets is there and has one.
pub(super) fn has_sockets(path: &Path) -> Result<bool, PinError> {
    if !path.exists() {
        return Ok(false);
    }
    let failed = |source| PinError::Map {
        path: path.to_owned(),
        source,
    };
    let map = Map::from_map_data(MapData::from_pin(path).map_err(failed)?).map_err(failed)?;
    let map: SockHash<_, u32> = map.try_into().map_err(failed)?;
    for key in map.keys() {
        if key.map_err(failed)? != WorkerId::NONE.0 {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Sockmap {
    /// Takes over whoever is in the maps and has its socket open; removes everything else from them.
    pub(super) fn recover(&mut self) -> Result<(), PlaneError> {
        let action = "list the entries";
        let sockets = self.open_sockets()?;
        let members: BTreeSet<u32> = keys(self.members.keys()).map_err(failed(MAP_MEMBERS, action))?;
        let senders: Vec<(ConnectionBytes, SenderBytes)> = self
            .senders
            .iter()
            .collect::<Result<_, MapError>>()
            .map_err(failed(MAP_SENDERS, action))?;
        let counted: BTreeSet<u32> = keys(self.counters.keys()).map_err(failed(MAP_COUNTERS, action))?;
        for (connection, sender) in senders {
            let (key, sender): (Connection, Sender) = (transmute!(connection), transmute!(sender));
            let worker = sender.worker.0;
            if sockets.contains(&worker) && members.contains(&worker) && counted.contains(&worker) {
                let receiver = self.receiver(sender.worker)?;
                let registered = Registered {
                    connection: key,
                    receiver,
                    joined: true,
                };
                self.credits
                    .adopt(receiver.member.uid, &key, registered.slots())
                    .map_err(failed(MAP_CREDITS, "change an entry"))?;
                self.workers.insert(sender.worker, registered);
                self.holders.insert(key, sender.worker);
            } else {
                unless_missing(self.senders.remove(&connection))
                    .map_err(failed(MAP_SENDERS, "remove an entry"))?;
            }
        }
        let alive = |worker: &u32| self.workers.contains_key(&WorkerId(*worker));
        let dead: BTreeSet<u32> = sockets
            .iter()
            .chain(&members)
            .chain(&counted)
            .copied()
            .filter(|worker| !alive(worker))
            .collect();
        for worker in dead {
            unless_missing(self.sockets.remove(&worker)).map_err(failed(MAP_SOCKETS, "remove an entry"))?;
            unless_missing(self.members.remove(&worker)).map_err(failed(MAP_MEMBERS, "remove an entry"))?;
            unless_missing(self.counters.remove(&worker)).map_err(failed(MAP_COUNTERS, "remove an entry"))?;
        }
        Ok(())
    }

    /// Who was found.
    pub(super) fn recovered(&self) -> Result<Recovered, PlaneError> {
        let mut members = BTreeMap::new();
        for (&worker, registered) in &self.workers {
            members.insert(worker, registered.receiver.member);
        }
        let last = members.keys().next_back().map_or(0, |worker| worker.0);
        let last_job = members.values().map(|member| member.job.0).max().unwrap_or(0);
        Ok(Recovered {
            last_worker: WorkerId(self.state.last_worker.max(last)),
            last_job: JobId(self.state.last_job.max(last_job)),
            pool_bytes: self.state.pool_bytes,
            members,
        })
    }

    /// Notes how much memory a worker has.
    pub(super) fn note_arenas(&mut self, worker: WorkerId, bytes: u64) -> Result<(), PlaneError> {
        let Some(registered) = self.workers.get_mut(&worker) else {
            return Ok(());
        };
        let receiver = &mut registered.receiver;
        receiver.member = receiver.member.with_arena_bytes(bytes);
        let receiver: ReceiverBytes = transmute!(*receiver);
        if self.pins.is_none() || !registered.joined {
            return Ok(());
        }
        let noted = self.members.insert(worker.0, receiver, 0);
        noted.map_err(failed(MAP_MEMBERS, "change an entry"))
    }

    fn receiver(&self, worker: WorkerId) -> Result<Receiver, PlaneError> {
        let receiver: ReceiverBytes = self
            .members
            .get(&worker.0, 0)
            .map_err(failed(MAP_MEMBERS, "read an entry"))?;
        Ok(transmute!(receiver))
    }

    /// The worker whose socket a descriptor is, `None` if it is no registered worker's.
    pub(super) fn whose(&self, found: &Found) -> Result<Option<WorkerId>, SocketError> {
        let connection = found.within(self.netns)?;
        Ok(self.holders.get(&connection).copied())
    }

    /// The numbers in the map of sockets: of the workers whose sockets are open.
    pub(super) fn open_sockets(&self) -> Result<BTreeSet<u32>, PlaneError> {
        let mut sockets = keys(self.sockets.keys()).map_err(failed(MAP_SOCKETS, "list the entries"))?;
        sockets.remove(&WorkerId::NONE.0);
        Ok(sockets)
    }
}

fn keys(keys: impl Iterator<Item = Result<u32, MapError>>) -> Result<BTreeSet<u32>, MapError> {
    keys.collect()
}
