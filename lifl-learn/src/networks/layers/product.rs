//! Matrix products: the arithmetic of dense layers and of convolutions.
//!
//! ```text
//!   out[i, j] (+)= Σₖ left[i, k] · right[k, j]
//! ```
//!
//! Vectors lie along the columns `j`, which are neighbours in memory in `right` and `out`; an element of `left` is read alone and
//! multiplies whole vectors. So the rows of `left` may begin anywhere: a matrix, its transpose and the patches of images are all
//! read where they lie, and nothing is copied first. A tile of `out`, some rows by two vectors, is summed in registers.
//!
//! Each element of `out` is summed over `k` in order, so it is the same however the rows are divided among calls.

use std::borrow::Cow;

use pulp::{Arch, Simd, WithSimd};

/// Floats that a row of [`Right`] is a multiple of: the widest vector's.
const VECTOR: usize = 16;

/// Tiles below one another that are computed before the next columns: their rows of `left` stay in the first-level cache.
const TILES: usize = 10;

/// `count` places in memory, `step` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Steps {
    pub(super) count: usize,
    pub(super) step: usize,
}

impl Steps {
    /// Neighbours.
    pub(super) fn neighbours(count: usize) -> Self {
        Self { count, step: 1 }
    }

    /// One place.
    pub(super) const ONE: Self = Self { count: 1, step: 0 };

    fn last(self) -> usize {
        self.count.saturating_sub(1) * self.step
    }
}

/// The left factor: row `i` begins at `rows[i]` and has `runs.count · elements.count` elements, run after run.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) values: &'a [f32],
    pub(super) rows: &'a [usize],
    pub(super) runs: Steps,
    pub(super) elements: Steps,
}

/// The right factor `[k, columns]`. Its rows are whole vectors long: where they are not, they are copied, with zeros behind them.
pub(super) struct Right<'a> {
    values: Cow<'a, [f32]>,
    columns: usize,
    stride: usize,
}

impl<'a> Right<'a> {
    /// Of a matrix `[k, columns]`.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Self {
        let stride = columns.next_multiple_of(VECTOR);
        if stride == columns {
            return Self {
                values: Cow::Borrowed(values),
                columns,
                stride,
            };
        }
        let mut padded = vec![0.0; values.len() / columns * stride];
        for (to, from) in padded.chunks_exact_mut(stride).zip(values.chunks_exact(columns)) {
            to[..columns].copy_from_slice(from);
        }
        Self {
            values: Cow::Owned(padded),
            columns,
            stride,
        }
    }

    /// The transpose of a matrix `[columns, k]`.
    pub(super) fn transposed(values: &[f32], k: usize) -> Self {
        let columns = values.len() / k;
        let stride = columns.next_multiple_of(VECTOR);
        let mut transposed = vec![0.0; k * stride];
        for (column, from) in values.chunks_exact(k).enumerate() {
            for (to, value) in transposed[column..].iter_mut().step_by(stride).zip(from) {
                *to = *value;
            }
        }
        Self {
            values: Cow::Owned(transposed),
            columns,
            stride,
        }
    }
}

/// Whether a product replaces what is there or is added to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    Replace,
    Add,
}

/// Computes the product; row `i` of it begins at `rows[i]` in `out`. Rows may overlap where they are added to.
///
/// # Panics
/// If an index is outside its slice.
pub(super) fn product(left: Left<'_>, right: &Right<'_>, out: &mut [f32], rows: &[usize], store: Store) {
    assert_eq!(left.rows.len(), rows.len(), "as many rows in as out");
    let k = left.runs.count * left.elements.count;
    assert!(
        right.values.len() >= k * right.stride,
        "{k} rows of the right factor"
    );
    Arch::new().dispatch(Product {
        left,
        right,
        out,
        rows,
        store,
    });
}

