//! The aggregator's process: the shell that drives [`lifl_worker::aggregator`] over the node's frames and, where the parent is
//! beyond the node, a session with the gateway.

mod load_model;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use lifl_aggregate::{ServerOptimizer, Threads};
use lifl_common::config::{JobSpec, Kind};
use lifl_common::id::ArenaId;
use lifl_common::limits;
use lifl_common::session::{Destination, Object, Source};
use lifl_common::update::{Schema, image};
use lifl_worker::aggregator::{Aggregator, Config, Input, Output, Top};
use lifl_worker::gateway_link::{GatewayEvent, GatewayLink};
use lifl_worker::node_link::{Incoming, NodeLink};

use self::load_model::load_model;
use super::join::{Joined, join, log};
use super::{Place, gateway_link};
use crate::clock::monotonic_ns;
use crate::dir::Dir;
use crate::task::Task;

struct Shell<'r> {
    aggregator: Aggregator,
    link: NodeLink,
    arena: ArenaId,
    gateway: Option<GatewayLink>,
    schema: Arc<Schema>,
    job: JobSpec,
    name: String,
    run: &'r Dir,
    /// The round of the checkpoint that the top begins from; `None` for the job's first model.
    start: Option<u32>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, run: &Dir, task: Task, schema: Schema) -> anyhow::Result<()> {
    let Joined {
        link,
        arena,
        state_arena,
    } = join(&place, &task, &schema).await?;
    let gateway = gateway_link(&place, &task.worker)?;
    let threads = Threads::up_to(Threads::useful(limits::cpus(), schema.elements()));
    let Task {
        job,
        worker,
        most_held,
        ..
    } = task;
    let schema = Arc::new(schema);
    let top = (worker.kind == Kind::Top).then(|| Top {
        optimizer: ServerOptimizer::new(Arc::clone(&schema), job.optimizer, job.updates),
        state_arena,
        quorum: job.quorum,
        rounds: job.rounds,
    });
    let rule = lifl_aggregate::rule(&job, &schema, &threads);
    let config = Config {
        name: worker.name.clone(),
        worker: link.id(),
        coordinator: link.coordinator(),
        schema: Arc::clone(&schema),
        goal: worker.agg_goal,
        most_held,
        via_gateway: gateway.is_some(),
        threads,
    };
    let mut shell = Shell {
        link,
        arena: arena.id(),
        aggregator: Aggregator::new(config, top, rule, arena)?,
        gateway,
        schema,
        job,
        name: worker.name,
        run,
        start: place.start,
    };
    shell.perform().await?;
    shell.handle(Input::Ready)?;
    if let Some(gateway) = &mut shell.gateway {
        gateway.ready();
    }
    shell.run().await
}

impl Shell<'_> {
    async fn run(&mut self) -> anyhow::Result<()> {
        loop {
            while self.aggregator.timeout().is_some() {
                self.handle(Input::Timeout)?;
                self.perform().await?;
            }
            self.link.flush().await?;
            tokio::select! {
                incoming = self.link.next() => {
                    let mut incoming = Some(incoming?);
                    // All that is there already, so that what has come is folded in one pass.
                    while let Some(one) = incoming {
                        log(&one);
                        let input = match one {
                            Incoming::Frame(frame) => Input::Frame(frame),
                            Incoming::Lost { worker, .. } => Input::PeerLost(worker),
                            Incoming::Undelivered(letter) => Input::Undelivered(letter.to, letter.refusal),
                            Incoming::Ended(_) => return Ok(()),
                        };
                        self.handle(input)?;
                        self.perform().await?;
                        incoming = self.link.ready().await?;
                    }
                }
                event = next(&mut self.gateway) => {
                    let input = match event? {
                        GatewayEvent::Offered => Input::ModelOffered,
                        GatewayEvent::Model(object, Destination::Slot { slot, .. }) => Input::ModelReceived(object, slot),
                        GatewayEvent::Model(_, Destination::Private(_)) => {
                            anyhow::bail!("a model came into memory that is not a slot");
                        }
                        GatewayEvent::Verdict(round, refusal) => Input::Verdict { round, refusal },
                        GatewayEvent::Ended(reason) => {
                            tracing::info!("the job has ended: {reason}");
                            return Ok(());
                        }
                    };
                    self.handle(input)?;
                }
            }
        }
    }

    fn handle(&mut self, input: Input) -> anyhow::Result<()> {
        let now = Duration::from_nanos(monotonic_ns());
        Ok(self.aggregator.handle(now, input)?)
    }

    /// Does what the aggregator asks for.
    async fn perform(&mut self) -> anyhow::Result<()> {
        while let Some(output) = self.aggregator.poll_output() {
            match output {
                Output::Send(frame) => self.link.post(frame),
                Output::OpenArena(arena) => {
                    let opened = self.link.peer_arena(arena).await;
                    let opened = opened.map_err(|error| format!("{:#}", anyhow::Error::from(error)));
                    self.handle(Input::ArenaOpened { arena, opened })?;
                }
                Output::LoadModel { model, state } => {
                    let loaded = load_model(self, model, state)?;
                    self.handle(Input::ModelLoaded(Box::new(loaded)))
                        .with_context(|| match self.start {
                            Some(round) => {
                                format!("the job cannot begin from the checkpoint of round {round}")
                            }
                            None => "the job cannot begin".to_owned(),
                        })?;
                }
                Output::ReceiveModel(slot) => {
                    let data = image::data_range(&self.schema);
                    self.gateway()?.accept(Destination::Slot { slot, data });
                }
                Output::SendAggregate(round, info, key) => {
                    let source = Source::Arena {
                        arena: self
                            .link
                            .open(self.arena)
                            .await?
                            .context("the own arena is gone")?,
                        key,
                        data: image::data_range(&self.schema),
                    };
                    let object = Object::of(round, &self.schema);
                    self.gateway()?.update(object, info, source);
                }
                Output::SendNothing { round } => self.gateway()?.nothing(round),
            }
        }
        Ok(())
    }

    fn gateway(&mut self) -> anyhow::Result<&mut GatewayLink> {
        self.gateway
            .as_mut()
            .context("there is no session with the gateway")
    }
}

/// Waits for what comes from the gateway; for ever without one. Cancel-safe.
async fn next(gateway: &mut Option<GatewayLink>) -> anyhow::Result<GatewayEvent> {
    match gateway {
        None => std::future::pending().await,
        Some(gateway) => Ok(gateway.next().await?),
    }
}
