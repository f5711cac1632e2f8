//! One update from a process to another.
//!
//! By reference: the sender lends the object, the receiver finds it in shared memory and gives it back. Byte by byte: the sender
//! writes all of it, the receiver reads it into memory of its own. `seconds` is the way there: from before the
//! sender's call to when the receiver has it; `round_trip_seconds` is until the sender knows. All ways to hand an update of one size
//! over are measured in turn, a few at a time, so that whatever else the machine does meets all of them.
//!
//! `sockmap-spinning` is the sockmap with both ends looking for frames for a moment before they sleep (`lifl.spinMicros`), on a
//! core each.
//!
//! `bare` is the least that a redirect in the kernel costs: a program that does nothing else, and blocking reads and writes of
//! as many bytes as a frame has.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lifl_common::arena::{Layout, OwnedArena};
use lifl_common::client::{Client, Registration, loopback_pair};
use lifl_common::control::paths;
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{JobId, Key, WorkerId};
use lifl_common::runtime;
use lifl_daemon::plane::{Bare, Request};
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Options};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::UsageWho;
use serde_json::{Map, json};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use zerocopy::IntoBytes;

use super::echo::{self, WINDOW};
use super::report::{Measured, Reporter, Seconds};
use super::{Actor, HandoffArgs, Scene, machine};
use crate::clock::monotonic_ns;
use crate::requirements;

/// In so many turns all that is measured of a way is measured.
const TURNS: u32 = 20;

/// What one way may take for one size.
const TIME: Duration = Duration::from_secs(12);

/// Those who send at a time in the stream of many.
const SENDERS: u32 = 8;

pub(super) fn run(args: &HandoffArgs, scene: &Scene, reporter: &mut Reporter<'_>) -> anyhow::Result<()> {
    let read = machine::probe()?;
    reporter.memory(machine::cores(), read);
    for &bytes in &args.bytes {
        // Sender and receiver of the bytes themselves have them both.
        let room = machine::available_bytes();
        if bytes.saturating_mul(3) > room {
            let why = format!("{} bytes needed, {room} can be had", bytes.saturating_mul(3));
            reporter.skipped("handoff", &json!({ "bytes": bytes }), &why);
            continue;
        }
        one_size(bytes, args, scene, reporter, read)?;
    }
    if args.frames == 0 {
        return Ok(());
    }
    for request in [Request::Sockmap, Request::Relay] {
        for senders in [1, SENDERS] {
            stream(request, senders, args.frames, scene, reporter)?;
        }
    }
    Ok(())
}

/// One way to hand an update over.
trait Way {
    /// Hands it over, and waits for the answer: when it was sent, when the receiver had it, when the sender knew.
    fn once(&mut self) -> anyhow::Result<[u64; 3]>;

    /// The receiver's process.
    fn receiver(&self) -> u32;

    /// Bytes that a call moves.
    fn moved(&self) -> u64;
}

