"""Where a base and its text come from: a name -> files, and files -> documents.

Nothing that is fetched is imported, run or unpickled. What the user can mend is a UserError of
one line; other exceptions are bugs and pass through.
"""

from postnas.sources.names import resolve, resolve_config, resolve_model
from postnas.sources.text import documents, records
from postnas.sources.wheel import cache_dir, file_sha256, joint_sha256

__all__ = [
    "cache_dir",
    "documents",
    "file_sha256",
    "joint_sha256",
    "records",
    "resolve",
    "resolve_config",
    "resolve_model",
]
