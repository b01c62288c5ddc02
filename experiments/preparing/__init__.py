"""From what people own to shards of tokens: units of the input, readers of their documents, workers
that encode them, and what a folder of tokens holds. Helpers of prepare_data."""