fn one_size(
    bytes: u64,
    args: &HandoffArgs,
    scene: &Scene,
    reporter: &mut Reporter<'_>,
    read: f64,
) -> anyhow::Result<()> {
    let update = vec![0x3D_u8; usize::try_from(bytes)?];
    let mut ways: Vec<(&str, Box<dyn Way + '_>)> = Vec::new();
    let case = |via| json!({ "via": via, "bytes": bytes });
    match BareWay::new(scene) {
        Ok(way) => ways.push(("bare", Box::new(way))),
        Err(error) => reporter.skipped("handoff", &case("bare"), &format!("{error:#}")),
    }
    let workers = [
        ("sockmap", Request::Sockmap, 0),
        ("sockmap-spinning", Request::Sockmap, args.spin),
        ("relay", Request::Relay, 0),
    ];
    for (via, request, spin) in workers {
        if via == "sockmap-spinning" && spin == 0 {
            continue;
        }
        match WorkerWay::new(scene, request, bytes, spin, via) {
            Ok(way) => ways.push((via, Box::new(way))),
            Err(error) => reporter.skipped("handoff", &case(via), &format!("{error:#}")),
        }
    }
    ways.push(("unix", Box::new(BytesWay::unix(scene, &update)?)));
    ways.push(("tcp", Box::new(BytesWay::tcp(scene, &update)?)));

    let mut taken: Vec<Taken> = ways.iter().map(|_| Taken::default()).collect();
    for (_, way) in &mut ways {
        // Whatever is touched for the first time is touched here.
        way.once()?;
    }
    for turn in 0..TURNS {
        for ((_, way), taken) in ways.iter_mut().zip(&mut taken) {
            scene.check()?;
            taken.turn(&mut **way, args.count / TURNS, turn)?;
        }
    }
    let peak = machine::used_by(std::process::id()).private_bytes;
    let least = ways
        .iter()
        .zip(&taken)
        .find(|((via, _), _)| *via == "bare")
        .map(|(_, taken)| Seconds::of(taken.there.clone()).median);
    for ((via, way), taken) in ways.iter().zip(taken) {
        let runs = taken.there.len() as f64;
        let there = Seconds::of(taken.there);
        let mut more = Map::new();
        let back = Seconds::of(taken.back);
        more.insert("round_trip_seconds".to_owned(), back.median.into());
        more.insert("round_trip_p99_seconds".to_owned(), back.p99.into());
        more.insert("round_trip_p999_seconds".to_owned(), back.p999.into());
        if let Some(least) = least {
            more.insert("times_bare".to_owned(), (there.median / least).into());
        }
        let moved = way.moved();
        reporter.result(Measured {
            bench: "handoff",
            case: case(via),
            // Of references nobody reads more than the frame.
            share_of_read: (moved == bytes).then(|| moved as f64 / there.median / read),
            seconds: there,
            bytes_moved: moved,
            cpu_seconds: Some(taken.cpu / runs),
            peak_memory_bytes: peak + machine::used_by(way.receiver()).private_bytes,
            more,
        });
    }
    Ok(())
}

/// What one way has taken so far.
#[derive(Default)]
struct Taken {
    there: Vec<f64>,
    back: Vec<f64>,
    cpu: f64,
    seconds: f64,
}

impl Taken {
    /// Some more, unless it has had its time.
    fn turn(&mut self, way: &mut dyn Way, count: u32, turn: u32) -> anyhow::Result<()> {
        let share = TIME.as_secs_f64() * f64::from(turn + 1) / f64::from(TURNS);
        let cpu = |way: &dyn Way| {
            machine::cpu_seconds(UsageWho::RUSAGE_SELF) + machine::used_by(way.receiver()).cpu_seconds
        };
        let (before, begun) = (cpu(way), Instant::now());
        for n in 0..count {
            // A few are measured, however long they take.
            let over = self.seconds + begun.elapsed().as_secs_f64() > share;
            if over && (n > 0 || self.there.len() >= 5) {
                break;
            }
            let [sent, had, known] = way.once()?;
            self.there.push(had.saturating_sub(sent) as f64 / 1e9);
            self.back.push(known.saturating_sub(sent) as f64 / 1e9);
        }
        self.seconds += begun.elapsed().as_secs_f64();
        self.cpu += cpu(way) - before;
        Ok(())
    }
}

/// The least that a redirect costs.
struct BareWay<'a> {
    near: TcpStream,
    child: Actor<'a>,
    _far: [OwnedFd; 2],
    _bare: Bare,
}

impl<'a> BareWay<'a> {
    fn new(scene: &'a Scene) -> anyhow::Result<Self> {
        let ((near, far), (other, other_far)) = (loopback_pair()?, loopback_pair()?);
        let bare = Bare::load([&near, &other])?;
        for socket in [&near, &other] {
            fcntl(socket, FcntlArg::F_SETFL(OFlag::empty())).context("fcntl(F_SETFL)")?;
        }
        let mut command = scene.lifl(&["echo", "bare"])?;
        let child = scene.spawn(command.stdin(Stdio::from(other)))?;
        Ok(Self {
            near: TcpStream::from(near),
            child,
            _far: [far, other_far],
            _bare: bare,
        })
    }
}

impl Way for BareWay<'_> {
    fn once(&mut self) -> anyhow::Result<[u64; 3]> {
        let message = Frame {
            // Number 1 of the two.
            to: WorkerId(1),
            ..Frame::default()
        };
        exchange(&mut self.near, message.as_bytes(), &mut [0; Frame::BYTES])
    }

    fn receiver(&self) -> u32 {
        self.child.pid()
    }

    fn moved(&self) -> u64 {
        Frame::BYTES as u64
    }
}

/// A daemon, and this process as the maker of a job and a worker in it, on one thread as workers are.
struct Stage {
    me: Registration,
    /// Gone before the daemon is.
    client: Option<Client>,
    job: JobId,
    runtime: Runtime,
    daemon: Option<(Runtime, Daemon)>,
    socket: PathBuf,
}

