"""From a trained model: decoding, sampling, folding of linear mixers, compression of heads."""
