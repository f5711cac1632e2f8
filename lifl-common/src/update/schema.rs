//! The tensors of a job's models: names, element types, shapes, and where each lies in the data.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// An element type. Names are safetensors' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DType {
    /// 64-bit float.
    F64,
    /// 64-bit signed integer.
    I64,
    /// 64-bit unsigned integer.
    U64,
    /// 32-bit float.
    F32,
    /// 32-bit signed integer.
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// 16-bit float (IEEE 754 half).
    F16,
    /// 16-bit float with f32's exponent.
    BF16,
    /// 16-bit signed integer.
    I16,
    /// 16-bit unsigned integer.
    U16,
    /// 8-bit signed integer.
    I8,
    /// 8-bit unsigned integer.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }

    /// Whether it is one of the floating-point types.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// Of safetensors' types, the ones that are ours too.
    pub(super) const fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use safetensors::Dtype as S;
        Some(match dtype {
            S::F64 => Self::F64,
            S::I64 => Self::I64,
            S::U64 => Self::U64,
            S::F32 => Self::F32,
            S::I32 => Self::I32,
            S::U32 => Self::U32,
            S::F16 => Self::F16,
            S::BF16 => Self::BF16,
            S::I16 => Self::I16,
            S::U16 => Self::U16,
            S::I8 => Self::I8,
            S::U8 => Self::U8,
            _ => return None,
        })
    }

    pub(super) const fn to_safetensors(self) -> safetensors::Dtype {
        use safetensors::Dtype as S;
        match self {
            Self::F64 => S::F64,
            Self::I64 => S::I64,
            Self::U64 => S::U64,
            Self::F32 => S::F32,
            Self::I32 => S::I32,
            Self::U32 => S::U32,
            Self::F16 => S::F16,
            Self::BF16 => S::BF16,
            Self::I16 => S::I16,
            Self::U16 => S::U16,
            Self::I8 => S::I8,
            Self::U8 => S::U8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Its name, unique in the schema.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape, row major; empty for a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of that name, type and shape.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// Elements in it; `None` when that overflows.
    pub fn elements(&self) -> Option<usize> {
        self.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))
    }
}

/// A run of elements of one type in an update's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The elements' type.
    pub dtype: DType,
    /// Their bytes within the data.
    pub range: Range<usize>,
}

/// The most tensors of a model: many times what the largest ones have.
pub const MAX_TENSORS: usize = 131_072;

/// What is wrong with a list of tensors.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SchemaError {
    /// Nothing to average.
    #[error("the model has no tensor")]
    Empty,
    /// More than [`MAX_TENSORS`].
    #[error("the model has {0} tensors, and may have {MAX_TENSORS}: merge some")]
    TooMany(usize),
    /// Two tensors share a name.
    #[error("two tensors are called {0:?}")]
    Duplicate(String),
    /// A name that safetensors keeps for itself.
    #[error("a tensor may not be called __metadata__")]
    Reserved,
    /// The sizes overflow.
    #[error("tensor {0:?} is too large")]
    TooLarge(String),
}

/// All tensors of a job's models, in the order in which their data lies: wider element types first, so that each
/// element is aligned to its size, then by name.
///
/// The data has no holes (safetensors demands that).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<TensorSpec>", into = "Vec<TensorSpec>")]
pub struct Schema {
    tensors: Vec<TensorSpec>,
    ranges: Vec<Range<usize>>,
    /// The tensors' places, in the order of their names.
    by_name: Vec<u32>,
    header: String,
}

