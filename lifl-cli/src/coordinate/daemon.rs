//! The daemon that a run uses: one that listens, or its own.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use lifl_common::client::{Client, ClientError};
use lifl_common::control::packet::PacketSocket;
use lifl_common::control::paths;
use lifl_common::kernel::DEFAULT_MAX_WORKERS;
use lifl_daemon::plane;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Brokers, Daemon, GatewayOptions, Options, default_pool_bytes};
use tokio_util::sync::CancellationToken;

use crate::exit::{Because, Cause, Failure, Outcome};
use crate::requirements;

/// Which daemon a run wants.
#[derive(Clone, Debug)]
pub enum DaemonChoice {
    /// One that listens at the usual places, else its own.
    Auto,
    /// Its own.
    Own,
    /// The one at this socket.
    At(PathBuf),
}

/// What a run asks of its daemon.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Which daemon.
    pub daemon: DaemonChoice,
    /// Which plane.
    pub plane: plane::Request,
    /// The own daemon's ceiling for arenas, in bytes.
    pub pool_bytes: Option<u64>,
    /// The own daemon's pages.
    pub huge_pages: HugePages,
    /// Workers of the run, the coordinator among them.
    pub workers: u32,
    /// Whether models may go unencrypted beyond private networks.
    pub insecure: bool,
}

/// A run's daemon, and the coordinator's connection to it.
pub struct Node {
    /// The connection.
    pub client: Client,
    /// Where it listens.
    pub socket: PathBuf,
    own: Option<Daemon>,
    /// Why a daemon that listens is not used, when that is so.
    pub passed_over: Option<String>,
}

impl Node {
    /// Finds or starts the daemon.
    ///
    /// # Errors
    /// If there is none where one was asked for, or the plane cannot be had.
    pub async fn find(options: &NodeOptions) -> Outcome<Self> {
        let mut passed_over = None;
        match &options.daemon {
            DaemonChoice::At(socket) => {
                let client = Client::connect(socket).await;
                let client = client.with_context(|| {
                    format!(
                        "start one with `lifl-daemon --socket {}`, or leave --daemon out",
                        socket.display()
                    )
                });
                let node = Self {
                    client: client.because(Cause::Machine)?,
                    socket: socket.clone(),
                    own: None,
                    passed_over,
                };
                node.check_plane(options.plane)?;
                return Ok(node);
            }
            DaemonChoice::Auto => {
                for socket in paths::daemon_sockets() {
                    match Client::connect(&socket).await {
                        Ok(client) => {
                            let node = Self {
                                client,
                                socket,
                                own: None,
                                passed_over,
                            };
                            node.check_plane(options.plane)?;
                            return Ok(node);
                        }
                        Err(error) if nobody_there(&error) => {}
                        Err(error) if not_allowed(&error) => {
                            passed_over = Some(format!(
                                "a daemon listens at {}, but this user may not connect: join its group (`usermod -aG lifl \
                                 $USER`)",
                                socket.display()
                            ));
                        }
                        Err(error) => passed_over = Some(format!("{error:#}")),
                    }
                }
            }
            DaemonChoice::Own => {}
        }
        Self::start(options, passed_over).await
    }

    async fn start(options: &NodeOptions, passed_over: Option<String>) -> Outcome<Self> {
        requirements::check_descriptors(requirements::own_descriptors(options.workers))?;
        sweep();
        let socket = paths::own_daemon(std::process::id()).because(Cause::Machine)?;
        let daemon = Daemon::start(
            Options {
                socket: socket.clone(),
                socket_mode: 0o600,
                socket_group: None,
                plane: options.plane,
                pool_bytes: options.pool_bytes.unwrap_or_else(default_pool_bytes),
                huge_pages: options.huge_pages,
                max_workers: options.workers.max(DEFAULT_MAX_WORKERS),
                // It ends with this process, and so do its jobs.
                pin: None,
                grace: Duration::ZERO,
                // Flame's ports are for a daemon that stays.
                flame: None,
                // It connects as this user, who may connect anywhere.
                gateway: GatewayOptions {
                    brokers: Brokers::Any,
                    insecure: options.insecure,
                    ..GatewayOptions::default()
                },
            },
            CancellationToken::new(),
        );
        let daemon = daemon.because(Cause::Machine)?;
        let client = Client::connect(&socket).await.because(Cause::Machine)?;
        Ok(Self {
            client,
            socket,
            own: Some(daemon),
            passed_over,
        })
    }

    /// Whether the daemon lives in this process.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    fn check_plane(&self, wanted: plane::Request) -> Outcome {
        let has = self.client.welcome().plane;
        if wanted.admits(has) {
            return Ok(());
        }
        let error = anyhow!(
            "the daemon at {} is on plane {has} ({}): leave --plane out, or run with --daemon own",
            self.socket.display(),
            self.client.welcome().plane_reason
        );
        Err(Failure::new(Cause::Machine, error))
    }

    /// Ends the own daemon and waits until all that it had is gone.
    ///
    /// # Errors
    /// If something stays behind.
    pub async fn stop(self) -> anyhow::Result<()> {
        drop(self.client);
        match self.own {
            Some(daemon) => daemon.stop().await.context("the daemon could not clean up"),
            None => Ok(()),
        }
    }
}

/// Takes away the sockets of own daemons that were killed: nobody listens at them.
fn sweep() {
    for socket in paths::own_daemons() {
        if PacketSocket::connect(&socket).is_err_and(|error| nobody_at(error.kind())) {
            tracing::debug!(socket = %socket.display(), "left by a run that was killed");
            let _ = std::fs::remove_file(&socket);
        }
    }
}

/// Whether a socket is not there or nobody listens at it.
fn nobody_there(error: &ClientError) -> bool {
    connect_error(error).is_some_and(nobody_at)
}

fn nobody_at(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn not_allowed(error: &ClientError) -> bool {
    connect_error(error) == Some(io::ErrorKind::PermissionDenied)
}

fn connect_error(error: &ClientError) -> Option<io::ErrorKind> {
    match error {
        ClientError::Connect { source, .. } => Some(source.kind()),
        _ => None,
    }
}

/// Connections for `lifl status`: to every daemon that this user can reach; and what is wrong with those that listen and
/// cannot be asked.
///
/// # Errors
/// If the one that was named cannot be reached.
pub async fn reachable(named: Option<&Path>) -> Outcome<(Vec<(PathBuf, Client)>, Vec<ClientError>)> {
    if let Some(socket) = named {
        let client = Client::connect(socket).await.because(Cause::Machine)?;
        return Ok((vec![(socket.to_owned(), client)], Vec::new()));
    }
    // At a time: each that does not answer takes as long as it may.
    let asked = paths::candidates().into_iter().map(|socket| {
        tokio::spawn(async move {
            let client = Client::connect(&socket).await;
            (socket, client)
        })
    });
    let asked: Vec<_> = asked.collect();
    let (mut found, mut unreachable) = (Vec::new(), Vec::new());
    for asked in asked {
        match asked.await.because(Cause::Machine)? {
            (socket, Ok(client)) => found.push((socket, client)),
            (_, Err(error)) if nobody_there(&error) || not_allowed(&error) => {}
            (_, Err(error)) => unreachable.push(error),
        }
    }
    Ok((found, unreachable))
}
