//! The commands that only look at a job's files: `validate`, `plan`, `schema`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lifl_common::config::{self, ConfigError, JobSpec, Loaded, Timing, Transport, UpdateKind};
use lifl_common::control::Welcome;
use lifl_common::limits::{self, Cgroups};
use lifl_daemon::plane;
use lifl_daemon::pool::HugePages;
use lifl_worker::coordinator::{Pair, pair};
use serde_json::json;

use super::{SMALL, runtime};
use crate::cli::{Choices, JobArgs, Report};
use crate::coordinate::daemon::{DaemonChoice, Node, NodeOptions};
use crate::coordinate::report::human_bytes;
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::exposure;
use crate::inputs;
use crate::memory::Plan;
use crate::output::outln;
use crate::requirements::Requirements;

/// Reads a job, and prints its problems as events where they were asked for.
pub(super) fn load(paths: &[PathBuf], choices: &Choices, report: Report) -> Outcome<Loaded> {
    config::load(paths, &choices.overrides()).map_err(|error| {
        if report.json {
            // That the files are wrong counts for more than that this could not be said.
            let _ = print_problems(&error);
        }
        Failure::new(Cause::Config, error)
    })
}

fn print_problems(error: &ConfigError) -> Outcome {
    for problem in &error.problems {
        outln!("{}", json!({ "event": "problem", "problem": problem }))?;
    }
    Ok(())
}

/// Looks at the job's data and base model; what is wrong with them is an event too where those were asked for.
fn look(job: &mut JobSpec, notes: &mut Vec<String>, report: Report) -> Outcome {
    let problem = |event: &serde_json::Value| {
        if report.json {
            // What is wrong counts for more than that this could not be said.
            let _ = outln!("{event}");
        }
    };
    notes.extend(inputs::look(job, problem)?);
    Ok(())
}

/// Says whether a job could run, without starting anything.
pub(crate) fn validate(args: &JobArgs) -> Outcome {
    let Loaded { mut job, mut notes } = load(&args.paths, &args.choices, args.report)?;
    notes.extend(exposure::warnings(&job));
    look(&mut job, &mut notes, args.report)?;
    if args.report.json {
        outln!("{}", json!({ "event": "valid", "job": job, "notes": notes }))?;
        return Ok(());
    }
    for note in &notes {
        outln!("note: {note}")?;
    }
    outln!(
        "{}: {} workers, {} aggregator levels, {} rounds: valid",
        job.name,
        job.workers.len(),
        job.levels(),
        job.rounds
    )?;
    Ok(())
}

