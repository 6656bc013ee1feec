"""What reads bytes of others, and may only read them or refuse them with a documented error."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fuzzing.mutations import mutated
from postcopy.errors import ImageError, PostcopyError, StreamError
from postcopy.image.working_set import BadWorkingSet

MOST_ERROR_CHARACTERS = 2000


@dataclass(frozen=True)
class Reader:
    """One kind of reader.

    :ivar mutate: makes the bytes of one case.
    :ivar read: reads all of them as a user would; where they are of a file, its error names it.
    :ivar errors: the documented ones.
    :ivar share: of all cases, in parts of the sum over all readers.
    """

    name: str
    mutate: Callable[[random.Random], bytes]
    read: Callable[[bytes], None]
    errors: tuple[type[PostcopyError], ...]
    share: int = 10

    @classmethod
    def of_bytes(
        cls, name: str, seeds: Iterable[bytes], read: Callable[[bytes], None], share: int = 10
    ) -> "Reader":
        """A reader of a stream, whose errors have offsets."""
        kept: Sequence[bytes] = tuple(seeds)
        return cls(name, lambda chance: mutated(kept, chance), read, (StreamError,), share)

    def case(self, seed: int, number: int) -> bytes:
        """The bytes of one case, always the same."""
        return self.mutate(random.Random(f"{seed} {self.name} {number}"))

    def run(self, raw: bytes) -> bool:
        """Read one case; return whether it was taken.

        :raises BaseException: what the reader must never raise.
        """
        try:
            self.read(raw)
        except self.errors as error:
            _check(error, len(raw))
            return False
        return True


def _check(error: PostcopyError, length: int) -> None:
    """A user learns from the error, on one line, what is wrong and where."""
    text = str(error)
    assert text.strip(), "an error without words"
    assert "\n" not in text or not isinstance(error, StreamError | ImageError | BadWorkingSet), (
        f"an error of several lines: {text!r}"
    )
    if isinstance(
        error, StreamError | ImageError | BadWorkingSet
    ):  # a monitor repeats what it was told
        assert len(text) < MOST_ERROR_CHARACTERS, f"an error of {len(text)} characters"
    if isinstance(error, StreamError):
        assert error.offset is not None, f"no offset: {text}"
        assert 0 <= error.offset <= length, f"an offset behind the end: {text}"
    if isinstance(error, ImageError):
        assert error.path, f"no file is named: {text}"
