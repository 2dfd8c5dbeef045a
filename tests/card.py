"""A GPU whose clock is simulated."""

from types import SimpleNamespace

from vizoo.tools.profiling import timing


class Card:
    """A GPU that works through its queue, and a host that launches five kernels a call; times in seconds."""

    def __init__(self, launch, busy):
        self.launch, self.busy = launch, busy
        self.now = self.free = 0.0

    def call(self):
        for _ in range(5):
            self.now += self.launch / 5
            self.free = max(self.free, self.now) + self.busy / 5

    def synchronize(self, device=None):
        self.now = max(self.now, self.free)

    def spin(self, clocks):
        self.free = max(self.free, self.now) + clocks / timing.SPIN

    def event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.free, self.now))
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event