impl Stage {
    fn new(request: Request, pool_bytes: u64, via: &str) -> anyhow::Result<Self> {
        let socket = paths::own_daemon(std::process::id())?;
        // Several are measured in turn.
        let socket = socket.with_extension(format!("{via}.sock"));
        let daemons = runtime::start(requirements::COORDINATOR, || {})?;
        let daemon = {
            let _within = daemons.enter();
            Daemon::start(
                Options {
                    socket: socket.clone(),
                    socket_mode: 0o600,
                    socket_group: None,
                    plane: request,
                    pool_bytes,
                    huge_pages: HugePages::Auto,
                    max_workers: SENDERS + 2,
                    pin: None,
                    grace: Duration::ZERO,
                    flame: None,
                    gateway: GatewayOptions::default(),
                },
                CancellationToken::new(),
            )?
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let joined = runtime.block_on(async {
            let mut client = Client::connect(&socket).await?;
            let job = client.create_job("bench").await?;
            let me = client.register(job, "sender", "sender").await?;
            anyhow::Ok((client, job, me))
        });
        match joined {
            Ok((client, job, me)) => Ok(Self {
                me,
                client: Some(client),
                job,
                runtime,
                daemon: Some((daemons, daemon)),
                socket,
            }),
            Err(error) => {
                daemons.block_on(daemon.stop())?;
                Err(error)
            }
        }
    }

    /// Waits until a worker can begin.
    fn ready(&mut self) -> anyhow::Result<WorkerId> {
        let ready = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(30), self.me.frames.recv()).await });
        let ready = ready.context("the receiver does not come")??;
        Ok(ready.context("the daemon is gone")?.from)
    }

    fn create_arena(&mut self, layout: Layout) -> anyhow::Result<OwnedArena> {
        let client = self.client.as_mut().context("the stage is empty")?;
        Ok(self.runtime.block_on(client.create_arena(layout))?.arena)
    }

    fn frame(&self, to: WorkerId, kind: FrameKind) -> Frame {
        Frame {
            to,
            from: self.me.worker,
            kind: kind as u16,
            ..Frame::default()
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.client = None;
        if let Some((runtime, daemon)) = self.daemon.take()
            && let Err(error) = runtime.block_on(daemon.stop())
        {
            tracing::error!("the bench's daemon could not clean up: {error}");
        }
    }
}

/// By reference, as workers do.
struct WorkerWay<'a> {
    // It goes before the stage that it stands on.
    child: Actor<'a>,
    arena: OwnedArena,
    key: Key,
    length: u64,
    to: WorkerId,
    stage: Stage,
}

impl<'a> WorkerWay<'a> {
    fn new(scene: &'a Scene, request: Request, bytes: u64, spin: u32, via: &str) -> anyhow::Result<Self> {
        let layout = Layout::for_objects(1, bytes).context("larger than this machine's address space")?;
        let pool = layout
            .memfd_bytes(true)
            .context("larger than this machine's address space")?;
        let mut stage = Stage::new(request, pool, via)?;
        stage.me.frames.set_spin(Duration::from_micros(spin.into()));
        let (job, socket) = (stage.job.0.to_string(), stage.socket.display().to_string());
        let child = scene.spawn(&mut scene.lifl(&[
            "echo",
            "worker",
            "--socket",
            &socket,
            "--job",
            &job,
            "--spin",
            &spin.to_string(),
        ])?)?;
        let mut arena = stage.create_arena(layout)?;
        let mut slot = arena.begin().context("a new arena has no free slot")?;
        slot.bytes_mut()[..usize::try_from(bytes)?].fill(0x3D);
        let key = arena.publish(slot);
        let to = stage.ready()?;
        Ok(Self {
            child,
            arena,
            key,
            length: bytes,
            to,
            stage,
        })
    }
}

impl Way for WorkerWay<'_> {
    fn once(&mut self) -> anyhow::Result<[u64; 3]> {
        let frame = Frame {
            key: self.key,
            length: self.length,
            ..self.stage.frame(self.to, FrameKind::Update)
        };
        let (arena, me) = (&mut self.arena, &mut self.stage.me);
        self.stage.runtime.block_on(async {
            let sent = monotonic_ns();
            arena.lend(frame.key, frame.to)?;
            me.frames.send(&[frame]).await?;
            let back = me.frames.recv().await?.context("the daemon is gone")?;
            arena.release(back.key, back.from)?;
            Ok([sent, back.value, monotonic_ns()])
        })
    }

    fn receiver(&self) -> u32 {
        self.child.pid()
    }

    fn moved(&self) -> u64 {
        Frame::BYTES as u64
    }
}

/// Sends a message and waits for its answer; gives when it was sent, received there, and answered here.
fn exchange(
    stream: &mut (impl std::io::Read + Write),
    message: &[u8],
    answer: &mut [u8],
) -> anyhow::Result<[u64; 3]> {
    let sent = monotonic_ns();
    stream.write_all(message)?;
    ensure!(echo::read_whole(stream, answer)?, "the receiver is gone");
    Ok([sent, echo::answered(answer)?, monotonic_ns()])
}

struct BytesWay<'a, S> {
    stream: S,
    update: &'a [u8],
    child: Actor<'a>,
}

