//! The loss that networks learn by: the cross-entropy of the softmax.

/// `-log softmax(logits)[label]`, with the greatest logit taken out first so that nothing overflows; `NaN` where a logit is no
/// finite number.
pub(super) fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    let most = greatest(logits);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[label] - most)
}

/// Writes the gradient of the mean of the [`cross_entropy`] over the batch: `(softmax(logits) - onehot(label)) / batch`; gives
/// that mean. `logits` and `gradient` are `[batch, classes]`.
pub(super) fn mean_cross_entropy(
    logits: &[f32],
    labels: impl ExactSizeIterator<Item = usize>,
    classes: usize,
    gradient: &mut [f32],
) -> f64 {
    let samples = labels.len() as f64;
    let rows = logits
        .chunks_exact(classes)
        .zip(gradient.chunks_exact_mut(classes));
    let mut loss = 0.0;
    for ((logits, gradient), label) in rows.zip(labels) {
        let most = greatest(logits);
        let exponentials = || logits.iter().map(|&logit| f64::from(logit - most).exp());
        let sum: f64 = exponentials().sum();
        for (gradient, exponential) in gradient.iter_mut().zip(exponentials()) {
            *gradient = (exponential / sum / samples) as f32;
        }
        gradient[label] -= (1.0 / samples) as f32;
        loss += sum.ln() - f64::from(logits[label] - most);
    }
    loss / samples
}

fn greatest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_that_of_the_softmax() {
        assert!((cross_entropy(&[0.0, 0.0], 1) - 2.0_f64.ln()).abs() < 1e-12);
        assert!((cross_entropy(&[1000.0, 0.0], 1) - 1000.0).abs() < 1e-9);
        assert!(cross_entropy(&[1000.0, 0.0], 0).abs() < 1e-12);
        for no_number in [f32::NAN, f32::INFINITY] {
            assert!(cross_entropy(&[0.0, no_number], 0).is_nan());
        }
    }

    #[test]
    fn its_gradient_is_that_of_finite_differences() {
        let logits: [f64; 6] = [0.3, -1.2, 2.0, 0.1, 0.0, -0.4];
        let labels = [2, 0];
        let loss = |logits: &[f64]| -> f64 {
            let losses = logits.chunks(3).zip(labels).map(|(logits, label)| {
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                -(logits[label].exp() / sum).ln()
            });
            losses.sum::<f64>() / 2.0
        };
        let mut gradient = [f32::NAN; 6];
        let found = mean_cross_entropy(&logits.map(|x| x as f32), labels.into_iter(), 3, &mut gradient);
        assert!((found - loss(&logits)).abs() < 1e-6);
        for (i, gradient) in gradient.into_iter().enumerate() {
            let shifted = |by| {
                let mut logits = logits;
                logits[i] += by;
                loss(&logits)
            };
            let expected = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            assert!(
                (f64::from(gradient) - expected).abs() < 1e-6,
                "{i}: {gradient} and not {expected}"
            );
        }
    }
}
