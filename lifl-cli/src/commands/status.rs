//! `lifl status`.

use std::path::Path;

use anyhow::anyhow;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use lifl_common::client::{Client, ClientError};
use lifl_common::control::{FlamePage, Status, UserStatus};
use lifl_common::plane::is_warning;
use serde_json::json;

use super::{SMALL, log, runtime};
use crate::cli::StatusArgs;
use crate::coordinate::daemon::reachable;
use crate::coordinate::report::human_bytes;
use crate::exit::{Cause, Failure, Outcome};
use crate::output::{self, outln};

/// Shows what every daemon has. Fails if there is none, or one that listens cannot be asked.
pub(crate) fn status(args: &StatusArgs) -> Outcome {
    log("warn");
    let runtime = runtime(SMALL)?;
    runtime.block_on(async {
        let (daemons, mut unreachable) = reachable(args.daemon.as_deref()).await?;
        if daemons.is_empty() && unreachable.is_empty() {
            let error = anyhow!(
                "no daemon that this user can reach: start one with `sudo lifl-daemon`, or run a job"
            );
            return Err(Failure::new(Cause::Machine, error));
        }
        for (socket, mut client) in daemons {
            let (status, flame) = match ask(&mut client).await {
                Ok(answers) => answers,
                Err(error) => {
                    unreachable.push(error);
                    continue;
                }
            };
            if args.report.json {
                outln!(
                    "{}",
                    json!({ "event": "status", "socket": socket, "status": status, "flame": flame })
                )?;
            } else {
                print(&socket, &status)?;
                if let Some(flame) = flame {
                    print_flame(&flame)?;
                }
            }
        }
        let last = unreachable.pop();
        for error in unreachable {
            output::told().line(format!("lifl: {:#}\n", anyhow!(error)));
        }
        last.map_or(Ok(()), |error| Err(Failure::new(Cause::Machine, error)))
    })
}

/// What a daemon has, of jobs and of Flame's workers.
async fn ask(client: &mut Client) -> Result<(Status, Option<FlamePage>), ClientError> {
    Ok((client.status(None).await?, client.flame().await?))
}

