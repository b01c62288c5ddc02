def describe(path, tokenizer):
    raise NotImplementedError
