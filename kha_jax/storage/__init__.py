"""Files and folders, of a disk or of a bucket.

`files`: as a run writes them. `buckets`: what lies below a URL, by ranges or whole.
"""

from kha_jax.storage.buckets import Objects as Objects
from kha_jax.storage.buckets import Stored as Stored
from kha_jax.storage.buckets import is_url as is_url
from kha_jax.storage.files import LARGEST as LARGEST
from kha_jax.storage.files import LARGEST_JSON as LARGEST_JSON
from kha_jax.storage.files import PROBE as PROBE
from kha_jax.storage.files import as_written as as_written
from kha_jax.storage.files import being_built as being_built
from kha_jax.storage.files import cache_folder as cache_folder
from kha_jax.storage.files import crc32c as crc32c
from kha_jax.storage.files import is_file as is_file
from kha_jax.storage.files import not_followed as not_followed
from kha_jax.storage.files import open_regular as open_regular
from kha_jax.storage.files import read_json as read_json
from kha_jax.storage.files import replacing as replacing
from kha_jax.storage.files import writable as writable
from kha_jax.storage.files import write_json as write_json
from kha_jax.storage.files import write_text as write_text
