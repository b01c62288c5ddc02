"""From a trained model: decoding, scoring, sampling, how its text is spelt, folding of linear
mixers, compression of heads."""
