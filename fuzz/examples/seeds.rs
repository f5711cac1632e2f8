//! Writes what the corpora begin with: the repository's own configs, and inputs made here. What the fuzzer has found
//! lies beside them, under the hash of its content.
//!
//! `cargo run --release -p lifl-fuzz --example seeds`

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use flate2::Compression;
use flate2::write::GzEncoder;
use lifl_common::arena::Layout;
use lifl_common::control::packet;
use lifl_common::control::{
    Amounts, ArenaStatus, DeadLetter, ErrorCode, Event, JobStatus, PROTOCOL, PeerLost, RemoteWorker, Reply,
    Request, Status, UserStatus, Welcome, WorkerStatus,
};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, Generation, JobId, Key, WorkerId};
use lifl_common::kernel::Counters;
use lifl_common::plane::PlaneKind;
use lifl_common::session::handshake::{GatewayHandshake, Hello, Participant, WorkerHandshake};
use lifl_common::session::{JobToken, Message, Object};
use lifl_common::update::image::{data_offset, image_bytes, write_header};
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo};
use safetensors::tensor::TensorView;
use zerocopy::IntoBytes;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

fn main() {
    write_all(&root().join("corpus"));
}

/// Where the corpora are.
static CORPUS: OnceLock<PathBuf> = OnceLock::new();

/// Writes all of them to a folder.
///
/// # Panics
/// If it is called again, a file cannot be written, or what is to be one is not what a target reads.
pub(crate) fn write_all(corpus: &Path) {
    CORPUS.set(corpus.to_owned()).expect("called once");
    config();
    control_packet();
    flame_wire();
    frame();
    idx();
    image();
    npz();
    session();
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn seed(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    let folder = CORPUS.get().expect("a folder").join(target);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join(format!("seed-{name}")), bytes).expect("a file");
}

