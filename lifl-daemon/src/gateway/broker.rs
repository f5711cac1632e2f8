//! A job's connection with its MQTT broker: what workers publish is dealt to their sessions.
//!
//! ```text
//!            subscribed                        connection lost, broker gone
//!   away ───────────────────▶ on the line ─────────────────────────────────▶ away   all sessions are broken, and their
//!     └─ not reached: pause ─┘                                                        workers say hello again
//! ```

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use lifl_common::session::mqtt::{self, Broker, Driver, INBOX, Line};
use lifl_common::session::{HELLO_TIMEOUT, Hello, JobToken, Wire};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::chain::error_chain;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Sessions that have not said hello; of more the oldest is ended.
const MAX_SILENT: usize = 256;

/// Topics with a session, beyond which dead ones are looked for.
const MANY: usize = 1024;

/// What it takes to serve a job's broker.
pub(super) struct Service<A> {
    pub(super) broker: Broker,
    pub(super) token: JobToken,
    /// Takes who has said hello.
    pub(super) admit: A,
    pub(super) tasks: TaskTracker,
    pub(super) open: CancellationToken,
}

impl<A: Fn(Hello, Wire) + Clone + Send + 'static> Service<A> {
    /// Serves until `open` is cancelled. `reached` is told once whether the broker could be reached at first; if not,
    /// that is the end.
    pub(super) async fn serve(self, reached: impl FnOnce(Result<(), String>)) {
        let open = self.open.clone();
        tokio::select! {
            () = open.cancelled() => {}
            () = self.serve_on(reached) => {}
        }
    }

    async fn serve_on(self, reached: impl FnOnce(Result<(), String>)) {
        let subscription = mqtt::subscription(&self.token);
        let mut reached = Some(reached);
        let mut pause = FIRST_PAUSE;
        loop {
            match mqtt::connect(&self.broker, &self.token, &subscription).await {
                Ok((line, driver)) => {
                    if let Some(reached) = reached.take() {
                        reached(Ok(()));
                    }
                    pause = FIRST_PAUSE;
                    self.deal(&line, driver).await;
                }
                Err(error) => {
                    let why = error_chain(&error);
                    if let Some(reached) = reached.take() {
                        return reached(Err(why));
                    }
                    tracing::warn!(broker = %self.broker, "not reached: {why}");
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Deals publishes until the connection fails.
    async fn deal(&self, line: &Line, mut driver: Driver) {
        let mut sessions: HashMap<Bytes, (u64, mpsc::Sender<Bytes>)> = HashMap::new();
        let mut silent: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let (topic, payload) = match driver.next().await {
                Ok(publish) => publish,
                Err(error) => {
                    let why = error_chain(&error);
                    tracing::warn!(broker = %self.broker, "the line to the broker is lost: {why}");
                    return;
                }
            };
            let Some((session, sequence)) = mqtt::envelope(&payload) else {
                continue;
            };
            if let Some((known, inbox)) = sessions.get(&topic)
                && *known == session
                && !inbox.is_closed()
            {
                if inbox.try_send(payload).is_err() {
                    tracing::warn!("a worker sends more than was asked for: its session is ended");
                    sessions.remove(&topic);
                }
                continue;
            }
            let Some(down) = std::str::from_utf8(&topic).ok().and_then(mqtt::answering) else {
                continue;
            };
            if sequence != 0 {
                line.refuse(&down, session);
                continue;
            }
            // A first message: a hello, or nobody.
            if sessions.len() >= MANY {
                sessions.retain(|_, (_, inbox)| !inbox.is_closed());
            }
            let (inbox, publishes) = mpsc::channel(INBOX);
            let wire = line.wire(down, session, publishes);
            let _ = inbox.try_send(payload);
            sessions.insert(topic, (session, inbox));
            silent.retain(|task| !task.is_finished());
            if silent.len() >= MAX_SILENT
                && let Some(oldest) = silent.pop_front()
            {
                oldest.abort();
            }
            let greeted = self.tasks.spawn(greet(wire, self.admit.clone()));
            silent.push_back(greeted.abort_handle());
        }
    }
}

/// Looks at a session's first message.
async fn greet(mut wire: Wire, admit: impl Fn(Hello, Wire)) {
    match tokio::time::timeout(HELLO_TIMEOUT, wire.hello()).await {
        Ok(Ok(hello)) => admit(hello, wire),
        Ok(Err(error)) => tracing::warn!("no worker, over MQTT: {}", error_chain(&error)),
        Err(_) => {}
    }
}
