//! Safetensors images: as they lie in another worker's slot, and as files that a person gives.

use lifl_common::update::image::{self, DATA_ALIGN};
use lifl_common::update::{DType, Schema, TensorSpec, Tensors, TensorsMut};
use safetensors::SafeTensors;

/// Models of schemas with more data than this are not made: a header's zeros are cheap.
const MODEL_BYTES: usize = 1 << 20;

/// The bytes are an image, held against a job's schema and against the one that they give themselves.
pub fn image(data: &[u8]) {
    let fixed = Schema::new(vec![
        TensorSpec::new("dense.weight", DType::F32, [3, 2]),
        TensorSpec::new("steps", DType::I64, []),
        TensorSpec::new("mask", DType::U8, [5]),
    ])
    .expect("a schema");
    against(data, &fixed);
    if let Ok(own) = image::schema(data) {
        schema(&own);
        against(data, &own);
    }
}

/// A schema's ranges lie one behind the other, and it can be told to another process.
fn schema(schema: &Schema) {
    let mut end = 0;
    for (tensor, range) in schema.iter() {
        assert_eq!(range.start, end);
        assert!(range.start.is_multiple_of(tensor.dtype.bytes()));
        end = range.end;
    }
    assert_eq!(schema.data_bytes(), end);
    let regions = schema.regions();
    assert_eq!(
        regions.iter().map(|region| region.range.len()).sum::<usize>(),
        end
    );
    let text = serde_json::to_string(schema).expect("JSON");
    let told: Schema = serde_json::from_str(&text).expect("a schema");
    assert_eq!((&told, told.digest()), (schema, schema.digest()));
}

fn against(data: &[u8], schema: &Schema) {
    let checked = image::check(data, schema);
    if let Ok((metadata, range)) = &checked {
        assert!(range.start.is_multiple_of(DATA_ALIGN));
        assert_eq!(range.len(), schema.data_bytes());
        assert_eq!(range.end, data.len(), "the data lies inside");
        let weights = &data[range.clone()];
        for (tensor, range) in schema.iter() {
            let bytes = Tensors::new(schema, weights).bytes(&tensor.name).expect("there");
            assert_eq!(bytes.len(), range.len());
        }
        // What was read from it can be written into an image of ours, and is read from that again.
        if schema.data_bytes() <= MODEL_BYTES {
            let mut ours = vec![0; image::image_bytes(schema)];
            let place = image::data_range(schema);
            ours[place.clone()].copy_from_slice(weights);
            image::write_header(&mut ours, schema, metadata);
            let (again, at) = image::check(&ours, schema).expect("an image of ours");
            let mut kept = metadata.clone();
            kept.maker.truncate(again.maker.len());
            assert!(again.maker.len() == metadata.maker.len() || again.maker.len() > 128 - 4);
            assert_eq!((again, at.clone()), (kept, place));
            assert_eq!(&ours[at], weights);
            SafeTensors::deserialize(&ours).expect("safetensors reads an image of ours");
        }
    }
    if schema.data_bytes() > MODEL_BYTES {
        return;
    }
    let mut model = vec![0; schema.data_bytes()];
    match image::import(data, TensorsMut::new(schema, &mut model)) {
        Ok(()) => {
            let theirs = SafeTensors::deserialize(data).expect("it was imported");
            assert_eq!(theirs.len(), schema.iter().len());
            for (tensor, range) in schema.iter() {
                assert_eq!(
                    theirs.tensor(&tensor.name).expect("imported").data(),
                    &model[range]
                );
            }
            if let Ok((_, range)) = checked {
                assert_eq!(model, data[range]);
            }
        }
        Err(error) => assert!(
            checked.is_err(),
            "an image of the job cannot be imported: {error}"
        ),
    }
}
