"""The contract of a store: sessions and their tokens as bytes, durable, in order, all or nothing.

What is promised after a crash: when `Store.write` returns, every write of the group that it reports as
done survives the death of the process and of the machine (on a store whose `durable` is true). A group is
one transaction: after a crash either all of its writes are there or none. An append is therefore never
torn, and the tokens of a session are always the positions first_position .. length-1 without a gap.

Data has one owner: the store that opened it last for writing, as long as its lease lasts. What another one
began before, it cannot commit any more: `write` compares the owner's epoch within its transaction.

`Store.write` is called from one thread; every read may be called from any thread at any time and sees whole
groups only. Stores speak bytes, numbers and the records below. They do not know tensors, attention or HTTP.
"""

from __future__ import annotations

import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

# --- errors ---------------------------------------------------------------------------------------


class StoreError(Exception):
    """The store as a whole cannot do what was asked."""


class StoreUnavailable(StoreError):
    """The store cannot be opened, or is in use by another server; the message says which and why."""


class StoreFenced(StoreError):
    """Nothing can be written any more through this store: another server owns the data now. For good."""


class StoreFull(StoreError):
    """There is no room left to write."""


class TooManyBytes(StoreError):
    """What was to be read has more bytes than were asked for at most."""


class StoreDamaged(StoreError):
    """Stored bytes do not match their checksum, or cannot be read; the message names session and position."""


class Refused(StoreError):
    """One write of a group was refused; the others are not affected."""


class NoSuchSession(Refused):
    """The session was deleted, or never existed."""


class SessionExists(Refused):
    """A session with this key is there already."""


class WrongLength(Refused):
    """`if_length` is not the session's length."""

    def __init__(self, length: int) -> None:
        super().__init__(f"the session's length is {length}")
        self.length = length


class SessionFull(Refused):
    """The append would make the session longer than its `max_tokens`."""

    def __init__(self, length: int, max_tokens: int) -> None:
        super().__init__(f"the session's length is {length}, its max_tokens {max_tokens}")
        self.length = length
        self.max_tokens = max_tokens


class QuotaExceeded(Refused):
    """The write would take the namespace beyond what it may hold."""

    def __init__(self, what: str, held: int, limit: int) -> None:
        super().__init__(f"the namespace would hold {held} {what}, its quota is {limit}")


class NoSuchKey(Refused):
    """No caller's key has this name."""


class KeyExists(Refused):
    """A caller's key of this name is there already."""


class NoSuchModel(Refused):
    """No model has this name."""


class ModelInUse(Refused):
    """Sessions name the model, and what it is to become does not fit them."""


class KeyReused(Refused):
    """The idempotency key was used before, with another digest."""


NO_LIMIT = sys.maxsize


