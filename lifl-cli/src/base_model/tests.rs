//! What can stand where a base model should, and what is said of it.

use std::collections::HashMap;
use std::fs;

use lifl_common::update::TensorSpec;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;

/// The job's model: a kernel of 3 × 2 and a bias.
fn schema() -> Schema {
    Schema::new(vec![
        TensorSpec::new("dense.kernel", DType::F32, [3, 2]),
        TensorSpec::new("dense.bias", DType::F32, [2]),
    ])
    .expect("a schema")
}

/// A tensor of a file: its name, type, shape and bytes.
type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A safetensors file of those tensors, written by safetensors.
fn file(tensors: &[Tensor<'_>]) -> Vec<u8> {
    let views: HashMap<&str, TensorView<'_>> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            (
                *name,
                TensorView::new(*dtype, shape.to_vec(), bytes).expect("a tensor"),
            )
        })
        .collect();
    safetensors::serialize(views, None).expect("a file")
}

/// The job's tensors, with something before each name.
fn sound(prefix: &str) -> Vec<u8> {
    let (kernel, bias) = (format!("{prefix}dense.kernel"), format!("{prefix}dense.bias"));
    file(&[
        (&kernel, Dtype::F32, &[3, 2], floats(&[1.0; 6])),
        (&bias, Dtype::F32, &[2], floats(&[0.0; 2])),
    ])
}

/// A file with that header and data.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// What is said of a file of that name.
fn said(name: &str, bytes: &[u8]) -> String {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("written");
    let error = check(&path, &schema()).expect_err("no base model");
    let text = format!("{:#}", anyhow::Error::from(error));
    for always in [name, "baseModel", "safetensors file"] {
        assert!(text.contains(always), "no {always} in: {text}");
    }
    assert!(!text.contains('\n'), "{text}");
    text
}

#[track_caller]
fn says(name: &str, bytes: &[u8], what: &[&str]) {
    let text = said(name, bytes);
    for what in what {
        assert!(text.contains(what), "no {what:?} in: {text}");
    }
}

#[test]
fn a_sound_file_is_taken_whatever_its_order_and_metadata() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("m");
    let header = r#"{"__metadata__":{"format":"pt"},"dense.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"dense.kernel":{"dtype":"F32","shape":[3,2],"data_offsets":[8,32]}}    "#;
    for bytes in [sound(""), raw(header, &[0; 32])] {
        fs::write(&path, bytes).expect("written");
        check(&path, &schema()).expect("a base model");
    }
}

#[test]
fn what_is_not_there_or_no_file_is_told_with_the_remedy() {
    let folder = TempDir::new().expect("a folder");
    let said = |path: &Path| {
        let error = check(path, &schema()).expect_err("no base model");
        format!("{:#}", anyhow::Error::from(error))
    };
    let none = said(&folder.path().join("none"));
    assert!(
        none.contains("cannot read this baseModel") && none.contains("give its path"),
        "{none}"
    );
    let url = said(Path::new("https://bob:hunter2@example.org/m.safetensors"));
    assert!(
        url.contains("download it first") && !url.contains("hunter2"),
        "{url}"
    );
    assert!(said(folder.path()).contains("a folder"));
    fs::write(folder.path().join("model.safetensors"), sound("")).expect("written");
    let run = said(folder.path());
    assert!(run.contains("/model.safetensors"), "{run}");
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    assert!(said(&pipe).contains("a pipe"));
    assert!(said(Path::new("/dev/zero")).contains("a device"));
}

#[test]
fn other_formats_are_called_by_their_names() {
    let zip = |name: &str| {
        let mut start = b"PK\x03\x04".to_vec();
        start.resize(26, 0);
        start.extend((name.len() as u16).to_le_bytes());
        start.extend([0, 0]);
        start.extend(name.bytes());
        start
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4\n";
    says("m.safetensors", pointer, &["Git LFS pointer", "git lfs pull"]);
    says(
        "m.safetensors",
        b"<!DOCTYPE html><html><body>Sign in",
        &["HTML", "login"],
    );
    says("m.safetensors", b"<html>", &["HTML"]);
    says("m.safetensors", b"", &["an empty file", "again"]);
    says(
        "m.safetensors",
        b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
        &["gzip", "gunzip"],
    );
    says(
        "m.pt",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        &["PyTorch file (a pickle)", "weights_only=True"],
    );
    says("m.bin", &zip("archive/data.pkl"), &["PyTorch", "save_file"]);
    says("m.npz", &zip("dense.npy"), &[".npz", "numpy.load"]);
    says("m.keras", &zip("metadata.json"), &["Keras", "save_file"]);
    says("m.h5", b"\x89HDF\r\n\x1a\n\0\0\0\0", &["HDF5", "Keras"]);
    says("m.gguf", b"GGUF\x03\0\0\0\0\0\0\0", &["GGUF"]);
    says("m.onnx", b"\x08\x07\x12\x07pytorch", &["ONNX"]);
    let index = br#"{"metadata":{"total_size":1},"weight_map":{"a":"model-00001-of-00002.safetensors"}}"#;
    says(
        "model.safetensors.index.json",
        index,
        &["in several files", "merge"],
    );
    says(
        "checkpoint-3.json",
        br#"{"version": 1}"#,
        &["checkpoint", "model-"],
    );
    says("m", &[7; 100], &["begins with the bytes [07"]);
}

#[test]
fn a_file_that_is_not_whole_says_how_long_it_should_be() {
    let whole = sound("");
    for keep in 1..whole.len() {
        said("m", &whole[..keep]);
    }
    let length = whole.len();
    says(
        "m",
        &whole[..length - 1],
        &["cut off", &length.to_string(), &(length - 1).to_string()],
    );
    says("m", &whole[..20], &["cut off"]);
    says(
        "m",
        &[&whole[..], b"x"].concat(),
        &["1 bytes behind its last tensor"],
    );
    says("m", &raw("{", b""), &["header is not safetensors'"]);
    let huge = [&u64::MAX.to_le_bytes()[..], b"{\"a\""].concat();
    says("m", &huge, &["18446744073709551615 bytes"]);
}

#[test]
fn a_header_that_contradicts_itself_is_told() {
    let tensor = |name: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":[2],"data_offsets":[{from},{to}]}}"#)
    };
    let header = |tensors: &[String]| raw(&format!("{{{}}}", tensors.join(",")), &[0; 16]);
    says(
        "m",
        &header(&[tensor("a", 0, 8), tensor("a", 8, 16)]),
        &["a twice"],
    );
    says(
        "m",
        &header(&[tensor("a", 0, 8), tensor("b", 4, 12)]),
        &["b overlaps"],
    );
    says("m", &header(&[tensor("a", 0, 8), tensor("b", 12, 20)]), &["hole"]);
    says("m", &header(&[tensor("a", 8, 0)]), &["bytes 8 to 0"]);
    says("m", &header(&[tensor("a", 0, 12)]), &["bytes 0 to 12"]);
    let large = r#"{"a":{"dtype":"F32","shape":[9223372036854775808,4],"data_offsets":[0,8]}}"#;
    says("m", &raw(large, &[0; 8]), &["tensor a"]);
    says("m", &raw("[1]", b""), &["begins with the bytes"]);
}

