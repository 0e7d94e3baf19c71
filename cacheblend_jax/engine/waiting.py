"""The requests that wait in a scheduler: in order, by turns of tenants, and those that something is done for first."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Request = TypeVar("Request")


class WaitingRequests(Generic[Request]):
    """Requests in the order in which they are taken: tenants take turns, and each one's come in the order they came.

    A request that is set aside is not taken before it is put back; it waits all the same. Not safe to use from several
    threads: its owner locks.

    Args:
        tenant_of: says whose a request is.
    """

    def __init__(self, tenant_of: Callable[[Request], str]) -> None:
        self._tenant_of = tenant_of
        self._by_tenant: OrderedDict[str, deque[Request]] = OrderedDict()  # whose turn it is, first
        self._aside: dict[Request, None] = {}

    def add(self, request: Request) -> None:
        """Adds a request behind its tenant's others; a tenant who has none comes after all others."""
        self._by_tenant.setdefault(self._tenant_of(request), deque()).append(request)

    def has_room_for(self, request: Request, most: int) -> bool:
        """Whether one more may wait: where `most` do, a tenant with less than an equal share of them still has room.

        So no tenant's requests keep those of others out.
        """
        if len(self) < most:
            return True
        tenants = [self._tenant_of(each) for each in self]
        tenant = self._tenant_of(request)
        return tenants.count(tenant) < most // len({*tenants, tenant})

    def next(self) -> Request:
        """Takes the next request.

        Raises:
            StopIteration: there is none that may be taken.
        """
        tenant, queue = next(iter(self._by_tenant.items()))
        request = queue.popleft()
        if queue:
            self._by_tenant.move_to_end(tenant)
        else:
            del self._by_tenant[tenant]
        return request

    def set_aside(self, request: Request) -> None:
        """Keeps a request that was taken until it is put back."""
        self._aside[request] = None

    def put_back(self, request: Request) -> None:
        """Has a request that is aside taken next; nothing if it was removed meanwhile."""
        if request in self._aside:
            del self._aside[request]
            tenant = self._tenant_of(request)
            self._by_tenant.setdefault(tenant, deque()).appendleft(request)
            self._by_tenant.move_to_end(tenant, last=False)

    def remove(self, request: Request) -> None:
        """Forgets a request, if it waits."""
        self._aside.pop(request, None)
        tenant = self._tenant_of(request)
        queue = self._by_tenant.get(tenant, deque())
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._by_tenant[tenant]

    @property
    def has_next(self) -> bool:
        """Whether one may be taken."""
        return bool(self._by_tenant)

    def __len__(self) -> int:
        return len(self._aside) + sum(map(len, self._by_tenant.values()))

    def __iter__(self) -> Iterator[Request]:
        yield from self._aside
        for queue in self._by_tenant.values():
            yield from queue
