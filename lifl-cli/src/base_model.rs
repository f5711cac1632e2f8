//! A job's base model (`baseModel.name`), looked at before anything starts: is it a safetensors file, whole, with just the
//! job's tensors, and every number in it finite? What it is instead is named, with what to do.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use lifl_common::config::mask;
use lifl_common::update::{DType, Schema};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::inputs;
use lifl_common::file_kind::{self, FileKind, Unopened};

/// The longest header that safetensors' own reader takes.
const MOST_HEADER_BYTES: u64 = 100_000_000;

/// Tensors that a message names; more are counted.
const NAMED: usize = 3;

/// Bytes that are looked through at a time; a multiple of every element's size.
const PIECE_BYTES: usize = 1 << 20;

/// What wrappers put around a module's name.
const WRAPPERS: [(&str, &str); 5] = [
    ("_orig_mod", "torch.compile"),
    ("module", "DataParallel"),
    ("_fsdp_wrapped_module", "FSDP"),
    ("_checkpoint_wrapped_module", "activation checkpointing"),
    ("model", "a surrounding module"),
];

/// Why a file cannot be the job's base model.
#[derive(Debug, thiserror::Error)]
pub enum BaseModelError {
    /// It cannot be opened or read.
    #[error("{path}: cannot read this baseModel, which must be a safetensors file{remedy}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What helps, with what joins it to the rest; empty if the cause says it.
        remedy: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else than a sound safetensors file.
    #[error("{path}: baseModel is {found}, expected a safetensors file with the job's tensors: {remedy}", path = path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What helps.
        remedy: String,
    },
    /// It has other tensors than the job's model.
    #[error("{path}: baseModel is a safetensors file of another model than the job's: {differences}{remedy}", path = path.display())]
    Tensors {
        /// Which.
        path: PathBuf,
        /// What differs, shortened.
        differences: String,
        /// What that comes of, if it is known, with what joins it to the rest.
        remedy: String,
    },
    /// It has numbers that are none.
    #[error(
        "{path}: baseModel is a safetensors file with numbers that are not finite: {tensors}: start from a model that was \
         saved before its training diverged",
        path = path.display()
    )]
    NotFinite {
        /// Which.
        path: PathBuf,
        /// Where, shortened.
        tensors: String,
    },
}

/// What the header says of one tensor.
#[derive(Debug, Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Info {
    /// Its element type, if a job's model can have such.
    fn known(&self) -> Option<DType> {
        serde_json::from_value(serde_json::Value::from(self.dtype.as_str())).ok()
    }

    /// Bytes of one element; `None` of a type that is not known here.
    fn element_bytes(&self) -> Option<u64> {
        match self.dtype.as_str() {
            "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" => Some(1),
            "U16" | "I16" | "F16" | "BF16" => Some(2),
            "U32" | "I32" | "F32" => Some(4),
            "U64" | "I64" | "F64" | "C64" => Some(8),
            _ => None,
        }
    }

    fn describe(&self) -> String {
        format!("{} {:?}", self.dtype, self.shape)
    }
}

