"""Encryption of payloads: a codec for `App(codec=Encryption(key))`. Needs the extra `perdure[encryption]`.

Arguments, outputs, results, messages, events and entries of streams are stored as tokens of Fernet
(https://github.com/fyrd/spec: AES-128-CBC, authenticated by HMAC-SHA256), which only the holders of a key can read or
make. Names, keys, queues, attributes, times, and the text of errors aren't payloads, and are stored as they are.

To rotate keys: give every process `Encryption(old, new)`, so that all can read both; then `Encryption(new, old)`, so
that what is written is under the new one; and drop the old one when nothing that was written under it is kept any more.
"""

from __future__ import annotations

import json

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from perdure.errors import ConfigurationError

_MARK = '"perdure-fernet:'


class Encryption:
    """Encrypts payloads with the first of its keys, and reads those of all of them.

    Args:
        key: A key as `Encryption.new_key()` makes it: keep it where other secrets of the application are.
        older: Keys of payloads that were written before.
        reads_plain: Whether payloads that aren't encrypted are read, too: for what was written before the codec was put
            in. False: they are refused, so that nobody who can merely write to the database can pass something off.

    Raises:
        ConfigurationError: A key isn't one.

    Example:
        >>> codec = Encryption(Encryption.new_key())
        >>> codec.decode(codec.encode('{"card": "4111"}'))
        '{"card": "4111"}'
    """

    def __init__(self, key: str, /, *older: str, reads_plain: bool = True) -> None:
        self._keys = MultiFernet([_fernet(each, place) for place, each in enumerate((key, *older), 1)])
        self._reads_plain = reads_plain

    @staticmethod
    def new_key() -> str:
        """A key: 32 random bytes, as text."""
        return Fernet.generate_key().decode()

    def encode(self, text: str) -> str:
        """The text that is stored in place of `text`: a JSON string."""
        return f'{_MARK}{self._keys.encrypt(text.encode()).decode()}"'

    def decode(self, text: str) -> str:
        """The text that `encode` was given.

        Raises:
            ValueError: It is under none of the keys, was tampered with, or isn't encrypted and must be.
        """
        if not text.startswith(_MARK):
            if self._reads_plain:
                return text
            raise ValueError("a payload isn't encrypted, and reads_plain=False; was it written by somebody else?")
        token = json.loads(text).removeprefix(json.loads(f'{_MARK}"'))
        try:
            return self._keys.decrypt(token).decode()
        except InvalidToken:
            raise ValueError(
                "a payload can't be decrypted: give Encryption(...) the key that it was written with, not first; "
                "or it was tampered with"
            ) from None

    def __repr__(self) -> str:
        return "<encryption>"  # never a key


def _fernet(key: str, place: int) -> Fernet:
    try:
        return Fernet(key)
    except (ValueError, TypeError):
        raise ConfigurationError(
            f"key {place} of Encryption(...) is no key: it must be 32 bytes in URL-safe base64, such as "
            "Encryption.new_key() makes"
        ) from None
