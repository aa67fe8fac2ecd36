"""Attribution methods: ``fit(train)`` returns self, ``scores(queries)`` returns [Q, N], positive = proponent."""

from .dtrak import DTRAK
from .trak import QUERY_IDS, TRAK

__all__ = ["DTRAK", "QUERY_IDS", "TRAK"]