/// A header's tensors in their order, a name that comes twice twice.
#[derive(Debug, Default)]
struct Header(Vec<(String, Info)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                while let Some(name) = members.next_key::<String>()? {
                    if name == "__metadata__" {
                        members.next_value::<Option<BTreeMap<String, String>>>()?;
                    } else {
                        header.0.push((name, members.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Makes sure that the file is a base model for a job of that schema.
///
/// # Errors
/// If it is not; it is not waited for, whatever it is.
pub fn check(path: &Path, schema: &Schema) -> Result<(), BaseModelError> {
    let (mut file, metadata) = file_kind::open_file(path).map_err(|unopened| refuse(path, unopened))?;
    let io = |source| BaseModelError::Io {
        path: path.to_owned(),
        remedy: "",
        source,
    };
    let start = file_kind::start_of(&mut file).map_err(io)?;
    let length = metadata.len();
    let (header_bytes, header) = header(path, &mut file, &start, length)?;
    check_layout(path, &header, 8 + header_bytes, length)?;
    check_tensors(path, &header, schema)?;
    check_finite(path, &mut file, &header, 8 + header_bytes)
}

/// Of a path that is no file.
fn refuse(path: &Path, unopened: Unopened) -> BaseModelError {
    // What is a URL and should be a path may have a secret in it.
    let path = &PathBuf::from(mask(&path.to_string_lossy()));
    match unopened {
        Unopened::NoFile(what) => {
            let remedy = match only_model_in(path).filter(|_| what == "a folder") {
                Some(model) => format!("give {}", model.display()),
                None => "give the path of the file itself".to_owned(),
            };
            format(path, what, remedy)
        }
        Unopened::Io(source) => BaseModelError::Io {
            path: path.to_owned(),
            remedy: match source.kind() {
                io::ErrorKind::NotFound if path.to_string_lossy().contains("://") => {
                    ": download it first, and give its path"
                }
                io::ErrorKind::NotFound if path.starts_with("~") => {
                    ": write the path out, ~ is a shell's abbreviation"
                }
                io::ErrorKind::NotFound => {
                    ": give its path, from the root or from the folder that lifl is started in"
                }
                io::ErrorKind::PermissionDenied => ": let the user that runs lifl read it (`chmod`)",
                _ => "",
            },
            source,
        },
    }
}

/// The one model in a folder, as runs and downloads leave them.
fn only_model_in(folder: &Path) -> Option<PathBuf> {
    let usual = folder.join("model.safetensors");
    if usual.is_file() {
        return Some(usual);
    }
    let entries = std::fs::read_dir(folder)
        .ok()?
        .flatten()
        .map(|entry| entry.path());
    let mut models = entries.filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    models.next().filter(|_| models.next().is_none())
}

fn format(path: &Path, found: impl Into<String>, remedy: impl Into<String>) -> BaseModelError {
    BaseModelError::Format {
        path: path.to_owned(),
        found: found.into(),
        remedy: remedy.into(),
    }
}

/// Reads the header: a length of 8 bytes, then that many of JSON (safetensors' README, "Format").
fn header(path: &Path, file: &mut File, start: &[u8], length: u64) -> Result<(u64, Header), BaseModelError> {
    const AGAIN: &str = "copy or download it again";
    if start.is_empty() {
        return Err(format(path, "an empty file", AGAIN));
    }
    let header_bytes = start.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    let Some(header_bytes) = header_bytes.filter(|_| start.get(8).is_none_or(|&first| first == b'{')) else {
        return Err(other_format(path, start));
    };
    if start.get(8).is_none() && file_kind::recognise(start).is_some() {
        return Err(other_format(path, start));
    }
    if header_bytes > MOST_HEADER_BYTES {
        let found = format!("a file whose header has {header_bytes} bytes, more than any safetensors file's");
        return Err(format(path, found, AGAIN));
    }
    if length < 8 + header_bytes {
        let found = format!("cut off: its header has {header_bytes} bytes, the whole file {length}");
        return Err(format(path, found, AGAIN));
    }
    let read = || {
        file.seek(SeekFrom::Start(8))?;
        let mut text = Vec::new();
        BufReader::new(file).take(header_bytes).read_to_end(&mut text)?;
        Ok(text)
    };
    let text: Vec<u8> = read().map_err(|source| BaseModelError::Io {
        path: path.to_owned(),
        remedy: "",
        source,
    })?;
    let header: Header = serde_json::from_slice(&text).map_err(|error| {
        format(
            path,
            format!("a file whose header is not safetensors' ({error})"),
            AGAIN,
        )
    })?;
    Ok((header_bytes, header))
}

/// Names a file that is not safetensors.
fn other_format(path: &Path, start: &[u8]) -> BaseModelError {
    let convert = "load it with Python and write it with safetensors' save_file";
    let foreign = file_kind::recognise(start);
    let extension = path.extension().and_then(|extension| extension.to_str());
    let (found, remedy) = match foreign {
        Some(FileKind::Json)
            if String::from_utf8_lossy(start).contains("\"weight_map\"") || is_index(path) =>
        {
            (
                "the index of a model in several files".to_owned(),
                "merge them into one: load each with safetensors' load_file, and write all tensors with one save_file",
            )
        }
        Some(FileKind::Json)
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-")) =>
        {
            (
                "the description of a run's checkpoint".to_owned(),
                "give the model-….safetensors beside it",
            )
        }
        Some(foreign @ (FileKind::Torch | FileKind::Pickle)) => (
            if foreign == FileKind::Pickle && matches!(extension, Some("pt" | "pth" | "bin")) {
                "a PyTorch file (a pickle)".to_owned()
            } else {
                foreign.name().to_owned()
            },
            "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), \"model.safetensors\")",
        ),
        Some(foreign @ (FileKind::Keras | FileKind::Hdf5)) => (
            foreign.name().to_owned(),
            "load it with Keras, and write {w.path: w.numpy() for w in model.weights} with safetensors.numpy.save_file, \
             under the job's names",
        ),
        Some(foreign @ (FileKind::Npz | FileKind::Npy)) => (
            foreign.name().to_owned(),
            "convert it: safetensors.numpy.save_file(dict(numpy.load(FILE)), \"model.safetensors\")",
        ),
        Some(foreign) => (foreign.name().to_owned(), foreign.remedy().unwrap_or(convert)),
        None if extension == Some("onnx") => ("an ONNX model".to_owned(), convert),
        None => {
            let start = &start[..start.len().min(8)];
            (format!("a file that begins with the bytes {start:02x?}"), convert)
        }
    };
    format(path, found, remedy)
}

fn is_index(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().ends_with(".index.json"))
}

/// Makes sure that the tensors fill what is behind the header, each once.
fn check_layout(path: &Path, header: &Header, data_at: u64, length: u64) -> Result<(), BaseModelError> {
    let broken = |found: String| Err(format(path, found, "write it anew with safetensors' save_file"));
    let mut names = HashSet::new();
    let mut tensors: Vec<&(String, Info)> = Vec::new();
    for tensor @ (name, info) in &header.0 {
        if !names.insert(name.as_str()) {
            return broken(format!(
                "a file whose header has the tensor {} twice",
                shown(name)
            ));
        }
        let elements = info.shape.iter().try_fold(1_u64, |n, &side| n.checked_mul(side));
        let bytes = match info.element_bytes() {
            Some(each) => elements.and_then(|n| n.checked_mul(each)),
            // Less than a byte for each, or a type that came later: safetensors knows.
            None => info.data_offsets.1.checked_sub(info.data_offsets.0),
        };
        let (from, to) = info.data_offsets;
        if bytes.is_none() || to.checked_sub(from) != bytes {
            return broken(format!(
                "a file whose header gives tensor {} ({}) the bytes {from} to {to}",
                shown(name),
                info.describe()
            ));
        }
        tensors.push(tensor);
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    for (name, info) in tensors {
        let (from, to) = info.data_offsets;
        if from != end {
            let how = if from < end {
                "overlaps another"
            } else {
                "leaves a hole before it"
            };
            return broken(format!("a file in which tensor {} {how}", shown(name)));
        }
        end = to;
    }
    let data = length - data_at;
    if data < end {
        let (promised, found) = (data_at.saturating_add(end), length);
        return Err(format(
            path,
            format!("cut off: its header promises {promised} bytes, the file has {found}"),
            "copy or download it again",
        ));
    }
    if data > end {
        return broken(format!("a file with {} bytes behind its last tensor", data - end));
    }
    Ok(())
}

/// Makes sure that the tensors are the job's.
fn check_tensors(path: &Path, header: &Header, schema: &Schema) -> Result<(), BaseModelError> {
    let theirs: BTreeMap<&str, &Info> = header
        .0
        .iter()
        .map(|(name, info)| (name.as_str(), info))
        .collect();
    let mut missing = Vec::new();
    let (mut shapes, mut types) = (Vec::new(), Vec::new());
    let mut transposed = true;
    for (tensor, _) in schema.iter() {
        let Some(info) = theirs.get(tensor.name.as_str()) else {
            missing.push(tensor.name.clone());
            continue;
        };
        let shape: Vec<u64> = tensor.shape.iter().map(|&side| side as u64).collect();
        if info.shape != shape {
            transposed &= info.shape.len() > 1 && info.shape.iter().rev().eq(&shape);
            shapes.push(format!("{} is {:?} and not {shape:?}", tensor.name, info.shape));
        }
        if info.known() != Some(tensor.dtype) {
            types.push(format!(
                "{} is {} and not {}",
                tensor.name, info.dtype, tensor.dtype
            ));
        }
    }
    let unexpected: Vec<String> = theirs
        .keys()
        .filter(|name| schema.get(name).is_none())
        .map(|name| shown(name))
        .collect();
    let part = |what: &str, list: &[String]| (!list.is_empty()).then(|| format!("{what}{}", some_of(list)));
    let differences: Vec<String> = [
        part("it lacks ", &missing),
        part("it also has ", &unexpected),
        part("of another shape: ", &shapes),
        part("of another type: ", &types),
    ]
    .into_iter()
    .flatten()
    .collect();
    if differences.is_empty() {
        return Ok(());
    }
    let remedy = if let Some(reason) = wrapped(&theirs, schema).filter(|_| !missing.is_empty()) {
        reason
    } else if is_state(&theirs) {
        ". It is the state of a run's optimizer: give the model-….safetensors of that checkpoint".to_owned()
    } else if !shapes.is_empty() && transposed {
        ". They are transposed: here a dense kernel is [in, out], in PyTorch [out, in]; transpose them before you save the \
         model"
            .to_owned()
    } else if missing.is_empty() && unexpected.is_empty() && shapes.is_empty() {
        let wanted: Vec<String> = schema
            .iter()
            .map(|(tensor, _)| tensor.dtype.to_string())
            .collect();
        format!(". Convert them to {} before you save the model", wanted[0])
    } else {
        ". Give a model of this job's kind, or set lifl.model to the model's".to_owned()
    };
    Err(BaseModelError::Tensors {
        path: path.to_owned(),
        differences: differences.join("; "),
        remedy,
    })
}

/// What the names have more than the job's, if they are the job's without it.
fn wrapped(theirs: &BTreeMap<&str, &Info>, schema: &Schema) -> Option<String> {
    let job: HashSet<&str> = schema.iter().map(|(tensor, _)| tensor.name.as_str()).collect();
    let is_job = |names: &HashSet<String>| {
        names.len() == job.len() && names.iter().all(|name| job.contains(name.as_str()))
    };
    let is_wrapper = |part: &str| WRAPPERS.iter().any(|(wrapper, _)| *wrapper == part);
    let bare = |name: &&str| {
        let parts: Vec<&str> = name.split('.').filter(|part| !is_wrapper(part)).collect();
        parts.join(".")
    };
    if is_job(&theirs.keys().map(bare).collect()) {
        let used = |wrapper: &str| {
            theirs
                .keys()
                .any(|name| name.split('.').any(|part| part == wrapper))
        };
        let used: Vec<String> = WRAPPERS
            .iter()
            .filter(|(wrapper, _)| used(wrapper))
            .map(|(wrapper, whose)| format!("{wrapper}. ({whose})"))
            .collect();
        return Some(format!(
            ". Its names have {} in front, which comes of how the model was wrapped when it was saved: save the inner module's \
             state_dict, or rename the tensors",
            used.join(" and ")
        ));
    }
    // Whatever else all names may begin with.
    let (first, _) = theirs.keys().next()?.split_once('.')?;
    let inner: Option<HashSet<String>> = theirs
        .keys()
        .map(|name| Some(name.strip_prefix(first)?.strip_prefix('.')?.to_owned()))
        .collect();
    is_job(&inner?).then(|| {
        format!(
            ". All its names begin with {}., the job's do not: rename the tensors",
            shown(first)
        )
    })
}

/// Whether the tensors are the two moments of a [server optimizer](lifl_aggregate::State).
fn is_state(theirs: &BTreeMap<&str, &Info>) -> bool {
    !theirs.is_empty()
        && theirs
            .keys()
            .all(|name| name.starts_with("m.") || name.starts_with("v."))
}

/// Makes sure that no number is NaN or infinite. Reads all of the data.
fn check_finite(path: &Path, file: &mut File, header: &Header, data_at: u64) -> Result<(), BaseModelError> {
    let io = |source| BaseModelError::Io {
        path: path.to_owned(),
        remedy: "",
        source,
    };
    let mut found = Vec::new();
    let mut piece = vec![0; PIECE_BYTES];
    for (name, info) in &header.0 {
        let Some(dtype) = info.known().filter(|dtype| dtype.is_float()) else {
            continue;
        };
        let (from, to) = info.data_offsets;
        file.seek(SeekFrom::Start(data_at + from)).map_err(io)?;
        let (mut nans, mut infinities, mut first, mut left) = (0_u64, 0_u64, None, to - from);
        while left > 0 {
            let piece = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            file.read_exact(piece).map_err(io)?;
            let (piece_nans, piece_infinities, at) = not_finite(dtype, piece);
            nans += piece_nans;
            infinities += piece_infinities;
            if let Some(at) = at {
                first.get_or_insert((to - from - left) / dtype.bytes() as u64 + at as u64);
            }
            left -= piece.len() as u64;
        }
        if let Some(first) = first {
            found.push(format!(
                "{} has {nans} NaN and {infinities} infinities, the first at element {first}",
                shown(name)
            ));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(BaseModelError::NotFinite {
        path: path.to_owned(),
        tensors: some_of(&found),
    })
}

/// How many of the numbers in little-endian bytes are NaN, how many infinite, and which is the first of either.
fn not_finite(dtype: DType, bytes: &[u8]) -> (u64, u64, Option<usize>) {
    fn of<const N: usize, F: Into<f64>>(
        bytes: &[u8],
        number: impl Fn([u8; N]) -> F,
    ) -> (u64, u64, Option<usize>) {
        let (elements, _) = bytes.as_chunks::<N>();
        let numbers = || elements.iter().map(|element| number(*element).into());
        // As a rule all are finite, and a loop without a way out is one of vectors.
        if numbers().fold(true, |finite, number: f64| finite & number.is_finite()) {
            return (0, 0, None);
        }
        (
            numbers().filter(|number: &f64| number.is_nan()).count() as u64,
            numbers().filter(|number: &f64| number.is_infinite()).count() as u64,
            numbers().position(|number: f64| !number.is_finite()),
        )
    }
    match dtype {
        DType::F64 => of(bytes, f64::from_le_bytes),
        DType::F32 => of(bytes, f32::from_le_bytes),
        DType::F16 => of(bytes, f16::from_le_bytes),
        DType::BF16 => of(bytes, bf16::from_le_bytes),
        _ => (0, 0, None),
    }
}

/// The first few, and how many more there are.
fn some_of(list: &[String]) -> String {
    let more = list.len().saturating_sub(NAMED);
    let shown = list[..list.len().min(NAMED)].join(", ");
    if more == 0 {
        shown
    } else {
        format!("{shown} and {more} more")
    }
}

/// A tensor's name for a message: a stranger's file may call it anything.
fn shown(name: &str) -> String {
    let short: String = name
        .chars()
        .take(60)
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect();
    if short.len() < name.len() {
        format!("{short}…")
    } else {
        short
    }
}

impl BaseModelError {
    /// As an event for programs, like those about a job's files.
    pub(crate) fn event(&self) -> serde_json::Value {
        let (Self::Io { path, .. }
        | Self::Format { path, .. }
        | Self::Tensors { path, .. }
        | Self::NotFinite { path, .. }) = self;
        inputs::event("baseModel.name", &path.to_string_lossy(), self)
    }
}

#[cfg(test)]
mod tests;
