//! What an update costs besides its data: its header is written by its maker and checked by everybody who reads it.
//!
//! `ours` is a header as [`write_header`](image::write_header) makes it; `other` says the same in another order, as another
//! library would write it. A model of one tensor, and one of 300.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lifl_common::id::Generation;
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo, image};

fn schema(tensors: usize) -> Schema {
    let tensors = (0..tensors).map(|n| TensorSpec::new(format!("layer{n}.weight"), DType::F32, [16, 4]));
    Schema::new(tensors.collect()).expect("a schema")
}

fn metadata() -> Metadata {
    Metadata {
        maker: "trainer-1".to_owned(),
        round: 12,
        generation: Generation(12),
        info: UpdateInfo {
            samples: 600,
            cover: Cover::of(37),
            loss: Some(0.812_345_678),
            folded: 0,
            bytes_copied: 0,
            made: vec![1_234_567_890],
        },
    }
}

/// The image with its header's fields in reverse.
fn reversed(image: &[u8], offset: usize) -> Vec<u8> {
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&image[8..offset]).expect("JSON");
    let fields: Vec<String> = header
        .iter()
        .rev()
        .map(|(key, value)| format!("{key:?}:{value}"))
        .collect();
    let text = format!("{{{}}}", fields.join(","));
    let mut other = image.to_vec();
    other[8..offset].fill(b' ');
    other[8..][..text.len()].copy_from_slice(text.as_bytes());
    other
}

fn all(criterion: &mut Criterion) {
    let metadata = metadata();
    let mut group = criterion.benchmark_group("image");
    for tensors in [1, 300] {
        let schema = schema(tensors);
        let mut image = vec![0; image::image_bytes(&schema)];
        group.bench_function(BenchmarkId::new("write_header", tensors), |b| {
            b.iter(|| image::write_header(black_box(&mut image), &schema, &metadata));
        });
        let other = reversed(&image, image::data_offset(&schema));
        for (name, image) in [("check/ours", &image), ("check/other", &other)] {
            group.bench_function(BenchmarkId::new(name, tensors), |b| {
                b.iter(|| image::check(black_box(image), &schema).expect("an image"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, all);
criterion_main!(benches);
