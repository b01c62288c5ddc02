"""What runs know: texts in bits per byte, benchmarks of lm-eval, code that is run."""
