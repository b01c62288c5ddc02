"""Pure functions on arrays: attention kernels, rotary embedding, normalisation and losses."""