struct Product<'a> {
    left: Left<'a>,
    right: &'a Right<'a>,
    out: &'a mut [f32],
    rows: &'a [usize],
    store: Store,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // As many sums as fill the registers, with room for the factors.
        if S::REGISTER_COUNT >= 32 {
            self.rows_by::<S, 12, 4>(simd);
        } else {
            self.rows_by::<S, 6, 2>(simd);
        }
    }
}

impl Product<'_> {
    /// All of it, in tiles of `M` rows; the last ones of `FEW`, so that little is computed in vain.
    #[inline(always)]
    fn rows_by<S: Simd, const M: usize, const FEW: usize>(&mut self, simd: S) {
        let mut row = 0;
        while row < self.rows.len() {
            let end = self.rows.len().min(row + TILES * M);
            let mut column = 0;
            while column < self.right.columns {
                let two = column + S::F32_LANES < self.right.columns;
                let mut at = row;
                while at < end {
                    match (end - at > M - FEW, two) {
                        (true, true) => self.tile::<S, M, 2>(simd, at, column),
                        (true, false) => self.tile::<S, M, 1>(simd, at, column),
                        (false, true) => self.tile::<S, FEW, 2>(simd, at, column),
                        (false, false) => self.tile::<S, FEW, 1>(simd, at, column),
                    }
                    at += if end - at > M - FEW { M } else { FEW };
                }
                column += (1 + usize::from(two)) * S::F32_LANES;
            }
            row = end;
        }
    }

    /// Up to `M` rows from `row` on, `V` vectors of columns from `column` on.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const V: usize>(&mut self, simd: S, row: usize, column: usize) {
        let left = self.left;
        let here = M.min(left.rows.len() - row);
        // Where there are fewer rows, the last is computed again, and not stored.
        let starts: [usize; M] = std::array::from_fn(|i| left.rows[row + i.min(here - 1)]);
        let reach = left.runs.last() + left.elements.last();
        assert!(
            starts.iter().all(|start| start + reach < left.values.len()),
            "an element of the left factor"
        );
        assert!(
            column + V * S::F32_LANES <= self.right.stride,
            "an element of the right factor"
        );
        let right = &self.right.values[column..];
        // SAFETY: the assertions have looked at the furthest elements of both factors: of the left one here, of the right one
        // here along a row, and in `product` as to how many rows there are.
        let sums = unsafe { sums::<S, M, V>(simd, self.left, starts, right, self.right.stride) };
        for (i, sums) in sums.into_iter().enumerate() {
            if i < here {
                let start = self.rows[row + i];
                let out = &mut self.out[start + column..start + self.right.columns];
                store(simd, sums, out, self.store);
            }
        }
    }
}

/// The sums over `k` of `M` rows, which begin at `starts`, and of the first `V` vectors of `right`.
///
/// Nothing in the loop can panic, or else the compiler would store every sum each time.
///
/// # Safety
/// From each of the starts, the left factor has the elements of a row. `right` has as many rows as these are, `stride` apart, of at
/// least `V` vectors.
#[inline(always)]
unsafe fn sums<S: Simd, const M: usize, const V: usize>(
    simd: S,
    left: Left<'_>,
    starts: [usize; M],
    right: &[f32],
    stride: usize,
) -> [[S::f32s; V]; M] {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let mut right = right.as_ptr();
    for run in 0..left.runs.count {
        let mut at = run * left.runs.step;
        for _ in 0..left.elements.count {
            // SAFETY: `right` is at one of the rows that there are, by the caller's word; a vector of floats may lie anywhere.
            let vectors: [S::f32s; V] = std::array::from_fn(|v| unsafe {
                right.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned()
            });
            for i in 0..M {
                // SAFETY: `at` is an element's place in a row.
                let value = simd.splat_f32s(unsafe { *left.values.get_unchecked(starts[i] + at) });
                for (sum, vector) in sums[i].iter_mut().zip(vectors) {
                    *sum = simd.mul_add_e_f32s(value, vector, *sum);
                }
            }
            at += left.elements.step;
            // Behind the last row it is not read from.
            right = right.wrapping_add(stride);
        }
    }
    sums
}