impl Schema {
    /// Puts the tensors into the data's order.
    ///
    /// # Errors
    /// If there is none, two share a name, or the sizes overflow.
    pub fn new(mut tensors: Vec<TensorSpec>) -> Result<Self, SchemaError> {
        if tensors.is_empty() {
            return Err(SchemaError::Empty);
        }
        if tensors.len() > MAX_TENSORS {
            return Err(SchemaError::TooMany(tensors.len()));
        }
        tensors.sort_by(|a, b| {
            let wide_first = b.dtype.bytes().cmp(&a.dtype.bytes());
            wide_first
                .then_with(|| (a.dtype as u8).cmp(&(b.dtype as u8)))
                .then_with(|| a.name.cmp(&b.name))
        });
        let mut ranges = Vec::with_capacity(tensors.len());
        let mut names = std::collections::HashSet::new();
        let mut end = 0_usize;
        for tensor in &tensors {
            if tensor.name == "__metadata__" {
                return Err(SchemaError::Reserved);
            }
            if !names.insert(tensor.name.as_str()) {
                return Err(SchemaError::Duplicate(tensor.name.clone()));
            }
            let next = tensor
                .elements()
                .and_then(|n| n.checked_mul(tensor.dtype.bytes()))
                .and_then(|bytes| end.checked_add(bytes))
                .filter(|&next| next <= isize::MAX as usize)
                .ok_or_else(|| SchemaError::TooLarge(tensor.name.clone()))?;
            ranges.push(end..next);
            end = next;
        }
        let header = header(&tensors, &ranges);
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].name.cmp(&tensors[b as usize].name));
        Ok(Self {
            tensors,
            ranges,
            by_name,
            header,
        })
    }

    /// What the header of an [image](super::image) has behind the metadata, to the end of its JSON.
    pub(super) fn header(&self) -> &str {
        &self.header
    }

    /// The tensors with their byte ranges in the data.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&TensorSpec, Range<usize>)> {
        self.tensors.iter().zip(self.ranges.iter().cloned())
    }

    /// The tensor of that name with its byte range in the data.
    pub fn get(&self, name: &str) -> Option<(&TensorSpec, Range<usize>)> {
        let name_of = |&place: &u32| self.tensors[place as usize].name.as_str();
        let found = self.by_name.binary_search_by(|place| name_of(place).cmp(name));
        let place = self.by_name[found.ok()?] as usize;
        Some((&self.tensors[place], self.ranges[place].clone()))
    }

    /// Bytes of the data.
    pub fn data_bytes(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.end)
    }

    /// Elements in all tensors together.
    pub fn elements(&self) -> usize {
        self.iter()
            .map(|(tensor, range)| range.len() / tensor.dtype.bytes())
            .sum()
    }

    /// A number that two schemas have in common only if they are equal, but for chance: FNV-1a over names, types and
    /// shapes. It finds mistakes, not malice.
    pub fn digest(&self) -> u64 {
        let mut digest = 0xcbf2_9ce4_8422_2325_u64;
        let mut take = |bytes: &[u8]| {
            for byte in bytes {
                digest = (digest ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        for tensor in &self.tensors {
            take(&(tensor.name.len() as u64).to_le_bytes());
            take(tensor.name.as_bytes());
            take(tensor.dtype.to_string().as_bytes());
            take(&(tensor.shape.len() as u64).to_le_bytes());
            for &dimension in &tensor.shape {
                take(&(dimension as u64).to_le_bytes());
            }
        }
        digest
    }

    /// The data as runs of one element type; at most one run for each type.
    pub fn regions(&self) -> Vec<Region> {
        let mut regions: Vec<Region> = Vec::new();
        for (tensor, range) in self.iter() {
            match regions.last_mut() {
                Some(last) if last.dtype == tensor.dtype => last.range.end = range.end,
                _ => regions.push(Region {
                    dtype: tensor.dtype,
                    range,
                }),
            }
        }
        regions
    }
}

fn header(tensors: &[TensorSpec], ranges: &[Range<usize>]) -> String {
    let mut json = String::new();
    for (tensor, range) in tensors.iter().zip(ranges) {
        let info = safetensors::tensor::TensorInfo {
            dtype: tensor.dtype.to_safetensors(),
            shape: tensor.shape.clone(),
            data_offsets: (range.start, range.end),
        };
        json.push(',');
        json.push_str(&serde_json::to_string(&tensor.name).expect("a string is JSON"));
        json.push(':');
        json.push_str(&serde_json::to_string(&info).expect("a tensor's place is JSON"));
    }
    json.push('}');
    json
}

impl TryFrom<Vec<TensorSpec>> for Schema {
    type Error = SchemaError;

    fn try_from(tensors: Vec<TensorSpec>) -> Result<Self, SchemaError> {
        Self::new(tensors)
    }
}

impl From<Schema> for Vec<TensorSpec> {
    fn from(schema: Schema) -> Self {
        schema.tensors
    }
}

/// A model's tensors, read where they lie.
#[derive(Clone, Copy, Debug)]
pub struct Tensors<'a> {
    schema: &'a Schema,
    data: &'a [u8],
}

impl<'a> Tensors<'a> {
    /// The data as the schema's tensors.
    ///
    /// # Panics
    /// If `data` has not the schema's length; whoever holds a checked image has it.
    pub fn new(schema: &'a Schema, data: &'a [u8]) -> Self {
        assert_eq!(data.len(), schema.data_bytes(), "data of another schema");
        Self { schema, data }
    }

    /// The schema.
    pub fn schema(&self) -> &'a Schema {
        self.schema
    }

    /// All bytes.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The bytes of the tensor of that name.
    pub fn bytes(&self, name: &str) -> Option<&'a [u8]> {
        self.schema.get(name).map(|(_, range)| &self.data[range])
    }
}

