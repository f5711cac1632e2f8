//! A model that is only so many parameters: for measuring what moves models, without the cost of learning.
//!
//! A round adds a little noise to every parameter, a function of seed, share, round and the parameter's place. It
//! goes from the model's bytes straight into the update's at the memory's speed: nothing is copied.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lifl_common::update::{DType, Schema, TensorSpec, Tensors, TensorsMut};
use pulp::{Arch, NullaryFnOnce};
use rand::RngCore;
use rayon::prelude::*;
use zerocopy::little_endian::{F32, F64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{LearnError, Learner, Trained};
use lifl_common::random::{Stream, stream};

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

    fn train(
        &mut self,
        round: u32,
        model: Tensors<'_>,
        mut weights: TensorsMut<'_>,
    ) -> anyhow::Result<Trained> {
        let key = stream(self.seed, Stream::Noise, self.share, round.into()).next_u64();
        let noise = Noise {
            key,
            bound: NOISE_BOUND,
        };
        for region in self.schema.regions() {
            let model = &model.data()[region.range.clone()];
            let model_piece = |at: usize, len: usize| &model[at..at + len];
            write(
                region.dtype,
                model_piece,
                &mut weights.data()[region.range],
                noise,
            );
        }
        Ok(Trained {
            samples: samples(self.share),
            loss: None,
            bytes_copied: 0,
        })
    }
}

/// What a trainer's update weighs: unequal, so that whoever weighs wrongly is seen to.
pub(super) fn samples(share: u32) -> u64 {
    100 + u64::from(share)
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
        let noise = Noise {
            key,
            bound: INITIAL_BOUND,
        };
        write(
            region.dtype,
            |_, len| &zeros[..len],
            &mut weights.data()[region.range],
            noise,
        );
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
        let mut z = self
            .key
            .wrapping_add((piece as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        PieceNoise {
            key: (z ^ (z >> 31)) as u32,
            bound: self.bound,
        }
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
        // A Weyl sequence, and half of MurmurHash3's finalizer: it ends with a multiplication, which mixes into the upper
        // bits, and those are what a float keeps.
        let h = i.wrapping_mul(0x9e37_79b1).wrapping_add(self.key);
        let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
        h as i32 as f32 * (self.bound / (1_u32 << 31) as f32)
    }
}

/// Writes `out`, elements of type `dtype`: what `input` gives for a piece's place and length in bytes, plus noise.
fn write<'a>(dtype: DType, input: impl Fn(usize, usize) -> &'a [u8] + Sync, out: &mut [u8], noise: Noise) {
    let arch = Arch::new();
    let one = |(piece, out): (usize, &mut [u8])| {
        let input = input(piece * PIECE_BYTES, out.len());
        arch.dispatch(Piece {
            dtype,
            input,
            out,
            noise: noise.piece(piece),
        });
    };
    if out.len() <= PIECE_BYTES {
        return out.chunks_mut(PIECE_BYTES).enumerate().for_each(one);
    }
    out.par_chunks_mut(PIECE_BYTES).enumerate().for_each(one);
}

/// Whether a model is made by whoever asks for it, and not by several threads.
pub(super) fn is_one_piece(parameters: u64, dtype: DType) -> bool {
    parameters <= (PIECE_BYTES / dtype.bytes()) as u64
}

/// One thread's work, compiled for each vector width that the machine may have.
struct Piece<'a> {
    dtype: DType,
    input: &'a [u8],
    out: &'a mut [u8],
    noise: PieceNoise,
}

impl NullaryFnOnce for Piece<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            dtype,
            input,
            out,
            noise,
        } = self;
        match dtype {
            DType::F64 => each::<F64>(input, out, |i, x| F64::new(x.get() + f64::from(noise.at(i)))),
            DType::F32 => each::<F32>(input, out, |i, x| F32::new(x.get() + noise.at(i))),
            DType::F16 => widened(f16::ZERO, input, out, noise),
            DType::BF16 => widened(bf16::ZERO, input, out, noise),
            _ => unreachable!("the schema is of floats"),
        }
    }
}

/// Writes `f` of each element's number and value.
#[inline(always)]
fn each<T>(input: &[u8], out: &mut [u8], f: impl Fn(u32, &T) -> T)
where
    T: FromBytes + IntoBytes + Immutable + KnownLayout,
{
    // These types have no alignment, and a piece is a whole number of them.
    if let (Ok(input), Ok(out)) = (<[T]>::ref_from_bytes(input), <[T]>::mut_from_bytes(out)) {
        for (i, (out, input)) in out.iter_mut().zip(input).enumerate() {
            *out = f(i as u32, input);
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
        narrow
            .reinterpret_cast_mut()
            .as_mut_bytes()
            .copy_from_slice(input);
        narrow.convert_to_f32_slice(wide);
        for (i, x) in wide.iter_mut().enumerate() {
            *x += noise.at(start + i as u32);
        }
        narrow.convert_from_f32_slice(wide);
        out.copy_from_slice(narrow.reinterpret_cast().as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of a tensor of that type.
    fn values(dtype: DType, bytes: &[u8]) -> Vec<f64> {
        match dtype {
            DType::F64 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect(),
            DType::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b).into())
                .collect(),
            DType::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).into())
                .collect(),
            _ => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).into())
                .collect(),
        }
    }

    #[test]
    fn a_round_moves_every_parameter_a_little() {
        // Over several pieces, and no whole number of any chunk.
        const PARAMETERS: usize = 300_001;
        for (dtype, rounding) in [
            (DType::F64, 0.0),
            (DType::F32, 1e-8),
            (DType::F16, 5e-5),
            (DType::BF16, 4e-4),
        ] {
            let schema = schema(PARAMETERS as u64, dtype).expect("a schema");
            let mut model = vec![0; schema.data_bytes()];
            initial(3, TensorsMut::new(&schema, &mut model));
            let mut weights = vec![0; model.len()];
            let mut learner = SyntheticLearner::new(schema.clone(), 2, 3);
            let trained = learner
                .train(
                    1,
                    Tensors::new(&schema, &model),
                    TensorsMut::new(&schema, &mut weights),
                )
                .expect("weights");
            assert_eq!(
                trained,
                Trained {
                    samples: 102,
                    loss: None,
                    bytes_copied: 0
                }
            );

            let (old, new) = (values(dtype, &model), values(dtype, &weights));
            assert_eq!((old.len(), new.len()), (PARAMETERS, PARAMETERS));
            let bound = f64::from(INITIAL_BOUND);
            assert!(old.iter().all(|w| w.abs() <= bound * 1.01), "{dtype}");
            let spread = old.iter().map(|w| w * w).sum::<f64>() / PARAMETERS as f64;
            assert!(
                (spread / (bound * bound / 3.0) - 1.0).abs() < 0.02,
                "{dtype}: not uniform: {spread}"
            );
            let changes: Vec<f64> = old.iter().zip(&new).map(|(old, new)| new - old).collect();
            assert!(
                changes
                    .iter()
                    .all(|c| c.abs() <= f64::from(NOISE_BOUND) + rounding),
                "{dtype}"
            );
            assert!(
                changes.iter().filter(|c| **c != 0.0).count() > PARAMETERS / 2,
                "{dtype}"
            );
            let mean = changes.iter().sum::<f64>() / PARAMETERS as f64;
            assert!(mean.abs() < 2e-5, "{dtype}: mean change {mean}");
        }
    }
}