def within(max_bytes: int, found: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """Payloads by position. Raises TooManyBytes at the first that is beyond `max_bytes` of them all."""
    payloads: dict[int, bytes] = {}
    for position, body in found:
        max_bytes -= len(body)
        if max_bytes < 0:
            raise TooManyBytes("the payloads have more bytes than were asked for")
        payloads[position] = body
    return payloads


# --- records --------------------------------------------------------------------------------------

DEFAULT_NAMESPACE = "default"
"""Where sessions are whose server knows no other namespaces."""


class SessionKey(NamedTuple):
    """A session's name: its id within a namespace. Sessions are listed in the order of their keys."""

    namespace: str
    id: str

    @classmethod
    def new(cls, namespace: str) -> SessionKey:
        """One with an id that nobody has."""
        return cls(namespace, uuid.uuid4().hex)

    def __str__(self) -> str:
        """As logs and `verify` name it: an id holds no slash. Callers are told the id alone."""
        return self.id if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/{self.id}"


FIRST_KEY = SessionKey("", "")
"""Before the key of any session."""

STAGED = ""
"""The namespace of sessions that are being written and are not there yet; no caller's has an empty name. They are in no
listing and no total but their own, until `Publish` gives them a name."""


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One session as stored. `sid` is the store's own number for it: never reused, so a late write of a deleted
    session can never reach another one of the same name. Times are seconds since the epoch.
    """

    id: str
    settings: Mapping[str, Any]
    """JSON object with what the domain wants to keep (dim, chunk_size, labels, ...), except `max_tokens`.

    Empty where it is damaged and cannot be read.
    """
    created_at: float
    max_tokens: int | None = None
    sid: int = 0
    length: int = 0
    """Number of tokens that were appended: one more than the last position."""
    num_bytes: int = 0
    """Bytes of all blocks."""
    updated_at: float = 0.0
    """Time of the last append, or of the creation."""
    first_position: int = 0
    """Where the tokens begin: those before were trimmed."""
    namespace: str = DEFAULT_NAMESPACE

    @property
    def key(self) -> SessionKey:
        """Its name; no other session has it."""
        return SessionKey(self.namespace, self.id)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A caller's key as stored: never the secret, but its `digest`. Named by namespace and name, together."""

    namespace: str
    name: str
    digest: bytes
    role: str
    created_at: float
    expires_at: float | None = None
    requests_per_second: float | None = None
    last_used_at: float | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """What a namespace may hold, None for no limit: sessions, their tokens, and the bytes of these and of models."""

    namespace: str
    max_sessions: int | None = None
    max_tokens: int | None = None
    max_bytes: int | None = None

    def check(self, num_sessions: int, num_tokens: int, num_bytes: int) -> QuotaExceeded | None:
        """Why the namespace may not hold so much, or None."""
        for what, held, limit in (
            ("sessions", num_sessions, self.max_sessions),
            ("tokens", num_tokens, self.max_tokens),
            ("bytes", num_bytes, self.max_bytes),
        ):
            if limit is not None and held > limit:
                return QuotaExceeded(what, held, limit)
        return None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model as stored, without its bytes, which `version` stands for. Named by namespace and name, together."""

    namespace: str
    name: str
    hash: str
    config: Mapping[str, Any]
    """JSON object; empty where it is damaged and cannot be read."""
    num_bytes: int
    created_at: float
    version: int
    """A number that no other bytes of a model had before."""


MODEL_PART_BYTES = 1 << 20
"""A model's bytes come in parts of so many, so that no other write waits for all of them."""


class Block(NamedTuple):
    """`num_tokens` consecutive tokens that were appended together, from position `start` on."""

    start: int
    num_tokens: int
    data: bytes
    episode: int | None = None

    def within(self, start: int, stop: int) -> Block:
        """What it has of positions start .. stop-1, of which it has some."""
        low, high = max(start, self.start), min(stop, self.start + self.num_tokens)
        if high - low == self.num_tokens:
            return self
        size = len(self.data) // self.num_tokens
        return Block(low, high - low, self.data[(low - self.start) * size : (high - self.start) * size], self.episode)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the domain keeps about the whole chunks first .. first+num_chunks-1, to the store mere bytes: as many for
    each of them, in their order, so that those of trimmed chunks can go.
    """

    first: int
    num_chunks: int
    data: bytes

    def within(self, first: int, last: int | None) -> Summary:
        """What it keeps of the chunks first .. last-1 (to its end when None), of which it has some."""
        end = self.first + self.num_chunks
        low, high = max(first, self.first), end if last is None else min(last, end)
        if (low, high) == (self.first, end):
            return self
        size = len(self.data) // self.num_chunks
        return Summary(low, high - low, self.data[(low - self.first) * size : (high - self.first) * size])


@dataclass(frozen=True, slots=True)
class CreateSession:
    """Create `row`, which begins at its `first_position`, without tokens; its `sid` and `length` are the store's to
    fill in. Refused: SessionExists, QuotaExceeded.
    """

    row: SessionRow


@dataclass(frozen=True, slots=True)
class UpdateSession:
    """Replace the settings of a session. Refused: NoSuchSession."""

    sid: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DeleteSession:
    """Delete a session: nothing of it is found any more. Refused: NoSuchSession. See `Store.purge`, `Store.erase`."""

    sid: int


class Append(NamedTuple):
    """Add `num_tokens` tokens at the end of a session.

    Refused: NoSuchSession, WrongLength, SessionFull, QuotaExceeded, KeyReused. With an `idempotency_key` that was used
    within the last 24 hours with the same `digest`, nothing is written and the first answer is repeated,
    whatever `if_length` and the session's length are now.
    """

    sid: int
    num_tokens: int
    data: bytes
    """The tokens, `num_tokens` times the session's bytes per token."""
    payloads: Sequence[bytes | None] | None = None
    """One JSON text per token, or None where a token has none."""
    episode: int | None = None
    if_length: int | None = None
    idempotency_key: str | None = None
    digest: bytes = b""
    """Digest of the request's content, compared when the key comes again."""
    trim_chunk: int | None = None
    """Where `max_tokens` would be passed, the oldest chunks of so many tokens go, whole; None: it is refused."""


class Appended(NamedTuple):
    """Answer to an Append: its tokens are the positions start .. length-1."""

    start: int
    length: int
    """Length of the session after this append."""
    replayed: bool = False
    """True when nothing was written, because the idempotency key had been used before."""
    first_position: int = 0
    """Where the session's tokens begin after this append; 0 when it is replayed."""


@dataclass(frozen=True, slots=True)
class Compact:
    """Put a session's next chunks in order: keep their summary, and join the small blocks that they came in.

    The summary must follow those that are there, or begin with the session; `chunk_size` is in tokens. No token,
    episode or position changes. Refused: NoSuchSession, WrongLength (with the number of chunks that have summaries).
    """

    sid: int
    summary: Summary
    chunk_size: int


@dataclass(frozen=True, slots=True)
class KeepSketches:
    """Keep the sketches of a session's whole chunks, bytes as those of a summary, instead of what was kept of these.

    Any chunks, in any order: there may be gaps. `version` says how they were made. `chunk_size` is in tokens. What
    was trimmed meanwhile is not kept. Refused: NoSuchSession.
    """

    sid: int
    sketches: Summary
    chunk_size: int
    version: int


@dataclass(frozen=True, slots=True)
class AddPayloads:
    """Give the tokens of a staged session from position `start` on their payloads. Refused: NoSuchSession."""

    sid: int
    start: int
    payloads: Sequence[bytes | None]


@dataclass(frozen=True, slots=True)
class Publish:
    """Let a staged session be the one of this name: key, settings, times and `max_tokens` are those of `row` from now
    on, and its tokens count. Refused: NoSuchSession, SessionExists, QuotaExceeded.
    """

    sid: int
    row: SessionRow


@dataclass(frozen=True, slots=True)
class Fork:
    """Create `row` with the first `length` tokens of a session (all when None), whose contents are not copied: both
    have them until neither does. Of `row`, `sid` and what tells of tokens are the store's to fill in.

    Refused: NoSuchSession, SessionExists, WrongLength (the session is shorter, or begins later), QuotaExceeded.
    """

    sid: int
    row: SessionRow
    chunk_size: int
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """Forget the tokens of a session from position `length` on, with their payloads, summaries and sketches, and the
    idempotency keys whose append reached beyond. What other sessions share stays theirs.

    Refused: NoSuchSession, WrongLength (it is not `if_length`, is shorter, or begins later: all of it may always go).
    """

    sid: int
    length: int
    chunk_size: int
    if_length: int | None = None


@dataclass(frozen=True, slots=True)
class CreateKey:
    """Let someone call. Refused: KeyExists."""

    row: KeyRow


@dataclass(frozen=True, slots=True)
class DeleteKey:
    """Take a key back. Refused: NoSuchKey."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class UseKey:
    """Note when a key was used last. Refused: NoSuchKey."""

    namespace: str
    name: str
    at: float


@dataclass(frozen=True, slots=True)
class SetQuota:
    """Say what a namespace may hold from now on; what it holds already stays."""

    quota: Quota


@dataclass(frozen=True, slots=True)
class PutModel:
    """Have a name stand for the bytes that `Store.add_model_part` kept as `row.version`; those before are to be purged.

    Refused: ModelInUse when the settings of a session that names it are not as `must_fit` says, QuotaExceeded.
    """

    row: ModelRow
    must_fit: Mapping[str, int]
    everywhere: bool = False
    """Whether sessions of all namespaces name it that have no model of this name themselves."""


@dataclass(frozen=True, slots=True)
class DeleteModel:
    """Forget a model; its bytes are to be purged. Refused: NoSuchModel; ModelInUse while sessions name it."""

    namespace: str
    name: str
    everywhere: bool = False


KeyWrite = CreateKey | DeleteKey | UseKey
ModelWrite = PutModel | DeleteModel
StagedWrite = AddPayloads | Publish
BranchWrite = Fork | Truncate
ChunkWrite = Compact | KeepSketches
SessionWrite = CreateSession | UpdateSession | DeleteSession | Append | ChunkWrite | StagedWrite | BranchWrite
Write = SessionWrite | KeyWrite | SetQuota | ModelWrite
WriteResult = SessionRow | Appended | KeyRow | Quota | ModelRow | Refused
"""CreateSession, UpdateSession, Compact, KeepSketches, AddPayloads, Publish and Truncate answer the SessionRow as it is
now, Fork the new one, DeleteSession the one it was; writes of keys and of models their rows in the same way."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What a store holds, but for what is staged, or a namespace of it. `num_disk_bytes` is what its files take, 0 for
    a store without, and for a namespace: it has none of its own.
    """

    num_sessions: int
    num_tokens: int
    num_bytes: int
    num_disk_bytes: int
    num_model_bytes: int = 0


CheckSettings = Callable[[Mapping[str, Any]], str | None]
"""What is wrong with a session's stored settings, as a part of a sentence; None when nothing is. The domain's."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something `Store.verify` found: the session, or None for the store itself, and a sentence."""

    session: SessionKey | None
    message: str


IDEMPOTENCY_SECONDS = 24 * 3600
"""How long an idempotency key is remembered."""


def first_to_keep(length: int, num_tokens: int, max_tokens: int, chunk_size: int | None) -> int | None:
    """The first position that stays when `num_tokens` follow `length` others; None when they do not fit.

    What is appended is never trimmed by its own append; without `chunk_size` nothing is trimmed.
    """
    if chunk_size is None:
        return None
    first = -(-(length + num_tokens - max_tokens) // chunk_size) * chunk_size
    return first if first <= length else None


def wrong_cut(row: SessionRow, length: int, if_length: int | None = None) -> WrongLength | None:
    """Why a session cannot be cut at `length`, or None."""
    is_right = if_length in (None, row.length) and row.first_position <= length <= row.length
    return None if is_right else WrongLength(row.length)


# --- the contract ---------------------------------------------------------------------------------


class Store(ABC):
    """See the head of this module."""

    url: str
    durable: bool

    @abstractmethod
    def write(self, writes: Sequence[Write], *, now: float) -> list[WriteResult]:
        """Apply a group of writes in order, in one transaction; one outcome per write.

        A write that is refused gets its `Refused` as outcome and changes nothing; the others go on. Later
        writes of a group see the earlier ones. When this raises (StoreFull, StoreError), nothing of the
        group was written. `now` is the time, in seconds since the epoch.
        """

    def watch(self, on_fenced: Callable[[str], None]) -> None:
        """Have `on_fenced` called with the reason, once, by any thread, when every `write` will raise StoreFenced.

        Never, for a store that only one process can reach.
        """
        return

    @abstractmethod
    def purge(self, sid: int | None = None) -> bool:
        """A small transaction that deletes bytes that a session (this one, or any) left when it was deleted, truncated
        or trimmed, and that no other one has; True when there are more.

        Deleting takes a session away at once, but not more of its bytes than others can wait for. Called from the
        thread that writes; what is left when the process ends is found by the next one. Raises as `write` does.
        """

    @abstractmethod
    def add_model_part(self, version: int, number: int, data: bytes) -> None:
        """A small transaction that keeps part `number`, from 0 on, of the bytes of a model: at most MODEL_PART_BYTES.

        Nobody finds them before a `PutModel` names the version. Called from the thread that writes. Raises as `write`.
        """

    @abstractmethod
    def purge_models(self, unfinished: Collection[int] = ()) -> bool:
        """A small transaction that deletes bytes that no model stands for; True when there are more. Called as `purge`.

        `unfinished` are the versions of which parts are still to come.
        """

    @abstractmethod
    def give_back(self) -> bool:
        """Return a little of the free space to the file system; True when there is more. Called as `purge` is."""

    @abstractmethod
    def erase(self) -> bool:
        """Take what was deleted or trimmed out of the store's files too; False while some of it may be left there.

        At once where nothing was deleted; readers that still need it are not waited for. Called as `purge` is.
        """

    @abstractmethod
    def get_session(self, key: SessionKey) -> SessionRow | None:
        """The session of this name, or None."""

    @abstractmethod
    def list_sessions(
        self,
        namespace: str | None = None,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: SessionKey = FIRST_KEY,
        limit: int = 100,
    ) -> list[SessionRow]:
        """Sessions in the order of their keys (by code point), from the first greater than `after` on.

        Of one namespace, then `after` is of it too, or of all but STAGED. Without those whose settings cannot be read.
        Only ids that begin with `prefix`, and only sessions whose `settings["labels"]` hold all of `labels`.
        """

    @abstractmethod
    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The blocks that overlap positions start .. stop-1 (to the end when None), whole, in order.

        A consistent view of the moment of the first step, and never all of them in memory at once.
        Raises StoreDamaged at a block whose checksum is wrong. Of a deleted session: nothing.
        """

    @abstractmethod
    def read_ranges(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Block]]:
        """As `read_blocks` for many (sid, start, stop) in one view; with each block its range's place in the list."""

    @abstractmethod
    def read_episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """Where, before position `stop`, the episode changes: first position and episode, from 0 on."""

    @abstractmethod
    def read_summaries(self, sid: int) -> Iterator[Summary]:
        """The summaries that `Compact` kept, in order and without a gap, from the session's first chunk on or from a
        few before that were trimmed since; fewer when one is damaged.

        Never all of them in memory at once.
        """

    @abstractmethod
    def read_sketches(self, sid: int, version: int) -> Iterator[Summary]:
        """What `KeepSketches` kept under this version, in order; without what is damaged.

        Never all of them in memory at once.
        """

    @abstractmethod
    def read_payloads(self, sid: int, positions: Sequence[int], max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """The payloads at these positions (any number of them), where there are any.

        Raises TooManyBytes when they have more than `max_bytes`, without reading many more.
        """

    def read_payloads_each(
        self, wanted: Sequence[tuple[int, Sequence[int], int]]
    ) -> list[dict[int, bytes] | TooManyBytes]:
        """`read_payloads` for each (sid, positions, max_bytes), and what it raised; in one view if there are any."""
        return [self._payloads_or_too_many(*one) for one in wanted]

    def _payloads_or_too_many(
        self, sid: int, positions: Sequence[int], max_bytes: int
    ) -> dict[int, bytes] | TooManyBytes:
        try:
            return self.read_payloads(sid, positions, max_bytes)
        except TooManyBytes as error:
            return error

    @abstractmethod
    def read_payload_range(self, sid: int, start: int, stop: int, max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """The payloads at positions start .. stop-1, where there are any. Raises TooManyBytes as above."""

    @abstractmethod
    def list_keys(self) -> list[KeyRow]:
        """All callers' keys, by namespace and name."""

    @abstractmethod
    def list_models(self) -> list[ModelRow]:
        """All models, by namespace and name."""

    @abstractmethod
    def read_model(self, row: ModelRow) -> bytes | None:
        """A model's bytes; None when they were purged, because the name stands for others now. Raises StoreDamaged."""

    @abstractmethod
    def count_sessions(self, namespace: str, model: str | None = None) -> dict[str, int]:
        """How many sessions of a namespace name each model, or this one; none of those that nobody names."""

    @abstractmethod
    def get_quota(self, namespace: str) -> Quota:
        """What a namespace may hold; no limits where none were set."""

    @abstractmethod
    def totals(self, namespace: str | None = None) -> Totals:
        """What the store holds altogether, or in one namespace."""

    @abstractmethod
    def verify(self, check_settings: CheckSettings = lambda settings: None) -> Iterator[Damage]:
        """Read everything and compare checksums, lengths and positions; changes nothing."""

    @abstractmethod
    def close(self) -> None:
        """Release files and connections; safe to call twice."""
