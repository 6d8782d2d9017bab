"""A seed of its own for each purpose, such as ("attack", step), so that no draw depends on earlier ones."""

import hashlib


def seed_for(seed: int, *purpose: str | int) -> int:
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:7], "little")