/// A model's tensors, written where they lie.
#[derive(Debug)]
pub struct TensorsMut<'a> {
    schema: &'a Schema,
    data: &'a mut [u8],
}

impl<'a> TensorsMut<'a> {
    /// The data as the schema's tensors.
    ///
    /// # Panics
    /// If `data` has not the schema's length; whoever made the image has it.
    pub fn new(schema: &'a Schema, data: &'a mut [u8]) -> Self {
        assert_eq!(data.len(), schema.data_bytes(), "data of another schema");
        Self { schema, data }
    }

    /// The schema.
    pub fn schema(&self) -> &'a Schema {
        self.schema
    }

    /// All bytes.
    pub fn data(&mut self) -> &mut [u8] {
        self.data
    }

    /// The bytes of the tensor of that name.
    pub fn bytes(&mut self, name: &str) -> Option<&mut [u8]> {
        let (_, range) = self.schema.get(name)?;
        Some(&mut self.data[range])
    }

    /// To read what was written.
    pub fn as_tensors(&self) -> Tensors<'_> {
        Tensors {
            schema: self.schema,
            data: self.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header is judged name by name: each must be found without looking through all.
    #[test]
    fn each_of_as_many_tensors_as_there_may_be_is_found_by_its_name_and_one_more_is_refused() {
        let tensors = |count: usize| -> Vec<TensorSpec> {
            let kinds = [DType::F32, DType::I64, DType::U8];
            let tensor = |n| TensorSpec::new(format!("layer.{n}"), kinds[n % 3], [1]);
            (0..count).map(tensor).collect()
        };
        let schema = Schema::new(tensors(MAX_TENSORS)).expect("a schema");
        for (tensor, range) in schema.iter() {
            assert_eq!(schema.get(&tensor.name), Some((tensor, range)));
        }
        assert_eq!(schema.get("layer.x"), None);
        assert_eq!(
            Schema::new(tensors(MAX_TENSORS + 1)),
            Err(SchemaError::TooMany(MAX_TENSORS + 1))
        );
    }

    #[test]
    fn elements_are_aligned_to_their_size_and_leave_no_hole() {
        let schema = Schema::new(vec![
            TensorSpec::new("odd", DType::U8, [3]),
            TensorSpec::new("half", DType::F16, [5]),
            TensorSpec::new("steps", DType::I64, []),
            TensorSpec::new("w", DType::F32, [2, 3]),
        ])
        .expect("a schema");
        let mut end = 0;
        for (tensor, range) in schema.iter() {
            assert_eq!(range.start, end);
            assert_eq!(range.start % tensor.dtype.bytes(), 0, "{}", tensor.name);
            end = range.end;
        }
        assert_eq!(
            (end, schema.data_bytes(), schema.elements()),
            (8 + 24 + 10 + 3, 45, 1 + 6 + 5 + 3)
        );
    }

    #[test]
    fn refuses_what_cannot_be_laid_out() {
        let w = || TensorSpec::new("w", DType::F32, [2]);
        assert_eq!(Schema::new(vec![]), Err(SchemaError::Empty));
        assert_eq!(
            Schema::new(vec![w(), w()]),
            Err(SchemaError::Duplicate("w".into()))
        );
        let huge = TensorSpec::new("h", DType::F64, [usize::MAX, 2]);
        assert_eq!(Schema::new(vec![huge]), Err(SchemaError::TooLarge("h".into())));
    }

    #[test]
    fn regions_join_neighbours_of_one_type() {
        let schema = Schema::new(vec![
            TensorSpec::new("a", DType::F32, [4]),
            TensorSpec::new("b", DType::I32, [1]),
            TensorSpec::new("c", DType::F32, [2]),
        ])
        .expect("a schema");
        let regions = schema.regions();
        assert_eq!(regions.len(), 2);
        assert_eq!(
            regions[0],
            Region {
                dtype: DType::F32,
                range: 0..24
            }
        );
        assert_eq!(
            regions[1],
            Region {
                dtype: DType::I32,
                range: 24..28
            }
        );
    }
}
