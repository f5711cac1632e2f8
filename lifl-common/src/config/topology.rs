//! Facts of a job's tree: who is beyond the node's shared memory, how many children an aggregator can have.

use std::collections::HashMap;

use super::spec::{Group, JobSpec, Kind, Transport, WorkerSpec};

impl WorkerSpec {
    /// Whether it reaches its parent through the gateway: a proxy in the daemon stands for it there.
    pub fn is_remote(&self) -> bool {
        self.transport != Transport::Shm
    }

    /// Whether it is registered with the daemon itself, and not only its proxy is.
    pub fn is_local(&self) -> bool {
        self.kind != Kind::Trainer || !self.is_remote()
    }
}

impl JobSpec {
    /// Workers that the daemon registers for the job: proxies and the coordinator are among them.
    pub fn registrations(&self) -> u32 {
        let of_one = |worker: &WorkerSpec| u32::from(worker.is_local()) + u32::from(worker.is_remote());
        self.workers.iter().map(of_one).sum::<u32>() + 1
    }

    /// Whether some aggregator's [goal](WorkerSpec::agg_goal) is below the number of children that it may have, so that it may
    /// finish a round before all of them have answered.
    pub fn has_goals(&self) -> bool {
        let children = self.group_sizes(|worker| worker.up.as_ref());
        self.workers.iter().any(|worker| {
            let most = worker.down.as_ref().and_then(|group| children.get(group));
            worker.agg_goal.zip(most).is_some_and(|(goal, &most)| goal < most)
        })
    }

    /// The most children that an aggregator of each group of parents can have, while all workers are there: they are dealt out
    /// in turn.
    pub fn children_by_group(&self) -> HashMap<&Group, u32> {
        let children = self.group_sizes(|worker| worker.up.as_ref());
        let parents = self.group_sizes(|worker| worker.down.as_ref());
        let most = parents.into_iter().map(|(group, parents)| {
            let children = children.get(group).map_or(0, |all| all.div_ceil(parents));
            (group, children)
        });
        most.collect()
    }

    /// Workers in each group, at one end of it.
    fn group_sizes(&self, end: impl Fn(&WorkerSpec) -> Option<&Group>) -> HashMap<&Group, u32> {
        let mut sizes = HashMap::new();
        for group in self.workers.iter().filter_map(end) {
            *sizes.entry(group).or_default() += 1;
        }
        sizes
    }
}