/// Shows the tree, the memory and the plane.
pub(crate) fn plan(args: &JobArgs) -> Outcome {
    let Loaded { mut job, mut notes } = load(&args.paths, &args.choices, args.report)?;
    notes.extend(exposure::warnings(&job));
    look(&mut job, &mut notes, args.report)?;
    let schema = lifl_learn::schema(&job).because(Cause::Config)?;
    let daemon = daemon_for()?;
    let plan = Plan::new(&job, &schema, daemon.huge_pages);
    let needs = Requirements::of(&job, &schema);
    let pairs = pair(&job.workers, |_| true);
    if args.report.json {
        let tree: Vec<_> = job
            .workers
            .iter()
            .enumerate()
            .map(|(index, worker)| {
                let parent = pairs
                    .get(&index)
                    .and_then(|pair| pair.parent)
                    .map(|parent| &job.workers[parent].name);
                json!({
                    "name": worker.name, "role": worker.role, "parent": parent, "transport": worker.transport,
                    "takes_part": pairs.contains_key(&index), "agg_goal": worker.agg_goal, "select": worker.select,
                })
            })
            .collect();
        let (plane, reason) = (daemon.plane, daemon.plane_reason);
        outln!(
            "{}",
            json!({ "event": "plan", "job": job.name, "tree": tree, "memory": plan, "notes": notes, "brokers": job.brokers, "plane": plane, "plane_reason": reason, "requirements": needs, "memory_limit": Cgroups::current().memory(), "task_limit": limits::tasks() })
        )?;
        return Ok(());
    }
    for note in &notes {
        outln!("note: {note}")?;
    }
    let timing = match job.timing {
        Timing::Eager => "eager",
        Timing::Lazy => "lazy",
    };
    let updates = match job.updates {
        UpdateKind::Weights => "weights",
        UpdateKind::Deltas => "deltas",
    };
    outln!(
        "{}: {} rounds, {timing} timing, {updates} go up",
        job.name,
        job.rounds
    )?;
    if let Some(top) = job.workers.iter().position(|worker| worker.up.is_none()) {
        print_tree(&job, &pairs, top, "", "")?;
    }
    let left_out: Vec<&str> = job
        .workers
        .iter()
        .enumerate()
        .filter(|(index, _)| !pairs.contains_key(index))
        .map(|(_, worker)| worker.name.as_str())
        .collect();
    if !left_out.is_empty() {
        outln!("without children, so not taking part: {}", left_out.join(", "))?;
    }
    outln!("")?;
    outln!(
        "model    {} parameters, {} in a slot",
        plan.parameters,
        human_bytes(plan.object_bytes)
    )?;
    let processes = plan.workers.len() + 1;
    let states = plan.workers.iter().filter(|share| share.state_bytes > 0);
    let arenas = plan.workers.len() + states.count();
    let pages = human_bytes(plan.page_bytes);
    outln!(
        "arenas   {} in {arenas} arenas, pages of {pages}",
        human_bytes(plan.pool_bytes)
    )?;
    outln!(
        "private  at most {} in {processes} processes",
        human_bytes(plan.private_bytes),
    )?;
    let limit = match Cgroups::current().memory() {
        Some(limit) => format!(
            "; {} allows {}, {} in use",
            limit.by,
            human_bytes(limit.allowed),
            human_bytes(limit.used)
        ),
        None => String::new(),
    };
    outln!("memory   at most {}{limit}", human_bytes(plan.total_bytes))?;
    if let Some(limit) = limits::tasks() {
        outln!(
            "tasks    {} processes and threads beside this one; {} allows {}, {} there",
            needs.tasks,
            limit.by,
            limit.allowed,
            limit.used
        )?;
    }
    for (transport, address) in [("p2p", &job.brokers.p2p), ("mqtt", &job.brokers.mqtt)] {
        if let Some(address) = address {
            outln!("{transport:<8} at {address}")?;
        }
    }
    outln!("plane    {}: {}", daemon.plane, daemon.plane_reason)?;
    Ok(())
}

/// The daemon that a run would get: one that listens, or one started for a moment to see what this user may have.
fn daemon_for() -> Outcome<Welcome> {
    let options = NodeOptions {
        daemon: DaemonChoice::Auto,
        plane: plane::Request::Auto,
        pool_bytes: None,
        huge_pages: HugePages::Auto,
        // None is started: a job that has too few descriptors is shown all the same.
        workers: 1,
        insecure: false,
    };
    runtime(SMALL)?.block_on(async {
        let node = Node::find(&options).await?;
        let welcome = node.client.welcome().clone();
        node.stop().await.because(Cause::Machine)?;
        Ok(welcome)
    })
}

fn print_tree(
    job: &JobSpec,
    pairs: &BTreeMap<usize, Pair>,
    index: usize,
    indent: &str,
    branch: &str,
) -> Outcome {
    let worker = &job.workers[index];
    let transport = match worker.transport {
        Transport::Shm => String::new(),
        transport => format!("  {transport}"),
    };
    let children = pairs.get(&index).map_or(&[][..], |pair| &pair.children);
    let mut rounds = String::new();
    if let Some(k) = worker.select.filter(|&k| (k as usize) < children.len()) {
        rounds += &format!("  {k} of {} at random", children.len());
    }
    if let Some(goal) = worker.agg_goal.filter(|&goal| (goal as usize) < children.len()) {
        rounds += &format!("  done with {goal}");
    }
    outln!("{indent}{branch}{}{transport}{rounds}", worker.name)?;
    let below = match branch {
        "" => indent.to_owned(),
        "├─ " => format!("{indent}│  "),
        _ => format!("{indent}   "),
    };
    for (nth, &child) in children.iter().enumerate() {
        let branch = if nth + 1 == children.len() {
            "└─ "
        } else {
            "├─ "
        };
        print_tree(job, pairs, child, &below, branch)?;
    }
    Ok(())
}

/// Prints the job files' JSON Schema.
pub(crate) fn schema() -> Outcome {
    outln!("{:#}", config::schema())?;
    Ok(())
}