#[test]
fn other_tensors_than_the_jobs_are_listed_shortly() {
    says(
        "m",
        &sound("_orig_mod."),
        &["_orig_mod.", "torch.compile", "rename"],
    );
    says("m", &sound("module."), &["module.", "DataParallel"]);
    says("m", &sound("model."), &["model."]);
    says("m", &sound("module._orig_mod."), &["_orig_mod.", "and module."]);
    says("m", &sound("_fsdp_wrapped_module."), &["FSDP"]);
    says(
        "m",
        &sound("vision.tower."),
        &["it lacks", "it also has vision.tower.dense.bias"],
    );
    says("m", &sound("vision."), &["All its names begin with vision."]);
    let kernel = |dtype, shape: &'static [usize], bytes| -> Vec<u8> {
        file(&[
            ("dense.kernel", dtype, shape, bytes),
            ("dense.bias", Dtype::F32, &[2], floats(&[0.0; 2])),
        ])
    };
    says(
        "m",
        &kernel(Dtype::F32, &[2, 3], floats(&[0.0; 6])),
        &["dense.kernel is [2, 3] and not [3, 2]", "transposed"],
    );
    says(
        "m",
        &kernel(Dtype::F32, &[6], floats(&[0.0; 6])),
        &["is [6] and not [3, 2]", "lifl.model"],
    );
    says(
        "m",
        &kernel(Dtype::BF16, &[3, 2], vec![0; 12]),
        &["is BF16 and not F32", "Convert them to F32"],
    );
    says(
        "m",
        &kernel(Dtype::F64, &[3, 2], vec![0; 48]),
        &["is F64 and not F32"],
    );
    says(
        "m",
        &kernel(Dtype::I32, &[3, 2], vec![0; 24]),
        &["is I32 and not F32"],
    );
    let names: Vec<String> = (0..50).map(|n| format!("layer.{n}")).collect();
    let many: Vec<Tensor<'_>> = names
        .iter()
        .map(|name| (name.as_str(), Dtype::F32, &[1][..], floats(&[0.0])))
        .collect();
    says(
        "m",
        &file(&many),
        &["it lacks dense.bias, dense.kernel", "and 47 more"],
    );
    let state = file(&[
        ("m.dense.bias", Dtype::F32, &[2], floats(&[0.0; 2])),
        ("v.dense.bias", Dtype::F32, &[2], floats(&[0.0; 2])),
    ]);
    says(
        "state-3.safetensors",
        &state,
        &["state of a run's optimizer", "model-"],
    );
    says("m", &raw("{}", b""), &["it lacks"]);
}

#[test]
fn numbers_that_are_none_are_counted_by_tensor() {
    let kernel = |values: &[f32]| {
        file(&[
            ("dense.kernel", Dtype::F32, &[3, 2], floats(values)),
            (
                "dense.bias",
                Dtype::F32,
                &[2],
                floats(&[f32::MAX, f32::MIN_POSITIVE]),
            ),
        ])
    };
    says(
        "m",
        &kernel(&[0.0, f32::NAN, f32::NEG_INFINITY, f32::NAN, 0.0, 0.0]),
        &["dense.kernel has 2 NaN and 1 infinities, the first at element 1"],
    );
    says(
        "m",
        &kernel(&[0.0, 0.0, 0.0, 0.0, 0.0, f32::INFINITY]),
        &["the first at element 5"],
    );
    for (dtype, bytes) in [
        (DType::F64, f64::NAN.to_le_bytes().to_vec()),
        (DType::F16, f16::INFINITY.to_le_bytes().to_vec()),
        (DType::BF16, bf16::NAN.to_le_bytes().to_vec()),
    ] {
        assert_eq!(not_finite(dtype, &bytes).2, Some(0), "{dtype}");
        assert_eq!(not_finite(dtype, &vec![0; bytes.len()]), (0, 0, None), "{dtype}");
    }
}
