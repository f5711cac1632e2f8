//! A model that is only so many parameters: for measuring what moves models, without the cost of learning.
//!
//! A round adds a little noise to every parameter, a function of seed, share, round and the parameter's place. It
//! goes from the model's bytes straight into the update's at the memory's speed: nothing is copied.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lifl_common::update::{DType, Schema, TensorSpec, Tensors, TensorsMut};
use rand::RngCore;
use rayon::prelude::*;
use zerocopy::little_endian::{F32, F64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{LearnError, Learner, Trained};
use crate::random::{Stream, stream};

/// The one tensor's name.
const NAME: &str = "parameters";

/// Half the width of a fresh model's uniform distribution.
const INITIAL_BOUND: f32 = 0.05;

/// Half the width of a round's changes.
const NOISE_BOUND: f32 = 1e-3;

/// Bytes that one thread writes at a time. Noise depends on the place in a piece and the piece's number, so any
/// number of threads writes the same.
const PIECE_BYTES: usize = 256 * 1024;

/// Elements that 16-bit types are widened by at a time; they stay in the first-level cache.
const WIDENED: usize = 1024;

/// A trainer that has no samples.
pub(super) struct SyntheticLearner {
    schema: Schema,
    share: u32,
    seed: u64,
}

impl SyntheticLearner {
    pub(super) fn new(schema: Schema, share: u32, seed: u64) -> Self {
        Self { schema, share, seed }
    }
}

impl Learner for SyntheticLearner {
    fn schema(&self) -> &Schema {
        &self.schema
    }

    fn initial(&self, seed: u64, model: TensorsMut<'_>) {
        initial(seed, model);
    }

    fn train(&mut self, round: u32, model: Tensors<'_>, mut weights: TensorsMut<'_>) -> anyhow::Result<Trained> {
        let key = stream(self.seed, Stream::Noise, self.share, round.into()).next_u64();
        let noise = Noise { key, bound: NOISE_BOUND };
        for region in self.schema.regions() {
            let model = &model.data()[region.range.clone()];
            let model_piece = |at: usize, len: usize| &model[at..at + len];
            write(region.dtype, model_piece, &mut weights.data()[region.range], noise);
        }
        // Unequal, so that whoever weighs wrongly is seen to.
        Ok(Trained { samples: 100 + u64::from(self.share), loss: None, bytes_copied: 0 })
    }
}

/// So many parameters of that type.
pub(super) fn schema(parameters: u64, dtype: DType) -> Result<Schema, LearnError> {
    if !dtype.is_float() {
        return Err(LearnError::NotFloat(dtype));
    }
    // What does not fit the address space is far beyond what a schema takes.
    let elements = usize::try_from(parameters).unwrap_or(usize::MAX);
    Ok(Schema::new(vec![TensorSpec::new(NAME, dtype, [elements])])?)
}

/// Writes a fresh model.
pub(super) fn initial(seed: u64, mut weights: TensorsMut<'_>) {
    let key = stream(seed, Stream::Initial, 0, 0).next_u64();
    let zeros = vec![0; PIECE_BYTES];
    for region in weights.schema().regions() {
        let noise = Noise { key, bound: INITIAL_BOUND };
        write(region.dtype, |_, len| &zeros[..len], &mut weights.data()[region.range], noise);
    }
}

/// Pseudo-random numbers by place.
#[derive(Clone, Copy)]
struct Noise {
    key: u64,
    bound: f32,
}

impl Noise {
    /// The noise of that piece.
    fn piece(self, piece: usize) -> PieceNoise {
        // SplitMix64's finalizer (Steele, Lea, Flood 2014).
        let mut z = self.key.wrapping_add((piece as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        PieceNoise { key: (z ^ (z >> 31)) as u32, bound: self.bound }
    }
}

#[derive(Clone, Copy)]
struct PieceNoise {
    key: u32,
    bound: f32,
}

impl PieceNoise {
    /// A number in ±bound for the `i`-th element of the piece.
    #[inline(always)]
    fn at(self, i: u32) -> f32 {
        // MurmurHash3's finalizer.
        let mut h = i.wrapping_mul(0x9e37_79b1) ^ self.key;
        h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
        // The upper bits as the fraction of a float in 1 to 2.
        (f32::from_bits(0x3f80_0000 | (h >> 9)) - 1.5) * (2.0 * self.bound)
    }
}

/// Writes `out`, elements of type `dtype`: what `input` gives for a piece's place and length in bytes, plus noise.
fn write<'a>(dtype: DType, input: impl Fn(usize, usize) -> &'a [u8] + Sync, out: &mut [u8], noise: Noise) {
    let arch = pulp::Arch::new();
    out.par_chunks_mut(PIECE_BYTES).enumerate().for_each(|(piece, out)| {
        let input = input(piece * PIECE_BYTES, out.len());
        let noise = noise.piece(piece);
        // Inlined here, each loop is compiled for every vector width that `arch` may find.
        arch.dispatch(#[inline(always)]
        || match dtype {
            DType::F64 => each::<F64>(input, out, |i, x| F64::new(x.get() + f64::from(noise.at(i)))),
            DType::F32 => each::<F32>(input, out, |i, x| F32::new(x.get() + noise.at(i))),
            DType::F16 => widened(f16::ZERO, input, out, noise),
            DType::BF16 => widened(bf16::ZERO, input, out, noise),
            _ => unreachable!("the schema is of floats"),
        });
    });
}

/// Writes `f` of each element's number and value.
#[inline(always)]
fn each<T>(input: &[u8], out: &mut [u8], f: impl Fn(u32, &T) -> T)
where
    T: FromBytes + IntoBytes + Immutable + KnownLayout,
{
    // These types have no alignment, and a piece is a whole number of them.
    if let (Ok(input), Ok(out)) = (<[T]>::ref_from_bytes(input), <[T]>::mut_from_bytes(out)) {
        for ((i, out), input) in (0..).zip(out).zip(input) {
            *out = f(i, input);
        }
    }
}

/// [`each`] for 16-bit floats, which are added to as 32-bit ones.
#[inline(always)]
fn widened<T: Copy>(zero: T, input: &[u8], out: &mut [u8], noise: PieceNoise)
where
    [T]: HalfFloatSliceExt,
{
    let mut narrow = [zero; WIDENED];
    let mut wide = [0_f32; WIDENED];
    let chunks = input.chunks(2 * WIDENED).zip(out.chunks_mut(2 * WIDENED));
    for (start, (input, out)) in (0..).step_by(WIDENED).zip(chunks) {
        let (narrow, wide) = (&mut narrow[..input.len() / 2], &mut wide[..input.len() / 2]);
        narrow.reinterpret_cast_mut().as_mut_bytes().copy_from_slice(input);
        narrow.convert_to_f32_slice(wide);
        for (i, x) in (start..).zip(wide.iter_mut()) {
            *x += noise.at(i);
        }
        narrow.convert_from_f32_slice(wide);
        out.copy_from_slice(narrow.reinterpret_cast().as_bytes());
    }
}
