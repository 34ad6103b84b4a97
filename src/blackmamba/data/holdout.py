"""Which documents are held out: decided by a hash of their content alone."""

import hashlib


def document_hash(content: bytes, key: bytes) -> int:
    """A number of 64 bits; documents whose number is below a limit are held out.

    Args:
        content: the document in UTF-8.
        key: another one draws other documents.
    """
    digest = hashlib.blake2b(content, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")
