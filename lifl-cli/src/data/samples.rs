//! Labelled images in memory.

/// Pixels across, and down, an image.
pub const SIDE: usize = 28;

/// Pixels in an image.
pub const PIXELS: usize = SIDE * SIDE;

/// Labels are below this.
pub const CLASSES: usize = 10;

/// Labelled images of 28 × 28 grey pixels: one byte a pixel until a batch of them is learned from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

impl Samples {
    /// Images, row after row, one after the other, and as many labels.
    ///
    /// # Panics
    /// If there are not 784 pixels for each label, or a label is above 9; whoever read them has checked.
    pub fn new(pixels: Vec<u8>, labels: Vec<u8>) -> Self {
        assert_eq!(pixels.len(), labels.len() * PIXELS, "as many images as labels");
        assert!(
            labels.iter().all(|&label| usize::from(label) < CLASSES),
            "labels of ten classes"
        );
        Self { pixels, labels }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The 784 pixels of a sample, 0 for black to 255 for white.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn image(&self, sample: usize) -> &[u8] {
        &self.pixels[sample * PIXELS..][..PIXELS]
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

    /// Copies of those samples, in that order.
    ///
    /// # Panics
    /// If there is no such sample.
    pub fn select(&self, which: impl IntoIterator<Item = usize>) -> Self {
        let mut selected = Self::default();
        for sample in which {
            selected.pixels.extend_from_slice(self.image(sample));
            selected.labels.push(self.label(sample));
        }
        selected
    }
}