fn print(socket: &Path, status: &Status) -> Outcome {
    let daemon = &status.daemon;
    outln!(
        "daemon {} (pid {}) at {}",
        daemon.version,
        daemon.pid,
        socket.display()
    )?;
    let warning = match is_warning(&daemon.plane_reason) {
        true => "WARNING, ",
        false => "",
    };
    outln!("  plane {}: {warning}{}", daemon.plane, daemon.plane_reason)?;
    if daemon.awaited > 0 {
        outln!(
            "  {} workers of the daemon before have not come back yet",
            daemon.awaited
        )?;
    }
    let (used, ceiling) = (
        human_bytes(daemon.pool_used_bytes),
        human_bytes(daemon.pool_bytes),
    );
    outln!(
        "  pool {used} of {ceiling}, {} of {} workers",
        daemon.workers,
        daemon.max_workers
    )?;
    outln!("  runs as uid {}, {}", daemon.uid, with(&daemon.capabilities))?;
    for user in &status.users {
        outln!("  {}", share(user))?;
    }
    for job in &status.jobs {
        let name = job.name.as_deref().unwrap_or("(another user's)");
        let bytes = human_bytes(job.arena_bytes);
        outln!(
            "  job {} {name}: uid {}, {} workers, {bytes} in arenas",
            job.job,
            job.uid,
            job.workers
        )?;
        if let Some(gateway) = &job.gateway {
            let (received, sent) = (
                human_bytes(gateway.bytes_received),
                human_bytes(gateway.bytes_sent),
            );
            outln!("    gateway: {received} received, {sent} sent")?;
        }
    }
    if status.workers.is_empty() {
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header([
        "",
        "worker",
        "job",
        "pid",
        "frames",
        "referenced",
        "refused",
        "last",
        "arena",
        "pages",
    ]);
    for worker in &status.workers {
        let arena = worker.arenas.first();
        table.add_row([
            worker.worker.to_string(),
            worker.name.clone(),
            worker.job.to_string(),
            worker.pid.to_string(),
            worker.counters.frames.to_string(),
            human_bytes(worker.counters.referenced_bytes),
            worker.counters.refused.to_string(),
            ago(worker.counters.last_ns, worker.idle_ns),
            arena
                .and_then(|arena| arena.layout.bytes())
                .map_or_else(|| "-".to_owned(), human_bytes),
            arena.map_or_else(|| "-".to_owned(), |arena| human_bytes(arena.page_bytes)),
        ]);
    }
    for numbers in [3, 4, 5, 6, 7, 8, 9] {
        if let Some(column) = table.column_mut(numbers) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    outln!("{table}")
}

/// What a process may do.
fn with(capabilities: &[String]) -> String {
    match capabilities {
        [] => "without capabilities".to_owned(),
        some => format!("with {}", some.join(", ")),
    }
}

/// What a user has of what it may have.
fn share(user: &UserStatus) -> String {
    let UserStatus { uid, used, quota } = user;
    let count = |used: u32, quota: u32, what: &str| match quota {
        u32::MAX => format!("{used} {what}"),
        quota => format!("{used} of {quota} {what}"),
    };
    let memory = match quota.pool_bytes {
        u64::MAX => human_bytes(used.pool_bytes),
        quota => format!("{} of {}", human_bytes(used.pool_bytes), human_bytes(quota)),
    };
    format!(
        "uid {uid} has {memory} in arenas, {}, {}, {}",
        count(used.workers, quota.workers, "workers"),
        count(used.jobs, quota.jobs, "jobs"),
        count(used.connections, quota.connections, "connections")
    )
}

fn print_flame(page: &FlamePage) -> Outcome {
    outln!(
        "  Flame at {}, plane {}: {} workers on {} connections, {} references held",
        page.skmsg,
        page.plane,
        page.workers.len(),
        page.connections,
        page.held
    )?;
    if page.workers.is_empty() {
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header([
        "", "taskid", "uid", "pid", "process", "sent", "held", "refused", "last",
    ]);
    for worker in &page.workers {
        table.add_row([
            String::new(),
            worker.taskid.clone(),
            worker.uid.to_string(),
            worker.pid.to_string(),
            worker.name.clone(),
            worker.sent.to_string(),
            worker.held.to_string(),
            worker.refused.to_string(),
            ago(worker.last_ns, worker.idle_ns),
        ]);
    }
    for numbers in [2, 3, 5, 6, 7, 8] {
        if let Some(column) = table.column_mut(numbers) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    outln!("{table}")
}

/// How long ago the last frame was, which the daemon says: its clock may be another than this process's.
fn ago(last_ns: u64, idle_ns: Option<u64>) -> String {
    match (last_ns, idle_ns) {
        (0, _) => "never".to_owned(),
        // A daemon of before does not say.
        (_, None) => "-".to_owned(),
        (_, Some(idle)) => format!("{:.1} s", idle as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::control::Amounts;

    use super::*;

    #[test]
    fn a_users_share_is_shown_with_its_limits_where_there_are_some() {
        let used = Amounts {
            pool_bytes: 512 << 20,
            workers: 3,
            jobs: 1,
            connections: 5,
        };
        let none = Amounts {
            pool_bytes: u64::MAX,
            workers: u32::MAX,
            jobs: u32::MAX,
            connections: u32::MAX,
        };
        let quota = Amounts {
            pool_bytes: 600 << 20,
            workers: 10,
            ..none
        };
        let user = |quota| UserStatus {
            uid: 1000,
            used,
            quota,
        };
        assert_eq!(
            share(&user(quota)),
            "uid 1000 has 512 MiB of 600 MiB in arenas, 3 of 10 workers, 1 jobs, 5 connections"
        );
        assert_eq!(
            share(&user(none)),
            "uid 1000 has 512 MiB in arenas, 3 workers, 1 jobs, 5 connections"
        );
    }

    #[test]
    fn capabilities_are_named_and_none_is_said() {
        assert_eq!(with(&[]), "without capabilities");
        assert_eq!(with(&["CAP_BPF".into(), "CAP_X".into()]), "with CAP_BPF, CAP_X");
    }
}
