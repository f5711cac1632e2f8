//! The strokes of the ten digits in the unit square, x to the right and y down.

use std::ops::Range;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// A place: x, y.
pub(super) type Point = [f32; 2];

/// How far the corners of a digit are moved.
const JITTER: f32 = 0.035;

/// Lines that an arc is drawn with.
const ARC_LINES: usize = 12;

/// A digit's strokes, each from point to point: one of the ways to write it, a little moved.
///
/// # Panics
/// If `digit` is above 9.
pub(super) fn strokes(digit: u8, random: &mut ChaCha8Rng) -> Vec<Vec<Point>> {
    let other_way = random.random_bool(0.5);
    let mut strokes = match digit {
        0 => vec![arc([0.5, 0.5], [0.4, 0.5], 0.0..360.0)],
        1 if other_way => vec![vec![[0.5, 0.0], [0.5, 1.0]]],
        1 => vec![vec![[0.25, 0.25], [0.52, 0.0], [0.52, 1.0]]],
        2 => vec![joined([
            arc([0.5, 0.28], [0.36, 0.28], 190.0..395.0),
            vec![[0.12, 1.0], [0.88, 1.0]],
        ])],
        3 => vec![
            arc([0.46, 0.25], [0.32, 0.25], 200.0..450.0),
            arc([0.46, 0.74], [0.38, 0.26], 270.0..515.0),
        ],
        4 if other_way => vec![vec![[0.66, 1.0], [0.66, 0.0], [0.1, 0.66], [0.92, 0.66]]],
        4 => vec![
            vec![[0.3, 0.0], [0.12, 0.56], [0.9, 0.56]],
            vec![[0.72, 0.1], [0.66, 1.0]],
        ],
        5 => vec![joined([
            vec![[0.84, 0.0], [0.24, 0.0], [0.2, 0.45]],
            arc([0.46, 0.69], [0.38, 0.31], 235.0..505.0),
        ])],
        6 => vec![joined([
            arc([0.75, 0.68], [0.6, 0.68], 275.0..180.0),
            arc([0.5, 0.7], [0.35, 0.3], 180.0..540.0),
        ])],
        7 if other_way => vec![vec![[0.1, 0.0], [0.88, 0.0], [0.38, 1.0]]],
        7 => vec![
            vec![[0.1, 0.0], [0.88, 0.0], [0.45, 1.0]],
            vec![[0.32, 0.52], [0.84, 0.52]],
        ],
        8 => vec![
            arc([0.5, 0.25], [0.29, 0.25], 0.0..360.0),
            arc([0.5, 0.74], [0.36, 0.26], 0.0..360.0),
        ],
        9 if other_way => vec![
            arc([0.48, 0.3], [0.33, 0.3], 0.0..360.0),
            vec![[0.81, 0.3], [0.7, 1.0]],
        ],
        9 => vec![joined([
            arc([0.48, 0.3], [0.35, 0.3], 0.0..360.0),
            arc([0.25, 0.32], [0.58, 0.68], 0.0..85.0),
        ])],
        _ => panic!("{digit} is no digit"),
    };
    for point in strokes.iter_mut().flatten() {
        for coordinate in point {
            *coordinate += random.random_range(-JITTER..JITTER);
        }
    }
    strokes
}

/// An arc of an ellipse, in degrees from the right by the bottom.
fn arc([x, y]: Point, [width, height]: Point, degrees: Range<f32>) -> Vec<Point> {
    (0..=ARC_LINES)
        .map(|i| {
            let part = i as f32 / ARC_LINES as f32;
            let (sin, cos) = (degrees.start + part * (degrees.end - degrees.start))
                .to_radians()
                .sin_cos();
            [x + width * cos, y + height * sin]
        })
        .collect()
}

/// One stroke of several parts.
fn joined<const N: usize>(parts: [Vec<Point>; N]) -> Vec<Point> {
    parts.concat()
}
