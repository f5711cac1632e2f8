//! Labelled images in memory.

use lifl_common::config::SampleShape;

/// Pixels across, and down, an image of MNIST's size.
pub const SIDE: usize = 28;

/// Pixels in such an image.
pub const PIXELS: usize = SIDE * SIDE;

/// Classes that there are at least, whatever the labels: MNIST's.
pub const CLASSES: usize = 10;

/// Labelled images of one shape: one byte for each number until a batch of them is learned from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    shape: SampleShape,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Samples {
    /// Images, row after row, pixel after pixel, channel after channel, one after the other, and as many labels. The shape's
    /// classes are those that the labels need, but [`CLASSES`] at least.
    ///
    /// # Panics
    /// If there is not an image for each label; whoever read them has checked.
    pub fn new(image: SampleShape, pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        assert_eq!(
            pixels.len(),
            labels.len() * image.pixels(),
            "as many images as labels"
        );
        let most = labels.iter().max().map_or(0, |&label| u32::from(label) + 1);
        let shape = SampleShape {
            classes: most.max(CLASSES as u32),
            ..image
        };
        Self {
            shape,
            pixels,
            labels,
        }
    }

    /// The images' shape, and how many classes their labels need.
    pub fn shape(&self) -> SampleShape {
        self.shape
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The numbers of a sample's pixels, 0 for black to 255 for white.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn image(&self, sample: usize) -> &[u8] {
        let each = self.shape.pixels();
        &self.pixels[sample * each..][..each]
    }

    /// The label of a sample.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn label(&self, sample: usize) -> u8 {
        self.labels[sample]
    }

    /// All labels.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// Copies of those samples, in that order; of the same shape, whatever classes are among them.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn select(&self, which: impl IntoIterator<Item = usize>) -> Self {
        let mut selected = Self {
            shape: self.shape,
            ..Self::default()
        };
        for sample in which {
            selected.pixels.extend_from_slice(self.image(sample));
            selected.labels.push(self.label(sample));
        }
        selected
    }
}
