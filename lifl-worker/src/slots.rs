//! How many objects a worker's arena has room for: as many as the protocol lets it have outstanding at once.

use lifl_common::config::{Kind, WorkerSpec};

/// Models of rounds that are over which late workers may hold.
const OLD_MODELS: u32 = 2;

/// Slots of the top's second arena: the optimizer's state as it is, which the coordinator may have, and the next in
/// the making.
pub const STATE_SLOTS: u32 = 2;

/// Slots of a worker's arena. The top holds a round's model while it makes the next one; everybody else has one
/// update in the making or on its way, and waits with the next until that is given back. Beyond the node's shared memory
/// an aggregator has the model that came over the wire beside it, as the top has, and a trainer has no arena.
///
/// Where some aggregator may not wait for all of its children, late ones may still hold models of rounds that are
/// over. Whoever hands models down from its own arena then has slots for two of these; when more are held, the next round
/// begins when one is given back.
///
/// `goals` is whether the job [has some](lifl_common::config::JobSpec::has_goals).
pub fn slots(worker: &WorkerSpec, goals: bool) -> u32 {
    let old_models = if goals { OLD_MODELS } else { 0 };
    match (worker.kind, worker.is_remote()) {
        (Kind::Top, _) | (Kind::Aggregator, true) => 2 + old_models,
        (Kind::Aggregator | Kind::Trainer, false) => 1,
        (Kind::Trainer, true) => 0,
    }
}

/// How many models of rounds that are over a child of that aggregator may hold and still be lent a new one; `None` in
/// a job whose rounds wait for everybody. A trainer that holds one trains on it. An aggregator that holds some waits
/// for late trainers, and may work for the others; if it hangs, it holds all that there may be and no more.
///
/// `goals` is as for [`slots`], `levels` those of the job's aggregators.
pub fn most_held(aggregator: &WorkerSpec, goals: bool, levels: u32) -> Option<u32> {
    let above_trainers = aggregator.level + 1 == levels;
    goals.then_some(if above_trainers { 0 } else { OLD_MODELS - 1 })
}
