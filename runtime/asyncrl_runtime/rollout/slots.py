"""Places for samples in flight: taken with a ticket, freed one by one as its samples end."""


class Slots:
    """Counts what is taken. The limit is someone else's (concurrency.ConcurrencyLimit)."""

    def __init__(self) -> None:
        self.num_taken = 0

    def take(self, count: int) -> "Taken":
        self.num_taken += count
        return Taken(self, count)


class Taken:
    """Some slots of one ticket; `close` frees what is left of them."""

    def __init__(self, slots: Slots, count: int) -> None:
        self._slots = slots
        self._count = count

    def free_one(self) -> None:
        if self._count:
            self._count -= 1
            self._slots.num_taken -= 1

    def close(self) -> None:
        while self._count:
            self.free_one()
