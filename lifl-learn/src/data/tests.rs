//! Tests of [`open`](super::open) and [`prepare`](super::prepare).

use std::fs;

use super::idx::tests::pair_of;
use super::*;

fn source(dataset: &str) -> DataSource {
    DataSource {
        dataset: dataset.into(),
        sha256: None,
        train_samples: None,
        test_samples: None,
        partition: Partition::Iid,
    }
}

#[cfg(not(feature = "download"))]
#[test]
fn a_url_is_refused_where_downloads_are_not_built_in() {
    let source = source("https://example.org/mnist.npz");
    assert!(is_here(&source));
    let error = open(&source, 1).expect_err("no download").to_string();
    assert!(
        error.contains("feature download") && error.contains("--data"),
        "{error}"
    );
}

#[test]
fn one_lot_is_divided_four_to_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let (images, labels) = pair_of(50);
    fs::write(folder.path().join("t10k-images-idx3-ubyte"), images).expect("a file");
    fs::write(folder.path().join("t10k-labels-idx1-ubyte"), labels).expect("a file");
    let mut source = source(folder.path().to_str().expect("a path"));
    let whole = prepare(&source, 4, &Progress::default()).expect("samples");
    assert_eq!(
        whole,
        Prepared {
            train_samples: 40,
            test_samples: 10,
            shape: SampleShape::default(),
        }
    );
    let test = open(&source, 1).expect("samples").test();
    assert_eq!(
        (test.label(0), test.image(0)[0]),
        (0, ((40 * PIXELS) % 251) as u8)
    );

    (source.train_samples, source.test_samples) = (Some(20), Some(15));
    let part = prepare(&source, 20, &Progress::default()).expect("samples");
    assert_eq!(
        part,
        Prepared {
            train_samples: 20,
            test_samples: 15,
            shape: SampleShape::default(),
        }
    );
    assert!(matches!(
        prepare(&source, 21, &Progress::default()),
        Err(DataError::TooManyTrainers {
            samples: 20,
            trainers: 21
        })
    ));

    source.train_samples = Some(36);
    assert!(matches!(
        prepare(&source, 1, &Progress::default()),
        Err(DataError::TooFew {
            part: "training",
            asked: 36,
            have: 35
        })
    ));
    source.test_samples = Some(50);
    assert!(matches!(
        prepare(&source, 1, &Progress::default()),
        Err(DataError::TooFew {
            part: "test",
            asked: 50,
            have: 49
        })
    ));
}

#[test]
fn what_is_asked_too_much_is_named_as_in_the_job_file() {
    let too_few = |part| DataError::TooFew {
        part,
        asked: 2,
        have: 1,
    };
    assert!(too_few("test").to_string().contains("lifl.testSamples"));
    assert!(too_few("training").to_string().contains("lifl.trainSamples"));
    let shards = partition::check(Partition::Shards { per_trainer: 3 }, 4, 2);
    assert!(
        shards
            .expect_err("too many")
            .to_string()
            .contains("lifl.partition")
    );
}

#[test]
fn shares_of_generated_digits_are_the_whole_set() {
    let source = DataSource {
        train_samples: Some(60),
        test_samples: Some(30),
        ..source(BUILTIN_DIGITS)
    };
    let opened = open(&source, 5).expect("digits");
    let shares: Vec<Samples> = (0..3)
        .map(|share| opened.train_share(share, 3).expect("a share"))
        .collect();
    let mut images: Vec<&[u8]> = shares
        .iter()
        .flat_map(|s| (0..s.len()).map(|i| s.image(i)))
        .collect();
    let one = opened.train_share(0, 1).expect("all");
    let mut all: Vec<&[u8]> = (0..one.len()).map(|i| one.image(i)).collect();
    images.sort_unstable();
    all.sort_unstable();
    assert_eq!(images, all);
    assert_eq!(opened.test().len(), 30);
    assert!(matches!(
        opened.train_share(3, 3),
        Err(DataError::NoSuchShare {
            share: 3,
            trainers: 3
        })
    ));
}

#[test]
fn what_is_not_there_is_named() {
    let error = prepare(&source("no/such/folder"), 1, &Progress::default())
        .expect_err("nothing there")
        .to_string();
    assert!(
        error.contains("no/such/folder") && error.contains("builtin:digits"),
        "{error}"
    );
    let many = DataSource {
        train_samples: Some(u64::MAX),
        ..source(BUILTIN_DIGITS)
    };
    assert!(matches!(
        prepare(&many, 1, &Progress::default()),
        Err(DataError::TooFew { .. })
    ));
}
