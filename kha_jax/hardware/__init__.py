"""Facts about chips, and what a step is compiled with on them."""
