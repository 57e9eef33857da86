"""What the server counts, as Prometheus reads it."""

import threading
from collections import Counter, defaultdict

BOUNDS_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds of the histogram of how long requests for images took."""
HELP = {
    "t2i_requests_total": "Requests answered, by route and HTTP status.",
    "t2i_images_total": "Images drawn.",
    "t2i_batches_total": "Batches drawn.",
    "t2i_drawing_seconds_total": "Seconds spent drawing batches.",
    "t2i_cancelled_images_total": "Images whose client left before they were drawn.",
}


class Meters:
    """Counters that all threads add to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: defaultdict[str, float] = defaultdict(
            float, {name: 0.0 for name in HELP if name != "t2i_requests_total"}
        )
        self.seconds: Counter[str] = Counter()
        self.total_seconds = 0.0

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; its name may carry labels, as name{key="value"}."""
        with self.lock:
            self.counts[name] += amount

    def took(self, seconds: float) -> None:
        """Record how long a request for images took."""
        with self.lock:
            self.total_seconds += seconds
            for bound in (*map(str, BOUNDS_SECONDS), "+Inf"):
                self.seconds[bound] += seconds <= float(bound)

    def text(self, *, waiting: int) -> str:
        """Write all counters in Prometheus' text format.

        Args:
            waiting: images that wait now.
        """
        with self.lock:
            counts, seconds, total = dict(self.counts), dict(self.seconds), self.total_seconds
        lines = []
        for name, meaning in HELP.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} counter"]
            lines += [
                f"{key} {value:.12g}" for key, value in sorted(counts.items()) if key.split("{")[0] == name
            ]
        lines += [
            "# HELP t2i_waiting_images Images that wait to be drawn.",
            "# TYPE t2i_waiting_images gauge",
        ]
        lines += [f"t2i_waiting_images {waiting}"]
        name = "t2i_request_seconds"
        lines += [f"# HELP {name} Seconds per answered request for images.", f"# TYPE {name} histogram"]
        for bound in (*map(str, BOUNDS_SECONDS), "+Inf"):
            lines.append(f'{name}_bucket{{le="{bound}"}} {seconds.get(bound, 0)}')
        lines += [f"{name}_sum {total:.12g}", f"{name}_count {seconds.get('+Inf', 0)}"]
        return "\n".join(lines) + "\n"
