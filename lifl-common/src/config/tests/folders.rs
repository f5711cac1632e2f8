//! Which files of a folder are a job's, and files as editors and shells write them.

use std::path::Path;

use super::*;

/// A folder with a job file in it.
fn folder() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    put(folder.path(), "job.json", job().to_string());
    folder
}

fn put(folder: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    fs::write(path, content).expect("written");
}

fn load_at(path: &Path) -> Result<Loaded, String> {
    load(&[path.to_owned()], &Overrides::default()).map_err(|error| error.to_string())
}

/// What a run leaves that was given `path` as its folder.
fn run_folder(path: &Path) {
    let written = json!({ "version": 1, "id": "job-1", "workers": [] });
    put(path, "job.json", written.to_string());
    put(path, "workers/top-1.json", "{}");
    put(path, "checkpoint-1.json", "{}");
}

#[test]
fn what_is_hidden_or_left_by_others_is_no_job_file() {
    let folder = folder();
    for (name, content) in [
        (
            ".ipynb_checkpoints/job-checkpoint.json",
            job().to_string().as_bytes(),
        ),
        (".vscode/settings.json", b"{ \"editor.tabSize\": 2, }"),
        ("._job.json", b"\0\x05\x16\x07"),
        (".#job.json", b"x"),
        ("#job.json#", b"x"),
        ("job.json~", b"x"),
        ("job.json.bak", b"x"),
        ("__MACOSX/._job.json", b"x"),
        ("__MACOSX/job.json", b"x"),
        ("node_modules/a/package.json", b"{}"),
        ("model.safetensors.index.json", b"{\"weight_map\":{}}"),
    ] {
        put(folder.path(), name, content);
    }
    let loaded = load_at(folder.path()).expect("one job");
    assert_eq!(loaded.job.name, "digits");
    assert_eq!(loaded.notes, [] as [String; 0]);
}

#[test]
fn what_runs_have_left_is_not_searched() {
    let folder = folder();
    run_folder(&folder.path().join("runs/digits-1"));
    put(folder.path(), "runs/digits-1/metrics.jsonl", "{}\n");
    let out = folder.path().join("out");
    run_folder(&out);
    put(&out, "metrics.jsonl", "{}\n");
    // Of a run that ended before it had metrics.
    let early = folder.path().join("deep/early");
    run_folder(&early);
    put(&early, ".lock", "1\n");
    fs::create_dir(early.join("logs")).expect("made");
    load_at(folder.path()).expect("one job");
    // Given by name, it is told what it is.
    let error = load_at(&out).expect_err("no folder of job files");
    assert!(
        error.contains("a run left") && error.contains("--resume"),
        "{error}"
    );
}

#[test]
fn a_folder_with_a_job_of_its_own_is_searched_whatever_else_is_in_it() {
    let folder = TempDir::new().expect("a folder");
    put(folder.path(), "mine/job.json", job().to_string());
    put(folder.path(), "mine/metrics.jsonl", "of another program\n");
    load_at(folder.path()).expect("one job");
    // What is asked for by name is read, hidden or not.
    let hidden = TempDir::with_prefix(".hidden").expect("a folder");
    put(hidden.path(), "job.json", job().to_string());
    load_at(hidden.path()).expect("one job");
}

#[test]
fn links_that_lead_back_and_pipes_hold_nobody_up() {
    let folder = folder();
    std::os::unix::fs::symlink(folder.path(), folder.path().join("back")).expect("a link");
    std::os::unix::fs::symlink("self.json", folder.path().join("self.json")).expect("a link");
    let pipe = folder.path().join("pipe.json");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let loaded = load_at(folder.path()).expect("one job");
    for name in ["self.json", "pipe.json"] {
        assert!(
            loaded
                .notes
                .iter()
                .any(|note| note.contains(name) && note.contains("no regular file")),
            "{:?}",
            loaded.notes
        );
    }
    let error = load_at(&pipe).expect_err("no file");
    assert!(error.contains("named pipe"), "{error}");
}

