"""Room that many share."""

from collections import Counter


class Places:
    """Counts who has how many of a limited number of places.

    Nobody takes more than he leaves free (or the last one), so whoever comes next finds room.
    (After Choudhury and Hahne's dynamic thresholds, 1998.)
    """

    def __init__(self) -> None:
        self.taken = 0
        self._by_owner: Counter[str] = Counter()

    def has_room(self, owner: str, number: int, limit: int) -> bool:
        """Whether so many more may be taken of `limit` places."""
        left = limit - self.taken - number
        return left >= 0 and self._by_owner[owner] + number <= left + 1

    def take(self, owner: str, number: int) -> None:
        self.taken += number
        self._by_owner[owner] += number

    def give_back(self, owner: str, number: int) -> None:
        self.taken -= number
        self._by_owner[owner] -= number
        if self._by_owner[owner] == 0:
            del self._by_owner[owner]