fn config() {
    let configs = root().join("../configs");
    for entry in fs::read_dir(configs).expect("the repository's configs") {
        let path: PathBuf = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        seed("config", &name, fs::read(&path).expect("a config"));
    }
    let channel = r#"{"name":"updates","pair":["top","trainer"],"groupBy":{"type":"tag","value":["default"]},"funcTags":{"top":["distribute","aggregate"],"trainer":["fetch","upload"]}}"#;
    let worker = |role: &str, task: &str| {
        format!(
            r#"{{"taskid":"{task}","role":"{role}","job":{{"id":"j","name":"n"}},"backend":"shm","channels":[{channel}],"groupAssociation":{{"updates":"default"}},"dataset":"builtin:digits","hyperparameters":{{"rounds":2,"epochs":1,"batchSize":16,"learningRate":0.01}}}}"#
        )
    };
    let [top, first, second] = [worker("top", "1"), worker("trainer", "2"), worker("trainer", "3")];
    seed(
        "config",
        "workers",
        format!("=== top\n{top}\n=== a\n{first}\n=== b\n{second}\n"),
    );
    let p2p = second.replace(r#""backend":"shm""#, r#""backend":"p2p""#);
    seed(
        "config",
        "variants",
        format!("=== top\n{top}\n=== a\n{first}\n=== b\n{second}\n=== b\n{p2p}\n"),
    );
    let parts = [
        format!(r#"{{"roles":[{{"name":"top"}},{{"name":"trainer","isDataConsumer":true}}],"channels":[{channel}]}}"#),
        r#"{"name":"j","designId":"d","backend":"mqtt","broker":{"sort":"mqtt","host":"localhost"}}"#.to_owned(),
        r#"{"hyperparameters":{"rounds":1,"aggGoal":1},"optimizer":{"sort":"fedadam","kwargs":{"eta":0.1}},"selector":{"sort":"random","kwargs":{"k":1}}}"#.to_owned(),
        r#"[{"role":"trainer","datasetGroups":{"default":["a","b"]}}]"#.to_owned(),
        r#"{"url":"builtin:digits","realm":"default","dataFormat":"npz"}"#.to_owned(),
        r#"{"url":"https://example.org/mnist.npz","realm":"default","dataFormat":"npz"}"#.to_owned(),
    ];
    let [schema, job, model, data, a, b] = &parts;
    seed(
        "config",
        "control-plane",
        format!(
            "=== schema\n{schema}\n=== job\n{job}\n=== modelSpec\n{model}\n=== dataSpec\n{data}\n=== dataset1\n{a}\n=== dataset2\n{b}\n"
        ),
    );
    seed(
        "config",
        "twice",
        r#"{"job":{"id":"1"},"job":{"id":"2"},"roles":[]}"#,
    );
    seed("config", "deep", "[".repeat(4000));
    seed(
        "config",
        "byte-order-mark",
        "\u{feff}{\"job\":{\"id\":\"j\"},\"hyperparameters\":{\"rounds\":2.0},}",
    );
    let utf_16: Vec<u8> = "{\"job\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    seed("config", "utf-16", utf_16);
    seed("config", "not-json", "{'a': NaN, // one\n}");
    seed(
        "config",
        "secret",
        r#"{"dataset":"http://bob:pw@host/a.npz?token=x","datset":"s3://k:s@b"}"#,
    );
}

fn control_packet() {
    let requests = [
        Request::Hello { protocol: 2 },
        Request::CreateJob { name: "mnist".into() },
        Request::Register {
            job: JobId(1),
            role: "trainer".into(),
            name: "trainer-1".into(),
        },
        serde_json::from_str(r#"{"request":"create_arena","slots":2,"slot_bytes":4096}"#).expect("a request"),
        Request::SealArena { arena: ArenaId(1) },
        Request::OpenArena { arena: ArenaId(1) },
        Request::OpenGateway {
            p2p: Some("127.0.0.1:0".parse().expect("an address")),
            mqtt: Some("localhost:1883".into()),
            object_bytes: 1 << 20,
        },
        Request::ExpectWorkers {
            workers: vec![RemoteWorker {
                name: "trainer-1".into(),
                role: "trainer".into(),
            }],
        },
        Request::DropWorker {
            name: "trainer-1".into(),
        },
        Request::Status {
            job: Some(JobId(1)),
            after: None,
        },
        Request::Traffic {},
        Request::Flame {
            after: Some((1000, 7)),
        },
        Request::EndJob {
            reason: "done".into(),
        },
    ];
    for (n, request) in requests.iter().enumerate() {
        seed("control_packet", &format!("request-{n}"), json(request));
    }
    let welcome = Welcome {
        protocol: PROTOCOL,
        version: "0.1.0".into(),
        pid: 7,
        plane: PlaneKind::Sockmap,
        plane_reason: "r".into(),
        pinned: true,
        pool_bytes: 1,
        pool_used_bytes: 0,
        huge_pages: true,
        max_workers: 4096,
        workers: 0,
        awaited: 0,
        uid: 990,
        capabilities: vec!["CAP_SYS_PTRACE".into()],
    };
    let amounts = Amounts {
        pool_bytes: 1,
        workers: 2,
        jobs: 3,
        connections: 4,
    };
    let status = Status {
        daemon: welcome.clone(),
        jobs: vec![JobStatus {
            job: JobId(1),
            name: Some("j".into()),
            uid: 1000,
            workers: 1,
            arena_bytes: 8192,
            arena_peak_bytes: 8192,
            gateway: None,
        }],
        workers: vec![WorkerStatus {
            worker: WorkerId(1),
            job: JobId(1),
            name: "n".into(),
            role: "r".into(),
            pid: 1,
            counters: Counters {
                frames: 1,
                referenced_bytes: 2,
                refused: 3,
                last_ns: 4,
            },
            idle_ns: Some(5),
            arenas: vec![ArenaStatus {
                arena: ArenaId::of(WorkerId(1), 0).expect("an arena"),
                layout: Layout::for_objects(2, 4096).expect("a layout"),
                page_bytes: 4096,
                note: None,
                sealed: true,
            }],
        }],
        more: false,
        users: vec![UserStatus {
            uid: 1000,
            used: amounts,
            quota: amounts,
        }],
    };
    seed("control_packet", "welcome", json(&Reply::Welcome(welcome)));
    seed("control_packet", "status", json(&Reply::Status(status)));
    let replies = [
        Reply::JobCreated { job: JobId(1) },
        Reply::GatewayOpened {
            token: "00".repeat(16),
            p2p: Some("[::1]:7000".parse().expect("an address")),
        },
        Reply::Done {},
        Reply::Error {
            code: ErrorCode::Full,
            message: "the pool is full".into(),
        },
    ];
    for (n, reply) in replies.iter().enumerate() {
        seed("control_packet", &format!("reply-{n}"), json(reply));
    }
    let events = [
        Event::PeerJoined {
            worker: WorkerId(2),
            name: "leaf-1".into(),
        },
        Event::PeerLost(PeerLost {
            worker: WorkerId(2),
            name: "leaf-1".into(),
        }),
        Event::DeadLetter(DeadLetter {
            to: WorkerId(2),
            to_name: None,
            kind: 5,
            round: 1,
            key: KEY,
            refusal: Refusal::OtherJob,
        }),
        Event::JobEnded {
            reason: "done".into(),
        },
    ];
    for (n, event) in events.iter().enumerate() {
        seed("control_packet", &format!("event-{n}"), json(event));
    }
    // What is wrong with a packet must not make the answer longer than a packet.
    let name = "x".repeat(packet::MAX_BYTES - r#"{"request":""}"#.len());
    seed(
        "control_packet",
        "long-name",
        format!(r#"{{"request":"{name}"}}"#),
    );
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("JSON")
}

fn flame_wire() {
    let reference = |id: u32, seqno: u64, eom: bool| {
        let mut bytes = id.to_le_bytes().to_vec();
        for (tag, text) in [
            (0x0a, "49d06b7526964db86cf37c70e8e0cdb6bd7aa743"),
            (0x12, "param-channel"),
        ] {
            bytes.extend([tag, text.len() as u8]);
            bytes.extend(text.as_bytes());
        }
        bytes.extend([0x18, (seqno & 0x7f) as u8 | 0x80, (seqno >> 7) as u8]);
        if eom {
            bytes.extend([0x20, 1]);
        }
        bytes
    };
    let with = |sizes: [u8; 4], references: &[Vec<u8>]| [&sizes[..], &references.concat()].concat();
    let three = [
        reference(7, 300, true),
        reference(8, 129, true),
        reference(9, 200, true),
    ];
    seed("flame_wire", "three", with([255; 4], &three));
    seed("flame_wire", "three-cut", with([0, 6, 30, 2], &three));
    let no_eom = [reference(7, 300, false), reference(8, 129, false)];
    seed("flame_wire", "without-eom", with([20; 4], &no_eom));
    let then_garbage = [reference(7, 300, true), b"GET / HTTP/1.1\r\n\r\n".to_vec()];
    seed("flame_wire", "then-garbage", with([0; 4], &then_garbage));
    seed("flame_wire", "registration", [1, 2, 0, 0, 9, 0, 0, 0, 0xa7, 0x43]);
    seed(
        "flame_wire",
        "registration-long",
        [1, 2, 0, 0, 9, 0, 0, 0, 0xa7, 0x43, 1, 2],
    );
}

const KEY: Key = Key {
    arena: ArenaId(3),
    slot: 1,
    generation: Generation(9),
};

fn frame() {
    let frame = |from: u32, to: u32, kind: FrameKind| Frame {
        from: WorkerId(from),
        to: WorkerId(to),
        kind: kind as u16,
        round: 4,
        key: KEY,
        length: 4096,
        samples: 600,
        value: 0.5_f64.to_bits(),
        covers: 1,
        ..Frame::default()
    };
    let good = [
        frame(1, 2, FrameKind::Update),
        frame(1, 1, FrameKind::Ready),
        frame(1, 2, FrameKind::Release),
    ];
    let bad = [
        frame(2, 1, FrameKind::Model),
        frame(1, 3, FrameKind::Refuse),
        frame(1, 9, FrameKind::Child),
    ];
    let with = |sizes: [u8; 4], frames: &[Frame], end: &[u8]| [&sizes, frames.as_bytes(), end].concat();
    seed("frame", "good", with([63; 4], &good, &[]));
    seed("frame", "bad", with([255; 4], &bad, &[]));
    let mixed = [good, bad].concat();
    seed("frame", "mixed-cut", with([0, 63, 6, 100], &mixed, &[]));
    let refused = Frame {
        refusal: Refusal::ForgedSource as u16,
        stamp: WorkerId(2),
        ..frame(1, 2, FrameKind::Refuse)
    };
    seed("frame", "cut-off", with([30; 4], &[refused], &[1; 63]));
    seed("frame", "many", with([255, 0, 17, 255], &mixed.repeat(20), &[]));
}

/// Unpacked it is more than `tests/replay.rs` lets an input have; packed, a thousandth.
const BOMB_BYTES: usize = 300 << 20;

/// IDX files of so many samples.
fn pair(n: u32) -> (Vec<u8>, Vec<u8>) {
    let bytes = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect::<Vec<u8>>()
    };
    let mut images = bytes(&[0x0803, n, 28, 28]);
    images.extend((0..n * 784).map(|at| (at / 5 % 3) as u8));
    let mut labels = bytes(&[0x0801, n]);
    labels.extend((0..n).map(|at| (at % 10) as u8));
    (images, labels)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

fn parts(parts: &[&[u8]]) -> Vec<u8> {
    let part = |part: &&[u8]| [&(part.len() as u16).to_le_bytes()[..], part].concat();
    parts.iter().flat_map(part).collect()
}

fn idx() {
    let with = |how: u8, images: &[u8], labels: &[u8]| {
        let images = parts(&[images]);
        [&[how], &images[..], labels].concat()
    };
    let (images, labels) = pair(2);
    seed("idx", "plain", with(0, &images, &labels));
    seed("idx", "zipped-here", with(3, &images, &labels));
    seed("idx", "zipped", with(0, &gzip(&images), &gzip(&labels)));
    let (images, labels) = pair(6);
    seed("idx", "more", with(0, &gzip(&images), &labels));
    seed(
        "idx",
        "two-members",
        with(0, &[gzip(&images[..100]), gzip(&images[100..])].concat(), &labels),
    );
    seed(
        "idx",
        "padded",
        with(0, &[gzip(&images), vec![0; 512]].concat(), &labels),
    );
    let header = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .collect::<Vec<u8>>()
    };
    let colour = [
        header(&[0x0804, 6, 4, 5, 3]),
        (0..6 * 60).map(|i| i as u8).collect(),
    ]
    .concat();
    let rows: Vec<u8> = (0..6_u32)
        .flat_map(|n| header(&[n, 4, 0, 0, 1, 2, 3, 4]))
        .collect();
    seed(
        "idx",
        "colour-qmnist",
        with(0, &colour, &[header(&[0x0c02, 6, 8]), rows].concat()),
    );
    let floats: Vec<u8> = (0..6 * 9).flat_map(|i| (i as f32 / 53.0).to_be_bytes()).collect();
    let wide: Vec<u8> = (0..6_u16).flat_map(|n| (n * 40).to_be_bytes()).collect();
    seed(
        "idx",
        "floats-many-classes",
        with(
            1,
            &[header(&[0x0d03, 6, 3, 3]), floats].concat(),
            &[header(&[0x0b01, 6]), wide].concat(),
        ),
    );
    seed("idx", "cut-off", with(0, &gzip(&images)[..40], &labels));
    // More than a process may have, behind a header that promises two labels; and one that promises a million images.
    let mut bomb = labels[..8].to_vec();
    bomb[4..8].copy_from_slice(&2_u32.to_be_bytes());
    bomb.resize(BOMB_BYTES, 0);
    seed("idx", "bomb", with(0, &gzip(&pair(2).0), &gzip(&bomb)));
    let mut promised = images[..16].to_vec();
    promised[4..8].copy_from_slice(&1_000_000_u32.to_be_bytes());
    promised.resize(4_000_000, 0);
    seed("idx", "bomb-promised", with(0, &gzip(&promised), &labels));
}

fn npz() {
    let npy = |shape: &str, data: &[u8]| {
        let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    };
    let arrays = [
        npy("(2, 28, 28)", &[7; 2 * 784]),
        npy("(2,)", &[3, 9]),
        npy("(1, 28, 28)", &[0; 784]),
        npy("(1,)", &[0]),
    ];
    let refs: Vec<&[u8]> = arrays.iter().map(Vec::as_slice).collect();
    for how in [1, 2] {
        seed(
            "npz",
            &format!("arrays-{how}"),
            [&[how], &parts(&refs)[..]].concat(),
        );
    }
    let array = |descr: &str, fortran: &str, shape: &str, data: &[u8]| {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    };
    let (int, float) = (
        [3_i64, 46].map(i64::to_le_bytes).concat(),
        [0.5_f32; 24].map(f32::to_le_bytes).concat(),
    );
    for (name, x, y) in [
        (
            "int64-column",
            array("|u1", "False", "(2, 3, 4, 1)", &[9; 24]),
            array("<i8", "False", "(2, 1)", &int),
        ),
        (
            "floats-one-hot",
            array("<f4", "False", "(2, 3, 2, 2)", &float),
            array("|b1", "False", "(2, 2)", &[0, 1, 1, 0]),
        ),
        (
            "fortran-squares",
            array("|u1", "True", "(2, 9)", &[5; 18]),
            array(">u2", "False", "(2,)", &[0, 1, 0, 7]),
        ),
        (
            "objects",
            array("|O", "False", "(2, 3, 3)", b"\x80\x04"),
            array("|u1", "False", "(2,)", &[0, 1]),
        ),
    ] {
        seed("npz", name, [&[1], &parts(&[&x, &y, &x, &y])[..]].concat());
    }
    let names = ["x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy"];
    let archive = |arrays: &[&[u8]]| {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, array) in names.iter().zip(arrays) {
            zip.start_file(*name, SimpleFileOptions::default())
                .expect("an entry");
            zip.write_all(array).expect("memory");
        }
        zip.finish().expect("an archive").into_inner()
    };
    let whole = archive(&refs);
    seed("npz", "packed-again", [&[0], &gzip(&whole)[..]].concat());
    seed("npz", "archive", [&[0], &whole[..]].concat());
    seed("npz", "cut-off", [&[0], &whole[..whole.len() / 2]].concat());
    // More than a process may have, in an array that says it is of two samples; and one that promises a million.
    for (name, count, bytes) in [("bomb", 2, BOMB_BYTES), ("bomb-promised", 1_000_000, 4_000_000)] {
        let bomb = npy(&format!("({count}, 28, 28)"), &vec![0; bytes]);
        seed("npz", name, [&[0], &archive(&[&bomb, refs[1]])[..]].concat());
    }
}

fn image() {
    let schema = Schema::new(vec![
        TensorSpec::new("dense.weight", DType::F32, [3, 2]),
        TensorSpec::new("steps", DType::I64, []),
        TensorSpec::new("mask", DType::U8, [5]),
    ])
    .expect("a schema");
    let of = |schema: &Schema, metadata: &Metadata| {
        let mut image = vec![0; image_bytes(schema)];
        write_header(&mut image, schema, metadata);
        let start = data_offset(schema);
        for (at, byte) in image[start..].iter_mut().enumerate() {
            *byte = at as u8;
        }
        image
    };
    let info = UpdateInfo {
        cover: Cover::of(3),
        samples: 600,
        loss: Some(0.25),
        folded: 8,
        bytes_copied: 0,
        made: vec![7, 9],
    };
    let metadata = info.metadata("leaf-aggregator-1", 3, Generation(7));
    let ours = of(&schema, &metadata);
    seed("image", "ours", &ours);
    seed("image", "cut-off", &ours[..ours.len() - 1]);
    seed("image", "no-loss", of(&schema, &Metadata::default()));
    // Each of these characters is six of JSON, and this loss has 326 digits when it is written out.
    let longest = UpdateInfo {
        cover: Cover::of(16_383),
        samples: u64::MAX,
        loss: Some(-5e-324),
        folded: u64::MAX,
        bytes_copied: u64::MAX,
        made: vec![u64::MAX; 4],
    };
    let longest = longest.metadata(&"\u{1}".repeat(128), u32::MAX, Generation(u64::MAX));
    seed("image", "longest-metadata", of(&schema, &longest));
    let other = Schema::new(vec![
        TensorSpec::new("b", DType::BF16, [2, 0, 3]),
        TensorSpec::new("h", DType::F16, [7]),
        TensorSpec::new("d", DType::F64, [1, 1, 1]),
    ]);
    seed("image", "other-schema", of(&other.expect("a schema"), &metadata));
    let floats = [0_u8; 24];
    let steps = [1_u8; 8];
    let theirs = [
        (
            "dense.weight",
            TensorView::new(safetensors::Dtype::F32, vec![3, 2], &floats),
        ),
        ("steps", TensorView::new(safetensors::Dtype::I64, vec![], &steps)),
        (
            "mask",
            TensorView::new(safetensors::Dtype::U8, vec![5], &steps[..5]),
        ),
    ];
    let theirs = theirs.map(|(name, view)| (name, view.expect("a tensor")));
    seed(
        "image",
        "theirs",
        safetensors::serialize(theirs, None).expect("a file"),
    );
    seed("image", "empty", b"\x02\0\0\0\0\0\0\0{}");
}

fn session() {
    let object = Object {
        round: 2,
        length: 40,
        schema: 7,
    };
    let update = UpdateInfo {
        samples: 600,
        cover: Cover::of(0),
        loss: Some(0.5),
        folded: 1,
        ..UpdateInfo::default()
    };
    let chunk = |round: u32, offset: u64, data: &[u8]| {
        let length = data.len();
        [
            Message::Chunk {
                round,
                offset,
                length,
            }
            .encode(),
            data.to_vec(),
        ]
        .concat()
    };
    let messages = [
        Message::Welcome.encode(),
        Message::Ready.encode(),
        Message::Model(object).encode(),
        Message::Update(object, update).encode(),
        chunk(2, 0, &[1; 25]),
        Message::Ping.encode(),
        chunk(2, 25, &[2; 15]),
        Message::Ack { round: 2, offset: 40 }.encode(),
        Message::Verdict {
            round: 2,
            refusal: 17,
        }
        .encode(),
        Message::Nothing(3).encode(),
        Message::End("done".into()).encode(),
        Message::Bye {
            last: true,
            reason: "over".into(),
        }
        .encode(),
    ];
    for (n, message) in messages.iter().enumerate() {
        seed("session", &format!("message-{n}"), [&[0], &message[..]].concat());
    }
    let framed = |message: &Vec<u8>| [&(message.len() as u32).to_le_bytes()[..], message].concat();
    let stream = |sizes: [u8; 4], messages: &[Vec<u8>]| {
        let stream: Vec<u8> = messages.iter().flat_map(framed).collect();
        [&[1], &sizes[..], &stream].concat()
    };
    let [welcome, ready, model, update, first, ping, second, .., bye] = &messages;
    let worker = [ready, update, first, ping, second, bye].map(Clone::clone);
    seed("session", "worker", stream([255; 4], &worker));
    seed("session", "worker-cut", stream([3, 0, 19, 7], &worker));
    let gateway = [welcome, model, first, model, second].map(Clone::clone);
    seed("session", "gateway", stream([12; 4], &gateway));
    let next = Message::Model(Object { round: 3, ..object }).encode();
    let abandoned = [
        model.clone(),
        first.clone(),
        next,
        second.clone(),
        chunk(3, 0, &[3; 40]),
    ];
    seed("session", "abandoned", stream([40; 4], &abandoned));
    let empty = Message::Model(Object { length: 0, ..object }).encode();
    seed("session", "empty-object", stream([255; 4], &[empty]));
    let huge = Message::Model(Object {
        length: u64::MAX,
        ..object
    });
    seed(
        "session",
        "huge-object",
        stream([255; 4], &[huge.encode(), first.clone()]),
    );
    let publish = |session: u64, sequence: u32, message: &[u8]| {
        let publish = [&session.to_le_bytes()[..], &sequence.to_le_bytes(), message].concat();
        parts(&[&publish])
    };
    let publishes = [
        publish(7, 0, ready),
        publish(7, 1, update),
        publish(8, 2, ping),
        publish(7, 2, first),
        publish(7, 1, update),
        publish(7, 3, second),
        publish(7, 0, bye),
    ];
    seed("session", "publishes", [&[2][..], &publishes.concat()].concat());
    let secret = JobToken::from_bytes([9; 16]).participant("trainer-1");
    let participant = Participant {
        name: "trainer-1".into(),
        secret: secret.clone(),
    };
    let worker = WorkerHandshake::new(&secret, "trainer-1", 5, 0);
    let hello = worker.hello();
    let said = Hello::decode(&hello).expect("a hello");
    let (_, challenge) = GatewayHandshake::answer(&said, Some(&participant), 0);
    let (proof, _) = worker.answer(&challenge).expect("the gateway's");
    for (name, message) in [
        ("hello", &hello[..]),
        ("challenge", &challenge),
        ("proof", &proof),
    ] {
        seed("session", name, [&[3], message].concat());
    }
    let gap = [publish(7, 0, model), publish(7, 2, first)];
    seed("session", "publishes-gap", [&[2][..], &gap.concat()].concat());
}
