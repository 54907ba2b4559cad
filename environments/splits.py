"""Which questions are held out: a property of their text, and of nothing else.

So no count of tasks, seed, order of a file or restart moves a question from one split
to the other.
"""

from __future__ import annotations

import hashlib


def is_held_out(question: str, *, fraction: float) -> bool:
    """True for about `fraction` of all texts. A larger fraction holds out the same and more."""
    digest = hashlib.sha256(b"penstock.held_out.v1\0" + question.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
