//! `builtin:digits`: drawn digits, for trying things out where there is no dataset and no network.
//!
//! A digit is a few strokes (`glyphs`), bent, slanted, turned, moved and drawn with a pen of some width, then
//! sometimes crossed or partly covered, and made noisy. Where it lies varies so much that no single pixel tells
//! much: a linear model does clearly worse on it than a convolution network, as on real handwriting.
//!
//! Each image comes from the seed and its number alone, so that a trainer draws only its own.

mod glyphs;

use std::f32::consts::TAU;

use lifl_common::config::SampleShape;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use self::glyphs::Point;
use super::samples::{CLASSES, PIXELS, SIDE, Samples};
use lifl_common::random::{Stream, stream};

/// The labels of the first `n` images: all digits equally often.
pub(super) fn labels(n: usize) -> Vec<u8> {
    (0..n).map(label).collect()
}

/// Those training images.
pub(super) fn train(seed: u64, which: impl IntoIterator<Item = usize>) -> Samples {
    draw_all(seed, Stream::TrainDigit, which)
}

/// The first `n` test images.
pub(super) fn test(seed: u64, n: usize) -> Samples {
    draw_all(seed, Stream::TestDigit, 0..n)
}

fn label(sample: usize) -> u8 {
    (sample % CLASSES) as u8
}

fn draw_all(seed: u64, of: Stream, which: impl IntoIterator<Item = usize>) -> Samples {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for sample in which {
        let mut random = stream(seed, of, 0, sample as u64);
        pixels.extend(draw(label(sample), &mut random));
        labels.push(label(sample));
    }
    Samples::new(SampleShape::default(), pixels, labels)
}

/// One image of a digit.
fn draw(digit: u8, random: &mut ChaCha8Rng) -> [u8; PIXELS] {
    let warp = Warp::draw(random);
    let mut ink = Ink::new(random.random_range(1.4..2.8));
    for stroke in glyphs::strokes(digit, random) {
        let stroke: Vec<Point> = stroke.into_iter().map(|point| warp.apply(point)).collect();
        ink.stroke(&stroke);
    }
    if random.random_bool(0.2) {
        // A stray stroke.
        let from = [random.random_range(0.0..27.0), random.random_range(0.0..27.0)];
        let (angle, length) = (random.random_range(0.0..TAU), random.random_range(4.0..10.0_f32));
        ink.stroke(&[
            from,
            [from[0] + length * angle.cos(), from[1] + length * angle.sin()],
        ]);
    }
    let contrast = random.random_range(160.0..255.0);
    let mut image = ink.grey().map(|ink| ink * contrast);
    if random.random_bool(0.15) {
        cover(&mut image, random);
    }
    let noise = random.random_range(5.0..40.0);
    image.map(|grey| (grey + random.random_range(-noise..noise)).clamp(0.0, 255.0) as u8)
}

/// Blanks a bar across a part of the image.
fn cover(image: &mut [f32; PIXELS], random: &mut ChaCha8Rng) {
    let (width, height) = (random.random_range(3..8), random.random_range(3..8));
    let (left, top) = (
        random.random_range(4..SIDE - 4 - width),
        random.random_range(4..SIDE - 4 - height),
    );
    for row in image.chunks_exact_mut(SIDE).skip(top).take(height) {
        row[left..left + width].fill(0.0);
    }
}

/// How a glyph in the unit square comes to lie in the image.
struct Warp {
    /// Rows of the linear map, to pixels.
    map: [[f32; 2]; 2],
    center: Point,
    /// A sine wave along each axis, of that height, frequency and phase.
    waves: [[f32; 3]; 2],
}

impl Warp {
    fn draw(random: &mut ChaCha8Rng) -> Self {
        let mut between = |from: f32, to: f32| random.random_range(from..to);
        let (width, height) = (between(11.0, 16.0), between(15.0, 20.0));
        let (turn, slant) = (between(-0.25, 0.25_f32), between(-0.3, 0.3));
        let (sin, cos) = turn.sin_cos();
        Self {
            map: [
                [width * cos, height * (slant * cos - sin)],
                [width * sin, height * (slant * sin + cos)],
            ],
            center: [13.5 + between(-2.0, 2.0), 13.5 + between(-2.0, 2.0)],
            waves: [0; 2].map(|_| [between(0.0, 0.05), between(0.5, 1.5), between(0.0, 1.0)]),
        }
    }

    fn apply(&self, [x, y]: Point) -> Point {
        let wave =
            |[height, frequency, phase]: [f32; 3], at: f32| height * (TAU * (frequency * at + phase)).sin();
        let (x, y) = (x - 0.5 + wave(self.waves[0], y), y - 0.5 + wave(self.waves[1], x));
        let row = |[a, b]: [f32; 2]| a * x + b * y;
        [
            self.center[0] + row(self.map[0]),
            self.center[1] + row(self.map[1]),
        ]
    }
}

/// An image as the distance of each pixel to the nearest stroke.
struct Ink {
    squared_distances: [f32; PIXELS],
    /// Half the pen's width, in pixels.
    radius: f32,
}

impl Ink {
    fn new(width: f32) -> Self {
        Self {
            squared_distances: [f32::INFINITY; PIXELS],
            radius: width / 2.0,
        }
    }

    /// Draws lines from point to point.
    fn stroke(&mut self, points: &[Point]) {
        for pair in points.windows(2) {
            self.line(pair[0], pair[1]);
        }
    }

    fn line(&mut self, [ax, ay]: Point, [bx, by]: Point) {
        // Pixels further away than this stay blank.
        let reach = self.radius + 1.0;
        let pixels = |a: f32, b: f32| {
            let from = (a.min(b) - reach).max(0.0) as usize;
            let to = (a.max(b) + reach + 1.0).clamp(0.0, SIDE as f32) as usize;
            from.min(SIDE)..to
        };
        let (dx, dy) = (bx - ax, by - ay);
        let squared_length = (dx * dx + dy * dy).max(f32::MIN_POSITIVE);
        for y in pixels(ay, by) {
            for x in pixels(ax, bx) {
                let (px, py) = (x as f32 - ax, y as f32 - ay);
                let along = ((px * dx + py * dy) / squared_length).clamp(0.0, 1.0);
                let (ex, ey) = (px - along * dx, py - along * dy);
                let nearest = &mut self.squared_distances[y * SIDE + x];
                *nearest = nearest.min(ex * ex + ey * ey);
            }
        }
    }

    /// How much of each pixel is ink, 0 to 1.
    fn grey(&self) -> [f32; PIXELS] {
        self.squared_distances
            .map(|squared| (self.radius + 0.5 - squared.sqrt()).clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_depends_on_seed_and_number_alone() {
        let some = train(3, [17, 4, 205]);
        let all = train(3, 0..206);
        for (i, sample) in [17, 4, 205].into_iter().enumerate() {
            assert_eq!(some.image(i), all.image(sample));
            assert_eq!(usize::from(some.label(i)), sample % 10);
        }
        assert_ne!(train(4, [17]), train(3, [17]));
        assert_ne!(test(3, 18).image(17), all.image(17));
    }

    #[test]
    fn every_image_has_ink_and_paper() {
        let samples = train(1, 0..500);
        for i in 0..samples.len() {
            let ink = samples.image(i).iter().filter(|&&pixel| pixel > 80).count();
            assert!((12..450).contains(&ink), "image {i} has {ink} dark pixels");
        }
    }
}
