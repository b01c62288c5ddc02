"""One run a file; get_config(variant) returns it."""
