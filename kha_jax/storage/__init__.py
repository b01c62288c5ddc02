"""Files and folders, of a disk or of a bucket.

`files`: as a run writes them. `buckets`: what lies below a URL, by ranges or whole. `mirror`: a run
in a bucket as a folder of this machine. `lease`: its lock.
"""

from kha_jax.storage.buckets import Objects as Objects
from kha_jax.storage.buckets import Stored as Stored
from kha_jax.storage.buckets import is_url as is_url
from kha_jax.storage.buckets import retries as retries
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
from kha_jax.storage.files import synced as synced
from kha_jax.storage.files import writable as writable
from kha_jax.storage.lease import Lease as Lease
from kha_jax.storage.lease import holder as holder
from kha_jax.storage.mirror import READ as READ
from kha_jax.storage.mirror import WRITTEN as WRITTEN
from kha_jax.storage.mirror import address as address
from kha_jax.storage.mirror import check_answers as check_answers
from kha_jax.storage.mirror import fetch as fetch
from kha_jax.storage.mirror import in_bucket as in_bucket
from kha_jax.storage.mirror import mirror as mirror
from kha_jax.storage.mirror import opened as opened
from kha_jax.storage.mirror import pieces as pieces
from kha_jax.storage.mirror import put as put
from kha_jax.storage.mirror import put_all as put_all
from kha_jax.storage.mirror import remove as remove
from kha_jax.storage.mirror import rename as rename
from kha_jax.storage.mirror import stored as stored
from kha_jax.storage.mirror import write_json as write_json
from kha_jax.storage.mirror import write_text as write_text
