"""What crosses the boundary between an API process and a worker: msgspec records, one protocol version.

API -> worker: Hello, SubmitRequest, AbortRequest. Worker -> API: Welcome or Refusal, then one StepMessage a
step. Only `AbortRequest` flows against a request's stream. No torch, no Ray.
"""

from typing import Literal, NewType

import msgspec

PROTOCOL_VERSION = 1

HEARTBEAT_MS = 1_000
HEARTBEAT_TIMEOUT_MS = 5_000
"""Of the zmq connection, at both ends."""

REPLICA_FAILED = "replica_failed"
"""`error_code` of requests that a failed step took down."""

RequestId = NewType("RequestId", str)
ReplicaId = NewType("ReplicaId", str)

FinishReason = Literal["stop", "length", "abort", "error", "shutdown", "rejected"]
"""`stop`: stop token or string; `length`: max_tokens or context; `abort`: the client; `error`: the replica
failed; `shutdown`: drained past its deadline; `rejected`: never queued (full queue, bad request)."""


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    """How one request's tokens are chosen. The API has checked the ranges; the Scheduler fills `seed`."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: list[tuple[int, float]] = []
    num_logprobs: int | None = None
    """None: no logprobs; n: the chosen token's and those of the n most likely tokens."""
    max_tokens: int | None = None
    """None: as many as the context holds."""
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    """Beside the model's own end tokens."""
    seed: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of one sampled token, before temperature and filters, after penalties."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First message of a client; answered by Welcome or Refusal. Repeated, it asks for a fresh snapshot."""

    protocol_version: int
    client_id: str


class FetchHint(msgspec.Struct, frozen=True, array_like=True):
    """Where leading pages of a prompt can be had that its replica's node may lack. It may be out of date."""

    peer: str | None
    """Endpoint of the CacheServer that has them; None: the remote store."""
    num_pages: int
    """Leading pages of the prompt that are there, or on the replica's node already."""


class SubmitRequest(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """One request for one sequence. `tenant_salt` enters the namespace of its PageKeys."""

    request_id: RequestId
    token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    """Lower goes first."""
    tenant_salt: bytes = b""
    hints: list[FetchHint] = []
    """Best first."""


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End a request. `finish_reason` is what its last output says: `stop` for a stop string the API saw."""

    request_id: RequestId
    finish_reason: FinishReason = "abort"


Received = SubmitRequest | AbortRequest
"""What the worker's inbox hands to the step loop."""
ClientMessage = Hello | Received


class KVEvent(msgspec.Struct, frozen=True, array_like=True):
    """News of one replica's prefix tree. `stored`: keys are on the device now; `removed`: they are not."""

    kind: Literal["stored", "removed"]
    keys: list[bytes]


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """Events first_version + 1 .. version of one incarnation; a gap asks for a snapshot (Hello)."""

    incarnation: int
    first_version: int
    version: int
    events: list[KVEvent]


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """A replica's load after a step. Token counts are what is still to be computed."""

    num_running: int
    num_waiting: int
    num_prefill_tokens: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    step_s: float
    load_page_s: float | None = None
    """Seconds that a page takes from the node's arena to the device; None: not measured. Likewise below."""
    peer_page_s: float | None = None
    """From a peer's arena into the node's."""
    remote_page_s: float | None = None
    """From the remote store into the node's arena."""


class RequestOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought one request. Empty `token_ids` without a finish: it was queued."""

    request_id: RequestId
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was found, not computed; known from the first generated token on."""
    error: str | None = None
    """For `error` and `rejected`: what was found, what is allowed."""
    error_code: str | None = None
    """For `rejected`: `queue_full`, `prompt_too_long`, `bad_token`, `bad_request`."""
    num_accepted_drafts: int = 0
    """Of `token_ids`, those that the draft had guessed."""
    num_rejected_drafts: int = 0
    """Tokens that it guessed in vain in this step."""


class StepMessage(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """All that one step has to say to one client: its own requests' outputs, everyone's load and KV news."""

    incarnation: int
    step: int
    outputs: list[RequestOutput]
    load: LoadReport
    kv_events: KVEventBatch | None = None


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The worker's side of the handshake. `namespace` is the digest for the empty tenant salt; `card_digest`
    must equal the API process's own (workers.card); `snapshot` holds all keys on the device at `version`."""

    protocol_version: int
    replica_id: ReplicaId
    incarnation: int
    card_digest: str
    namespace: bytes
    page_size: int
    max_context_len: int
    max_requests: int
    """Running and waiting together; one more is refused."""
    version: int
    snapshot: list[bytes]


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """The peer will not talk, and why; the message names both versions."""

    protocol_version: int
    reason: str


WorkerMessage = Welcome | Refusal | StepMessage
