"""Commands: flags and loops only."""

import os

NO_TPU = "TPU_SKIP_MDS_QUERY"  # which jax sets when it is imported and finds none
TOLD_OF_NO_TPU = NO_TPU in os.environ  # by somebody else, before