impl<'a> BytesWay<'a, UnixStream> {
    fn unix(scene: &'a Scene, update: &'a [u8]) -> anyhow::Result<Self> {
        let path = scene.folder().join(format!("{}.sock", update.len()));
        let listener = UnixListener::bind(&path)?;
        let (path, bytes) = (path.display().to_string(), update.len().to_string());
        let child = scene.spawn(&mut scene.lifl(&["echo", "unix", "--path", &path, "--bytes", &bytes])?)?;
        let (stream, _) = listener.accept()?;
        std::fs::remove_file(path)?;
        Ok(Self {
            stream,
            update,
            child,
        })
    }
}

impl<'a> BytesWay<'a, TcpStream> {
    fn tcp(scene: &'a Scene, update: &'a [u8]) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let (address, bytes) = (listener.local_addr()?.to_string(), update.len().to_string());
        let child =
            scene.spawn(&mut scene.lifl(&["echo", "tcp", "--address", &address, "--bytes", &bytes])?)?;
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            update,
            child,
        })
    }
}

impl<S: std::io::Read + Write> Way for BytesWay<'_, S> {
    fn once(&mut self) -> anyhow::Result<[u64; 3]> {
        exchange(&mut self.stream, self.update, &mut [0; 8])
    }

    fn receiver(&self) -> u32 {
        self.child.pid()
    }

    fn moved(&self) -> u64 {
        self.update.len() as u64
    }
}

/// Frames as fast as they go, from one sender or several to one receiver, which says now and then what it has.
fn stream(
    request: Request,
    senders: u32,
    frames: u32,
    scene: &Scene,
    reporter: &mut Reporter<'_>,
) -> anyhow::Result<()> {
    let each = frames / senders;
    let case = json!({ "via": request_name(request), "stream": senders });
    let mut stage = match Stage::new(request, 1 << 21, "stream") {
        Ok(stage) => stage,
        Err(error) => {
            reporter.skipped("handoff", &case, &format!("{error:#}"));
            return Ok(());
        }
    };
    let (job, socket, count) = (
        stage.job.0.to_string(),
        stage.socket.display().to_string(),
        each.to_string(),
    );
    let mut children = Vec::new();
    for n in 0..senders {
        let name = format!("sender-{n}");
        let arguments = [
            "echo", "stream", "--socket", &socket, "--job", &job, "--name", &name, "--frames", &count,
        ];
        children.push(scene.spawn(&mut scene.lifl(&arguments)?)?);
    }
    let ids: Vec<WorkerId> = (0..senders).map(|_| stage.ready()).collect::<Result<_, _>>()?;
    let cpu = |children: &[Actor<'_>]| {
        let others = children
            .iter()
            .map(|child| machine::used_by(child.pid()).cpu_seconds);
        machine::cpu_seconds(UsageWho::RUSAGE_SELF) + others.sum::<f64>()
    };
    let before = cpu(&children);
    let words: Vec<Frame> = ids.iter().map(|&id| stage.frame(id, FrameKind::Begin)).collect();
    let me = stage.me.worker;
    let frames_socket = &mut stage.me.frames;
    let begun = Instant::now();
    stage.runtime.block_on(async {
        frames_socket.send(&words).await?;
        let mut pending: Vec<(WorkerId, u32, u32)> = ids.iter().map(|&id| (id, 0, each)).collect();
        let mut left = each * senders;
        while left > 0 {
            let frame = frames_socket.recv().await?.context("the daemon is gone")?;
            let Some((id, unsaid, to_come)) = pending.iter_mut().find(|(id, ..)| *id == frame.from) else {
                continue;
            };
            (*unsaid, *to_come, left) = (*unsaid + 1, *to_come - 1, left - 1);
            if *unsaid == WINDOW / 4 || *to_come == 0 {
                let back = Frame {
                    to: *id,
                    from: me,
                    kind: FrameKind::Release as u16,
                    covers: std::mem::take(unsaid),
                    ..Frame::default()
                };
                frames_socket.send(&[back]).await?;
            }
        }
        anyhow::Ok(())
    })?;
    let wall = begun.elapsed().as_secs_f64();
    let cpu = cpu(&children) - before;
    let total = f64::from(each * senders);
    let mut more = Map::new();
    more.insert("frames_per_s".to_owned(), (total / wall).into());
    reporter.result(Measured {
        bench: "handoff",
        case,
        seconds: Seconds::of(vec![wall / total]),
        bytes_moved: Frame::BYTES as u64,
        share_of_read: None,
        cpu_seconds: Some(cpu / total),
        peak_memory_bytes: machine::used_by(std::process::id()).private_bytes,
        more,
    });
    children.into_iter().try_for_each(Actor::wait)
}

fn request_name(request: Request) -> &'static str {
    match request {
        Request::Sockmap => "sockmap",
        Request::Relay => "relay",
        Request::Auto => "auto",
    }
}