/// Stores as many of the sums as `out` has room for.
#[inline(always)]
fn store<S: Simd, const V: usize>(simd: S, sums: [S::f32s; V], out: &mut [f32], store: Store) {
    let (whole, rest) = S::as_mut_simd_f32s(out);
    for (v, sum) in sums.into_iter().enumerate() {
        if let Some(out) = whole.get_mut(v) {
            *out = match store {
                Store::Replace => sum,
                Store::Add => simd.add_f32s(*out, sum),
            };
        } else if v == whole.len() {
            let sum = match store {
                Store::Replace => sum,
                Store::Add => simd.add_f32s(simd.partial_load_f32s(rest), sum),
            };
            simd.partial_store_f32s(rest, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::numbers;
    use super::*;

    /// By the definition, in double precision.
    fn naive(left: Left<'_>, right: &[f32], columns: usize) -> Vec<f64> {
        let Left {
            values,
            rows,
            runs,
            elements,
        } = left;
        let mut out = Vec::new();
        for start in rows {
            for column in 0..columns {
                let mut sum = 0.0;
                for run in 0..runs.count {
                    for element in 0..elements.count {
                        let k = run * elements.count + element;
                        let left = values[start + run * runs.step + element * elements.step];
                        sum += f64::from(left) * f64::from(right[k * columns + column]);
                    }
                }
                out.push(sum);
            }
        }
        out
    }

    #[test]
    fn agrees_with_the_definition_for_any_size() {
        for rows in [1, 2, 5, 6, 7, 11, 12, 13, 16, 121, 130] {
            for columns in [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 96] {
                let (runs, elements) = (Steps { count: 3, step: 20 }, Steps { count: 4, step: 2 });
                let values = numbers(rows * 3 + 60, 1);
                let left = Left {
                    values: &values,
                    rows: &(0..rows).map(|row| row * 3).collect::<Vec<_>>(),
                    runs,
                    elements,
                };
                let right = numbers(12 * columns, 2);
                let before = numbers(rows * columns, 3);
                let expected = naive(left, &right, columns);
                let out_rows: Vec<usize> = (0..rows).map(|row| row * columns).collect();
                let transposed: Vec<f32> = (0..12 * columns)
                    .map(|i| right[i % 12 * columns + i / 12])
                    .collect();
                for right in [Right::new(&right, columns), Right::transposed(&transposed, 12)] {
                    for store in [Store::Replace, Store::Add] {
                        let mut out = before.clone();
                        product(left, &right, &mut out, &out_rows, store);
                        for ((out, before), expected) in out.iter().zip(&before).zip(&expected) {
                            let kept = if store == Store::Add {
                                f64::from(*before)
                            } else {
                                0.0
                            };
                            let error = (f64::from(*out) - kept - expected).abs();
                            assert!(error < 1e-5, "{rows} × {columns}: differs by {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_overlap_are_added_up() {
        // Each row is two columns wide and begins one after the one before.
        let rows: Vec<usize> = (0..30).collect();
        let left = Left {
            values: &[1.0; 30],
            rows: &rows,
            runs: Steps::ONE,
            elements: Steps::ONE,
        };
        let mut out = [0.0; 31];
        product(left, &Right::new(&[1.0, 10.0], 2), &mut out, &rows, Store::Add);
        assert_eq!((out[0], out[30]), (1.0, 10.0));
        assert!(out[1..30].iter().all(|&sum| sum == 11.0), "{out:?}");
    }

    #[test]
    #[should_panic(expected = "an element of the left factor")]
    fn no_element_outside_is_read() {
        let left = Left {
            values: &[1.0; 8],
            rows: &[0, 5],
            runs: Steps { count: 2, step: 2 },
            elements: Steps::neighbours(2),
        };
        product(
            left,
            &Right::new(&[1.0; 16], 4),
            &mut [0.0; 8],
            &[0, 4],
            Store::Replace,
        );
    }
}
