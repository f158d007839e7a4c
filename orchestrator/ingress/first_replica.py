"""Which replica of the ingress answers: the eldest one; the others stand by. Imports Ray Serve.

One router that knows all outstanding work and every prefix shares sequences out better than several that do not know
each other, and one set of counters is the deployment's. So a second replica is there for the death of the first.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class FirstReplica(RequestRouter):
    """All requests of every proxy go to the replica that has run for longest: Serve lists them in that order.

    Whoever turns out to be dead is taken from the list at once, and the request goes to the next.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        return [[replica] for replica in candidate_replicas]