#[test]
fn a_job_with_a_byte_order_mark_is_a_job_and_one_in_utf_16_is_named() {
    let folder = TempDir::new().expect("a folder");
    let text = job().to_string();
    put(folder.path(), "bom.json", format!("\u{feff}{text}\r\n"));
    assert_eq!(
        load_at(&folder.path().join("bom.json")).expect("a job").job,
        spec(&job())
    );
    let utf_16: Vec<u8> = [0xfeff]
        .into_iter()
        .chain(text.encode_utf16())
        .flat_map(u16::to_le_bytes)
        .collect();
    put(folder.path(), "utf16.json", utf_16);
    let error = load_at(&folder.path().join("utf16.json")).expect_err("no UTF-8");
    assert!(
        error.contains("utf16.json: UTF-16 text; expected JSON in UTF-8"),
        "{error}"
    );
}

#[test]
fn whole_numbers_with_a_point_are_whole_numbers() {
    let with_points = with(
        job(),
        &[
            ("/hyperparameters", json!({ "rounds": 2.0, "batchSize": 1e1 })),
            ("/roles/2/replica", json!(2.0)),
            ("/maxRunTime", json!(6e1)),
            (
                "/lifl",
                json!({ "seed": 7.0, "model": { "mlp": { "hidden": 3.0 } } }),
            ),
            ("/selector", json!({ "sort": "random", "kwargs": { "k": 1.0 } })),
        ],
    );
    let without = with(
        job(),
        &[
            ("/hyperparameters", json!({ "rounds": 2, "batchSize": 10 })),
            ("/maxRunTime", json!(60)),
            ("/lifl", json!({ "seed": 7, "model": { "mlp": { "hidden": 3 } } })),
            ("/selector", json!({ "sort": "random", "kwargs": { "k": 1 } })),
        ],
    );
    assert_eq!(spec(&with_points), spec(&without));
    assert_problems(
        with(
            job(),
            &[("/hyperparameters", json!({ "rounds": 1.5, "batchSize": -1.0 }))],
        ),
        &[
            "hyperparameters.batchSize: -1; expected a whole number from 1 to 4294967295",
            "hyperparameters.rounds: 1.5; expected a whole number from 1 to 4294967295",
        ],
    );
}

#[test]
fn tags_of_flames_other_modes_are_not_supported_rather_than_unknown() {
    assert_problems(
        with(
            job(),
            &[
                ("/channels/1/funcTags/trainer", json!(["fetch", "ring_allreduce"])),
                ("/channels/0/funcTags/leaf", json!(["fetch", "uplaod"])),
            ],
        ),
        &[
            "channels[0].funcTags.leaf[1]: unknown name \"uplaod\"; did you mean upload?",
            "channels[1].funcTags.trainer[1]: tag ring_allreduce is not supported yet; supported: distribute, aggregate, \
             fetch, upload, coordinate, coordinateWithTopAgg, coordinateWithMidAgg, coordinateWithLeafAgg or \
             coordinateWithTrainer",
        ],
    );
}

#[test]
fn what_is_said_of_a_url_has_no_secret_in_it() {
    let url = "http://bob:hunter2@data.example/mnist.npz?token=t0ken";
    let file = with(job(), &[("/dataset", json!(url))]);
    let job = spec(&file);
    assert_eq!(job.data.as_ref().map(|data| data.dataset.reveal()), Some(url));
    let mut said = vec![serde_json::to_string(&job).expect("JSON"), format!("{job:?}")];
    for wrong in [
        with(job_of("s3://id:hunter2@bucket/mnist?token=t0ken"), &[]),
        with(job_of("builtin:digits"), &[("/datset", json!(url))]),
        with(job_of("builtin:digits"), &[("/baseModel", json!({ "nam": url }))]),
    ] {
        said.extend(problems(&[wrong]));
    }
    for said in said {
        assert!(!said.contains("hunter2") && !said.contains("t0ken"), "{said}");
    }
}

fn job_of(dataset: &str) -> Value {
    with(job(), &[("/dataset", json!(dataset))])
}

#[test]
fn times_that_no_clock_can_count_are_refused() {
    let lifl = json!({ "roundTimeout": 1e300, "graceTime": 1e20 });
    assert_problems(
        with(job(), &[("/lifl", lifl), ("/maxRunTime", json!(u64::MAX))]),
        &[
            "lifl.graceTime: 1e+20; expected a number above 0, at most 1000000000",
            "lifl.roundTimeout: 1e+300; expected a number above 0, at most 1000000000",
            "maxRunTime: 18446744073709551615; expected a whole number from 1 to 1000000000",
        ],
    );
}
