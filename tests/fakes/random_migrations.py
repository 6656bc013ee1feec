"""Migrations that never were: what both sides answer to ``query-migrate``, at random, look after look."""

from random import Random

MIB = 1 << 20
VCPUS = 2


class RandomMigration:
    """One migration, as a user with bad luck may meet it.

    The guest writes faster and slower than memory is sent; the user cancels, switches to postcopy, or
    lets it end; links break, recoveries begin and fail; engines die, and what they counted begins anew;
    answers come late, have members too few, or do not come at all.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.total = self.random.randrange(1, 4096) * MIB
        self.left = self.total
        self.sent = self.round = self.ms = self.requests = 0
        self.dirty = self.random.choice([0, 1 << 10, 1 << 18]) * self.random.random()
        self.waited = {}

    def answers(self):
        """What the source and the destination say at each look; None: nothing."""
        for status, there in self.statuses():
            self.advance(status)
            source, destination = self.source(status), self.destination(there)
            yield self.lost(source), self.lost(destination)
        yield {"status": status, "total-time": self.ms, "ram": self.ram(status)}, None

    def statuses(self):
        random = self.random
        for _ in range(random.randrange(3)):
            yield "setup", "setup"
        for _ in range(random.randrange(1, 15)):
            yield "active", "active"
        end = random.choice(["cancel", "fail", "complete", "postcopy", "postcopy", "postcopy"])
        if end == "cancel":
            yield "cancelling", "active"
            yield "cancelled", "failed"
            return
        if end == "fail":
            yield "failed", "failed"
            return
        yield "device", "active"
        if end == "postcopy":
            yield from self.postcopy()
        yield "completed", "completed"

    def postcopy(self):
        random = self.random
        yield "postcopy-device", "postcopy-device"
        for _ in range(random.randrange(1, 4)):
            for _ in range(random.randrange(1, 8)):
                yield "postcopy-active", "postcopy-active"
            if random.random() < 0.5:
                for _ in range(random.randrange(1, 4)):
                    yield "postcopy-paused", "postcopy-paused"
                    yield "postcopy-recover-setup", "postcopy-paused"
                    yield random.choice(["postcopy-recover", "a-new-status"]), "postcopy-recover"

    def advance(self, status):
        random = self.random
        self.ms += random.randrange(400)
        moved = min(self.left, int(self.total * random.random() / 4))
        if status == "active":
            self.left -= moved
            if self.round == 0 or self.left == 0 or random.random() < 0.1:
                self.round += 1
                self.left = min(self.total, self.left + int(self.dirty * random.randrange(4096)))
        elif status == "postcopy-active":
            self.left -= moved
            self.requests += random.randrange(50)
        else:
            moved = 0
        self.sent += moved

    def ram(self, status):
        return {
            "transferred": self.sent,
            "remaining": 0 if status == "completed" else self.left,
            "total": self.total,
            "dirty-sync-count": self.round,
            "dirty-pages-rate": int(self.dirty),
            "page-size": 4096,
            "postcopy-requests": self.requests,
        }

    def source(self, status):
        answer = {"status": status, "total-time": self.ms, "ram": self.ram(status)}
        chance = self.random.random()
        if chance < 0.05:
            del answer["ram"]
        elif chance < 0.1:
            answer = {"status": status}
        elif chance < 0.15:  # as of an engine that counts from zero
            answer["total-time"] //= 2
            answer["ram"] |= {"transferred": 0, "dirty-sync-count": 0, "postcopy-requests": 0}
        elif chance < 0.2:
            answer["ram"] |= {"remaining": self.total, "total": 0}
        return answer

    def destination(self, status):
        random = self.random
        if status.startswith("postcopy"):
            cause = random.choice(["page", "preempt", "paused", "recovery", "engine"])
            before = self.waited.get(cause, (0,) * VCPUS)
            self.waited[cause] = tuple(us + random.randrange(9999) for us in before)
        if random.random() < 0.1:
            self.waited = {}
        answer = {"status": status}
        if self.waited and random.random() < 0.9:
            causes = {name: list(each) for name, each in self.waited.items()}
            of_all = [sum(each) for each in zip(*causes.values(), strict=True)]
            answer["x-postcopy"] = {"blocktime-us": of_all, "blocktime-causes-us": causes}
        return answer

    def lost(self, answer):
        return None if self.random.random() < 0.05 else answer
