"""API keys: who may ask, and under which name. Keys are kept as digests and never written out."""

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from deployments.args import ServiceArgs
from deployments.front.quotas import Quota
from engine.strict import explain

KEYS_VARIABLE = "MANTA_API_KEYS"
# How often the keys' file is looked at, in seconds.
_LOOK_S = 1.0
logger = logging.getLogger("ray.serve")


# After the key: keys themselves have "=" at their end, if at all.
_OPTION = re.compile(r"([a-z_]+)=([^=]+)")


class ApiKeysError(ValueError):
    """The keys cannot be read, or are needed and missing."""


class KeyRing:
    """Names by key. Without any key everyone may ask, and has no name.

    Those of a file follow it. Where it cannot be read as keys, they stay as they were.
    """

    def __init__(self, entries: list[str]) -> None:
        """
        Args:
            entries: KEY or NAME:KEY each, and behind it what the client may have, as in
                "acme:sk-1 weight=2 max_concurrent=8". Several keys may have one name, as while one
                replaces another, and one quota; a key without a name is called by its place in the
                list.
        """
        self._names: list[tuple[bytes, str]] = []
        self._quotas: dict[str, Quota] = {}
        self._args: ServiceArgs | None = None  # where they name a file
        self._stamp: tuple[int, ...] = ()  # of the file as it was read
        self._looked_at = time.monotonic()
        for number, entry in enumerate(entries, start=1):
            entry, quota = _quota(entry, number)
            name, colon, key = entry.partition(":")
            if not colon:
                name, key = f"key-{number}", entry
            if not (name.strip() and key.strip() and name.isprintable()):
                raise ApiKeysError(
                    f"API key {number}: should be KEY or NAME:KEY, and has an empty part or a name "
                    "that cannot be printed"
                )
            name, key = name.strip(), key.strip()
            if len(key.split()) > 1:
                raise ApiKeysError(
                    f"API key {number}: white space in a key; only limits follow it, as weight=2"
                )
            if (owner := self._owner(key)) not in (None, name):
                raise ApiKeysError(f"API key {number}: is that of {owner!r}, too")
            self._names.append((_digest(key), name))
            if self._quotas.setdefault(name, quota) != quota:
                raise ApiKeysError(
                    f"API key {number}: {name!r} has other limits with another key; give both the "
                    "same"
                )

    @classmethod
    def load(cls, args: ServiceArgs) -> "KeyRing":
        """From the environment and the file; raises ApiKeysError if they must be and are not."""
        entries = os.environ.get(KEYS_VARIABLE, "").split(",")
        stamp = _stamp(args.api_keys_file)
        if args.api_keys_file is not None:
            try:
                lines = Path(args.api_keys_file).read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "not a text file"
                raise ApiKeysError(f"api_keys_file: {args.api_keys_file}: {reason}") from None
            entries += [line for line in lines if not line.lstrip().startswith("#")]
        ring = cls([entry.strip() for entry in entries if entry.strip()])
        if not ring and (args.require_api_key or args.api_keys_file is not None):
            raise ApiKeysError(
                f"there are no API keys: {KEYS_VARIABLE} must be set where the replicas run (the "
                "shell of `ray start`), or api_keys_file name a file on their nodes"
            )
        if not ring and args.isolate_cache_by_key:
            raise ApiKeysError(
                "isolate_cache_by_key: there are no API keys to tell tenants apart by"
            )
        if args.api_keys_file is not None:
            ring._args, ring._stamp = args, stamp
        return ring

    def _follow(self) -> None:
        now = time.monotonic()
        if self._args is None or now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        stamp = _stamp(self._args.api_keys_file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            new = KeyRing.load(self._args)
        except ApiKeysError as error:
            logger.error("The API keys stay as they were: %s", error)
        else:
            self._names, self._quotas = new._names, new._quotas
            logger.info("There are new API keys: %d in all", len(self._names))

    def __bool__(self) -> bool:
        return bool(self._names)

    @property
    def has_several_names(self) -> bool:
        return len({name for _, name in self._names}) > 1

    def quota(self, name: str) -> Quota:
        """What the client of that name may have."""
        return self._quotas.get(name, Quota())

    def find(self, headers: Mapping[str, str]) -> str | None:
        """The name of the key in a request's headers; None when it is none of ours.

        It is a bearer's, or in x-api-key, as Anthropic's clients send it. Takes the same time
        whichever key it is or is not.
        """
        self._follow()
        if not self._names:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        return self._owner(given, headers.get("x-api-key", "").strip())

    def _owner(self, *keys: str) -> str | None:
        """The name of one of these keys."""
        given, found = [_digest(key) for key in keys], None
        for digest, name in self._names:
            if any([hmac.compare_digest(digest, own) for own in given]):
                found = name
        return found


def _stamp(path: str | None) -> tuple[int, ...]:
    """Another one once the file has changed; () where there is none."""
    try:
        found = os.stat(path or "")
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _quota(entry: str, number: int) -> tuple[str, Quota]:
    """(the entry without its limits, those); raises ApiKeysError."""
    given: dict[str, str] = {}
    while len(words := entry.split()) > 1 and (option := _OPTION.fullmatch(words[-1])):
        given[option[1]] = option[2]
        entry = entry.removesuffix(option[0]).rstrip()
    try:
        return entry, Quota.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(f"{name}: {fault}" for name, fault in explain(error.errors()))
        raise ApiKeysError(f"API key {number}: {faults}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
