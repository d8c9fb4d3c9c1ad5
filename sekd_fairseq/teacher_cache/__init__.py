"""Cached teacher distributions: a directory of Arrow files that is data only (no pickle).

>>> from sekd_fairseq.teacher_cache import TeacherCache
>>> cache = TeacherCache.open("cache/train")
>>> row = cache[0]
"""

from sekd_fairseq.errors import CacheError
from sekd_fairseq.teacher_cache.format import Manifest, hash_symbols, hash_targets
from sekd_fairseq.teacher_cache.reader import CachedSentence, TeacherCache
from sekd_fairseq.teacher_cache.writer import SentenceColumns, write_shard

__all__ = [
    "CacheError",
    "CachedSentence",
    "Manifest",
    "SentenceColumns",
    "TeacherCache",
    "hash_symbols",
    "hash_targets",
    "write_shard",
]
